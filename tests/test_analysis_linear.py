"""Minimum-norm interpolation with and without extra rows: the paper's identities, its staircase against SciPy's splines."""

from __future__ import annotations

import pytest
import torch
from models import one_thread, seed  # noqa: F401
from torch import Tensor

from fastadv.analysis.linear import (
    Staircase,
    decompose,
    estimators,
    linear_tradeoff,
    minimum_norm,
    robust_self_training,
    spline_tradeoff,
    squared_error,
)

D = 12


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(number: int):
    """theta, sigma, x_std, x_ext and invariances: sigma skewed, and in every third problem singular; some rows twice."""
    g = seed(number)
    n, m, k = (int(torch.randint(low, 7, (), generator=g)) for low in (1, 0, 0))
    theta, basis = randn(D, generator=g), randn(D, D, generator=g) * torch.logspace(1, -2, D, dtype=torch.float64)[:, None]
    basis = basis[: D - 4] if number % 3 == 0 else basis
    x_std, x_ext = randn(n, D, generator=g), randn(m, D, generator=g)
    x_std = torch.cat([x_std, x_std[:1]])
    invariances = randn(k, D, generator=g)
    invariances -= (invariances @ theta / theta.dot(theta))[:, None] * theta
    return theta, basis.T @ basis, x_std, x_ext, invariances


PROBLEMS = range(60)


