"""Consistency regularisation: attacks on two augmentations of an image should make the model err in the same way.

    L = objective(both views) + weight mean JSD(softmax(z'_1 / T), softmax(z'_2 / T))

Tack et al., "Consistency Regularization for Adversarial Robustness", 2022.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .. import checks
from ..attacks.draws import Source
from ..engine import Model
from ..reference.step import arithmetic
from .base import Objective, Output


def consistency_loss(logits_1: Tensor, logits_2: Tensor, temperature: float = 0.5) -> Tensor:
    """The mean Jensen-Shannon divergence of two batches of sharpened predictions: scalar, differentiable in both logits.

    As the original, it takes a mean probability below 1e-8 for 1e-8.
    """
    log_p, log_q = ((arithmetic(z) / temperature).log_softmax(1) for z in (logits_1, logits_2))
    p, q = log_p.exp(), log_q.exp()
    log_mean = ((p + q) / 2).clamp(min=1e-8).log()
    return ((p * (log_p - log_mean) + q * (log_q - log_mean)).sum(1) / 2).mean()


class Consistency(Objective):
    """``objective`` on two views of each image, and :func:`consistency_loss` between their adversarial logits.

    Args:
        objective: any that runs adversarial images: ``Consistency(PGDAT(attack))``.
        weight: of the divergence, 1. temperature: 0.5.

    x holds both views, one after the other: ``torch.cat([augment(x), augment(x)])`` [2N, ...], and y is ``torch.cat([y, y])``.
    """

    def __init__(self, objective: Objective, weight: float = 1.0, temperature: float = 0.5) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise ValueError(f"objective must be a fastadv objective; got {type(objective).__name__}")
        self.objective, self.weight = objective, checks.number("weight", weight)
        self.temperature = checks.number("temperature", temperature, positive=True)

    def draw_from(self, source: Source) -> None:
        self.objective.draw_from(source)

    def adversarial(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        if len(x) % 2:
            raise ValueError(f"x must hold two views of each image, [2N, ...]; got {len(x)} images")
        return self.objective.adversarial(model, x, y)

    def forward(self, model: Model, x: Tensor, y: Tensor, x_adv: Tensor) -> Output:
        out = self.objective.forward(model, x, y, x_adv)
        if out.logits_adv is None:
            raise ValueError(f"{type(self.objective).__name__} runs no adversarial images to be consistent about")
        first, second = out.logits_adv.chunk(2)
        return replace(out, loss=out.loss + self.weight * consistency_loss(first, second, self.temperature))

    def observe(self, logits: Tensor | None, y: Tensor) -> None:
        self.objective.observe(logits, y)

    def end_epoch(self) -> None:
        self.objective.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        return self.objective.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state)
