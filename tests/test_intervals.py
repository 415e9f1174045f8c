"""Interval bounds against exact ranges, points and attacks; training by them (IBP); what certify_intervals says."""

from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from models import batch, cnn, digits, linear, one_thread, seed, seeded, state, surroundings  # noqa: F401
from torch import nn

import fastadv
from fastadv.certify import certify_intervals, lirpa
from fastadv.functional import ibp_loss
from fastadv.intervals import interval_bounds, worst_logits

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def box(*shape, eps=0.3, value=1):
    """A box of float64 ends, not the same width everywhere."""
    g = seed(value)
    centre, radius = (torch.rand(*shape, generator=g, dtype=torch.float64) for _ in range(2))
    return 2 * centre - 1 - eps * radius, 2 * centre - 1 + eps * radius


def inside(lower, upper, n=200):
    """Points of the box: corners, and others."""
    u = torch.rand(n, *lower.shape, generator=seed(2), dtype=lower.dtype)
    u[::2] = u[::2].round()
    return torch.lerp(lower, upper, u)


@seeded
def deep(dropout=0.5):
    """All kinds of layers, one of them twice, in train mode."""
    relu = nn.ReLU(inplace=True)
    net = nn.Sequential(
        fastadv.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.2]),
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), relu, nn.MaxPool2d(2), nn.Dropout(dropout)),
        nn.Conv2d(6, 8, 3, padding=1, groups=2, padding_mode="reflect"), nn.LeakyReLU(0.2),
        nn.AvgPool2d(2), nn.Tanh(), nn.Flatten(),
        nn.Linear(32, 16), nn.BatchNorm1d(16), relu, nn.Linear(16, 5),
    )  # fmt: skip
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(m.weight)  # negative ones among them
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 1.5)
    return net.double()


# ------------------------------------------------------------------------------------------------------ interval bounds


def test_two_layers_by_hand():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        for p, value in zip(net.parameters(), ([[1, -1], [2, 1]], [0, 0], [[1, 1], [-1, 2]], [0.5, 0]), strict=True):
            p.copy_(torch.tensor(value))
    x = torch.full((1, 2), 0.5, dtype=torch.float64)
    lower, upper = interval_bounds(net, x - 0.5, x + 0.5)
    assert (lower.tolist(), upper.tolist()) == ([[0.5, -1.0]], [[4.5, 6.0]])  # of hidden [0, 1] and [0, 3]
    # z_1 - z_0 = -2 h_0 + h_1 - 0.5 is at most 2.5, and the difference of bounds 5.5
    assert worst_logits(net, x, torch.tensor([0]), 0.5).tolist() == [[0.0, 2.5]]
    assert worst_logits(net, x, torch.tensor([1]), 0.5).tolist() == [[2.5, 0.0]]


def test_of_a_linear_model_they_are_exact():
    net, (lower, upper) = linear(3, 4).double(), box(1, 4)
    corners = torch.tensor(
        list(itertools.product(*zip(lower[0].tolist(), upper[0].tolist(), strict=True))), dtype=torch.float64
    )
    found = interval_bounds(net, lower, upper)
    torch.testing.assert_close(found[0][0], net(corners).amin(0), **EXACT)
    torch.testing.assert_close(found[1][0], net(corners).amax(0), **EXACT)
    x, worst = torch.rand(1, 4, generator=seed(), dtype=torch.float64), []
    signs = torch.tensor(list(itertools.product([-0.1, 0.1], repeat=4)), dtype=torch.float64)
    for y in range(3):
        z = net((x + signs).clamp(0, 1))
        worst.append((z - z[:, [y]]).amax(0))
    torch.testing.assert_close(worst_logits(net, x.expand(3, -1), torch.arange(3), 0.1), torch.stack(worst), **EXACT)


