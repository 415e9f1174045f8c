"""Projected gradient descent and its one-step form: linf, l2 and l1 balls, any loss, on any model.

    x_{k+1} = project(x_k + alpha * direction(grad loss(model(x_k))))

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018; Goodfellow et al., "Explaining and
Harnessing Adversarial Examples", 2015 (FGSM); Croce and Hein, "Mind the box", 2021 (l1).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..engine import BN_MODES, Engine, Losses, Model, Passes, Stats, attacking, unwrap
from ..reference.loss import classes_of
from ..reference.step import Scalar, per_sample, spread
from .base import AttackInfo
from .draws import LENGTHS, Source, check_source, normal_like, uniform_like, uniform_start
from .losses import DIVERGENCES, LABEL_LOSSES, AttackLoss, CustomLoss
from .search import Search, drive

STEPS = {"linf": ops.linf_step_, "l2": ops.l2_step_, "l1": ops.l1_step_}
INITS = ("uniform", "normal", "zero")
NORMAL_SCALE = 1e-3  # TRADES' start: x + 0.001 N(0, 1)


class NaNGradientWarning(RuntimeWarning):
    """Some input gradients are NaN; these elements were not moved. ``attack.info.nan_grad`` tells which samples.

    Raised for CPU tensors; on a GPU it would make every attack wait, so there ``info`` alone tells.
    """


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
        early_stop: a sample stops with the first image that fools the model, and the attack ends when all have one. Implies
            keep_best; waits for the device at each step. Under bn "eval" and a loss by name the others go on in smaller
            batches.
        generator: source of the random starts: a torch.Generator, None for torch's global one, or
            :class:`fastadv.attacks.draws.Draws`, by which each sample starts where it would in any batch, and in each call.
        engine: "eager"; "compile": forward, loss and backward as one compiled graph (torch.compile; minutes for a large model,
            once a shape), replayed as a CUDA graph on a GPU; "graph": the step recorded as a CUDA graph and replayed, the same
            bits with one launch; "auto": measures these and memory layouts once for each model and shape and remembers the
            fastest (:mod:`fastadv.engine.choices`). Each from the second call with inputs of some shape on: the first is eager.
        precision: "fp32": the model runs as the caller runs it; "bf16", "fp16": under autocast; "auto": bf16 where the hardware
            multiplies in it. The images stay in fp32.
        twin: attack a copy of the model, with batch norms folded into convolutions, weights cast once and channels_last,
            brought up to date at each call. Needs bn "eval" and a model that torch.fx can trace; else a line in the log says
            why the model itself is attacked.
        memory: "signs" saves for the backward pass only what an input's gradient needs: of a ReLU the signs, of convolutions
            and batch norms nothing. The same bits, several times larger batches, somewhat slower.

    ``eps`` and ``alpha`` may be assigned between calls. ``info`` (:class:`AttackInfo`) describes the last call, ``stats``
    (:class:`fastadv.engine.Stats`) how all calls were executed.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described; nothing has been changed then.
    """

    def __init__(
        self,
        model: Model,
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
        generator: Source = None,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        if not callable(model):
            raise ValueError(f"model must be callable on a batch; got {type(model).__name__}")
        checks.integer("steps", steps)
        checks.integer("restarts", restarts)
        checks.one_of("norm", norm, STEPS)
        checks.one_of("bn", bn, BN_MODES)
        if not callable(loss):
            checks.one_of("loss", loss, [*LABEL_LOSSES, *DIVERGENCES])
        if not isinstance(init, Tensor):
            checks.one_of("init", init, INITS)
        if generator is not None and not isinstance(getattr(generator, "device", None), torch.device):
            raise ValueError(f"generator must be a torch.Generator, Draws or None; got {type(generator).__name__}")
        if isinstance(loss, str) and loss in DIVERGENCES:
            if isinstance(init, str) and init == "zero":
                raise ValueError(f"init='zero' starts loss={loss!r} at its minimum, where its gradient is zero; use 'normal'")
            if targeted:
                raise ValueError(f"targeted needs a loss with labels; loss={loss!r} has none")
        self.model, self.eps, self.alpha, self.steps, self.norm, self.loss = model, eps, alpha, steps, norm, loss
        self.init, self.bn, self.restarts, self.targeted, self.bounds = init, bn, restarts, targeted, bounds
        self.keep_best, self.early_stop, self.generator = keep_best, early_stop, generator
        self._engine = Engine(engine, precision, twin, memory, bn)
        self.info: AttackInfo | None = None
        self._check_sizes()

    def __repr__(self) -> str:
        names = (
            "eps",
            "alpha",
            "steps",
            "norm",
            "loss",
            "init",
            "bn",
            "restarts",
            "targeted",
            "bounds",
            "keep_best",
            "early_stop",
        )
        shown = {name: getattr(self, name) for name in (*names, "early_stop")}
        if not isinstance(self.loss, str):
            shown["loss"] = getattr(self.loss, "__qualname__", type(self.loss).__qualname__)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())}, {self.engine!r})"

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
            nothing = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            self.info = AttackInfo(zero_grad=nothing, nan_grad=nothing)
            return x.detach().clone()
        model = unwrap(self.model)
        with attacking(model, self.bn):
            x_adv, self.info = self._attack(model, x.detach(), y, logits_ref, lo, hi)
        nan_grad = self.info.nan_grad
        if x_adv.device.type == "cpu" and nan_grad is not None and bool(nan_grad.any()):
            message = "some input gradients are NaN; these elements were not moved (see attack.info.nan_grad)"
            warnings.warn(NaNGradientWarning(message), stacklevel=2)
        return x_adv

    @property
    def engine(self) -> Engine:
        """The execution, with its settings. Another needs another attack."""
        return self._engine

    @property
    def stats(self) -> Stats:
        """How the calls so far were executed."""
        return self._engine.stats

    # ------------------------------------------------------------------------------------------------------ the attack

    def _attack(
        self, model: Model, x: Tensor, y: Tensor | None, logits_ref: Tensor | None, lo: float, hi: float
    ) -> tuple[Tensor, AttackInfo]:
        if y is not None and y.is_inference():
            y = y.clone()  # an inference tensor cannot be saved for a custom loss's backward
        # The image is kept in fp32 (or wider) whatever precision x and the model have: sums of small steps need it.
        centre = x.to(torch.promote_types(x.dtype, torch.float32))
        loss = AttackLoss(self.loss, self.targeted, self.bn != "eval")
        tracking = self.keep_best or self.early_stop
        compared = tracking or self.restarts > 1
        alpha = 2.5 * self.eps / self.steps if self.alpha is None else self.alpha
        passes = self._engine.passes(model, x, self.bn, lambda logits: checks.logits(logits, x, y))

        # Clean logits: what the loss measures from, by the passes, and the model's own, for the last word.
        reference = own = None if logits_ref is None else logits_ref.detach()
        forwards = 0
        if reference is None and (loss.needs_reference or (compared and y is None)):
            with torch.no_grad():
                reference = own = passes.logits(x)
                forwards = 1
                if compared and not passes.are_of(model):
                    own, forwards = Passes(model).logits(x), 2
        label = own if y is None else y
        loop = _Ascent(
            adv=centre, centre=centre, y=y, reference=reference, label=None if label is None else classes_of(label),
            eps=self.eps, alpha=-alpha if self.targeted else alpha, lo=lo, hi=hi, dtype=x.dtype,
            norm=self.norm, loss=loss, tracking=tracking, early_stop=self.early_stop,
        )  # fmt: skip
        loop.passes = passes
        if compared:
            loop.compare()
        loop.zero_grad, loop.nan_grad = torch.zeros(2, len(x), dtype=torch.bool, device=x.device)

        exact = True
        for restart in range(self.restarts):
            loop.adv = self._start(centre, lo, hi, restart, may_be_returned=tracking)
            passed, as_the_model = drive(self._engine, loop, model, self.steps, self.early_stop, self._shrinks())
            forwards, exact = forwards + passed, exact and as_the_model
            if self.early_stop and bool(loop.fooled.all()):
                break

        if not compared:
            return loop.inputs().detach(), AttackInfo(None, None, loop.zero_grad, loop.nan_grad, forwards=forwards)
        if not exact:
            loop.score_again(Passes(model), own)
            forwards += 1
        found = -loop.score if self.targeted else loop.score
        return loop.image, AttackInfo(loop.fooled, found, loop.zero_grad, loop.nan_grad, forwards=forwards)

    def _shrinks(self) -> bool:
        """Whether the fooled may leave the batch: batch statistics, and perhaps the user's loss, couple them to the others."""
        return self.early_stop and self.bn == "eval" and isinstance(self.loss, str)

    def _start(self, x: Tensor, lo: float, hi: float, restart: int, may_be_returned: bool) -> Tensor:
        """The first image of a restart, a new tensor, in ball and box; but "normal" only if it may be returned, as TRADES."""
        if self.init == "zero":
            return x.clone()
        if isinstance(self.init, Tensor):
            adv = x.clone().copy_(self.init.detach())
        elif self.init == "normal":
            adv = normal_like(x, self.generator, restart, NORMAL_SCALE).add_(x)
            if not may_be_returned:
                return adv
        elif self.norm == "linf":
            return uniform_start(x, self.eps, lo, hi, self.generator, restart)
        else:  # a uniform direction and a uniform length
            noise, dims = normal_like(x, self.generator, restart), tuple(range(1, x.dim()))
            size = torch.linalg.vector_norm(noise, int(self.norm[1]), dim=dims, keepdim=True)
            length = uniform_like(size, self.generator, LENGTHS + restart) * per_sample(self.eps, x)
            return noise.mul_(length / size).add_(x).clamp_(lo, hi)
        return STEPS[self.norm](adv, adv, x, 0.0, self.eps, lo, hi)  # a step of length 0 is the projection

    # ------------------------------------------------------------------------------------------------------ checks

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
        AttackLoss(self.loss, self.targeted).check(y)
        if isinstance(self.init, Tensor):
            if self.init.shape != x.shape or self.init.device != x.device:
                known = ", ".join(map(repr, INITS))
                raise ValueError(
                    f"init must be like x, {checks.describe(x)}, or one of {known}; got {checks.describe(self.init)}"
                )
            if not bool(self.init.isfinite().all()):
                raise ValueError("init must be finite; it holds NaN or inf")
        check_source(self.generator, x)


