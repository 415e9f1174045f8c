"""The loss around an image: over the direction of the gradient's sign, which attacks take, and a random one.

    loss(x + a * sign(gradient) + b * r),    r of -1 and 1 at random

An element moves by up to |a| + |b|, so the linf ball around the image is a square that stands on its corner.
Robust networks are nearly flat and smooth there. One that only hides its gradients is flat at the image and rises further
off, along the random direction as along the other.

Tramèr et al., "Ensemble Adversarial Training: Attacks and Defenses", 2018; Qin et al., "Adversarial Robustness through Local
Linearization", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attacks.draws import Draws
from ..evaluation.outcome import radius
from ..evaluation.probes import Probe, device_of, some, surface
from ..progress import progress_bar
from ..report import new_figure
from .finding import Models, centred, input_gradient, probes
from .maps import draw_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LossSurface:
    """What :func:`loss_surface` measured.

    Attributes:
        x, y: the images [N, ...] and their labels [N].
        distances: [A], from -eps to eps: a of the gradient's sign, and b of the random direction.
        losses: [N, A, A] of each model by its name: cross-entropy at a = distances[i], b = distances[j].
        eps: as it was asked for.
    """

    x: Tensor
    y: Tensor
    distances: Tensor
    losses: dict[str, Tensor]
    eps: float

    def __str__(self) -> str:
        lines = [f"Mean cross-entropy around {len(self.x)} images, {radius(self.eps)} along each direction."]
        middle = len(self.distances) // 2
        for name, losses in self.losses.items():
            here, along, random = losses[:, middle, middle], losses[:, -1, middle], losses[:, middle, -1]
            lines.append(
                f"{name}: {float(here.mean()):.3g} at the image, {float(along.mean()):.3g} along the gradient's sign, "
                f"{float(random.mean()):.3g} along the random one."
            )
        return "\n".join(lines)

    def figure(self) -> Figure:
        """A map of each image (row) and model (column), by one scale of colours; in the dashed line lies the linf ball."""
        figure = new_figure(1.0 + 2.7 * len(self.losses), 0.3 + 2.5 * len(self.x))
        axes = figure.subplots(len(self.x), len(self.losses), squeeze=False, sharex=True, sharey=True)
        for axis, name in zip(axes[0], self.losses, strict=True):
            axis.set_title(name)
        for axis in axes[-1]:
            axis.set_xlabel("gradient's sign")
        for axis, y in zip(axes[:, 0], self.y.tolist(), strict=True):
            axis.set_ylabel(f"class {y}\nrandom direction")
        planes = torch.stack(list(self.losses.values()), 1).flatten(0, 1)
        draw_maps(figure, axes.flat, self.distances, planes, "cross-entropy")
        corners = torch.tensor([[1.0, 0.0, -1.0, 0.0, 1.0], [0.0, 1.0, 0.0, -1.0, 0.0]])
        for axis in axes.flat:
            axis.plot(*(self.eps * corners), "--", color="white", linewidth=0.9)
        return figure


def loss_surface(
    models: Models,
    x: Tensor,
    y: Tensor,
    eps: float,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    points: int = 25,
    samples: int = 2,
    seed: int = 0,
    batch_size: int = 256,
) -> LossSurface:
    """Cross-entropy of each model on a plane through some images.

    Costs ``points^2`` forward passes of each image. The plane is not cut off at the bounds: what lies outside is no image,
    but tells of the function that attacks climb.

    Args:
        models: map [N, ...] to logits [N, C]; one or several by name, in eval mode and left as found.
        x, y: clean images [N, ...] in the bounds, integer labels [N]. bounds: (lo, hi) of every element, or None.
        eps: how far the plane goes from the image along each direction, in the linf norm and in units of x.
        points: odd number of places along each direction. samples: how many of x, evenly spaced.
        seed: of the random direction, the same for all models. batch_size: how many at once; results do not depend on it.

    Raises:
        ValueError: an argument is not as described, or a model has no gradient at its input.
    """
    distances = centred("eps", eps, points)
    sample, losses = some(x, y, samples, bounds), {}
    asking = probes(models, "linf", bounds, seed, batch_size)
    with progress_bar("loss surface", len(asking) * len(sample[0]), "image") as bar:
        for name, probe in asking.items():
            x, y, numbers = (t.to(device_of(probe.model, x)) for t in sample)
            along = input_gradient(name, probe, x, y).sign()
            across = surface(Draws(seed, numbers), 0, x, 1.0, "linf")
            planes = []
            for i in range(len(x)):
                planes.append(_plane(probe, x[i], y[i], along[i], across[i], distances))
                bar.update()
            losses[name] = torch.stack(planes)
    return LossSurface(sample[0].cpu(), sample[1].cpu(), distances, losses, eps)


def _plane(probe: Probe, x: Tensor, y: Tensor, along: Tensor, across: Tensor, distances: Tensor) -> Tensor:
    """[A, A], around one image [...] of one label []."""
    column = distances.to(x).view(-1, *[1] * x.dim())
    lines = []
    for a in distances.tolist():
        logits = probe.logits(x + a * along + column * across)
        lines.append(F.cross_entropy(logits, y.expand(len(logits)), reduction="none").cpu())
    return torch.stack(lines)
