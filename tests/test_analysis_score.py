"""SCORE's errors against closed forms in one dimension, its theorem, its gradients, and the toy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from models import FailsAt, batch, cnn, one_thread, seed, state, surroundings  # noqa: F401
from torch import Tensor, nn

from fastadv.analysis.score import (
    DISTANCES,
    Grid,
    gradient_alignment,
    robust_errors,
    robust_optimum,
    score_toy,
    toy_grid,
    toy_truth,
)

WEIGHTS = torch.tensor([1.0, -2.0, 0.5]).double()
REACH = {"linf": 3.5, "l2": math.sqrt(5.25), "l1": 2.0}  # by how much <WEIGHTS, x> moves in a ball of radius 1: its dual norm


def logistic(slope: float, shift: float = 0.0):
    """p(1 | x) = sigmoid(slope (t - shift)) where t is x, or <WEIGHTS, x>."""

    def logits(x: Tensor) -> Tensor:
        t = x.flatten(1)[:, 0] if x[0].numel() == 1 else x @ WEIGHTS
        return torch.stack([torch.zeros_like(t), slope * (t - shift)], 1)

    return logits


def network(number: int, features: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        return nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def inputs(n: int = 50, features: int = 1) -> Tensor:
    return torch.randn(n, features, generator=seed(n), dtype=torch.float64)


def binary(p: Tensor, q: Tensor, distance: str) -> Tensor:
    """Between the distributions of two classes whose second has probability p, q."""
    if distance == "kl":
        return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return {"se": 2 * (p - q).square(), "l2": math.sqrt(2) * (p - q).abs(), "l1": 2 * (p - q).abs()}[distance]


# ------------------------------------------------------------------------------------------------------- robust errors


@pytest.mark.parametrize("distance", DISTANCES)
def test_closed_forms_on_the_line(distance):
    """Each distance is convex in q, and q rises with x': the worst x' is an end of the interval."""
    x, eps, a, b = inputs(), 0.4, 2.0, 1.3
    p = (a * x[:, 0]).sigmoid()
    found = robust_errors(logistic(b), logistic(a), x, eps, distance)
    torch.testing.assert_close(found.standard, binary(p, (b * x[:, 0]).sigmoid(), distance), rtol=0, atol=1e-10)
    for slope, error in ((b, found.robust), (a, found.variation)):
        ends = [binary(p, (slope * (x[:, 0] + end)).sigmoid(), distance) for end in (-eps, eps)]
        torch.testing.assert_close(error, torch.maximum(*ends), rtol=0, atol=1e-10)
    fine = x + torch.linspace(-eps, eps, 20_001, dtype=torch.float64)
    everywhere = binary((a * fine).sigmoid(), (b * fine).sigmoid(), distance).amax(1)
    assert (found.consistent <= everywhere + 1e-12).all()
    torch.testing.assert_close(found.consistent, everywhere, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_truth_itself(distance):
    found = robust_errors(logistic(2.0), logistic(2.0), inputs(), 0.3, distance)
    assert found.consistent.abs().max() < 1e-10
    torch.testing.assert_close(found.robust, found.variation)
    assert found.robust.min() > 1e-6
    still = robust_errors(logistic(1.0), logistic(2.0), inputs(), 0.0, distance)
    for error in (still.robust, still.consistent):
        torch.testing.assert_close(error, still.standard, rtol=0, atol=1e-12)
    assert still.variation.abs().max() < 1e-12


@pytest.mark.parametrize("norm", REACH)
@pytest.mark.parametrize("distance", ["kl", "l2"])
def test_pgd_finds_what_the_line_tells(norm, distance):
    """Where only <WEIGHTS, x> matters, a ball is an interval of as many times its radius as the dual norm says."""
    x, eps = inputs(10, 3), 0.2
    model, truth = logistic(1.0, 0.3), logistic(1.5)
    by_pgd = robust_errors(model, truth, x, eps, distance, norm, steps=20, restarts=1)
    on_line = robust_errors(model, truth, (x @ WEIGHTS)[:, None], eps * REACH[norm], distance)
    for name in ("standard", "robust", "consistent", "variation"):
        found, expected = vars(by_pgd)[name], vars(on_line)[name]
        assert (found <= expected * (1 + 1e-4) + 1e-9).all(), name
        torch.testing.assert_close(found, expected, rtol=0.05, atol=1e-5, msg=name)  # from below
    again = robust_errors(model, truth, x, eps, distance, norm, steps=20, restarts=1, batch_size=4)
    torch.testing.assert_close(again.consistent, by_pgd.consistent, rtol=0, atol=1e-12)


@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_the_triangle_inequality_binds_each_input(distance):
    tight = []
    for number in range(10):
        truth = network(2 * number)
        for model in (truth, network(2 * number + 1)):
            found = robust_errors(model, truth, inputs(40), 0.5, distance)
            low, high = found.between()
            assert (found.consistent >= low - 1e-12).all()
            assert (found.consistent <= high + 1e-12).all()
            tight += [float((found.consistent - low).min()), float((high - found.consistent).min())]
    assert min(tight) < 1e-3


def test_bounds_are_kept():
    x = torch.rand(20, 1, generator=seed()).double()
    steep = robust_errors(logistic(4.0), logistic(4.0), x, 0.5, "l1", bounds=(0.0, 1.0))
    ends = [binary((4 * x[:, 0]).sigmoid(), (4 * (x[:, 0] + e).clamp(0, 1)).sigmoid(), "l1") for e in (-0.5, 0.5)]
    torch.testing.assert_close(steep.variation, torch.maximum(*ends), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="x must lie in bounds"):
        robust_errors(logistic(1.0), logistic(1.0), x + 1, 0.5, bounds=(0.0, 1.0))


@pytest.mark.parametrize("fails", [False, True])
def test_models_are_left_as_found(fails):
    (x, y), model, truth = batch(4), cnn().train(), cnn(seed=1).train()
    model[1].eval()
    before = state(model), state(truth), surroundings()
    if fails:
        with pytest.raises(RuntimeError):
            robust_errors(FailsAt(model, 3), truth, x, 0.1, bounds=(0, 1), steps=2)
        with pytest.raises(RuntimeError):
            gradient_alignment(model, FailsAt(truth, 0), x, y)
    else:
        first, second = (robust_errors(model, truth, x, 0.1, bounds=(0, 1), steps=2, restarts=1) for _ in range(2))
        assert torch.equal(first.consistent, second.consistent)
        gradient_alignment(model, truth, x, y)
    assert (state(model), state(truth), surroundings()) == before


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("norm", REACH)
def test_gradients_of_linear_models(norm):
    """grad log p(y | x) = W_y - sum of p_k W_k."""
    ours, theirs = (nn.Linear(6, 4).double() for _ in range(2))
    x, y = inputs(9, 6), torch.arange(9) % 4
    found = gradient_alignment(ours, theirs, x, y, norm, batch_size=4)
    g, h = (f.weight.detach()[y] - f(x).detach().softmax(1) @ f.weight.detach() for f in (ours, theirs))
    order = {"linf": 1, "l2": 2, "l1": math.inf}[norm]
    torch.testing.assert_close(found.robust, torch.linalg.vector_norm(g, order, dim=1), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.consistent, torch.linalg.vector_norm(g - h, order, dim=1), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.cosine, (g * h).sum(1) / g.norm(dim=1) / h.norm(dim=1), rtol=0, atol=1e-12)


def test_aligned_and_opposed_gradients():
    x, y = inputs(7, 3), torch.arange(7) % 2
    same = gradient_alignment(logistic(2.0), logistic(2.0), x, y)
    assert same.consistent.max() < 1e-12
    assert same.cosine.min() > 1 - 1e-9
    opposed = gradient_alignment(logistic(-1.0), logistic(2.0), x, y)
    assert opposed.cosine.max() < -1 + 1e-9
    assert (opposed.consistent > opposed.robust).all()


def test_they_are_the_first_order_of_the_errors():
    """Over the corners of a small linf ball, the excess loss rises by eps times these terms."""
    model, truth, x, y, eps = network(1, 3), network(2, 3), inputs(8, 3), torch.arange(8) % 3, 1e-6
    corners = eps * torch.tensor(list(itertools.product([-1, 1], repeat=3))).double()

    def log_p(f: nn.Module, points: Tensor) -> Tensor:
        return f(points).log_softmax(-1).gather(-1, y.view(-1, *[1] * (points.dim() - 1)).expand(*points.shape[:-1], 1))[..., 0]

    with torch.no_grad():
        near = x[:, None] + corners
        fixed, moving = log_p(truth, x)[:, None], log_p(truth, near)
        excess = (log_p(truth, x) - log_p(model, x))[:, None]
        robust = (fixed - log_p(model, near) - excess).amax(1) / eps
        consistent = (moving - log_p(model, near) - excess).amax(1) / eps
    found = gradient_alignment(model, truth, x, y)
    torch.testing.assert_close(found.robust, robust, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.consistent, consistent, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- the toy


def test_the_toy_s_distribution():
    x = torch.linspace(-25, 25, 100_001, dtype=torch.float64)
    density = toy_truth(x[:, None]).exp()
    mass = torch.trapezoid(density, x, dim=0)
    torch.testing.assert_close(mass, torch.tensor([5 / 6, 1 / 6], dtype=torch.float64), rtol=0, atol=1e-10)
    p = density[:, 1] / density.sum(1)
    assert float(x[p.argmax()]) == pytest.approx(5 / 3, abs=1e-3)
    assert float(p.max()) == pytest.approx(0.4379, abs=1e-4)


def test_errors_on_the_grid_are_those_on_the_line():
    grid = toy_grid(1.0)
    assert grid.x[1] - grid.x[0] == pytest.approx(0.2)
    torch.testing.assert_close(toy_grid(0.5).x, torch.arange(-40, 41).double() / 4)
    model = network(3)

    def two(x: Tensor) -> Tensor:
        return model(x)[:, :2]

    middle = slice(5, -5)
    found = robust_errors(two, toy_truth, grid.x[middle, None], 1.0)
    logits = two(grid.x[:, None]).detach()
    for name in ("robust", "consistent", "variation"):
        coarse, fine = grid.errors(logits, name, "kl")[middle], vars(found)[name]
        assert (coarse <= fine + 1e-9).all()
        torch.testing.assert_close(coarse, fine, rtol=0.05, atol=0.02)


def test_where_the_ball_is_everything_the_robust_optimum_is_the_prior():
    """The worst x' is then one for all x: a constant is best, and the best constant is the mean of p_d."""
    grid = toy_grid(20.0)
    few = Grid(grid.x[::5], grid.truth[::5], grid.density[::5] / grid.density[::5].sum(), torch.arange(21).expand(21, -1))
    p = few.truth.softmax(1)
    mean = few.density @ p
    information = float(few.density @ (p * (p / mean).log()).sum(1))
    for distance, least in (("kl", information), ("se", float(few.density @ (p - mean).square().sum(1)))):
        error = float(few.density @ few.errors(robust_optimum(few, distance, 100), "robust", distance))
        assert least - 1e-9 <= error <= 1.005 * least
    assert float((grid.density @ grid.truth.softmax(1))[1]) == pytest.approx(1 / 6, abs=1e-4)
    assert grid.near.min() == 0
    assert grid.near.amax() == len(grid.x) - 1


