"""Accuracy at odds with robustness, where both are known in closed form: one strong feature and many weak ones.

    y = -1 or 1, as often;    x_1 = y with probability p, else -y;    x_2, ..., x_{d+1} ~ N(eta y, 1)

Many weak features together tell y almost surely; a perturbation of ``eps = 2 eta`` turns each of them round. The strong one is
right only with probability p, whatever is done to it short of 1.

Tsipras et al., "Robustness May Be at Odds with Accuracy", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks
from ..attacks import fgsm
from ..report import finished, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Linear classifiers by name: their weights [1 + d], the strong feature's first, from d, p and eta.
CLASSIFIERS: dict[str, Callable[[int, float, float], Tensor]] = {
    "all weak features": lambda d, p, eta: _weights(0.0, d, 1 / d),
    "Bayes optimum": lambda d, p, eta: _weights(math.log(p / (1 - p)), d, 2 * eta),
    "strong feature": lambda d, p, eta: _weights(1.0, d, 0.0),
}
COLOURS = {"all weak features": "#d97706", "Bayes optimum": "#9333ea", "strong feature": "#2563eb"}
MIXTURES = 200  # of the strong feature with the weak ones, in the trade-off curve


def linear_accuracy(weights: Tensor, p: float, eta: float, eps: float = 0.0) -> Tensor:
    """Accuracy [...] of ``sign(<weights, x>)`` under the worst perturbation of linf radius ``eps``, in closed form.

    ``y <weights, x>`` is normal about ``w_1 + eta sum(w)`` with probability p and about ``-w_1 + eta sum(w)`` else, where w are
    the weak features' weights; its standard deviation is ``|w|_2``; and the attack takes ``eps |weights|_1`` off.

    Args:
        weights: [..., 1 + d], the strong feature's first. A score of 0 is an error.
    """
    strong, weak = weights[..., 0], weights[..., 1:]
    middle, deviation = eta * weak.sum(-1) - eps * weights.abs().sum(-1), weak.norm(dim=-1)

    def right(mean: Tensor) -> Tensor:
        share: Tensor = torch.special.ndtr(mean / deviation).nan_to_num(nan=0.0)  # 0 / 0: a score that is always 0
        return share

    return right(middle + strong) * p + right(middle - strong) * (1 - p)


def robust_limit(standard: Tensor | float, p: float) -> Tensor | float:
    """``(1 - standard) p / (1 - p)``: the robust accuracy for ``eps >= 2 eta`` that no classifier of this standard one exceeds.

    No classifier of any kind, linear or not (Theorem 2.1 of the paper).
    """
    return (1 - standard) * p / (1 - p)


@dataclass(frozen=True)
class GaussianFeatures:
    """What :func:`gaussian_features` found.

    Attributes:
        p, eta, eps, samples: as given.
        features: the numbers d of weak features.
        theory: for each classifier [2, len(features)]: accuracy without and under attack, in closed form.
        simulated: the same, of so many samples.
        tradeoff: [mixtures, 2]: standard and robust accuracy of classifiers that weigh the strong feature more and more
            against the average of the last number of weak ones.
    """

    p: float
    eta: float
    eps: float
    samples: int
    features: tuple[int, ...]
    theory: dict[str, Tensor]
    simulated: dict[str, Tensor]
    tradeoff: Tensor

    def __str__(self) -> str:
        lines = [f"With {self.features[-1]} weak features of mean {self.eta:g} y, clean and under linf eps {self.eps:g}:"]
        for name, theory in self.theory.items():
            (clean, robust), (seen, attacked) = theory[:, -1].tolist(), self.simulated[name][:, -1].tolist()
            lines.append(f"  {name}: {clean:.2%} and {robust:.2%} in theory, {seen:.2%} and {attacked:.2%} simulated")
        furthest = max(float((self.simulated[name] - theory).abs().max()) for name, theory in self.theory.items())
        lines.append(f"Theory and simulation ({self.samples:,} samples) are never further apart than {furthest:.2%}.")
        if self.eps >= 2 * self.eta:
            best = float(self.theory["Bayes optimum"][0, -1])
            lines.append(f"No classifier as accurate as the optimum can be more than {robust_limit(best, self.p):.2%} robust.")
        return "\n".join(lines)

    def figure(self) -> Figure:
        """Accuracy against the number of weak features, theory as lines and simulation as marks; and the trade-off."""
        figure = new_figure(9.6, 3.6)
        left, right = figure.subplots(1, 2)
        left.set(xlabel="weak features", ylabel="accuracy", xscale="log")
        left.xaxis.set_major_formatter("{x:g}")
        for name, (clean, robust) in self.theory.items():
            colour, (seen, attacked) = COLOURS[name], self.simulated[name]
            left.plot(self.features, clean, color=colour, label=name)
            left.plot(self.features, robust, "--", color=colour)
            left.plot(self.features, seen, "o", color=colour, markersize=4)
            left.plot(self.features, attacked, "x", color=colour, markersize=5)
        left.plot([], [], "--", color="gray", label="under attack")
        right.set(xlabel="standard accuracy", ylabel="robust accuracy")
        right.plot(*self.tradeoff.T, color="#059669", label="strong feature with weak ones")
        for name, theory in self.theory.items():
            right.plot(*theory[:, -1], "o", color=COLOURS[name])
        if self.eps >= 2 * self.eta:
            reach = torch.linspace(self.p, 1, 2, dtype=torch.float64)
            limit = robust_limit(reach, self.p)
            right.plot(reach, limit, ":", color="gray", label="limit of any classifier")
        finished(figure, right, percent=True)
        right.xaxis.set_major_formatter("{x:.0%}")
        return finished(figure, left, percent=True)


def gaussian_features(
    p: float = 0.95,
    eta: float = 0.3,
    eps: float | None = None,
    features: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    samples: int = 20_000,
    seed: int = 0,
) -> GaussianFeatures:
    """Standard and robust accuracy of three classifiers against the number of weak features, in theory and simulated.

    The classifiers are the average of all weak features, the Bayes optimum and the strong feature alone. Simulated, they are
    attacked by :func:`fastadv.fgsm`, which is exact for them.

    Args:
        p: how often the strong feature is right, in [1/2, 1).
        eta: mean of the weak features, > 0.
        eps: linf radius, >= 0; None: ``2 eta``.
        features: numbers d of weak features, in ascending order.
        samples: how many are drawn.
        seed: of their generator.

    Raises:
        ValueError: an argument is not as described.
    """
    if not 0.5 <= checks.number("p", p) < 1:
        raise ValueError(f"p must be in [1/2, 1); got {p!r}")
    checks.number("eta", eta, positive=True)
    eps = 2 * eta if eps is None else checks.number("eps", eps)
    numbers = tuple(checks.integer("each of features", d) for d in features)
    if not numbers or list(numbers) != sorted(numbers):
        raise ValueError(f"features must be numbers in ascending order; got {features!r}")
    checks.integer("samples", samples)
    theory: dict[str, Tensor] = {}
    simulated: dict[str, Tensor] = {}
    x, y = _draw(numbers[-1], p, eta, samples, torch.Generator().manual_seed(seed))
    for name, weigh in CLASSIFIERS.items():
        weights = [weigh(d, p, eta) for d in numbers]
        theory[name] = torch.stack([linear_accuracy(w, p, eta, radius) for radius in (0.0, eps) for w in weights]).view(2, -1)
        simulated[name] = torch.tensor([_accuracies(w, x[:, : len(w)], y, eps) for w in weights]).T
    angle = torch.linspace(0, math.pi / 2, MIXTURES, dtype=torch.float64)
    d = numbers[-1]
    mixtures = torch.cat([angle.sin()[:, None], angle.cos()[:, None].expand(-1, d) / d], 1)
    tradeoff = torch.stack([linear_accuracy(mixtures, p, eta, radius) for radius in (0.0, eps)], 1)
    return GaussianFeatures(p, eta, eps, samples, numbers, theory, simulated, tradeoff)


def _weights(strong: float, d: int, weak: float) -> Tensor:
    weights = torch.full((1 + d,), weak, dtype=torch.float64)
    weights[0] = strong
    return weights


def _draw(d: int, p: float, eta: float, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs [samples, 1 + d] and y [samples] of -1 and 1."""
    y = 2.0 * torch.randint(2, (samples,), generator=generator) - 1
    agrees = torch.rand(samples, generator=generator) < p
    weak = torch.randn(samples, d, generator=generator) + eta * y[:, None]
    return torch.cat([torch.where(agrees, y, -y)[:, None], weak], 1), y


def _accuracies(weights: Tensor, x: Tensor, y: Tensor, eps: float) -> tuple[float, float]:
    """Of sign(<weights, x>), without and under attack."""
    weights = weights.to(x.dtype)

    def model(inputs: Tensor) -> Tensor:
        score = inputs @ weights
        return torch.stack([-score, score], 1)

    attacked = fgsm(model, x, (y > 0).long(), eps, bounds=None)
    clean, robust = (float((y * (inputs @ weights) > 0).double().mean()) for inputs in (x, attacked))
    return clean, robust
