"""The page of an evaluation: what came out, whether it can be believed, and how to get it again, in that order."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import info
from ..report import Report, chart, finished, new_figure
from .alarms import Alarm
from .curves import Curves
from .outcome import Evaluation, described, radius

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXAMPLES = 9  # in the gallery
CLASSES = 20  # in the chart by class
CLEAN, ROBUST, LOST = "#8b95a1", "#3b82f6", "#e5484d"  # legible on white and on near-black


def page(found: Evaluation, figures: bool = True) -> Report:
    """The page, with tables where figures are not wanted, or cannot be drawn for want of matplotlib."""
    figures = figures and has_matplotlib()
    report = Report("Robustness evaluation", described(found.settings))
    _headline(report, found)
    _attacks(report, found, figures)
    if found.alarms:
        _alarms(report, found)
    if found.curves is not None:
        _curves(report, found, found.curves, figures)
    classes(report, found, figures)
    if figures:
        gallery(report, found)
    report.heading("What no program can check")
    report.list(found.checklist)
    report.heading("How to get this again")
    report.code(reproduction(found.settings))
    settings = {name: _setting(value) for name, value in found.settings.items() if name not in ("attacks", "command")}
    report.table([], [*settings.items(), *found.settings["attacks"].items()], "Settings, and those of each attack.")
    report.table([], list(info.environment().items()), "Environment.")
    return report


def reproduction(settings: Mapping[str, Any]) -> str:
    """The command, where it was one; else the call."""
    if "command" in settings:
        return str(settings["command"])
    given = {"eps": radius(settings["eps"]).replace("/", " / ")}
    given |= {name: repr(settings[name]) for name in ("norm", "version", "bounds", "seed", "engine", "precision")}
    if settings["version"] == "custom":
        given["version"] = repr(list(settings["attacks"]))
    if settings["bounds"] is not None:
        given["bounds"] = repr(tuple(settings["bounds"]))
    return f"fastadv.evaluate(model, (x, y), {', '.join(f'{name}={value}' for name, value in given.items())})"


# -------------------------------------------------------------------------------------------------------------- the numbers


def _headline(report: Report, found: Evaluation) -> None:
    if found.ringing:
        names = "; ".join(alarm.name for alarm in found.ringing)
        which = "An alarm rings" if len(found.ringing) == 1 else f"{len(found.ringing)} alarms ring"
        report.note(f"{which}: {names}. The true robust accuracy may be lower than the one below.")
    alarms = f"{len(found.ringing)} of {len(found.alarms)}" if found.alarms else "not looked for"
    seconds = sum(row.seconds for row in found.rows)
    report.headline(
        [
            ("Robust accuracy", f"{found.robust_accuracy:.1%}", f"{interval(found, found.robust_accuracy)}, 95% interval"),
            ("Clean accuracy", f"{found.clean_accuracy:.1%}", f"{interval(found, found.clean_accuracy)}, 95% interval"),
            ("Alarms that ring", alarms, "signs of a flawed evaluation"),
            ("Time of all attacks", _time(seconds), f"{found.settings['device']}"),
        ]
    )
    text = (
        "Robust accuracy is the share of samples that the model classifies correctly and that no attack could change within "
        "the radius. It is an upper bound: a stronger attack may find more. The intervals tell what so many samples can: with "
        "other samples of the same kind the numbers would be elsewhere in them."
    )
    if found.settings["version"] != "standard":
        text += f" Version {found.settings['version']} is not the one that leaderboards compare; that is version standard."
    report.text(text)


def _attacks(report: Report, found: Evaluation, figures: bool) -> None:
    report.heading("Attack by attack")
    if figures:
        told = "; ".join(f"{name} {stands:.1%} stand" for name, stands, _ in _stages(found))
        report.figure(
            _stages_figure(found),
            "Each attack is tried on the samples that stand after those above it. Blue stands, red is what the attack broke.",
            f"Accuracy after each attack. {told}.",
        )
    report.table(
        ["attack", "tried", "broken", "rejected", "robust accuracy", "95% interval", "passes a sample", "time"],
        [
            (row.attack, row.tried, row.broken, row.rejected, f"{row.robust_accuracy:.2%}",
             interval(found, row.robust_accuracy), f"{row.queries:,.0f}", _time(row.seconds))
            for row in found.rows
        ],
        "Rejected: images that an attack took for adversarial and that are not: the model, asked once more without autocast, "
        "is right about them, or they lie outside the ball or the box. Passes: forward passes, on average.",
    )  # fmt: skip


def _stages(found: Evaluation) -> list[tuple[str, float, float]]:
    """(name, share that stands after it, share that it broke), of the clean images and of each attack."""
    stages = [("clean", found.clean_accuracy, 1 - found.clean_accuracy)]
    for row in found.rows:
        stages.append((row.attack, row.robust_accuracy, stages[-1][1] - row.robust_accuracy))
    return stages


def _alarms(report: Report, found: Evaluation) -> None:
    report.heading("Can it be believed?")
    silent = [alarm for alarm in found.alarms if not alarm.rings]
    report.text(
        "Where an attack fails for its own reasons a model looks robust and is not. Each alarm looks for one sign of that. "
        + ("None rings. That is no proof." if not found.ringing else "These ring, and say what to do:")
    )
    if found.ringing:
        ringing = [(alarm.name, _numbers(alarm), f"{alarm.advice} ({alarm.source})") for alarm in found.ringing]
        report.table(["alarm", "what was found", "what to do"], ringing)
    if silent:
        report.table(
            ["silent alarm", "what was found"], [(f"{alarm.name} ({alarm.source})", _numbers(alarm)) for alarm in silent]
        )


def _numbers(alarm: Alarm) -> str:
    """Accuracies and fractions in percent, and what other numbers there are."""
    told = []
    for name, value in alarm.numbers.items():
        share = any(word in name for word in ("accuracy", "fraction", "chance", "drop")) and 0 <= value <= 1
        told.append(f"{name}: {value:.1%}" if share else f"{name}: {value:.4g}")
    return "; ".join(told) or "nothing"


# --------------------------------------------------------------------------------------------------------------- the curves


def _curves(report: Report, found: Evaluation, curves: Curves, figures: bool) -> None:
    report.heading("Curves")
    last = len(curves.accuracy_by_step) - 1
    against_eps = (
        f"Accuracy against eps, under PGD alone, of {curves.samples} samples. It must reach chance (dotted): a curve that "
        "stays above tells of an attack that fails."
    )
    against_steps = (
        f"Accuracy and mean cross-entropy after each step of PGD, of {curves.samples} samples. Where they still move at the "
        "end, the attack was stopped too soon."
    )
    if not figures:
        radii = zip(curves.eps, curves.accuracy, strict=True)
        report.table(["eps", "accuracy"], [(f"{eps:.4g}", f"{accuracy:.1%}") for eps, accuracy in radii], against_eps)
        seen = [step for step in (0, 1, 2, 5, 10, 20, 50, 100) if step <= last]
        report.table(
            ["steps", "accuracy", "cross-entropy"],
            [(step, f"{curves.accuracy_by_step[step]:.1%}", f"{curves.loss_by_step[step]:.3g}") for step in seen],
            against_steps,
        )
        return
    told = ", ".join(f"{accuracy:.0%} at {eps:.4g}" for eps, accuracy in zip(curves.eps, curves.accuracy, strict=True))
    report.figure(
        _eps_figure(found, curves),
        f"{against_eps} The diamond is the accuracy of all {len(found.labels):,} samples under all attacks.",
        f"Accuracy against eps. {told}.",
    )
    report.figure(
        _steps_figure(curves),
        against_steps,
        f"From the random start to step {last} accuracy goes from {curves.accuracy_by_step[0]:.0%} to "
        f"{curves.accuracy_by_step[-1]:.0%}, cross-entropy from {curves.loss_by_step[0]:.3g} to {curves.loss_by_step[-1]:.3g}.",
    )


def classes(report: Report, found: Evaluation, figures: bool) -> None:
    """Clean and robust accuracy of each class, where there are several."""
    rows = by_class(found)
    if len(rows) < 2:
        return
    hardest = sorted(rows, key=lambda row: row[3])[:CLASSES]
    shown = rows if len(rows) <= CLASSES else hardest
    caption = (
        "Accuracy of each class." if shown is rows else f"The {CLASSES} of {len(rows)} classes with the least robust accuracy."
    )
    report.heading("Class by class")
    if not figures:
        cells = [(label, n, f"{clean:.1%}", f"{robust:.1%}") for label, n, clean, robust in shown]
        report.table(["class", "samples", "clean", "robust"], cells, caption)
        return
    label, n, _, least = hardest[0]
    report.figure(
        _classes_figure(shown),
        f"{caption} Least: class {label}, of whose {n} samples {least:.0%} stand.",
        " ".join(f"Class {label}: {clean:.0%} clean, {robust:.0%} robust." for label, _, clean, robust in shown),
    )


def by_class(found: Evaluation) -> list[tuple[int, int, float, float]]:
    """(class, samples, clean accuracy, robust accuracy) of the classes that have samples."""
    right = torch.tensor([name != "clean" for name in found.broken_by])
    stands = torch.tensor([not name for name in found.broken_by])
    rows = []
    for label in sorted(set(found.labels.tolist())):
        of = found.labels == label
        n = int(of.sum())
        rows.append((label, n, int(right[of].sum()) / n, int(stands[of].sum()) / n))
    return rows


# -------------------------------------------------------------------------------------------------------------- the figures


def _stages_figure(found: Evaluation) -> Figure:
    stages = _stages(found)
    figure = new_figure(5.4, 0.7 + 0.42 * len(stages))
    axis = figure.subplots()
    for place, (name, stands, broke) in enumerate(stages):
        axis.barh(place, stands, color=CLEAN if name == "clean" else ROBUST, height=0.66)
        axis.barh(place, broke, left=stands, color=LOST, height=0.66)
        told = [f"{stands:.1%}", *([f"\N{MINUS SIGN}{broke:.1%}"] if broke else [])]
        label: Any = {"textcoords": "offset points", "va": "center"}
        if stands > 0.2:  # room for the number inside the bar
            axis.annotate(told.pop(0), (stands, place), (-6, 0), ha="right", color="white", **label)
        axis.annotate("  ".join(told), (stands + broke, place), (6, 0), **label)
    axis.set_yticks(range(len(stages)), [name for name, *_ in stages])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.tick_params(left=False)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _eps_figure(found: Evaluation, curves: Curves) -> Figure:
    figure, axis = chart("eps", "accuracy")
    axis.axhline(curves.chance, color="gray", linestyle=":", label="chance")
    axis.axvline(found.settings["eps"], color="gray", linewidth=0.8)
    axis.plot(curves.eps, curves.accuracy, marker="o", color=ROBUST, label="under PGD")
    axis.plot(found.settings["eps"], found.robust_accuracy, "D", color=LOST, label="under all attacks", linestyle="none")
    return finished(figure, axis, percent=True)


def _steps_figure(curves: Curves) -> Figure:
    figure, axis = chart("steps of PGD", "accuracy")
    accuracy = axis.plot(curves.accuracy_by_step, color=ROBUST, label="accuracy")
    finished(figure, axis, percent=True)
    beside = axis.twinx()
    loss = beside.plot(curves.loss_by_step, "--", color=LOST, label="cross-entropy")
    beside.set_ylabel("cross-entropy")
    beside.set_ylim(0, None)
    beside.spines[["top"]].set_visible(False)
    axis.legend(handles=[*accuracy, *loss], frameon=False)
    return figure


def _classes_figure(rows: list[tuple[int, int, float, float]]) -> Figure:
    figure = new_figure(max(4.8, 1.0 + 0.48 * len(rows)), 3.4)
    axis = figure.subplots()
    for place, (_, _, clean, robust) in enumerate(rows):
        axis.bar(place - 0.2, clean, 0.38, color=CLEAN, label="" if place else "clean")
        axis.bar(place + 0.2, robust, 0.38, color=ROBUST, label="" if place else "robust")
    axis.set_xticks(range(len(rows)), [str(label) for label, *_ in rows])
    axis.set(xlabel="class", ylabel="accuracy")
    axis.set_axisbelow(True)
    finished(figure, axis, percent=True)
    axis.set_ylim(0, 1.18)  # room for the legend
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axis.grid(visible=False, axis="x")
    axis.legend(frameon=False, ncols=2, loc="upper right")
    return figure


# --------------------------------------------------------------------------------------------------------------- the images


def gallery(report: Report, found: Evaluation) -> None:
    """Some of the samples that an attack broke, evenly spaced, where they are images and were kept."""
    x, x_adv = found.x, found.x_adv
    if x is None or x_adv is None or x.dim() != 4 or x.shape[1] not in (1, 3):
        return
    broken = [i for i, name in enumerate(found.broken_by) if name not in ("", "clean")]
    if not broken:
        return
    count = min(EXAMPLES, len(broken))
    report.heading("Adversarial examples")
    report.text(
        f"{count} of the {len(broken):,} samples that an attack broke: the clean image, the adversarial one, and the "
        "difference, stretched to the full range of colours. Only a look at them tells whether the radius makes sense: a "
        "person should still see the true class."
    )
    for i in (broken[k * len(broken) // count] for k in range(count)):
        truth, read, attack = int(found.labels[i]), int(found.predicted[i]), found.broken_by[i]
        distance = f"{found.settings['norm']} distance {float(found.distance[i]):.3g}"
        report.figure(
            _example_figure(x[i].float(), x_adv[i].float(), found.settings["bounds"]),
            f"Sample {i}, class {truth}, is read as {read} after {attack}, {distance}.",
            f"Sample {i} of class {truth}, clean, after {attack}, and the difference.",
        )


def _example_figure(clean: Tensor, adversarial: Tensor, bounds: tuple[float, float] | None) -> Figure:
    """Three images [1 or 3, H, W] side by side."""
    lo, hi = bounds if bounds is not None else (float(clean.min()), float(clean.max()))
    difference = adversarial - clean
    largest = max(float(difference.abs().max()), math.ulp(0.0))
    figure = new_figure(3.1, 1.25)
    axes = figure.subplots(1, 3)
    for axis, image, title in zip(axes, (clean, adversarial), ("clean", "adversarial"), strict=False):
        show(axis, (image - lo) / (hi - lo), "gray", title)
    colours = "PuOr_r" if len(clean) == 1 else "gray"
    show(axes[2], 0.5 + 0.5 * (difference / largest), colours, f"\N{PLUS-MINUS SIGN}{largest:.2g}")
    return figure


def show(axis: Axes, image: Tensor, colours: str = "gray", title: str = "") -> None:
    """An image [1 or 3, H, W] in [0, 1], pixel by pixel."""
    image = image.clamp(0, 1)
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    axis.imshow(pixels.numpy(), cmap=colours, vmin=0, vmax=1, interpolation="none")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=9)


# ---------------------------------------------------------------------------------------------------------------- in words


def interval(found: Evaluation, accuracy: float) -> str:
    """The 95% interval, in percent."""
    lo, hi = found.interval(accuracy)
    return f"{100 * lo:.1f} to {hi:.1%}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _setting(value: Any) -> str:
    return " to ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def has_matplotlib() -> bool:
    """Whether figures can be drawn."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        return False
    return True