@pytest.mark.parametrize("distance", ["kl", "se"])
def test_the_robust_optimum_of_three_points(distance):
    """Against all triples of probabilities on a fine grid; each point sees itself and its neighbours."""
    p = torch.tensor([0.2, 0.9, 0.4], dtype=torch.float64)
    near = torch.tensor([[0, 0, 1], [0, 1, 2], [1, 2, 2]])
    grid = Grid(torch.arange(3.0), torch.stack([1 - p, p], 1).log(), torch.tensor([0.5, 0.2, 0.3]).double(), near)
    found = float(grid.density @ grid.errors(robust_optimum(grid, distance, steps=200), "robust", distance))
    q = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    far = binary(p[:, None], q, distance)  # [3, 99], from each point to each value
    axes = [(99, 1, 1), (1, 99, 1), (1, 1, 99)]
    worst = [
        torch.stack(torch.broadcast_tensors(*(far[i].view(axes[j]) for j in row))).amax(0) * grid.density[i]
        for i, row in enumerate(near.tolist())
    ]
    assert found == pytest.approx(float(sum(worst).min()), rel=2e-3)
    fit = grid.fit(grid.truth)
    assert max(fit.consistent, fit.standard) < 1e-12
    assert fit.robust > 1.3 * found or distance == "se"


