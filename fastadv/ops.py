"""The ops: one public function each, whatever computes it.

Backends, by device: "cuda" (C++ kernels) then "triton" on GPUs; "cpp" on CPU; "reference" (plain PyTorch) anywhere. The
first that can run an op is used; ``use_backend`` or the environment variable ``FASTADV_BACKEND`` asks for one by name, and
then nothing else is tried. This is the only file that knows all backends.

Called eagerly, an op goes straight to its kernel. Under torch.compile, or where a gradient is recorded, it goes
through ``torch.ops.fastadv``, which has the schema, the shape function and the autograd formula.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import native, reference
from .checks import INTEGERS, describe
from .reference.step import Scalar

STEPS = ("linf_step", "l2_step", "l1_step")
UPDATES = ("apgd_step", "momentum_step")
STARTS = ("linf_start", "normal_start")
HYPERPLANES = ("linf_hyperplane", "l2_hyperplane", "l1_hyperplane")
WEIGHTS = ("weight_sums", "perturb")
LOSSES = ("ce", "log_odds", "margin", "dlr", "dlr_targeted", "kl", "se")
ALL = (*STEPS, *UPDATES, *STARTS, *WEIGHTS, *LOSSES)
BACKENDS = ("cuda", "triton", "cpp", "reference")
PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpp", "reference")}

Implementation = Callable[..., Any]
Tensors = Sequence[Tensor]

# ---------------------------------------------------------------------------------------------------- choice of backend

_asked_for: ContextVar[str | None] = ContextVar("fastadv_backend", default=os.environ.get("FASTADV_BACKEND") or None)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Runs every op inside the block on backend ``name`` ("cuda", "triton", "cpp", "reference"), or fails; None: choose.

    Raises ValueError for an unknown name at once, and RuntimeError from an op that the backend cannot run, saying why.
    """
    _check_backend_name(name)
    token = _asked_for.set(name)
    try:
        yield
    finally:
        _asked_for.reset(token)


def asked_for() -> str | None:
    """The backend that :func:`use_backend` or FASTADV_BACKEND asks for; None: the best there is."""
    return _asked_for.get()


def _check_backend_name(name: str | None) -> None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")


@cache
def _triton_kernels() -> tuple[dict[str, Implementation], str]:
    """The Triton kernels by op, imported on first need (it takes a while), or none and the reason."""
    try:
        version = importlib.import_module("triton").__version__
        if tuple(map(int, version.split(".")[:2])) < (3, 5):  # some before it pass fp64 arguments with another width
            return {}, f"Triton {version} is older than 3.5"
        return importlib.import_module("fastadv.kernels").OPS, ""
    except ImportError as error:
        return {}, f"Triton cannot be imported: {error}"


def _reference(op: str) -> Implementation:
    home = reference.loss if op in LOSSES else reference.weights if op in WEIGHTS else reference.step
    function = getattr(home, op)

    def step(out: Tensor, *args: Any) -> None:
        out.copy_(function(*args))

    def update(*args: Any) -> None:
        values = function(*args)
        for t, value in reversed(list(zip(args, values, strict=False))):  # adv last: what is remembered may be what it was
            t.copy_(value)

    def loss(loss: Tensor, grad: Tensor, logits: Tensor, *, y: Tensor, target: Tensor | None = None) -> None:
        labels = [t if t.is_floating_point() else t.long() for t in (y, target) if t is not None]
        value, dlogits = function(logits, *labels)
        loss.copy_(value)
        grad.copy_(dlogits)

    def divergence(loss: Tensor, grad: Tensor, logits: Tensor, *, logits_ref: Tensor, grad_ref: Tensor | None) -> None:
        value, d_ref, dlogits = function(logits_ref, logits)
        loss.copy_(value)
        grad.copy_(dlogits)
        if grad_ref is not None:
            grad_ref.copy_(d_ref)

    def weight_sums(sums: Tensor, weights: Tensors, grads: Tensors, origins: Tensors, record: bool) -> None:
        sums.zero_()
        if weights:
            sums[:, 0] = function(weights, grads, weights if record else origins)
        if record:
            restore_(origins, weights)

    def perturb(weights: Tensors, grads: Tensors, origins: Tensors, sums: Tensor, gamma: float, alpha: float) -> None:
        restore_(weights, function(weights, grads, origins, sums.sum(1), gamma, alpha))

    if op in WEIGHTS:
        return weight_sums if op == "weight_sums" else perturb
    if op in UPDATES:
        return update
    return divergence if op in ("kl", "se") else loss if op in LOSSES else step


def implementation(op: str, device_type: str, backend: str) -> tuple[Implementation | None, str]:
    """What runs ``op`` on ``device_type`` with ``backend``, or None and the reason."""
    if backend == "reference":
        return _reference(op), ""
    if backend == "triton":
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return None, "Triton runs on GPUs (on a CPU only under TRITON_INTERPRET=1)"
        kernels, why = _triton_kernels()
        return kernels.get(op), why or ("" if op in kernels else f"no Triton kernel for {op} yet")
    its_device = "cuda" if backend == "cuda" else "cpu"
    why = native.missing(op, its_device) if device_type == its_device else f"{backend} kernels run on {its_device} tensors"
    return (None, why) if why else (getattr(native, op), "")


