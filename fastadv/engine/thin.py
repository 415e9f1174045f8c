"""Input gradients of thin convolutions, those of few input channels, on a CPU.

No training ever takes the input gradient of a network's first layer, and oneDNN takes several times as long for it as for the
layer itself: one channel of an image at a time leaves most of a vector unit idle. So here b x b neighbouring pixels are the
channels: what they are owed is a convolution of the output's gradient, whose channels are then sorted into the image.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]

WIDE = 12  # channels that are worth a convolution


def blocked(weight: Tensor, stride: Pair) -> Tensor:
    """The kernel [b b' I, O, D, D'] of :func:`image_gradient`, by that of the convolution [O, I, K, K'].

    Along each side, output j reads pixel u, of the padded image, by tap k where u = s j + k. In blocks of b = s t pixels,
    u = b q + r and j = t q + d, that is the tap k = r - s d: in all blocks the same.
    """
    outputs, inputs = weight.shape[:2]
    rows, columns = (_taps(k, s, _steps(inputs, stride)) for k, s in zip(weight.shape[2:], stride, strict=True))
    kernel = F.pad(weight, (0, 1, 0, 1))[:, :, rows][..., columns]  # [O, I, b, D, b', D']
    kernel = kernel.permute(2, 4, 1, 0, 3, 5).reshape(-1, outputs, rows.shape[1], columns.shape[1])
    return kernel.contiguous(memory_format=torch.channels_last)


def _steps(inputs: int, stride: Pair) -> int:
    """t, of both sides: few, for the larger a block, the more of its taps are none."""
    return math.ceil(math.sqrt(WIDE / (inputs * stride[0] * stride[1])))


def _taps(k: int, s: int, steps: int) -> Tensor:
    """[b, D]: which tap leads from pixel r of a block to its output d >= -((k - 1) // s); k: none."""
    taps = torch.arange(s * steps)[:, None] - s * torch.arange(-((k - 1) // s), steps)
    return torch.where((taps >= 0) & (taps < k), taps, k)


def image_gradient(gradient: Tensor, kernel: Tensor, inputs: int, stride: Pair, padding: Pair, size: Pair) -> Tensor:
    """Of a convolution over images [N, inputs, *size], by its output's gradient [N, O, H, W] and the ``blocked`` kernel."""
    steps = _steps(inputs, stride)
    blocks = [s * steps for s in stride]
    counts = [-(-(length + p) // b) for length, p, b in zip(size, padding, blocks, strict=True)]  # q
    before = [taps - steps for taps in kernel.shape[2:]]
    after = [
        max(0, (count - 1) * steps + taps - there - room)
        for count, taps, there, room in zip(counts, kernel.shape[2:], gradient.shape[2:], before, strict=True)
    ]
    if before != after:
        gradient, before = F.pad(gradient, (before[1], after[1], before[0], after[0])), [0, 0]
    found = F.conv2d(gradient, kernel, stride=steps, padding=before)[:, :, : counts[0], : counts[1]]
    image = found.permute(0, 2, 3, 1).reshape(len(found), *counts, *blocks, inputs).transpose(2, 3)
    image = image.reshape(len(found), counts[0] * blocks[0], counts[1] * blocks[1], inputs).permute(0, 3, 1, 2)
    return image[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]


class _Convolution(torch.autograd.Function):
    """conv2d, whose input gradient is :func:`image_gradient`. Its weights have none: they are a twin's."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, kernel: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, _, ctx.stride, ctx.padding, kernel = inputs
        ctx.channels, *ctx.size = x.shape[1:]
        ctx.save_for_backward(kernel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (kernel,) = ctx.saved_tensors
        return image_gradient(gradient, kernel, ctx.channels, ctx.stride, ctx.padding, ctx.size), *[None] * 5


class ThinConv2d(nn.Conv2d):
    """What a twin makes of a convolution that :func:`is_thin`. To be refreshed when its weights have changed."""

    def refresh(self) -> None:
        self.kernel = blocked(self.weight, self.stride)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # or torch.jit.trace, for forward passes
            return super().forward(x)
        settings = self.stride, self.padding, self.kernel
        found: Tensor = _Convolution.apply(x, self.weight, self.bias, *settings)  # type: ignore[no-untyped-call]
        return found


def is_thin(module: nn.Module) -> bool:
    """Whether this is a convolution over images whose input gradient is faster here, by measurement on one CPU."""
    if type(module) is not nn.Conv2d or module.weight.device.type != "cpu":
        return False
    if module.groups > 1 or set(module.dilation) != {1} or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return False
    overlaps = [k % s for k, s in zip(module.kernel_size, module.stride, strict=True)]
    most = 1 if min(module.stride) == 1 else 4 if any(overlaps) else 16
    return module.in_channels <= most and min(k - s for k, s in zip(module.kernel_size, module.stride, strict=True)) >= 0
