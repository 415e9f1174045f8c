"""Gradient ascent over images in which few pixels are changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks
from ..engine import Model
from ..reference.step import Scalar, spread
from .base import Attack, Batch, as_function
from .nearest import Nearest, begun, driven
from .norms import largest, unit


class PGD0(Attack):
    """PGD in the l0 ball: ``x_adv = PGD0(model, eps=10)(x, y)`` changes ten pixels.

    Croce and Hein, "Sparse and Imperceivable Adversarial Attacks", 2019: ascent on the cross-entropy along gradients of l1
    length 1, with exact projections onto the images that differ from x in ``eps`` pixels and lie inside the bounds. A sample
    stops with the first image that fools the model; where there is none, that with the highest loss is returned, not x.

    Args:
        model: any callable that maps a batch [N, ...] to logits [N, C]. Left exactly as found.
        eps: the most pixels that may change, >= 0, number or per-sample [N]; a fraction of a pixel is none. A pixel is all
            channels (dimension 1) at one place; in batches [N, D] each element is one.
        steps: gradient steps of each restart, >= 1. Each is one forward and one input gradient; one more forward a restart.
        alpha: l1 length of a step, > 0, in units of hi - lo. The original's for colour images of 32x32.
        restarts: random starts, >= 1, uniform in the box before they are projected.
        norm: "l0".
        targeted: y are classes to reach.
        bounds: (lo, hi) of every element.
        seed: of the random starts.
        engine, precision, twin, memory: how the model is run, as in :class:`fastadv.PGD`.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described; bounds are None or not finite.
    """

    NORMS = ("l0",)

    def __init__(
        self,
        model: Model,
        eps: Scalar,
        steps: int = 100,
        alpha: float = 120000 / 255,
        restarts: int = 5,
        norm: str = "l0",
        targeted: bool = False,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        super().__init__(model, eps, norm, targeted, bounds, seed, engine, precision, twin, memory)
        self.steps, self.restarts = checks.integer("steps", steps), checks.integer("restarts", restarts)
        self.alpha = checks.number("alpha", alpha, positive=True)

    def _check_sizes(self) -> tuple[float, float]:
        lo, hi = super()._check_sizes()
        if not math.isfinite(hi - lo):
            raise ValueError(f"bounds must be finite for PGD0, whose pixels move as far as they may; got {self.bounds!r}")
        return lo, hi

    def _attack(self, batch: Batch) -> Tensor:
        assert batch.eps is not None
        alpha = self.alpha * (batch.hi - batch.lo)
        count = torch.as_tensor(batch.eps, device=batch.x.device).expand(len(batch.x))[:, None].clone()
        loop = _PGD0(**begun(batch, "ce"), count=count, alpha=-alpha if batch.targeted else alpha)
        for restart in range(self.restarts):
            uniform = batch.draws.uniform(restart, *batch.x.shape[1:], dtype=batch.x.dtype)
            loop.adv = loop.projected(batch.lo + (batch.hi - batch.lo) * uniform)
            driven(self, loop, batch, self.steps)
            if bool(loop.fooled.all()):
                break
        return loop.image

    def _lengths(self, d: Tensor) -> Tensor:
        return (pixels(d.abs()) > 0).sum(1).to(d.dtype)


@dataclass(kw_only=True)
class _PGD0(Nearest):
    STATE: ClassVar[tuple[str, ...]] = (*Nearest.STATE, "count")
    SETTINGS: ClassVar[tuple[str, ...]] = (*Nearest.SETTINGS, "alpha")
    STOPS: ClassVar[bool] = True

    count: Tensor  # [N, 1], pixels
    alpha: float

    def projected(self, adv: Tensor) -> Tensor:
        """The nearest images in box and l0 ball."""
        d, adv = adv - self.centre, adv.clamp(self.lo, self.hi)
        # By a pixel that is kept the image comes nearer, in square by so much.
        kept = largest(pixels(d.square() - (adv - self.centre - d).square()), self.count)
        return torch.where(kept.view(len(d), -1, *d.shape[2:]), adv, self.centre)

    def step(self) -> None:
        inputs = self.inputs()
        logits, self.losses, gradient = self.passes.gradient(inputs, self.loss, self.y, None, self.losses)
        with torch.no_grad():
            stopped = self.fooled.clone()  # who fools the passes only now may yet be found not to fool the model
            self.keep(inputs, *self.judged(logits, self.losses[0]))
            direction = unit(gradient.to(self.adv.dtype).nan_to_num(0.0, 0.0, 0.0), "l1")
            moved = self.projected(self.adv + self.alpha * direction)
            self.adv.copy_(torch.where(spread(stopped, moved), self.adv, moved))


def pixels(d: Tensor) -> Tensor:
    """Sums over the channels of each place, [N, places]."""
    return d.sum(1).flatten(1) if d.dim() > 2 else d


pgd0 = as_function(PGD0)
