"""What all analyses have in common: what they take and what they give back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

from .. import checks
from ..engine import Model, unwrap
from ..evaluation.probes import Probe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#d97706", "#3b82f6", "#0d9488", "#a855f7", "#e5484d", "#8b95a1")  # legible on white and on near-black

Models: TypeAlias = Model | Mapping[str, Model]  # one, or several by name, to be compared in one figure


class Finding(Protocol):
    """What an analysis found: a dataclass of plain numbers and tensors on the CPU."""

    def __str__(self) -> str:
        """What came out, in a few sentences with their numbers."""

    def figure(self) -> Figure:
        """Draws it. Needs matplotlib (``pip install 'fastadv[plot]'``)."""


def named(models: Models) -> dict[str, Model]:
    """The models by name, without wrappers such as DistributedDataParallel.

    Raises:
        ValueError: there is none, or one is not callable.
    """
    given = dict(models) if isinstance(models, Mapping) else {"model": models}
    if not given:
        raise ValueError("models must be a model, or some by name; got an empty mapping")
    for name, model in given.items():
        if not callable(model):
            raise ValueError(f"models[{name!r}] must be callable on a batch; got {type(model).__name__}")
    return {name: unwrap(model) for name, model in given.items()}


def probes(
    models: Models, norm: str = "linf", bounds: tuple[float, float] | None = (0.0, 1.0), seed: int = 0, batch_size: int = 256
) -> dict[str, Probe]:
    """What asks each of the models, in this norm and box.

    Raises:
        ValueError: an argument is not as :class:`fastadv.PGD` has it.
    """
    checks.one_of("norm", norm, ("linf", "l2", "l1"))
    checks.bounds(bounds)
    checks.integer("seed", seed, 0)
    checks.integer("batch_size", batch_size)
    return {name: Probe(model, norm, bounds, seed, batch_size) for name, model in named(models).items()}


def input_gradient(name: str, probe: Probe, x: Tensor, y: Tensor) -> Tensor:
    """[N, ...], of ``log((1 - p_y) / p_y)``: that of cross-entropy but for a positive factor of each image, and unlike it
    never lost to rounding where a network is sure of itself.

    Raises:
        ValueError: the model of this name has none.
    """
    gradient = probe.gradient(x, y)
    if gradient is None:
        raise ValueError(f"models[{name!r}] has no gradient at its input: there is no way from x to the logits")
    return gradient


def centred(name: str, width: float, points: int) -> Tensor:
    """[points], from -width to width with 0 in the middle, float64; ``name`` is that of ``width``.

    Raises:
        ValueError: width is no positive number, or points no odd one of 3 or more.
    """
    checks.number(name, width, positive=True)
    if checks.integer("points", points, 3) % 2 == 0:
        raise ValueError(f"points must be odd, so that the middle is among them; got {points}")
    half = points // 2
    return (torch.arange(points, dtype=torch.float64) - half) * (width / half)


def told_apart(short: Sequence[str], whole: Sequence[str]) -> list[str]:
    """The short names, and the whole ones of those whose short ones are the same."""
    return [name if short.count(name) == 1 else long for name, long in zip(short, whole, strict=True)]


def coloured(names: Iterable[str]) -> dict[str, str]:
    """A colour for each, in order."""
    return dict(zip(names, itertools.cycle(COLOURS), strict=False))
