"""Augmentation with consistent perturbations can hurt accuracy: exactly when, in linear regression without noise.

Labels are ``<theta*, x>`` of all inputs, perturbed ones too. With fewer of them than features, estimators must choose:

    standard       theta_std = argmin |theta|  with  X_std theta = y_std
    augmented      theta_aug = argmin |theta|  with  X_std theta = y_std, X_ext theta = y_ext
    self-trained   theta_rst = argmin E <theta - theta_std, x>^2  with the same and what is known of unlabelled inputs

The error is ``L(theta) = E <theta - theta*, x>^2 = |theta - theta*|_Sigma^2``. With v = theta_aug - theta_std, what the extra
rows have taught, and w = theta* - theta_aug, what stays unknown, theta* - theta_std = v + w and

    L(theta_aug) = L(theta_std) - benefit + cost,    benefit = <v, Sigma v>,    cost = -2 <v, Sigma w>

v and w are orthogonal, so that nothing is lost where Sigma is a multiple of the identity; where it is not, errors that
cancelled each other under Sigma may no longer do so. Robust self-training is a projection in Sigma's norm, onto a set that
theta* lies in: L(theta_rst) = L(theta_std) - |theta_rst - theta_std|_Sigma^2, never more than the standard estimator's.

Raghunathan, Xie, Yang, Duchi and Liang, "Understanding and Mitigating the Tradeoff between Robustness and Accuracy", 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..report import chart, finished, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANK = 1e-11  # a singular value below this part of the largest is zero
COLOURS = {"standard": "#d97706", "augmented": "#dc2626", "self-trained": "#2563eb"}


# ---------------------------------------------------------------------------------------------------------- estimators


def minimum_norm(rows: Tensor, values: Tensor) -> Tensor:
    """The least-norm theta [..., D] with ``rows [..., n, D] theta = values [..., n]``; of least squares where there is none.

    In fp64, as all here: which directions the rows determine must not be a matter of rounding.

    Raises:
        ValueError: there is not one value for each row.
    """
    if rows.dim() < 2 or values.shape != rows.shape[:-1]:
        raise ValueError(f"values must be one for each of rows [..., n, D]; got {list(values.shape)} for {list(rows.shape)}")
    return _apply(torch.linalg.pinv(rows.double(), rtol=RANK), values.double())


def robust_self_training(standard: Tensor, rows: Tensor, values: Tensor, sigma: Tensor) -> Tensor:
    """The theta [..., D] with ``rows theta = values`` that predicts most nearly what the standard estimator does.

    It minimises ``<theta - standard, sigma (theta - standard)>``: the mean squared difference of their predictions for
    unlabelled inputs of second moments sigma [D, D]. ``rows`` [..., n, D] hold labelled inputs, their perturbations, and
    differences of unlabelled inputs from theirs, of value 0. Of several minimisers, which predict the same, that nearest to
    the minimum-norm solution.

    Raises:
        ValueError: there is not one value for each row, or sigma is not [D, D].
    """
    if sigma.shape != 2 * rows.shape[-1:]:
        raise ValueError(f"sigma must be [D, D] where rows are {list(rows.shape)}; got {list(sigma.shape)}")
    particular, root, free = minimum_norm(rows, values), _root(sigma.double()), _left_open(rows.double())
    # What Sigma does not see is zero up to rounding, relative to Sigma and not to what the rows leave of it.
    inverse = torch.linalg.pinv(root @ free, atol=RANK * root.norm(), rtol=0.0)
    return particular + _apply(free @ inverse, _apply(root, standard - particular))


class Estimators(NamedTuple):
    """Of one problem, or of several: [..., D] each."""

    standard: Tensor
    augmented: Tensor
    self_trained: Tensor


def estimators(theta: Tensor, sigma: Tensor, x_std: Tensor, x_ext: Tensor, invariances: Tensor) -> Estimators:
    """All three, where theta [D] labels the rows of ``x_std`` [..., n, D] and ``x_ext`` [..., m, D].

    ``invariances`` [k, D], known to self-training alone, have the value 0.
    """
    rows = torch.cat([x_std, x_ext], -2)
    standard = minimum_norm(x_std, x_std @ theta)
    known = torch.cat([rows, invariances.expand(*rows.shape[:-2], *invariances.shape)], -2)
    return Estimators(standard, minimum_norm(rows, rows @ theta), robust_self_training(standard, known, known @ theta, sigma))


def squared_error(theta: Tensor, truth: Tensor, sigma: Tensor) -> Tensor:
    """``E <theta - truth, x>^2`` [...] for inputs of second moments sigma [D, D]."""
    difference = theta - truth
    return (difference * _apply(sigma, difference)).sum(-1).clamp(min=0)  # as it is but for rounding


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _root(sigma: Tensor) -> Tensor:
    """The symmetric root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(sigma)
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]
    root: Tensor = vectors * torch.where(values > rounding, values, 0.0).sqrt() @ vectors.T
    return root


