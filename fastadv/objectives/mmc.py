"""Max-Mahalanobis centres (MMC): features are drawn to fixed class centres that are as far apart as can be.

    z_k = -|phi - mu_k|^2,    L = mean |phi - mu_y|^2 = -mean z_y

Pang et al., "Rethinking Softmax Cross-Entropy Loss for Adversarial Robustness", 2020.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import checks
from ..attacks import PGD
from ..attacks.draws import TARGETS, Source, check_source, integers_like
from ..engine import Model
from ..reference.loss import pick
from ..reference.step import arithmetic
from .base import check_batch
from .labels import hard
from .pgd_at import PGDAT


def mmc_centres(classes: int, dimensions: int, norm: float = 10.0) -> Tensor:
    """[C, D] centres of equal norm whose pairwise cosines all are ``-1/(C-1)``: a simplex. float64.

    Raises:
        ValueError: fewer than two classes, or dimensions < classes - 1.
    """
    if classes < 2 or dimensions < classes - 1:
        raise ValueError(f"mmc_centres needs classes >= 2 and dimensions >= classes - 1; got {classes} and {dimensions}")
    # The official recursion, solved: centre j takes what is left of its length in dimension j, and those after it share the
    # opposite. The last needs no dimension of its own.
    after = torch.arange(classes - 1, 0, -1, dtype=torch.float64)  # of centre j: classes - 1 - j
    own = (classes / (classes - 1) * after / (after + 1)).sqrt()
    centres = torch.zeros(classes, dimensions, dtype=torch.float64)
    centres[:, : classes - 1] = (-own / after).expand(classes, -1).tril(-1)
    centres.diagonal()[: classes - 1] = own
    return centres * norm


def mmc_distance(logits: Tensor, y: Tensor) -> Tensor:
    """``|phi - mu_y|^2`` per sample [N], from the logits of :class:`MMCHead`; y integer [N]."""
    return -pick(arithmetic(logits), hard(y))


def mmc_loss(logits: Tensor, y: Tensor) -> Tensor:
    """``mean |phi - mu_y|^2``, scalar: a label loss. Without the 1/2 of the paper, as its code."""
    return mmc_distance(logits, y).mean()


class MMCHead(nn.Module):
    """A last layer: features [N, F] to ``phi`` [N, D] by a linear map, to logits ``-|phi - mu_k|^2`` [N, C]."""

    centres: Tensor

    def __init__(self, features: int, classes: int, dimensions: int = 256, norm: float = 10.0) -> None:
        super().__init__()
        self.embed = nn.Linear(features, dimensions)
        self.register_buffer("centres", mmc_centres(classes, dimensions, norm).to(self.embed.weight.dtype))

    def forward(self, features: Tensor) -> Tensor:
        phi: Tensor = self.embed(features)
        return -(phi[:, None] - self.centres).square().sum(2)


class MMC(PGDAT):
    """:func:`mmc_loss` on images attacked towards random other classes' centres. The model ends in :class:`MMCHead`.

    Args:
        classes: how many; targets are drawn among the others.
        attack: default :meth:`paper_attack`: linf, eps 8/256, alpha 2/256, 10 steps, targeted, on :func:`mmc_distance`.
        generator: source of the targets, as of :class:`fastadv.PGD`'s starts.

    Known weakness: 55.0% under its own attacks, 43.5% under AutoAttack: softmax cross-entropy saturates on these logits.
    """

    PAPER: ClassVar[dict[str, Any]] = {"eps": 8 / 256, "alpha": 2 / 256, "steps": 10, "targeted": True, "loss": mmc_distance}

    def __init__(self, classes: int, attack: PGD | None = None, generator: Source = None) -> None:
        super().__init__(attack, mmc_loss)
        self.classes, self.generator = checks.integer("classes", classes, 2), generator

    def draw_from(self, source: Source) -> None:
        super().draw_from(source)
        self.generator = source

    def adversarial(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        attack = self.attack_on(model)
        if not attack.targeted:
            return attack(x, y)
        check_batch(attack, x, y)
        check_source(self.generator, x)
        checks.label_range(hard(y), self.classes)
        offset = integers_like(y, 1, self.classes, self.generator, TARGETS)
        return attack(x, (y + offset) % self.classes)
