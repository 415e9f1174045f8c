"""An attack in progress, as the engine sees it: tensors that a step reads and writes, and the step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from numbers import Real
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .passes import Passes

L = TypeVar("L", bound="Loop")


class Loop:
    """What every iterative attack derives from: its state, by name, and :meth:`step`.

    A step asks ``passes`` for logits and gradients, writes its state in place, allocates nothing that outlives it and never
    waits for the device. Then the engine may run it eagerly, on a compiled model, or record it once and replay it.

    Attributes:
        STATE: names of what differs from call to call: tensors, scalars (floats or tensors), or None.
        SCRATCH: names of what a step leaves to the next one, made where it is None.
        SETTINGS: names of what is the same in every call: hashable, baked into a recorded step.
        adv: the images that move.
        passes: how the model is run.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    SCRATCH: ClassVar[tuple[str, ...]] = ()
    SETTINGS: ClassVar[tuple[str, ...]] = ()

    adv: Tensor
    passes: Passes

    def step(self) -> None:
        raise NotImplementedError

    def mapped(self: L, function: Callable[[Tensor], Tensor]) -> L:
        """A copy with ``function`` of each tensor of the state, and no scratch."""
        other = copy.copy(self)
        vars(other).update(dict.fromkeys(self.SCRATCH))
        for name in self.STATE:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(other, name, function(value))
        return other

    def signature(self) -> tuple[Hashable, ...]:
        """What a recording or compilation of the step depends on: all but the values of tensors and scalars."""
        return (*map(_kind, (getattr(self, name) for name in self.STATE)), *(getattr(self, name) for name in self.SETTINGS))

    def fixed(self: L, device: torch.device) -> L:
        """A copy whose state lives in tensors of its own, scalars too, for :meth:`load` to fill and a recorded step to read."""
        other = self.mapped(lambda t: t.detach().clone().to(device))  # a size may be a 0-dim tensor elsewhere
        for name in self.STATE:
            value = getattr(other, name)
            if isinstance(value, Real):
                setattr(other, name, torch.full((), float(value), dtype=torch.float64, device=device))
        return other

    def load(self, other: Loop) -> None:
        """Takes over the state of a loop with the same signature, in place."""
        with torch.no_grad():
            for name in self.STATE:
                mine, theirs = getattr(self, name), getattr(other, name)
                if isinstance(theirs, Tensor):
                    mine.copy_(theirs)
                elif theirs is not None:
                    mine.fill_(float(theirs))

    def channels_last(self: L) -> L:
        """A copy with images in channels_last memory."""
        return self.mapped(lambda t: t.detach().clone(memory_format=torch.channels_last) if t.dim() == 4 else t)

    def rows(self: L, chosen: Tensor) -> L:
        """A copy with the chosen samples."""
        return self.mapped(lambda t: t.detach()[chosen] if t.dim() else t)


def _kind(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.stride()
    return type(value).__name__ if value is not None else None
