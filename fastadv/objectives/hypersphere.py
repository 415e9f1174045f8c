"""Hypersphere embedding (HE): a head that sees only angles, and an angular margin in the training loss.

    z_k = scale cos(features, w_k),    label loss = CE(z - scale margin 1_y, y)

Features and class weights are normalised (FN, WN); the attack sees the logits without margin (AM). It is a head and a label
loss, so it composes with any objective that takes one:

    head = HypersphereHead(512, 10, scale=15.0)                            # replaces the model's last linear layer
    fastadv.TRADES(label_loss=HypersphereMargin(scale=15.0, margin=0.2))   # TRADES-HE; 10 and 0.2 with PGDAT: PGD-HE
    fastadv.ALP(attack, weight=0.5 / 20**2, label_loss=HypersphereMargin(20.0, 0.3), together=False)   # ALP-HE

(ALP-HE pairs cosines, so its weight is divided by the squared scale. All three attack as MART or TRADES do in their papers:
pass ``fastadv.MART.paper_attack(model)`` to PGDAT and ALP.)

Pang et al., "Boosting Adversarial Training with Hypersphere Embedding", 2020.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..reference.loss import one_hot
from ..reference.step import arithmetic
from .labels import cross_entropy, hard


def hypersphere_loss(logits: Tensor, y: Tensor, scale: float, margin: float) -> Tensor:
    """``CE(z - scale margin 1_y, y)``: scalar. ``logits`` [N, C] are ``scale cos``, as of :class:`HypersphereHead`."""
    z = arithmetic(logits)
    return cross_entropy(z - scale * margin * one_hot(hard(y), z), y)


class HypersphereMargin:
    """:func:`hypersphere_loss` as a label loss: ``PGDAT(label_loss=HypersphereMargin(10.0, 0.2))``."""

    def __init__(self, scale: float, margin: float) -> None:
        self.scale, self.margin = checks.number("scale", scale, positive=True), checks.number("margin", margin)

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        return hypersphere_loss(logits, y, self.scale, self.margin)

    def __repr__(self) -> str:
        return f"HypersphereMargin(scale={self.scale}, margin={self.margin})"


class HypersphereHead(nn.Module):
    """A last layer without bias: features [N, D] to ``scale cos(features, weight_k)`` [N, C].

    The gradient passes through both normalisations. The official code overwrites the weights with unit rows instead, and
    predicts with raw cosines, on which attacks by cross-entropy are weak (logits in [-1, 1]): these logits are scaled.
    """

    def __init__(self, features: int, classes: int, scale: float = 15.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features))
        self.scale = scale
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[1]}, classes={self.weight.shape[0]}, scale={self.scale}"
