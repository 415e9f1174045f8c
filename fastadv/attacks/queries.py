"""How attacks without gradients ask the model: forward passes as a loop, so that every engine runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine import Engine, Loop
from .base import Batch

TOGETHER = 1024  # images in a forward pass of those that are many for each sample: what bounds the memory


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


def ask(engine: Engine, batch: Batch, images: Tensor, who: Tensor, ragged: bool = False) -> Tensor:
    """Logits [M, C] of images [M, ...]; number i is about sample ``who[i]`` of the batch, and counted as its query.

    ``ragged``: their number is not one that comes again, so that no engine need prepare for it.
    """
    batch.forwards += 1
    batch.queries.index_add_(0, who, torch.ones_like(who))
    if images.dtype != batch.dtype:
        images = batch.rows(who).inputs(images)
    query = Query(adv=images)
    query.passes = batch.passes
    run = engine.run(query, batch.model, part=ragged)
    run.step()
    return run.loop.logits.clone()  # a recorded step answers into memory that the next one overwrites
