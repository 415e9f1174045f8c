"""SCORE's account of robustness against accuracy: a robust error whose optimum is the data's own distribution.

    standard          E D(p_d(x) | p(x))
    robust            E max D(p_d(x) | p(x'))     Madry et al.: the model is to say at x' what the truth is at x
    self-consistent   E max D(p_d(x') | p(x'))    SCORE: what the truth is at x'

The maxima are over x' in the ball round x; p_d(x) and p(x) are the distributions of the label given x, of the data and of the
model. p = p_d has self-consistent error 0, but its robust error is ``C = E max D(p_d(x) | p_d(x'))``, and other p, smoother
than the truth, have a smaller one. Where D is a metric, by the triangle inequality between p_d(x), p_d(x') and p(x'),

    |robust - C| <= self-consistent <= robust + C

Pang, Lin, Yang, Zhu and Yan, "Robustness and Accuracy Could Be Reconcilable by (Proper) Definition", 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, ops
from ..attacks import PGD
from ..attacks.draws import Draws
from ..attacks.norms import DUAL, norms
from ..engine import Model, attacking, input_gradient, unwrap
from ..evaluation.probes import inside
from ..report import chart, finished, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Distance = Callable[[Tensor, Tensor], Tensor]  # of two batches of logits [N, C], from the first to the second: [N]


def _l2(ref: Tensor, logits: Tensor) -> Tensor:
    squared = ops.se(ref, logits)[0]
    return squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()  # whose slope at 0 is infinite


def _l1(ref: Tensor, logits: Tensor) -> Tensor:
    return (logits.softmax(1) - ref.softmax(1)).abs().sum(1)


DISTANCES: dict[str, Distance] = {
    "kl": lambda ref, logits: ops.kl(ref, logits)[0],
    "se": lambda ref, logits: ops.se(ref, logits)[0],
    "l2": _l2,
    "l1": _l1,
}
METRICS = ("l2", "l1")

# Which two distributions each error compares, of the truth at x, the truth at x' and the model's answer at x'.
Compared = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
COMPARED: dict[str, Compared] = {
    "robust": lambda here, there, answer: (here, answer),
    "consistent": lambda here, there, answer: (there, answer),
    "variation": lambda here, there, answer: (here, there),
}
LINE = 201  # points of the interval that is searched where an input is one number


# ------------------------------------------------------------------------------------------------------- robust errors


@dataclass(frozen=True)
class RobustErrors:
    """What :func:`robust_errors` found.

    Attributes:
        distance, eps: as given.
        standard, robust, consistent: errors of each input, [N].
        variation: [N], how far the truth itself goes from its value at x in the ball.
    """

    distance: str
    eps: float
    standard: Tensor
    robust: Tensor
    consistent: Tensor
    variation: Tensor

    def between(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest self-consistent error [N] that the triangle inequality allows, of a metric."""
        return (self.robust - self.variation).abs(), self.robust + self.variation

    def __str__(self) -> str:
        terms = (self.standard, self.robust, self.consistent, self.variation)
        standard, robust, consistent, variation = (float(term.mean()) for term in terms)
        text = (
            f"Errors in {self.distance}, the mean of {len(self.standard):,} inputs: standard {standard:.4g}; within eps "
            f"{self.eps:g} robust {robust:.4g} and self-consistent {consistent:.4g}. The truth itself goes {variation:.4g} far."
        )
        if self.distance not in METRICS:
            return text
        low, high = (float(bound.mean()) for bound in self.between())
        return f"{text} So the self-consistent error had to lie between {low:.4g} and {high:.4g}."

    def figure(self) -> Figure:
        """The four means, with two standard errors; of a metric, in gray, where the self-consistent one had to lie."""
        figure, axis = chart("", f"mean {self.distance}")
        bars = {
            "standard": (self.standard, "#d97706"),
            "robust": (self.robust, "#dc2626"),
            "self-\nconsistent": (self.consistent, "#2563eb"),
            "truth's\nvariation": (self.variation, "#9ca3af"),
        }
        for place, (values, colour) in enumerate(bars.values()):
            error = 2 * float(values.std(correction=0)) / math.sqrt(len(values))
            axis.bar(place, float(values.mean()), 0.6, yerr=error, color=colour, capsize=3)
        if self.distance in METRICS:
            low, high = (float(bound.mean()) for bound in self.between())
            axis.plot([2.4, 2.4], [low, high], color="gray", marker="_", markersize=8, label="triangle inequality")
        axis.set_xticks(range(len(bars)), list(bars))
        return finished(figure, axis, percent=False)


