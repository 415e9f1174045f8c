"""Robust self-training (RST): TRADES on labelled, pseudo-labelled and unlabelled images together.

    L = mean_labelled CE(z, y) + beta mean_all KL(p || q) + entropy_weight mean_unlabelled H(p)

A label of -1 says that there is none. Carmon et al., "Unlabeled Data Improves Adversarial Robustness", 2019.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..attacks import PGD
from ..attacks.draws import Source, check_source, normal_like
from ..engine import Model
from ..reference.step import arithmetic
from .base import Objective, Output, output
from .labels import hard
from .trades import TRADES


def rst_loss(logits: Tensor, logits_adv: Tensor, y: Tensor, beta: float = 6.0, entropy_weight: float = 0.0) -> Tensor:
    """RST's loss: scalar, differentiable in both logits [N, C]; y integer [N], -1 where there is no label.

    A batch without any label (or without any unlabelled image) has no such term.
    """
    labelled = hard(y) >= 0
    per_sample = ops.ce(logits, y.clamp(min=0))[0]
    loss = mean_over(per_sample, labelled) + beta * ops.kl(logits, logits_adv)[0].mean()
    if entropy_weight:
        log_p = arithmetic(logits).log_softmax(1)
        loss = loss + entropy_weight * mean_over(-(log_p.exp() * log_p).sum(1), ~labelled)
    return loss


def mean_over(values: Tensor, where: Tensor) -> Tensor:
    """The mean of the values selected, 0 where there is none; without waiting for the device."""
    return torch.where(where, values, 0.0).sum() / where.sum().clamp(min=1)


class RST(Objective):
    """Robust self-training (see :func:`rst_loss`): batches mix labelled, pseudo-labelled and unlabelled (-1) images.

    Args:
        attack: default :meth:`paper_attack`: as :class:`TRADES`. It needs no labels.
        beta: 6.
        entropy_weight: of the unlabelled images' entropy; 0 in the paper's runs.
    """

    PAPER: ClassVar[dict[str, Any]] = TRADES.PAPER

    def __init__(self, attack: PGD | None = None, beta: float = 6.0, entropy_weight: float = 0.0) -> None:
        super().__init__(attack)
        self.beta, self.entropy_weight = checks.number("beta", beta), checks.number("entropy_weight", entropy_weight)

    def adversarial(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        checks.labels(y, x)
        return self.attack_on(model)(x)

    def forward(self, model: Model, x: Tensor, y: Tensor, x_adv: Tensor) -> Output:
        logits_adv = model(x_adv)  # first, as the original: the order is that of batch norm's updates
        logits = model(x)
        return output(rst_loss(logits, logits_adv, y, self.beta, self.entropy_weight), y, logits, logits_adv, x_adv)


class RSTStability(RST):
    """RST's stability variant: noise instead of an attack, ``x' = clamp(x + sigma n)``, for randomised smoothing.

    Args:
        sigma: standard deviation of the noise, 0.25 in the paper, in units of x.
        bounds: (lo, hi) of every element, or None.
        beta, entropy_weight: as :class:`RST`. generator: source of the noise, as of :class:`fastadv.PGD`'s.
    """

    PAPER: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        sigma: float = 0.25,
        beta: float = 6.0,
        entropy_weight: float = 0.0,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        generator: Source = None,
    ) -> None:
        super().__init__(None, beta, entropy_weight)
        self.sigma, self.bounds, self.generator = checks.number("sigma", sigma), checks.bounds(bounds), generator

    def draw_from(self, source: Source) -> None:
        self.generator = source

    def adversarial(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        checks.images(x, *self.bounds)
        checks.labels(y, x)
        check_source(self.generator, x)
        return normal_like(x, self.generator, std=self.sigma).add_(x.detach()).clamp_(*self.bounds)
