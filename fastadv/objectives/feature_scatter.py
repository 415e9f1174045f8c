"""Feature scattering: images attacked without labels, by the optimal-transport distance between clean and moved logits.

Zhang and Wang, "Defense Against Adversarial Attacks Using Feature Scattering-based Adversarial Training", 2019.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attacks import PGD
from ..engine import Model
from ..reference.step import arithmetic
from .base import Objective, Output, clean_logits, output
from .labels import LabelLoss, LabelSmoothing, checked


def transport_cost(
    logits_adv: Tensor, logits: Tensor, regularisation: float = 0.01, iterations: int = 100, tolerance: float = 0.1
) -> Tensor:
    """Each moved sample's part [N] of the optimal-transport cost ``sum_ij T_ij C_ij`` between two batches of logits [N, C].

    ``C_ij = max(0, 1 - cos(z_i, z'_j))``; T by Sinkhorn's iterations in the log domain, all samples of equal mass. They end
    when the clean samples' potentials move by less than ``tolerance`` in sum, which waits for the device. Differentiable in
    both logits, through T.
    """
    z, z_adv = arithmetic(logits), arithmetic(logits_adv)
    cost = (1 - F.cosine_similarity(z[:, None], z_adv[None], dim=2, eps=1e-6)).clamp(min=0)
    log_mass = -math.log(max(len(z), 1))
    u, v = torch.zeros_like(cost[:, 0]), torch.zeros_like(cost[0])

    def log_plan() -> Tensor:
        return (u[:, None] + v - cost) / regularisation

    def log_sum(exponents: Tensor, dim: int) -> Tensor:  # log(sum exp + 1e-6), as the original: mass that nobody takes
        total = exponents.logsumexp(dim)
        return torch.logaddexp(total, torch.full_like(total, math.log(1e-6)))

    for _ in range(iterations):
        before = u
        u = u + regularisation * (log_mass - log_sum(log_plan(), 1))
        v = v + regularisation * (log_mass - log_sum(log_plan(), 0))
        if float((u - before).detach().abs().sum()) < tolerance:
            break
    return (log_plan().exp() * cost).sum(0)


HALF_SMOOTHED = LabelSmoothing(0.5, over="others")


class FeatureScatter(Objective):
    """``label_loss(f(x'), y)``, with x' moved to where its logits are farthest, as a batch, from the clean ones.

    Args:
        attack: default :meth:`paper_attack`: linf, one step of eps 8/255 from a uniform start, on :func:`transport_cost`.
            A callable loss is given the clean logits where others are given labels. (The original's start may leave the box.)
        label_loss: default: label smoothing of 0.5 over the other classes.

    Known weakness: it looks strong under PGD (60.6%) and falls under AutoAttack (36.6%): it masks gradients. For comparisons.
    """

    PAPER: ClassVar[dict[str, Any]] = {"eps": 8 / 255, "alpha": 8 / 255, "steps": 1, "loss": transport_cost}

    def __init__(self, attack: PGD | None = None, label_loss: LabelLoss = HALF_SMOOTHED) -> None:
        super().__init__(attack)
        self.label_loss = checked(label_loss)

    def adversarial(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        attack = self.attack_on(model)
        return attack(x, clean_logits(attack, x, y) if callable(attack.loss) else y)

    def forward(self, model: Model, x: Tensor, y: Tensor, x_adv: Tensor) -> Output:
        logits = model(x_adv)
        return output(self.label_loss(logits, y), y, None, logits, x_adv)
