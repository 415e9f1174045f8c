"""PGD adversarial training: ``min E max CE(f(x'), y)``. Madry et al., "Towards Deep Learning Models Resistant to Adversarial
Attacks", 2018; settings of Rice, Wong and Kolter, "Overfitting in Adversarially Robust Deep Learning", 2020."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..attacks import PGD
from ..engine import Model
from .base import Objective, Output, output
from .labels import LabelLoss, checked, cross_entropy


class PGDAT(Objective):
    """``CE(f(x'), y)`` on adversarial images alone.

    Args:
        attack: default :meth:`paper_attack`: linf, eps 8/255, alpha 2/255, 10 steps, uniform start, running
            statistics updated by the attack (bn "train", Rice et al.). As common: ``paper_attack(model, bn="eval")``, "batch".
        label_loss: ``(logits, y) -> scalar``.

    Known weakness: robust overfitting. Robust test accuracy peaks soon after the learning rate first falls, and then sinks:
    select the epoch on held-out images.
    """

    PAPER: ClassVar[dict[str, Any]] = {"eps": 8 / 255, "alpha": 2 / 255, "steps": 10, "bn": "train"}

    def __init__(self, attack: PGD | None = None, label_loss: LabelLoss = cross_entropy) -> None:
        super().__init__(attack)
        self.label_loss = checked(label_loss)

    def forward(self, model: Model, x: Tensor, y: Tensor, x_adv: Tensor) -> Output:
        logits = model(x_adv)
        return output(self.label_loss(logits, y), y, None, logits, x_adv)
