"""Random numbers that belong to a sample and not to the batch that it happens to be in, and what draws from them."""

from __future__ import annotations

import hashlib
import math
from typing import TypeAlias

import torch
from torch import Tensor

from .. import ops
from ..reference.step import Scalar, philox

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

    @property
    def device(self) -> torch.device:
        return self.samples.device

    @property
    def key(self) -> int:
        """Of the counters, in [0, 2^64)."""
        return self.seed ^ (self.stream * _GOLDEN & 2**64 - 1)

    def rows(self, chosen: Tensor) -> Draws:
        """Those of the chosen samples, which go on drawing what they would have drawn."""
        return Draws(self.seed, self.samples[chosen], self.stream)

    def of_stream(self, stream: int) -> Draws:
        """The same samples' draws for another purpose."""
        return Draws(self.seed, self.samples, stream)

    def uniform(self, step: int | Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, *shape], uniform in [0, 1) with 24 bits. ``step`` may be counted on the device, in a tensor []."""
        if not isinstance(step, Tensor):  # one pass and the same bits: 1/2 + u/2, without rounding
            half = torch.full((len(self), *shape), 0.5, dtype=dtype, device=self.device)
            return ops.linf_start(half, 0.5, seed=self.key, samples=self.samples, step=step, out=half)
        words = self._words(step, math.prod(shape))
        return ((words >> 8).to(dtype) * 2.0**-24).view(len(self), *shape)

    def normal(self, step: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, *shape], standard normal."""
        zero = torch.zeros((len(self), *shape), dtype=dtype, device=self.device)
        return ops.normal_start(zero, 1.0, self.key, self.samples, step, out=zero)

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
        bits = self._words(step, (size + 31) // 32)[:, :, None] >> torch.arange(32, device=self.device) & 1
        return bits.to(dtype).flatten(1)[:, :size].mul_(2).sub_(1).view(len(self), *shape)

    def _words(self, step: int | Tensor, size: int) -> Tensor:
        """[N, size], 32 random bits each, in int64."""
        counter = torch.arange((size + 3) // 4, device=self.device).expand(len(self), -1)
        sample = self.samples[:, None].expand_as(counter)
        words = torch.stack(
            philox(self.key, counter, torch.zeros_like(counter) + step, sample & _WORD, sample >> 32 & _WORD), -1
        )
        return words.flatten(1)[:, :size]


def numbers_of(x: Tensor) -> Tensor:
    """A number [N] for each image, by its content: what it draws then depends on nothing but itself and the seed."""
    digests = [hashlib.blake2b(image.double().numpy().tobytes(), digest_size=8).digest() for image in x.detach().cpu()]
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests], dtype=torch.int64)


# Where random numbers come from. A generator, or None for torch's global one, gives other numbers in each call; Draws give the
# same ones, but for another stream or step.
Source: TypeAlias = torch.Generator | Draws | None

# Steps of the draws that a call makes beside its starts, whose steps are 0, 1, ..., a restart each.
LENGTHS, TARGETS = 1 << 30, 1 << 31


def check_source(source: Source, x: Tensor) -> None:
    """Refuses a generator on another device than x's, and Draws of other samples."""
    if isinstance(source, Draws) and (len(source) != len(x) or source.device != x.device):
        raise ValueError(
            f"generator must be Draws of x's {len(x)} samples on {x.device}; got those of {len(source)} on {source.device}"
        )
    if source is not None and source.device.type != x.device.type:
        raise ValueError(f"generator must be on {x.device.type} like x; got one on {source.device}")


def uniform_start(x: Tensor, eps: Scalar, lo: float, hi: float, source: Source, step: int = 0) -> Tensor:
    """:func:`fastadv.ops.linf_start` by Draws, or by a seed from a generator, which is on x's device."""
    if isinstance(source, Draws):
        return ops.linf_start(x, eps, lo, hi, source.key, source.samples, step)
    # Drawn on the CPU where it may be: reading it from a GPU would wait for all that is queued there.
    device = "cpu" if source is None else x.device
    seed = torch.empty((), dtype=torch.int64, device=device).random_(generator=source)
    return ops.linf_start(x, eps, lo, hi, int(seed))


def uniform_like(x: Tensor, source: Source, step: int = 0) -> Tensor:
    """Uniform in [0, 1), like x."""
    if isinstance(source, Draws):
        return source.uniform(step, *x.shape[1:], dtype=x.dtype)
    return torch.empty_like(x).uniform_(generator=source)


def normal_like(x: Tensor, source: Source, step: int = 0, std: float = 1.0) -> Tensor:
    """Normal with mean 0, like x."""
    if isinstance(source, Draws):
        zero = torch.zeros_like(x)
        return ops.normal_start(zero, std, source.key, source.samples, step, out=zero)
    return torch.empty_like(x).normal_(std=std, generator=source)


def integers_like(x: Tensor, low: int, high: int, source: Source, step: int = 0) -> Tensor:
    """int64 in [low, high), in the shape of x."""
    if isinstance(source, Draws):
        return source.integers(step, high - low, *x.shape[1:]) + low
    return torch.empty_like(x, dtype=torch.int64).random_(low, high, generator=source)