def _left_open(rows: Tensor) -> Tensor:
    """Orthonormal directions [..., D, D], in columns, that the rows [..., n, D] do not determine; zeros for the others."""
    n, size = rows.shape[-2:]
    _, values, directions = torch.linalg.svd(rows, full_matrices=n < size)
    values = F.pad(values, (0, size - values.shape[-1]))
    determined = values > RANK * values[..., :1]
    left_open: Tensor = directions.mT.masked_fill(determined[..., None, :], 0.0)
    return left_open


# ------------------------------------------------------------------------------------------------------- decomposition


@dataclass(frozen=True)
class Decomposition:
    """What :func:`decompose` found: L(theta_aug) = L(theta_std) - benefit + cost, direction by direction.

    Attributes:
        standard, augmented, self_trained: errors of the three estimators, [...].
        eigenvalues: of Sigma, in ascending order, [D].
        benefit, cost: [..., D], in the directions of Sigma's eigenvectors.
    """

    standard: Tensor
    augmented: Tensor
    self_trained: Tensor
    eigenvalues: Tensor
    benefit: Tensor
    cost: Tensor

    def __str__(self) -> str:
        mean = {name: float(value.mean()) for name, value in (("std", self.standard), ("aug", self.augmented))}
        benefit, cost = (float(term.sum(-1).mean()) for term in (self.benefit, self.cost))
        return (
            f"The augmented estimator's error is {mean['aug']:.4g}: the standard one's, {mean['std']:.4g}, less a benefit of "
            f"{benefit:.4g}, plus a cost of {cost:.4g}. Robust self-training's is {float(self.self_trained.mean()):.4g}."
        )

    def figure(self) -> Figure:
        """Benefit and cost by direction; of several problems, the mean."""
        from matplotlib.ticker import MaxNLocator

        figure, axis = chart("eigenvector of Sigma, by falling eigenvalue", "part of the error")
        place = torch.arange(1, len(self.eigenvalues) + 1).numpy()
        for term, name, colour, shift in ((-self.benefit, "- benefit", "#2563eb", -0.2), (self.cost, "cost", "#dc2626", 0.2)):
            axis.bar(place + shift, term.reshape(-1, len(place)).mean(0).flip(0).numpy(), 0.4, color=colour, label=name)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        bottom, top = axis.get_ylim()
        finished(figure, axis, percent=False)
        axis.set_ylim(bottom, top)
        return figure