AFFINE = {
    "linear": (lambda: nn.Linear(8, 5), (8,)),
    "linear of rows": (lambda: nn.Linear(8, 5, bias=False), (3, 8)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2), (3, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2, dilation=2), (4, 6, 6)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (1, 3), padding="same", bias=False), (2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "batch norm": (lambda: deep()[1][1], (6, 3, 3)),
    "batch norm 1d": (lambda: deep()[8], (16,)),
    "batch norm without weights": (lambda: nn.BatchNorm2d(3, affine=False), (3, 3, 3)),
    "average": (lambda: nn.AvgPool2d(2, padding=1), (2, 4, 4)),
    "adaptive average": (lambda: nn.AdaptiveAvgPool2d(1), (2, 4, 4)),
    "normalize": (lambda: fastadv.Normalize([0.1, 0.2], [0.5, 2.0]), (2, 3, 3)),
    "flatten": (nn.Flatten, (2, 3)),
    "unflatten": (lambda: nn.Unflatten(1, (2, 2)), (4, 3)),
    "pad": (lambda: nn.ZeroPad2d(1), (2, 3, 3)),
    "dropout": (nn.Dropout, (4,)),
    "identity": (nn.Identity, (4,)),
}
CURVED = {
    "relu": (nn.ReLU, (9,)),
    "relu6": (nn.ReLU6, (9,)),
    "leaky relu": (lambda: nn.LeakyReLU(0.3), (9,)),
    "elu": (lambda: nn.ELU(2.0), (9,)),
    "selu": (nn.SELU, (9,)),
    "hardtanh": (lambda: nn.Hardtanh(-0.3, 0.2), (9,)),
    "sigmoid": (nn.Sigmoid, (9,)),
    "tanh": (nn.Tanh, (9,)),
    "max": (lambda: nn.MaxPool2d(3, stride=2, padding=1), (2, 5, 5)),
    "max 1d": (lambda: nn.MaxPool1d(2), (2, 6)),
    "average 1d": (lambda: nn.AvgPool1d(2), (2, 6)),
    "adaptive max": (lambda: nn.AdaptiveMaxPool2d(2), (2, 5, 5)),
}


@pytest.mark.parametrize("case", AFFINE)
def test_an_affine_layers_bounds_are_reached_and_not_passed(case):
    """The highest value of each output is at the corner that its gradient points to."""
    build, shape = AFFINE[case]
    layer, (lower, upper) = seeded(build)().double().eval(), box(2, *shape)
    found = interval_bounds(layer, lower, upper)

    def highest(sign):
        x = ((lower + upper) / 2).requires_grad_()
        values = layer(x)
        reached = []
        for k in range(values[0].numel()):
            (g,) = torch.autograd.grad(values.flatten(1)[:, k].sum(), x, retain_graph=True)
            with torch.no_grad():
                reached.append(layer(torch.where(sign * g > 0, upper, lower)).flatten(1)[:, k])
        return torch.stack(reached, 1).view_as(values)

    torch.testing.assert_close(found, (highest(-1), highest(1)), **EXACT)


@pytest.mark.parametrize("case", CURVED)
def test_a_monotone_layers_bounds_are_its_ends(case):
    build, shape = CURVED[case]
    layer, (lower, upper) = build(), box(2, *shape, eps=1.0)
    assert all(map(torch.equal, interval_bounds(layer, lower, upper), (layer(lower), layer(upper))))
    points = torch.stack([layer(point) for point in inside(lower, upper)])
    assert bool(((layer(lower) <= points) & (points <= layer(upper))).all())


@pytest.mark.parametrize("eps", [0.001, 0.02, 0.3])
def test_points_and_attacks_stay_within(eps):
    x, y = batch(4, 5, torch.float64)
    net = deep().eval()
    lower, upper = interval_bounds(net, (x - eps).clamp(0, 1), (x + eps).clamp(0, 1))
    worst = worst_logits(net, x, y, eps)
    attacks = [fastadv.pgd(net, x, (y + k) % 5, eps, steps=10, targeted=True) for k in range(1, 5)]
    for adv in [*attacks, *inside((x - eps).clamp(0, 1), (x + eps).clamp(0, 1), 20)]:
        z = net(adv)
        assert bool(((lower <= z) & (z <= upper)).all())
        assert bool((z - z.gather(1, y[:, None]) <= worst + 1e-12).all())


