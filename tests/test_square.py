"""Square: where its images lie, the optimum on linear models, its windows, and what a sample's result depends on."""

from __future__ import annotations

import math

import pytest
import torch
from models import FailsAt, batch, cnn, count_calls, linear, one_thread, state, surroundings  # noqa: F401
from torch import nn

import fastadv
from fastadv.attacks.square import _L1, _L2, _Linf

NORMS = ("linf", "l2", "l1")
EPS = {"linf": 0.1, "l2": 0.8, "l1": 6.0}
SHAPES = [(3, 8, 8), (1, 5, 9), (12, 7), (30,), (2, 3, 4, 4)]


def lengths(d, norm):
    d = d.double().flatten(1)
    return {"linf": d.abs().amax, "l2": d.norm, "l1": d.abs().sum}[norm](dim=1)


def double(net):
    return net.double()


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 3.0), None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_images_are_in_ball_and_box(norm, dtype, bounds):
    x = batch(8)[0].to(dtype)
    net = linear().to(dtype)
    y = net(x).argmax(1)
    eps = EPS[norm] * torch.tensor([0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 100.0])
    adv = fastadv.Square(net, eps, queries=40, norm=norm, bounds=bounds)(x, y)
    assert adv.dtype == dtype
    assert (lengths(adv.double() - x.double(), norm) <= eps.double() * (1 + 1e-6) + 1e-5).all()
    if bounds is not None:
        assert (adv >= bounds[0]).all()
        assert (adv <= bounds[1]).all()
    assert torch.equal(adv[0], x[0])
    assert (adv[3:] != x[3:]).flatten(1).any(1).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_any_shape(norm, shape):
    """What comes before height and width are channels; a row of pixels is an image of height 1."""
    x, _ = batch(4, shape=shape, dtype=torch.float64)
    net = double(linear(features=math.prod(shape)))
    y = net(x).argmax(1)
    attack = fastadv.Square(net, EPS[norm], queries=100, norm=norm, bounds=None)
    adv = attack(x, y)
    assert adv.shape == x.shape
    assert (lengths(adv - x, norm) <= EPS[norm] * (1 + 1e-9)).all()
    margins = [z.gather(1, y[:, None])[:, 0] - z.masked_fill(torch.eye(10, dtype=bool)[y], -math.inf).amax(1)
               for z in (net(x), net(adv))]  # fmt: skip
    assert (margins[1] < margins[0]).all()


def test_linf_reaches_the_corner_of_a_linear_model():
    """All pixels, those of the last row and column too, and so success is exactly where eps is beyond the distance."""
    w = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 2).double())
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([w, -w]))
        net[1].bias.zero_()
    x = batch(8, shape=(2, 4, 4), dtype=torch.float64)[0] - 0.5
    y = net(x).argmax(1)
    distance = (x.flatten(1) @ w).abs() / w.abs().sum()
    eps = distance * torch.tensor([0.99, 1.01] * 4, dtype=torch.float64)
    attack = fastadv.Square(net, eps, queries=1500, bounds=None)
    adv = attack(x, y)
    assert attack.info.success.tolist() == [False, True] * 4
    corner = x - (eps * (1 - 2 * y.double()))[:, None, None, None] * w.sign().view(2, 4, 4)
    torch.testing.assert_close(adv[::2], corner[::2])
    # With a box a corner is what is left of it.
    attack = fastadv.Square(net, eps, queries=1500, bounds=(-0.5, 0.5))
    torch.testing.assert_close(attack(x, y)[::2], corner[::2].clamp(-0.5, 0.5))


@pytest.mark.parametrize(("norm", "share"), [("l2", 0.65), ("l1", 0.4)])
def test_l2_and_l1_come_near_the_optimum_of_a_linear_model(norm, share):
    """The best that a ball allows lowers the margin by eps times the dual norm of w."""
    x = torch.full((4, 1, 8, 8), 0.5, dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    w = torch.exp(-((rows - 3) ** 2 + (columns - 2) ** 2) / 3).double().flatten()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2).double())
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([w, -w]))
        net[1].bias.copy_(torch.tensor([100.0, 0.0]))
    eps = 0.4
    adv = fastadv.Square(net, eps, queries=1500, norm=norm)(x, torch.zeros(4, dtype=torch.long))
    assert (lengths(adv - x, norm) <= eps).all()
    best = eps * (w.norm() if norm == "l2" else w.abs().max())
    assert ((x - adv).flatten(1) @ w > share * best).all()


