"""How kernels see tensors: flat memory in one layout, and scalars in float64. Shared by fastadv.native and fastadv.kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference.step import Scalar, dense_layout


def alike(out: Tensor, first: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Where to write and what to read, all in the dense layout of ``first``.

    A tensor that has another layout is copied once. If the place to write is then not ``out``, the caller copies it there.
    """
    if out.is_contiguous() and first.is_contiguous() and all(t.is_contiguous() for t in others):  # as nearly always
        return out, first, *others
    layout = dense_layout(first)
    sources = [t.contiguous(memory_format=layout) for t in (first, *others)]
    return out if out.is_contiguous(memory_format=layout) else torch.empty_like(sources[0]), *sources


def float64_per_sample(value: Scalar, like: Tensor) -> tuple[float, Tensor | None]:
    """A float as (value, None); a tensor, one value or one per sample, as (0, float64 tensor [N] on the device)."""
    if isinstance(value, Tensor):
        return 0.0, value.to(like.device, torch.float64).expand(like.shape[0]).contiguous()
    return value, None
