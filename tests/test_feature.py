"""Attacks on a representation: where they end in closed form, what they run, and how they leave the model."""

from __future__ import annotations

import pytest
import torch
from models import batch, cnn, count_calls, linear, one_thread, seed, state, surroundings  # noqa: F401
from torch import nn

from fastadv import FeatureAttack
from fastadv.attacks.feature import _Representation

SCALES = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)


def diagonal() -> nn.Module:
    """The representation of a row of four is the row, scaled."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3)).double()
    net[0].weight = nn.Parameter(SCALES.diag())
    return net


def rows(n: int = 6):
    return 0.3 + 0.4 * torch.rand(n, 4, generator=seed(), dtype=torch.float64), torch.zeros(n, dtype=torch.long)


# ------------------------------------------------------------------------------------------------------- closed forms


def test_away_in_l2_is_along_the_largest_singular_value():
    x, y = rows()
    adv = FeatureAttack(diagonal(), 0.2, "0", alpha=0.2, steps=100, norm="l2")(x, y)
    torch.testing.assert_close((adv - x).abs(), 0.2 * torch.tensor([1.0, 0, 0, 0]).double().expand(6, 4), rtol=0, atol=1e-3)


def test_away_in_linf_is_a_corner_of_the_ball_or_the_box():
    x, y = rows()
    x[0] = 0.95
    adv = FeatureAttack(diagonal(), 0.2, "0")(x, y)
    moved = adv - x
    torch.testing.assert_close(moved[1:].abs(), torch.full_like(x[1:], 0.2))
    assert ((moved[0] + 0.2).abs() < 1e-9).logical_or((adv[0] - 1).abs() < 1e-9).all()
    assert len(moved[1:].sign().unique()) == 2  # samples and elements set out in directions of their own


@pytest.mark.parametrize("eps", [0.1, torch.linspace(0.05, 0.3, 6).double()], ids=["float", "per sample"])
@pytest.mark.parametrize("single", [False, True])
def test_towards_a_guide_is_the_nearest_point_of_the_ball(eps, single):
    x, y = rows()
    guide = torch.rand(1 if single else 6, 4, generator=seed(1), dtype=torch.float64)
    radius = torch.as_tensor(eps).view(-1, 1)
    nearest = torch.minimum(torch.maximum(guide.expand(6, 4), x - radius), x + radius)
    adv = FeatureAttack(diagonal(), eps, "0", guide, alpha=0.002, steps=200)(x, y)
    torch.testing.assert_close(adv, nearest, rtol=0, atol=0.0021)


def test_towards_a_guide_in_l2_ends_in_its_direction():
    """Where all directions count alike."""
    x, y = rows()
    guide = 1 - x
    net = diagonal()
    net[0].weight = nn.Parameter(torch.eye(4).double())
    adv = FeatureAttack(net, 0.05, "0", guide, norm="l2")(x, y)
    torch.testing.assert_close(adv - x, 0.05 * nn.functional.normalize(guide - x))


def test_success_is_the_models_word():
    x, _ = batch(n=30)
    net = cnn().eval()
    guide, target = x.roll(1, 0), net(x.roll(1, 0)).argmax(1)
    attack = FeatureAttack(net, 0.5, "4", guide, steps=60, targeted=True)
    adv = attack(x, target)
    assert torch.equal(attack.info.success, net(adv).argmax(1) == target)
    assert attack.info.success.float().mean() > (net(x).argmax(1) == target).float().mean() + 0.2
    assert (adv - x).abs().max() <= 0.5 + 1e-6
    assert attack.info.forwards == 62


# ----------------------------------------------------------------------------------------------- the representation


@pytest.mark.parametrize("compiled", [False, True])
def test_the_representation_is_what_the_layer_gave_before_the_next_one_wrote_into_it(compiled):
    x, _ = batch()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 10)).requires_grad_(False)
    representation = _Representation(net, "0")
    with representation.listening(), torch.no_grad():
        run = torch.compile(representation, fullgraph=True) if compiled else representation
        torch.testing.assert_close(run(x), net[0]._conv_forward(x, net[0].weight, net[0].bias).flatten(1))


def test_the_model_runs_no_farther_than_the_layer():
    x, y = batch()
    net = cnn()
    before, after = count_calls(net[4]), count_calls(net[8])
    attack = FeatureAttack(net, 0.1, "4", steps=5)
    attack(x, y)
    assert (len(before), len(after)) == (7, 1)  # and once all through, for the verdict
    assert attack.info.queries.tolist() == [7] * 6


def test_a_layer_that_is_called_twice_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.layer(self.layer(x)))

    net = Twice().double().requires_grad_(False)
    x, _ = rows()
    for run in (_Representation(net, "layer"), torch.compile(_Representation(net, "layer"), fullgraph=True)):
        with getattr(run, "_orig_mod", run).listening():
            torch.testing.assert_close(run(x), nn.functional.linear(x, net.layer.weight, net.layer.bias))


@pytest.mark.usefixtures("no_codegen")
def test_compiled_is_the_same_attack():
    x, y = batch(dtype=torch.float64)
    net = cnn().double()
    attack = FeatureAttack(net, 0.1, "4", x.flip(0), steps=5, engine="compile")
    for _ in range(2):
        adv = attack(x, y)
    assert sum("compile" in plan for plan in attack.stats.steps) == 1
    torch.testing.assert_close(adv, FeatureAttack(net, 0.1, "4", x.flip(0), steps=5)(x, y))


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"memory": "signs"}])
def test_lower_precision_and_memory(options):
    x, y = batch()
    net = cnn()
    expected = FeatureAttack(net, 0.1, "4", x.flip(0), steps=5)(x, y)
    assert (FeatureAttack(net, 0.1, "4", x.flip(0), steps=5, **options)(x, y) == expected).float().mean() > 0.8


# ------------------------------------------------------------------------------------------------------- the contracts


@pytest.mark.parametrize("guided", [False, True])
def test_batches_pieces_and_orders_agree(guided):
    x, y = batch(n=7, dtype=torch.float64)
    net = cnn().double()

    def attacked(chosen):
        guide = x.flip(0)[chosen] if guided else None
        return FeatureAttack(net, 0.1, "4", guide, steps=5, seed=3)(x[chosen], y[chosen], samples=chosen)

    whole, order = attacked(torch.arange(7)), torch.tensor([4, 0, 6, 2, 5, 1, 3])
    torch.testing.assert_close(attacked(order), whole[order])
    torch.testing.assert_close(torch.cat([attacked(torch.arange(3)), attacked(torch.arange(3, 7))]), whole)


class Fails(nn.Module):
    """Passes its input on, but raises in its k-th call (from 0)."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k, self.calls = k, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.k + 1:
            raise KeyboardInterrupt("as the test asked")
        return x


