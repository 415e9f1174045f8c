"""Generalised Kullback-Leibler training (GKL, also DKL v2): KL taken apart, its weights replaced by class-wise ones.

    L = CE(z, y) + alpha S + beta M
    S = -mean_i <softmax(z_i) detached, log softmax(z'_i)>
    M = 1/4 sum_i sum_jk pi_ij pi_ik ((z_ij - z_ik) - (z'_ij - z'_ik))^2 / sum_i (sum_j pi_ij)^2

pi_i is the mean prediction of last epoch over the images of class y_i. Cui et al., "Decoupled Kullback-Leibler Divergence
Loss", 2024, and its second version.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..attacks import PGD
from ..engine import Model
from ..reference.step import arithmetic
from .base import Objective, Output, output
from .labels import cross_entropy, hard


def weighted_mse(logits: Tensor, logits_adv: Tensor, pi: Tensor) -> Tensor:
    """M: the weighted squared differences of all pairs of logits, in O(N C) where the definition takes O(N C^2).

    With d = z - z', S_i = sum_j pi_ij and m_i = sum_j pi_ij d_ij / S_i: 1/2 sum_i S_i sum_j pi_ij (d_ij - m_i)^2 / sum_i S_i^2.
    """
    d = arithmetic(logits) - arithmetic(logits_adv)
    pi = pi.to(d)
    mass = pi.sum(1, keepdim=True)
    spread = d - (pi * d).sum(1, keepdim=True) / mass  # before squaring: nothing cancels
    return (mass * pi * spread.square()).sum() / (2 * mass.square().sum())


def gkl_loss(
    logits: Tensor,
    logits_adv: Tensor,
    y: Tensor,
    class_means: Tensor | None = None,
    alpha: float = 4.0,
    beta: float = 20.0,
    power: float = 1.0,
) -> Tensor:
    """``CE + alpha S + beta M``: scalar, differentiable in both logits [N, C] (S in the adversarial ones alone); y integer [N].

    ``class_means`` [C, C]: row k is the mean prediction on class k; None: uniform. pi is its rows at y to the ``power``.
    """
    z, y = arithmetic(logits), hard(y)
    pi = torch.ones_like(z) if class_means is None else class_means.to(z)[y] ** power
    soft = ops.ce(logits_adv, z.detach().softmax(1))[0].mean()
    return cross_entropy(logits, y) + alpha * soft + beta * weighted_mse(logits, logits_adv, pi)


class GKL(Objective):
    """GKL (see :func:`gkl_loss`). Call :meth:`end_epoch` after each epoch: its class means weigh the next one.

    Ranks of torch.distributed share nothing here: each weighs by the predictions on its own images.

    Args:
        classes: how many.
        attack: default :meth:`paper_attack`: linf, eps 8/255, alpha eps/2, 5 steps on S (whose gradient is that of KL) from
            ``x + 0.001 N(0, I)``, ``bn="eval"``. The paper ramps eps: set ``attack.eps`` and ``attack.alpha`` each epoch.
        alpha, beta: of S and M.
        power, temperature: of the class means: ``mean softmax(z / temperature)`` to the ``power``. 1 and 4, or 0.2-0.4 and 1.
    """

    PAPER: ClassVar[dict[str, Any]] = {"eps": 8 / 255, "alpha": 4 / 255, "steps": 5, "loss": "kl", "init": "normal"}

    def __init__(
        self,
        classes: int,
        attack: PGD | None = None,
        alpha: float = 4.0,
        beta: float = 20.0,
        power: float = 1.0,
        temperature: float = 4.0,
    ) -> None:
        super().__init__(attack)
        checks.integer("classes", classes, 2)
        self.alpha, self.beta = checks.number("alpha", alpha), checks.number("beta", beta)
        self.power = checks.number("power", power)
        self.temperature = checks.number("temperature", temperature, positive=True)
        self.class_means: Tensor | None = None
        self._sums, self._counts = torch.zeros(classes, classes), torch.zeros(classes)

    def forward(self, model: Model, x: Tensor, y: Tensor, x_adv: Tensor) -> Output:
        logits_adv = model(x_adv)  # first, as the original: the order is that of batch norm's updates
        logits = model(x)
        loss = gkl_loss(logits, logits_adv, y, self.class_means, self.alpha, self.beta, self.power)
        return output(loss, y, logits, logits_adv, x_adv)

    def observe(self, logits: Tensor | None, y: Tensor) -> None:
        """Counts a batch's predictions into the class means of this epoch; calling the objective does it already."""
        assert logits is not None
        p = (arithmetic(logits.detach()) / self.temperature).softmax(1)
        self._sums, self._counts = self._sums.to(p), self._counts.to(p)
        self._sums.index_add_(0, y.long(), p)
        self._counts.index_add_(0, y.long(), torch.ones_like(p[:, 0]))

    def end_epoch(self) -> None:
        """Makes this epoch's class means the next one's weights. A class without images gets uniform ones.

        Raises:
            RuntimeError: nothing was observed: a loop that calls :meth:`forward` or :meth:`loss` calls :meth:`observe` too.
        """
        if not bool(self._counts.any()):
            raise RuntimeError("no predictions were observed in this epoch: call the objective, or observe(logits, y)")
        uniform = torch.full_like(self._sums, 1 / len(self._counts))
        self.class_means = torch.where(self._counts[:, None] > 0, self._sums / self._counts[:, None].clamp(min=1), uniform)
        self._sums, self._counts = torch.zeros_like(self._sums), torch.zeros_like(self._counts)

    def state_dict(self) -> dict[str, Any]:
        """The class means, so that training resumes where it was."""
        return {"class_means": self.class_means, "sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.class_means = state["class_means"]
        self._sums, self._counts = state["sums"].clone(), state["counts"].clone()