@pytest.mark.parametrize("norm", NORMS)
def test_results_belong_to_the_sample(norm):
    """Alone, in another order, among others that are fooled sooner: the same image after the same queries."""
    x, _ = batch(12, dtype=torch.float64)
    net = double(linear())
    y = net(x).argmax(1)
    eps = EPS[norm] * torch.linspace(0.02, 0.6, 12, dtype=torch.float64)
    attack = fastadv.Square(net, eps, queries=150, norm=norm)
    adv, info = attack(x, y), attack.info
    assert 0 < int(info.success.sum()) < 12
    order = torch.tensor([7, 2, 11, 0])
    attack.eps = eps[order]
    again = attack(x[order], y[order], samples=order)
    torch.testing.assert_close(again, adv[order])
    assert torch.equal(attack.info.queries, info.queries[order])
    other = fastadv.Square(net, eps, queries=150, norm=norm, seed=1)(x, y)
    assert not torch.equal(other, adv)


def test_channels_last_images_are_the_same_images():
    x, y = batch(5, dtype=torch.float64)
    net = double(cnn())
    for norm in NORMS:
        attack = fastadv.Square(net, EPS[norm] / 5, queries=60, norm=norm)
        adv = attack(x, y)
        last = attack(x.to(memory_format=torch.channels_last), y)
        assert last.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(last, adv)


def test_a_sample_stops_when_it_is_fooled():
    """The misclassified come back as they are; queries are those that the model saw of the sample."""
    x, _ = batch(16)
    net = linear()
    y = net(x).argmax(1)
    y[:3] = (y[:3] + 1) % 10
    calls = count_calls(net)
    attack = fastadv.Square(net, 0.02, queries=100)
    adv = attack(x, y)
    assert torch.equal(adv[:3], x[:3])
    assert attack.info.queries[:3].tolist() == [2, 2, 2]  # the clean image, and the last look
    assert len(calls) <= attack.info.forwards
    assert sum(map(len, calls)) < 16 * 103
    standing = ~attack.info.success
    assert standing.any()
    assert (attack.info.queries[standing] <= 103).all()  # trials that change nothing ask nothing
    assert (attack.info.queries[standing] > 60).all()
    fooled = attack.info.success[3:]
    assert (attack.info.queries[3:][fooled] < 103).all()


def test_targeted():
    x, _ = batch(6)
    net = linear()
    y = net(x).argsort(1)[:, -2]
    attack = fastadv.Square(net, 0.15, queries=300, targeted=True)
    adv = attack(x, y)
    assert attack.info.success.all()
    assert torch.equal(net(adv).argmax(1), y)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_few_classes_and_no_labels(norm, classes):
    x, _ = batch(6)
    attack = fastadv.Square(linear(classes), 10 * EPS[norm], queries=200, norm=norm)
    attack(x)
    assert attack.info.success.all()