def test_bounds_grow_with_the_ball_from_the_logits_themselves():
    x, y = batch(4, 5, torch.float64)
    net = deep()
    z = net.eval()(x)
    torch.testing.assert_close(interval_bounds(net, x, x), (z, z), **EXACT)
    torch.testing.assert_close(worst_logits(net, x, y, 0.0), z - z.gather(1, y[:, None]), **EXACT)
    boxes = [interval_bounds(net, x - eps, x + eps) for eps in (0.0, 0.01, 0.1, 0.3)]
    worst = [worst_logits(net, x, y, eps) for eps in (0.0, 0.01, 0.1, 0.3)]
    for (low, high), (lower, upper) in itertools.pairwise(boxes):
        assert bool(((lower < low) & (high < upper)).all())
    for smaller, larger in itertools.pairwise(worst):
        assert bool((smaller <= larger).all())
    each = worst_logits(net, x, y, torch.tensor([0.0, 0.01, 0.1, 0.3], dtype=x.dtype))
    torch.testing.assert_close(each, torch.stack([w[i] for i, w in enumerate(worst)]), **EXACT)
    assert not torch.equal(worst_logits(net, x, y, 0.3), worst_logits(net, x, y, 0.3, bounds=None))


def test_the_elided_layer_is_never_looser_than_the_difference_of_bounds():
    x, y = batch(20, 5, torch.float64)
    net = deep()
    lower, upper = interval_bounds(net, (x - 0.05).clamp(0, 1), (x + 0.05).clamp(0, 1))
    plain = (upper - lower.gather(1, y[:, None])).scatter(1, y[:, None], 0.0)
    worst = worst_logits(net, x, y, 0.05)
    assert bool((worst <= plain + 1e-12).all())
    assert bool((plain - worst).mean() > 0.1)
    ends_otherwise = nn.Sequential(net, nn.Identity())
    torch.testing.assert_close(worst_logits(ends_otherwise, x, y, 0.05), plain, **EXACT)


def test_eval_mode_is_read_and_nothing_is_changed():
    x, y = batch(6, 5, torch.float64)
    net = deep()
    net[2].weight.requires_grad_(False)
    expected = worst_logits(deep().eval(), x, y, 0.1)
    before, around, kept = state(net), surroundings(), x.clone()
    torch.testing.assert_close(worst_logits(net, x, y, 0.1), expected, rtol=0, atol=0)
    interval_bounds(nn.Sequential(nn.LeakyReLU(0.5, inplace=True), net), x - 1, x)
    assert state(net) == before
    assert surroundings() == around
    assert torch.equal(x, kept)


def test_wrappers_are_looked_through(process_group):
    x, y = batch(6, 5)
    net = deep().float()
    expected = worst_logits(net, x, y, 0.1)
    for wrapped in (torch.compile(net), nn.parallel.DistributedDataParallel(net)):
        assert torch.equal(worst_logits(wrapped, x, y, 0.1), expected)


