"""What minimum-norm attacks share: they look for the nearest image that fools the model, and have it confirmed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine import Losses, Passes
from ..reference.step import spread
from .base import Attack, Batch
from .losses import AttackLoss
from .norms import norms, project
from .search import Search, drive

LONGER = (1.0, 1.003, 1.01, 1.03, 1.1, 1.3, 2.0)  # times the length at which other passes than the model's own were fooled


@dataclass(kw_only=True)
class Nearest(Search):
    """Best is the nearest image that fooled the model; before there is one, that which came closest to it by the loss."""

    STATE: ClassVar[tuple[str, ...]] = ("adv", "centre", "y", "label", "image", "score", "fooled", "queries")
    SCRATCH: ClassVar[tuple[str, ...]] = ("losses",)
    SETTINGS: ClassVar[tuple[str, ...]] = ("eps", "lo", "hi", "dtype", "norm", "loss")
    RESULTS: ClassVar[tuple[str, ...]] = (*Search.RESULTS, "queries")

    STOPS: ClassVar[bool] = False  # whether a sample's first image that fools the model is its last

    reference: None = None
    eps: float = math.inf  # these images go where they want
    queries: Tensor  # [N], forward passes
    losses: Losses | None = None
    passes: Passes

    def __post_init__(self) -> None:
        self.compare()

    def keep(self, inputs: Tensor, gain: Tensor, fooled: Tensor) -> None:
        """Compares the present images, by what the attack raises [N] and whether they fool the model [N]."""
        self.queries += ~self.fooled if self.STOPS else 1
        score = torch.where(fooled, -norms(inputs.to(self.centre.dtype) - self.centre, self.norm), gain).to(self.score.dtype)
        better = self.best(score, fooled, self.STOPS)
        torch.where(spread(better, inputs), inputs, self.image, out=self.image)
        torch.where(better, score, self.score, out=self.score)
        self.fooled.logical_or_(fooled)

    def evaluate(self) -> None:
        with torch.no_grad():
            inputs = self.inputs()
            logits = self.passes.logits(inputs)
            self.losses = self.loss(logits, self.y, None, self.losses)
            self.keep(inputs, *self.judged(logits, self.losses[0]))


def begun(batch: Batch, loss: str) -> dict[str, Any]:
    """What every such loop begins with: at x."""
    return {
        "adv": batch.x.clone(), "centre": batch.x, "y": batch.y, "label": batch.y, "lo": batch.lo, "hi": batch.hi,
        "dtype": batch.dtype, "norm": batch.norm, "loss": AttackLoss(loss, batch.targeted),
        "queries": torch.zeros_like(batch.y), "passes": batch.passes,
    }  # fmt: skip


def driven(attack: Attack, loop: Nearest, batch: Batch, steps: int) -> tuple[Tensor, bool]:
    """Runs the loop and counts its forward passes; returns the best images, and whether the passes were the model's own."""
    queries = loop.queries.clone()
    forwards, exact = drive(attack.engine, loop, batch.model, steps, early_stop=loop.STOPS, shrinks=loop.STOPS)
    batch.forwards += forwards
    batch.queries += loop.queries - queries
    return loop.image, exact


class MinimumNorm(Attack):
    """Base of the attacks that look for the nearest adversarial image, inside a ball or, with ``eps=None``, anywhere."""

    EPS_OPTIONAL: ClassVar[bool] = True

    def _attack(self, batch: Batch) -> Tensor:
        adv, exact = self._nearest(batch)
        adv = adv.to(batch.x.dtype)
        if not exact:
            adv = confirmed(batch, adv)
        if batch.eps is None:
            return adv
        inside = norms(adv - batch.x, self.norm) <= torch.as_tensor(batch.eps, dtype=torch.float64, device=adv.device)
        nearer = batch.x + project(adv - batch.x, batch.eps, self.norm, batch.lo - batch.x, batch.hi - batch.x)
        return torch.where(spread(inside, adv), adv, nearer.clamp(batch.lo, batch.hi))

    def _nearest(self, batch: Batch) -> tuple[Tensor, bool]:
        """The nearest images found, and whether by the model's own passes."""
        raise NotImplementedError

    @property
    def _sign(self) -> int:
        """Of the gradient by which images move: they climb the loss, or descend it to the target."""
        return -1 if self.targeted else 1


def confirmed(batch: Batch, adv: Tensor) -> Tensor:
    """Images that fool the model itself, and not only its twin or what it is in other precision, a little farther away.

    Who fools it at no length of ``LONGER`` keeps its image.
    """
    own, adv = Passes(batch.model), adv.clone()
    standing = torch.arange(len(adv), device=adv.device)
    for length in LONGER:
        part = batch.rows(standing)
        longer = (part.x + length * (adv[standing] - part.x)).clamp(batch.lo, batch.hi)
        fooled = part.fooled(own.logits(part.inputs(longer)))
        batch.forwards += 1
        batch.queries[standing] += 1
        adv[standing[fooled]] = longer[fooled]
        standing = standing[~fooled]
        if not len(standing):
            break
    return adv


def clean_logits(batch: Batch) -> Tensor:
    """The model's own, of x: whether x fools it already is not for other passes to say."""
    batch.forwards += 1
    batch.queries += 1
    with torch.no_grad():
        logits: Tensor = Passes(batch.model, check=batch.passes.check).logits(batch.inputs(batch.x))
    batch.passes.check = None  # a part of the batch may be next
    return logits


def farthest(batch: Batch) -> Tensor:
    """How far the image of each sample may go, [N]: to the farthest corner of the box, or the end of the ball."""
    corner = norms(torch.maximum(batch.x - batch.lo, batch.hi - batch.x), batch.norm)
    return (
        corner
        if batch.eps is None
        else corner.minimum(torch.as_tensor(batch.eps, dtype=torch.float64, device=corner.device).to(corner.dtype))
    )
