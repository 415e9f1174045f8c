"""What every launch needs: tensors as flat memory in one layout, scalars in float64, and their device as the current one."""

from __future__ import annotations

from collections.abc import Iterable
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
    return out if out.is_contiguous(memory_format=layout) else torch.empty_like(out, memory_format=layout), *sources


Row = tuple[Tensor, Tensor, Tensor]


def rows_alike(weights: Iterable[Tensor], grads: Iterable[Tensor], origins: Iterable[Tensor]) -> list[Row]:
    """Each weight with its gradient and origin, all in the weight's dense layout. :func:`copy_back` what is then written."""
    return [(w, g, o) for _, w, g, o in (alike(w, w, g, o) for w, g, o in zip(weights, grads, origins, strict=True))]


def copy_back(tensors: Iterable[Tensor], written: Iterable[Tensor]) -> None:
    """Gives ``tensors`` what was written to their copies, where they had to be copied."""
    for t, memory in zip(tensors, written, strict=True):
        if memory.data_ptr() != t.data_ptr():
            t.copy_(memory)


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