@pytest.mark.parametrize("k", range(5))
def test_the_model_is_left_as_found_also_when_it_raises(k):
    """Four times on the way to the layer, and once for the verdict."""
    x, y = batch()
    net = nn.Sequential(Fails(k), *cnn()).train()
    before, around = state(net), surroundings()
    attack = FeatureAttack(net, 0.1, "5", steps=3)
    with pytest.raises(KeyboardInterrupt, match="as the test asked"):
        attack(x, y)
    assert state(net) == before
    net[0].k = -1
    assert not torch.equal(attack(x, y), x)
    assert net[0].calls == k + 1 + 5
    assert state(net) == before
    assert surroundings() == around


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    x, y = batch(dtype=dtype)
    adv = FeatureAttack(linear().to(dtype), 0.1, "1", steps=3)(x, y)
    assert adv.dtype == dtype
    assert ((adv.double() - x.double()).abs() <= 0.1 + 1e-12).all()
    assert not torch.equal(adv, x)


@pytest.mark.parametrize("n", [0, 1])
def test_few_samples(n):
    x, y = batch()
    assert FeatureAttack(cnn(), 0.1, "4", steps=2)(x[:n], y[:n]).shape == (n, 3, 8, 8)


class Unused(nn.Module):
    """Has a layer that it does not call, one that gives a pair, and one that sums over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.unused, self.pair, self.sum = linear(), nn.Linear(2, 2), nn.LSTM(10, 10), Sum()

    def forward(self, x):
        logits = self.net(x)
        return self.pair(logits)[0] + self.sum(logits)


class Sum(nn.Module):
    def forward(self, x):
        return x.sum(0, keepdim=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "nowhere"}, "layer must be a submodule's name, of 'net', 'net.0', .*; got 'nowhere'"),
        ({"layer": ""}, "layer must be a submodule's name"),
        ({"layer": "unused"}, r"layer 'unused' is not called by model\(x\)"),
        ({"layer": "pair"}, "layer 'pair' must give a floating tensor .* got tuple"),
        ({"layer": "sum"}, "layer 'sum' must give a row for each of 6 images; got 1"),
        ({"guide": torch.rand(5, 3, 8, 8)}, "guide must be like x"),
        ({"guide": torch.full((1, 3, 8, 8), torch.nan)}, "guide must be finite"),
        ({"guide": "cat"}, "guide must be a floating tensor"),
        ({"targeted": True}, "targeted needs a guide"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"alpha": -1.0}, "alpha must be a finite number >= 0"),
        ({"alpha": torch.ones(5)}, "alpha must be a number or have shape"),
        ({"eps": None}, "eps must be a finite number >= 0"),
        ({"norm": "l3"}, "norm must be one of 'linf', 'l2', 'l1'"),
        ({"model": lambda x: x.flatten(1)}, "model must be an nn.Module, whose layers have names; got function"),
        ({"y": torch.full((6,), 10)}, r"labels in \[0, 10\)"),
    ],
)
def test_bad_input(settings, message):
    x, y = batch()
    y = settings.pop("y", y)
    with pytest.raises(ValueError, match=message):
        FeatureAttack(**{"model": Unused(), "eps": 0.1, "layer": "net.1", **settings})(x, y)
