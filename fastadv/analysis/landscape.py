"""The adversarial loss around the weights of a network.

    g(alpha) = mean over images of  max over ||x_adv - x|| <= eps of  loss(x_adv; w + alpha d)

The flatter g, the smaller the gap between robust accuracy on training and on test images: that is what adversarial weight
perturbation (AWP) is made for. The maximum is found anew at each alpha. Adversarial images of w itself are none of w + alpha d:
shown to other weights they measure how images transfer, and draw a curve that is too low.

Wu, Xia and Wang, "Adversarial Weight Perturbation Helps Robust Generalization", 2020; Li et al., "Visualizing the Loss
Landscape of Neural Nets", 2018 (filter normalisation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..evaluation.outcome import radius
from ..evaluation.probes import Probe, device_of, some
from ..progress import progress_bar
from ..report import chart, finished, new_figure
from ..training.averaging import inside
from .finding import Models, centred, coloured, probes
from .maps import draw_maps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NORMALISATIONS = ("filter", "layer")
JUDGED = 1000  # images at most that robust accuracy is measured on


@dataclass(frozen=True)
class WeightLandscape:
    """What :func:`weight_landscape` measured, of each model by its name.

    Attributes:
        alphas: [A], ascending, 0 in the middle.
        losses: [directions, A] each, g along each direction.
        within: half the width that ``sharpness`` looks at.
        sharpness: the mean over directions, and over all alphas but 0 with |alpha| <= within, of g(alpha) - g(0).
        robust_accuracy: of the weights as they are, in [0, 1].
        training_accuracy: the same on training images; empty where none were given.
        eps, norm, normalisation, pregenerated: as they were asked for.
    """

    alphas: Tensor
    losses: dict[str, Tensor]
    within: float
    sharpness: dict[str, float]
    robust_accuracy: dict[str, float]
    training_accuracy: dict[str, float]
    eps: float
    norm: str
    normalisation: str
    pregenerated: bool

    @property
    def gap(self) -> dict[str, float]:
        """The robust generalisation gap: robust accuracy on training images minus that on the others."""
        return {name: training - self.robust_accuracy[name] for name, training in self.training_accuracy.items()}

    def __str__(self) -> str:
        directions = len(next(iter(self.losses.values())))
        made = "made once, for the weights as they are" if self.pregenerated else "made anew for all weights"
        lines = [
            f"Mean cross-entropy of adversarial images ({self.norm} eps {radius(self.eps)}, {made}) around the weights, along "
            f"{directions} {self.normalisation}-normalised directions."
        ]
        middle = len(self.alphas) // 2
        for name, rise in self.sharpness.items():
            here = float(self.losses[name][:, middle].mean())
            line = f"{name}: {here:.3f} at the weights, {rise:+.3f} on average within |alpha| <= {self.within:g}"
            line += f"; robust accuracy {self.robust_accuracy[name]:.1%}"
            if name in self.gap:
                line += f", {self.training_accuracy[name]:.1%} on training images: a gap of {100 * self.gap[name]:.1f} points"
            lines.append(line + ".")
        if len(self.sharpness) > 1:
            lines.append(f"The flattest is {min(self.sharpness, key=lambda name: self.sharpness[name])}.")
        return "\n".join(lines)

    def figure(self) -> Figure:
        """Mean and standard deviation of g over the directions; beside it robust accuracies, if there are those of training."""
        if not self.training_accuracy:
            figure, axis = chart("", "")
        else:
            figure = new_figure(8.4, 3.4)
            axis, beside = figure.subplots(1, 2, width_ratios=(2, 1))
            self._bars(figure, beside)
        axis.set(xlabel="alpha", ylabel="adversarial loss")
        for name, colour in coloured(self.losses).items():
            spread, mean = torch.std_mean(self.losses[name], 0, correction=0)
            axis.fill_between(self.alphas, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
            axis.plot(self.alphas, mean, color=colour, label=name)
        return finished(figure, axis, percent=False)

    def _bars(self, figure: Figure, axis: Axes) -> None:
        axis.set_ylabel("robust accuracy")
        for place, (name, colour) in enumerate(coloured(self.losses).items()):
            for side, (accuracy, alpha) in enumerate(((self.training_accuracy, 0.45), (self.robust_accuracy, 1.0))):
                axis.bar(place + 0.4 * side - 0.2, accuracy[name], 0.36, color=colour, alpha=alpha)
                axis.annotate(
                    ("train", "test")[side],
                    (place + 0.4 * side - 0.2, accuracy[name]),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
        axis.set_xticks(range(len(self.losses)), list(self.losses))
        finished(figure, axis, percent=True)
        axis.set_ylim(0, 1.1)
        axis.grid(visible=False, axis="x")


@dataclass(frozen=True)
class WeightPlane:
    """What :func:`weight_plane` measured.

    Attributes:
        alphas: [A], ascending, 0 in the middle: along the first direction, and along the second.
        losses: [A, A] of each model by its name, at w + alphas[i] d1 + alphas[j] d2.
        eps, norm, normalisation: as they were asked for.
    """

    alphas: Tensor
    losses: dict[str, Tensor]
    eps: float
    norm: str
    normalisation: str

    def __str__(self) -> str:
        middle, width = len(self.alphas) // 2, float(self.alphas[-1])
        told = [
            f"{name}: {float(losses[middle, middle]):.3f} at the weights, {float(losses.mean()):.3f} on average, "
            f"{float(losses.max()):.3g} at most."
            for name, losses in self.losses.items()
        ]
        return "\n".join(
            [
                f"Mean cross-entropy of adversarial images ({self.norm} eps {radius(self.eps)}) on the plane of two "
                f"{self.normalisation}-normalised directions, up to {width:g} times the weights along each.",
                *told,
            ]
        )

    def figure(self) -> Figure:
        """A map of each model, all by one scale of colours."""
        figure = new_figure(0.9 + 3.1 * len(self.losses), 3.2)
        axes = figure.subplots(1, len(self.losses), squeeze=False)[0]
        for axis, name in zip(axes, self.losses, strict=True):
            axis.set(title=name, xlabel="first direction")
        axes[0].set_ylabel("second direction")
        draw_maps(figure, axes, self.alphas, self.losses.values(), "adversarial loss")
        return figure


def weight_landscape(
    models: Models,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    directions: int = 10,
    width: float = 1.0,
    points: int = 11,
    within: float = 0.5,
    normalisation: str = "filter",
    steps: int = 10,
    pregenerated: bool = False,
    training: tuple[Tensor, Tensor] | None = None,
    samples: int = 128,
    seed: int = 0,
    batch_size: int = 256,
) -> WeightLandscape:
    """Adversarial loss of each model along random directions from its weights.

    Costs ``2 * steps + 1`` F, forward passes of the samples, at each alpha of each direction: 2,100 F by default. The model's
    own weights are never touched: it is called with others.

    Args:
        models: an nn.Module that maps [N, ...] to logits [N, C], or several by name; attacked in eval mode, left as found.
        x, y: clean images [N, ...] in the bounds, integer labels [N].
        eps: radius in units of x. norm: "linf", "l2" or "l1". bounds: (lo, hi) of every element, or None.
        directions: how many (:func:`random_direction`); models of the same shapes get the same, but for their lengths.
        width: of alpha, to both sides. points: odd number of alphas.
        within: half the width that sharpness looks at.
        normalisation: "filter": each filter of d is as long as that of w; "layer": each layer.
        steps: of PGD, from a random start, the same one at every alpha.
        pregenerated: adversarial images of w itself at every alpha. A contrast only: their loss is not g but a lower bound,
            and the curve is wrong.
        training: images and labels that the models were trained on, for the robust generalisation gap.
        samples: how many of x the curves are of, evenly spaced; robust accuracy is of 1,000, if there are so many.
        seed: of directions and starts. batch_size: images attacked at once; results do not depend on it.

    Raises:
        ValueError: an argument is not as described, or a model has no weights to move.
    """
    alphas = centred("width", width, points)
    near = (alphas != 0) & (alphas.abs() <= checks.number("within", within) * (1 + 1e-9))
    if not near.any():
        raise ValueError(f"within must reach the first alpha beside 0, {2 * width / (points - 1):g}; got {within!r}")
    checks.integer("directions", directions)
    fields = _fields(models, x, y, eps, norm, bounds, steps, samples, seed, batch_size)
    judged = {"robust": (x, y), **({} if training is None else {"training": training})}
    chosen = {kind: some(*pair, JUDGED, bounds) for kind, pair in judged.items()}
    found: dict[str, Tensor] = {}
    accuracies: dict[str, dict[str, float]] = {"robust": {}, "training": {}}
    with progress_bar("weight landscape", len(fields) * directions * points, "attack") as bar:
        for name, field in fields.items():
            for kind, sample in chosen.items():
                accuracies[kind][name] = field.of(*sample).accuracy()
            if pregenerated:
                field = field.frozen()
            generator = torch.Generator().manual_seed(seed)
            found[name] = torch.full((directions, points), field.loss(), dtype=torch.float64)
            for curve in found[name]:
                direction = random_direction(field.model, generator, normalisation)
                for i, alpha in enumerate(alphas.tolist()):
                    if alpha:
                        curve[i] = field.moved((alpha, direction)).loss()
                    bar.update()
    sharpness = {name: float((losses - losses[:, [points // 2]])[:, near].mean()) for name, losses in found.items()}
    robust, trained = accuracies.values()
    return WeightLandscape(alphas, found, within, sharpness, robust, trained, eps, norm, normalisation, pregenerated)


def weight_plane(
    models: Models,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    width: float = 1.0,
    points: int = 11,
    normalisation: str = "filter",
    steps: int = 10,
    samples: int = 128,
    seed: int = 0,
    batch_size: int = 256,
) -> WeightPlane:
    """Adversarial loss of each model on the plane of two random directions from its weights.

    Costs ``2 * steps + 1`` F at each of points^2 places: 2,500 F by default. Arguments and errors as
    :func:`weight_landscape`'s.
    """
    alphas = centred("width", width, points)
    fields = _fields(models, x, y, eps, norm, bounds, steps, samples, seed, batch_size)
    found: dict[str, Tensor] = {}
    with progress_bar("weight plane", len(fields) * points**2, "attack") as bar:
        for name, field in fields.items():
            generator = torch.Generator().manual_seed(seed)
            first, second = (random_direction(field.model, generator, normalisation) for _ in range(2))
            found[name] = torch.empty(points, points, dtype=torch.float64)
            for i, a in enumerate(alphas.tolist()):
                for j, b in enumerate(alphas.tolist()):
                    found[name][i, j] = field.moved((a, first), (b, second)).loss()
                    bar.update()
    return WeightPlane(alphas, found, eps, norm, normalisation)


def random_direction(model: nn.Module, generator: torch.Generator, normalisation: str = "filter") -> dict[str, Tensor]:
    """A Gaussian direction in the space of the weights, by their names, as long as they are.

    Weights of one dimension are left out: along biases and the scales and shifts of batch norms it is zero.

    Args:
        generator: on the CPU.
        normalisation: "filter": each filter of d (row of a linear layer) is as long as that of the weights; "layer": each
            layer. So that networks whose weights differ in scale, but not in what they compute, get the same curve.

    Raises:
        ValueError: the normalisation is unknown, or no parameter has two dimensions or more.
    """
    checks.one_of("normalisation", normalisation, NORMALISATIONS)
    direction = {}
    for name, weights in model.named_parameters():
        if weights.dim() > 1:
            noise = torch.randn(weights.shape, generator=generator).to(weights)
            over = tuple(range(int(normalisation == "filter"), weights.dim()))
            ours, theirs = (torch.linalg.vector_norm(t.detach(), dim=over, keepdim=True) for t in (noise, weights))
            direction[name] = noise * (theirs / ours)
    if not direction:
        raise ValueError("the model has no weights to move: no parameter has two dimensions or more")
    return direction


class _Moved(nn.Module):
    """The model, called with other weights than its own."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self._weights = model, dict(weights)

    def forward(self, x: Tensor) -> Any:
        return torch.func.functional_call(self.model, self._weights, (x,))


