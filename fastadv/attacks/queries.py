"""Attacks without gradients: how they ask the model, so that every engine can answer, and how a search by trials is driven."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .. import ops
from ..engine import Engine, Loop, Losses, Passes
from .base import Batch
from .draws import Draws
from .norms import rounded
from .search import bucket

CHUNK = 64  # trials prepared together, at most; between chunks those who are fooled leave the batch
TOGETHER = 1024  # images in one forward pass, where a sample asks about many at once: what bounds the memory

W = TypeVar("W", bound="Walk")


@dataclass(kw_only=True)
class Query(Loop):
    """One forward pass of ``adv``, which the attack writes in place between the steps, to ``logits``."""

    STATE: ClassVar[tuple[str, ...]] = ("adv",)
    SCRATCH: ClassVar[tuple[str, ...]] = ("logits",)

    adv: Tensor
    logits: Tensor = None  # type: ignore[assignment]

    def step(self) -> None:
        with torch.no_grad():
            self.logits = self.passes.logits(self.inputs())

    def inputs(self) -> Tensor:
        """The images as the model gets them."""
        return self.adv


def ask(engine: Engine, batch: Batch, images: Tensor, ragged: bool = False) -> Tensor:
    """Logits [M, C] of images [M, ...] of whatever samples. Forwards are counted, queries are not.

    ``ragged``: their number may never come again, so that there is nothing to compile.
    """
    batch.forwards += 1
    query = Query(adv=images)
    query.passes = batch.passes
    run = engine.run(query, batch.model, part=ragged)
    run.step()
    return run.loop.logits.clone()  # a recorded step answers into memory that the next one overwrites


@dataclass(kw_only=True)
class Walk(Query):
    """The best images of some samples so far. A trial is written into ``adv`` and judged by the answer."""

    STATE: ClassVar[tuple[str, ...]] = ("adv", "x", "y", "samples", "eps", "score", "standing", "queries")
    SCRATCH: ClassVar[tuple[str, ...]] = ("logits", "losses")
    SETTINGS: ClassVar[tuple[str, ...]] = ("dtype", "norm", "lo", "hi", "targeted")
    RESULTS: ClassVar[tuple[str, ...]] = ("adv", "score", "standing", "queries")  # what a part of the batch brings home

    x: Tensor
    y: Tensor
    samples: Tensor
    eps: Tensor
    score: Tensor  # [N], which is to rise
    standing: Tensor  # [N], whether the model is not fooled yet
    queries: Tensor
    dtype: torch.dtype
    norm: str
    lo: float
    hi: float
    targeted: bool
    draws: Draws
    losses: Losses | None = None
    asked: Tensor | None = None  # [N], whose trials are worth a forward pass; None: all
    selective: bool = False  # whether to ask for those alone, in batches of any size

    @classmethod
    def over(cls: type[W], batch: Batch, **state: Any) -> W:
        """A walk that starts from the clean images."""
        x = batch.x.clone()  # dense, and what is made of it alike
        # A tensor and not a number, which a recording would make one of: the kind of inputs is to stay the same.
        eps = torch.as_tensor(batch.eps, dtype=torch.float64, device=x.device).expand(len(x)).clone()
        walk = cls(
            adv=x.clone(), x=x, y=batch.y, samples=batch.draws.samples, eps=eps, score=x.new_full((len(x),), -math.inf),
            standing=torch.ones_like(batch.y, dtype=torch.bool), queries=batch.queries, dtype=batch.dtype, norm=batch.norm,
            lo=batch.lo, hi=batch.hi, targeted=batch.targeted, draws=batch.draws, **state,
        )  # fmt: skip
        walk.passes = batch.passes
        return walk

    def step(self) -> None:
        if self.asked is None or self.logits is None or not self.selective:
            return super().step()
        rows = self.asked.nonzero()[:, 0]
        if len(rows):  # the others' last answers were no better than their best, and still are not
            with torch.no_grad():
                self.logits.index_copy_(0, rows, self.passes.logits(self.inputs()[rows]))

    def drawing(self) -> Draws:
        """What the samples that are left draw."""
        return Draws(self.draws.seed, self.samples, self.draws.stream)

    def judged(self) -> Tensor:
        """Takes note of the last answer; returns for whom the present image is the best so far, [N]."""
        self.queries += self.standing if self.asked is None or not self.selective else self.asked
        score, fooled = self.scored(self.logits, self.y)
        better = (fooled | (score > self.score)) & self.standing
        self.score.copy_(torch.where(better, score, self.score))
        self.standing.logical_and_(~fooled)
        return better

    def scored(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What is to rise, and whether the model is fooled. A tie of two classes fools nobody, whatever argmax says."""
        out = self.losses if self.losses is not None and self.losses[1].shape == logits.shape else None
        if self.targeted:  # log((1 - p)/p), which falls where the cross-entropy does
            self.losses = ops.log_odds(logits, y, out=out)
            return -self.losses[0], logits.argmax(1) == y
        self.losses = ops.margin(logits, y, out=out)
        return self.losses[0], self.losses[0] > 0

    def confirm(self, stood: Tensor, passes: Passes) -> int:
        """Asks the model itself about those who fooled the loop's passes since ``stood``; returns the forwards it took.

        Whom it says not to be fooled goes on with the next chunk, without the queries that were left of this one.
        """
        fell = (stood & ~self.standing).nonzero()[:, 0]
        if not len(fell):
            return 0
        with torch.no_grad():
            score, fooled = self.scored(passes.logits(self.inputs(self.image())[fell]), self.y[fell])
        self.queries[fell] += 1
        self.standing[fell] = ~fooled
        self.score[fell] = score.to(self.score.dtype)
        return 1

    def update(self, part: Walk, rows: Tensor | None) -> None:
        """Takes over what has become of these samples (all: None)."""
        for name in self.RESULTS if part is not self else ():
            getattr(self, name)[slice(None) if rows is None else rows] = getattr(part, name)

    def image(self) -> Tensor:
        """The best so far."""
        return self.adv

    def inputs(self, images: Tensor | None = None) -> Tensor:
        return rounded(self.adv if images is None else images, self.x, self.dtype, self.eps, self.norm)


