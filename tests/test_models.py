"""Networks by name: their sizes, costs and first weights are those of the papers, and a checkpoint rebuilds them."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from models import batch, one_thread, seeded, state, surroundings  # noqa: F401
from torch import nn

import benchmarks.models
import fastadv
from fastadv import demo
from fastadv.engine.twin import Twin
from fastadv.evaluation.command import load_model
from fastadv.models import HEADS, MODELS, PreActBlock, build, forward_flops

DIGIT, IMAGE = (1, 28, 28), (3, 32, 32)
DM = {"activation": "silu", "bn_momentum": 0.01, "padding": "asymmetric"}
SMALL = {
    "small-cnn": (DIGIT, {}),
    "madry-cnn": (DIGIT, {}),
    "demo-cnn": (DIGIT, {}),
    "preact-resnet18": (IMAGE, {}),
    "wide-resnet": (IMAGE, {"depth": 10, "widen": 1}),
}


def on_meta(*args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **kwargs)


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------------------------------------------- as they are published


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("small-cnn", {}, 312_202),
        ("madry-cnn", {}, 3_274_634),
        ("preact-resnet18", {}, 11_172_170),
        ("preact-resnet18", {"classes": 100}, 11_172_170 + 90 * 513),
        ("wide-resnet", {}, 36_479_194),
        ("wide-resnet", {"depth": 34}, 46_160_474),
        ("wide-resnet", {"depth": 70, "widen": 16}, 266_796_506),
        ("wide-resnet", {"depth": 70, "widen": 16, **DM}, 266_796_506),
    ],
)
def test_parameters_of_the_published_networks(name, arguments, parameters):
    net = on_meta(name, **arguments)
    assert all(p.is_meta for p in net.parameters())
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "arguments", "peta"),
    [
        ("preact-resnet18", {}, 1.28),
        ("wide-resnet", {"depth": 28}, 12.1),
        ("wide-resnet", {"depth": 34}, 15.3),
        ("wide-resnet", {"depth": 34, **DM}, 15.3),
        ("wide-resnet", {"depth": 70, "widen": 16}, 89.0),
    ],
)
def test_an_epoch_of_adversarial_training_costs_what_it_is_known_to(name, arguments, peta):
    """PGD-10 on 50,000 images: 10 forwards and input gradients, 2F each, and a training step, 3F."""
    forward = forward_flops(on_meta(name, **arguments), IMAGE)
    assert 50_000 * 23 * forward / 1e15 == pytest.approx(peta, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("head", [None, *HEADS])
def test_logits_by_every_head(name, head):
    shape, arguments = SMALL[name]
    net = build(name, classes=7, head=head, **arguments)
    assert net.training
    assert net(batch(2, shape=shape)[0]).shape == (2, 7)
    if head is not None:
        assert type(list(net.modules())[-1 if head != "mmc" else -2]) is HEADS[head]


def test_arguments_of_heads():
    assert build("small-cnn", head="hypersphere", scale=9.0)[-1].scale == 9.0
    head = build("small-cnn", head="mmc", dimensions=20, norm=3.0)[-1]
    assert head.centres.shape == (10, 20)
    assert head.centres[0].norm().item() == pytest.approx(3.0)


def test_they_start_as_in_the_papers():
    wide = build("wide-resnet", depth=10, widen=2)
    for conv in (m for m in wide.modules() if isinstance(m, nn.Conv2d)):
        expected = math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))
        assert conv.weight.std().item() == pytest.approx(expected, rel=6 / math.sqrt(2 * conv.weight.numel()))
        assert conv.bias is None
    assert not wide.head.bias.any()
    assert wide.head.weight.any()

    small = build("small-cnn")
    assert not small[-1].weight.any()
    assert not small[-1].bias.any()
    assert not small(batch(2, shape=DIGIT)[0]).any()
    for conv in (m for m in small if isinstance(m, nn.Conv2d)):
        expected = math.sqrt(2 / (9 * conv.in_channels))
        assert conv.weight.std().item() == pytest.approx(expected, rel=6 / math.sqrt(2 * conv.weight.numel()))
        assert not conv.bias.any()

    for layer in (m for m in build("madry-cnn") if isinstance(m, (nn.Conv2d, nn.Linear))):
        assert (layer.bias == 0.1).all()
        assert layer.weight.abs().max() <= 0.2
        assert layer.weight.std().item() == pytest.approx(0.1 * 0.8796, rel=0.1)  # of a normal cut off at two deviations

    assert same(build("demo-cnn", seed=3), demo.small_cnn(3))


@pytest.mark.parametrize(("padding", "first"), [("symmetric", 1), ("asymmetric", 2)])
def test_where_a_block_of_stride_2_pads(padding, first):
    """Its first convolution looks at the last corner of each window: pixels 1, 3, 5, 7, or 2, 4, 6 and the padding."""
    block = PreActBlock(2, 2, 2, padding=padding).eval()
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    for norm in (block.bn1, block.bn2):
        nn.init.ones_(norm.weight)
        norm.eps = 0.0
    for channel in range(2):
        block.conv1.weight.data[channel, channel, 2, 2] = 1
        block.conv2.weight.data[channel, channel, 1, 1] = 1
    x = batch(3, shape=(2, 8, 8))[0]
    expected = nn.functional.pad(x, (0, 2, 0, 2))[:, :, first : first + 8 : 2, first : first + 8 : 2]
    assert torch.equal(block(x), expected)


def test_the_variant_of_dm():
    net = build("wide-resnet", depth=16, widen=1, **DM)
    assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {0.01}
    assert not any(isinstance(m, nn.ReLU) for m in net.modules())
    assert [name for name, m in net.named_modules() if isinstance(m, nn.ZeroPad2d)] == ["block2_1.pad", "block3_1.pad"]
    plain = build("wide-resnet", depth=16, widen=1)
    assert same(net, plain)
    assert not any(isinstance(m, nn.SiLU | nn.ZeroPad2d) for m in plain.modules())
    x = batch(2, shape=IMAGE)[0]
    assert net(x).shape == (2, 10)
    assert not torch.equal(net(x), plain(x))


def test_benchmarks_use_these():
    assert benchmarks.models.wide_resnet is fastadv.models.wide_resnet
    assert benchmarks.models.preact_resnet18 is fastadv.models.preact_resnet18


# ------------------------------------------------------------------------------------------------------------------ seeds


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_gives_the_same_weights_and_nothing_else_changes(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs were seeded"))
    arguments = SMALL[name][1]
    before = torch.get_rng_state()
    first = build(name, seed=1, head="hypersphere", **arguments)
    torch.rand(1)
    after = torch.get_rng_state()
    assert same(first, build(name, seed=1, head="hypersphere", **arguments))
    assert not same(first, build(name, seed=2, head="hypersphere", **arguments))
    assert torch.equal(torch.get_rng_state(), after)
    torch.set_rng_state(before)
    torch.rand(1)
    assert torch.equal(torch.get_rng_state(), after)


def test_on_the_device_meta_there_are_shapes_only():
    net = on_meta("madry-cnn", mean=0.5, std=0.2)
    assert net[0].mean == 0.5
    assert all(p.is_meta for p in net.parameters())
    assert forward_flops(net, DIGIT) == forward_flops(build("madry-cnn"), DIGIT)


# ----------------------------------------------------------------------------------------------- normalised, attacked, kept


def test_normalisation_is_inside():
    x = batch(2, shape=IMAGE)[0]
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    net, plain = (build("wide-resnet", depth=10, widen=1, **o).eval() for o in ({"mean": mean, "std": std}, {}))
    assert torch.equal(net(x), plain(fastadv.Normalize(mean, std)(x)))
    assert build("wide-resnet", depth=10, widen=1, mean=0.5, std=0.25)[0].std == 0.25


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_rebuilds_them(name, head, tmp_path):
    shape, arguments = SMALL[name]
    arguments = {"name": name, "classes": 5, "mean": 0.1, "std": 0.3, "head": head, **arguments}
    net = build(**arguments, seed=3)
    x = batch(3, shape=shape)[0]
    net(x)  # moves the running statistics
    torch.save({"model": "fastadv.models:build", "arguments": arguments, "state_dict": net.state_dict()}, tmp_path / "net.pt")
    loaded, seed = load_model(str(tmp_path / "net.pt"))
    assert same(loaded, net)
    assert torch.equal(loaded.eval()(x), net.eval()(x))
    assert seed is None


@pytest.mark.parametrize("variant", [{}, DM])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", MODELS)
def test_they_have_twins(name, head, variant):
    shape, arguments = SMALL[name]
    if variant and name != "wide-resnet":
        return
    net = build(name, mean=0.1, std=0.3, head=head, **arguments, **variant)
    x = batch(3, shape=shape)[0]
    net(x)
    twin = Twin(net)
    twin.check(x)
    blocks = sum(isinstance(m, PreActBlock) for m in net.modules())
    assert len(twin._folds) == blocks  # each block's second batch norm, into its first convolution


@pytest.mark.parametrize("variant", [{}, DM])
def test_training_and_attack_change_every_weight(variant):
    net = build("wide-resnet", depth=10, widen=1, **variant)
    x, y = batch(4, shape=IMAGE)
    loss = fastadv.PGDAT(fastadv.PGD(net, 8 / 255, steps=2))(net, x, y).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


# ------------------------------------------------------------------------------------------------------------- elsewhere


@seeded
def mine(width: int = 4) -> nn.Module:
    return nn.Linear(3, width)


def flexible(classes: int, **more) -> nn.Module:
    return nn.Linear(len(more), classes)


class Nets:
    small = staticmethod(lambda: nn.Linear(4, 2))


def test_ones_own():
    assert build(f"{__name__}:mine").out_features == 4
    assert build(f"{__name__}:mine", width=5).out_features == 5
    assert build(f"{__name__}:flexible", classes=7, a=1, b=2).weight.shape == (7, 2)
    assert isinstance(build(f"{__name__}:Nets.small", mean=0.0, std=1.0)[1], nn.Linear)
    assert same(
        build("torch.nn:Linear", in_features=2, out_features=3), build("torch.nn:Linear", in_features=2, out_features=3)
    )


def stand_in_for_timm() -> types.ModuleType:
    timm = types.ModuleType("timm")

    def create_model(name, num_classes, **arguments):
        if name != "resnet18":
            raise RuntimeError(f"Unknown model ({name})")
        return nn.Linear(arguments.pop("in_chans", 3), num_classes, **arguments)

    timm.create_model, timm.list_models = create_model, lambda: ["resnet18", "vit_tiny"]
    return timm


def test_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", stand_in_for_timm())
    net = build("timm:resnet18", classes=7, in_chans=1, mean=0.5, std=1.0)
    assert net[1].weight.shape == (7, 1)
    assert same(net, build("timm:resnet18", classes=7, in_chans=1, mean=0.5, std=1.0))
    with pytest.raises(ValueError, match=r"timm:resnet81 cannot be built: Unknown .*; did you mean 'resnet18'"):
        build("timm:resnet81")
    with pytest.raises(ValueError, match=r"timm:resnet18 cannot be built: .*unexpected keyword argument 'depth'"):
        build("timm:resnet18", depth=3)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm:resnet18 needs the package timm \(.*\): pip install timm"):
        build("timm:resnet18")


# ----------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("wide-resnt", {}, "name must be one of small-cnn, .*, wide-resnet, or timm:NAME or .*; got 'wide-resnt'; .*resnet'"),
        (None, {}, "name must be one of .*; got None"),
        ("wide-resnet", {"dept": 34}, r"wide-resnet has no argument 'dept'; did you mean 'depth'\? \(its arguments: activ"),
        ("preact-resnet18", {"depth": 34}, r"preact-resnet18 has no argument 'depth' \(its arguments: none\)"),
        ("small-cnn", {"head": "mmc", "scale": 3.0}, "small-cnn has no argument 'scale' .*dropout, dimensions, norm"),
        ("wide-resnet", {"depth": 30}, "depth must be 6n [+] 4, as 28, 34 and 70 are; got 30"),
        ("wide-resnet", {"depth": 4}, "depth must be an integer >= 10; got 4"),
        ("wide-resnet", {"widen": 0.5}, "widen must be an integer >= 1; got 0.5"),
        ("wide-resnet", {"activation": "swish"}, "activation must be one of 'relu', 'silu'; got 'swish'"),
        ("wide-resnet", {"padding": 1}, "padding must be one of 'symmetric', 'asymmetric'; got 1"),
        ("wide-resnet", {"bn_momentum": 0}, "bn_momentum must be a finite number > 0; got 0"),
        ("wide-resnet", {"bn_momentum": 2.0}, r"bn_momentum must be in \(0, 1\]; got 2.0"),
        ("small-cnn", {"classes": 1}, "classes must be an integer >= 2; got 1"),
        ("small-cnn", {"seed": -1}, "seed must be an integer >= 0; got -1"),
        ("small-cnn", {"head": "cosine"}, "head must be one of 'linear', 'hypersphere', 'mmc'; got 'cosine'"),
        ("small-cnn", {"mean": 0.5}, "mean and std must be given both or neither; got mean=0.5, std=None"),
        ("small-cnn", {"mean": 0.5, "std": 0}, "std positive; got mean=0.5, std=0"),
        ("timm:resnet18", {"head": "mmc"}, "head must be None for timm:resnet18, .*; got 'mmc'"),
        ("no.such:thing", {}, "no.such:thing cannot be imported: ModuleNotFoundError"),
        ("torch.nn:", {}, "torch.nn: cannot be imported"),
        ("torch.nn:Linar", {}, "torch.nn:Linar cannot be imported: AttributeError"),
        ("torch.nn:__name__", {}, "torch.nn:__name__ must be a function that returns a torch.nn.Module; got str"),
        ("os:getcwd", {}, "os:getcwd must return a torch.nn.Module; got str"),
        (f"{__name__}:mine", {"wide": 3}, r"test_models:mine has no argument 'wide'; did you mean 'width'"),
    ],
)  # fmt: skip
def test_errors(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(name, **arguments)


# ------------------------------------------------------------------------------------------------------------------- cost


def test_flops_are_those_of_a_forward_and_the_model_is_left_alone():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 36, 5)).double()
    before = state(net)
    assert forward_flops(net, (2, 8, 8)) == 2 * (4 * 36 * 2 * 9 + 4 * 36 * 5)
    assert state(net) == before
    assert net.training
    vit = benchmarks.models.ViT(8, 4, dim=16, depth=1, heads=2, classes=3)
    tokens, linear = 4, 2 * 4 * (3 * 16 * 16 + 12 * 16 * 16)
    attention = 2 * 2 * tokens * tokens * 16
    assert forward_flops(vit, (3, 8, 8)) == linear + attention + 2 * 16 * 3
