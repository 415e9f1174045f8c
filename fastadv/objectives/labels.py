"""Losses against labels: cross-entropy, and the two formulas that the field calls label smoothing.

A *label loss* is any ``(logits [N, C], y) -> scalar``; objectives with such a term take one as ``label_loss``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks, ops
from ..reference.loss import one_hot

LabelLoss = Callable[[Tensor, Tensor], Tensor]

OVER = ("all", "others")


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The mean of ``-log p_y`` over the batch: ``F.cross_entropy`` by one fused pass. y: labels [N], or soft labels [N, C]."""
    return ops.ce(logits, y)[0].mean()


def smooth_labels(y: Tensor, classes: int, amount: float, over: str = "all", dtype: torch.dtype = torch.float32) -> Tensor:
    """Soft labels [N, C] in ``dtype``, from y [N], or [N, C] where they are soft already.

    - over="all": ``(1 - amount) t + amount / C``: mass ``1 - amount + amount / C`` on the label (``F.cross_entropy``'s
      ``label_smoothing``, DM-Improves-AT);
    - over="others": ``1 - amount`` on the label and ``amount / (C - 1)`` on each other class (SCORE, feature scattering,
      Bag of Tricks).
    """
    checks.one_of("over", over, OVER)
    t = y.to(dtype) if y.is_floating_point() else one_hot(y.long(), torch.empty(len(y), classes, dtype=dtype, device=y.device))
    return (1 - amount) * t + (amount / classes if over == "all" else amount * (1 - t) / (classes - 1))


class LabelSmoothing:
    """Cross-entropy against :func:`smooth_labels`, as a label loss: ``TRADES(label_loss=LabelSmoothing(0.1))``."""

    def __init__(self, amount: float, over: str = "all") -> None:
        if not 0 <= amount < 1:
            raise ValueError(f"amount must be in [0, 1); got {amount!r}")
        checks.one_of("over", over, OVER)
        self.amount, self.over = amount, over

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return cross_entropy(logits, smooth_labels(y, logits.shape[1], self.amount, self.over, dtype))

    def __repr__(self) -> str:
        return f"LabelSmoothing({self.amount}, over={self.over!r})"


def hard(y: Tensor) -> Tensor:
    """Class indices [N], for a formula that has no form in soft labels."""
    if y.is_floating_point():
        raise ValueError(f"y must be integer labels [N]; got soft labels {list(y.shape)}")
    return y.long()


def checked(label_loss: LabelLoss) -> LabelLoss:
    if not callable(label_loss):
        raise ValueError(f"label_loss must be callable on (logits, y); got {label_loss!r}")
    return label_loss
