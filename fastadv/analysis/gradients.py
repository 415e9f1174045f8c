"""What a network looks at, in pictures: the gradients of robust networks show the object, those of standard ones noise.

Tsipras et al., "Robustness May Be at Odds with Accuracy", 2019: their figures of input gradients, of adversarial images of
a large radius, which show another class where a robust network sees one, and of the way there from the clean image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from ..attacks.norms import unit
from ..evaluation.outcome import radius
from ..evaluation.page import show
from ..evaluation.probes import Probe, device_of, some
from ..progress import progress_bar
from ..reference.step import rows, spread
from ..report import new_figure
from .finding import Models, input_gradient, probes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIGMAS = 3.0  # where a gradient's picture is cut off
SMALLEST = torch.finfo(torch.float32).tiny
CELL = 1.1  # inches of a picture


@dataclass(frozen=True)
class InputGradients:
    """What :func:`input_gradients` computed.

    Attributes:
        x, y: the images [N, ...] and their labels [N].
        gradients: [N, ...] of each model by its name, of ``log((1 - p_y) / p_y)``.
        alignment: of each model, the mean over images of ``|<x, g>| / (|x| |g|)``.
    """

    x: Tensor
    y: Tensor
    gradients: dict[str, Tensor]
    alignment: dict[str, float]

    def __str__(self) -> str:
        told = ", ".join(f"{name} {value:.3f}" for name, value in self.alignment.items())
        return (
            f"Gradients of the loss with respect to {len(self.x)} images. Their alignment with the images, "
            f"|<x, g>| / (|x| |g|), is on average {told}."
        )

    def figure(self) -> Figure:
        """The images, and below them a row of each model's gradients, clipped at 3 standard deviations."""
        figure, axes = _grid(1 + len(self.gradients), len(self.x))
        _row(axes[0], "image", self.x)
        for line, (name, gradients) in zip(axes[1:], self.gradients.items(), strict=True):
            sigma = spread(rows(gradients).std(1, correction=0).clamp(min=SMALLEST), gradients)
            colours = "PuOr_r" if gradients.shape[1] == 1 else "gray"
            _row(line, name, 0.5 + 0.5 * (gradients / (SIGMAS * sigma)).clamp(-1, 1), colours=colours)
        return figure


@dataclass(frozen=True)
class LargeEpsExamples:
    """What :func:`large_eps_examples` made.

    Attributes:
        x, y: the images [N, ...] and their labels [N].
        x_adv: [N, ...] of each model by its name.
        predicted: [N] of each model, what it reads there. confidence: [N], the probability it gives that.
        eps, norm, bounds: as they were asked for.
    """

    x: Tensor
    y: Tensor
    x_adv: dict[str, Tensor]
    predicted: dict[str, Tensor]
    confidence: dict[str, Tensor]
    eps: float
    norm: str
    bounds: tuple[float, float] | None

    def __str__(self) -> str:
        lines = [f"{len(self.x)} images after PGD with a large radius, {self.norm} eps {radius(self.eps)}."]
        for name, predicted in self.predicted.items():
            other = int((predicted != self.y).sum())
            sure = float(self.confidence[name].mean())
            lines.append(
                f"{name}: reads another class in {other} of {len(self.x)}, with a probability of {sure:.0%} on average."
            )
        return "\n".join(lines)

    def figure(self) -> Figure:
        """The images, and below them a row of each model's adversarial ones, each with what the model reads."""
        figure, axes = _grid(1 + len(self.x_adv), len(self.x), below=True)
        _row(axes[0], "image", _in_range(self.x, self.bounds), [f"class {y}" for y in self.y.tolist()])
        for line, (name, x_adv) in zip(axes[1:], self.x_adv.items(), strict=True):
            readings = zip(self.predicted[name].tolist(), self.confidence[name].tolist(), strict=True)
            _row(line, name, _in_range(x_adv, self.bounds), [f"{k}: {p:.0%}" for k, p in readings])
        return figure