def decompose(theta: Tensor, sigma: Tensor, x_std: Tensor, x_ext: Tensor, invariances: Tensor | None = None) -> Decomposition:
    """What consistent extra rows do to the error of minimum-norm interpolation, and what robust self-training makes of it.

    Leading dimensions of ``x_std`` and ``x_ext``, the same, are problems of their own.

    Args:
        theta: theta* [D], which labels everything.
        sigma: second moments of the inputs, [D, D], symmetric and positive semidefinite.
        x_std: training inputs [..., n, D].
        x_ext: extra inputs [..., m, D].
        invariances: [k, D], directions that theta* is orthogonal to, such as differences of unlabelled inputs from their
            perturbations: known to self-training alone. Default: none.

    Raises:
        ValueError: shapes do not fit, sigma is no second moment, or theta varies along an invariance.
    """
    invariances = x_std.new_zeros(0, x_std.shape[-1]) if invariances is None else invariances
    _check(theta, sigma, x_std, x_ext, invariances)
    theta, sigma, x_std, x_ext, invariances = (t.double() for t in (theta, sigma, x_std, x_ext, invariances))
    found = estimators(theta, sigma, x_std, x_ext, invariances)
    eigenvalues, directions = torch.linalg.eigh(sigma)
    learnt, unknown = (found.augmented - found.standard) @ directions, (theta - found.augmented) @ directions
    return Decomposition(
        standard=squared_error(found.standard, theta, sigma),
        augmented=squared_error(found.augmented, theta, sigma),
        self_trained=squared_error(found.self_trained, theta, sigma),
        eigenvalues=eigenvalues,
        benefit=eigenvalues * learnt.square(),
        cost=-2 * eigenvalues * learnt * unknown,
    )


def _check(theta: Tensor, sigma: Tensor, x_std: Tensor, x_ext: Tensor, invariances: Tensor) -> None:
    if theta.dim() != 1 or not theta.is_floating_point():
        raise ValueError(f"theta must be a floating vector [D]; got {checks.describe(theta)}")
    size = len(theta)
    if sigma.shape != (size, size):
        raise ValueError(f"sigma must be [{size}, {size}] like theta [{size}]; got {checks.describe(sigma)}")
    problems = x_std.shape[:-2]
    for name, rows, leading in (("x_std", x_std, problems), ("x_ext", x_ext, problems), ("invariances", invariances, ())):
        if rows.dim() < 2 or rows.shape[-1] != size or rows.shape[:-2] != leading:
            shape = [*leading, "n", size]
            raise ValueError(f"{name} must be rows [{', '.join(map(str, shape))}]; got {checks.describe(rows)}")
    lowest, largest = (float(v) for v in torch.linalg.eigvalsh(sigma).aminmax())
    if not torch.allclose(sigma, sigma.T) or lowest < -1e-6 * largest:
        raise ValueError(f"sigma must be symmetric and positive semidefinite; its eigenvalues start at {lowest:g}")
    along = (invariances @ theta).abs()
    if bool((along > 1e-6 * invariances.norm(dim=1) * theta.norm()).any()):
        raise ValueError(f"invariances must be orthogonal to theta; their products with it go up to {float(along.max()):g}")


# ------------------------------------------------------------------------------------------- errors against sample size


