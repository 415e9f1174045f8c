"""Attacks without gradients other than Square: SPSA, RandomNoise, Boundary and HopSkipJump, against linear models above all."""

from __future__ import annotations

import math

import pytest
import torch
from models import FailsAt, batch, cnn, count_calls, linear, one_thread, state, surroundings  # noqa: F401
from torch import nn

import fastadv
from fastadv.attacks.draws import Draws

FEATURES = 24
BLACKBOX = {
    "SPSA": lambda net, eps=0.02, **settings: fastadv.SPSA(net, eps, steps=3, directions=9, **settings),
    "RandomNoise": lambda net, eps=0.02, **settings: fastadv.RandomNoise(net, eps, draws=9, **settings),
    "HopSkipJump": lambda net, eps=None, **settings: fastadv.HopSkipJump(net, eps, steps=2, queries=10, **settings),
    "Boundary": lambda net, eps=None, **settings: fastadv.Boundary(net, eps, steps=25, **settings),
}
MINIMAL = ("HopSkipJump", "Boundary")


@pytest.fixture(params=BLACKBOX)
def name(request):
    return request.param


def lengths(d, norm):
    d = d.double().flatten(1)
    return {"linf": d.abs().amax, "l2": d.norm, "l1": d.abs().sum}[norm](dim=1)


def affine(classes):
    """A linear model, images that it predicts with y, and how far these are from another class in each norm."""
    net = linear(classes, FEATURES).double()
    x, _ = batch(8, shape=(FEATURES,), dtype=torch.float64)
    z, w = net(x), net[1].weight
    y = z.argmax(1)
    gaps, sides = z.gather(1, y[:, None]) - z, w[y][:, None] - w
    others = ~torch.eye(classes, dtype=torch.bool)[y]

    def distance(dual):
        return (gaps / sides.norm(dual, dim=2)).masked_fill(~others, math.inf).amin(1).detach()

    return net, x, y, {"l2": distance(2), "linf": distance(1)}


# ----------------------------------------------------------------------------------------------------- minimum norm


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("norm", "within"), [("l2", 1.03), ("linf", 1.06)])
def test_hopskipjump_finds_the_nearest_point_of_a_linear_boundary(norm, within, classes):
    net, x, y, distance = affine(classes)
    # Of three classes it stays with the boundary that it meets first: not always the nearest, by this seed in all samples.
    attack = fastadv.HopSkipJump(net, steps=20, norm=norm, bounds=None, seed=3)
    adv = attack(x, y)
    assert (net(adv).argmax(1) != y).all()
    assert attack.info.success.all()
    ratio = attack.info.distance / distance[norm]
    assert (ratio > 1 - 1e-9).all()
    assert (ratio < within).all()
    torch.testing.assert_close(attack.info.distance, lengths(adv - x, norm))


def test_boundary_finds_the_nearest_point_of_a_linear_boundary():
    net, x, y, distance = affine(2)
    attack = fastadv.Boundary(net, steps=2500, bounds=None)
    attack(x, y)
    ratio = attack.info.distance / distance["l2"]
    assert (ratio > 1 - 1e-9).all()
    assert (ratio < 1.15).all()
    assert ratio.mean() < 1.07


@pytest.mark.parametrize("name", MINIMAL)
def test_with_eps_a_sample_stops_inside_the_ball(name):
    """And where the ball holds no image that fools, the best is clipped into it."""
    net, x, y, distance = affine(2)
    attack = BLACKBOX[name](net, bounds=None)
    attack.steps, attack.queries = {"HopSkipJump": 20, "Boundary": 2500}[name], 100
    attack(x, y)
    free = attack.info.queries
    attack.eps = distance["l2"] * torch.tensor([1.3, 0.7] * 4, dtype=torch.float64)
    adv = attack(x, y)
    assert attack.info.success.tolist() == [True, False] * 4
    assert (lengths(adv - x, "l2") <= attack.eps * (1 + 1e-12)).all()
    assert (lengths(adv - x, "l2")[1::2] > 0.99 * attack.eps[1::2]).all()
    assert (attack.info.queries[::2] < free[::2]).all()


