"""What attacks share: the checks at the door, the model left as it was found, and what a call reports."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Concatenate, ParamSpec, Protocol

import torch
from torch import Tensor

from .. import checks
from ..engine import Engine, Model, Passes, Stats, attacking, unwrap
from ..reference.step import Scalar, of_samples
from .draws import Draws
from .norms import norms, rounded


@dataclass(frozen=True)
class AttackInfo:
    """What the last call of an attack saw. Per-sample tensors [N] on x's device; None where an attack does not tell.

    Attributes:
        success: whether the returned image fools the model, asked once more itself where the attack ran in lower precision,
            on a twin or compiled. PGD evaluates images only with keep_best, early_stop or several restarts; else None.
        loss: the loss of the returned image, likewise. For "ce" under bn "eval" in its attack form, log((1 - p_y) / p_y).
        zero_grad: whether the last input gradient was zero everywhere, which is what gradient masking looks like.
        nan_grad: whether the last input gradient held a NaN.
        distance: of the returned image from x, in the attack's norm; inf where it does not fool the model.
        forwards: forward passes of the model.
        queries: forward passes of each sample, [N].
    """

    success: Tensor | None = None
    loss: Tensor | None = None
    zero_grad: Tensor | None = None
    nan_grad: Tensor | None = None
    distance: Tensor | None = None
    forwards: int = 0
    queries: Tensor | None = None


class Attack:
    """Base of the attacks. ``attack(x, y)`` returns images; ``attack.info`` tells about the last call.

    A subclass names its norms, adds its settings, and finds images in :meth:`_attack`. Random numbers belong to the samples,
    by ``seed`` and sample number: an attack's result does not depend on who else is in the batch, and torch's global
    generators are not touched.

    Args:
        model: any callable that maps a batch [N, ...] to logits [N, C]. Left exactly as found.
        eps: radius in units of x, float or per-sample [N]; an l2 or l1 length of a whole sample in those norms. None, where
            an attack allows it: the nearest adversarial image is looked for, however far.
        norm: one of the attack's norms.
        targeted: y are classes to reach.
        bounds: (lo, hi) of every element, or None for unbounded.
        seed: of all random numbers.
        engine, precision, twin, memory: how the model is run, as in :class:`fastadv.PGD`.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described; nothing has been changed then.
    """

    NORMS: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    GRADIENTS: ClassVar[bool] = True  # whether the attack needs the model's gradients
    EPS_OPTIONAL: ClassVar[bool] = False  # whether eps may be None

    def __init__(
        self,
        model: Model,
        eps: Scalar | None,
        norm: str = "linf",
        targeted: bool = False,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        if not callable(model):
            raise ValueError(f"model must be callable on a batch; got {type(model).__name__}")
        checks.one_of("norm", norm, self.NORMS)
        if checks.integer("seed", seed, 0) >= 2**63:
            raise ValueError(f"seed must be an integer in [0, 2^63); got {seed}")
        self.model, self.eps, self.norm, self.targeted, self.bounds, self.seed = model, eps, norm, targeted, bounds, seed
        self._engine = Engine(engine, precision, twin, memory)
        self.info: AttackInfo | None = None
        self._check_sizes()

    def __call__(self, x: Tensor, y: Tensor | None = None, samples: Tensor | None = None) -> Tensor:
        """Attacks the batch.

        Args:
            x: clean images [N, ...], floating, inside the bounds.
            y: integer labels [N]; target classes if ``targeted``. None: what the model predicts is to change.
            samples: numbers of the samples, int64 [N], by which they draw; default 0, 1, ..., N - 1.

        Returns:
            Images like x in shape, dtype and memory format, inside ball and bounds; detached.
        """
        lo, hi = self._check_sizes()
        checks.images(x, lo, hi)
        if self.eps is not None:
            checks.per_sample("eps", self.eps, x)
        checks.same_device("model", self.model, x)
        if y is not None:
            checks.labels(y, x)
            if y.is_floating_point():
                raise ValueError(f"y must be integer labels [{len(x)}]; got soft labels {list(y.shape)}")
        elif self.targeted:
            raise ValueError("y, the classes to reach, is needed for targeted=True")
        if samples is None:
            samples = torch.arange(len(x), device=x.device)
        elif samples.shape != (len(x),) or samples.dtype != torch.int64 or samples.device != x.device:
            raise ValueError(f"samples must be int64 [{len(x)}] on {x.device}; got {checks.describe(samples)}")
        if x.numel() == 0:
            nothing = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            self.info = AttackInfo(nothing, distance=torch.full((len(x),), math.inf, device=x.device))
            return x.detach().clone()

        model = unwrap(self.model)
        with attacking(model):
            x = x.detach()
            passes = self._engine.passes(model, x, "eval", lambda logits: checks.logits(logits, x, y), self.GRADIENTS)
            centre = x.to(torch.promote_types(x.dtype, torch.float32))
            clean = None
            if y is None:
                with torch.no_grad():
                    clean = Passes(model).logits(x)
                    checks.logits(clean, x, None)
            labels = y.long() if y is not None else clean.argmax(1)  # type: ignore[union-attr]
            batch = Batch(
                model, passes, centre, labels, self.eps, lo, hi, self.norm, self.targeted, x.dtype, Draws(self.seed, samples)
            )
            batch.forwards += clean is not None
            with torch.no_grad():
                adv = batch.inputs(self._attack(batch))
                logits = Passes(model, check=passes.check).logits(adv)  # if this is the first of all
                success = batch.fooled(logits)
            distance = self._lengths(adv.to(centre.dtype) - centre).masked_fill(~success, math.inf)
        self.info = AttackInfo(success, distance=distance, forwards=batch.forwards + 1, queries=batch.queries + 1)
        return adv

    def _attack(self, batch: Batch) -> Tensor:
        """Images like ``batch.x``, in ball and box. Under no_grad, inside :func:`fastadv.engine.attacking`."""
        raise NotImplementedError

    def _lengths(self, d: Tensor) -> Tensor:
        """Of perturbations [N, ...], in the attack's norm, [N]."""
        return norms(d, self.norm)

    def _check_sizes(self) -> tuple[float, float]:
        if self.eps is not None or not self.EPS_OPTIONAL:
            checks.non_negative("eps", self.eps)
        return checks.bounds(self.bounds)

    def __repr__(self) -> str:
        shown = [name for name in inspect.signature(type(self)).parameters if name != "model" and name in vars(self)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)}, {self._engine!r})"

    @property
    def engine(self) -> Engine:
        """The execution, with its settings. Another needs another attack."""
        return self._engine

    @property
    def stats(self) -> Stats:
        """How the calls so far were executed."""
        return self._engine.stats


