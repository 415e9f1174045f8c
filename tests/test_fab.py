"""FAB and FAB-T: as near as can be where that is known, the reference's own steps, and the contracts of attacks."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from models import (  # noqa: F401
    SYNCS,
    FailsAt,
    NaNGradient,
    Ops,
    batch,
    cnn,
    count_calls,
    digits,
    linear,
    one_thread,
    state,
    surroundings,
    trained_lenet,
)
from torch import nn

import fastadv
from fastadv import FAB, FABT
from fastadv.attacks.norms import norms
from fastadv.reference import step as reference

NORMS = ("linf", "l2", "l1")
EPS = {"linf": 0.1, "l2": 0.5, "l1": 1.5}  # of 8x8 digits: about half of them fall
ATTACKS = {"fab": FAB, "fabt": FABT, "targeted": functools.partial(FAB, targeted=True)}


def nearest(net, x, y, norm, bounds):
    """Distances [N] to the boundaries of a linear classifier inside the box, exactly."""
    weight, logits = net[1].weight.detach(), net(x).detach()
    lo, hi = (-math.inf, math.inf) if bounds is None else bounds
    distances = torch.full((len(x), len(weight)), math.inf, dtype=x.dtype)
    for k in range(len(weight)):
        w = (weight[k] - weight[y]).view_as(x)
        gap = logits[torch.arange(len(x)), y] - logits[:, k]
        d = getattr(reference, f"{norm}_hyperplane")(x, w, gap, lo, hi)
        reached = ((w * d).flatten(1).sum(1) - gap).abs() < 1e-9
        distances[:, k] = torch.where(reached & (k != y), norms(d, norm), math.inf)
    return distances.amin(1)


def classes_of(net, x):
    """What the model says in eval mode."""
    return copy.deepcopy(net).eval()(x).argmax(1)


def problem(classes, n=12):
    """A linear classifier that is right about n images."""
    net = linear(classes).double().eval()
    x, _ = batch(n, dtype=torch.float64)
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None, (-0.5, 1.25)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("kind", [FAB, FABT])
def test_is_as_near_as_a_linear_boundary(kind, classes, norm, bounds):
    net, x, y = problem(classes)
    attack = kind(net, None, steps=20, norm=norm, bounds=bounds)
    adv = attack(x, y)
    exact = nearest(net, x, y, norm, bounds)
    assert attack.info.success.all()
    assert (attack.info.distance >= exact * (1 - 1e-9)).all()
    assert (attack.info.distance <= exact * 1.02).all()
    torch.testing.assert_close(norms(adv - x, norm), attack.info.distance)


@pytest.mark.parametrize("norm", NORMS)
def test_reaches_the_class_that_is_asked_for(norm):
    net, x, y = problem(3)
    wanted = (y + 1) % 3
    attack = FAB(net, None, steps=40, norm=norm, targeted=True)
    adv = attack(x, wanted)
    assert (net(adv).argmax(1) == wanted).all()
    two, x2, y2 = problem(2)
    attack = FAB(two, None, steps=20, norm=norm, targeted=True)
    attack(x2, 1 - y2)
    assert (attack.info.distance <= nearest(two, x2, y2, norm, (0.0, 1.0)) * 1.02).all()


def handwritten_fabt(net, x, y, norm, steps, targets):
    """FAB-T as the reference implementation writes it, on the sorting projection."""
    best, best_norm = x.clone(), torch.full((len(x),), math.inf, dtype=x.dtype)
    rows, each = torch.arange(len(x)), (-1, *[1] * (x.dim() - 1))
    order = net(x).detach().sort(dim=1).indices
    project = getattr(reference, f"{norm}_hyperplane")
    for k in range(2, targets + 2):
        other, x1 = order[:, -k], x.clone()
        for _ in range(steps):
            point = x1.clone().requires_grad_()
            logits = net(point)
            df = logits[rows, other] - logits[rows, y]
            (w,) = torch.autograd.grad(df.sum(), point)
            df = df.detach()
            d1 = project(x1, w, -df, 0, 1)
            d2 = project(x, w, -df + (w * (x1 - x)).flatten(1).sum(1), 0, 1)
            a1, a2 = norms(d1, norm).clamp(min=1e-8), norms(d2, norm).clamp(min=1e-8)
            alpha = (a1 / (a1 + a2)).clamp(max=0.1).view(each)
            x1 = ((x1 + 1.05 * d1) * (1 - alpha) + (x + 1.05 * d2) * alpha).clamp(0, 1)
            adversarial, distance = net(x1).argmax(1) != y, norms(x1 - x, norm)
            better = adversarial & (distance < best_norm)
            best, best_norm = torch.where(better.view(each), x1, best), torch.where(better, distance, best_norm)
            x1 = torch.where(adversarial.view(each), x + 0.9 * (x1 - x), x1)
    return best, best_norm


@pytest.mark.parametrize("norm", NORMS)
def test_takes_the_steps_of_the_reference(norm):
    x, _ = batch(dtype=torch.float64)
    net = cnn().double().eval()
    y = net(x).argmax(1)
    expected, distance = handwritten_fabt(net, x, y, norm, 12, 3)
    attack = FABT(net, None, targets=3, steps=12, norm=norm)
    torch.testing.assert_close(attack(x, y), expected, rtol=0, atol=1e-6)
    assert torch.equal(attack.info.success, distance.isfinite())


@pytest.mark.parametrize("norm", NORMS)
def test_untargeted_takes_the_nearest_of_all_linearised_boundaries(norm):
    x, _ = batch(30, dtype=torch.float64)
    net = cnn().double().eval()
    y = net(x).argmax(1)
    point = x.clone().requires_grad_()
    logits, moves = net(point), []
    for k in range(10):
        df = logits[:, k] - logits.gather(1, y[:, None])[:, 0]
        (w,) = torch.autograd.grad(df.sum(), point, retain_graph=True)
        move = getattr(reference, f"{norm}_hyperplane")(x, w, -df.detach())
        moves.append(torch.where((y == k).view(-1, 1, 1, 1), math.inf, move))
    chosen = torch.stack([norms(move, norm) for move in moves]).argmin(0)
    adv = FAB(net, 1e6, steps=1, norm=norm, bounds=None, beta=1)(x, y)
    torch.testing.assert_close(adv, x + 1.05 * torch.stack(moves)[chosen, torch.arange(30)], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("norm", "chosen"), [("linf", 2), ("l2", 1), ("l1", 1)])
def test_how_near_a_boundary_is_depends_on_the_norm(norm, chosen):
    """One weight of 2, or four of 0.9: 1/2 and 1/3.6 away in linf, 1/2 and 1/1.8 in l2, 1/2 and 1/0.9 in l1."""
    net = nn.Linear(4, 3).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0] * 4, [2.0, 0, 0, 0], [0.9] * 4]))
        net.bias.copy_(torch.tensor([1.0, 0, 0]))
    x = torch.zeros(1, 4, dtype=torch.float64)
    assert net(FAB(net, None, steps=1, norm=norm, bounds=None)(x)).argmax() == chosen


# ------------------------------------------------------------------------------------------------------- ball and box


@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_result_is_in_ball_and_box_and_success_says_so(norm, dtype, kind):
    x, y = digits()
    x, y, net = x[1200:1240].to(dtype), y[1200:1240], trained_lenet()
    model = lambda z: net(z.float())  # noqa: E731
    eps = EPS[norm] * torch.linspace(0, 2, len(x))
    attack = ATTACKS[kind](model, eps, steps=8, norm=norm)
    adv = attack(x, (y + 1) % 10 if kind == "targeted" else y)
    assert adv.dtype == dtype
    assert adv.min() >= 0
    assert adv.max() <= 1
    distance = norms(adv.double() - x.double(), norm)
    assert (distance <= eps.double() * (1 + 1e-5) + 1e-6).all()
    wrong = model(adv).argmax(1) == (y + 1) % 10 if kind == "targeted" else model(adv).argmax(1) != y
    assert torch.equal(attack.info.success, wrong)
    assert wrong.any()
    assert not wrong.all()
    assert (distance[~wrong] >= 0.1 * eps[~wrong]).all()  # who stands gets the best there is, not x


def test_misclassified_images_are_their_own_nearest():
    net, x, y = problem(10)
    wrong = (y + torch.arange(len(y)) % 2) % 10
    for attack in (FAB(net, None, steps=3), FABT(net, 0.1, steps=3, early_stop=True)):
        adv = attack(x, wrong)
        assert torch.equal(adv[1::2], x[1::2])
        assert (attack.info.distance[1::2] == 0).all()
        assert (attack.info.distance[::2] > 0).all()
        assert (attack.info.queries[1::2] < attack.info.queries[0]).all() or not attack.early_stop


@pytest.mark.parametrize("kind", [FAB, FABT])
@pytest.mark.parametrize("norm", NORMS)
def test_early_stop_fools_the_same_samples_with_fewer_passes(norm, kind):
    x, y = digits()
    x, y = x[1200:1300], y[1200:1300]
    whole = kind(trained_lenet(), EPS[norm], steps=20, norm=norm)
    stopped = kind(trained_lenet(), EPS[norm], steps=20, norm=norm, early_stop=True)
    far, near = stopped(x, y), whole(x, y)
    assert torch.equal(stopped.info.success, whole.info.success)
    assert 20 < stopped.info.success.sum() < 90
    fooled = whole.info.success
    assert (stopped.info.distance[fooled] <= EPS[norm]).all()
    assert (stopped.info.distance >= whole.info.distance)[fooled].all()
    assert not torch.equal(far, near)
    assert stopped.info.queries.sum() < 0.9 * whole.info.queries.sum()
    assert (stopped.info.queries[~fooled] == whole.info.queries[~fooled]).all()
    assert torch.equal(stopped(x[:0], y[:0]), x[:0])


def test_restarts_bring_nearer_images_and_keep_those_found():
    x, y = digits()
    x, y = x[1200:1240], y[1200:1240]
    for norm in NORMS:
        once = FABT(trained_lenet(), None, targets=1, steps=30, norm=norm)
        thrice = FABT(trained_lenet(), None, targets=1, steps=30, norm=norm, restarts=3)
        once(x, y), thrice(x, y)
        assert (thrice.info.distance <= once.info.distance).all()
        assert (thrice.info.distance < once.info.distance).any()
        other = FABT(trained_lenet(), None, targets=1, steps=30, norm=norm, restarts=3, seed=1)
        other(x, y)
        assert not torch.equal(other.info.distance, thrice.info.distance)


@pytest.mark.parametrize("norm", NORMS)
def test_restarts_begin_at_half_of_the_radius(norm):
    net, x, y = problem(10)
    calls = count_calls(net)
    FABT(net, 1e-3, targets=1, steps=1, norm=norm, restarts=2, bounds=None)(x, y)
    start = calls[3]  # after the clean images, and two calls of the first step
    torch.testing.assert_close(norms(start - x, norm), torch.full((len(x),), 5e-4, dtype=x.dtype))


# ---------------------------------------------------------------------------------------------------------- contracts


@pytest.mark.parametrize("kind", [FAB, FABT])
def test_two_forwards_a_step(kind):
    net, x, y = problem(4)
    calls = count_calls(net)
    attack = kind(net, None, steps=5)
    attack(x, y)
    starts = 1 if kind is FAB else 3
    assert len(calls) == attack.info.forwards == 1 + 2 * 5 * starts + 1
    assert (attack.info.queries == len(calls)).all()


@pytest.mark.parametrize("settings", [{}, {"early_stop": True}, {"restarts": 2}], ids=str)
@pytest.mark.parametrize("kind", ATTACKS)
def test_results_do_not_depend_on_the_batch(kind, settings):
    x, y = digits()
    x, y = x[1200:1230].double(), y[1200:1230]
    y = (y + 1) % 10 if kind == "targeted" else y
    net = double_lenet()
    attack = ATTACKS[kind](net, 0.12, steps=6, **settings)
    whole = attack(x, y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for chosen in (order, torch.arange(7), torch.arange(29, 30)):
        part = attack(x[chosen], y[chosen], samples=chosen)
        torch.testing.assert_close(part, whole[chosen], rtol=0, atol=1e-9)


@functools.cache
def double_lenet():
    return copy.deepcopy(trained_lenet()).double()


@pytest.mark.parametrize("kind", ATTACKS)
def test_the_model_is_left_as_found(kind):
    x, _ = batch()
    net = cnn()
    y = classes_of(net, x)
    y = (y + 1) % 10 if kind == "targeted" else y
    net(x).sum().backward()
    before, around = state(net), surroundings()
    ATTACKS[kind](net, 0.1, steps=2, restarts=2)(x, y)
    assert state(net) == before
    failing = FailsAt(net, 4)
    with pytest.raises(RuntimeError, match="as the test asked"):
        ATTACKS[kind](failing, 0.1, steps=2)(x, y)
    assert state(net) == before
    assert surroundings() == around


@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_does_not_wait_for_the_device(kind, norm):
    x, y = batch()
    attack = ATTACKS[kind](cnn(), None, norm=norm)
    seen = []
    for steps in (1, 3):
        attack.steps = steps
        with Ops() as ops:
            attack(x, y)
        seen.append(sum(op in SYNCS for op in ops.names))
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "settings", [{"twin": True}, {"precision": "bf16"}, {"precision": "fp16"}, {"memory": "signs"}], ids=str
)
@pytest.mark.parametrize("kind", ATTACKS)
def test_other_engines_find_about_the_same(kind, settings):
    x, y = digits()
    x, y = x[1200:1230], y[1200:1230]
    y = (y + 1) % 10 if kind == "targeted" else y
    plain, other = (ATTACKS[kind](trained_lenet(), None, steps=20, norm="l2", **s) for s in ({}, settings))
    plain(x, y), other(x, y)
    assert torch.equal(other.info.success, plain.info.success)
    loose = 0.1 if "precision" in settings else 1e-3
    found = plain.info.success
    assert found.sum() >= 28
    torch.testing.assert_close(other.info.distance[found].mean(), plain.info.distance[found].mean(), rtol=loose, atol=0)


@pytest.mark.usefixtures("no_codegen")
def test_compiled_steps_find_the_same():
    x, y = digits()
    x, y = x[1200:1210], y[1200:1210]
    plain, compiled = (FABT(trained_lenet(), None, targets=2, steps=5, engine=e) for e in ("eager", "compile"))
    plain(x, y), compiled(x, y), compiled(x, y)
    assert any("compile" in name for name in compiled.stats.steps)
    torch.testing.assert_close(compiled.info.distance, plain.info.distance, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ATTACKS)
def test_nothing_is_nan(kind, norm, bounds):
    """A gradient that is NaN, and one that is zero, for some of the images only."""
    x, _ = batch()
    net = cnn().eval()
    y = classes_of(net, x)
    y = (y + 1) % 10 if kind == "targeted" else y
    attack = ATTACKS[kind](NaNGradient(net, 2), None, steps=4, norm=norm, bounds=bounds)
    adv = attack(x, y)
    assert adv.isfinite().all()
    assert (adv != x).flatten(1).any(1).tolist() == [True, True, False, True, True, True]
    flat = lambda z: net(z) * (z.flatten(1)[:, :1] > 0.5)  # noqa: E731
    assert ATTACKS[kind](flat, 0.1, steps=4, norm=norm, bounds=bounds)(x, y).isfinite().all()


@pytest.mark.parametrize("kind", ATTACKS)
def test_samples_without_channels_and_labels(kind):
    net = nn.Linear(5, 3)
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    y = net(x).argmax(1)
    if kind != "targeted":
        assert torch.equal(ATTACKS[kind](net, None, steps=5)(x), ATTACKS[kind](net, None, steps=5)(x, y))
    with torch.inference_mode():
        assert ATTACKS[kind](net, 0.3, steps=5)(x[:1], y[:1]).shape == (1, 5)


def test_functions_are_the_classes():
    x, y = batch()
    net = cnn().eval()
    assert torch.equal(fastadv.fab(net, x, y, 0.1, steps=2, norm="l2"), FAB(net, 0.1, steps=2, norm="l2")(x, y))
    assert torch.equal(fastadv.fabt(net, x, y, 0.1, targets=2, steps=2), FABT(net, 0.1, targets=2, steps=2)(x, y))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be an integer >= 1; got 0"),
        ({"restarts": 0}, "restarts must be an integer >= 1; got 0"),
        ({"targets": 0}, "targets must be an integer >= 1; got 0"),
        ({"alpha_max": 1.5}, r"alpha_max must be in \[0, 1\]; got 1.5"),
        ({"eta": 0.9}, r"eta must be in \[1, inf\]; got 0.9"),
        ({"beta": -1}, "beta must be a finite number >= 0; got -1"),
        ({"norm": "l0"}, "norm must be one of"),
        ({"eps": -1.0}, "eps must be"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FABT(cnn(), **{"eps": 0.1, **settings})