@dataclass(frozen=True)
class LinearTradeoff:
    """Errors against the number of samples: what :func:`linear_tradeoff` found.

    Attributes:
        sizes: numbers of training inputs.
        trials: problems drawn of each.
        standard, augmented, self_trained, benefit, cost: [len(sizes)], their means.
        deviation: [len(sizes)], the standard error of the mean gap, augmented - standard.
    """

    sizes: tuple[int, ...]
    trials: int
    standard: Tensor
    augmented: Tensor
    self_trained: Tensor
    benefit: Tensor
    cost: Tensor
    deviation: Tensor

    @property
    def gap(self) -> Tensor:
        """[len(sizes)], how much the error grows by augmentation: cost - benefit."""
        return self.augmented - self.standard

    def __str__(self) -> str:
        worst, last = int(self.gap.argmax()), len(self.sizes) - 1
        lines = [
            f"  {self.sizes[i]:,} samples: standard {self.standard[i]:.4f}, augmented {self.augmented[i]:.4f} (benefit "
            f"{self.benefit[i]:.4f}, cost {self.cost[i]:.4f}), self-trained {self.self_trained[i]:.4f}"
            for i in sorted({0, worst, last})
        ]
        certain = self.gap > 2 * self.deviation + RANK * self.standard.max()
        hurts = [size for size, certainly in zip(self.sizes, certain, strict=True) if certainly]
        where = f"at {', '.join(f'{size:,}' for size in hurts)} samples" if hurts else "nowhere"
        return "\n".join([f"Mean squared errors over {self.trials} draws; augmentation hurts {where}:", *lines])

    def figure(self) -> Figure:
        """The three errors, and the gap with its two terms."""
        figure = new_figure(9.6, 3.6)
        left, right = figure.subplots(1, 2)
        self.draw_errors(left)
        right.set(xlabel="training samples", ylabel="augmented less standard error", xscale="log")
        right.xaxis.set_major_formatter("{x:g}")
        right.axhline(0, color="black", linewidth=0.8)
        right.plot(self.sizes, self.cost, "--", color="#dc2626", label="cost")
        right.plot(self.sizes, -self.benefit, "--", color="#2563eb", label="- benefit")
        right.plot(self.sizes, self.gap, marker="o", color="#9333ea", label="gap: cost - benefit")
        around = self.gap - 2 * self.deviation, self.gap + 2 * self.deviation
        right.fill_between(self.sizes, *around, color="#9333ea", alpha=0.2, linewidth=0)
        bottom, top = right.get_ylim()
        finished(figure, right, percent=False)
        right.set_ylim(bottom, 1.5 * top)  # room for the legend
        return finished(figure, left, percent=False)

    def draw_errors(self, axis: Axes) -> None:
        axis.set(xlabel="training samples", ylabel="mean squared error", xscale="log")
        axis.xaxis.set_major_formatter("{x:g}")
        for name, errors in (("standard", self.standard), ("augmented", self.augmented), ("self-trained", self.self_trained)):
            axis.plot(self.sizes, errors, marker="o", color=COLOURS[name], label=name)


def linear_tradeoff(
    features: int = 40,
    decay: float = 2.0,
    sizes: Sequence[int] = (1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 40, 60),
    trials: int = 100,
    seed: int = 0,
) -> LinearTradeoff:
    """The error gap of augmentation against sample size, for Gaussian inputs of skewed covariance.

    Inputs have variance ``i^-decay`` in feature i, and theta*_i is such that each feature does as much for the label, whose
    variance is 1. Each input is perturbed by as much noise in all directions, and its perturbation labelled by theta*. That is
    largest where inputs hardly vary, and the minimum norm spreads what a perturbation tells of it over directions where they
    do: with few samples the cost exceeds the benefit, with more it is the other way round, and from ``features`` samples on
    there is no error.

    Args:
        features: their number D.
        decay: of the variances, >= 0; 0 is isotropic, where augmentation never hurts.
        sizes: numbers of training inputs.
        trials: draws of each.
        seed: of the generator.

    Raises:
        ValueError: an argument is not as described.
    """
    checks.integer("features", features)
    checks.number("decay", decay)
    generator = torch.Generator().manual_seed(seed)
    variances = torch.arange(1, features + 1, dtype=torch.float64) ** -decay
    theta = (features * variances).rsqrt()

    def draw(n: int) -> tuple[Tensor, Tensor]:
        x, noise = torch.randn(2, trials, n, features, generator=generator, dtype=torch.float64)
        x = x * variances.sqrt()
        return x, x + noise

    return _against_size(theta, variances.diag(), draw, sizes, trials)