@dataclass(frozen=True)
class ClassInterpolations:
    """What :func:`class_interpolations` made: the images ``x + t * (x_adv - x)``.

    Attributes:
        x, y: the images [N, ...] and their labels [N].
        x_adv: [N, ...] of each model by its name.
        t: [T], from 0 to 1.
        probabilities: [N, T, C] of each model, on its own images.
        eps, norm, bounds: as they were asked for.
    """

    x: Tensor
    y: Tensor
    x_adv: dict[str, Tensor]
    t: Tensor
    probabilities: dict[str, Tensor]
    eps: float
    norm: str
    bounds: tuple[float, float] | None

    @property
    def crossing(self) -> dict[str, Tensor]:
        """[N] of each model, the first t where it reads another class than the label; inf where it never does."""
        found = {}
        for name, probabilities in self.probabilities.items():
            wrong = probabilities.argmax(2) != self.y[:, None]
            found[name] = torch.where(wrong, self.t, torch.inf).amin(1)
        return found

    def __str__(self) -> str:
        lines = [f"From {len(self.x)} images to their adversarial ones of a large radius, {self.norm} eps {radius(self.eps)}."]
        for name, crossing in self.crossing.items():
            crossed = crossing[crossing.isfinite()]
            line = f"{name}: {len(crossed)} of {len(crossing)} come to be read as another class"
            lines.append(line + (f", {float(crossed.mean()):.0%} of the way on average." if len(crossed) else "."))
        return "\n".join(lines)

    def figure(self) -> Figure:
        """For each image and model the way there, with what the model reads and its probability."""
        figure, axes = _grid(len(self.x) * len(self.x_adv), len(self.t), below=True)
        lines = iter(axes)
        for i, y in enumerate(self.y.tolist()):
            for name, x_adv in self.x_adv.items():
                way = self.x[i] + self.t.view(-1, *[1] * (self.x.dim() - 1)) * (x_adv[i] - self.x[i])
                sure, read = self.probabilities[name][i].max(1)
                texts = [f"{k}: {p:.0%}" for k, p in zip(read.tolist(), sure.tolist(), strict=True)]
                _row(next(lines), f"{name},\nclass {y}", _in_range(way, self.bounds), texts)
        return figure


def input_gradients(models: Models, x: Tensor, y: Tensor, samples: int = 8, batch_size: int = 256) -> InputGradients:
    """Gradients of each model's loss with respect to some images.

    The loss is ``log((1 - p_y) / p_y)``: its gradient is that of cross-entropy but for a positive factor for each image,
    and is not lost to rounding where a network is sure of itself.

    Args:
        models: map [N, ...] to logits [N, C]; one or several by name, in eval mode and left as found.
        x, y: images [N, ...], integer labels [N].
        samples: how many of them, evenly spaced. batch_size: how many at once.

    Raises:
        ValueError: an argument is not as described, or a model has no gradient at its input.
    """
    x, y, _ = some(x, y, samples, None)
    gradients, alignment = {}, {}
    for name, probe in probes(models, batch_size=batch_size).items():
        device = device_of(probe.model, x)
        gradients[name] = input_gradient(name, probe, x.to(device), y.to(device)).cpu()
        along = (unit(x.cpu()) * unit(gradients[name])).flatten(1).sum(1)
        alignment[name] = float(along.abs().mean())
    return InputGradients(x.cpu(), y.cpu(), gradients, alignment)


