"""Input gradients of convolutions with few input channels, by a convolution of many."""

from __future__ import annotations

import pytest
import torch
from models import one_thread  # noqa: F401
from torch import nn

import fastadv
from fastadv.engine.thin import ThinConv2d, blocked, image_gradient
from fastadv.engine.twin import Twin


@pytest.mark.parametrize("size", [(14, 14), (9, 12)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 1)])
@pytest.mark.parametrize("stride", [(2, 2), (1, 3), (3, 2), (1, 1)])
@pytest.mark.parametrize("kernel", [(4, 4), (3, 5), (2, 2), (7, 3)])
@pytest.mark.parametrize("channels", [1, 5])
def test_it_is_the_gradient(channels, kernel, stride, padding, size):
    """Windows that overlap, touch and leave gaps; rows at the end that no window reaches."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, channels, *size, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, channels, *kernel, generator=g, dtype=torch.float64)
    out = torch.nn.functional.conv2d(x, weight, None, stride, padding)
    gradient = torch.randn(out.shape, generator=g, dtype=torch.float64)
    (expected,) = torch.autograd.grad(out, x, gradient)
    sorted_taps = blocked(weight, stride)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = image_gradient(gradient.contiguous(memory_format=layout), sorted_taps, channels, stride, padding, size)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert image_gradient(gradient[:0], sorted_taps, channels, stride, padding, size).shape == (0, channels, *size)


def net(**changes) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 2, 2)
    second = nn.Conv2d(8, 8, **{"kernel_size": 4, "stride": 2, "padding": 1} | changes)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transform", [False, True], ids=["autograd", "torch.func"])
def test_a_twin_takes_its_gradients_so(dtype, transform):
    model, x = net().to(dtype), torch.rand(4, 3, 12, 12, dtype=dtype)
    model(x)
    twin = Twin(model)
    assert [type(m) for m in twin.module.modules() if isinstance(m, nn.Conv2d)] == [ThinConv2d] * 2
    for _ in range(2):
        gradients = []
        for network in (model, twin.module):
            if transform:
                gradients.append(torch.func.grad(lambda x: network(x).square().sum())(x))  # noqa: B023
            else:
                inputs = x.clone().requires_grad_()
                gradients.append(torch.autograd.grad(network(inputs).square().sum(), inputs)[0])
        torch.testing.assert_close(*gradients)
        with torch.no_grad():
            model[0].weight.mul_(-2)
        twin.refresh()


@pytest.mark.parametrize(
    "changes",
    [{"stride": 1}, {"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}, {"kernel_size": 1}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_convolutions_stay_as_they_are(changes):
    model, x = net(**changes), torch.rand(2, 3, 12, 12)
    model(x)
    kinds = [type(m) for m in Twin(model).module.modules() if isinstance(m, nn.Conv2d)]
    assert kinds == [ThinConv2d, nn.Conv2d]


def test_an_attack_on_the_twin_saves_signs_as_well():
    model, (x, y) = net(), (torch.rand(4, 3, 12, 12), torch.arange(4))
    model(x)
    expected = fastadv.pgd(model, x, y, eps=0.03, init="zero")
    for more in ({}, {"memory": "signs"}, {"engine": "compile"}, {"precision": "bf16"}):
        attack = fastadv.PGD(model, eps=0.03, init="zero", twin=True, **more)
        for _ in range(2 if more.get("engine") else 1):
            adv = attack(x, y)
        assert attack.stats.twin == "used"
        assert ((adv - expected).abs() > 1e-5).double().mean() < (0.2 if "precision" in more else 0.01)
