"""Normalisation inside the model: attacks stay in pixel units."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from models import batch, linear, one_thread  # noqa: F401
from torch import nn

import fastadv

MEAN, STD = (0.484375, 0.456054687500, 0.40625), (0.228515625, 0.2236328125, 0.225585937500)  # exact in fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_subtracts_mean_and_divides_by_std_of_each_channel(dtype):
    normalize, rounding = fastadv.Normalize(MEAN, STD), torch.finfo(dtype).eps
    for shape in [(3, 8, 8), (3, 5), (3,), (3, 2, 2, 2)]:
        x, _ = batch(dtype=dtype, shape=shape)
        out = normalize(x)
        assert out.dtype == dtype
        expected = torch.stack([(x[:, c].double() - MEAN[c]) / STD[c] for c in range(3)], 1)
        torch.testing.assert_close(out.double(), expected, rtol=8 * rounding, atol=8 * rounding)


@pytest.mark.parametrize("as_", [list, torch.tensor, np.array])
def test_mean_and_std_may_be_any_sequence(as_):
    x, _ = batch()
    assert torch.equal(fastadv.Normalize(as_(MEAN), as_(STD))(x), fastadv.Normalize(MEAN, STD)(x))


def test_one_number_is_for_all_channels():
    x, _ = batch()
    assert torch.equal(fastadv.Normalize(0.5, 0.25)(x), (x - 0.5) / 0.25)


def test_attack_through_it_is_the_attack_on_normalised_images():
    x, y = batch(dtype=torch.float64)
    net, normalize = linear().double(), fastadv.Normalize(0.5, 0.25)
    inside = fastadv.pgd(nn.Sequential(normalize, net), x, y, 0.1, 0.02, 5, init="zero")
    outside = fastadv.pgd(net, normalize(x), y, 0.4, 0.08, 5, init="zero", bounds=(-2, 2))
    torch.testing.assert_close(normalize(inside), outside)


def test_is_no_part_of_a_checkpoint_and_moves_with_the_model():
    net = nn.Sequential(fastadv.Normalize(MEAN, STD), linear())
    assert all(key.startswith("1.") for key in net.state_dict())  # weights saved without it load, and the reverse
    assert net.to(torch.float64)[0].mean.dtype == torch.float64
    assert not list(net[0].parameters())
    assert "0.484375" in repr(net)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_cast_model_normalises_its_own_images(dtype):
    x, _ = batch(dtype=dtype)
    assert fastadv.Normalize(MEAN, STD).to(dtype)(x).dtype == dtype


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        (MEAN, STD[:2], "equally long"),
        (0.5, 0.0, "positive"),
        (0.5, -1.0, "positive"),
        (math.nan, 1.0, "finite"),
        ((0.5, math.inf), (1.0, 1.0), "finite"),
        (0.5, math.nan, "finite"),
        ((), (), "one number"),
        ("mean", 1.0, "numbers"),
        (None, 1.0, "numbers"),
    ],
)
def test_refuses_what_is_no_mean_and_std(mean, std, words):
    with pytest.raises(ValueError, match=f"mean.*std.*{words}|{words}.*mean.*std"):
        fastadv.Normalize(mean, std)


def test_refuses_another_number_of_channels():
    with pytest.raises(ValueError, match=r"3 channels.*\[6, 4, 8, 8\]"):
        fastadv.Normalize(MEAN, STD)(torch.rand(6, 4, 8, 8))


def test_refuses_images_without_channels():
    with pytest.raises(ValueError, match=r"3 channels.*\[6\]"):
        fastadv.Normalize(MEAN, STD)(torch.rand(6))