def _against_size(
    theta: Tensor,
    sigma: Tensor,
    draw: Callable[[int], tuple[Tensor, Tensor]],
    sizes: Sequence[int],
    trials: int,
    invariances: Tensor | None = None,
) -> LinearTradeoff:
    """``draw(n)`` gives x_std and x_ext, both [trials, n, D]."""
    numbers = tuple(checks.integer("each of sizes", n) for n in sizes)
    if not numbers or list(numbers) != sorted(numbers):
        raise ValueError(f"sizes must be numbers in ascending order; got {sizes!r}")
    checks.integer("trials", trials, least=2)
    found = [decompose(theta, sigma, *draw(n), invariances) for n in numbers]

    def mean(term: Callable[[Decomposition], Tensor]) -> Tensor:
        return torch.stack([term(f).mean() for f in found])

    return LinearTradeoff(
        numbers,
        trials,
        standard=mean(lambda f: f.standard),
        augmented=mean(lambda f: f.augmented),
        self_trained=mean(lambda f: f.self_trained),
        benefit=mean(lambda f: f.benefit.sum(-1)),
        cost=mean(lambda f: f.cost.sum(-1)),
        deviation=torch.stack([(f.augmented - f.standard).std() for f in found]) / trials**0.5,
    )


# ------------------------------------------------------------------------------------------------------- the staircase


class Staircase:
    """The paper's example: a staircase, fitted by the smoothest cubic spline through the samples.

    Inputs are the points i and, rarely, their perturbations i + 1/2, i = 0, 1, ...; the label of both is i. Five stairs are
    frequent and the others are not. The norm is that of second differences of the coefficients of cubic B-splines at distance
    1/2 (and a little of the coefficients' own, which makes it a norm), so that the standard estimator is nearly a line,
    which is right in the tail too; perturbations of the frequent stairs bend it there.

    Attributes:
        points: [2 stairs], 0, 1/2, 1, ...: a point and its perturbation by turns.
        rows: their features [2 stairs, D], in coordinates whose Euclidean norm is that one.
        weights: [2 stairs], how often each point occurs.
        theta, sigma: what labels all points, and their second moments.
        invariances: [stairs, D], differences of the features of points and perturbations.
    """

    def __init__(self, stairs: int = 10, tail: float = 0.01, perturbed: float = 0.01) -> None:
        self.points = torch.arange(2 * stairs, dtype=torch.float64) / 2
        self._centres = torch.arange(-1, 2 * stairs + 1, dtype=torch.float64) / 2
        size = len(self._centres)
        differences = torch.eye(size, dtype=torch.float64).diff(n=2, dim=0)
        values, vectors = torch.linalg.eigh(differences.T @ differences + 1e-6 * torch.eye(size, dtype=torch.float64))
        self._coordinates: Tensor = vectors * values.rsqrt() @ vectors.T
        self.rows = self.features(self.points)
        stair = torch.full((stairs,), tail, dtype=torch.float64)
        stair[:5] = 0.2
        stair /= stair.sum()
        self.weights = torch.stack([(1 - perturbed) * stair, perturbed * stair], 1).flatten()
        self.theta = minimum_norm(self.rows, self.points.floor())
        self.sigma = self.rows.T @ (self.weights[:, None] * self.rows)
        self.invariances = self.rows[1::2] - self.rows[::2]

    def features(self, t: Tensor) -> Tensor:
        """[N, D]: cubic B-splines at t [N], in the norm's coordinates."""
        u = (t[:, None] - self._centres).abs() * 2
        splines = torch.where(u < 1, 2 / 3 - u.square() + u.pow(3) / 2, (2 - u).clamp(min=0).pow(3) / 6)
        return splines @ self._coordinates

    def robust_error(self, theta: Tensor) -> float:
        """The mean of a stair's larger squared error."""
        error = (self.rows @ (theta - self.theta)).square()
        return float((self.weights.view(-1, 2).sum(1) * error.view(-1, 2).amax(1)).sum())


class Fit(NamedTuple):
    """One estimator on one sample: its curve over ``SplineTradeoff.t``, and its mean squared errors."""

    curve: Tensor
    standard: float
    robust: float