def large_eps_examples(
    models: Models,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str = "l2",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    steps: int = 100,
    samples: int = 8,
    seed: int = 0,
    batch_size: int = 256,
) -> LargeEpsExamples:
    """Adversarial images of each model, by PGD with a radius several times that of its training.

    Costs ``2 * steps + 1`` F, forward passes of the samples.

    Args:
        models: map [N, ...] to logits [N, C]; one or several by name, attacked in eval mode and left as found.
        x, y: clean images [N, ...] in the bounds, integer labels [N].
        eps: radius in units of x. norm: "l2", which leaves pictures smoother, "linf" or "l1". bounds: (lo, hi), or None.
        steps: of PGD. samples: how many of x, evenly spaced.
        seed: of the starts. batch_size: how many at once; results do not depend on it.

    Raises:
        ValueError: an argument is not as described.
    """
    x, y, images = _attacked(models, x, y, eps, norm, bounds, steps, samples, seed, batch_size, "large eps")
    predicted, confidence = {}, {}
    for name, (probe, x_adv) in images.items():
        sure, read = probe.logits(x_adv).softmax(1).max(1)
        predicted[name], confidence[name] = read.cpu(), sure.cpu()
    on_cpu = {name: x_adv.cpu() for name, (_, x_adv) in images.items()}
    return LargeEpsExamples(x, y, on_cpu, predicted, confidence, eps, norm, bounds)


def class_interpolations(
    models: Models,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str = "l2",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    points: int = 7,
    steps: int = 100,
    samples: int = 3,
    seed: int = 0,
    batch_size: int = 256,
) -> ClassInterpolations:
    """The way from images to adversarial ones of a large radius, and what each model reads on it.

    Args:
        points: how many images on each way, both ends among them. The others: as :func:`large_eps_examples`'s, and so are
            costs and errors.
    """
    t = torch.linspace(0, 1, checks.integer("points", points, 2))
    x, y, images = _attacked(models, x, y, eps, norm, bounds, steps, samples, seed, batch_size, "interpolations")
    probabilities = {}
    for name, (probe, x_adv) in images.items():
        start = x.to(x_adv)
        ways = [start + step * (x_adv - start) for step in t.tolist()]
        probabilities[name] = torch.stack([probe.logits(way).softmax(1).cpu() for way in ways], 1)
    on_cpu = {name: x_adv.cpu() for name, (_, x_adv) in images.items()}
    return ClassInterpolations(x, y, on_cpu, t, probabilities, eps, norm, bounds)


def _attacked(
    models: Models, x: Tensor, y: Tensor, eps: float, norm: str, bounds: tuple[float, float] | None, steps: int,
    samples: int, seed: int, batch_size: int, title: str,
) -> tuple[Tensor, Tensor, dict[str, tuple[Probe, Tensor]]]:  # fmt: skip
    """Images and labels on the CPU, and of each model what asks it and its adversarial images, on its device."""
    checks.number("eps", eps)
    checks.integer("steps", steps)
    sample = some(x, y, samples, bounds)
    asking, images = probes(models, norm, bounds, seed, batch_size), {}
    with progress_bar(title, len(asking), "model") as bar:
        for name, probe in asking.items():
            x, y, numbers = (t.to(device_of(probe.model, x)) for t in sample)
            images[name] = probe, probe.attacked(x, y, eps, numbers, steps)
            bar.update()
    return sample[0].cpu(), sample[1].cpu(), images


# ------------------------------------------------------------------------------------------------------------- pictures


def _grid(lines: int, columns: int, below: bool = False) -> tuple[Figure, Any]:
    """Axes [lines, columns] for pictures, with room for a line of text ``below`` each."""
    figure = new_figure(0.5 + CELL * columns, (CELL + 0.2 * below) * lines)
    return figure, figure.subplots(lines, columns, squeeze=False)


def _row(axes: Sequence[Axes], name: str, images: Tensor, texts: Sequence[str] = (), colours: str = "gray") -> None:
    """Images [N, 1 or 3, H, W] in [0, 1] in a row, by its name."""
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"only images [N, 1 or 3, H, W] can be drawn; x is {list(images.shape)}")
    for axis, image in zip(axes, images, strict=True):
        show(axis, image, colours)
    for axis, text in zip(axes, texts, strict=False):
        axis.set_xlabel(text, fontsize=8.5, labelpad=2)
    axes[0].set_ylabel(name)


def _in_range(images: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """In [0, 1]."""
    lo, hi = bounds or (float(images.min()), float(images.max()))
    return (images - lo) / (hi - lo)
