"""What gets attacked and trained: a network for digits, the field's two for CIFAR, and almost no network at all."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice, plus the input; the shortcut of a block that changes shape starts after the first BN-ReLU."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        changes_shape = stride != 1 or channels != width
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if changes_shape else None

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(a)
        return self.conv2(F.relu(self.bn2(self.conv1(a)))) + skip


def preact_resnet18(classes: int = 10) -> nn.Module:
    """PreActResNet-18 for 3x32x32, as adversarial training uses it (He et al., 2016; Rice et al., 2020)."""
    blocks: list[nn.Module] = []
    channels = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [PreActBlock(channels, width, stride), PreActBlock(width, width, 1)]
        channels = width
    stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    head = [nn.BatchNorm2d(channels), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(stem, *blocks, *head)


def wide_resnet34(widen: int = 10, classes: int = 10) -> nn.Module:
    """WRN-34-10 for 3x32x32, 46 million weights: what papers on adversarial training report (Zagoruyko and Komodakis, 2016)."""
    blocks: list[nn.Module] = []
    channels = 16
    for width, stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
        blocks += [PreActBlock(channels, width, stride), *(PreActBlock(width, width, 1) for _ in range(4))]
        channels = width
    stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    head = [nn.BatchNorm2d(channels), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(stem, *blocks, *head)
