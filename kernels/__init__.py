"""Triton kernels, imported as ``fastadv.kernels``: the path on GPUs without nvcc and on other vendors' GPUs.

``OPS`` maps the name of an op to the function that fastadv.ops calls.
"""

from . import step

OPS = {"linf_step": step.linf_step}
