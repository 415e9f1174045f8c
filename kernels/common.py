"""What every launch chooses: the arithmetic type, and how much one program and one thread handle."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor


def arithmetic(t: Tensor) -> tl.dtype:
    """The type that arithmetic on ``t`` is done in, as in fastadv.reference."""
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def on_chip(t: Tensor, kib: int) -> int:
    """How many elements of ``t`` fit ``kib`` KiB in the arithmetic type."""
    return kib * 1024 // (8 if t.dtype == torch.float64 else 4)


def warps(block: int, elements_per_thread: int) -> int:
    """Warps for a block of values at that many a thread; at most 16, which is all that a compute unit of AMD's has."""
    return max(1, min(16, block // (32 * elements_per_thread)))
