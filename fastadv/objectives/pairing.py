"""Adversarial logit pairing, and half-half training, which is ALP without the pairing.

    L = 1/2 CE(z, y) + 1/2 CE(z', y) + weight mean (z - z')^2

Kannan, Kurakin and Goodfellow, "Adversarial Logit Pairing", 2018.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..attacks import PGD
from ..engine import Model
from ..reference.step import arithmetic
from .base import Objective, Output, clean_logits, output
from .labels import LabelLoss, checked, cross_entropy


def alp_loss(
    logits: Tensor, logits_adv: Tensor, y: Tensor, weight: float = 0.5, label_loss: LabelLoss = cross_entropy
) -> Tensor:
    """ALP's loss: scalar, differentiable in both logits [N, C]; the last mean is over all N*C elements."""
    pairing = (arithmetic(logits) - arithmetic(logits_adv)).square().mean() if weight else 0.0
    return (label_loss(logits, y) + label_loss(logits_adv, y)) / 2 + weight * pairing


class ALP(Objective):
    """ALP (see :func:`alp_loss`).

    Args:
        attack: default :meth:`paper_attack`: linf, eps 16/255, alpha 2/255, 10 steps, targeted. A targeted attack is given
            the least likely class of the clean images (one more forward) and never sees the label.
        weight: of the pairing; 0.5.
        label_loss: ``(logits, y) -> scalar``; the original smooths labels by 0.1.
        together: one forward of [clean; adversarial], which share their batch statistics, as the original; else two.

    Known weakness: on ImageNet it fell to stronger attacks within months (Engstrom et al., 2018; Mosbach et al., 2018).
    """

    PAPER: ClassVar[dict[str, Any]] = {"eps": 16 / 255, "alpha": 2 / 255, "steps": 10, "targeted": True}

    def __init__(
        self,
        attack: PGD | None = None,
        weight: float = 0.5,
        label_loss: LabelLoss = cross_entropy,
        together: bool = True,
    ) -> None:
        super().__init__(attack)
        self.weight, self.label_loss, self.together = checks.number("weight", weight), checked(label_loss), together

    def adversarial(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        attack = self.attack_on(model)
        if not attack.targeted:
            return attack(x, y)
        return attack(x, clean_logits(attack, x, y).argmin(1))

    def forward(self, model: Model, x: Tensor, y: Tensor, x_adv: Tensor) -> Output:
        logits, logits_adv = model(torch.cat([x, x_adv])).chunk(2) if self.together else (model(x), model(x_adv))
        return output(alp_loss(logits, logits_adv, y, self.weight, self.label_loss), y, logits, logits_adv, x_adv)


class HalfHalf(ALP):
    """``1/2 CE(z, y) + 1/2 CE(z', y)``, the batch's clean and adversarial halves in one forward. Arguments as :class:`ALP`.

    Attack by default as :class:`fastadv.PGDAT`, with ``bn="eval"``.
    """

    PAPER: ClassVar[dict[str, Any]] = {"eps": 8 / 255, "alpha": 2 / 255, "steps": 10}

    def __init__(self, attack: PGD | None = None, label_loss: LabelLoss = cross_entropy, together: bool = True) -> None:
        super().__init__(attack, 0.0, label_loss, together)
