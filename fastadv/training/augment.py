"""Augmentation of a batch where it is: a few tensor operations for all images, every image drawing its own.

    augment = compose(["crop", "flip", {"cutout": 14}])  # augment(x, draws) -> x
    mix = mixing({"mixup": 1.4}, classes=10)  # mix(x, partner, y, partner_y, draws) -> x, soft y

x is floating [N, C, H, W]. What an image becomes depends on its draws alone, not on the batch that it is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..attacks.draws import Draws
from .names import known, made

Augment = Callable[[Tensor, Draws], Tensor]
Mix = Callable[[Tensor, Tensor, Tensor, Tensor, Draws], tuple[Tensor, Tensor]]


def compose(items: Sequence[str | Mapping[str, Any] | Augment]) -> Augment:
    """One augmentation after the other, each with a stream of draws of its own.

    Args:
        items: names in :data:`AUGMENTATIONS`, ``{name: argument}``, ``{name: {argument: value}}``, or functions
            (x, draws) -> x.
    """
    if isinstance(items, (str, Mapping)):
        raise ValueError(f"augmentations must be a list; got {items!r}")
    steps = [item if callable(item) else made("augmentation", item, AUGMENTATIONS) for item in items]

    def augment(x: Tensor, draws: Draws) -> Tensor:
        for i, step in enumerate(steps):
            x = step(x, draws.of_stream(draws.stream + i))
        return x

    return augment


def crop(padding: int = 4, mode: str = "zeros") -> Augment:
    """A window of the image's own size, anywhere in the image padded by ``padding`` pixels, "zeros" or "reflect"ed ones."""
    padding = checks.integer("padding", padding)
    filling = known("mode", mode, {"zeros": "constant", "reflect": "reflect"})

    def augment(x: Tensor, draws: Draws) -> Tensor:
        padded = F.pad(x, (padding,) * 4, filling)
        windows = padded.unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)  # [N, C, places, places, H, W], a view
        down, right = draws.integers(0, 2 * padding + 1, 2).unbind(1)
        return windows[torch.arange(len(x), device=x.device), :, down, right]

    return augment


def shift(pixels: int = 1) -> Augment:
    """Moved by up to so many pixels down or up and right or left, zeros moving in: a crop."""
    return crop(checks.integer("pixels", pixels))


def flip() -> Augment:
    """Left and right exchanged in every other image."""

    def augment(x: Tensor, draws: Draws) -> Tensor:
        return torch.where(draws.uniform(0, 1, 1, 1) < 0.5, x.flip(3), x)

    return augment


def cutout(size: int = 16, inside: bool = False) -> Augment:
    """A square of zeros of ``size`` pixels around any pixel, so part of it may fall outside (DeVries and Taylor, 2017).

    ``inside``: anywhere in the image as a whole, as Rice et al., 2020, have it.
    """
    size = checks.integer("size", size)

    def augment(x: Tensor, draws: Draws) -> Tensor:
        if inside and size > min(x.shape[2:]):
            raise ValueError(f"size of a cutout inside must be at most that of the image, {min(x.shape[2:])}; got {size}")
        corner = _place(draws, 0, *(side - size + 1 if inside else side for side in x.shape[2:]))
        corner = corner if inside else corner - size // 2
        return x.masked_fill(_box(x, corner, corner + size), 0)

    return augment


def mixup(alpha: float = 1.0, *, classes: int) -> Mix:
    """``l x + (1 - l) partner``, and labels likewise; l ~ Beta(alpha, alpha), one for each image (Zhang et al., 2018)."""
    alpha = checks.number("alpha", alpha, positive=True)

    def mix(x: Tensor, partner: Tensor, y: Tensor, partner_y: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        share = beta(alpha, draws)
        s = share.to(x.dtype).view(-1, 1, 1, 1)
        return s * x + (1 - s) * partner, _soft(y, partner_y, share, classes, x.dtype)

    return mix


def cutmix(alpha: float = 1.0, *, classes: int) -> Mix:
    """A box of the partner around any pixel, of area 1 - l; l ~ Beta(alpha, alpha), one for each image (Yun et al., 2019).

    As the original, half sides are rounded down and what falls outside is cut off; labels go by the area that is left.
    """
    alpha = checks.number("alpha", alpha, positive=True)

    def mix(x: Tensor, partner: Tensor, y: Tensor, partner_y: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        height, width = x.shape[2:]
        side = (1 - beta(alpha, draws)).sqrt()
        half = torch.stack([(side * height).long() // 2, (side * width).long() // 2], 1)
        centre = _place(draws, 1, height, width)
        box = _box(x, centre - half, centre + half)
        share = 1 - box.flatten(1).double().mean(1)
        return torch.where(box, partner, x), _soft(y, partner_y, share, classes, x.dtype)

    return mix


def mixing(item: str | Mapping[str, Any] | Mix, classes: int) -> Mix:
    """ "mixup" or "cutmix", ``{name: alpha}``, or a function (x, partner, y, partner_y, draws) -> (x, soft y [N, classes])."""
    if callable(item):
        return item
    return made("mix", item, {name: partial(mix, classes=classes) for name, mix in MIXES.items()})


def beta(alpha: float, draws: Draws) -> Tensor:
    """Beta(alpha, alpha), float64 [N], from five uniform numbers each and without rejection.

    Ulrich's formula (1984) gives Beta(a, a) for a = alpha + 1. Of Beta(alpha, alpha), seen as the share of two successes more
    that an urn adds, Beta(a, a) is what follows one and one, with probability alpha / (2 alpha + 1), and
    Beta(alpha, alpha + 2) = U^(1 / alpha) Beta(a, a), or its mirror image, what follows none and two.
    """
    radius, angle, low, kind, mirror = draws.uniform(0, 5, dtype=torch.float64).unbind(1)
    middle = (1 + (1 - radius ** (2 / (2 * alpha + 1))).sqrt() * (2 * math.pi * angle).cos()) / 2
    low = low ** (1 / alpha) * middle
    return torch.where(kind < alpha / (2 * alpha + 1), middle, torch.where(mirror < 0.5, low, 1 - low))


def _place(draws: Draws, step: int, height: int, width: int) -> Tensor:
    """A row and a column, below these numbers: int64 [N, 2]."""
    row, column = draws.uniform(step, 2, dtype=torch.float64).unbind(1)
    return torch.stack([row * height, column * width], 1).long()


def _box(x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """bool [N, 1, H, W]: rows and columns from ``start`` to before ``end``, int64 [N, 2], of each image."""
    rows, columns = (
        (at >= start[:, i, None]) & (at < end[:, i, None])
        for i, at in enumerate(torch.arange(side, device=x.device) for side in x.shape[2:])
    )
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _soft(y: Tensor, partner_y: Tensor, share: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """[N, classes]: ``share`` for y, the rest for the partner's label."""
    names = torch.arange(classes, device=y.device)
    return (share[:, None] * (y[:, None] == names) + (1 - share)[:, None] * (partner_y[:, None] == names)).to(dtype)


AUGMENTATIONS: dict[str, Callable[..., Augment]] = {
    "crop": crop,
    "flip": flip,
    "cutout": cutout,
    "shift": shift,
}
MIXES: dict[str, Callable[..., Mix]] = {"mixup": mixup, "cutmix": cutmix}
