"""The native backends: tensors to raw pointers for ``fastadv._C`` ("cpp" on CPU tensors, "cuda" on CUDA tensors).

Each function writes into the tensors it is given and returns nothing. Loading ``_C`` is allowed to fail: ``LOAD_ERROR``
then says why, and fastadv.ops falls back.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .memory import Row, alike, copy_back, device_of, float64_per_sample, rows_alike
from .reference.step import Scalar

Tensors = Sequence[Tensor]


def _load() -> tuple[Any, str | None]:
    # torch is imported above on purpose: its libgomp is then the one that _C finds, and the process has a single one.
    try:
        return importlib.import_module("fastadv._C"), None
    except ImportError as error:
        return None, f"fastadv._C cannot be imported: {error}"


_C, LOAD_ERROR = _load()

BUILD_INFO: dict[str, Any] = _C.build_info if _C is not None else {}


def missing(op: str, device_type: str) -> str:
    """Why this build cannot run ``op`` on "cpu" or "cuda" tensors; empty if it can."""
    if LOAD_ERROR is not None:
        return LOAD_ERROR
    if device_type == "cpu":
        return "" if hasattr(_C, op) else f"no C++ kernel for {op}"
    if not BUILD_INFO["cuda_archs"]:
        return f"fastadv._C was built without CUDA: {BUILD_INFO['cuda_note']}"
    if not hasattr(_C, f"{op}_cuda"):
        return f"no CUDA kernel for {op} yet"
    if torch.version.hip is not None:
        return "fastadv._C holds CUDA kernels and this torch is for AMD"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    # Each architecture is built with its PTX, so every device from the oldest one on can run the kernels.
    oldest = min(int(arch.removeprefix("sm_")) for arch in BUILD_INFO["cuda_archs"].split())
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < oldest:
        return f"this GPU is sm_{major}{minor} and the kernels are built from sm_{oldest} on (FASTADV_CUDA_ARCHS)"
    return ""


# In the order of DType in csrc/dtype.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# (image, gradient) types that the step kernels read as they are; others are converted first.
_STEP_DTYPES = {(t, t) for t in _DTYPES} | {
    pair for half in (torch.bfloat16, torch.float16) for pair in ((torch.float32, half), (half, torch.float32))
}


def _readable(grad: Tensor, like: Tensor) -> Tensor:
    """``grad`` in a storage type that kernels read beside that of ``like``."""
    return grad if (like.dtype, grad.dtype) in _STEP_DTYPES else grad.to(torch.promote_types(like.dtype, torch.float32))


# --------------------------------------------------------------------------------------------------------- step family


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def _launch(name: str, on: Tensor, *arguments: Any) -> None:
    """Calls the kernel for the device of ``on``: CPU kernels take a number of threads last, CUDA kernels a stream."""
    if _on_gpu(on):
        with device_of(on):
            # The raw stream, as Triton and Inductor ask for it: the public call wraps it in an object, at the cost of a launch.
            getattr(_C, f"{name}_cuda")(*arguments, torch._C._cuda_getCurrentRawStream(on.get_device()))
    else:
        getattr(_C, name)(*arguments, torch.get_num_threads())


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
    fraction: float = 0.0,
) -> None:
    target, adv, grad, x = alike(out, adv, _readable(grad, adv), x)
    alpha, alphas = float64_per_sample(alpha, adv)
    eps, radii = float64_per_sample(eps, adv)
    samples = adv.shape[0]
    sizes = samples, adv.numel() // samples if samples else 0, _DTYPES[adv.dtype]
    workspace = None
    if name == "l2_step" and _on_gpu(adv):
        with device_of(adv):
            size = _C.l2_workspace_cuda(*sizes)
        workspace = torch.empty(size, dtype=torch.uint8, device=adv.device) if size else None
    _launch(
        name, adv, target.data_ptr(), adv.data_ptr(), grad.data_ptr(), x.data_ptr(), *sizes, _DTYPES[grad.dtype],
        alpha, eps, lo, hi, _address(alphas), _address(radii), fraction, _address(workspace),
    )  # fmt: skip
    if target is not out:
        out.copy_(target)


def apgd_step(
    adv: Tensor,
    old: Tensor,
    best: Tensor,
    best_grad: Tensor,
    image: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: Scalar,
    momentum: Scalar,
    eps: Scalar,
    lo: float,
    hi: float,
    better: Tensor,
    taken: Tensor,
) -> None:
    _, *memory = alike(adv, adv, old, best, _readable(best_grad, adv), image, _readable(grad, adv), x)
    flags = better.contiguous(), taken.contiguous()
    _launch_momentum("apgd_step", memory, memory[-2], (alpha, momentum, eps), lo, hi, *flags)
    copy_back((adv, old, best, best_grad, image), memory[:5])


def momentum_step(
    adv: Tensor,
    velocity: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: Scalar,
    decay: Scalar,
    eps: Scalar,
    lo: float,
    hi: float,
) -> None:
    _, *memory = alike(adv, adv, velocity, _readable(grad, adv), x)
    sums = adv.new_empty(len(adv) * _C.launches.sum_chunks, dtype=torch.float64) if _on_gpu(adv) else None
    _launch_momentum("momentum_step", memory, memory[-2], (alpha, decay, eps), lo, hi, sums)
    copy_back((adv, velocity), memory[:2])


def _launch_momentum(
    name: str, memory: list[Tensor], grad: Tensor, scalars: tuple[Scalar, ...], lo: float, hi: float, *more: Tensor | None
) -> None:
    adv, samples = memory[0], len(memory[0])
    values, tensors = zip(*(float64_per_sample(value, adv) for value in scalars), strict=True)
    _launch(
        name, adv, *map(_address, memory), samples, adv.numel() // samples if samples else 0, _DTYPES[adv.dtype],
        _DTYPES[grad.dtype], *values, lo, hi, *map(_address, tensors), *map(_address, more),
    )  # fmt: skip


def linf_start(out: Tensor, x: Tensor, eps: Scalar, lo: float, hi: float, seed: int, samples: Tensor | None, step: int) -> None:
    _start("linf_start", out, x, eps, lo, hi, seed, samples, step, 1)


def normal_start(out: Tensor, x: Tensor, std: Scalar, seed: int, samples: Tensor | None, step: int, copies: int) -> None:
    _start("normal_start", out, x, std, -math.inf, math.inf, seed, samples, step, copies)


def _start(
    name: str,
    out: Tensor,
    x: Tensor,
    eps: Scalar,
    lo: float,
    hi: float,
    seed: int,
    samples: Tensor | None,
    step: int,
    copies: int,
) -> None:
    target, x = alike(out, x)
    eps, radii = float64_per_sample(eps, x)
    numbers, count = _int64(samples), x.shape[0]
    _launch(
        name, x, target.data_ptr(), x.data_ptr(), count, copies, x.numel() // count if count else 0,
        _DTYPES[x.dtype], eps, lo, hi, _address(radii), seed, _address(numbers), step,
    )  # fmt: skip
    if target is not out:
        out.copy_(target)


linf_step = partial(_step, "linf_step")
l2_step = partial(_step, "l2_step")
l1_step = partial(_step, "l1_step")


def _hyperplane(name: str, out: Tensor, x: Tensor, w: Tensor, gap: Tensor, lo: float, hi: float) -> None:
    target, x, w = alike(out, x, _readable(w, x))
    _, gaps = float64_per_sample(gap, x)
    _launch(
        name, x, target.data_ptr(), x.data_ptr(), w.data_ptr(), _address(gaps), len(x), len(w), math.prod(x.shape[1:]),
        _DTYPES[x.dtype], _DTYPES[w.dtype], lo, hi,
    )  # fmt: skip
    if target is not out:
        out.copy_(target)


linf_hyperplane = partial(_hyperplane, "linf_hyperplane")
l2_hyperplane = partial(_hyperplane, "l2_hyperplane")
l1_hyperplane = partial(_hyperplane, "l1_hyperplane")


# --------------------------------------------------------------------------------------------------------- loss family


def _int64(labels: Tensor | None) -> Tensor | None:
    if labels is None or (labels.dtype == torch.int64 and labels.is_contiguous()):
        return labels
    return labels.long().contiguous()


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
    is_soft = y is not None and y.is_floating_point()
    soft = y.to(loss.dtype).contiguous() if y is not None and is_soft else None
    labels, target = None if is_soft else _int64(y), _int64(target)
    _launch(
        name, logits, loss.data_ptr(), grad.data_ptr(), _address(grad_ref), logits.data_ptr(), _address(logits_ref),
        _address(labels), _address(soft), _address(target), rows, classes, _DTYPES[logits.dtype],
    )  # fmt: skip


ce = partial(_loss, "ce")
log_odds = partial(_loss, "log_odds")
margin = partial(_loss, "margin")
dlr = partial(_loss, "dlr")
dlr_targeted = partial(_loss, "dlr_targeted")
kl = partial(_loss, "kl")
se = partial(_loss, "se")


# ------------------------------------------------------------------------------------------------------ weights family


def weight_sums(sums: Tensor, weights: Tensors, grads: Tensors, origins: Tensors, record: bool) -> None:
    rows = rows_alike(weights, map(_readable, grads, weights), origins)
    _launch_weights("weight_sums", rows, sums, record)
    if record:
        copy_back(origins, (o for _, _, o in rows))


def perturb(weights: Tensors, grads: Tensors, origins: Tensors, sums: Tensor, gamma: float, alpha: float) -> None:
    rows = rows_alike(weights, map(_readable, grads, weights), origins)
    _launch_weights("perturb", rows, sums, False, gamma, alpha)
    copy_back(weights, (w for w, _, _ in rows))


def _launch_weights(name: str, rows: list[Row], sums: Tensor, record: bool, gamma: float = 0.0, alpha: float = 0.0) -> None:
    addresses = ([row[field].data_ptr() for row in rows] for field in range(3))
    sizes = [w.numel() for w, _, _ in rows]
    dtypes = ([_DTYPES[row[field].dtype] for row in rows] for field in range(2))
    _launch(name, sums, *addresses, sizes, *dtypes, sums.data_ptr(), sums.shape[1], record, gamma, alpha)
