"""``fastadv analyze``: an analysis by name, of checkpoints or of runs, from the disk to a page."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checks
from ..evaluation.command import check_split, load_data, load_model, try_on
from ..evaluation.page import has_matplotlib
from ..evaluation.probes import evenly_spaced
from ..files import plain, replacing, write_text
from ..processes import device as device_of
from ..report import Report
from .finding import Finding, told_apart

CHECKPOINTS, RUNS, NOTHING = "checkpoints", "folders of fastadv train", "no path"
LOADING = ("data", "model", "device")  # options of analyses of checkpoints
DIGITS = "digits"  # the data where none are named
TRAINING = 1000  # training images at most that an analysis is given


@dataclass(frozen=True)
class Analysis:
    """A function of this package, found by the name of its command with _ for -.

    Attributes:
        of: what it is given: :data:`CHECKPOINTS`, :data:`RUNS` or :data:`NOTHING`.
        module: its own. line: what it shows.
    """

    of: str
    module: str
    line: str


ANALYSES = {
    "weight-landscape": Analysis(CHECKPOINTS, "landscape", "adversarial loss along random directions from the weights"),
    "weight-plane": Analysis(CHECKPOINTS, "landscape", "adversarial loss on a plane through the weights"),
    "input-gradients": Analysis(CHECKPOINTS, "gradients", "what the loss's gradient shows of an image"),
    "large-eps-examples": Analysis(CHECKPOINTS, "gradients", "adversarial images of a large radius"),
    "class-interpolations": Analysis(CHECKPOINTS, "gradients", "the way from an image to one of another class"),
    "loss-surface": Analysis(CHECKPOINTS, "surface", "loss on a plane through an image"),
    "pgd-convergence": Analysis(CHECKPOINTS, "convergence", "loss against the steps of PGD, from many starts"),
    "accuracy-against-eps": Analysis(CHECKPOINTS, "convergence", "accuracy under PGD of growing radius"),
    "robust-overfitting": Analysis(RUNS, "runs", "robust accuracy over epochs, its best and its last"),
    "robustness-tradeoff": Analysis(RUNS, "runs", "clean against robust accuracy of several runs"),
    "capacity-sweep": Analysis(NOTHING, "capacity", "accuracy of wider and wider networks; trains them, two minutes"),
    "gaussian-features": Analysis(NOTHING, "gaussian", "one strong feature and many weak ones, in theory and simulated"),
    "linear-tradeoff": Analysis(NOTHING, "linear", "when consistent augmentation hurts a linear regression"),
    "spline-tradeoff": Analysis(NOTHING, "linear", "the same on a staircase, and robust self-training"),
    "score-toy": Analysis(NOTHING, "score", "what PGD-AT, TRADES and SCORE ask of a model, on a toy problem"),
}


def run(
    name: str,
    paths: Sequence[str] = (),
    out: str | Path = "fastadv-analysis",
    command: str | None = None,
    **options: Any,
) -> Path:
    """Runs an analysis, prints what it found and writes it into a folder. Returns the path of the page.

    Args:
        name: of :data:`ANALYSES`. paths: checkpoints, or folders of runs.
        out: folder of NAME.html, NAME.svg and NAME.json.
        command: what the user typed, for the page.
        options: data, model and device, as :func:`loaded` takes them; and eps, norm, samples and seed, arguments of the
            analysis. None: its default.

    Raises:
        ValueError, OSError: something is not as described; the message says what.
    """
    if name not in ANALYSES:
        raise ValueError(f"there is no analysis {name!r}{checks.nearest(name, ANALYSES)}\n{listing()}")
    analysis, function = ANALYSES[name], function_of(name)
    takes = inspect.signature(function).parameters
    given = {key: value for key, value in options.items() if value is not None}
    loading = {key: given.pop(key) for key in LOADING if analysis.of == CHECKPOINTS and key in given}
    if unknown := [key for key in given if key not in takes]:
        raise ValueError(f"{name} takes no --{unknown[0]}")
    if "eps" in takes and takes["eps"].default is inspect.Parameter.empty and "eps" not in given:
        raise ValueError(f"{name} needs --eps, a radius in units of the images")
    if bool(paths) == (analysis.of == NOTHING):
        raise ValueError(f"{name} takes {analysis.of}; got {' '.join(paths) or 'none'}")
    if not has_matplotlib():
        raise ValueError("an analysis needs matplotlib; install it with: pip install 'fastadv[plot]'")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)  # an impossible one fails here and not after the work
    if analysis.of == RUNS:
        given["folders"] = paths
    if analysis.of == CHECKPOINTS:
        given |= loaded(paths, **loading)
    if "training" in takes:
        given["training"] = training_images(loading.get("data", DIGITS))
    found = function(**given)
    print(found)
    page = write(found, folder, name, command)
    print(f"\nPage: {page}")
    return page


def listing() -> str:
    """All analyses, a line each."""
    lines = []
    for of in (CHECKPOINTS, RUNS, NOTHING):
        lines.append(f"given {of}:")
        lines += [f"  {name:<22}{analysis.line}" for name, analysis in ANALYSES.items() if analysis.of == of]
    return "\n".join(lines)


def function_of(name: str) -> Callable[..., Finding]:
    module = importlib.import_module(f".{ANALYSES[name].module}", __package__)
    return getattr(module, name.replace("-", "_"))  # type: ignore[no-any-return]


def loaded(
    checkpoints: Sequence[str], data: str = DIGITS, model: str | None = None, device: str | None = None
) -> dict[str, Any]:
    """Models by the stems of their files, x and y, on the device and tried on each other."""
    place = device_of(device)
    x, y = load_data(data)
    names = told_apart([Path(path).stem for path in checkpoints], checkpoints)
    models = {}
    for name, path in zip(names, checkpoints, strict=True):
        network, split = load_model(path, model)
        check_split(data, split)
        models[name] = network.to(place).eval()
        try_on(models[name], x[:1].to(place))
    return {"models": models, "x": x, "y": y}


def training_images(data: str) -> tuple[Tensor, Tensor] | None:
    """Some of those that belong to --data, evenly spaced; None where that is a file."""
    from ..training.data import DATASETS, load

    dataset, _, where = data.partition(":")
    if dataset == DIGITS:
        images = load("mnist5k", seed=int(where or 0)).train
    elif dataset in DATASETS:
        images = load(dataset, where or None).train
    else:
        return None
    chosen = evenly_spaced(TRAINING, len(images))
    return images.take(chosen).float() / 255, images.y[chosen]


def write(found: Finding, folder: Path, name: str, command: str | None = None) -> Path:
    """Writes NAME.html, NAME.svg and NAME.json, each whole or not at all. Returns the path of the page."""
    data = json.dumps(plain(found), allow_nan=False) + "\n"
    write_text(folder / f"{name}.json", data)  # first: it is there even if it cannot be drawn
    figure, sentences = found.figure(), str(found).splitlines()
    report = Report(name.replace("-", " ").capitalize(), ANALYSES[name].line)
    for sentence in sentences:
        report.text(sentence)
    report.figure(figure, "", " ".join(sentences))
    if command is not None:
        report.heading("How to get this again").code(command)
    with replacing(folder / f"{name}.svg") as temporary:
        figure.savefig(temporary, format="svg")
    return report.write(folder / f"{name}.html")