@dataclass
class _Ascent(Search):
    """Gradient steps on one batch."""

    STATE: ClassVar[tuple[str, ...]] = (
        "adv", "centre", "y", "reference", "label", "eps", "alpha", "image", "score", "fooled",
    )  # fmt: skip
    SCRATCH: ClassVar[tuple[str, ...]] = ("losses", "gradient")
    SETTINGS: ClassVar[tuple[str, ...]] = ("lo", "hi", "dtype", "norm", "loss", "tracking", "early_stop")

    alpha: Scalar
    tracking: bool  # each iterate may become the best image
    early_stop: bool
    losses: Losses | None = None
    gradient: Tensor | None = None
    zero_grad: Tensor = field(init=False)  # of each sample's last gradient, for AttackInfo
    nan_grad: Tensor = field(init=False)

    def step(self) -> None:
        self.gradient = None  # frees its memory, which the next one then takes without new page faults
        inputs, alpha = self.inputs(), self.alpha
        logits, self.losses, self.gradient = self.passes.gradient(inputs, self.loss, self.y, self.reference, self.losses)
        with torch.no_grad():
            if self.early_stop:  # who fooled the model before; who does so now may yet be found not to, and moves on
                alpha = torch.where(self.fooled, 0.0, torch.as_tensor(alpha, dtype=torch.float64, device=self.adv.device))
            if self.tracking:
                self._keep_best(inputs, logits)
            STEPS[self.norm](self.adv, self.gradient, self.centre, alpha, self.eps, self.lo, self.hi)

    def evaluate(self) -> None:
        with torch.no_grad():
            inputs = self.inputs()
            logits = self.passes.logits(inputs)
            self.losses = self.loss(logits, self.y, self.reference, self.losses)
            self._keep_best(inputs, logits)

    def _keep_best(self, inputs: Tensor, logits: Tensor) -> None:
        assert self.losses is not None
        score, fooled = self.judged(logits, self.losses[0])
        better = self.best(score, fooled, self.early_stop)
        torch.where(spread(better, inputs), inputs, self.image, out=self.image)
        torch.where(better, score, self.score, out=self.score)
        self.fooled.logical_or_(fooled)

    def update(self, other: Search, rows: Tensor | None) -> None:
        if isinstance(other, _Ascent) and other.gradient is not None:
            elements = tuple(range(1, other.gradient.dim()))
            highest, lowest = other.gradient.amax(elements), other.gradient.amin(elements)
            zero, nan = (highest == 0) & (lowest == 0), highest.isnan()
            if rows is None:
                self.zero_grad, self.nan_grad = zero, nan
            else:
                self.zero_grad[rows], self.nan_grad[rows] = zero, nan
        super().update(other, rows)


def pgd(
    model: Model,
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
    generator: Source = None,
    precision: str = "fp32",
    memory: str = "normal",
) -> Tensor:
    """Adversarial images by projected gradient descent: ``x_adv = fastadv.pgd(model, x, y, eps=8/255)``.

    Arguments, result and errors as :class:`PGD`, which is the same attack as a reusable object; only such a one can be
    compiled, recorded or given a twin.
    """
    attack = PGD(
        model, eps, alpha, steps, norm, loss, init, bn, restarts, targeted, bounds, keep_best, early_stop, generator,
        precision=precision, memory=memory,
    )  # fmt: skip
    return attack(x, y)


def fgsm(
    model: Model,
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
    generator: Source = None,
) -> Tensor:
    """One step of length ``alpha`` (default ``eps``), by default from x itself (Goodfellow et al., 2015).

    ``init="uniform", alpha=1.25 * eps`` is the FGSM-RS of Wong et al., 2020. Otherwise as :func:`pgd`.
    """
    attack = PGD(
        model, eps, eps if alpha is None else alpha, 1, norm, loss, init, bn,
        targeted=targeted, bounds=bounds, generator=generator,
    )  # fmt: skip
    return attack(x, y)
