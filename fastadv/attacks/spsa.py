"""SPSA: gradient ascent with gradients estimated from differences of the loss along random directions.

Uesato, O'Donoghue, van den Oord and Kohli, "Adversarial Risk and the Dangers of Evaluating Against Weak Attacks", 2018; the
estimate is Spall's ("Multivariate stochastic approximation using a simultaneous perturbation gradient approximation", 1992).

    g = mean over v of (f(x + delta v) - f(x - delta v)) / (2 delta) v,    v of random signs
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..engine import Model
from ..reference.step import Scalar, spread
from .base import Attack, Batch, as_function
from .pgd import STEPS
from .queries import TOGETHER, Walk, ask, walk

DRAWN = 8  # directions drawn together: what a sample draws must not depend on how many go into a forward pass
BETAS = (0.9, 0.999)  # of Adam


class SPSA(Attack):
    """SPSA by Adam on the margin loss, projected onto the ball: ``steps * (2 directions + 1)`` queries of each sample.

    A sample stops with the first iterate that fools the model; else its best iterate is returned.

    Args:
        model: any callable that maps a batch [N, ...] to logits [N, C]; needs no gradient. Left exactly as found.
        eps: radius in units of x, float or per-sample [N].
        steps: of Adam, >= 1.
        directions: of which a step's gradient is the mean, two queries each. CleverHans' 128 samples are 64 directions.
        delta: how far along a direction the loss is looked at, and
        lr: Adam's step size, both as shares of the bounds' span (of 1 where there are none). The images that are looked at
            may lie a delta outside ball and box, as in the paper.
        norm: "linf" or "l2".
        targeted, bounds, seed, engine, precision, twin, memory: as in :class:`fastadv.attacks.Attack`.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described.
    """

    NORMS: ClassVar[tuple[str, ...]] = ("linf", "l2")
    GRADIENTS: ClassVar[bool] = False

    def __init__(
        self,
        model: Model,
        eps: Scalar,
        steps: int = 100,
        directions: int = 128,
        delta: float = 0.01,
        lr: float = 0.01,
        norm: str = "linf",
        targeted: bool = False,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        super().__init__(model, eps, norm, targeted, bounds, seed, engine, precision, twin, memory)
        self.steps, self.directions = checks.integer("steps", steps), checks.integer("directions", directions)
        self.delta, self.lr = checks.number("delta", delta, positive=True), checks.number("lr", lr, positive=True)

    def _attack(self, batch: Batch) -> Tensor:
        whole = _Ascent.over(batch, best=batch.x.clone(), mean=torch.zeros_like(batch.x), square=torch.zeros_like(batch.x))

        def trials(part: _Ascent, chunk: range) -> Iterator[None]:
            if chunk.start == 0:  # the clean image
                yield
                part.keep()
            gradient = self._gradient(batch, part, chunk.start, self.delta * batch.span)
            part.queries += 2 * self.directions * part.standing
            part.move(gradient, self.lr * batch.span, chunk.start)
            yield
            part.keep()

        walk(self._engine, batch, whole, (range(step, step + 1) for step in range(self.steps)), trials)
        return whole.best

    def _gradient(self, batch: Batch, part: _Ascent, step: int, delta: float) -> Tensor:
        """The estimate at ``part.adv``, so many directions at a time as make a forward pass of a bounded size."""
        adv, draws, n = part.adv, part.drawing(), len(part.adv)
        total = torch.zeros_like(adv)
        together = max(1, TOGETHER // (2 * n))
        for first in range(0, self.directions, DRAWN):
            group = draws.signs(step * -(-self.directions // DRAWN) + first // DRAWN, DRAWN, *adv.shape[1:], dtype=adv.dtype)
            for some in torch.split(group[:, : self.directions - first], together, 1):
                away = delta * some
                images = torch.cat([adv[:, None] + away, adv[:, None] - away]).flatten(0, 1).to(batch.dtype)
                logits = ask(self._engine, batch, images)
                loss = self._loss(logits, part.y.repeat(2).repeat_interleave(some.shape[1])).view(2, n, -1)
                slope = ((loss[0] - loss[1]) / (2 * delta)).to(adv.dtype)
                total += torch.einsum("nk,nk...->n...", slope, some)
        return total / self.directions

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The margin, which is to rise."""
        loss = ops.margin(logits, y)[0]
        return -loss if self.targeted else loss


@dataclass(kw_only=True)
class _Ascent(Walk):
    """Iterates, Adam's running means of the gradient and its square, and the best iterate."""

    STATE: ClassVar[tuple[str, ...]] = (*Walk.STATE, "best", "mean", "square")
    RESULTS: ClassVar[tuple[str, ...]] = (*Walk.RESULTS, "best")

    best: Tensor
    mean: Tensor
    square: Tensor

    def image(self) -> Tensor:
        return self.best

    def keep(self) -> None:
        better = spread(self.judged(), self.adv)
        self.best.copy_(torch.where(better, self.adv, self.best))

    def move(self, gradient: Tensor, lr: float, step: int) -> None:
        """A step of Adam, up, and the projection."""
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.lerp_(gradient.square(), 1 - BETAS[1])
        mean, square = self.mean / (1 - BETAS[0] ** (step + 1)), self.square / (1 - BETAS[1] ** (step + 1))
        self.adv += lr * mean / (square.sqrt() + 1e-8)
        STEPS[self.norm](self.adv, gradient, self.x, 0.0, self.eps, self.lo, self.hi)  # of length 0: the projection


spsa = as_function(SPSA)
