"""What every launch needs: tensors as flat memory in one layout, scalars in float64, and their device as the current one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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


def device_of(t: Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``t`` current, where it is a GPU and is not: kernels are launched on the current one."""
    if not t.is_cuda or t.get_device() == torch.cuda.current_device():
        return _NO_CHANGE
    return torch.cuda.device(t.get_device())


_NO_CHANGE = nullcontext()
