"""The native backends: tensors to raw pointers for ``fastadv._C`` ("cpp" on CPU tensors, "cuda" on CUDA tensors).

Each function writes into the tensors it is given and returns nothing. Loading ``_C`` is allowed to fail: ``LOAD_ERROR``
then says why, and fastadv.ops falls back.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .reference.step import Scalar

_C: Any = None
LOAD_ERROR: str | None = None


def _load() -> tuple[ModuleType | None, str | None]:
    # torch is imported above on purpose: its libgomp is then the one that _C finds, and the process has a single one.
    try:
        from . import _C
    except ImportError as error:
        return None, f"fastadv._C cannot be imported: {error}"
    return _C, None


_C, LOAD_ERROR = _load()

BUILD_INFO: dict[str, Any] = _C.build_info if _C is not None else {}


def has(op: str, device_type: str) -> bool:
    """Whether this build has a kernel of ``op`` for "cpu" or "cuda" tensors."""
    return hasattr(_C, f"{op}_cuda" if device_type == "cuda" else op)


# In the order of DType in csrc/dtype.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


# --------------------------------------------------------------------------------------------------------- step family


def dense_layout(t: Tensor) -> torch.memory_format:
    """The dense layout of ``t``, samples outermost; where it has none, the one it is copied to."""
    if not t.is_contiguous():
        if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if t.dim() == 5 and t.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def float64_per_sample(value: Scalar, like: Tensor) -> tuple[float, Tensor | None]:
    """A float as (value, None); per-sample values as (0, float64 tensor [N] on the device)."""
    if isinstance(value, Tensor):
        return 0.0, value.to(like.device, torch.float64).expand(like.shape[0]).contiguous()
    return value, None


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _step(
    name: str,
    out: Tensor,
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: Scalar,
    eps: Scalar,
    lo: float,
    hi: float,
    *extra: float,
) -> None:
    # The kernels read a gradient of another type only where that saves a pass: halves beside fp32.
    if grad.dtype != adv.dtype and not (adv.dtype == torch.float32 and grad.dtype in (torch.bfloat16, torch.float16)):
        grad = grad.to(adv.dtype)
    # Kernels see flat memory. A tensor that is not laid out like adv is copied once; the others are used as they are.
    layout = dense_layout(adv)
    adv, grad, x = (t.contiguous(memory_format=layout) for t in (adv, grad, x))
    target = out if out.is_contiguous(memory_format=layout) else torch.empty_like(adv)
    alpha, alphas = float64_per_sample(alpha, adv)
    eps, radii = float64_per_sample(eps, adv)
    samples = adv.shape[0]
    arguments = (
        target.data_ptr(), adv.data_ptr(), grad.data_ptr(), x.data_ptr(),
        samples, adv.numel() // samples if samples else 0, _DTYPES[adv.dtype], _DTYPES[grad.dtype],
        alpha, eps, lo, hi, _address(alphas), _address(radii), *extra,
    )  # fmt: skip
    if adv.is_cuda:
        with torch.cuda.device(adv.device):
            getattr(_C, f"{name}_cuda")(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        getattr(_C, name)(*arguments, torch.get_num_threads())
    if target is not out:
        out.copy_(target)


linf_step = partial(_step, "linf_step")
l2_step = partial(_step, "l2_step")
l1_step = partial(_step, "l1_step")


# --------------------------------------------------------------------------------------------------------- loss family


def _loss(
    name: str,
    loss: Tensor,
    grad: Tensor,
    logits: Tensor,
    *,
    y: Tensor | None = None,
    target: Tensor | None = None,
    logits_ref: Tensor | None = None,
    grad_ref: Tensor | None = None,
) -> None:
    rows, classes = logits.shape
    logits, logits_ref = logits.contiguous(), None if logits_ref is None else logits_ref.contiguous()
    soft = None
    if y is not None and y.is_floating_point():
        y, soft = None, y.to(loss.dtype).contiguous()
    elif y is not None and y.dtype != torch.int64:
        y = y.long()
    y, target = None if y is None else y.contiguous(), None if target is None else target.long().contiguous()
    getattr(_C, name)(
        loss.data_ptr(), grad.data_ptr(), _address(grad_ref), logits.data_ptr(), _address(logits_ref),
        _address(y), _address(soft), _address(target), rows, classes, _DTYPES[logits.dtype], torch.get_num_threads(),
    )  # fmt: skip


ce = partial(_loss, "ce")
log_odds = partial(_loss, "log_odds")
margin = partial(_loss, "margin")
dlr = partial(_loss, "dlr")
dlr_targeted = partial(_loss, "dlr_targeted")
kl = partial(_loss, "kl")
se = partial(_loss, "se")