def select(op: str, device_type: str, asked_for: str | None = None) -> tuple[str, Implementation, str]:
    """The backend for ``op`` on ``device_type``, what it runs, and why not one before it in the order of preference."""
    if asked_for is not None:
        _check_backend_name(asked_for)
        chosen, why = implementation(op, device_type, asked_for)
        if chosen is None:
            raise RuntimeError(f"backend {asked_for!r} was asked for but cannot run {op} on {device_type}: {why}")
        return asked_for, chosen, "asked for by name"
    passed_over: list[str] = []
    for backend in PREFERENCE.get(device_type, ("reference",)):
        chosen, why = implementation(op, device_type, backend)
        if chosen is not None:
            return backend, chosen, "; ".join(passed_over) or "first choice"
        passed_over.append(why)
    raise AssertionError("the reference runs anywhere")


@cache
def _select_once(op: str, device_type: str, asked_for: str | None) -> Implementation:
    return select(op, device_type, asked_for)[1]


def choice(op: str, device_type: str) -> tuple[str, str]:
    """The backend that runs ``op`` on ``device_type`` ("cpu", "cuda") now, and why."""
    backend, _, why = select(op, device_type, _asked_for.get())
    return backend, why


def _implementation_for(op: str, t: Tensor) -> Implementation:
    return _select_once(op, t.device.type, _asked_for.get())


# ----------------------------------------------------------------------------------------------------------------- steps


def linf_step_(
    adv: Tensor, grad: Tensor, x: Tensor, alpha: Scalar, eps: Scalar, lo: float = -math.inf, hi: float = math.inf
) -> Tensor:
    """Moves ``adv`` by ``alpha sign(grad)``, in place, and projects it onto the linf ball around ``x`` and the box.

    Args:
        adv: [N, ...], floating; modified and returned. Not differentiable.
        grad: like adv, any floating dtype. A NaN element moves nothing.
        x: like adv, the same dtype.
        alpha: step size in units of x, float or [N]; negative descends. As a device tensor it may change between replays of
            a CUDA graph.
        eps: radius in units of x, float or [N].
        lo, hi: bounds of every element.

    Contiguous and channels_last memory is used as it is; a tensor laid out otherwise than adv is copied once. All
    backends give the same bits.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or eps is a negative float (per-sample values are not read).
    """
    return _step_in_place("linf_step", adv, grad, x, alpha, eps, lo, hi)


def linf_step(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: Scalar,
    eps: Scalar,
    lo: float = -math.inf,
    hi: float = math.inf,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`linf_step_` into ``out`` (a new tensor by default); ``adv`` is left alone."""
    return _step("linf_step", out, adv, grad, x, alpha, eps, lo, hi)


def l2_step_(
    adv: Tensor, grad: Tensor, x: Tensor, alpha: Scalar, eps: Scalar, lo: float = -math.inf, hi: float = math.inf
) -> Tensor:
    """Moves ``adv`` by ``alpha grad/|grad|_2`` per sample, in place, and projects it onto the l2 ball, then the box.

    Arguments and errors as :func:`linf_step_`; ``alpha`` and ``eps`` are l2 lengths of a whole sample. A sample whose
    gradient is zero or not finite is not moved.
    """
    return _step_in_place("l2_step", adv, grad, x, alpha, eps, lo, hi)


def l2_step(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: Scalar,
    eps: Scalar,
    lo: float = -math.inf,
    hi: float = math.inf,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`l2_step_` into ``out`` (a new tensor by default); ``adv`` is left alone."""
    return _step("l2_step", out, adv, grad, x, alpha, eps, lo, hi)


def l1_step_(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: Scalar,
    eps: Scalar,
    lo: float = -math.inf,
    hi: float = math.inf,
    fraction: float = 0.02,
) -> Tensor:
    """A sparse l1 step, in place, and the exact projection onto the l1 ball and the box together.

    Arguments and errors as :func:`linf_step_`; ``alpha`` and ``eps`` are l1 lengths of a whole sample. The step moves the
    ``fraction`` in (0, 1] of a sample's elements with the largest ``|grad|``, at least one, by equal amounts; elements at
    a wall that they would run into are passed over (Croce and Hein, "Mind the box", 2021).
    """
    _check_fraction(fraction)
    return _step_in_place("l1_step", adv, grad, x, alpha, eps, lo, hi, fraction)


def l1_step(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: Scalar,
    eps: Scalar,
    lo: float = -math.inf,
    hi: float = math.inf,
    fraction: float = 0.02,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`l1_step_` into ``out`` (a new tensor by default); ``adv`` is left alone."""
    _check_fraction(fraction)
    return _step("l1_step", out, adv, grad, x, alpha, eps, lo, hi, fraction)


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"l1_step: fraction must be in (0, 1]; got {fraction}")


def _step_in_place(op: str, adv: Tensor, *args: Any) -> Tensor:
    if adv.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}_: adv requires grad, and an in-place step is not differentiable; wrap it in torch.no_grad()")
    return _step(op, adv, adv, *args)


def _step(
    op: str, out: Tensor | None, adv: Tensor, grad: Tensor, x: Tensor, alpha: Scalar, eps: Scalar, *rest: float
) -> Tensor:
    _check_step(op, out, adv, grad, x, alpha, eps)
    if _through_dispatcher(adv):
        moved = adv if out is adv else adv.detach().clone()
        alphas, radii = (v if isinstance(v, Tensor) else None for v in (alpha, eps))
        values = (0.0 if isinstance(v, Tensor) else v for v in (alpha, eps))
        getattr(torch.ops.fastadv, f"{op}_")(moved, grad, x, *values, *rest, alphas, radii)
        return moved if out is None or out is adv else out.copy_(moved)
    if out is None:
        out = torch.empty_like(adv)
    _implementation_for(op, adv)(out, adv, grad, x, alpha, eps, *rest)
    _written(out)
    return out


def apgd_step_(
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
) -> Tensor:
    """Auto-PGD's move in the linf ball with its bookkeeping (Croce and Hein, 2020), in place, in one pass.

    For each sample, in this order:

    1. where ``better``: ``best = adv`` and ``best_grad = grad``; where ``taken``: ``image = adv``;
    2. ``z`` is the :func:`linf_step` of adv; adv moves by ``momentum (z - adv) + (1 - momentum) (adv - old)``, is projected
       as there, and ``old`` becomes what adv was.

    Args:
        adv: [N, ...], floating; modified and returned. Not differentiable.
        old: like adv, the same dtype: the images before the last move; modified.
        best: likewise, the image to which the attack would return; ``best_grad``, like grad, its gradient; both modified.
        image: likewise, the image to give back; modified. All these are different tensors.
        grad: like adv, any floating dtype. A NaN element moves nothing.
        x: like adv, the same dtype.
        alpha, eps, lo, hi: as :func:`linf_step_`.
        momentum: weight of the step against the last move's, float or [N]; 1 is plain PGD.
        better, taken: bool [N]. Where False, best, best_grad and image are not touched.

    Memory as :func:`linf_step_`: all backends give the same bits.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or eps is a negative float.
    """
    op = "apgd_step"
    _check_step(op, None, adv, grad, x, alpha, eps)
    _check_like(op, "adv", adv, old=old, best=best, image=image)
    _check_like(op, "grad", grad, best_grad=best_grad)
    _check_per_sample(op, adv, momentum=momentum)
    for name, flag in (("better", better), ("taken", taken)):
        if flag.shape != adv.shape[:1] or flag.dtype != torch.bool or flag.device != adv.device:
            raise ValueError(f"{op}: {name} must be bool [{len(adv)}] on {adv.device}; got {describe(flag)}")
    return _update(op, (adv, old, best, best_grad, image), (grad, x), (alpha, momentum, eps), lo, hi, better, taken)


def momentum_step_(
    adv: Tensor,
    velocity: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: Scalar,
    decay: Scalar,
    eps: Scalar,
    lo: float = -math.inf,
    hi: float = math.inf,
) -> Tensor:
    """MI-FGSM's step, in place: ``velocity = decay velocity + grad/|grad|_1``, then the :func:`linf_step_` along velocity.

    Args:
        adv: [N, ...], floating; modified and returned. Not differentiable.
        velocity: like adv, the same dtype; modified. The step is along its values as they are kept.
        grad: like adv, any floating dtype. A sample whose gradient is zero or not finite adds nothing to its velocity.
        decay: factor of the velocity, float or [N] (Dong et al., 2018: 1).
        x, alpha, eps, lo, hi, and errors: as :func:`linf_step_`.
    """
    op = "momentum_step"
    _check_step(op, None, adv, grad, x, alpha, eps)
    _check_like(op, "adv", adv, velocity=velocity)
    _check_per_sample(op, adv, decay=decay)
    return _update(op, (adv, velocity), (grad, x), (alpha, decay, eps), lo, hi)


def _update(op: str, written: Tensors, read: Tensors, scalars: Sequence[Scalar], *rest: Any) -> Tensor:
    """A step that writes several tensors, of which the first is adv; returns that."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in written):
        raise ValueError(f"{op}_: what it writes requires grad, and it is not differentiable; wrap it in torch.no_grad()")
    if _through_dispatcher(written[0]):
        values = (0.0 if isinstance(v, Tensor) else v for v in scalars)
        tensors = (v if isinstance(v, Tensor) else None for v in scalars)
        getattr(torch.ops.fastadv, f"{op}_")(*written, *read, *values, *rest, *tensors)
    else:
        _implementation_for(op, written[0])(*written, *read, *scalars, *rest)
        for t in written:
            _written(t)
    return written[0]


def _check_step(op: str, out: Tensor | None, adv: Tensor, grad: Tensor, x: Tensor, alpha: Scalar, eps: Scalar) -> None:
    shape = adv.shape
    if grad.shape != shape or x.shape != shape or not shape:
        raise ValueError(f"{op}: adv, grad and x must have one shape [N, ...]; got {_shapes(adv, grad, x)}")
    if adv.dtype != x.dtype or not adv.is_floating_point() or not grad.is_floating_point():
        raise ValueError(
            f"{op}: adv and x must have one floating dtype and grad a floating one; got {adv.dtype}, {x.dtype}, {grad.dtype}"
        )
    if not (adv.device == grad.device == x.device):
        raise ValueError(f"{op}: adv, grad and x must be on one device; got {adv.device}, {grad.device}, {x.device}")
    if out is not None and out is not adv and (out.shape != adv.shape or out.dtype != adv.dtype or out.device != adv.device):
        raise ValueError(f"{op}: out must be like adv ({describe(adv)}); got {describe(out)}")
    _check_per_sample(op, adv, alpha=alpha, eps=eps)
    if not isinstance(eps, Tensor) and not eps >= 0:
        raise ValueError(f"{op}: eps must be >= 0; got {eps}")


def _check_per_sample(op: str, adv: Tensor, **scalars: Scalar) -> None:
    for name, value in scalars.items():
        if isinstance(value, Tensor) and value.shape not in ((), adv.shape[:1]):
            raise ValueError(f"{op}: {name} must be a float or have shape [{len(adv)}]; got {list(value.shape)}")


def _check_like(op: str, name: str, model: Tensor, **others: Tensor) -> None:
    for other, t in others.items():
        if t.shape != model.shape or t.dtype != model.dtype or t.device != model.device:
            raise ValueError(f"{op}: {other} must be like {name} ({describe(model)}); got {describe(t)}")


def linf_start(
    x: Tensor,
    eps: Scalar,
    lo: float = -math.inf,
    hi: float = math.inf,
    seed: int = 0,
    samples: Tensor | None = None,
    step: int = 0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """A uniform random start in the linf ball and the box: ``clamp(x + eps u, lo, hi)``, u uniform in [-1, 1).

    Args:
        x: [N, ...], floating. Not differentiable.
        eps: radius in units of x, float or [N].
        lo, hi: bounds of every element.
        seed: of the counter-based generator (Philox-4x32-10), in [0, 2^64).
        samples: the number of each sample, int64 [N] on x's device; default: its place in the batch. What a sample draws
            depends on seed, step and number alone, not on the device, the number of threads or the samples beside it.
        step: a sample's draws of different steps, in [0, 2^32), are independent.
        out: tensor like x to write into, or x itself; default: a new one.

    Raises:
        ValueError: x is not floating [N, ...], eps is negative or not per sample, samples is not as described, out is not
            like x, or seed or step out of range.
    """
    op = "linf_start"
    _check_step(op, out, x, x, x, 0.0, eps)
    seed = _checked_seed(op, x, seed, samples, step)
    if _through_dispatcher(x):
        value, radii = (0.0, eps) if isinstance(eps, Tensor) else (eps, None)
        started: Tensor = torch.ops.fastadv.linf_start(x.detach(), value, lo, hi, seed, samples, step, radii)
        return started if out is None else out.copy_(started)
    if out is None:
        out = torch.empty_like(x)
    _implementation_for(op, x)(out, x, eps, lo, hi, seed, samples, step)
    _written(out)
    return out


def normal_start(
    x: Tensor,
    std: Scalar,
    seed: int = 0,
    samples: Tensor | None = None,
    step: int = 0,
    copies: int = 1,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Noisy copies of each sample in one pass: ``x + std z``, z standard normal; nothing is clamped.

    Args:
        x: [N, ...], floating. Not differentiable.
        std: standard deviation in units of x, float or [N].
        seed, samples: as of :func:`linf_start`, whose random words these are: another step or seed gives other numbers.
        step: of the first copy; copy k of a sample draws in step + k, modulo 2^32.
        copies: of each sample, >= 1.
        out: tensor like x, but [N * copies, ...], to write into; default: a new one. x itself where there is one copy.

    Returns:
        [N * copies, ...], the copies of a sample one after the other. |z| is at most 6.34, which a normal number
        exceeds once in 4 billion.

    Raises:
        ValueError: as :func:`linf_start`; std is negative; copies is no positive integer.
    """
    op = "normal_start"
    if not (isinstance(copies, int) and copies >= 1):
        raise ValueError(f"{op}: copies must be an integer >= 1; got {copies!r}")
    _check_step(op, None, x, x, x, 0.0, 0.0)
    _check_per_sample(op, x, std=std)
    if not isinstance(std, Tensor) and not std >= 0:
        raise ValueError(f"{op}: std must be >= 0; got {std}")
    seed = _checked_seed(op, x, seed, samples, step)
    shape = (len(x) * copies, *x.shape[1:])
    if out is not None and (out.shape != shape or out.dtype != x.dtype or out.device != x.device):
        raise ValueError(f"{op}: out must be {x.dtype} {list(shape)} on {x.device}; got {describe(out)}")
    if _through_dispatcher(x):
        value, values = (0.0, std) if isinstance(std, Tensor) else (std, None)
        noisy: Tensor = torch.ops.fastadv.normal_start(x.detach(), value, seed, samples, step, copies, values)
        return noisy if out is None else out.copy_(noisy)
    if out is None:
        out = _copies_of(x, copies)
    _implementation_for(op, x)(out, x, std, seed, samples, step, copies)
    _written(out)
    return out


def _checked_seed(op: str, x: Tensor, seed: int, samples: Tensor | None, step: int) -> int:
    """The seed's bits as the signed integer that schema and kernels take."""
    if samples is not None and (samples.shape != x.shape[:1] or samples.dtype != torch.int64 or samples.device != x.device):
        raise ValueError(f"{op}: samples must be int64 [{len(x)}] on {x.device}; got {describe(samples)}")
    for name, word, bits in (("seed", seed, 64), ("step", step, 32)):
        if not 0 <= word < 2**bits:
            raise ValueError(f"{op}: {name} must be in [0, 2^{bits}); got {word}")
    return seed - 2**64 if seed >= 2**63 else seed


def _copies_of(x: Tensor, copies: int) -> Tensor:
    """Room for them, in x's layout."""
    if copies == 1:
        return torch.empty_like(x)
    layout = reference.step.dense_layout(x)
    return torch.empty((len(x) * copies, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout)


# ------------------------------------------------------------------------------------------------------------ hyperplanes


def linf_hyperplane(
    x: Tensor, w: Tensor, gap: Tensor, lo: float = -math.inf, hi: float = math.inf, *, out: Tensor | None = None
) -> Tensor:
    """The shortest moves d, in the linf norm, with ``<w, d> = gap`` and ``lo <= x + d <= hi``.

    From x onto the hyperplane ``<w, x + d> = b`` for ``gap = b - <w, x>``. Where the box does not reach it, d goes to the
    corner of the box that is nearest to it (Croce and Hein, "Minimally distorted adversarial examples", 2020).

    Args:
        x: [M, ...], floating, in the box. Not differentiable.
        w: [N, ...], any floating dtype; M is N or a multiple of it, and point i takes plane ``i % N``. An element that is not
            finite moves nothing.
        gap: [M], floating. One that is not finite moves nothing.
        lo, hi: bounds of every element.
        out: tensor like x to write into; default: a new one.

    Returns:
        d, like x. Never NaN.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or out is not like x.
    """
    return _hyperplane("linf_hyperplane", out, x, w, gap, lo, hi)


def l2_hyperplane(
    x: Tensor, w: Tensor, gap: Tensor, lo: float = -math.inf, hi: float = math.inf, *, out: Tensor | None = None
) -> Tensor:
    """:func:`linf_hyperplane` in the l2 norm."""
    return _hyperplane("l2_hyperplane", out, x, w, gap, lo, hi)


def l1_hyperplane(
    x: Tensor, w: Tensor, gap: Tensor, lo: float = -math.inf, hi: float = math.inf, *, out: Tensor | None = None
) -> Tensor:
    """:func:`linf_hyperplane` in the l1 norm. Elements of equal ``|w|`` go the same fraction of their way."""
    return _hyperplane("l1_hyperplane", out, x, w, gap, lo, hi)


def _hyperplane(op: str, out: Tensor | None, x: Tensor, w: Tensor, gap: Tensor, lo: float, hi: float) -> Tensor:
    if x.dim() < 1 or w.shape[1:] != x.shape[1:] or (len(x) % len(w) if len(w) else len(x)) or gap.shape != x.shape[:1]:
        raise ValueError(
            f"{op}: x [M, ...], w [N, ...] and gap [M] must agree, M being a multiple of N; got {_shapes(x, w, gap)}"
        )
    if not (x.is_floating_point() and w.is_floating_point() and gap.is_floating_point()):
        raise ValueError(f"{op}: x, w and gap must be floating; got {x.dtype}, {w.dtype}, {gap.dtype}")
    if not (x.device == w.device == gap.device):
        raise ValueError(f"{op}: x, w and gap must be on one device; got {x.device}, {w.device}, {gap.device}")
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
        raise ValueError(f"{op}: out must be like x ({describe(x)}); got {describe(out)}")
    if _through_dispatcher(x, w):
        moved: Tensor = getattr(torch.ops.fastadv, op)(x.detach(), w.detach(), gap.detach(), lo, hi)
        return moved if out is None else out.copy_(moved)
    if out is None:
        out = torch.empty_like(x)
    _implementation_for(op, x)(out, x, w, gap, lo, hi)
    _written(out)
    return out


# ---------------------------------------------------------------------------------------------------------------- losses

Out = tuple[Tensor, Tensor] | None


def ce(logits: Tensor, y: Tensor, *, out: Out = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy per sample and its gradient with respect to the logits, in one pass.

    Args:
        logits: [N, C], floating, C >= 2.
        y: integer labels [N], or soft labels [N, C].
        out: optional (loss, dlogits) to write into.

    Returns:
        (loss [N], dlogits [N, C]): loss in fp32 (fp64 for fp64 logits), dlogits in the logits' dtype. The loss is
        differentiable in the logits, once; dlogits is not.

    Raises:
        ValueError: shapes, dtypes or devices are not as above.
        IndexError: a label outside [0, C), on CPU; on a GPU, where nobody waits to refuse it, the row's loss and gradient
            are NaN.
    """
    return _loss("ce", out, logits, y)


def log_odds(logits: Tensor, y: Tensor, *, out: Out = None) -> tuple[Tensor, Tensor]:
    """``log((1 - p_y) / p_y)``: cross-entropy as an attack should see it. Arguments as :func:`ce`, integer labels.

    It increases with cross-entropy (ce = softplus(log_odds)) and its gradient has, sample by sample, the same direction,
    without the factor ``1 - p_y`` that underflows to zero on confident models.
    """
    return _loss("log_odds", out, logits, y)


def margin(logits: Tensor, y: Tensor, *, out: Out = None) -> tuple[Tensor, Tensor]:
    """``max_{k != y} z_k - z_y`` (Carlini and Wagner, 2017). Arguments as :func:`ce`, integer labels."""
    return _loss("margin", out, logits, y)


def dlr(logits: Tensor, y: Tensor, *, out: Out = None) -> tuple[Tensor, Tensor]:
    """Difference of logits ratio (Croce and Hein, 2020); the margin at C = 2. Arguments as :func:`ce`, integer labels."""
    return _loss("dlr", out, logits, y)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor, *, out: Out = None) -> tuple[Tensor, Tensor]:
    """Targeted DLR; ``z_target - z_y`` below C = 4. Arguments as :func:`ce`, plus the integer target classes [N]."""
    return _loss("dlr_targeted", out, logits, y, target)


def kl(logits_ref: Tensor, logits: Tensor, *, out: Out = None) -> tuple[Tensor, Tensor]:
    """``KL(softmax(logits_ref) || softmax(logits))`` per sample, and its gradient with respect to ``logits``.

    Both [N, C]; results as :func:`ce`. The loss is differentiable in both arguments, and is never NaN where a reference
    probability underflows.
    """
    return _divergence("kl", out, logits_ref, logits)


def se(logits_ref: Tensor, logits: Tensor, *, out: Out = None) -> tuple[Tensor, Tensor]:
    """``|softmax(logits) - softmax(logits_ref)|_2^2`` per sample (SCORE, Pang et al., 2022). Otherwise as :func:`kl`."""
    return _divergence("se", out, logits_ref, logits)


def _loss(op: str, out: Out, logits: Tensor, y: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check_logits(op, "logits", logits)
    _check_labels(op, "y", y, logits, soft=op == "ce")
    if target is not None:
        _check_labels(op, "target", target, logits, soft=False)
    if _through_dispatcher(logits):
        arguments = (logits, y) if target is None else (logits, y, target)
        return _without_out(op, out, getattr(torch.ops.fastadv, op)(*arguments))
    loss, grad = _loss_buffers(op, out, logits)
    extra = {} if target is None else {"target": target}
    _implementation_for(op, logits)(loss, grad, logits, y=y, **extra)
    return loss, grad


def _divergence(op: str, out: Out, logits_ref: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    _check_logits(op, "logits_ref", logits_ref)
    _check_logits(op, "logits", logits)
    if logits_ref.shape != logits.shape or logits_ref.device != logits.device:
        raise ValueError(
            f"{op}: logits_ref and logits must have one shape and device; got {describe(logits_ref)}, {describe(logits)}"
        )
    dtype = torch.promote_types(logits_ref.dtype, logits.dtype)
    logits_ref, logits = logits_ref.to(dtype), logits.to(dtype)
    if _through_dispatcher(logits_ref, logits):
        loss, _, grad = getattr(torch.ops.fastadv, op)(logits_ref, logits, logits_ref.requires_grad)
        return _without_out(op, out, (loss, grad))
    loss, grad = _loss_buffers(op, out, logits)
    _implementation_for(op, logits)(loss, grad, logits, logits_ref=logits_ref, grad_ref=None)
    return loss, grad


def _loss_buffers(op: str, out: Out, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The tensors that a loss is written into: ``out`` if it fits, new ones otherwise."""
    half = logits.dtype in (torch.bfloat16, torch.float16)
    if out is None:
        rows = logits.size(0)
        loss = logits.new_empty(rows, dtype=torch.float32) if half else logits.new_empty(rows)
        return loss, logits.new_empty(logits.shape)
    loss, grad = out
    dtype = torch.float32 if half else logits.dtype
    for name, t, shape, expected in (("loss", loss, logits.shape[:1], dtype), ("dlogits", grad, logits.shape, logits.dtype)):
        if t.shape != shape or t.dtype != expected or t.device != logits.device or not t.is_contiguous():
            raise ValueError(
                f"{op}: out {name} must be contiguous {list(shape)} {expected} on {logits.device}; got {describe(t)}"
            )
    _written(loss)
    _written(grad)
    return loss, grad


def _without_out(op: str, out: Out, result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if out is None:
        return result
    raise ValueError(f"{op}: out= takes no part in autograd or torch.compile; leave it out there")


# --------------------------------------------------------------------------------------------------------------- weights

SLICES = {"cuda": 256}  # partial sums of a tensor, by device: as many blocks work on it; elsewhere one


def weight_sums(weights: Tensors, grads: Tensors, origins: Tensors, *, record: bool = False) -> Tensor:
    """``|o|^2, <d,d>, <d,g>, <g,g>`` of each tensor, d = weight - origin, in one pass over all.

    Args:
        weights: K floating tensors of any shapes, on one device.
        grads: like the weights, any floating dtype.
        origins: like the weights, the same dtypes.
        record: copy the weights into ``origins`` in the same pass (then d = 0): the backup that :func:`restore_` reads.

    Returns:
        float64 [K, slices, 4]: partial sums, to be added up over the slices. Sums over shards of a tensor may be all-reduced.

    Raises:
        ValueError: the lists disagree in length, shapes, dtypes or devices.
    """
    _check_weights("weight_sums", weights, grads, origins)
    if torch.compiler.is_compiling():
        return torch.ops.fastadv.weight_sums(list(weights), list(grads), list(origins), record)  # type: ignore[no-any-return]
    return _weight_sums(weights, grads, origins, record)


def _weight_sums(weights: Tensors, grads: Tensors, origins: Tensors, record: bool) -> Tensor:
    sums = _sums_buffer(weights)
    if weights:
        _implementation_for("weight_sums", weights[0])(sums, weights, grads, origins, record)
        for origin in origins if record else ():
            _written(origin)
    return sums


def _sums_buffer(weights: Tensors) -> Tensor:
    if not weights:
        return torch.empty(0, 1, 4, dtype=torch.float64)
    first = weights[0]
    slices = SLICES.get(first.device.type, 1)
    return torch.empty(len(weights), slices, 4, dtype=reference.weights.widest(first), device=first.device)


def perturb_(
    weights: Tensors, grads: Tensors, origins: Tensors, sums: Tensor, gamma: float, alpha: float | None = None
) -> None:
    """One step of adversarial weight perturbation, in place: ``w <- o + project(w - o + alpha |o| g/|g|)``, tensor by tensor.

    Args:
        weights, grads, origins: as :func:`weight_sums`; ``origins`` may be the weights themselves. Not differentiable.
        sums: of these tensors, from :func:`weight_sums`.
        gamma: radius of the ball about each origin, relative to its norm.
        alpha: step size, likewise; default ``gamma``: from the origin, one step to the sphere (Wu, Xia and Wang, 2020).

    A tensor whose gradient is zero or not finite is not moved.

    Raises:
        ValueError: the lists disagree as in :func:`weight_sums`, ``sums`` is not theirs, gamma is negative or alpha not finite.
    """
    _check_weights("perturb_", weights, grads, origins)
    if sums.dim() != 3 or sums.shape[::2] != (len(weights), 4):
        raise ValueError(f"perturb_: sums must be [{len(weights)}, slices, 4] from weight_sums; got {describe(sums)}")
    alpha = gamma if alpha is None else alpha
    if not 0 <= gamma < math.inf or not math.isfinite(alpha):
        raise ValueError(f"perturb_: gamma must be finite and >= 0, and alpha finite; got {gamma}, {alpha}")
    if torch.compiler.is_compiling():
        torch.ops.fastadv.perturb_(list(weights), list(grads), list(origins), sums, gamma, alpha)
    else:
        _perturb(weights, grads, origins, sums, gamma, alpha)
        for weight in weights:
            _written(weight)


def _perturb(weights: Tensors, grads: Tensors, origins: Tensors, sums: Tensor, gamma: float, alpha: float) -> None:
    if weights:
        with torch.no_grad():
            _implementation_for("perturb", weights[0])(weights, grads, origins, sums, gamma, alpha)


def restore_(weights: Tensors, origins: Tensors) -> None:
    """``weights`` <- ``origins``, bit for bit, in place. Torch's own multi-tensor copy is one pass already."""
    if weights:
        with torch.no_grad():
            torch._foreach_copy_(list(weights), list(origins))


def _check_weights(op: str, weights: Tensors, grads: Tensors, origins: Tensors) -> None:
    if not len(weights) == len(grads) == len(origins):
        raise ValueError(f"{op}: weights, grads and origins must be as many; got {len(weights)}, {len(grads)}, {len(origins)}")
    for i, (w, g, o) in enumerate(zip(weights, grads, origins, strict=True)):
        if not (w.shape == g.shape == o.shape and w.dtype == o.dtype and w.is_floating_point() and g.is_floating_point()):
            raise ValueError(
                f"{op}: weights, grads and origins must be alike and floating; number {i} is "
                f"{describe(w)}, {describe(g)}, {describe(o)}"
            )
        if not w.device == g.device == o.device == weights[0].device:
            raise ValueError(
                f"{op}: all tensors must be on {weights[0].device}; number {i} is on {w.device}, {g.device}, {o.device}"
            )


# ---------------------------------------------------------------------------------------------------------------- checks


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors)


def _check_logits(op: str, name: str, logits: Tensor) -> None:
    if logits.dim() != 2 or logits.size(1) < 2 or not logits.is_floating_point():
        raise ValueError(f"{op}: {name} must be floating [N, C] with C >= 2; got {describe(logits)}")


def _check_labels(op: str, name: str, y: Tensor, logits: Tensor, *, soft: bool) -> None:
    if y.device != logits.device:
        raise ValueError(f"{op}: {name} must be on {logits.device} like the logits; got {y.device}")
    if y.dim() == 1 and y.dtype in INTEGERS and y.size(0) == logits.size(0):
        return
    if soft and y.is_floating_point() and y.shape == logits.shape:
        return
    wanted = f"integer labels [{logits.size(0)}]" + (f" or soft labels {list(logits.shape)}" if soft else "")
    raise ValueError(f"{op}: {name} must be {wanted}; got {describe(y)}")


def _through_dispatcher(*tensors: Tensor) -> bool:
    """Whether torch must see the op: while compiling, on tensor subclasses (fake tensors), or where a gradient is recorded."""
    if torch.compiler.is_compiling():
        return True
    for t in tensors:  # noqa: SIM110 - a generator costs more than the kernel's own checks
        if type(t) is not Tensor or (t.requires_grad and torch.is_grad_enabled()):
            return True
    return False


def _written(t: Tensor) -> None:
    """Tells autograd that ``t`` was modified: without it a backward that saved ``t`` would silently use the new values."""
    if not t.is_inference():
        torch.autograd.graph.increment_version(t)


# ---------------------------------------------------------------------------------------- registration with torch.library

# Not torch.library.custom_op, whose wrapper costs ten times the overhead of the direct call.
_library: Any = torch.library.Library("fastadv", "DEF")  # type: ignore[no-untyped-call]


def _register(schema: str, kernel: Implementation, fake: Implementation) -> None:
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastadv::{name}", fake, lib=_library)


def _register_step(op: str, extra: str = "") -> None:
    def kernel(adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float, lo: float, hi: float, *rest: Any) -> None:
        *fraction, alphas, radii = rest
        alpha_, eps_ = alpha if alphas is None else alphas, eps if radii is None else radii
        _implementation_for(op, adv)(adv, adv, grad, x, alpha_, eps_, lo, hi, *fraction)

    _register(
        f"{op}_(Tensor(a!) adv, Tensor grad, Tensor x, float alpha, float eps, float lo, float hi, {extra}"
        "Tensor? alphas, Tensor? radii) -> ()",
        kernel,
        lambda *args: None,
    )


def _register_update(op: str, tensors: str, scalars: Sequence[str], rest: str) -> None:
    first, count = tensors.count("Tensor"), len(scalars)

    def kernel(*args: Any) -> None:
        values, instead = args[first : first + count], args[-count:]
        chosen = (value if t is None else t for value, t in zip(values, instead, strict=True))
        _implementation_for(op, args[0])(*args[:first], *chosen, *args[first + count : -count])

    floats, optional = (", ".join(form.format(name) for name in scalars) for form in ("float {}", "Tensor? {}_of"))
    _register(f"{op}_({tensors}, {floats}, {rest}, {optional}) -> ()", kernel, lambda *args: None)


def _register_starts() -> None:
    def linf(
        x: Tensor, eps: float, lo: float, hi: float, seed: int, samples: Tensor | None, step: int, radii: Tensor | None
    ) -> Tensor:
        out = torch.empty_like(x)
        _implementation_for("linf_start", x)(out, x, eps if radii is None else radii, lo, hi, seed, samples, step)
        return out

    def normal(x: Tensor, std: float, seed: int, samples: Tensor | None, step: int, copies: int, stds: Tensor | None) -> Tensor:
        out = _copies_of(x, copies)
        _implementation_for("normal_start", x)(out, x, std if stds is None else stds, seed, samples, step, copies)
        return out

    drawn = "SymInt seed, Tensor? samples, SymInt step"  # SymInt: another seed or step compiles nothing anew
    _register(
        f"linf_start(Tensor x, float eps, float lo, float hi, {drawn}, Tensor? radii) -> Tensor",
        linf,
        lambda x, *_: torch.empty_like(x),
    )
    _register(
        f"normal_start(Tensor x, float std, {drawn}, int copies, Tensor? stds) -> Tensor",
        normal,
        lambda x, std, seed, samples, step, copies, stds: _copies_of(x, copies),
    )


def _register_hyperplane(op: str) -> None:
    def kernel(x: Tensor, w: Tensor, gap: Tensor, lo: float, hi: float) -> Tensor:
        out = torch.empty_like(x)
        _implementation_for(op, x)(out, x, w, gap, lo, hi)
        return out

    schema = f"{op}(Tensor x, Tensor w, Tensor gap, float lo, float hi) -> Tensor"
    _register(schema, kernel, lambda x, *_: torch.empty_like(x))


def _register_loss(op: str, extra: str = "") -> None:
    def kernel(logits: Tensor, y: Tensor, *target: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad = _loss_buffers(op, None, logits)
        extra = {"target": target[0]} if target else {}
        _implementation_for(op, logits)(loss, grad, logits, y=y, **extra)
        return loss, grad

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.arguments = len(inputs)

    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Any, ...]:
        _first_derivative_only(op)
        return (_scale_rows(grad_loss, ctx.saved_tensors[0]), *[None] * (ctx.arguments - 1))

    _register(f"{op}(Tensor logits, Tensor y{extra}) -> (Tensor, Tensor)", kernel, lambda z, *_: _loss_buffers(op, None, z))
    torch.library.register_autograd(f"fastadv::{op}", backward, setup_context=setup_context, lib=_library)


def _register_divergence(op: str) -> None:
    def buffers(logits_ref: Tensor, logits: Tensor, ref_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        loss, grad = _loss_buffers(op, None, logits)
        grad_ref = torch.empty(logits_ref.shape if ref_grad else (0,), dtype=logits.dtype, device=logits.device)
        return loss, grad_ref, grad

    def kernel(logits_ref: Tensor, logits: Tensor, ref_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        loss, grad_ref, grad = buffers(logits_ref, logits, ref_grad)
        chosen = _implementation_for(op, logits)
        chosen(loss, grad, logits, logits_ref=logits_ref, grad_ref=grad_ref if ref_grad else None)
        return loss, grad_ref, grad

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.ref_grad = inputs[2]

    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        _first_derivative_only(op)
        grad_ref, grad = ctx.saved_tensors
        return _scale_rows(grad_loss, grad_ref) if ctx.ref_grad else None, _scale_rows(grad_loss, grad), None

    _register(f"{op}(Tensor logits_ref, Tensor logits, bool ref_grad) -> (Tensor, Tensor, Tensor)", kernel, buffers)
    torch.library.register_autograd(f"fastadv::{op}", backward, setup_context=setup_context, lib=_library)


def _register_weights() -> None:
    _register(
        "weight_sums(Tensor[] weights, Tensor[] grads, Tensor(a!)[] origins, bool record) -> Tensor",
        _weight_sums,
        lambda weights, *_: _sums_buffer(weights),
    )
    _register(
        "perturb_(Tensor(a!)[] weights, Tensor[] grads, Tensor[] origins, Tensor sums, float gamma, float alpha) -> ()",
        _perturb,
        lambda *_: None,
    )


def _scale_rows(grad_loss: Tensor, dlogits: Tensor) -> Tensor:
    return (grad_loss[:, None] * dlogits).to(dlogits.dtype)


def _first_derivative_only(op: str) -> None:
    # The saved gradient carries no graph: a second derivative through it would be silently wrong.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"fastadv.ops.{op} has no second derivative (create_graph=True)")


_register_step("linf_step")
_register_step("l2_step")
_register_step("l1_step", "float fraction, ")
_register_update(
    "apgd_step",
    "Tensor(a!) adv, Tensor(b!) old, Tensor(c!) best, Tensor(d!) best_grad, Tensor(e!) image, Tensor grad, Tensor x",
    ("alpha", "momentum", "eps"),
    "float lo, float hi, Tensor better, Tensor taken",
)
_register_update(
    "momentum_step",
    "Tensor(a!) adv, Tensor(b!) velocity, Tensor grad, Tensor x",
    ("alpha", "decay", "eps"),
    "float lo, float hi",
)
_register_starts()
for _op in HYPERPLANES:
    _register_hyperplane(_op)
_register_weights()
for _op in ("ce", "log_odds", "margin", "dlr"):
    _register_loss(_op)
_register_loss("dlr_targeted", ", Tensor target")
for _op in ("kl", "se"):
    _register_divergence(_op)