@pytest.mark.parametrize("name", MINIMAL)
def test_a_start_may_be_given_or_not_be_found(name):
    """Noise fools a constant model never, and a given start that does not fool is no start."""
    net, x, y, _ = affine(2)
    with torch.no_grad():
        net[1].bias.copy_(torch.tensor([-4.0, 4.0]))  # the wrong side is far from any noise in the box
    y = net(x).argmax(1)
    attack = BLACKBOX[name](net)
    assert torch.equal(attack(x, y), x)
    assert not attack.info.success.any()
    assert attack.info.distance.isinf().all()
    with torch.no_grad():
        net[1].bias.zero_()
    y, far = net(x).argmax(1), x.clone()
    side = (net[1].weight[1] - net[1].weight[0]).sign()
    far[:4] = torch.where(side * (1 - 2 * y[:4, None]) > 0, 1.0, 0.0).double()
    attack = BLACKBOX[name](net, start=far)
    adv = attack(x, y)
    assert attack.info.success.tolist() == [True] * 4 + [False] * 4
    assert (lengths(adv - x, "l2")[:4] < lengths(far - x, "l2")[:4]).all()
    with pytest.raises(ValueError, match="start must be like x"):
        BLACKBOX[name](net, start=far[:2])(x, y)
    with pytest.raises(ValueError, match="start must be a tensor"):
        BLACKBOX[name](net, start=1.0)


@pytest.mark.parametrize("name", MINIMAL)
def test_the_misclassified_are_their_own_answer(name):
    net, x, y, _ = affine(3)
    y[:2] = (y[:2] + 1) % 3
    attack = BLACKBOX[name](net, bounds=None)
    adv = attack(x, y)
    assert torch.equal(adv[:2], x[:2])
    assert attack.info.distance[:2].tolist() == [0, 0]
    assert attack.info.queries[:2].tolist() == [2, 2]
    assert (adv[2:] != x[2:]).any(1).all()


def test_only_classes_are_looked_at():
    """A model that tells no more than its decision."""
    net, x, y, distance = affine(3)

    def decides(x):
        return nn.functional.one_hot(net(x).argmax(1), 3).double()

    attack = fastadv.HopSkipJump(decides, steps=10, bounds=None, seed=3)
    attack(x, y)
    assert (attack.info.distance < 1.1 * distance["l2"]).all()


# --------------------------------------------------------------------------------------------------------------- SPSA


def test_the_estimate_of_spsa_is_the_gradient_of_a_linear_loss():
    """E[(g.v) v] = g, with a variance of |g|^2 / directions an element; by Adam the first step is lr times its sign."""
    net, x, y, _ = affine(2)
    attack = fastadv.SPSA(net, 10.0, steps=1, directions=4096, lr=0.03, bounds=None)
    estimates = []
    inner = attack._gradient
    attack._gradient = lambda *args: estimates.append(inner(*args)) or estimates[-1]
    adv = attack(x, y)
    gradient = (net[1].weight[1 - y] - net[1].weight[y]).detach()
    spread = gradient.norm(dim=1, keepdim=True) / 64
    assert ((estimates[0] - gradient).abs() < 5 * spread).all()
    sure = gradient.abs() > 5 * spread
    assert sure.double().mean() > 0.5
    torch.testing.assert_close((adv - x)[sure], (0.03 * gradient.sign())[sure], rtol=0, atol=1e-6)
    assert (attack.info.queries == 1 + 2 * 4096 + 1 + 1).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_spsa_fools_a_linear_model_where_the_ball_allows_it(norm):
    net, x, y, distance = affine(3)
    eps = distance[norm] * torch.tensor([0.95, 1.25] * 4, dtype=torch.float64)
    attack = fastadv.SPSA(net, eps, steps=60, norm=norm, bounds=None)
    adv = attack(x, y)
    assert attack.info.success.tolist() == [False, True] * 4
    assert (lengths(adv - x, norm) <= eps * (1 + 1e-12)).all()


