"""A loop that looks for the best image of each sample, and how it is driven: stopping, shrinking batches, the last word."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..engine import Engine, Loop, Model, Passes, Run
from ..reference.step import Scalar
from .losses import AttackLoss, Towards
from .norms import rounded

S = TypeVar("S", bound="Search")


@dataclass(kw_only=True)
class Search(Loop):
    """Images that move in ball and box, and the best one of each sample so far.

    Best is a fooling image before any other, then the higher score (the loss, or minus it where the attack descends), of
    equals the later. ``image``, ``score`` and ``fooled`` are None where an attack does not compare its images.
    """

    RESULTS: ClassVar[tuple[str, ...]] = ("adv", "image", "score", "fooled")  # what a part of the batch brings home

    adv: Tensor
    centre: Tensor
    y: Tensor | None
    reference: Tensor | None
    label: Tensor | None  # the class to leave, or to reach
    eps: Scalar
    lo: float
    hi: float
    dtype: torch.dtype  # of the images that the model is given
    norm: str
    loss: AttackLoss | Towards
    asked: Tensor = field(init=False)  # forward passes of each sample, [N], in the last drive
    image: Tensor = None  # type: ignore[assignment]
    score: Tensor = None  # type: ignore[assignment]
    fooled: Tensor = None  # type: ignore[assignment]

    def compare(self) -> None:
        """From here on images are compared. None has fooled the model yet."""
        self.image = self.centre.to(self.dtype, copy=True)
        self.fooled = torch.zeros(len(self.centre), dtype=torch.bool, device=self.centre.device)
        self.score = torch.full_like(self.fooled, -math.inf, dtype=self.centre.dtype)

    def evaluate(self) -> None:
        """Only looks whether the last step has brought the best image."""
        raise NotImplementedError

    def inputs(self, images: Tensor | None = None) -> Tensor:
        """The images (default: that move) as the model gets them."""
        return rounded(self.adv if images is None else images, self.centre, self.dtype, self.eps, self.norm)

    def judged(self, logits: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """What the attack raises [N], and whether it has got there [N]."""
        assert self.label is not None
        reached = logits.argmax(1) == self.label
        return (-loss, reached) if self.loss.targeted else (loss, ~reached)

    def best(self, score: Tensor, fooled: Tensor, stopped: bool) -> Tensor:
        """Which of the present images [N] are the best so far; ``stopped``: who fooled the model before has its image."""
        improves = better(score, fooled, self.score, self.fooled)
        return improves & ~self.fooled if stopped else improves

    def confirm(self, stopped: Tensor, passes: Passes) -> int:
        """Asks the model itself about those who fooled the loop's passes since ``stopped``; returns the forwards it took."""
        assert self.label is not None
        found = (self.fooled & ~stopped).nonzero()[:, 0]
        if not len(found):
            return 0
        with torch.no_grad():
            reached = passes.logits(self.inputs(self.image)[found]).argmax(1) == self.label[found]
            self.fooled[found] = fooled = reached if self.loss.targeted else ~reached
            self.score[found] = self.score[found].masked_fill(~fooled, -math.inf)
        return 1

    def score_again(self, passes: Passes, reference: Tensor | None) -> None:
        """Success and loss of the best images by ``passes``, measured from the clean logits ``reference``."""
        with torch.no_grad():
            logits = passes.logits(self.inputs(self.image))
            self.score, self.fooled = self.judged(logits, self.loss(logits, self.y, reference)[0])

    def update(self, other: Search, rows: Tensor | None) -> None:
        """Takes over what has become of these samples (all: None) in a loop that was made of this one."""
        if other is not self:
            with torch.no_grad():
                for name in self.RESULTS:
                    if (found := getattr(other, name)) is not None:
                        getattr(self, name)[slice(None) if rows is None else rows] = found


def better(score: Tensor, fooled: Tensor, than_score: Tensor, than_fooled: Tensor) -> Tensor:
    """Which images [N] are better than others, or as good."""
    return (fooled & ~than_fooled) | ((fooled == than_fooled) & ~(score < than_score))


@torch.enable_grad()
def drive(
    engine: Engine,
    loop: S,
    model: Model,
    steps: int,
    early_stop: bool = False,
    shrinks: bool = False,
    after: Callable[[S, int], None] | None = None,
) -> tuple[int, bool]:
    """Runs ``steps`` steps and, where images are compared, an evaluation of the last one; brings ``loop`` up to date.

    Args:
        early_stop: end when all samples have fooled the model.
        shrinks: on the way, let the fooled leave the batch.
        after: called with the loop in use and the number of the step, after each.

    Returns:
        How many forward passes it took, and whether with the model's own bits.
    """
    run, rows, forwards, exact = engine.run(loop, model), None, 0, True
    passed = 0  # forward passes of the samples in the run, since they were last counted
    loop.asked = torch.zeros(len(loop.adv), dtype=torch.int64, device=loop.adv.device)

    def count() -> None:
        nonlocal passed
        loop.asked[slice(None) if rows is None else rows] += passed
        passed = 0

    for step in range(steps):
        if early_stop:
            standing = int((~run.loop.fooled).sum())
            if not standing:
                break
            if shrinks and (size := bucket(standing, len(loop.adv))) < len(run.loop.adv):
                # Those that stand, and as many of the fooled, which do not move, as fill a batch of a size that returns.
                loop.update(run.loop, rows)
                count()
                kept = run.loop.fooled.byte().argsort(stable=True)[:size]
                part, rows = run.loop.rows(kept), kept if rows is None else rows[kept]
                part.passes = loop.passes
                run = engine.run(part, model, part=True)
        forwards, passed = forwards + _look(run, run.step, model, early_stop), passed + 1
        exact = exact and run.exact
        if after is not None:
            after(run.loop, step)
    else:
        if loop.image is not None:
            forwards, passed = forwards + _look(run, run.loop.evaluate, model, early_stop), passed + 1
    loop.update(run.loop, rows)
    count()
    return forwards, exact


def _look(run: Run[S], look: Callable[[], None], model: Model, early_stop: bool) -> int:
    """A step, or an evaluation; the number of forwards that it took."""
    stopped = run.loop.fooled.clone() if early_stop and not run.exact else None
    look()
    if stopped is None:
        return 1
    # Who stops on the word of other passes than the model's own might have stopped too soon.
    return 1 + run.loop.confirm(stopped, Passes(model))


def bucket(standing: int, of: int) -> int:
    """The least of ``of``, 3/4, 1/2, 3/8, 1/4 ... of it that holds ``standing``: few sizes, which come again."""
    size = of
    while size > 1 and (half := (size + 1) // 2) >= standing:
        size = half
    three_quarters = (3 * size + 3) // 4
    return three_quarters if three_quarters >= standing else size