def test_the_toy_shows_that_the_robust_error_oversmooths():
    before = torch.get_rng_state()
    found = score_toy(pairs=(6_000,), steps=100)
    assert torch.equal(torch.get_rng_state(), before)
    robust, _, consistent = found.fits[6_000].values()
    assert found.optimum.robust < robust.robust < found.truth.robust
    assert found.optimum.standard > 0.005
    assert consistent.standard < robust.standard / 2
    assert consistent.consistent < robust.consistent / 2
    assert consistent.curve.max() > 0.4
    assert robust.curve[found.x.abs() < 3].max() < 0.38
    assert int(found.pairs[6_000].sum()) == 6_000


@torch.inference_mode()
def test_under_inference_mode():
    x, y = inputs(6, 3), torch.arange(6) % 2
    found = robust_errors(logistic(1.0), logistic(2.0), x, 0.1, steps=5)
    assert (found.robust > found.standard).all()
    assert gradient_alignment(logistic(1.0), logistic(2.0), x, y).cosine.min() > 0.99
    first, second = (score_toy(pairs=(30,), steps=3).fits[30]["robust, KL"] for _ in range(2))
    assert torch.equal(first.curve, second.curve)


def test_what_they_say_and_draw():
    x, y = inputs(20, 3), torch.arange(20) % 2
    metric = robust_errors(logistic(1.0), logistic(2.0), x, 0.1, "l1", steps=5, restarts=1)
    other = robust_errors(logistic(1.0), logistic(2.0), x[:, :1], 0.1)
    assert "had to lie between" in str(metric)
    assert "had to lie between" not in str(other)
    alignment = gradient_alignment(logistic(1.0), logistic(2.0), x, y)
    assert "input gradients is 1.000" in str(alignment)
    toy = score_toy(pairs=(30, 6), steps=2)
    assert "Networks trained on 30 pairs" in str(toy)
    pytest.importorskip("matplotlib")
    assert len(metric.figure().axes[0].patches) == 4
    assert len(metric.figure().axes[0].lines) > len(other.figure().axes[0].lines)
    assert alignment.figure().axes[0].get_xlabel().startswith("robust")
    assert len(toy.figure().axes) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"distance": "tv"}, "distance must be one of 'kl', 'se', 'l2', 'l1'; got 'tv'"),
        ({"norm": "l0"}, "norm must be one of"),
        ({"eps": -1.0}, "eps must be"),
        ({"steps": 0}, "steps must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"x": torch.zeros(0, 1)}, "x must hold an input"),
        ({"x": torch.zeros(3, dtype=torch.int64)}, "x must be a floating tensor"),
        ({"model": lambda x: x}, r"model\(x\) must return floating logits"),
        ({"truth": lambda x: x}, r"truth\(x\) must return floating logits"),
        ({"model": lambda x: torch.zeros(len(x), 3)}, r"model\(x\) must be \[4, 2\] like truth\(x\); got \[4, 3\]"),
    ],
)
def test_bad_input(change, expected):
    arguments = {"model": logistic(1.0), "truth": logistic(1.0), "x": torch.zeros(4, 1), "eps": 0.1} | change
    with pytest.raises(ValueError, match=expected):
        robust_errors(**arguments)


def test_bad_labels_and_toys():
    x = torch.zeros(4, 1)
    for y, expected in (
        (torch.zeros(3).long(), "y must be integer labels"),
        (torch.zeros(4, 2), "y must be integer labels of one input or more"),
        (torch.full((4,), 2), r"y must be labels in \[0, 2\)"),
    ):
        with pytest.raises(ValueError, match=expected):
            gradient_alignment(logistic(1.0), logistic(1.0), x, y)
    with pytest.raises(ValueError, match="does not depend on x"):
        gradient_alignment(lambda x: torch.zeros(len(x), 2), logistic(1.0), x, torch.zeros(4).long())
    for arguments, expected in (
        ({"pairs": ()}, "pairs must hold"),
        ({"pairs": (0,)}, "each of pairs"),
        ({"eps": 0.0}, r"eps must be in \[0.05, 20\]"),
        ({"steps": 0}, "steps"),
    ):
        with pytest.raises(ValueError, match=expected):
            score_toy(**arguments)