def test_minimum_norm_is_in_the_span_of_the_rows():
    g = seed()
    rows, values = randn(4, D, generator=g), randn(4, generator=g)
    theta = minimum_norm(rows, values)
    expected = rows.T @ torch.linalg.solve(rows @ rows.T, values)
    torch.testing.assert_close(theta, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(minimum_norm(rows.repeat(5, 1), values.repeat(5)), expected, rtol=0, atol=1e-12)


def test_the_paper_s_example_in_three_dimensions():
    """One row e_3 and one extra row e_1 + e_2: means where the standard estimator has zeros."""
    theta, variances = torch.tensor([3.0, 1.0, 2.0]).double(), torch.tensor([1.0, 7.0, 4.0]).double()
    std, ext = torch.tensor([[0.0, 0, 1]]).double(), torch.tensor([[1.0, 1, 0]]).double()
    found = decompose(theta, variances.diag(), std, ext)
    assert float(found.standard) == pytest.approx(1 * 9 + 7 * 1, abs=1e-12)
    assert float(found.augmented) == pytest.approx((1 + 7) * (3 - 1) ** 2 / 4, abs=1e-12)
    hurt = decompose(torch.tensor([3.0, 0.0, 2.0]).double(), variances.diag(), std, ext)  # the second feature now never tells
    assert float(hurt.standard) == pytest.approx(9, abs=1e-12)
    assert float(hurt.augmented) == pytest.approx((1 + 7) * 9 / 4, abs=1e-12)
    assert float(hurt.benefit.sum()) == pytest.approx((1 + 7) * 9 / 4, abs=1e-12)  # v = (3/2, 3/2, 0)
    assert float(hurt.cost.sum()) == pytest.approx(-2 * (1 * 9 - 7 * 9) / 4, abs=1e-12)  # w = (3/2, -3/2, 0)
    assert float(hurt.self_trained) == pytest.approx(9 / 8, abs=1e-12)  # (21/8, 3/8): nearest 0 where theta_1 + theta_2 = 3


@pytest.mark.parametrize("number", PROBLEMS)
def test_the_decomposition_is_exact(number):
    theta, sigma, x_std, x_ext, invariances = problem(number)
    found = decompose(theta, sigma, x_std, x_ext, invariances)
    for x, error in ((x_std, found.standard), (torch.cat([x_std, x_ext]), found.augmented)):
        known = torch.linalg.qr(x.unique(dim=0).T).Q
        missed = theta - known @ (known.T @ theta)
        assert float(error) == pytest.approx(float(missed @ sigma @ missed), rel=1e-10, abs=1e-10)
    scale = float(found.standard + found.benefit.sum() + 1)
    total = found.standard - found.benefit.sum() + found.cost.sum()
    assert float(found.augmented) == pytest.approx(float(total), abs=1e-10 * scale)
    assert (found.benefit >= -1e-10 * scale).all()


@pytest.mark.parametrize("number", PROBLEMS)
def test_self_training_is_never_worse_than_the_standard_estimator(number):
    theta, sigma, x_std, x_ext, invariances = problem(number)
    found = estimators(theta, sigma, x_std, x_ext, invariances)
    standard, trained = (float(squared_error(t, theta, sigma)) for t in (found.standard, found.self_trained))
    moved = float(squared_error(found.self_trained, found.standard, sigma))
    assert trained <= standard * (1 + 1e-10)
    assert trained == pytest.approx(standard - moved, abs=1e-10 * (1 + standard))  # Pythagoras in sigma's norm
    rows = torch.cat([x_std, x_ext, invariances])
    torch.testing.assert_close(rows @ found.self_trained, rows @ theta, rtol=0, atol=1e-9)
    slope = sigma @ (found.self_trained - found.standard)  # at the minimum it has no part along what the rows leave open
    inside = torch.linalg.pinv(rows, rtol=1e-11) @ rows
    torch.testing.assert_close(slope - inside @ slope, torch.zeros(D).double(), rtol=0, atol=1e-8 * float(sigma.norm()))


def test_nothing_is_lost_where_sigma_is_isotropic():
    for number in range(20):
        theta, _, x_std, x_ext, _ = problem(number)
        found = decompose(theta, 3 * torch.eye(D).double(), x_std, x_ext)
        assert abs(float(found.cost.sum())) < 1e-10
        assert float(found.augmented) <= float(found.standard) + 1e-10
    found = linear_tradeoff(features=10, decay=0.0, sizes=(1, 3, 8), trials=20)
    assert (found.gap < 0).all()


def test_problems_in_a_batch_are_what_they_are_alone():
    theta, sigma, *_ = problem(1)
    g = seed(3)
    x_std, x_ext = randn(5, 3, D, generator=g), randn(5, 2, D, generator=g)
    together = decompose(theta.float(), sigma.float(), x_std.float(), x_ext.float())
    for i in range(5):
        alone = decompose(theta.float(), sigma.float(), x_std[i].float(), x_ext[i].float())
        for name in ("standard", "augmented", "self_trained", "benefit", "cost"):
            torch.testing.assert_close(vars(together)[name][i], vars(alone)[name], rtol=1e-9, atol=1e-9)
            assert vars(alone)[name].dtype == torch.float64


def test_self_training_without_constraints_or_freedom():
    theta, sigma, *_ = problem(1)
    none = torch.zeros(0, D).double()
    standard = randn(D, generator=seed(5))
    torch.testing.assert_close(robust_self_training(standard, none, none.sum(1), sigma), standard, rtol=0, atol=1e-8)
    full = randn(D + 3, D, generator=seed(6))
    torch.testing.assert_close(robust_self_training(standard, full, full @ theta, sigma), theta, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ findings


def test_the_gap_against_sample_size():
    found = linear_tradeoff(features=20, sizes=(1, 3, 10, 20), trials=300)
    torch.testing.assert_close(found.gap, found.cost - found.benefit, rtol=0, atol=1e-10)
    assert found.gap[1] > 3 * found.deviation[1]  # hurts
    assert found.gap[2] < -0.1  # helps
    assert found.standard[3] < 1e-15  # as many samples as features
    assert found.augmented[2] < 1e-15  # as many samples and perturbations
    assert (found.self_trained <= found.standard + 1e-12).all()
    again = linear_tradeoff(features=20, sizes=(1, 3, 10, 20), trials=300)
    assert torch.equal(again.gap, found.gap)
    assert "hurts at" in str(found)
    assert "hurts nowhere" in str(linear_tradeoff(features=4, sizes=(4,), trials=3))


def test_the_staircase_is_fitted_by_the_smoothest_spline():
    """Against SciPy's B-splines and the equations of the constrained minimum."""
    interpolate = pytest.importorskip("scipy.interpolate")
    stairs, chosen = Staircase(7), torch.tensor([0, 2, 3, 8])
    knots = torch.arange(-3, 17).double().numpy() / 2  # of which the first spline is centred at -1/2

    def splines(t: Tensor) -> Tensor:
        return torch.from_numpy(interpolate.BSpline.design_matrix(t.numpy(), knots, 3).toarray())

    b = splines(stairs.points[chosen])
    bend = torch.diff(torch.eye(16).double(), n=2, dim=0)
    norm = bend.T @ bend + 1e-6 * torch.eye(16).double()
    equations = torch.cat([torch.cat([norm, b.T], 1), torch.cat([b, torch.zeros(4, 4).double()], 1)])
    values = stairs.points[chosen].floor()
    coefficients = torch.linalg.solve(equations, torch.cat([torch.zeros(16).double(), values]))[:16]
    t = torch.linspace(0, 6.4, 50, dtype=torch.float64)
    fitted = stairs.features(t) @ minimum_norm(stairs.rows[chosen], values)
    torch.testing.assert_close(fitted, splines(t) @ coefficients, rtol=0, atol=1e-6)


def test_the_staircase_s_population():
    stairs = Staircase(8, tail=0.05, perturbed=0.1)
    assert float(stairs.weights.sum()) == pytest.approx(1)
    assert stairs.weights[1] / stairs.weights[0] == pytest.approx(1 / 9)
    assert stairs.weights[15] / stairs.weights[1] == pytest.approx(0.05 / 0.2)
    torch.testing.assert_close(stairs.rows @ stairs.theta, stairs.points.floor(), rtol=0, atol=1e-8)
    torch.testing.assert_close(stairs.invariances @ stairs.theta, torch.zeros(8).double(), rtol=0, atol=1e-8)
    theta = stairs.theta + 1e-3 * randn(18, generator=seed())
    error = (stairs.rows @ theta - stairs.points.floor()).square()
    assert float(squared_error(theta, stairs.theta, stairs.sigma)) == pytest.approx(float(stairs.weights @ error), rel=1e-5)
    worse = torch.maximum(error[::2], error[1::2]) @ (stairs.weights[::2] + stairs.weights[1::2])
    assert stairs.robust_error(theta) == pytest.approx(float(worse), rel=1e-5)


def test_the_staircase_finding():
    found = spline_tradeoff(sizes=(5, 20, 320), trials=30)
    few, many = found.fits.values()
    assert few["augmented"].standard > 100 * few["standard"].standard
    assert few["self-trained"].standard <= few["standard"].standard
    assert few["self-trained"].robust < few["standard"].robust / 100
    assert many["augmented"].standard < 1e-10
    assert (found.errors.self_trained <= found.errors.standard + 1e-9).all()
    assert found.errors.gap[0] > 4 * found.errors.deviation[0]
    assert found.errors.augmented[2] < 0.01
    text = str(found)
    assert "5 samples: standard" in text
    assert "hurts at 5, 20 samples" in text


def test_figures():
    pytest.importorskip("matplotlib")
    theta, sigma, x_std, x_ext, _ = problem(1)
    bars = decompose(theta, sigma, x_std, x_ext).figure().axes[0]
    assert len(bars.patches) == 2 * D
    assert bars.get_ylim()[0] < 0
    assert len(linear_tradeoff(features=4, sizes=(1, 2), trials=3).figure().axes) == 2
    assert len(spline_tradeoff(sizes=(5, 6), trials=2).figure().axes) == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"theta": torch.zeros(2, 3)}, r"theta must be a floating vector \[D\]"),
        ({"sigma": torch.eye(4)}, r"sigma must be \[3, 3\]"),
        ({"sigma": torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 1]])}, "symmetric"),
        ({"sigma": -torch.eye(3)}, "positive semidefinite"),
        ({"x_std": torch.zeros(2, 4)}, r"x_std must be rows \[n, 3\]"),
        ({"x_ext": torch.zeros(5, 2, 3)}, r"x_ext must be rows \[n, 3\]"),
        ({"invariances": torch.ones(1, 3)}, "invariances must be orthogonal to theta"),
    ],
)
def test_bad_problems(change, expected):
    arguments = {"theta": torch.ones(3), "sigma": torch.eye(3), "x_std": torch.zeros(1, 3), "x_ext": torch.ones(1, 3)}
    with pytest.raises(ValueError, match=expected):
        decompose(**(arguments | change))


def test_bad_rows():
    with pytest.raises(ValueError, match=r"values must be one for each of rows"):
        minimum_norm(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match=r"sigma must be \[D, D\] where rows are \[2, 3\]; got \[2, 2\]"):
        robust_self_training(torch.ones(3), torch.ones(2, 3), torch.ones(2), torch.eye(2))


@pytest.mark.parametrize(
    ("found", "arguments", "expected"),
    [
        (linear_tradeoff, {"features": 0}, "features must be"),
        (linear_tradeoff, {"decay": -1}, "decay must be"),
        (linear_tradeoff, {"sizes": ()}, "sizes must be"),
        (linear_tradeoff, {"sizes": (5, 2)}, "ascending"),
        (linear_tradeoff, {"trials": 1}, "trials must be an integer >= 2"),
        (spline_tradeoff, {"stairs": 5}, "stairs must be"),
        (spline_tradeoff, {"many": 0}, "many must be"),
        (spline_tradeoff, {"sizes": (0,)}, "each of sizes must be"),
    ],
)
def test_bad_input(found, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        found(**arguments)