def walk(engine: Engine, batch: Batch, whole: W, chunks: Iterable[range], trials: Callable[[W, range], Iterator[None]]) -> None:
    """Has those that stand try what ``trials`` yields: an image in ``adv``, which is judged when it goes on."""
    part, rows = whole, None
    for chunk in chunks:
        standing = int(part.standing.sum())
        if not standing:
            break
        if (size := bucket(standing, len(whole.adv))) < len(part.adv):
            # Those that stand, and as many others, which stay as they are, as fill a batch of a size that comes again.
            whole.update(part, rows)
            kept = (~part.standing).byte().argsort(stable=True)[:size]
            part, rows = part.rows(kept), kept if rows is None else rows[kept]
        part.passes = batch.passes
        # On a GPU, to wait for the number of those who are asked would cost more than to ask the others too.
        part.selective, part.asked = engine.engine == "eager" and part.adv.device.type == "cpu", None
        run = engine.run(part, batch.model, part=chunk.stop <= CHUNK)  # while many leave, sizes do not last
        part, stood = run.loop, None if run.exact else run.loop.standing.clone()
        for _ in trials(part, chunk):
            run.step()
            batch.forwards += 1
        if stood is not None:
            batch.forwards += part.confirm(stood, Passes(batch.model))
    whole.update(part, rows)


def growing(total: int) -> Iterator[range]:
    """Chunks of trials, short at first, when many samples are fooled."""
    start = 0
    while start < total:
        stop = min(start + CHUNK, 2 * start + 1, total)
        yield range(start, stop)
        start = stop
