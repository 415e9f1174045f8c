"""Random noise: what an attack must at least be better than."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks
from ..engine import Model
from ..reference.step import Scalar, per_sample, spread
from .base import Attack, Batch, as_function
from .norms import norms
from .queries import Walk, growing, walk


class RandomNoise(Attack):
    """The best of ``draws`` uniform draws in the ball, clamped to the box: one that fools the model, else that of highest loss.

    A sample stops with the first image that fools the model. The clean image is none of the draws.

    Args:
        model: any callable that maps a batch [N, ...] to logits [N, C]; needs no gradient. Left exactly as found.
        eps: radius in units of x, float or per-sample [N].
        draws: >= 1, each a forward pass of the sample.
        norm, targeted, bounds, seed, engine, precision, twin, memory: as in :class:`fastadv.attacks.Attack`. The loss is the
            margin, and the cross-entropy of the target where targeted.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described.
    """

    GRADIENTS: ClassVar[bool] = False

    def __init__(
        self,
        model: Model,
        eps: Scalar,
        draws: int = 100,
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
        self.draws = checks.integer("draws", draws)

    def _attack(self, batch: Batch) -> Tensor:
        whole = _Noise.over(batch)
        walk(self._engine, batch, whole, growing(self.draws), _Noise.trials)
        return whole.adv


class _Noise(Walk):
    def trials(self, chunk: range) -> Iterator[None]:
        best = self.adv.clone()
        for draw in chunk:
            self.adv.copy_((self.x + self.noise(draw)).clamp_(self.lo, self.hi))
            yield
            better = spread(self.judged(), best)
            torch.where(better, self.adv, best, out=best)
        self.adv.copy_(best)

    def noise(self, draw: int) -> Tensor:
        """Uniform in the ball."""
        x, shape, draws = self.x, self.x.shape[1:], self.drawing()
        eps = per_sample(self.eps, x)
        if self.norm == "linf":
            return draws.uniform(draw, *shape, dtype=x.dtype).mul_(2).sub_(1).mul_(eps)
        # Uniform on the sphere, which is a direction of normal, or of two-sided exponential, numbers; then inside of it.
        noise = (draws.normal if self.norm == "l2" else draws.laplace)(draw, *shape, dtype=x.dtype)
        deep = draws.of_stream(draws.stream + 1).uniform(draw, 1, dtype=x.dtype)[:, 0] ** (1 / noise[0].numel())
        return noise * (eps * spread(deep / norms(noise, self.norm).clamp(min=1e-30), noise))


randomnoise = as_function(RandomNoise)
