"""How PGD converges: from many random starts to nearly the same loss, which says that no first-order attack finds much more.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018: their figures of the loss against the steps
of PGD, and of how the final losses of many starts are distributed; and accuracy against eps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..attacks import PGD
from ..attacks.draws import Draws
from ..evaluation import Curves, robustness_curves
from ..evaluation.outcome import radius
from ..evaluation.probes import Probe, Recorder, device_of, some
from ..progress import progress_bar
from ..report import chart, finished, new_figure
from .finding import Models, coloured, named, probes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN = 20  # starts whose curves are drawn
BINS = 40  # of a histogram


@dataclass(frozen=True)
class PGDConvergence:
    """What :func:`pgd_convergence` saw.

    Attributes:
        y: labels [N] of the images.
        losses: [N, restarts, steps + 1] of each model by its name: cross-entropy at the start and after each step.
        eps, norm: as they were asked for.
    """

    y: Tensor
    losses: dict[str, Tensor]
    eps: float
    norm: str

    @property
    def spread(self) -> dict[str, Tensor]:
        """[N] of each model: the standard deviation of the final loss over the starts."""
        return {name: losses[..., -1].std(1, correction=0) for name, losses in self.losses.items()}

    def __str__(self) -> str:
        images, restarts, steps = next(iter(self.losses.values())).shape
        lines = [
            f"Cross-entropy of {images} images under PGD of {steps - 1} steps, {self.norm} eps {radius(self.eps)}, from "
            f"{restarts} random starts each."
        ]
        for name, losses in self.losses.items():
            first, last = losses[..., 0], losses[..., -1]
            lines.append(
                f"{name}: from {float(first.mean()):.3g} to {float(last.mean()):.3g} on average; over the starts of an image "
                f"the final loss spans {float((last.amax(1) - last.amin(1)).mean()):.2g}, with a standard deviation of "
                f"{float(self.spread[name].mean()):.2g}."
            )
        return "\n".join(lines)

    def figure(self) -> Figure:
        """For each image the loss against the steps, of up to 20 starts, and below it how the final losses are distributed."""
        images = len(self.y)
        figure = new_figure(1.0 + 2.3 * images, 4.6)
        above, below = figure.subplots(2, images, squeeze=False, sharex="row", sharey="row")
        for name, colour in coloured(self.losses).items():
            for i, losses in enumerate(self.losses[name]):
                above[i].plot(losses[:DRAWN].T, color=colour, linewidth=0.7, alpha=0.5)
                above[i].plot([], [], color=colour, label=name)
                final = losses[:, -1]
                below[i].hist(final, bins=BINS, range=self._range(), color=colour, alpha=0.8, label=name)
        for i, y in enumerate(self.y.tolist()):
            above[i].set(title=f"class {y}", xlabel="steps")
            below[i].set(xlabel="final loss")
            for axis in (above[i], below[i]):
                axis.grid(alpha=0.3)
                axis.spines[["top", "right"]].set_visible(False)
        above[0].set_ylabel("cross-entropy")
        below[0].set_ylabel("starts")
        above[0].legend(frameon=False)
        return figure

    def _range(self) -> tuple[float, float]:
        """Of final losses, with some room."""
        last = torch.cat([losses[..., -1].flatten() for losses in self.losses.values()])
        lo, hi = float(last.min()), float(last.max())
        return lo, max(hi, lo + 1e-3)


@dataclass(frozen=True)
class AccuracyAgainstEps:
    """What :func:`accuracy_against_eps` measured.

    Attributes:
        curves: of each model by its name (:func:`fastadv.evaluation.robustness_curves`).
        eps, norm: as they were asked for.
    """

    curves: dict[str, Curves]
    eps: float
    norm: str

    def __str__(self) -> str:
        one = next(iter(self.curves.values()))
        lines = [f"Accuracy of {one.samples} samples under PGD in growing {self.norm} balls; chance is {one.chance:.1%}."]
        for name, curves in self.curves.items():
            at = dict(zip(curves.eps, curves.accuracy, strict=True))
            told = f"{at[self.eps]:.1%} at eps {radius(self.eps)}" if self.eps in at else "chance or less before that eps"
            lines.append(f"{name}: {at[0.0]:.1%} clean, {told}, {curves.accuracy[-1]:.1%} at {curves.eps[-1]:.4g}.")
        return "\n".join(lines)

    def figure(self) -> Figure:
        figure, axis = chart("eps", "accuracy under PGD")
        axis.axhline(next(iter(self.curves.values())).chance, color="gray", linestyle=":", label="chance")
        axis.axvline(self.eps, color="gray", linewidth=0.8)
        for name, colour in coloured(self.curves).items():
            axis.plot(self.curves[name].eps, self.curves[name].accuracy, marker="o", color=colour, label=name)
        return finished(figure, axis, percent=True)


def pgd_convergence(
    models: Models,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    steps: int = 40,
    restarts: int = 100,
    samples: int = 4,
    seed: int = 0,
    batch_size: int = 256,
) -> PGDConvergence:
    """The loss of some images after each step of PGD, from many random starts.

    Costs ``restarts * (2 * steps + 1)`` F, forward passes of the samples.

    Args:
        models: map [N, ...] to logits [N, C]; one or several by name, attacked in eval mode and left as found.
        x, y: clean images [N, ...] in the bounds, integer labels [N].
        eps: radius in units of x. norm: "linf", "l2" or "l1". bounds: (lo, hi) of every element, or None.
        steps: of PGD, each of 2.5 eps / steps. restarts: random starts of each image.
        samples: how many of x, evenly spaced.
        seed: of the starts, the same for all models. batch_size: how many at once; results do not depend on it.

    Raises:
        ValueError: an argument is not as described.
    """
    checks.number("eps", eps)
    checks.integer("steps", steps)
    checks.integer("restarts", restarts)
    x, y, _ = some(x, y, samples, bounds)
    asking, losses = probes(models, norm, bounds, seed, batch_size), {}
    starts = torch.arange(len(x) * restarts)
    with progress_bar("PGD from many starts", len(asking) * len(starts), "start") as bar:
        for name, probe in asking.items():
            device, seen = device_of(probe.model, x), []
            for numbers in torch.split(starts, batch_size):
                image = (numbers // restarts).to(x.device)
                seen.append(_watched(probe, x[image].to(device), y[image].to(device), eps, steps, numbers.to(device)))
                bar.update(len(numbers))
            losses[name] = torch.cat(seen).view(len(x), restarts, steps + 1)
    return PGDConvergence(y.cpu(), losses, eps, norm)


def _watched(probe: Probe, x: Tensor, y: Tensor, eps: float, steps: int, numbers: Tensor) -> Tensor:
    """[N, steps + 1], cross-entropy on the way of PGD."""
    recorder = Recorder(probe.model)
    attack = PGD(
        recorder, eps, steps=steps, norm=probe.norm, bounds=probe.bounds, generator=Draws(probe.seed, numbers),
        keep_best=True,  # which asks about the last image, too
    )  # fmt: skip
    attack(x, y)
    return torch.stack([F.cross_entropy(logits, y, reduction="none").cpu() for logits in recorder.answers], 1)


def accuracy_against_eps(
    models: Models,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    samples: int = 256,
    seed: int = 0,
    batch_size: int = 256,
) -> AccuracyAgainstEps:
    """Accuracy of each model under PGD with radii from 0 to four times ``eps``.

    Arguments, costs and errors as those of :func:`fastadv.evaluation.robustness_curves`, which measures each model; ``eps``
    must be more than 0.
    """
    checks.number("eps", eps, positive=True)
    given, curves = named(models), {}
    with progress_bar("accuracy against eps", len(given), "model") as bar:
        for name, model in given.items():
            curves[name] = robustness_curves(model, x, y, eps, norm, bounds, seed, samples, batch_size)
            bar.update()
    return AccuracyAgainstEps(curves, eps, norm)
