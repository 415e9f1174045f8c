"""Standard training, as an objective like the others: the baseline of every comparison."""

from __future__ import annotations

from torch import Tensor

from ..engine import Model
from .base import Objective, Output, output
from .labels import LabelLoss, checked, cross_entropy


class Standard(Objective):
    """``CE(f(x), y)``: no attack. Args: ``label_loss``, ``(logits, y) -> scalar``. Not robust: that is what it is for."""

    def __init__(self, label_loss: LabelLoss = cross_entropy) -> None:
        super().__init__()
        self.label_loss = checked(label_loss)

    def adversarial(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        return x

    def forward(self, model: Model, x: Tensor, y: Tensor, x_adv: Tensor) -> Output:
        logits = model(x)
        return output(self.label_loss(logits, y), y, logits, None, None)
