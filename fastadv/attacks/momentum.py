"""MI-FGSM: sign steps along a gradient that remembers, which finds images that other models take for something else, too.

    v_{k+1} = decay v_k + g_k / |g_k|_1,    x_{k+1} = project(x_k + alpha sign(v_{k+1})),    g_k the gradient of the loss at x_k

Dong et al., "Boosting Adversarial Attacks with Momentum", 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..engine import Losses, Model
from ..reference.step import Scalar
from .base import Attack, Batch, as_function
from .losses import LABEL_LOSSES, AttackLoss, CustomLoss
from .search import Search, drive


class MIFGSM(Attack):
    """The momentum iterative fast gradient sign method (Dong et al., 2018): ``x_adv = MIFGSM(model, eps=8/255)(x, y)``.

    It starts at x and returns the last image, whether or not it fools the model. A sample whose gradient is zero or not
    finite moves on as it did before.

    Args:
        model, norm ("linf"), targeted, bounds, engine, precision, twin, memory: as :class:`fastadv.attacks.Attack`. Nothing
            is drawn at random: ``seed`` changes nothing.
        eps: radius in units of x, float or per-sample [N].
        alpha: step size in the same units, float or [N]; None: ``eps / steps``, as in the paper.
        steps: gradient steps, >= 1. Each is one forward and one input gradient.
        decay: of the velocity with each step, >= 0; 0: the iterative FGSM.
        loss: what is maximised: "ce", "margin" or "dlr", or a callable ``(logits, y) -> [N]``.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described; nothing has been changed then.
    """

    NORMS = ("linf",)

    def __init__(
        self,
        model: Model,
        eps: Scalar,
        alpha: Scalar | None = None,
        steps: int = 10,
        decay: float = 1.0,
        loss: str | CustomLoss = "ce",
        norm: str = "linf",
        targeted: bool = False,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        checks.integer("steps", steps)
        checks.number("decay", decay)
        if not callable(loss):
            checks.one_of("loss", loss, LABEL_LOSSES)
        self.alpha, self.steps, self.decay, self.loss = alpha, steps, decay, loss
        super().__init__(model, eps, norm, targeted, bounds, seed, engine, precision, twin, memory)

    def _check_sizes(self) -> tuple[float, float]:
        if self.alpha is not None:
            checks.non_negative("alpha", self.alpha)
        return super()._check_sizes()

    def _attack(self, batch: Batch) -> Tensor:
        assert batch.eps is not None
        checks.per_sample("alpha", self.alpha, batch.x)
        alpha = batch.eps / self.steps if self.alpha is None else self.alpha
        loss = AttackLoss(self.loss, self.targeted)
        loop = _Momentum(
            adv=batch.x.clone(), velocity=torch.zeros_like(batch.x), centre=batch.x, y=batch.y,
            reference=batch.logits(batch.x) if loss.needs_reference else None, label=None,
            eps=batch.eps, alpha=-alpha if self.targeted else alpha, decay=self.decay,
            lo=batch.lo, hi=batch.hi, dtype=batch.dtype, norm=self.norm, loss=loss,
        )  # fmt: skip
        loop.passes = batch.passes
        forwards, _ = drive(self._engine, loop, batch.model, self.steps)
        batch.forwards += forwards
        batch.queries += forwards
        return loop.adv


@dataclass(kw_only=True)
class _Momentum(Search):
    """Momentum steps on one batch."""

    STATE: ClassVar[tuple[str, ...]] = ("adv", "velocity", "centre", "y", "reference", "eps", "alpha", "decay")
    SCRATCH: ClassVar[tuple[str, ...]] = ("losses", "gradient")
    SETTINGS: ClassVar[tuple[str, ...]] = ("lo", "hi", "dtype", "norm", "loss")

    velocity: Tensor
    alpha: Scalar
    decay: Scalar
    losses: Losses | None = None
    gradient: Tensor | None = None

    def step(self) -> None:
        self.gradient = None  # frees its memory, which the next one then takes without new page faults
        _, self.losses, self.gradient = self.passes.gradient(self.inputs(), self.loss, self.y, self.reference, self.losses)
        with torch.no_grad():
            ops.momentum_step_(
                self.adv, self.velocity, self.gradient, self.centre, self.alpha, self.decay, self.eps, self.lo, self.hi
            )


mifgsm = as_function(MIFGSM)
