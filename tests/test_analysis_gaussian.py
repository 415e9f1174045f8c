"""Gaussian features: closed forms against integrals and draws, and the theorem's limit."""

from __future__ import annotations

import math

import pytest
import torch
from models import one_thread, seed  # noqa: F401

from fastadv.analysis.gaussian import CLASSIFIERS, gaussian_features, linear_accuracy, robust_limit


def phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def test_all_weak_features():
    """They are right with probability Phi(eta sqrt d), and at eps = 2 eta with 1 minus that."""
    found = gaussian_features(p=0.9, eta=0.2, features=(1, 9, 100), samples=10)
    expected = [phi(0.2), phi(0.6), phi(2.0)]
    clean, robust = found.theory["all weak features"].tolist()
    assert clean == pytest.approx(expected, abs=1e-12)
    assert robust == pytest.approx([1 - e for e in expected], abs=1e-12)


def test_the_strong_feature_is_right_with_p_until_eps_is_1():
    weights = CLASSIFIERS["strong feature"](5, 0.9, 0.2)
    for eps, expected in ((0.0, 0.9), (0.4, 0.9), (0.999, 0.9), (1.0, 0.0), (2.0, 0.0)):
        assert float(linear_accuracy(weights, 0.9, 0.2, eps)) == pytest.approx(expected, abs=1e-15)


def test_the_bayes_optimum_is_optimal():
    """Its accuracy is the integral of the larger joint density, and no other linear classifier's is higher."""
    p, eta, d = 0.8, 0.3, 7
    best = float(linear_accuracy(CLASSIFIERS["Bayes optimum"](d, p, eta), p, eta))
    t = torch.linspace(-12, 12, 200_001, dtype=torch.float64)  # sum of the weak features over sqrt d, which suffices
    density = {y: torch.exp(-0.5 * (t - y * eta * math.sqrt(d)) ** 2) / math.sqrt(2 * math.pi) for y in (-1, 1)}
    total = 0.0
    for x1 in (-1, 1):
        joint = [0.5 * (p if x1 == y else 1 - p) * density[y] for y in (-1, 1)]
        total += float(torch.trapezoid(torch.maximum(*joint), t))
    assert best == pytest.approx(total, abs=1e-8)
    others = torch.randn(500, 1 + d, generator=seed(), dtype=torch.float64)
    assert float(linear_accuracy(others, p, eta).max()) <= best


def test_no_linear_classifier_passes_the_limit():
    """And some come near: the strong feature alone is on it."""
    p, eta = 0.9, 0.25
    weights = torch.randn(5_000, 21, generator=seed(), dtype=torch.float64).abs()
    weights[:, 0] *= torch.logspace(-2, 3, 5_000, dtype=torch.float64)
    standard, robust = (linear_accuracy(weights, p, eta, eps) for eps in (0.0, 2 * eta))
    room = robust_limit(standard, p) - robust
    assert room.min() > -1e-12
    assert room.min() < 1e-3
    assert robust_limit(p, p) == pytest.approx(p)
    assert (robust_limit(standard, p) - standard).min() < 0  # without an attack it is passed


def test_theory_and_simulation_agree():
    found = gaussian_features(p=0.9, eta=0.3, features=(1, 10, 60), samples=20_000)
    assert found.eps == 0.6
    for name, theory in found.theory.items():
        deviation = (theory * (1 - theory) / found.samples).sqrt()
        assert ((found.simulated[name] - theory).abs() <= 4 * deviation + 1e-4).all(), name
    assert found.theory["all weak features"][0, -1] > 0.98
    assert found.simulated["all weak features"][1, -1] < 0.02
    smaller = gaussian_features(p=0.9, eta=0.3, eps=0.1, features=(60,), samples=20_000)
    clean, robust = smaller.theory["all weak features"][:, 0].tolist()
    assert (clean, robust) == pytest.approx((phi(0.3 * math.sqrt(60)), phi(0.2 * math.sqrt(60))))
    assert smaller.simulated["all weak features"][1, 0] == pytest.approx(robust, abs=4 * math.sqrt(robust * (1 - robust) / 2e4))


def test_it_is_repeatable_and_leaves_the_global_generator():
    before = torch.get_rng_state()
    first, second, other = (gaussian_features(features=(3,), samples=500, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name in CLASSIFIERS:
        assert torch.equal(first.simulated[name], second.simulated[name])
    assert any(not torch.equal(first.simulated[name], other.simulated[name]) for name in CLASSIFIERS)


def test_what_it_says_and_draws():
    found = gaussian_features(features=(1, 100), samples=1_000)
    assert "all weak features: 99.87% and 0.13% in theory" in str(found)
    assert "can be more than" in str(found)
    assert "can be more than" not in str(gaussian_features(eps=0.1, features=(2,), samples=10))
    pytest.importorskip("matplotlib")
    left, right = found.figure().axes
    assert left.get_xlabel() == "weak features"
    assert len(right.lines) == 1 + 3 + 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"p": 1.0}, r"p must be in \[1/2, 1\); got 1.0"),
        ({"p": 0.4}, "p must be"),
        ({"eta": 0}, "eta must be a finite number > 0"),
        ({"eps": -1}, "eps must be"),
        ({"features": ()}, "features must be"),
        ({"features": (3, 1)}, "ascending"),
        ({"features": (0,)}, "each of features must be an integer >= 1"),
        ({"samples": 0}, "samples must be"),
    ],
)
def test_bad_input(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        gaussian_features(**arguments)
