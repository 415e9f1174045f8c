"""Which samples a batch holds, in which order, and on which rank: all by the seed, the epoch and the batch's number."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from .. import checks
from ..attacks.draws import Draws
from .augment import Augment, Mix
from .data import Images, fractions, permutation

T = TypeVar("T")
U = TypeVar("U")

# Bytes of floating images that are augmented at once: what a cache holds, or so much that launching it is not most of the time.
CPU_CHUNK, GPU_CHUNK = 2**22, 2**26
ORDER, EXTRA, DECODE, MIX, AUGMENT = range(5)  # purposes of draws; augmentations have a stream each, from AUGMENT on


@dataclass(frozen=True, eq=False)
class Batch:
    """This rank's part of a batch.

    Attributes:
        x: float32 [n, C, H, W] in [0, 1]; of several views, one view of all samples after the other.
        y: int64 [n], or soft [n, classes] of mixed images.
        samples: int64 [n], numbers of the samples: extra ones come after the originals, and those of view v are v times the
            number of all samples higher. So whatever is drawn by sample differs between views.
        size: of the whole batch, all ranks and views.
    """

    x: Tensor
    y: Tensor
    samples: Tensor
    size: int


class Batches:
    """The batches of every epoch.

    Nothing is remembered from one batch to the next, so any epoch can be entered at any batch, and the same samples are
    drawn, augmented and mixed alike on one rank or many. Images are kept on the device as bytes if they take at most a quarter
    of its free memory; else threads gather (and decode) them ahead.

    Args:
        images: the training set, N samples.
        batch_size: of the whole batch; rank r of ``world`` has the r-th part, by ``torch.tensor_split``. A last batch may be
            smaller; one of fewer samples than ranks is left out.
        augment: see :func:`~fastadv.training.augment.compose`.
        mix: see :func:`~fastadv.training.augment.mixing`. Batches are in random order: an image's partner is the one before it.
        device: where batches are wanted.
        extra, unsup_fraction: further images and their part of each batch, rounded down; they are drawn with replacement, the
            originals without. Then all batches are whole (Carmon et al., 2019).
        views: augmentations of each image in a batch.
        steps: batches an epoch, ceil(N / batch_size) by default. More than a pass takes begin another pass.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        augment: Augment | None = None,
        mix: Mix | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        extra: Images | None = None,
        unsup_fraction: float = 0.0,
        rank: int = 0,
        world: int = 1,
        views: int = 1,
        steps: int | None = None,
    ) -> None:
        self.images, self.extra, self.augment, self.mix = images, extra, augment, mix
        self.batch_size, self.views = checks.integer("batch_size", batch_size), checks.integer("views", views)
        self.rank, self.world = checks.integer("rank", rank, 0), checks.integer("world", world)
        self.seed, self.device = checks.integer("seed", seed, 0), torch.device(device)
        if rank >= world:
            raise ValueError(f"rank must be below world, {world}; got {rank}")
        drawn = int(batch_size * checks.number("unsup_fraction", unsup_fraction))
        if drawn > batch_size or (drawn > 0) != (extra is not None):
            raise ValueError(
                f"unsup_fraction must be at most 1, a sample or more of each batch with extra data, and 0 without; "
                f"got {unsup_fraction!r} of {batch_size} samples, {'no ' if extra is None else ''}extra data"
            )
        if extra is not None and extra.shape != images.shape:
            raise ValueError(f"extra images must be {images.shape} like the others; got {extra.shape}")
        self.sources = [images] if extra is None else [images, extra]
        self.y = torch.cat([source.y.cpu() for source in self.sources])
        if mix is not None and bool((self.y < 0).any()):
            raise ValueError("mix needs a label for every image; some are -1")
        self.own = batch_size - drawn  # originals in a batch
        whole, rest = divmod(len(images), self.own) if self.own else (1, 0)
        self.one_pass = whole + (rest >= (world if extra is None else 1))  # batches
        if batch_size < world or not self.one_pass:
            raise ValueError(f"batch_size and the {len(images)} images must suffice for {world} ranks; got {batch_size}")
        default = self.one_pass if extra is None else math.ceil(len(images) / batch_size)
        self.steps = default if steps is None else checks.integer("steps", steps)
        self.x = self._resident()

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, counted from 0, from batch ``start`` on."""
        wholes = self.order(checks.integer("epoch", epoch, 0))
        if checks.integer("start", start, 0) > len(wholes):
            raise ValueError(f"start must be at most {len(wholes)}, the batches of an epoch; got {start}")
        return self._batches(epoch, start, wholes[start:]) if wholes[start:] else iter(())

    def order(self, epoch: int) -> list[Tensor]:
        """Numbers of the samples of each batch of an epoch, of all ranks: int64 [batch_size] each, on the CPU."""
        own = (torch.empty(0, dtype=torch.int64),) * self.steps
        if self.own:
            draws = self._draws(epoch, ORDER, torch.arange(len(self.images)))
            passes = (permutation(draws, i) for i in range(math.ceil(self.steps / self.one_pass)))
            own = tuple(part for order in passes for part in torch.split(order, self.own)[: self.one_pass])[: self.steps]
        if self.extra is None:
            return list(own)
        draws = self._draws(epoch, EXTRA, torch.arange(self.steps * self.batch_size))
        drawn = len(self.images) + (fractions(draws) * len(self.extra)).long().view(self.steps, -1)
        places = fractions(draws, 1).view(self.steps, -1).argsort(dim=1, stable=True)
        return [torch.cat([a, b[len(a) :]])[place] for a, b, place in zip(own, drawn, places, strict=True)]

    def _batches(self, epoch: int, start: int, wholes: list[Tensor]) -> Iterator[Batch]:
        parts = [self._keys(k, whole) for k, whole in enumerate(wholes, start)]
        chunk = CPU_CHUNK if self.device.type == "cpu" else GPU_CHUNK
        together = max(1, chunk // (4 * max(map(len, parts)) * math.prod(self.images.shape)))  # batches
        lengths = [[len(part) for part in parts[i : i + together]] for i in range(0, len(parts), together)]
        totals, keys = [sum(length) for length in lengths], torch.cat(parts)
        # Numbers and labels cross to the device once an epoch, and nothing in the loop waits for it.
        on_device = torch.split(self._moved(keys), totals)
        labels = torch.split(self._moved(self.y[keys % len(self.y)]), totals)
        images: Iterator[Tensor]
        if (resident := self.x) is not None:
            images = (resident[key % len(self.y)] for key in on_device)
        else:
            images = ahead(partial(self._read, epoch), torch.split(keys, totals))
        sizes = iter([self.views * len(whole) for whole in wholes])
        for u8, y, key, length in zip(images, labels, on_device, lengths, strict=True):
            x = u8.to(self.device, torch.float32, non_blocking=True, memory_format=torch.contiguous_format).div_(255)
            if self.augment is not None:
                x = self.augment(x, self._draws(epoch, AUGMENT, key))
            for batch in zip(*(torch.split(t, length) for t in (x, y, key)), strict=True):
                yield self._batch(epoch, next(sizes), *batch)

    def _keys(self, k: int, whole: Tensor) -> Tensor:
        """What this rank's part of batch k draws by, all views of it: the samples' numbers plus a multiple of the number of all
        samples, another in each batch and view. For mixing, the image before the first one comes first."""
        part = whole.tensor_split(self.world)[self.rank]
        if self.mix is not None:
            part = torch.cat([whole.roll(1).tensor_split(self.world)[self.rank][:1], part])
        views = torch.arange(k * self.views, (k + 1) * self.views)
        return (part + views[:, None] * len(self.y)).flatten()

    def _batch(self, epoch: int, size: int, x: Tensor, y: Tensor, keys: Tensor) -> Batch:
        if self.mix is not None:
            (x, partner), (y, partner_y), (keys, _) = (self._with_partners(t) for t in (x, y, keys))
            x, y = self.mix(x, partner, y, partner_y, self._draws(epoch, MIX, keys))
        return Batch(x, y, keys % (self.views * len(self.y)), size)

    def _with_partners(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Of each view all but the first, and what stands before each of these."""
        t = t.reshape(self.views, -1, *t.shape[1:])
        return t[:, 1:].flatten(0, 1), t[:, :-1].flatten(0, 1)

    def _draws(self, epoch: int, purpose: int, keys: Tensor) -> Draws:
        return Draws(self.seed, keys, 1 << 60 | epoch << 8 | purpose)  # streams that no attack counts up to

    def _moved(self, t: Tensor) -> Tensor:
        return (t.pin_memory() if self.device.type == "cuda" else t).to(self.device, non_blocking=True)

    def _resident(self) -> Tensor | None:
        """All images on the device, or None if they are to be read as they are needed."""
        tensors = [source.x for source in self.sources if isinstance(source.x, Tensor)]
        if len(tensors) < len(self.sources) or (self.device.type == "cpu" and self.extra is not None):
            return None
        if self.device.type == "cuda" and sum(t.numel() for t in tensors) > torch.cuda.mem_get_info(self.device)[0] // 4:
            return None
        moved = [t.to(self.device) for t in tensors]
        return moved[0] if len(moved) == 1 else torch.cat(moved)

    def _read(self, epoch: int, keys: Tensor) -> Tensor:
        """uint8 [n, C, H, W], from wherever they are."""
        samples, draws = keys % len(self.y), self._draws(epoch, DECODE, keys)
        x, first = torch.empty(len(keys), *self.images.shape, dtype=torch.uint8), 0
        for source in self.sources:
            here = (samples >= first) & (samples < first + len(source))
            x[here] = source.take(samples[here] - first, draws.rows(here)).cpu()
            first += len(source)
        return x.pin_memory() if self.device.type == "cuda" else x


def ahead(function: Callable[[T], U], items: Iterable[T], depth: int = 2) -> Iterator[U]:
    """``function(item)`` of each item, worked out by ``depth`` threads while earlier ones are in use."""
    with ThreadPoolExecutor(depth) as pool:
        waiting: deque[Future[U]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
