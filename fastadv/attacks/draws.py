"""Random numbers that belong to a sample and not to the batch that it happens to be in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference.step import philox

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15


class Draws:
    """What samples draw, by counters (Philox): a function of the seed, the stream, the sample's number and the step, and of
    nothing else. So results depend neither on batch sizes nor on the order or the number of devices.

    Args:
        seed: in [0, 2^63).
        samples: numbers of the samples, int64 [N], on the device where the draws are needed.
        stream: draws of different streams are independent: one for each purpose (attack, target, restart).
    """

    def __init__(self, seed: int, samples: Tensor, stream: int = 0) -> None:
        self.seed, self.samples, self.stream = seed, samples, stream

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, chosen: Tensor) -> Draws:
        """Those of the chosen samples, which go on drawing what they would have drawn."""
        return Draws(self.seed, self.samples[chosen], self.stream)

    def of_stream(self, stream: int) -> Draws:
        """The same samples' draws for another purpose."""
        return Draws(self.seed, self.samples, stream)

    def uniform(self, step: int | Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, *shape], uniform in [0, 1) with 24 bits. ``step`` may be counted on the device, in a tensor []."""
        words = self._words(step, math.prod(shape))
        return ((words >> 8).to(dtype) * 2.0**-24).view(len(self), *shape)

    def normal(self, step: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, *shape], standard normal (Box and Muller)."""
        half = (math.prod(shape) + 1) // 2
        u, v = self.uniform(step, 2, half, dtype=torch.float64).unbind(1)
        radius, angle = (-2 * (u + 2.0**-25).log()).sqrt(), 2 * math.pi * v
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return both[:, : math.prod(shape)].to(dtype).view(len(self), *shape)

    def laplace(self, step: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, *shape], two-sided exponential: the density of several is constant on l1 spheres."""
        u = self.uniform(step, *shape, dtype=dtype).mul_(2).sub_(1)
        return u.sign() * torch.log1p(-u.abs().clamp_(max=1 - 2.0**-24))  # else infinite where -1 was drawn

    def integers(self, step: int, high: int | Tensor, *shape: int) -> Tensor:
        """[N, *shape], int64, uniform in [0, high); ``high`` may be a tensor that broadcasts."""
        u = self.uniform(step, *shape, dtype=torch.float64)
        return (u * high).floor().long()

    def signs(self, step: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, *shape] of -1 and 1."""
        size = math.prod(shape)
        bits = self._words(step, (size + 31) // 32)[:, :, None] >> torch.arange(32, device=self.samples.device) & 1
        return bits.to(dtype).flatten(1)[:, :size].mul_(2).sub_(1).view(len(self), *shape)

    def _words(self, step: int | Tensor, size: int) -> Tensor:
        """[N, size], 32 random bits each, in int64."""
        counter = torch.arange((size + 3) // 4, device=self.samples.device).expand(len(self), -1)
        sample = self.samples[:, None].expand_as(counter)
        key = self.seed ^ (self.stream * _GOLDEN & 2**64 - 1)
        words = torch.stack(philox(key, counter, torch.zeros_like(counter) + step, sample & _WORD, sample >> 32), -1)
        return words.flatten(1)[:, :size]