@dataclass(frozen=True)
class _Field:
    """Some images, attacked on a model: the loss as a function of its weights."""

    probe: Probe
    x: Tensor
    y: Tensor
    numbers: Tensor
    eps: float
    steps: int
    x_adv: Tensor | None = None  # made before; None: anew

    @property
    def model(self) -> nn.Module:
        return self.probe.model  # type: ignore[return-value]

    def of(self, x: Tensor, y: Tensor, numbers: Tensor) -> _Field:
        """On other images."""
        x, y, numbers = (t.to(self.x.device) for t in (x, y, numbers))
        return replace(self, x=x, y=y, numbers=numbers)

    def moved(self, *along: tuple[float, Mapping[str, Tensor]]) -> _Field:
        """At w + alpha d, or at the sum of several such steps from w."""
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        for alpha, direction in along:
            weights |= {name: weights[name] + alpha * d for name, d in direction.items()}
        return replace(self, probe=replace(self.probe, model=_Moved(self.model, weights)))

    def frozen(self) -> _Field:
        """With the images of these weights, whatever the weights will be."""
        return replace(self, x_adv=self.attacked())

    def attacked(self) -> Tensor:
        if self.x_adv is not None:
            return self.x_adv
        return self.probe.attacked(self.x, self.y, self.eps, self.numbers, self.steps)

    def loss(self) -> float:
        """Mean cross-entropy under attack."""
        return float(F.cross_entropy(self.probe.logits(self.attacked()).double(), self.y))

    def accuracy(self) -> float:
        return float(self.probe.right(self.attacked(), self.y).double().mean())


def _fields(
    models: Models, x: Tensor, y: Tensor, eps: float, norm: str, bounds: tuple[float, float] | None, steps: int,
    samples: int, seed: int, batch_size: int,
) -> dict[str, _Field]:  # fmt: skip
    checks.number("eps", eps)
    checks.integer("steps", steps)
    sample, fields = some(x, y, samples, bounds), {}
    for name, probe in probes(models, norm, bounds, seed, batch_size).items():
        if not isinstance(probe.model, nn.Module):
            got = type(probe.model).__name__
            raise ValueError(f"models[{name!r}] must be an nn.Module, whose weights can be moved; got {got}")
        model = inside(probe.model)  # a compiled module has its weights compiled in
        x, y, numbers = (t.to(device_of(model, x)) for t in sample)
        fields[name] = _Field(replace(probe, model=model), x, y, numbers, eps, steps)
    return fields