def test_spsa_measures_by_the_span_of_the_bounds():
    net, x, y, _ = affine(2)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, 2).double())
    with torch.no_grad():
        wide[1].weight.copy_(net[1].weight / 10)
        wide[1].bias.copy_(net[1].bias)
    adv = fastadv.SPSA(net, 0.05, steps=5, directions=20)(x, y)
    wider = fastadv.SPSA(wide, 0.5, steps=5, directions=20, bounds=(0, 10))(10 * x, y)
    torch.testing.assert_close(wider, 10 * adv, rtol=1e-4, atol=1e-4)  # Adam's 1e-8 has no scale


def test_signs_are_fair_and_their_own():
    """32 signs of each word: none repeats another."""
    signs = Draws(0, torch.arange(4)).signs(7, 1000)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    correlation = signs @ signs.T / 1000
    assert (correlation - torch.eye(4)).abs().max() < 0.15
    assert signs.mean(1).abs().max() < 0.15
    halves = (signs[:, :-32] * signs[:, 32:]).mean(1), (signs[:, :-1] * signs[:, 1:]).mean(1)
    assert max(float(half.abs().max()) for half in halves) < 0.15


def test_no_draw_is_infinite(monkeypatch):
    """Of 2^24 uniform numbers one is 0, the end of a two-sided exponential."""
    monkeypatch.setattr(Draws, "uniform", lambda *_, dtype: torch.tensor([[0.0, 0.5, 1 - 2.0**-24]], dtype=dtype))
    for dtype in (torch.float32, torch.float64):
        drawn = Draws(0, torch.arange(1)).laplace(0, 3, dtype=dtype)
        torch.testing.assert_close(drawn, math.log(2) * torch.tensor([[24, 0, -23]], dtype=dtype))


# -------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_noise_is_uniform_in_the_ball(norm):
    """The length of a uniform point, to the power of the dimension, is uniform."""
    x = torch.zeros(2000, 4, dtype=torch.float64)
    eps = torch.linspace(0.5, 2, 2000, dtype=torch.float64)
    stand = nn.Sequential(nn.Linear(4, 2).double())
    with torch.no_grad():
        stand[0].weight.zero_()
        stand[0].bias.copy_(torch.tensor([1.0, 0.0]))
    adv = fastadv.RandomNoise(stand, eps, 1, norm, bounds=None)(x, torch.zeros(2000, dtype=torch.long))
    share = (lengths(adv, norm) / eps) ** 4
    assert share.max() <= 1
    assert share.mean() == pytest.approx(0.5, abs=0.03)
    assert share.var() == pytest.approx(1 / 12, abs=0.01)
    assert adv.mean(0).abs().max() < 0.05
    assert torch.corrcoef(adv.T).fill_diagonal_(0).abs().max() < 0.1


def test_noise_returns_the_best_draw():
    net, x, y, distance = affine(3)
    seen = count_calls(net)
    attack = fastadv.RandomNoise(net, distance["linf"] / 2, draws=20, bounds=None)  # nobody can be fooled
    adv = attack(x, y)
    *draws, last = seen
    assert len(draws) == 20
    assert torch.equal(last, adv)

    def margin(images):
        z = net(images)
        return z.scatter(1, y[:, None], -math.inf).amax(1) - z.gather(1, y[:, None])[:, 0]

    margins = torch.stack([margin(images) for images in draws])
    torch.testing.assert_close(margin(adv), margins.amax(0))
    assert (margins.amax(0) > margins.amin(0)).all()


# ------------------------------------------------------------------------------------------------------- contracts


