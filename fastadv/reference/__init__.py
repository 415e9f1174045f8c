"""The specification: every op in plain PyTorch, on any device and in any floating dtype.

Each backend is tested against these functions. They are also the backend of last resort, so a machine without a compiler,
without Triton and without CUDA still runs everything.
"""

from . import loss, step, weights

__all__ = ["loss", "step", "weights"]
