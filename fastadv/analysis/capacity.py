"""What capacity does to robustness: to resist attacks takes a larger network than to classify.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, their figure of accuracy against the
capacity of networks for digits, here on the 5,000 of ``fastadv demo`` and with its small network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import checks, demo
from ..report import chart, finished
from .finding import coloured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAININGS = ("standard", "PGD-AT")
STYLES = {"clean": "-", "robust": "--"}


@dataclass(frozen=True)
class CapacitySweep:
    """What :func:`capacity_sweep` measured.

    Attributes:
        widths: channels of the first convolution. parameters: of the networks of these widths.
        clean, robust: of each training, "standard" and "PGD-AT", accuracy on the test digits by width, in [0, 1]; robust:
            under PGD.
        eps: radius of training and attack, linf. epochs: of each training.
    """

    widths: list[int]
    parameters: list[int]
    clean: dict[str, list[float]]
    robust: dict[str, list[float]]
    eps: float
    epochs: int

    def __str__(self) -> str:
        lines = [f"Networks for digits, {self.epochs} epochs each, under PGD with linf eps {self.eps:g}."]
        for training in TRAININGS:
            measured = zip(self.widths, self.clean[training], self.robust[training], strict=True)
            told = ", ".join(f"{width}: {clean:.1%} clean and {robust:.1%} robust" for width, clean, robust in measured)
            lines.append(f"{training} training by width, {told}.")
        return "\n".join(lines)

    def figure(self) -> Figure:
        """Accuracy against width, of both trainings, clean and under attack."""
        from matplotlib.ticker import FixedLocator, NullLocator

        figure, axis = chart("width", "accuracy")
        for training, colour in coloured(TRAININGS).items():
            for (kind, style), accuracies in zip(STYLES.items(), (self.clean, self.robust), strict=True):
                axis.plot(self.widths, accuracies[training], style, marker="o", color=colour, label=f"{training}, {kind}")
        axis.set_xscale("log", base=2)
        axis.xaxis.set(major_locator=FixedLocator(self.widths), minor_locator=NullLocator(), major_formatter="{x:.0f}")
        finished(figure, axis, percent=True)
        axis.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return figure


def capacity_sweep(widths: Sequence[int] = (2, 4, 8, 16), epochs: int = 6, seed: int = 0) -> CapacitySweep:
    """Trains the demo's network in several widths, as usual and adversarially, and attacks them; two minutes on a CPU.

    Under attack the smallest networks may learn nothing and call all digits the same, at what width is up to the seed.

    Args:
        widths: channels of the first convolution (:func:`fastadv.demo.small_cnn`); 16 is that of the demo.
        epochs: of each training. seed: of data, initialisation, batches and attacks.

    Raises:
        ValueError: an argument is not as described, or a package that holds the digits is missing.
    """
    if not widths:
        raise ValueError("widths must hold one at least; got none")
    chosen = [checks.integer("widths", width) for width in widths]
    checks.integer("epochs", epochs)
    try:
        digits = demo.load_digits(checks.integer("seed", seed, 0))
    except ImportError as error:
        raise ValueError(f"the digits need {error.name}; install it with: pip install 'fastadv[demo]'") from None
    parameters: list[int] = []
    found: dict[str, dict[str, list[float]]] = {kind: {training: [] for training in TRAININGS} for kind in STYLES}
    for width in chosen:
        parameters.append(sum(p.numel() for p in demo.small_cnn(width=width).parameters()))
        for training, train in zip(TRAININGS, (demo.train_standard, demo.train_robust), strict=True):
            model = demo.small_cnn(seed, width=width)
            train(model, digits, epochs, seed, [])
            attack = demo.evaluation_pgd(model, demo.EPS, demo.TEST_STEPS, seed)
            found["clean"][training].append(demo.accuracy(model, digits.x_test, digits.y_test))
            found["robust"][training].append(demo.accuracy(model, digits.x_test, digits.y_test, attack))
    return CapacitySweep(chosen, parameters, found["clean"], found["robust"], demo.EPS, epochs)
