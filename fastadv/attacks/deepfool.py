"""DeepFool: step by step to the nearest decision boundary of the model made linear at the present image (l2, linf)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks
from ..engine import Model
from ..reference.step import Scalar, spread
from .base import Batch, as_function
from .nearest import MinimumNorm, Nearest, begun, clean_logits, driven
from .norms import DUAL, norms, unit

BEYOND = 1e-4  # added to each step as in the original, in units of hi - lo: images on the boundary itself move too


class DeepFool(MinimumNorm):
    """DeepFool: ``x_adv = DeepFool(model)(x, y)``.

    Moosavi-Dezfooli, Fawzi and Frossard, "DeepFool: a simple and accurate method to fool deep neural networks", 2016.
    Untargeted. The first image that fools the model is returned, which at the first step is x itself where y is not what the
    model predicts. Other than in the original images stay inside the bounds.

    Args:
        model: any callable that maps a batch [N, ...] to logits [N, C]. Left exactly as found.
        eps: largest length of a perturbation in the norm, in units of x, float or [N]; None: any. Longer ones are cut short.
        steps: most steps a sample takes, >= 1. Each is one forward and ``classes - 1`` input gradients of it.
        overshoot: >= 0, by which steps are longer than the way to the boundary, as a fraction of it.
        classes: classes that are looked at, >= 2: y and those with the highest logits at x; at most C.
        norm: "l2" or "linf".
        bounds: (lo, hi) of every element, or None for unbounded.
        seed: nothing is drawn.
        engine, precision, twin, memory: as in :class:`fastadv.DDN`.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described.
    """

    NORMS = ("l2", "linf")

    def __init__(
        self,
        model: Model,
        eps: Scalar | None = None,
        steps: int = 50,
        overshoot: float = 0.02,
        classes: int = 10,
        norm: str = "l2",
        bounds: tuple[float, float] | None = (0.0, 1.0),
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        super().__init__(model, eps, norm, False, bounds, seed, engine, precision, twin, memory)
        self.steps, self.overshoot = checks.integer("steps", steps), checks.number("overshoot", overshoot)
        self.classes = checks.integer("classes", classes, 2)

    def _nearest(self, batch: Batch) -> tuple[Tensor, bool]:
        clean = clean_logits(batch)
        others = clean.scatter(1, batch.y[:, None], -torch.inf)
        rivals = others.topk(min(self.classes, clean.shape[1]) - 1).indices
        loop = _DeepFool(
            **begun(batch, "margin"), rivals=rivals, ahead=clean.new_zeros(*rivals.shape, clean.shape[1]),
            beyond=BEYOND * batch.span, factor=1 + self.overshoot,
        )  # fmt: skip
        loop.ahead.scatter_(2, rivals[:, :, None], 1).scatter_(2, batch.y.view(-1, 1, 1).expand(-1, rivals.shape[1], 1), -1)
        loop.fooled |= batch.fooled(clean)
        return driven(self, loop, batch, self.steps)


@dataclass(kw_only=True)
class _DeepFool(Nearest):
    STATE: ClassVar[tuple[str, ...]] = (*Nearest.STATE, "rivals", "ahead")
    SETTINGS: ClassVar[tuple[str, ...]] = (*Nearest.SETTINGS, "beyond", "factor")

    STOPS: ClassVar[bool] = True

    rivals: Tensor  # [N, K] classes
    ahead: Tensor  # [N, K, C]: weights of the logits in "rival k minus y"
    beyond: float
    factor: float

    def step(self) -> None:
        inputs = self.inputs()
        logits, slopes = self.passes.gradients(inputs, self.ahead.transpose(0, 1))
        with torch.no_grad():
            assert self.y is not None
            stopped = self.fooled.clone()  # who fools the passes only now may yet be found not to fool the model
            gaps = logits.gather(1, self.rivals) - logits.gather(1, self.y[:, None])
            self.keep(inputs, gaps.amax(1), logits.argmax(1) != self.y)
            steepness = norms(slopes.flatten(0, 1).to(self.adv.dtype), DUAL[self.norm]).view(len(slopes), -1)
            ways = torch.where(steepness > 0, gaps.T.abs() / steepness, torch.inf).to(self.adv.dtype)
            length, nearest = ways.min(0)  # NaN, of a sample whose gradient is NaN, moves nothing
            slope = slopes[nearest, torch.arange(len(nearest), device=nearest.device)].to(self.adv.dtype)
            direction = unit(slope) if self.norm == "l2" else slope.sign()
            length = torch.where(stopped | ~length.isfinite(), 0.0, self.factor * (length + self.beyond))
            self.adv.addcmul_(spread(length, direction), direction).clamp_(self.lo, self.hi)


deepfool = as_function(DeepFool)