class Standardised(nn.Conv2d):
    """What its forward computes is not a convolution with its weight."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def hooked():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    net[1].register_forward_hook(lambda module, inputs, out: 2 * out)
    return net


REFUSED = {
    "unknown": (lambda: nn.Sequential(nn.Sequential(nn.SiLU())), r"model\.0\.0: interval bounds know no SiLU.*auto_LiRPA"),
    "subclass": (lambda: nn.Sequential(Standardised(3, 3, 3)), "know no Standardised"),
    "residual": (lambda: fastadv.models.build("preact-resnet18"), r"model\.block1_1: interval bounds know no PreActBlock"),
    "not monotone": (lambda: nn.Sequential(nn.LeakyReLU(-0.1)), r"model\.0: LeakyReLU\(negative_slope=-0.1\) is no monotone"),
    "not monotone elu": (lambda: nn.ELU(-1.0), "model: ELU"),
    "indices": (lambda: nn.MaxPool2d(2, return_indices=True), "no monotone map of numbers"),
    "batch statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), "a batch norm without running statistics"),
    "hook": (hooked, r"model\.1: interval bounds do not see"),
    "function": (lambda: lambda x: x, "model must be an nn.Module"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_bounded_is_named(case):
    build, message = REFUSED[case]
    x, _ = batch()
    with pytest.raises(ValueError, match=message):
        interval_bounds(build(), x, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: interval_bounds(linear(), x, x - 0.1), "lower <= upper everywhere"),
        (lambda x, y: interval_bounds(linear(), x, x[:3]), "of one shape"),
        (lambda x, y: interval_bounds(linear(), x * torch.nan, x), "lower <= upper"),
        (lambda x, y: worst_logits(linear(), x, y, -0.1), "eps must be a finite number >= 0"),
        (lambda x, y: worst_logits(linear(), x, y, torch.rand(3)), r"eps must be a number or have shape \[6\]"),
        (lambda x, y: worst_logits(linear(), x, y[:3], 0.1), r"y must be integer labels \[6\]"),
        (lambda x, y: worst_logits(linear(), x, F.one_hot(y, 10).float(), 0.1), "got soft labels"),
        (lambda x, y: worst_logits(linear(), x, y, 0.1, (1, 0)), r"bounds must be \(lo, hi\)"),
        (lambda x, y: worst_logits(nn.Linear(8, 10), x, y, 0.1), r"must see \[N, features\]; got \[6, 3, 8, 8\]"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(*batch())


# ------------------------------------------------------------------------------------------------------------------ IBP


def test_the_loss_is_its_formula():
    z, worst = (torch.randn(6, 5, generator=seed(k), dtype=torch.float64) for k in (1, 2))
    y = batch(6, 5)[1]
    expected = 0.3 * F.cross_entropy(z, y) + 0.7 * F.cross_entropy(worst, y)
    torch.testing.assert_close(ibp_loss(z, worst, y, 0.3), expected, **EXACT)
    assert ibp_loss(z, worst, y) == ibp_loss(z, worst, y, 0.5)


def test_a_training_step_is_the_literal_one():
    """Two linear layers, propagated by ends and positive and negative parts; the second by differences of its rows."""
    net = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 5)))().double()
    x, y = batch(6, 5, torch.float64)
    objective = fastadv.IBP(eps=0.1, warmup=1, ramp=4)
    for _ in range(3):
        objective.observe(None, y)
    out = objective(net, x, y)
    assert out.x_adv is None
    assert torch.equal(out.logits, net(x))
    (first, b), (second, c) = ((net[k].weight, net[k].bias) for k in (1, 3))
    lower, upper = ((x + e).clamp(0, 1).flatten(1) for e in (-0.05, 0.05))  # two of the ramp's four batches are behind
    low = (lower @ first.clamp(min=0).T + upper @ first.clamp(max=0).T + b).relu()
    high = (upper @ first.clamp(min=0).T + lower @ first.clamp(max=0).T + b).relu()
    worst = torch.stack(
        [
            torch.stack(
                [
                    high[n] @ (second[j] - second[y[n]]).clamp(min=0) + low[n] @ (second[j] - second[y[n]]).clamp(max=0)
                    + c[j] - c[y[n]]
                    for j in range(5)
                ]
            )
            for n in range(6)
        ]
    )  # fmt: skip
    expected = 0.75 * F.cross_entropy(net(x), y) + 0.25 * F.cross_entropy(worst, y)
    torch.testing.assert_close(out.logits_adv, worst, **EXACT)
    torch.testing.assert_close(out.loss, expected, **EXACT)
    gradients = [torch.autograd.grad(loss, list(net.parameters())) for loss in (out.loss, expected)]
    torch.testing.assert_close(*gradients, **EXACT)


def test_warm_up_and_ramp_are_counted_in_batches_and_resumed():
    x, y = batch(6, 5)
    net, objective, seen = deep().float(), fastadv.IBP(eps=0.2, warmup=2, ramp=4), []
    for step in range(9):
        seen.append(objective.progress)
        out = objective(net, x, y)
        assert (out.logits_adv is None) == (step <= 2)
        if step == 4:
            objective.load_state_dict(objective.state_dict())
            resumed = fastadv.IBP(eps=0.2, warmup=2, ramp=4)
            resumed.load_state_dict(objective.state_dict())
            assert resumed.progress == objective.progress == 0.75
    assert seen == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert out.metrics.keys() == {"accuracy", "robust_accuracy"}
    assert fastadv.IBP(warmup=0, ramp=0).progress == 1
    assert (fastadv.IBP(warmup=3, ramp=0).progress, fastadv.IBP(warmup=3).progress) == (0, 0)
    assert repr(objective) == "IBP(attack=None, eps=0.2, kappa=0.5, bounds=(0.0, 1.0), warmup=2, ramp=4)"


def test_gradients_under_ddp_are_those_of_the_bare_model(process_group):
    x, y = batch(6, 5)
    found = []
    for wrap in (lambda net: net, nn.parallel.DistributedDataParallel):
        net = deep(dropout=0.0).float()
        fastadv.IBP(0.1, warmup=0, ramp=0)(wrap(net), x, y).loss.backward()
        found.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: fastadv.IBP(eps=-1.0), "eps must be a finite number >= 0"),
        (lambda x, y: fastadv.IBP(kappa=1.5), r"kappa must be in \[0, 1\]; got 1.5"),
        (lambda x, y: fastadv.IBP(warmup=-1), "warmup must be an integer >= 0"),
        (lambda x, y: fastadv.IBP(ramp=0.5), "ramp must be an integer >= 0"),
        (lambda x, y: fastadv.IBP()(linear(), x + 1, y), r"x must lie in bounds \(0, 1\)"),
        (lambda x, y: fastadv.IBP()(linear(), x, y[:3]), "y must be integer labels"),
        (lambda x, y: fastadv.IBP(0.1, 0, 0)(linear(), x, F.one_hot(y, 10).float()), "got soft labels"),
    ],
)
def test_bad_arguments_of_ibp(call, message):
    with pytest.raises(ValueError, match=message):
        call(*batch())


def trained(objective, epochs):
    """On 1,200 digits of 8x8 pixels."""
    x, y = digits()
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
        )
    )()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for i in [*range(0, 1200, 100)] * epochs:
        optimizer.zero_grad()
        objective(net, x[i : i + 100], y[i : i + 100]).loss.backward()
        optimizer.step()
    return net, x[1200:], y[1200:]


def test_trained_by_bounds_the_bounds_prove_something():
    """And trained as usual, next to nothing, though it is as right about the images themselves."""
    net, x, y = trained(fastadv.IBP(0.06, warmup=36, ramp=144), 25)
    found = certify_intervals(net, (x, y), 0.04)
    assert found.clean_accuracy > 0.9
    assert found.certified_accuracy > 0.75
    adv = fastadv.pgd(net, x, y, 0.04, steps=20, restarts=2)
    assert bool((net(adv).argmax(1) == y)[found.certified].all())
    usual, x, y = trained(fastadv.Standard(), 10)
    standard = certify_intervals(usual, (x, y), 0.04)
    assert standard.clean_accuracy > 0.9
    assert standard.certified_accuracy < 0.2


# ---------------------------------------------------------------------------------------------------- certify_intervals


def test_a_linear_models_verdicts_are_the_closed_form():
    """z_y - z_j - eps |w_y - w_j|_1, and the batches make no difference."""
    net, (x, y) = linear().double(), batch(50, 10, torch.float64)
    y[::2] = net(x).argmax(1)[::2]
    z, weight = net(x).detach(), net[1].weight.detach()
    gaps = z.gather(1, y[:, None]) - z - 0.003 * (weight[y][:, None] - weight).abs().sum(2)
    margins = gaps.scatter(1, y[:, None], torch.inf).amin(1)
    before, around = state(net), surroundings()
    found = certify_intervals(net.train(), (x, y), 0.003, bounds=None, batch_size=7)
    assert state(net) == before
    assert surroundings() == around
    torch.testing.assert_close(found.margins, margins, **EXACT)
    assert torch.equal(found.certified, margins > 0)
    assert torch.equal(found.right, z.argmax(1) == y)
    assert 0 < found.certified_accuracy < found.clean_accuracy < 1
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    assert torch.equal(certify_intervals(net, batches, 0.003, bounds=None).certified, found.certified)
    assert f"clean       {found.clean_accuracy:7.2%}  [" in str(found)
    assert f"certified   {found.certified_accuracy:7.2%}  [" in str(found)
    assert "linf eps 0.003, 50 samples, by ibp" in str(found)


def test_what_the_model_gets_wrong_is_never_certified():
    x, net = batch(20)[0], linear()
    found = certify_intervals(net, (x, net(x).argmin(1)), 0.0)
    assert found.certified_accuracy == found.clean_accuracy == 0
    assert bool((found.margins < 0).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": -0.1}, "eps must be a finite number >= 0"),
        ({"method": "crwn"}, "did you mean 'crown'"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"data": (batch()[0] + 1, batch()[1])}, "x must lie in bounds"),
        ({"data": (batch()[0], batch()[1] + 10)}, r"y must be labels in \[0, 10\)"),
        ({"data": (batch()[0], torch.rand(6, 10))}, "y must be integer labels"),
        ({"model": cnn().append(nn.Softmax(1))}, "know no Softmax"),
    ],
)
def test_bad_arguments_of_certify_intervals(arguments, message):
    with pytest.raises(ValueError, match=message):
        certify_intervals(**{"model": linear(), "data": batch(), "eps": 0.1} | arguments)


# ------------------------------------------------------------------------------------------------------------ auto_LiRPA


def test_without_auto_lirpa_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)
    with pytest.raises(ValueError, match=r"method='crown' needs the package auto_LiRPA .*pip install git\+https"):
        certify_intervals(linear(), batch(), 0.1, "crown")


def test_what_auto_lirpa_is_asked_for(monkeypatch):
    """Bounds of z_j - z_y inside ball and box, by its name of the method; here a stand-in with our own bounds answers."""
    asked = []

    class BoundedModule:
        def __init__(self, model, x, device):
            assert not any(m.training for m in model.modules())
            self.model = model

        def compute_bounds(self, x, C, method, bound_lower):  # noqa: N803
            asked.append(method)
            (images,) = x
            lower, upper = interval_bounds(self.model, images.x_L, images.x_U)
            torch.rand(3)  # it may draw
            return None, (C.clamp(min=0) @ upper[..., None] + C.clamp(max=0) @ lower[..., None])[..., 0]

    fake = types.ModuleType("auto_LiRPA")
    fake.BoundedModule = BoundedModule
    fake.PerturbationLpNorm = lambda norm, x_L, x_U: types.SimpleNamespace(norm=norm, x_L=x_L, x_U=x_U)  # noqa: N803
    fake.BoundedTensor = lambda x, around: around
    monkeypatch.setitem(sys.modules, "auto_LiRPA", fake)
    x, y = batch(6, 5, torch.float64)
    net = deep()
    before, around = state(net), surroundings()
    plain = worst_logits(nn.Sequential(net, nn.Identity()), x, y, 0.1).detach()  # without elision, as the stand-in
    for method, name in lirpa.METHODS.items():
        found = certify_intervals(net, (x, y), 0.1, method)
        torch.testing.assert_close(found.margins, -plain.scatter(1, y[:, None], -torch.inf).amax(1), **EXACT)
        assert asked.pop() == name
        assert f"by {method}" in str(found)
    assert state(net) == before
    assert surroundings() == around


def test_auto_lirpa_itself_is_tighter_and_sound():
    pytest.importorskip("auto_LiRPA")
    x, y = batch(4)
    net = cnn()
    before, around = state(net), surroundings()
    loose = certify_intervals(net, (x, y), 0.01)
    tight = certify_intervals(net, (x, y), 0.01, "crown")
    assert state(net) == before
    assert surroundings() == around
    assert float((tight.margins - loose.margins).mean()) > 0
    adv = fastadv.pgd(net, x, y, 0.01, loss="margin", keep_best=True)
    z = net.eval()(adv).detach()
    gaps = (z.gather(1, y[:, None]) - z).scatter(1, y[:, None], torch.inf).amin(1)
    assert bool((tight.margins <= gaps + 1e-4).all())
