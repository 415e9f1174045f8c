"""Losses on planes, drawn as maps by one scale of colours."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = 20  # of colour
RANGE = 1e5  # of the scale: what is smaller than the largest loss by more than that is drawn in the darkest


def draw_maps(figure: Figure, axes: Iterable[Axes], places: Tensor, losses: Iterable[Tensor], label: str) -> None:
    """A map into each of the axes, and a bar of their common logarithmic scale.

    Args:
        places: [A], along either direction. losses: [A, A] each, >= 0: first along the horizontal direction.
        label: of the scale.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator

    axes, losses = list(axes), list(losses)
    smallest, largest = (float(v) for v in torch.stack(losses).aminmax())
    largest = max(largest, torch.finfo(torch.float32).tiny * RANGE)
    levels = torch.logspace(math.log10(max(smallest, largest / RANGE)), math.log10(1.01 * largest), LEVELS).tolist()
    scale = LogNorm(levels[0], levels[-1])
    for axis, plane in zip(axes, losses, strict=True):
        drawn = places, places, plane.T.clamp(min=levels[0])
        shown = axis.contourf(*drawn, levels=levels, norm=scale, cmap="viridis")
        axis.contour(*drawn, levels=levels, norm=scale, colors="white", linewidths=0.4, alpha=0.5)
        axis.plot(0, 0, "+", color="white")
        axis.set_aspect("equal")
    figure.colorbar(shown, ax=axes, label=label, ticks=LogLocator(subs=(1, 2, 5)), format="{x:g}")
