"""Interval bound propagation (IBP): trains on the worst that a bound allows, so that the bound proves something in the end.

    L = kappa CE(z, y) + (1 - kappa) CE(worst z over the linf ball, y)

Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models", 2018.
"""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..engine import Model
from ..intervals import worst_logits
from .base import Objective, Output, output
from .labels import cross_entropy, hard


def ibp_loss(logits: Tensor, worst: Tensor, y: Tensor, kappa: float = 0.5) -> Tensor:
    """``kappa CE(z, y) + (1 - kappa) CE(worst, y)``: scalar, differentiable in both.

    Args:
        logits: [N, C], of clean images.
        worst: [N, C], bounds of ``z_j - z_y`` as :func:`fastadv.intervals.worst_logits` gives them.
        y: labels [N].
    """
    return kappa * cross_entropy(logits, y) + (1 - kappa) * cross_entropy(worst, y)


class IBP(Objective):
    """IBP (see :func:`ibp_loss`). It attacks nothing; what it has learnt :func:`fastadv.certify.certify_intervals` tells.

    Clean loss for ``warmup`` batches, then eps grows from 0 and kappa falls from 1, linearly over ``ramp`` batches: trained on
    the full radius from the start, a network learns nothing. Batches are counted by :meth:`observe`.

    Args:
        eps: linf radius to arrive at, units of x. One is better certified by training on a larger one: of the demo's digits,
            88% at 0.1 after training on 0.2, and 85% after training on 0.1.
        warmup, ramp: batches, 2,000 and 10,000 in the paper's code for MNIST (60,000 batches of 100, Adam).
        kappa: weight of the clean loss to arrive at, in [0, 1].
        bounds: (lo, hi) of every element, or None.

    The model is one that :func:`fastadv.intervals.interval_bounds` can read. Bounds use batch norms' running statistics, the
    clean forward those of the mode that the model is in. ``out.logits_adv`` are the worst logits, and "robust_accuracy" is
    verified; neither is there while it warms up.

    Cost: 9 forwards' worth; 3 while it warms up.
    """

    def __init__(
        self,
        eps: float = 0.3,
        warmup: int = 2000,
        ramp: int = 10_000,
        kappa: float = 0.5,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__()
        if checks.number("kappa", kappa) > 1:
            raise ValueError(f"kappa must be in [0, 1]; got {kappa!r}")
        self.eps, self.kappa, self.bounds = checks.number("eps", eps), float(kappa), checks.bounds(bounds)
        self.warmup, self.ramp = checks.integer("warmup", warmup, 0), checks.integer("ramp", ramp, 0)
        self._batches = 0

    @property
    def progress(self) -> float:
        """How much of the ramp is behind the next batch, in [0, 1]."""
        return min(max(self._batches - self.warmup, 0) / self.ramp, 1.0) if self.ramp else float(self._batches >= self.warmup)

    def adversarial(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        checks.images(x, *self.bounds)
        checks.labels(y, x)
        return x

    def forward(self, model: Model, x: Tensor, y: Tensor, x_adv: Tensor) -> Output:
        logits, done = model(x), self.progress
        if not done:
            return output(cross_entropy(logits, y), y, logits, None, None)
        worst = worst_logits(model, x, hard(y), done * self.eps, self.bounds)
        return output(ibp_loss(logits, worst, y, 1 - done * (1 - self.kappa)), y, logits, worst, None)

    def observe(self, logits: Tensor | None, y: Tensor) -> None:
        self._batches += 1

    def state_dict(self) -> dict[str, int]:
        return {"batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._batches = state["batches"]