def robust_errors(
    model: Model,
    truth: Model,
    x: Tensor,
    eps: float,
    distance: str = "kl",
    norm: str = "linf",
    bounds: tuple[float, float] | None = None,
    steps: int = 40,
    restarts: int = 2,
    batch_size: int = 256,
    seed: int = 0,
) -> RobustErrors:
    """Standard, robust and self-consistent error of a model where the distribution of the label is known.

    The maxima are searched at 201 points of the interval where an input is one number, else by PGD, from below.

    Args:
        model: maps a batch [N, ...] to logits [N, C]. Run in eval mode and left exactly as found.
        truth: the same of the data: logits of p_d(y | x), such as its logarithms, differentiable in x.
        x: inputs [N, ...] of the data's distribution, inside the bounds.
        eps: radius in units of x.
        distance: "kl", KL(p_d | p); "se", |p_d - p|_2^2, as the library's losses; "l2", its root, and "l1", which are metrics.
        norm: of the ball, "linf", "l2" or "l1".
        bounds: (lo, hi) of every element; None, the default here, for unbounded.
        steps, restarts: of PGD; a restart has two starts.
        batch_size: inputs at once.
        seed: of PGD's starts, which belong to the inputs and not to batches.

    Raises:
        ValueError: an argument is not as described, or the logits of model and truth differ in shape.
    """
    checks.one_of("distance", distance, DISTANCES)
    checks.one_of("norm", norm, DUAL)
    checks.number("eps", eps)
    for name, value in (("steps", steps), ("restarts", restarts), ("batch_size", batch_size)):
        checks.integer(name, value)
    checks.images(x, *checks.bounds(bounds))
    if not len(x):
        raise ValueError("x must hold an input; got none")
    checks.same_device("model", model, x)
    both, measure = _Both(unwrap(truth), unwrap(model)), DISTANCES[distance]
    numbers, search = torch.arange(len(x), device=x.device), _Search(both, measure, eps, norm, bounds, steps, restarts)
    found = []
    with attacking(both):
        for part, samples in zip(torch.split(x.detach(), batch_size), torch.split(numbers, batch_size), strict=True):
            with torch.no_grad():
                here, answer = both.split(both(part))
            worst = [search(part, here, compared, Draws(seed, samples)) for compared in COMPARED.values()]
            at_x = [measure(*compared(here, here, answer)) for compared in COMPARED.values()]
            found.append(torch.stack([measure(here, answer), *map(torch.maximum, worst, at_x)]))
    return RobustErrors(distance, float(eps), *torch.cat(found, 1).cpu())


