"""``fastadv report``: what became of a training run, on one page.

The curves are the run's own log. The network is attacked anew, by PGD on test images: that is a look, and ``fastadv evaluate``
the judge.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks, info, processes
from ..attacks import PGD
from ..evaluation import Evaluation, evaluate
from ..evaluation.command import load_model, try_on
from ..evaluation.outcome import radius
from ..evaluation.page import CLASSES, CLEAN, LOST, ROBUST, by_class, classes, gallery, has_matplotlib, interval
from ..evaluation.probes import evenly_spaced
from ..files import write_text
from ..report import Report, chart, finished, new_figure
from . import log
from .build import build_objective, yardstick
from .command import CONFIG, config_of
from .config import Config
from .data import load
from .trainer import attack_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 20  # of PGD, at least: what watches a training may take fewer
AVERAGE = "#d97706"  # legible on white and on near-black, as the others are


def write(folder: str | Path, samples: int = 1000, device: str | None = None) -> Path:
    """Writes report.html, and the same as report.md, into the folder of a run, finished or not. Returns the page's path.

    Args:
        folder: of ``fastadv train``.
        samples: test images to attack, evenly spaced.
        device: default: a GPU where there is one.

    Raises:
        ValueError, OSError: the folder holds no run, or none with an epoch done; or its data or a package are missing.
    """
    checks.integer("samples", samples)
    if not has_matplotlib():
        raise ValueError("a report needs matplotlib; install it with: pip install 'fastadv[train]'")
    run = read(Path(folder))
    report = page(run, attacked(run, samples, device))
    write_text(run.folder / "report.md", report.markdown())
    return report.write(run.folder / "report.html")


@dataclass(frozen=True)
class Run:
    """What a run has left so far."""

    folder: Path
    config: Config
    history: list[dict[str, float]]
    alarms: dict[str, str]

    @property
    def weights(self) -> str:
        """Those of the epoch that validation chose, once it has chosen one."""
        return "best" if (self.folder / "best.pt").is_file() else "last"

    @property
    def steps(self) -> int:
        return max(STEPS, self.config.validation.steps)

    def best(self, prefix: str = "") -> dict[str, float] | None:
        """The epoch of highest robust accuracy on validation images; prefix "average_": that of the averaged weights."""
        validated = [row for row in self.history if prefix + "robust" in row]
        return max(validated, key=lambda row: row[prefix + "robust"]) if validated else None


def read(folder: Path) -> Run:
    config = config_of(folder)
    try:
        return Run(folder, config, *log.read(folder))
    except FileNotFoundError as error:
        raise ValueError(f"the run in {str(folder)!r} has no epoch done yet: there is no {error.filename}") from None


def attacked(run: Run, samples: int, device: str | None = None) -> Evaluation:
    """Test images under the PGD that validation uses, with more steps."""
    config, place = run.config, processes.device(device)
    try:
        data = load(config.data.name, config.data.root, **config.data.arguments)
    except (ValueError, OSError) as error:
        raise ValueError(f"the data of {str(run.folder)!r} cannot be loaded from here: {error}") from None
    name = config.model.name  # with a colon it is code to run, which weights may not ask for: the user's config does
    network, _ = load_model(str(run.folder / f"{run.weights}.pt"), name if ":" in name else None)
    network = network.to(place).eval()
    chosen = evenly_spaced(samples, len(data.test))
    x, y = data.test.take(chosen).float() / 255, data.test.y[chosen]
    try_on(network, x[:1].to(place))
    by = yardstick(config, attack_of(build_objective(config, network, data.classes), network)) | {"steps": run.steps}
    pgd = PGD(network, **by, generator=torch.Generator(place).manual_seed(config.seed))
    return evaluate(
        network, (x, y), by["eps"], by["norm"], [pgd], by["bounds"], config.validation.batch_size, config.seed,
        alarms=False, keep_images=True, device=place,
    )  # fmt: skip


def page(run: Run, found: Evaluation) -> Report:
    config, done = run.config, f"{run.history[-1]['epoch']:.0f} of {run.config.epochs} epochs"
    method = config.method.name + (" with AWP" if config.awp is not None else "")
    title = f"{config.model.name} by {method} on {config.data.name}, seed {config.seed}, {done}"
    report = Report(f"Training run {run.folder.resolve().name}", title)
    _headline(report, run, found)
    _curves(report, run)
    classes(report, found, figures=True)
    _confusion(report, found)
    gallery(report, found)
    _judge(report, run, found)
    report.heading("Config")
    report.code((run.folder / CONFIG).read_text(encoding="utf-8").strip())
    report.heading("Environment")
    environment = info.environment() | {"attacked on": found.settings["device"]}
    return report.table([], list(environment.items()), "Of this page; what trained the network may have been another machine.")


# -------------------------------------------------------------------------------------------------------------- the numbers


def _headline(report: Report, run: Run, found: Evaluation) -> None:
    for name, sentence in run.alarms.items():
        report.note(f"Alarm, {name}: {sentence}.")
    if run.config.validation.select == "test":
        report.note("best.pt was chosen by the test set, so its accuracy there is too good: report it as such.")
    robust, clean, settings, last = found.robust_accuracy, found.clean_accuracy, found.settings, run.history[-1]
    numbers = [
        ("Robust accuracy", f"{robust:.1%}", f"PGD-{run.steps}, {interval(found, robust)}"),
        ("Clean accuracy", f"{clean:.1%}", interval(found, clean)),
    ]
    facts = [
        f"Accuracies are of {run.weights}.pt on {settings['samples']:,} test images, with 95% intervals, attacked by PGD of "
        f"{run.steps} steps on {run.config.validation.loss} loss, {settings['norm']} eps {radius(settings['eps'])}."
    ]
    for name, prefix in (("best", ""), ("best-average", "average_")):
        if (best := run.best(prefix)) is not None:
            accuracies = f"{best[prefix + 'clean']:.1%} clean, {best[prefix + 'robust']:.1%} robust"
            facts.append(f"{name}.pt is of epoch {best['epoch']:.0f}, which had {accuracies} on validation images.")
    if (best := run.best()) is not None:
        gap = best["robust"] - next(row["robust"] for row in reversed(run.history) if "robust" in row)
        numbers.append(("Best epoch", f"{best['epoch']:.0f}", f"of {last['epoch']:.0f}, by validation"))
        numbers.append(("Gap to the last", f"{100 * gap:.1f}", "points of robust accuracy"))
    else:
        facts.append("No epoch has been validated yet, so none is the best: these are the last weights.")
    if last["epoch"] < run.config.epochs:
        facts.append("The run is not at its end, or was ended early.")
    if not run.alarms:
        facts.append("No alarm rang while it trained.")
    report.headline(numbers).list(facts)


def _judge(report: Report, run: Run, found: Evaluation) -> None:
    """What was published, if the config tells, beside what was found; and how to get a number that may stand there."""
    report.heading("What stronger attacks find")
    if (about := run.config.about) is not None:
        parts = [f"The recipe is of {about.paper}.", about.code and f"Code: {about.code}.", about.notes]
        report.text(" ".join(filter(None, parts)))
        ours = {"clean": f"{found.clean_accuracy:.2%}", f"pgd-{run.steps}": f"{found.robust_accuracy:.2%}"}
        rows = [(name, f"{n:.2f}%", ours.pop(name.removeprefix(f"{run.weights} "), "")) for name, n in about.published.items()]
        if rows:
            rows += [(name, "", value) for name, value in ours.items()]
            report.table(["accuracy", "published", "this run"], rows, "Empty: not measured here.")
    report.text("PGD is an upper bound: a stronger attack may find more. The judge is AutoAttack, which publications compare:")
    report.code(judging(run, found))


def judging(run: Run, found: Evaluation) -> str:
    """The command that attacks the network as publications do."""
    config, norm = run.config, found.settings["norm"]
    data = config.data.name if config.data.root is None else f"{config.data.name}:{config.data.root}"
    if config.data.name == "mnist5k":
        data = f"digits:{config.data.arguments.get('seed', 0)}"
    words = ["fastadv", "evaluate", str(run.folder / f"{run.weights}.pt"), "--data", data]
    words += ["--eps", radius(found.settings["eps"]), *(["--norm", norm] if norm != "linf" else [])]
    words += ["--model", config.model.name] if ":" in config.model.name else []
    return shlex.join(words)


# -------------------------------------------------------------------------------------------------------------- the figures


def _curves(report: Report, run: Run) -> None:
    report.heading("Curves")
    for kind in ("robust", "clean"):
        lines = {f"train_{kind}": ("training", CLEAN), kind: ("validation", ROBUST), f"average_{kind}": ("averaged", AVERAGE)}
        _curve(report, run, f"{kind} accuracy", lines, "Of training batches as they come, and of images held out.")
    _curve(report, run, "loss", {"loss": ("", ROBUST)}, "Mean training loss of each epoch.")
    _curve(report, run, "learning rate", {"lr": ("", ROBUST)}, "At the end of each epoch.")
    _curve(report, run, "images per second", {"images_per_second": ("", ROBUST)}, "Of training, attacks included.")


def _curve(report: Report, run: Run, name: str, lines: dict[str, tuple[str, str]], caption: str) -> None:
    """A chart of columns of the log, each with its name and colour, as far as the log has them."""
    percent = name.endswith("accuracy")
    figure, axis = chart("epoch", name)
    told = []
    for column, (label, colour) in lines.items():
        if seen := [(row["epoch"], row[column]) for row in run.history if column in row]:
            axis.plot(*zip(*seen, strict=True), marker="" if len(seen) > 1 else "o", color=colour, label=label)
            first, last = (f"{value:.1%}" if percent else f"{value:.4g}" for _, value in (seen[0], seen[-1]))
            told.append(f"{label} from {first} to {last}".strip())
    if percent and (best := run.best()) is not None:
        axis.axvline(best["epoch"], color="gray", linestyle=":", label=f"best, epoch {best['epoch']:.0f}")
    if told:
        alt = f"{name.capitalize()} over {len(run.history)} epochs: {', '.join(told)}."
        report.figure(finished(figure, axis, percent), caption, alt)


def _confusion(report: Report, found: Evaluation) -> None:
    """What is read for what under attack, if there are few classes; and a table of the weakest."""
    weakest = sorted(by_class(found), key=lambda row: row[3])[:CLASSES]
    if len(weakest) < 2:
        return
    known = found.predicted >= 0  # NaN is no class
    size = 1 + int(max(found.labels.max(), found.predicted.max()))
    counts = torch.bincount(found.labels[known] * size + found.predicted[known], minlength=size**2).view(size, size)
    if size <= CLASSES:
        often = [f"{i} for {int(row.argmax())}" for i, row in enumerate(counts.clone().fill_diagonal_(0)) if row.any()]
        caption = "What is read under attack, in percent of each class; blue is right."
        report.figure(_confusion_figure(counts), caption, f"Most often taken under attack: {', '.join(often) or 'none'}.")
    cells = [(label, n, f"{clean:.1%}", f"{robust:.1%}") for label, n, clean, robust in weakest]
    report.table(["class", "samples", "clean", "robust"], cells, "The weakest first.")


def _confusion_figure(counts: Tensor) -> Figure:
    from matplotlib.colors import to_rgba

    size, shares = len(counts), counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = new_figure(0.6 + 0.36 * size, 0.6 + 0.3 * size)
    axis = figure.subplots()
    colours = torch.tensor([to_rgba(LOST)]).repeat(size, size, 1)
    colours[range(size), range(size)] = torch.tensor(to_rgba(ROBUST))
    colours[..., 3] = shares
    axis.imshow(colours.numpy(), interpolation="none", aspect="auto")
    for i, j in (shares >= 0.005).nonzero().tolist():
        axis.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=8.5)
    axis.set(xlabel="read as", ylabel="class", xticks=range(size), yticks=range(size))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure
