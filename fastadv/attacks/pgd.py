"""Projected gradient descent and its one-step form: linf, l2 and l1 balls, any loss, on any model.

    x_{k+1} = project(x_k + alpha * direction(grad loss(model(x_k))))

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018; Goodfellow et al., "Explaining and
Harnessing Adversarial Examples", 2015 (FGSM); Croce and Hein, "Mind the box", 2021 (l1).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks, engine, ops
from ..reference.loss import classes_of
from ..reference.step import Scalar, per_sample

CustomLoss = Callable[[Tensor, Tensor | None], Tensor]

STEPS = {"linf": ops.linf_step_, "l2": ops.l2_step_, "l1": ops.l1_step_}
LABEL_LOSSES = {"ce": ops.ce, "margin": ops.margin, "dlr": ops.dlr}
DIVERGENCES = {"kl": ops.kl, "se": ops.se}
INITS = ("uniform", "normal", "zero")
NORMAL_SCALE = 1e-3  # TRADES' start: x + 0.001 N(0, 1)


class NaNGradientWarning(RuntimeWarning):
    """Some input gradients are NaN; these elements were not moved. ``attack.info.nan_grad`` tells which samples.

    Raised for CPU tensors; on a GPU it would make every attack wait, so there ``info`` alone tells.
    """


@dataclass(frozen=True)
class AttackInfo:
    """What the last call of an attack saw. Per-sample tensors [N] on x's device.

    Attributes:
        zero_grad: whether the last input gradient was zero everywhere, which is what gradient masking looks like.
        nan_grad: whether the last input gradient held a NaN.
        success: whether the returned image fools the model, where the attack evaluated it (keep_best, early_stop or
            several restarts); else None.
        loss: the loss of the returned image, likewise. For "ce" under bn "eval" in its attack form, log((1 - p_y) / p_y).
        forwards: forward passes of the model.
    """

    zero_grad: Tensor
    nan_grad: Tensor
    success: Tensor | None
    loss: Tensor | None
    forwards: int


class PGD:
    """A reusable PGD attack: ``x_adv = PGD(model, eps=8/255)(x, y)``.

    Args:
        model: any callable that maps a batch [N, ...] to logits [N, C]. Left exactly as found: modes of all submodules,
            ``.grad``, ``requires_grad``, buffers (unless ``bn="train"``). DistributedDataParallel is unwrapped.
        eps: radius in units of x, float or per-sample [N]; an l2 or l1 length of a whole sample in those norms.
        alpha: step size in the same units, float or [N]; None: ``2.5 * eps / steps`` (Madry et al.).
        steps: gradient steps, >= 1. Each is one forward and one input gradient.
        norm: "linf", "l2" or "l1".
        loss: what is maximised. "ce" (under bn "eval" in its attack form, which cannot saturate), "margin"
            (Carlini-Wagner), "dlr" (``targeted``: from the clean prediction to y); "kl" or "se" from the clean prediction
            (TRADES, SCORE; needs no y); or a callable ``(logits, y) -> [N]``.
        init: "uniform" in the ball, "normal" (``x + 0.001 N(0,1)``), "zero", or a tensor like x to start from, projected.
        bn: where batch statistics come from during the attack: "eval", "batch" or "train" (:func:`fastadv.engine.attacking`).
        restarts: independent starts; the best image of each sample is returned (one more forward a restart).
        targeted: y are classes to reach; the loss is minimised.
        bounds: (lo, hi) of every element, or None for unbounded.
        keep_best: return the best iterate of each sample instead of the last (one more forward a restart). Best is a
            fooling image before any other, then the highest loss.
        early_stop: a sample that fools the model moves no further, and the attack ends when all do. Implies keep_best;
            waits for the device at each step.
        generator: source of the random start; default: torch's global one.

    ``eps`` and ``alpha`` may be assigned between calls. ``info`` (:class:`AttackInfo`) describes the last call.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described; nothing has been changed then.
    """

    def __init__(
        self,
        model: engine.Model,
        eps: Scalar,
        alpha: Scalar | None = None,
        steps: int = 10,
        norm: str = "linf",
        loss: str | CustomLoss = "ce",
        init: str | Tensor = "uniform",
        bn: str = "eval",
        restarts: int = 1,
        targeted: bool = False,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        keep_best: bool = False,
        early_stop: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not callable(model):
            raise ValueError(f"model must be callable on a batch; got {type(model).__name__}")
        checks.integer("steps", steps)
        checks.integer("restarts", restarts)
        checks.one_of("norm", norm, STEPS)
        checks.one_of("bn", bn, engine.BN_MODES)
        if not callable(loss):
            checks.one_of("loss", loss, [*LABEL_LOSSES, *DIVERGENCES])
        if not isinstance(init, Tensor):
            checks.one_of("init", init, INITS)
        if generator is not None and not isinstance(getattr(generator, "device", None), torch.device):
            raise ValueError(f"generator must be a torch.Generator or None; got {type(generator).__name__}")
        if isinstance(loss, str) and loss in DIVERGENCES:
            if isinstance(init, str) and init == "zero":
                raise ValueError(f"init='zero' starts loss={loss!r} at its minimum, where its gradient is zero; use 'normal'")
            if targeted:
                raise ValueError(f"targeted needs a loss with labels; loss={loss!r} has none")
        self.model, self.eps, self.alpha, self.steps, self.norm, self.loss = model, eps, alpha, steps, norm, loss
        self.init, self.bn, self.restarts, self.targeted, self.bounds = init, bn, restarts, targeted, bounds
        self.keep_best, self.early_stop, self.generator = keep_best, early_stop, generator
        self.info: AttackInfo | None = None
        self._check_sizes()

    def __repr__(self) -> str:
        shown = ("eps", "alpha", "steps", "norm", "loss", "bn", "restarts", "targeted", "bounds")
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def __call__(self, x: Tensor, y: Tensor | None = None, logits_ref: Tensor | None = None) -> Tensor:
        """Attacks the batch.

        Args:
            x: clean images [N, ...], floating, inside the bounds.
            y: integer labels [N] or soft labels [N, C] ("ce" only); target classes if ``targeted``. Optional for losses
                that need none; success is then a change of the clean prediction.
            logits_ref: the model's clean logits [N, C], where the caller has them already: what "kl", "se" and targeted "dlr"
                measure from. Default: one forward of x.

        Returns:
            Adversarial images like x in shape, dtype and memory format, inside ball and bounds; detached.
        """
        lo, hi = self._check_sizes()
        self._check_batch(x, y, lo, hi)
        if logits_ref is not None:
            checks.logits(logits_ref, x, y, source="logits_ref must be")
        if x.numel() == 0:
            self.info = AttackInfo(*_zero_and_nan(None, x), None, None, 0)
            return x.detach().clone()
        model = engine.unwrap(self.model)
        with engine.attacking(model, self.bn):
            x_adv, self.info = self._attack(model, x.detach(), y, logits_ref, lo, hi)
        if x_adv.device.type == "cpu" and bool(self.info.nan_grad.any()):
            message = "some input gradients are NaN; these elements were not moved (see attack.info.nan_grad)"
            warnings.warn(NaNGradientWarning(message), stacklevel=2)
        return x_adv

    # ------------------------------------------------------------------------------------------------------ the attack

    def _attack(
        self, model: engine.Model, x: Tensor, y: Tensor | None, logits_ref: Tensor | None, lo: float, hi: float
    ) -> tuple[Tensor, AttackInfo]:
        # The image is kept in fp32 (or wider) whatever precision x and the model have: sums of small steps need it.
        centre = x.to(torch.promote_types(x.dtype, torch.float32))
        farthest = per_sample(self.eps, x, torch.float64) if self.norm == "linf" else math.inf
        if y is not None and y.is_inference():
            y = y.clone()  # an inference tensor cannot be saved for a custom loss's backward
        alpha = 2.5 * self.eps / self.steps if self.alpha is None else self.alpha
        towards = -1 if self.targeted else 1  # the score is what the attack ascends: the loss, or minus it
        every_iterate = self.keep_best or self.early_stop
        best = _Best() if every_iterate or self.restarts > 1 else None
        buffers: tuple[Tensor, Tensor] | None = None
        forwards = 0

        def forward(inputs: Tensor) -> Tensor:
            nonlocal forwards
            logits = model(inputs)
            if not forwards:
                checks.logits(logits, x, y)
            forwards += 1
            return logits  # type: ignore[no-any-return]

        def evaluate(adv: Tensor, candidate: bool) -> tuple[Tensor, Tensor, Tensor]:
            """The model's input, its logits and their gradient; a candidate may become the best image."""
            nonlocal buffers
            inputs = adv if adv.dtype == x.dtype else engine.round_towards(x, adv, farthest)
            logits = forward(inputs.requires_grad_())
            loss, dlogits = buffers = self._loss(logits.detach(), y, reference, buffers)
            if best is not None and candidate:
                best.update(inputs.detach(), towards * loss, self._fooled(logits, label))
            return inputs, logits, dlogits

        reference = None  # clean logits, where something is measured from them
        if self._is_divergence or (self.loss == "dlr" and self.targeted) or (best is not None and y is None):
            with torch.no_grad():
                reference = forward(x) if logits_ref is None else logits_ref.detach()
        label = reference if y is None else y
        label = None if label is None else classes_of(label)
        step_, gradient = STEPS[self.norm], None

        for _ in range(self.restarts):
            adv, moving = self._start(centre, lo, hi, may_be_returned=every_iterate), alpha
            for _ in range(self.steps):
                gradient = None  # frees its memory, which the next one then takes without new page faults
                inputs, logits, dlogits = evaluate(adv, candidate=every_iterate)
                if best is not None and self.early_stop:
                    if best.all_fooled():
                        break
                    moving = torch.where(best.fooled, 0.0, torch.as_tensor(alpha, dtype=torch.float64, device=x.device))
                gradient = engine.input_gradient(logits, inputs, dlogits)
                with torch.no_grad():
                    step_(adv, gradient, centre, towards * moving, self.eps, lo, hi)
            else:
                if best is not None:
                    with torch.no_grad():
                        evaluate(adv, candidate=True)
            if best is not None and self.early_stop and best.all_fooled():
                break

        zero, nan = _zero_and_nan(gradient, x)
        if best is not None:
            return best.image, AttackInfo(zero, nan, best.fooled, towards * best.score, forwards)
        adv = adv.detach()
        x_adv = adv if adv.dtype == x.dtype else engine.round_towards(x, adv, farthest)
        return x_adv, AttackInfo(zero, nan, None, None, forwards)

    def _start(self, x: Tensor, lo: float, hi: float, may_be_returned: bool) -> Tensor:
        """The first image of a restart, a new tensor, in ball and box; but "normal" only if it may be returned, as TRADES."""
        if self.init == "zero":
            return x.clone()
        if isinstance(self.init, Tensor):
            adv = x.clone().copy_(self.init.detach())
        elif self.init == "normal":
            adv = torch.empty_like(x).normal_(std=NORMAL_SCALE, generator=self.generator).add_(x)
            if not may_be_returned:
                return adv
        elif self.norm == "linf":
            seed = torch.empty((), dtype=torch.int64, device=x.device).random_(generator=self.generator)
            return ops.linf_start(x, self.eps, lo, hi, int(seed))
        else:  # a uniform direction and a uniform length
            noise, dims = torch.empty_like(x).normal_(generator=self.generator), tuple(range(1, x.dim()))
            size = torch.linalg.vector_norm(noise, int(self.norm[1]), dim=dims, keepdim=True)
            length = torch.empty_like(size).uniform_(generator=self.generator) * per_sample(self.eps, x)
            return noise.mul_(length / size).add_(x).clamp_(lo, hi)
        return STEPS[self.norm](adv, adv, x, 0.0, self.eps, lo, hi)  # a step of length 0 is the projection

    def _loss(
        self, logits: Tensor, y: Tensor | None, reference: Tensor | None, out: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Per-sample loss [N] and its gradient with respect to the logits, into ``out`` where possible."""
        if not isinstance(self.loss, str):
            return _custom_loss(self.loss, logits, y)
        if self._is_divergence:
            assert reference is not None
            return DIVERGENCES[self.loss](reference, logits, out=out)
        assert y is not None
        if self.loss == "dlr" and self.targeted:
            assert reference is not None
            # From the clean prediction to the target; the attack descends, and this rises on the way.
            loss, dlogits = ops.dlr_targeted(logits, reference.argmax(1), y, out=out)
            return loss.neg_(), dlogits.neg_()
        if self.loss != "ce" or self.bn != "eval":  # batch statistics couple the samples: the sizes of their losses matter
            return LABEL_LOSSES[self.loss](logits, y, out=out)
        if y.is_floating_point():
            # A one-hot row is a hard label, and like one it must not saturate.
            (loss, dlogits), (odds, d_odds) = ops.ce(logits, y), ops.log_odds(logits, y.argmax(1))
            one_hot = (y.amax(1) == 1) & (y.sum(1) == 1)
            return torch.where(one_hot, odds, loss), torch.where(one_hot[:, None], d_odds, dlogits)
        return ops.log_odds(logits, y, out=out)

    def _fooled(self, logits: Tensor, label: Tensor | None) -> Tensor:
        prediction = logits.argmax(1)
        assert label is not None
        return prediction == label if self.targeted else prediction != label

    # ------------------------------------------------------------------------------------------------------ checks

    @property
    def _is_divergence(self) -> bool:
        return isinstance(self.loss, str) and self.loss in DIVERGENCES

    def _check_sizes(self) -> tuple[float, float]:
        checks.non_negative("eps", self.eps)
        if self.alpha is not None:
            checks.non_negative("alpha", self.alpha)
        return checks.bounds(self.bounds)

    def _check_batch(self, x: Tensor, y: Tensor | None, lo: float, hi: float) -> None:
        checks.images(x, lo, hi)
        checks.per_sample("eps", self.eps, x)
        checks.per_sample("alpha", self.alpha, x)
        checks.same_device("model", self.model, x)
        if y is not None:
            checks.labels(y, x)
        elif self.targeted or (isinstance(self.loss, str) and not self._is_divergence):
            raise ValueError(f"y is needed for loss={self.loss!r}, targeted={self.targeted}; only 'kl' and 'se' need none")
        if y is not None and y.is_floating_point() and self.loss in ("margin", "dlr"):
            raise ValueError(f"y must be integer labels for loss={self.loss!r}; got soft labels {list(y.shape)}")
        if isinstance(self.init, Tensor):
            if self.init.shape != x.shape or self.init.device != x.device:
                known = ", ".join(map(repr, INITS))
                raise ValueError(
                    f"init must be like x, {checks.describe(x)}, or one of {known}; got {checks.describe(self.init)}"
                )
            if not bool(self.init.isfinite().all()):
                raise ValueError("init must be finite; it holds NaN or inf")
        if self.generator is not None and self.generator.device.type != x.device.type:
            raise ValueError(f"generator must be on {x.device.type} like x; got one on {self.generator.device}")


class _Best:
    """The best image of each sample so far: a fooling one before any other, then the higher score; of equals the later."""

    image: Tensor  # [N, ...]
    score: Tensor  # [N]
    fooled: Tensor  # bool [N]
    empty = True

    def update(self, image: Tensor, score: Tensor, fooled: Tensor) -> None:
        if self.empty:
            self.image, self.score, self.fooled, self.empty = image.clone(), score.clone(), fooled, False
            return
        better = (fooled & ~self.fooled) | ((fooled == self.fooled) & ~(score < self.score))
        torch.where(better.view(-1, *[1] * (image.dim() - 1)), image, self.image, out=self.image)
        torch.where(better, score, self.score, out=self.score)
        self.fooled = self.fooled | fooled

    def all_fooled(self) -> bool:
        return bool(self.fooled.all())


def _zero_and_nan(gradient: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Per sample: whether the gradient is zero everywhere, and whether it holds a NaN; neither where none was needed."""
    if gradient is None:
        neither = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
        return neither, neither
    elements = tuple(range(1, gradient.dim()))
    highest, lowest = gradient.amax(elements), gradient.amin(elements)
    return (highest == 0) & (lowest == 0), highest.isnan()


def _custom_loss(loss: CustomLoss, logits: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """The user's loss and, by autograd over the logits alone, its gradient."""
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        value = loss(z, y)
        if not isinstance(value, Tensor) or value.shape != z.shape[:1] or not value.requires_grad:
            got = checks.describe(value) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss(logits, y) must return per-sample losses [{z.shape[0]}] that depend on logits; got {got}")
        (dlogits,) = torch.autograd.grad(value.sum(), z, allow_unused=True)
        if dlogits is None:
            raise ValueError("loss(logits, y) must depend on logits; its gradient does not reach them")
    return value.detach(), dlogits


def pgd(
    model: engine.Model,
    x: Tensor,
    y: Tensor | None,
    eps: Scalar,
    alpha: Scalar | None = None,
    steps: int = 10,
    norm: str = "linf",
    loss: str | CustomLoss = "ce",
    init: str | Tensor = "uniform",
    bn: str = "eval",
    restarts: int = 1,
    targeted: bool = False,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    keep_best: bool = False,
    early_stop: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Adversarial images by projected gradient descent: ``x_adv = fastadv.pgd(model, x, y, eps=8/255)``.

    Arguments, result and errors as :class:`PGD`, which is the same attack as a reusable object.
    """
    attack = PGD(model, eps, alpha, steps, norm, loss, init, bn, restarts, targeted, bounds, keep_best, early_stop, generator)
    return attack(x, y)


def fgsm(
    model: engine.Model,
    x: Tensor,
    y: Tensor | None,
    eps: Scalar,
    alpha: Scalar | None = None,
    norm: str = "linf",
    loss: str | CustomLoss = "ce",
    init: str | Tensor = "zero",
    bn: str = "eval",
    targeted: bool = False,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """One step of length ``alpha`` (default ``eps``), by default from x itself (Goodfellow et al., 2015).

    ``init="uniform", alpha=1.25 * eps`` is the FGSM-RS of Wong et al., 2020. Otherwise as :func:`pgd`.
    """
    attack = PGD(
        model, eps, eps if alpha is None else alpha, 1, norm, loss, init, bn,
        targeted=targeted, bounds=bounds, generator=generator,
    )  # fmt: skip
    return attack(x, y)