class _Both(nn.Module):
    """Truth and model as one, and a class on top that always wins.

    By it no input counts as fooling PGD, so that its best is the one of largest error.
    """

    def __init__(self, truth: Model, model: Model) -> None:
        super().__init__()
        self.truth, self.model = truth, model

    def forward(self, x: Tensor) -> Tensor:
        truth, answer = self.truth(x), self.model(x)
        checks.logits(truth, x, None, source="truth(x) must return")
        checks.logits(answer, x, None)
        if truth.shape != answer.shape:
            raise ValueError(f"model(x) must be {list(truth.shape)} like truth(x); got {list(answer.shape)}")
        return torch.cat([truth, answer, torch.full_like(answer[:, :1], torch.finfo(answer.dtype).max)], 1)

    def split(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the truth and those of the model, [N, C] each."""
        classes = both.shape[1] // 2
        return both[:, :classes], both[:, classes:-1]


@dataclass(frozen=True)
class _Search:
    """For the largest distance in the ball round each input."""

    both: _Both
    measure: Distance
    eps: float
    norm: str
    bounds: tuple[float, float] | None
    steps: int
    restarts: int

    def __call__(self, x: Tensor, here: Tensor, compared: Compared, draws: Draws) -> Tensor:
        """[N], of inputs whose truth is ``here`` [N, C]."""
        return self.on_line(x, here, compared) if x[0].numel() == 1 else self.by_pgd(x, here, compared, draws)

    def on_line(self, x: Tensor, here: Tensor, compared: Compared) -> Tensor:
        """An interval, whatever the norm."""
        moves = torch.linspace(-self.eps, self.eps, LINE, dtype=x.dtype, device=x.device)
        points = (x.reshape(-1, 1) + moves).clamp(*checks.bounds(self.bounds))
        with torch.no_grad():
            there, answer = self.both.split(self.both(points.view(-1, *x.shape[1:])))
        there, answer = (t.view(*points.shape, -1) for t in (there, answer))
        return distances(self.measure, compared, here, there, answer).amax(1)

    def by_pgd(self, x: Tensor, here: Tensor, compared: Compared, draws: Draws) -> Tensor:
        """From random starts, two at a time on opposite sides of x: errors tend to rise to either side."""

        def error(logits: Tensor, _: Tensor | None) -> Tensor:
            return self.measure(*compared(here, *self.both.split(logits)))

        found = []
        for restart in range(self.restarts):
            move = inside(draws, restart, x, self.eps, self.norm)
            for start in (x + move, x - move):
                attack = PGD(
                    self.both, self.eps, steps=self.steps, norm=self.norm, loss=error, init=start, bounds=self.bounds,
                    keep_best=True,
                )  # fmt: skip
                attack(x)
                assert attack.info is not None
                assert attack.info.loss is not None
                found.append(attack.info.loss)
        return torch.stack(found).amax(0)


def distances(measure: Distance, compared: Compared, here: Tensor, there: Tensor, answer: Tensor) -> Tensor:
    """[N, P], at x whose truth is ``here`` [N, C] and x' whose truth is ``there`` and the model's ``answer``, [N, P, C]."""
    first, second = (t.reshape(-1, t.shape[-1]) for t in compared(here[:, None].expand_as(there), there, answer))
    return measure(first, second).view(there.shape[:2])


# ------------------------------------------------------------------------------------------------- alignment of gradients


@dataclass(frozen=True)
class GradientAlignment:
    """What :func:`gradient_alignment` found.

    Attributes:
        norm: of the ball.
        robust: ``|grad log p(y | x)|`` of the model in the dual norm, [N].
        consistent: ``|grad log p(y | x) - grad log p_d(y | x)|``, [N].
        cosine: between the two gradients, [N].
    """

    norm: str
    robust: Tensor
    consistent: Tensor
    cosine: Tensor

    def __str__(self) -> str:
        robust, consistent, cosine = (float(term.mean()) for term in (self.robust, self.consistent, self.cosine))
        return (
            f"To first order a unit of {self.norm} radius adds {robust:.4g} to the robust error and {consistent:.4g} to the "
            f"self-consistent one, the mean of {len(self.cosine):,} inputs. The cosine between the model's and the truth's "
            f"input gradients is {cosine:.3f}."
        )

    def figure(self) -> Figure:
        """Each input's two terms. Below the diagonal are gradients aligned with the truth's."""
        figure, axis = chart("robust: |model's gradient|", "self-consistent: |model's - truth's|")
        top = float(torch.maximum(self.robust, self.consistent).max())
        axis.plot([0, top], [0, top], ":", color="gray", label="equal")
        dots = axis.scatter(self.robust, self.consistent, c=self.cosine, s=12, cmap="coolwarm", vmin=-1, vmax=1)
        figure.colorbar(dots, label="cosine of the two gradients")
        return finished(figure, axis, percent=False)


def gradient_alignment(
    model: Model, truth: Model, x: Tensor, y: Tensor, norm: str = "linf", batch_size: int = 256
) -> GradientAlignment:
    """What robust and self-consistent training penalise, to first order in the radius, and how they differ.

    For a label y of p_d(. | x), the excess of the model's loss, ``log p_d(y | x) - log p(y | x')``, rises in a small ball by
    ``eps |grad log p(y | x)|_*``, the dual norm; against the truth at x' itself by ``eps |grad log p(y | x) - grad log
    p_d(y | x)|_*``. The first asks for a flat model, the second for one whose gradients are the truth's: meaningful ones.

    Args:
        model, truth: as :func:`robust_errors`; both differentiable in x.
        x, y: inputs [N, ...] and their labels, [N].
        norm: of the ball, "linf" (dual: l1), "l2" or "l1".
        batch_size: inputs at once.

    Raises:
        ValueError: an argument is not as described, or there is no way from the logits to x.
    """
    checks.one_of("norm", norm, DUAL)
    checks.integer("batch_size", batch_size)
    checks.images(x, *checks.bounds(None))
    checks.labels(y, x)
    if y.is_floating_point() or not len(x):
        raise ValueError(f"y must be integer labels of one input or more; got {checks.describe(y)}")
    checks.same_device("model", model, x)
    found = []
    for part, labels in zip(torch.split(x.detach(), batch_size), torch.split(y, batch_size), strict=True):
        ours, theirs = (_log_gradient(unwrap(f), part, labels) for f in (model, truth))
        sizes = norms(ours, DUAL[norm]), norms(ours - theirs, DUAL[norm])
        found.append(torch.stack([*sizes, F.cosine_similarity(ours.flatten(1), theirs.flatten(1))]))
    return GradientAlignment(norm, *torch.cat(found, 1).cpu())


def _log_gradient(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """That of ``log p(y | x)`` with respect to x, like x."""
    with attacking(model):
        inputs = x.clone().requires_grad_()
        logits = model(inputs)
        checks.logits(logits, x, y)
        return -input_gradient(logits, inputs, ops.ce(logits.detach(), y)[1])


# ------------------------------------------------------------------------------------------------------------ the toy


def toy_truth(x: Tensor) -> Tensor:
    """``log p_d(x, y)`` [N, 2] of x [N, 1], logits of p_d(y | x): N(-1, 2^2) with probability 5/6, and N(1, 1) with 1/6.

    The setting of the paper's code. p_d(1 | x) is a hump that rises to 0.44 at x = 5/3: no logistic function, so that the worst
    x' is not always at an end of the interval.
    """
    first = math.log(5 / 6 / 2) - (x + 1).square() / 8
    second = math.log(1 / 6) - (x - 1).square() / 2
    return torch.cat([first, second], 1) - 0.5 * math.log(2 * math.pi)


class Fit(NamedTuple):
    """A distribution of the label and its errors, in KL, over the data's distribution of x."""

    curve: Tensor  # p(1 | x) at the points of the grid, [M]
    standard: float
    robust: float
    consistent: float