def test_windows_of_the_published_schedule():
    """Sides of squares in a 28x28 image at queries just after each of the published ones, of 10,000."""
    at = (0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001, 6000, 6001, 8000, 8001, 9999)
    halvings = (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9)
    for queries in (10000, 1000):
        attack = fastadv.Square(linear(), 0.1, queries=queries)
        for query, halved in zip(at, halvings, strict=True):
            if query * queries % 10000 == 0:
                assert attack._share(query * queries // 10000) == 0.8 / 2**halved
    x = torch.zeros(1, 1, 28, 28)
    sides = {kind: [kind(**blank(x)).window(0.8 / 2**k) for k in range(10)] for kind in (_Linf, _L2, _L1)}
    assert sides[_Linf] == [(s, s) for s in (25, 18, 13, 9, 6, 4, 3, 2, 2, 1)]
    assert sides[_L2] == sides[_L1] == [(s, s) for s in (25, 19, 13, 9, 7, 5, 3, 3, 3, 3)]
    line = _Linf(**blank(torch.zeros(1, 100)))
    assert line.window(0.8) == (1, 80)
    assert line.window(0.001) == (1, 1)


def blank(x):
    n = torch.zeros(len(x))
    return {
        "adv": x, "x": x, "y": n, "samples": n, "eps": n, "score": n, "standing": n, "queries": n, "dtype": x.dtype,
        "norm": "linf", "lo": 0, "hi": 1, "targeted": False, "draws": None,
    }  # fmt: skip


@pytest.mark.parametrize("queries", [1, 2, 63, 64, 65, 1000, 5000])
def test_each_query_is_made_once(queries):
    attack = fastadv.Square(linear(), 0.1, queries=queries)
    chunks = list(attack._chunks())
    assert [q for chunk in chunks for q in chunk] == list(range(queries))
    assert all(len({attack._share(q) for q in chunk}) == 1 for chunk in chunks)


def test_a_bump_has_length_one_and_two_halves():
    for kind, norm, steep in ((_L2, 2, 1), (_L1, 1, 2)):
        walk = kind(**blank(torch.zeros(1, 3, 9, 9, dtype=torch.float64)))
        for h, w in ((5, 5), (1, 7), (3, 9), (1, 1)):
            down, across = walk.bumps(h, w)
            for bump in (down, across):
                assert bump.norm(norm) == pytest.approx(1)
            torch.testing.assert_close(walk.bumps(w, h)[1], down.T)
        # By hand: pyramids of 2x5 and 3x5 pixels with steps of 1, 1/4, 1/9 in l2, of their squares in l1.
        edge, ring, top = 9.0**-steep, 9.0**-steep + 4.0**-steep, 9.0**-steep + 4.0**-steep + 1
        upper = torch.tensor([[edge, ring, ring, ring, edge], [edge, ring, top, ring, edge]], dtype=torch.float64)
        lower = torch.cat([upper, upper[:1]])
        whole = torch.cat([upper / upper.norm(norm), -lower / lower.norm(norm)])
        torch.testing.assert_close(walk.bumps(5, 5)[0], whole / whole.norm(norm))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(fails):
    x, _ = batch(6)
    net = cnn().train()
    net[1].eval()
    y = cnn().eval()(x).argmax(1)
    model = FailsAt(net, 5) if fails else net
    before = state(model), surroundings()
    attack = fastadv.Square(model, 0.001, queries=20)
    if fails:
        with pytest.raises(RuntimeError, match="as the test asked"):
            attack(x, y)
    else:
        assert not attack(x, y).requires_grad
    assert (state(model), surroundings()) == before


WAYS = [{"engine": "compile"}, {"engine": "auto"}, {"twin": True}, {"engine": "auto", "twin": True}, {"memory": "signs"}]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_every_engine_runs_it(how, no_codegen):
    """The same image: in fp64, and where each pixel counts, rounding decides no comparison."""
    x, _ = batch(6, dtype=torch.float64)
    net = double(linear())
    y = net(x).argmax(1)
    for norm in NORMS:
        plain = fastadv.Square(net, EPS[norm] / 20, queries=400, norm=norm)
        attack = fastadv.Square(net, EPS[norm] / 20, queries=400, norm=norm, **how)
        torch.testing.assert_close(attack(x, y), plain(x, y))
        assert torch.equal(attack.info.success, plain.info.success)
        if how.get("engine") == "compile":
            assert sum(steps for plan, steps in attack.stats.steps.items() if plan.startswith("compile")) > 100
        assert bool(attack.stats.choices) == (how == {"engine": "auto"})  # a twin that only answers is compiled already


def test_low_precision_passes_have_no_last_word():
    """Who fools the model in bf16 alone goes on, if only in the next chunk of queries."""
    x, _ = batch(32)
    net = linear()
    with torch.no_grad():
        net[1].bias += 20  # where bf16 rounds to eighths
    y = net(x).argmax(1)
    attack = fastadv.Square(net, 0.02, queries=200, precision="bf16")
    adv = attack(x, y)
    fooled = net(adv).argmax(1) != y
    assert torch.equal(fooled, attack.info.success)
    assert (attack.info.queries[~fooled] > 20).all()
    assert 0 < int(fooled.sum()) < 32


@pytest.mark.parametrize("n", [0, 1])
def test_few_samples(n):
    x, y = batch(3)
    attack = fastadv.Square(linear(), 0.1, queries=10)
    assert attack(x[:n], y[:n]).shape == x[:n].shape
    assert attack.info.success.shape == (n,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": None}, "eps must be a finite number >= 0"),
        ({"queries": 0}, "queries must be an integer >= 1"),
        ({"p_init": 0.0}, "p_init must be a finite number > 0"),
        ({"p_init": 1.5}, r"p_init must be in \(0, 1\]"),
        ({"norm": "l0"}, "norm must be one of 'linf', 'l2', 'l1'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        fastadv.Square(linear(), **{"eps": 0.1, **settings})


def test_as_a_function():
    x, y = batch(3)
    ours = fastadv.square(linear(), x, y, 0.05, queries=20, norm="l2")
    assert torch.equal(ours, fastadv.Square(linear(), 0.05, 20, norm="l2")(x, y))