def test_results_belong_to_the_sample(name):
    net, x, y, _ = affine(3)
    attack = BLACKBOX[name](net, bounds=None)
    adv, queries = attack(x, y), attack.info.queries
    order = torch.tensor([6, 1, 4])
    torch.testing.assert_close(attack(x[order], y[order], samples=order), adv[order])
    assert torch.equal(attack.info.queries, queries[order])
    attack.seed = 1
    assert not torch.equal(attack(x, y), adv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_images_are_in_ball_and_box(name, dtype):
    x = batch(6)[0].to(dtype)
    net = linear().to(dtype)
    eps = torch.tensor([0.0, 0.01, 0.02, 0.05, 0.1, 5.0])
    attack = BLACKBOX[name](net, eps, norm="l2")
    adv = attack(x)
    assert adv.dtype == dtype
    assert (lengths(adv.double() - x.double(), "l2") <= eps * (1 + 1e-6) + 1e-5).all()
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert torch.equal(attack.info.success, net(adv).argmax(1) != net(x).argmax(1))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(name, fails):
    x, _ = batch(6)
    net = cnn().train()
    net[1].eval()
    model = FailsAt(net, 4) if fails else net
    y = cnn().eval()(x).argmax(1)
    attack = BLACKBOX[name](model, 0.001)
    if name in MINIMAL:
        attack.start = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    before = state(model), surroundings()
    if fails:
        with pytest.raises(RuntimeError, match="as the test asked"):
            attack(x, y)
    else:
        assert not attack(x, y).requires_grad
    assert (state(model), surroundings()) == before


def test_forwards_and_queries_are_those_of_the_model(name):
    net, x, y, _ = affine(3)
    calls = count_calls(net)
    attack = BLACKBOX[name](net, bounds=None)
    attack(x, y)
    assert len(calls) == attack.info.forwards
    assert int(attack.info.queries.sum()) <= sum(map(len, calls))  # who has left may fill a batch
    if name in MINIMAL:
        assert int(attack.info.queries.sum()) == sum(map(len, calls))


def test_targeted(name):
    net, x, y, _ = affine(3)
    target = (y + 1) % 3
    attack = BLACKBOX[name](net, targeted=True, bounds=None, **({} if name in MINIMAL else {"eps": 3.0}))
    if name == "SPSA":
        attack.steps, attack.lr = 40, 0.05
    adv = attack(x, target)
    assert attack.info.success.any()
    assert torch.equal(net(adv).argmax(1) == target, attack.info.success)
    with pytest.raises(ValueError, match="y, the classes to reach"):
        attack(x)


@pytest.mark.parametrize("how", [{"engine": "compile"}, {"twin": True}], ids=str)
def test_every_engine_runs_it(name, how, no_codegen):
    x, _ = batch(4, dtype=torch.float64)
    net = cnn().double().eval()
    plain, attack = BLACKBOX[name](net), BLACKBOX[name](net, **how)
    for _ in range(2):
        torch.testing.assert_close(attack(x), plain(x))


@pytest.mark.parametrize("n", [0, 1])
def test_few_samples(name, n):
    net, x, y, _ = affine(2)
    attack = BLACKBOX[name](net)
    assert attack(x[:n], y[:n]).shape == x[:n].shape
    assert attack.info.success.shape == (n,)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fastadv.SPSA(linear(), None), "eps must be a finite number >= 0"),
        (lambda: fastadv.SPSA(linear(), 0.1, norm="l1"), "norm must be one of 'linf', 'l2'; got 'l1'"),
        (lambda: fastadv.SPSA(linear(), 0.1, directions=0), "directions must be an integer >= 1"),
        (lambda: fastadv.SPSA(linear(), 0.1, delta=0), "delta must be a finite number > 0"),
        (lambda: fastadv.RandomNoise(linear(), None), "eps must be a finite number >= 0"),
        (lambda: fastadv.RandomNoise(linear(), 0.1, draws=0), "draws must be an integer >= 1"),
        (lambda: fastadv.HopSkipJump(linear(), norm="l1"), "norm must be one of 'l2', 'linf'; got 'l1'"),
        (lambda: fastadv.HopSkipJump(linear(), steps=0), "steps must be an integer >= 1"),
        (lambda: fastadv.HopSkipJump(linear(), gamma=0), "gamma must be a finite number > 0"),
        (lambda: fastadv.Boundary(linear(), norm="linf"), "norm must be one of 'l2'; got 'linf'"),
        (lambda: fastadv.Boundary(linear(), adaptation=1), "adaptation must be a finite number > 1"),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()