class _Loss(NamedTuple):
    """What a network of the toy is trained on: one of COMPARED and one of DISTANCES."""

    compared: str
    distance: str
    colour: str


LOSSES = {
    "robust, KL": _Loss("robust", "kl", "#dc2626"),
    "robust, squared l2": _Loss("robust", "se", "#d97706"),
    "self-consistent, KL": _Loss("consistent", "kl", "#2563eb"),
}


@dataclass(frozen=True)
class ScoreToy:
    """What :func:`score_toy` found.

    Attributes:
        eps: as given.
        x: the grid, [M].
        truth: p_d.
        optimum: of all distributions the one with least robust error.
        fits: of networks, by the number of training pairs and the name of the loss.
        pairs: the training inputs at each point of the grid, by their number, [M].
    """

    eps: float
    x: Tensor
    truth: Fit
    optimum: Fit
    fits: dict[int, dict[str, Fit]]
    pairs: dict[int, Tensor]

    def __str__(self) -> str:
        lines = [
            f"Within eps {self.eps:g} the truth has robust error {self.truth.robust:.4f}. The least of all is "
            f"{self.optimum.robust:.4f}, of a distribution {self.optimum.standard:.4f} away from the truth (KL).",
        ]
        for size, fits in self.fits.items():
            lines.append(f"Networks trained on {size:,} pairs: errors in KL, standard, robust and self-consistent")
            for name, fit in fits.items():
                lines.append(f"  {name}: {fit.standard:.4f}, {fit.robust:.4f}, {fit.consistent:.4f}")
        return "\n".join(lines)

    def figure(self) -> Figure:
        """p(1 | x): the truth, the optimum of the robust error and the networks, one panel for each number of pairs."""
        figure = new_figure(4.8 * len(self.fits), 3.6)
        for axis, (size, fits) in zip(figure.subplots(1, len(self.fits), squeeze=False)[0], self.fits.items(), strict=True):
            axis.set(xlabel="x", ylabel="p(1 | x)", xlim=(-6, 7))
            axis.set_title(f"{size:,} training pairs", fontsize=10)
            axis.plot(self.x, self.truth.curve, color="#9ca3af", linewidth=5, label="truth")
            for name, fit in fits.items():
                axis.plot(self.x, fit.curve, color=LOSSES[name].colour, label=name)
            axis.plot(self.x, self.optimum.curve, ":", color="#dc2626", label="least robust KL")
            if size <= 100:
                seen = self.x[self.pairs[size] > 0]
                axis.plot(seen, torch.zeros_like(seen), "|", color="black", markersize=12)
            finished(figure, axis, percent=False)
            axis.set_ylim(-0.03, 1.03)
        return figure


