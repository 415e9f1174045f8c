"""TRADES: accuracy on clean images, and predictions that an adversary cannot change.

    L = CE(z, y) + beta mean KL(softmax z || softmax z'),    x' maximises the same KL

Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", 2019. With label smoothing and batch
statistics in the attack: Wang et al., "Better Diffusion Models Further Improve Adversarial Training", 2023 (``DM``).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..attacks import PGD
from ..engine import Model, unwrap
from .base import Objective, Output, check_batch, output
from .labels import LabelLoss, LabelSmoothing, checked, cross_entropy


def trades_loss(
    logits: Tensor, logits_adv: Tensor, y: Tensor, beta: float = 6.0, label_loss: LabelLoss = cross_entropy
) -> Tensor:
    """``label_loss(z, y) + beta mean KL(softmax z || softmax z')``: scalar, differentiable in both logits [N, C].

    Gradients: ``(p - 1_y)/N + beta/N p ((log p - log q) - KL)`` and ``beta/N (q - p)``. Never NaN, also where a clean
    probability underflows to 0 (where ``F.kl_div``'s is).
    """
    return label_loss(logits, y) + beta * ops.kl(logits, logits_adv)[0].mean()


class TRADES(Objective):
    """TRADES (see :func:`trades_loss`).

    Args:
        attack: default :meth:`paper_attack`: linf, eps .031, alpha .007, 10 steps on KL from ``x + 0.001 N(0, I)``, bn "eval".
        beta: 6 in the paper (1 on MNIST): the higher, the more robust and the less accurate.
        label_loss: the first term, ``(logits, y) -> scalar``.
        bn_parity: runs the clean images a second time, without a graph, so that batch norm's running statistics are those of
            the original code (clean, adversarial, clean); loss and gradients are the same without.

    Cost: 27 forwards' worth at 10 steps. With ``bn="batch"`` the clean forward serves the attack too: 26.
    """

    PAPER: ClassVar[dict[str, Any]] = {"eps": 0.031, "alpha": 0.007, "steps": 10, "loss": "kl", "init": "normal"}

    def __init__(
        self,
        attack: PGD | None = None,
        beta: float = 6.0,
        label_loss: LabelLoss = cross_entropy,
        bn_parity: bool = False,
    ) -> None:
        super().__init__(attack)
        self.beta, self.label_loss, self.bn_parity = checks.number("beta", beta), checked(label_loss), bn_parity

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Output:
        attack = self.attack_on(model)
        if attack.bn != "batch" or not getattr(model, "training", False) or unwrap(attack.model) is not unwrap(model):
            return super().__call__(model, x, y)
        check_batch(attack, x, y)
        # The attack's clean forward, on the statistics of the batch, is the training step's own.
        logits = model(x)
        x_adv = attack(x, y, logits_ref=logits.detach())
        return self._output(model, x, y, x_adv, logits)

    def forward(self, model: Model, x: Tensor, y: Tensor, x_adv: Tensor) -> Output:
        return self._output(model, x, y, x_adv, model(x))

    def _output(self, model: Model, x: Tensor, y: Tensor, x_adv: Tensor, logits: Tensor) -> Output:
        logits_adv = model(x_adv)
        if self.bn_parity:
            with torch.no_grad():
                model(x)
        return output(self.combine(logits, logits_adv, y), y, logits, logits_adv, x_adv)

    def combine(self, logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of the two forward passes."""
        return trades_loss(logits, logits_adv, y, self.beta, self.label_loss)


TENTH_SMOOTHED = LabelSmoothing(0.1)


class DM(TRADES):
    """TRADES as DM-Improves-AT trains (Wang et al., 2023). Arguments as :class:`TRADES`, but for ``bn_parity``.

    beta 5, label smoothing of 0.1 over all classes, and linf, eps 8/255, alpha 2/255, 10 steps on KL from a uniform start, on
    batch statistics that the attack leaves alone.
    """

    PAPER: ClassVar[dict[str, Any]] = {"eps": 8 / 255, "alpha": 2 / 255, "steps": 10, "loss": "kl", "bn": "batch"}

    def __init__(
        self,
        attack: PGD | None = None,
        beta: float = 5.0,
        label_loss: LabelLoss = TENTH_SMOOTHED,
    ) -> None:
        super().__init__(attack, beta, label_loss)