@dataclass
class Batch:
    """One call's samples, and the model as they may ask it.

    Attributes:
        x: clean images [N, ...], fp32 or wider whatever the caller's type is, which is ``dtype``.
        y: classes [N] int64 to leave; targeted: to reach.
        queries: [N], forward passes of each sample so far. ``forwards``: passes of whatever size.
    """

    model: Model
    passes: Passes
    x: Tensor
    y: Tensor
    eps: Scalar | None
    lo: float
    hi: float
    norm: str
    targeted: bool
    dtype: torch.dtype
    draws: Draws
    forwards: int = 0
    queries: Tensor = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.queries is None:
            self.queries = torch.zeros_like(self.y)

    @property
    def span(self) -> float:
        """The length of an element's range, in which papers on images in [0, 1] measure; 1 where there are no bounds."""
        width = self.hi - self.lo
        return width if math.isfinite(width) else 1.0

    def rows(self, chosen: Tensor, stream: int = 0) -> Batch:
        """The chosen samples, as a batch with counts of its own (:meth:`count` brings them home), to draw from ``stream``."""
        eps = None if self.eps is None else of_samples(self.eps, chosen)
        return Batch(
            self.model, self.passes, self.x[chosen], self.y[chosen], eps, self.lo, self.hi, self.norm, self.targeted,
            self.dtype, self.draws.rows(chosen).of_stream(stream),
        )  # fmt: skip

    def count(self, part: Batch, chosen: Tensor) -> None:
        """Adds what a part, made by ``rows(chosen)``, has asked of the model."""
        self.forwards += part.forwards
        self.queries[chosen] += part.queries

    def inputs(self, adv: Tensor) -> Tensor:
        """The images as the model gets them."""
        return rounded(adv, self.x, self.dtype, self.eps, self.norm).detach()

    def logits(self, adv: Tensor) -> Tensor:
        """Logits [N, C] of the whole batch."""
        self.forwards += 1
        self.queries += 1
        with torch.no_grad():
            return self.passes.logits(self.inputs(adv))

    def fooled(self, logits: Tensor) -> Tensor:
        """Whether these predictions are what the attack wants, [N]."""
        reached = logits.argmax(1) == self.y
        return reached if self.targeted else ~reached


P = ParamSpec("P")


class AttackFunction(Protocol[P]):
    """An attack in one call."""

    def __call__(self, model: Model, x: Tensor, y: Tensor | None, *args: P.args, **kwargs: P.kwargs) -> Tensor: ...


def as_function(attack: Callable[Concatenate[Model, P], Attack]) -> AttackFunction[P]:
    """``attack(model, *settings)(x, y)`` as one call, ``function(model, x, y, *settings)``."""

    def function(model: Model, x: Tensor, y: Tensor | None, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        return attack(model, *args, **kwargs)(x, y)

    assert isinstance(attack, type)
    model, *settings = inspect.signature(attack).parameters.values()
    data = [model.replace(name=name, annotation=kind) for name, kind in (("x", "Tensor"), ("y", "Tensor | None"))]
    signature = inspect.Signature([model, *data, *settings], return_annotation="Tensor")
    name = attack.__name__
    documented = f"""``{name}(model, ...)(x, y)`` in one call; arguments, result and errors as :class:`fastadv.{name}`."""
    vars(function).update(__signature__=signature)
    function.__name__ = function.__qualname__ = name.lower()
    function.__module__, function.__doc__ = attack.__module__, documented
    return function