@dataclass(frozen=True)
class Grid:
    """Inputs on a line.

    Attributes:
        x: the points, [M], ascending.
        truth: logits of p_d(y | x), [M, C].
        density: how often each occurs, adding up to 1, [M].
        near: numbers of the points in the ball round each, [M, P].
    """

    x: Tensor
    truth: Tensor
    density: Tensor
    near: Tensor

    def distances(self, logits: Tensor, compared: str, distance: str) -> Tensor:
        """From each point to those in its ball, [M, P]; differentiable in the logits [M, C]."""
        truth = self.truth.to(logits.dtype)
        return distances(DISTANCES[distance], COMPARED[compared], truth, truth[self.near], logits[self.near])

    def errors(self, logits: Tensor, compared: str, distance: str) -> Tensor:
        """[M], the largest of these."""
        return self.distances(logits, compared, distance).amax(1)

    def fit(self, logits: Tensor) -> Fit:
        standard = DISTANCES["kl"](self.truth, logits)
        terms = standard, self.errors(logits, "robust", "kl"), self.errors(logits, "consistent", "kl")
        return Fit(logits.softmax(1)[:, 1], *(float(self.density @ term) for term in terms))


def toy_grid(eps: float) -> Grid:
    """Points of the toy in [-10, 10], about 0.2 apart, and eps a multiple of it so that the ends of the ball are points."""
    reach = max(1, round(eps / 0.2))
    last = round(10 * reach / eps)
    number = torch.arange(-last, last + 1)
    x = number.double() * (eps / reach)
    truth = toy_truth(x[:, None])
    near = (number[:, None] + torch.arange(-reach, reach + 1)).clamp(-last, last) + last
    return Grid(x, truth, truth.logsumexp(1).softmax(0), near)