@dataclass(frozen=True)
class SplineTradeoff:
    """What :func:`spline_tradeoff` found.

    Attributes:
        t: inputs of the curves, [T].
        samples: by their number, which points of the staircase were drawn, [distinct].
        fits: by the number of samples and the name of the estimator.
        errors: of the three estimators against the number of samples.
    """

    t: Tensor
    samples: dict[int, Tensor]
    fits: dict[int, dict[str, Fit]]
    errors: LinearTradeoff

    def __str__(self) -> str:
        lines = ["Squared errors of cubic splines on a staircase, standard and on the worse of a point and its perturbation:"]
        for size, fits in self.fits.items():
            shown = ", ".join(f"{name} {fit.standard:.4f} and {fit.robust:.4f}" for name, fit in fits.items())
            lines.append(f"  {size:,} samples: {shown}")
        return "\n".join([*lines, str(self.errors)])

    def figure(self) -> Figure:
        """The fits to few and to many samples, and errors against their number."""
        figure = new_figure(12.6, 3.8)
        *panels, last = figure.subplots(1, 1 + len(self.fits))
        for axis, (size, fits) in zip(panels, self.fits.items(), strict=True):
            seen, stairs = self.samples[size], self.t[-1].floor()
            axis.set(xlabel="t", ylabel="f(t)")
            axis.set_title(f"{size:,} samples", fontsize=10)
            for name, fit in fits.items():
                width = 3 if name == "augmented" else 1.5  # so that it is seen where the self-trained one is the same
                axis.plot(self.t, fit.curve, color=COLOURS[name], linewidth=width, label=name)
            axis.plot(seen, seen.floor(), "o", color="#9333ea", markersize=5, label="sample")
            other = 2 * seen.floor() + 0.5 - seen
            axis.plot(other, other.floor(), "x", color="#059669", markersize=6, label="perturbation")
            finished(figure, axis, percent=False)
            axis.set_ylim(-0.5, float(stairs) + 0.8)
        self.errors.draw_errors(last)
        finished(figure, last, percent=False)
        last.set(yscale="log", ylim=(1e-5, 10))
        return figure


def spline_tradeoff(
    stairs: int = 10,
    many: int = 1_000,
    sizes: Sequence[int] = (5, 10, 20, 40, 80, 160, 320, 640),
    trials: int = 100,
    seed: int = 0,
) -> SplineTradeoff:
    """The staircase: augmentation with few samples bends a spline that was right, with many it does no harm.

    The few samples are one of each of the five frequent stairs; the many are drawn. Robust self-training knows of unlabelled
    points that they and their perturbations have one label.

    Args:
        stairs: their number, >= 6.
        many: samples of the second fit.
        sizes: numbers of samples whose errors are averaged over draws.
        trials: draws of each, >= 2.
        seed: of the generator.

    Raises:
        ValueError: an argument is not as described.
    """
    problem = Staircase(checks.integer("stairs", stairs, least=6))
    checks.integer("many", many, least=6)
    generator = torch.Generator().manual_seed(seed)

    def drawn(n: int) -> Tensor:
        return torch.multinomial(problem.weights, n, replacement=True, generator=generator)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        chosen = drawn(trials * n).view(trials, n)
        return problem.rows[chosen], problem.rows[chosen ^ 1]  # points and perturbations by turns

    errors = _against_size(problem.theta, problem.sigma, draw, sizes, trials, problem.invariances)
    t = torch.linspace(0, stairs - 0.5, 20 * stairs, dtype=torch.float64)
    chosen = {5: torch.arange(0, 10, 2), many: torch.unique(drawn(many))}
    fits = {size: _fits(problem, points, problem.features(t)) for size, points in chosen.items()}
    return SplineTradeoff(t, {size: problem.points[points] for size, points in chosen.items()}, fits, errors)


def _fits(problem: Staircase, chosen: Tensor, curve: Tensor) -> dict[str, Fit]:
    """Of the three estimators to these points; ``curve`` [T, D] are the features of the curve's inputs."""
    x_std, x_ext = problem.rows[chosen], problem.rows[chosen ^ 1]
    found = estimators(problem.theta, problem.sigma, x_std, x_ext, problem.invariances)
    return {
        name: Fit(curve @ theta, float(squared_error(theta, problem.theta, problem.sigma)), problem.robust_error(theta))
        for name, theta in zip(COLOURS, found, strict=True)
    }
