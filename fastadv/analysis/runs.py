"""What the logs of training runs tell when they are laid side by side: robust overfitting, and what robustness costs.

Rice, Wong and Kolter, "Overfitting in adversarially robust deep learning", 2020: robust accuracy on held-out images falls
after the learning rate has, while that on training images goes on rising. Tsipras et al., "Robustness May Be at Odds with
Accuracy", 2019, and Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", 2019: one is had
for the other, by TRADES' beta, by the radius of training or by AWP's gamma.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..evaluation.outcome import radius
from ..report import chart, finished
from .finding import COLOURS, coloured, told_apart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..training.config import Config
    from ..training.page import Run

BESIDE = 16  # characters of a label that fits beside its point
FRONTIER, BEATEN = COLOURS[1], COLOURS[-1]

Folders: TypeAlias = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class RunCurves:
    """Robust accuracy, in [0, 1], after epochs of a run.

    Attributes:
        validation: (epoch, accuracy) on validation images.
        training: the same on the batches that were trained on; empty where the method does not tell.
        best: that of ``validation`` that is highest, and the first of several.
    """

    validation: list[tuple[int, float]]
    training: list[tuple[int, float]]
    best: tuple[int, float]

    @property
    def gap(self) -> float:
        """Robust accuracy at the best epoch minus that at the last."""
        return self.best[1] - self.validation[-1][1]


@dataclass(frozen=True)
class RobustOverfitting:
    """What :func:`robust_overfitting` read: ``runs`` by name."""

    runs: dict[str, RunCurves]

    def __str__(self) -> str:
        lines = []
        for name, run in self.runs.items():
            line = "{}: robust accuracy is {:.1%} after epoch {}, its best, and {:.1%} after epoch {}, its last".format(
                name, *reversed(run.best), *reversed(run.validation[-1])
            )
            line += f", a gap of {100 * run.gap:.1f} points"
            if run.training:
                line += f"; on training images it ends at {run.training[-1][1]:.1%}"
            lines.append(line + ".")
        return "\n".join(lines)

    def figure(self) -> Figure:
        """Robust accuracy against epochs, on validation and (dashed) on training images; best and last are marked."""
        figure, axis = chart("epoch", "robust accuracy")
        for name, colour in coloured(self.runs).items():
            run = self.runs[name]
            axis.plot(*zip(*run.validation, strict=True), color=colour, label=name)
            if run.training:
                axis.plot(*zip(*run.training, strict=True), "--", color=colour, linewidth=1)
            axis.plot(*run.best, "D", color=colour)
            axis.plot(*run.validation[-1], "o", color=colour)
        for style, label in (("D", "best"), ("o", "last"), ("--", "training images")):
            axis.plot([], [], style, color="gray", label=label)
        return finished(figure, axis, percent=True)


@dataclass(frozen=True)
class RobustnessTradeoff:
    """What :func:`robustness_tradeoff` read, of each run by its name.

    Attributes:
        clean, robust: accuracy on validation images after the best epoch, in [0, 1].
        labels: what its config has that differs among the runs.
        frontier: the runs than which no other is better in one and at least as good in the other, by rising clean accuracy.
        radii: what robust accuracy was measured with; None: that of the method's paper.
    """

    clean: dict[str, float]
    robust: dict[str, float]
    labels: dict[str, str]
    frontier: list[str]
    radii: dict[str, float | None]

    def __str__(self) -> str:
        lines = [
            f"{label}: {self.clean[name]:.1%} clean, {self.robust[name]:.1%} robust." for name, label in self.labels.items()
        ]
        lines.append(f"On the frontier: {'; '.join(self.labels[name] for name in self.frontier)}.")
        if len(set(self.radii.values())) > 1:
            lines.append(
                "The runs were validated with different radii, so their robust accuracies are not of one threat: set "
                "validation.eps, or compare checkpoints by accuracy-against-eps."
            )
        return "\n".join(lines)

    def figure(self) -> Figure:
        """Robust against clean accuracy, each run with its label; a line joins the frontier."""
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        figure, axis = chart("clean accuracy", "robust accuracy")
        axis.plot([self.clean[name] for name in self.frontier], [self.robust[name] for name in self.frontier], color=FRONTIER)
        beside = max(map(len, self.labels.values())) <= BESIDE
        middle = (min(self.clean.values()) + max(self.clean.values())) / 2
        key = []
        for number, (name, label) in enumerate(self.labels.items(), start=1):
            place = self.clean[name], self.robust[name]
            key += axis.plot(*place, "o", color=FRONTIER if name in self.frontier else BEATEN)
            # The frontier falls: above it on the right and below it on the left there is room.
            left, told = place[0] <= middle, label if beside else str(number)
            away, across, up = ((6, 2), "left", "bottom") if left else ((-6, -2), "right", "top")
            axis.annotate(told, place, away, textcoords="offset points", ha=across, va=up, fontsize=8.5)
        if not beside:
            numbered = [f"{number}  {label}" for number, label in enumerate(self.labels.values(), start=1)]
            figure.legend(key, numbered, loc="outside lower left", frameon=False, fontsize=8.5)
            figure.set_figheight(figure.get_figheight() + 0.2 * len(numbered))
        finished(figure, axis, percent=True)
        axis.xaxis.set(major_locator=MaxNLocator(5), major_formatter=PercentFormatter(1))  # one decimal takes more room
        axis.margins(0.15)
        axis.autoscale()
        return figure


def robust_overfitting(folders: Folders) -> RobustOverfitting:
    """Robust accuracy over the epochs of one or several runs.

    Args:
        folders: of ``fastadv train``.

    Raises:
        ValueError, OSError: a folder holds no run, or none that was validated; or a package of ``fastadv[train]`` is missing.
    """
    return RobustOverfitting({name: _curves(run) for name, run in _runs(folders).items()})


def robustness_tradeoff(folders: Folders) -> RobustnessTradeoff:
    """Clean against robust accuracy of a set of runs, after the best epoch of each.

    Arguments and errors as :func:`robust_overfitting`'s.
    """
    runs = _runs(folders)
    best = {name: _best(run) for name, run in runs.items()}
    clean, robust = ({name: row[kind] for name, row in best.items()} for kind in ("clean", "robust"))
    radii = {name: _radius(run.config) for name, run in runs.items()}
    return RobustnessTradeoff(clean, robust, _labels(runs), pareto(clean, robust), radii)


def pareto(first: Mapping[str, float], second: Mapping[str, float]) -> list[str]:
    """The names than which no other has more of one and at least as much of the other, by rising ``first``."""
    kept = [
        name
        for name in first
        if not any(
            first[other] >= first[name]
            and second[other] >= second[name]
            and (first[other], second[other]) != (first[name], second[name])
            for other in first
        )
    ]
    return sorted(kept, key=lambda name: first[name])


def _runs(folders: Folders) -> dict[str, Run]:
    try:
        from ..training.page import read
    except ImportError as error:
        raise ValueError(f"reading runs needs {error.name}; install it with: pip install 'fastadv[train]'") from None
    paths = [Path(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
    if not paths:
        raise ValueError("folders must hold one at least; got none")
    names = told_apart([path.resolve().name for path in paths], [str(path) for path in paths])
    return {name: read(path) for name, path in zip(names, paths, strict=True)}


def _best(run: Run) -> dict[str, float]:
    best = run.best()
    if best is None:
        raise ValueError(f"no epoch of the run in {str(run.folder)!r} was validated")
    return best


def _curves(run: Run) -> RunCurves:
    validation, training = (
        [(int(row["epoch"]), row[column]) for row in run.history if column in row] for column in ("robust", "train_robust")
    )
    best = _best(run)
    return RunCurves(validation, training, (int(best["epoch"]), best["robust"]))


def _radius(config: Config) -> float | None:
    return config.attack.eps if config.validation.eps is None else config.validation.eps


def _labels(runs: Mapping[str, Run]) -> dict[str, str]:
    """Of each run what its config has that differs among them, as in "trades, beta 6"; its name where that is nothing."""
    from ..training.command import elsewhere

    configs = {name: _settings(elsewhere(run.config)) for name, run in runs.items()}
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    differing = [key for key in keys if len({config.get(key) for config in configs.values()}) > 1]
    names = [key for key in differing if key.endswith(".name")]  # which speak for themselves
    others = [key for key in differing if key not in names]
    words = dict.fromkeys(names, "") | dict(
        zip(others, told_apart([key.split(".")[-1] for key in others], others), strict=True)
    )
    labels = {}
    for name, config in configs.items():
        labels[name] = ", ".join(f"{word} {config[key]}".strip() for key, word in words.items() if key in config) or name
    return labels


def _settings(config: Config) -> dict[str, str]:
    """What the config sets: {"method.name": "trades", "method.beta": "6"}."""

    def flat(section: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
        for key, value in section.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{before}{key}.")
            else:
                yield before + key, radius(value) if isinstance(value, float) else str(value)

    return dict(flat(config.model_dump(mode="json", exclude_unset=True, exclude_none=True)))