@torch.inference_mode(False)
@torch.enable_grad()
def score_toy(pairs: Sequence[int] = (60_000, 6), eps: float = 1.0, steps: int = 300, seed: int = 0) -> ScoreToy:
    """The paper's toy: to minimise the robust error oversmooths, to minimise the self-consistent one finds the truth.

    Inputs are one number, p_d(y | x) is known (:func:`toy_truth`) and is the label. A network of two hidden layers of 100 tanh
    is trained on robust KL, robust squared l2 and self-consistent KL, the inner maxima exact on a grid. And without any
    network: the least robust error of all functions on the grid, a convex problem.

    Args:
        pairs: sizes of the training sets. Five of six inputs are of the first class.
        eps: radius, in [0.05, 20].
        steps: of Adam, for each network and for the optimum.
        seed: of the training inputs and the networks' first weights.

    Raises:
        ValueError: an argument is not as described.
    """
    sizes = tuple(checks.integer("each of pairs", size) for size in pairs)
    if not sizes:
        raise ValueError(f"pairs must hold a number; got {pairs!r}")
    if not 0.05 <= checks.number("eps", eps) <= 20:
        raise ValueError(f"eps must be in [0.05, 20]; got {eps!r}")
    checks.integer("steps", steps)
    grid, generator = toy_grid(eps), torch.Generator().manual_seed(seed)
    drawn = {size: _draw(size, grid, generator) for size in sizes}
    fits = {
        size: {name: grid.fit(_trained(grid, loss, taken / size, steps, seed)) for name, loss in LOSSES.items()}
        for size, taken in drawn.items()
    }
    return ScoreToy(float(eps), grid.x, grid.fit(grid.truth), grid.fit(robust_optimum(grid, "kl", steps)), fits, drawn)


def robust_optimum(grid: Grid, distance: str, steps: int) -> Tensor:
    """The logits [M, C] of least robust error of all.

    A convex problem in the probabilities, as maxima of convex functions are. From the truth averaged over balls, it is solved
    with p-norms in the place of maxima, p rising to 300, as of a maximum alone only one point would learn at a time. Where no
    maximum looks, as in the tails, the optimum is not unique.
    """
    weights = grid.density[grid.near]
    average = (weights[..., None] * grid.truth.softmax(1)[grid.near]).sum(1) / weights.sum(1, keepdim=True)
    logits = average.log().requires_grad_()

    def loss(step: int) -> Tensor:
        far = grid.distances(logits, "robust", distance).clamp(min=0)
        p, smallest = 4 * 75 ** (step / steps), torch.finfo(far.dtype).tiny
        top = far.detach().amax(1, keepdim=True).clamp(min=smallest)
        return grid.density @ (top[:, 0] * (far / top).pow(p).mean(1).clamp(min=smallest).pow(1 / p))

    _descend([logits], loss, steps, lr=0.1)
    return logits.detach()


def _draw(pairs: int, grid: Grid, generator: torch.Generator) -> Tensor:
    """How many of so many inputs of the toy are nearest to each point, [M]; both classes have their share."""
    rare = round(pairs / 6)
    noise = torch.randn(pairs, generator=generator, dtype=torch.float64)
    x = torch.cat([2 * noise[rare:] - 1, noise[:rare] + 1])
    return torch.bincount(torch.bucketize(x, (grid.x[1:] + grid.x[:-1]) / 2), minlength=len(grid.x))


def _trained(grid: Grid, loss: _Loss, weights: Tensor, steps: int, seed: int) -> Tensor:
    """The logits [M, 2] of a network trained on inputs of these weights [M]."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = nn.Sequential(nn.Linear(1, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 2))
    x, weights = grid.x.float()[:, None], weights.float()
    parameters = list(network.parameters())
    _descend(parameters, lambda _: weights @ grid.errors(network(x), loss.compared, loss.distance), steps, lr=5e-3)
    with torch.no_grad():
        logits: Tensor = network(x)
    return logits.double()


def _descend(parameters: Sequence[Tensor], loss: Callable[[int], Tensor], steps: int, lr: float) -> None:
    """Adam on ``loss(step)``, its learning rate falling to 0."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
