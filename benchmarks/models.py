"""What gets attacked and trained: a network for digits, the field's for CIFAR and ImageNet, and almost no network at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.models import PreActBlock, preact_resnet18, wide_resnet

__all__ = ["PreActBlock", "ViT", "demo_cnn", "linear", "preact_resnet18", "resnet50", "vit_small", "wide_resnet"]


def demo_cnn() -> nn.Module:
    """The network of ``fastadv demo``: two strided convolutions and two linear layers, for 1x28x28."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


def linear() -> nn.Module:
    """One layer on ImageNet-sized images: an attack on it is nearly all attack and no model."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 10))


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1, each before a batch norm, plus the input."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_norm(channels, width, 1), nn.ReLU(),
            *_conv_norm(width, width, 3, stride), nn.ReLU(),
            *_conv_norm(width, 4 * width, 1),
        )  # fmt: skip
        changes_shape = stride != 1 or channels != 4 * width
        self.shortcut = nn.Sequential(*_conv_norm(channels, 4 * width, 1, stride)) if changes_shape else None

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + (x if self.shortcut is None else self.shortcut(x)))


def _conv_norm(channels: int, width: int, size: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(width)


def resnet50(classes: int = 1000) -> nn.Module:
    """ResNet-50 for 3x224x224 (He et al., 2016), the stride of a block in its 3x3 convolution."""
    blocks: list[nn.Module] = []
    channels = 64
    for width, stride, depth in ((64, 1, 3), (128, 2, 4), (256, 2, 6), (512, 2, 3)):
        blocks += [Bottleneck(channels, width, stride), *(Bottleneck(4 * width, width, 1) for _ in range(depth - 1))]
        channels = 4 * width
    stem = [*_conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    return nn.Sequential(*stem, *blocks, nn.AvgPool2d(7), nn.Flatten(), nn.Linear(channels, classes))


class TransformerBlock(nn.Module):
    """Self-attention and two linear layers, each after a layer norm and each plus its input."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:  # [N, tokens, dim]
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer whose head sees the mean of all tokens."""

    def __init__(self, image: int, patch: int, dim: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((image // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens).mean(1)))


def vit_small(image: int = 32, patch: int = 4, classes: int = 10) -> nn.Module:
    """The sizes of ViT-S (Dosovitskiy et al., 2021; Touvron et al., 2021), by default for 3x32x32 in 64 patches."""
    return ViT(image, patch, dim=384, depth=12, heads=6, classes=classes)
