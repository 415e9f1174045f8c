"""SCORE: squared errors of probabilities where PGD-AT and TRADES have cross-entropy and KL.

    L = mean |p - t|^2 + beta mean relu(|q - p|^2 - clip),    p, q = softmax of z, z'

Pang et al., "Robustness and Accuracy Could Be Reconcilable by (Proper) Definition", 2022.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .. import checks, ops
from ..attacks import PGD
from ..engine import Model
from ..reference.step import arithmetic
from .base import Objective, Output, output
from .labels import smooth_labels
from .trades import TRADES


def label_error(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``|softmax z - t|^2`` per sample [N]: summed over classes, no root, no 1/2. t: labels smoothed over the others."""
    p = arithmetic(logits).softmax(1)
    return (p - smooth_labels(y, p.shape[1], label_smoothing, "others", p.dtype)).square().sum(1)


def score_loss(
    logits: Tensor,
    logits_adv: Tensor,
    y: Tensor,
    beta: float = 4.0,
    clip: float = 0.0,
    clip_clean: bool = False,
    label_smoothing: float = 0.0,
) -> Tensor:
    """``mean |p - t|^2 + beta mean relu(|q - p|^2 - clip)``: scalar, differentiable in both logits [N, C].

    ``clip_clean``: ``mean relu(|p - t|^2 + beta |q - p|^2 - clip)``, as the paper's runs without extra data.
    """
    clean, adversarial = label_error(logits, y, label_smoothing), ops.se(logits, logits_adv)[0]
    if clip_clean:
        return (clean + beta * adversarial - clip).relu().mean()
    return (clean + beta * (adversarial - clip).relu()).mean()


def clip_of(mass: float, classes: int) -> float:
    """The squared error of a one-hot label of which ``mass`` has moved to the other classes: how the paper names ``clip``."""
    return mass**2 + mass**2 / (classes - 1)


class SCORE(TRADES):
    """SCORE's TRADES (see :func:`score_loss`).

    Args:
        attack: default :meth:`paper_attack`: linf, eps 8/255, alpha 2/255, 10 steps on ``|q - p|^2``, bn "batch".
        beta: 4 (3 in the released models; 6, with ``clip_clean`` and ``clip=clip_of(0.3, C)``, without extra data).
        clip, clip_clean, label_smoothing: as :func:`score_loss`.
    """

    PAPER: ClassVar[dict[str, Any]] = {"eps": 8 / 255, "alpha": 2 / 255, "steps": 10, "loss": "se", "bn": "batch"}

    def __init__(
        self,
        attack: PGD | None = None,
        beta: float = 4.0,
        clip: float = 0.0,
        clip_clean: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(attack, beta)
        self.clip, self.clip_clean = checks.number("clip", clip), clip_clean
        self.label_smoothing = checks.number("label_smoothing", label_smoothing)

    def combine(self, logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
        return score_loss(logits, logits_adv, y, self.beta, self.clip, self.clip_clean, self.label_smoothing)


class SCOREPGDAT(Objective):
    """SCORE's PGD-AT: ``mean relu(|q - 1_y|^2 - clip)``, attacked by the same error.

    Args:
        attack: default :meth:`paper_attack`: linf, eps 8/255, alpha 2/255, 10 steps on :func:`label_error`, ``bn="train"``.
        clip: default: the paper's ``clip_of(0.4, C)``, 0.178 at 10 classes.
    """

    PAPER: ClassVar[dict[str, Any]] = {"eps": 8 / 255, "alpha": 2 / 255, "steps": 10, "loss": label_error, "bn": "train"}

    def __init__(self, attack: PGD | None = None, clip: float | None = None) -> None:
        super().__init__(attack)
        self.clip = None if clip is None else checks.number("clip", clip)

    def forward(self, model: Model, x: Tensor, y: Tensor, x_adv: Tensor) -> Output:
        logits = model(x_adv)
        clip = clip_of(0.4, logits.shape[1]) if self.clip is None else self.clip
        return output((label_error(logits, y) - clip).relu().mean(), y, None, logits, x_adv)
