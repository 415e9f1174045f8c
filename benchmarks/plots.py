"""What the result files hold, as figures for the documentation; what ``black`` draws there takes the page's colour.

``python -m benchmarks.plots RESULT.json... PICTURE.png``: images a second by batch size, from what end_to_end wrote.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
FLOOR = "fastest bare passes"
# Colours of Okabe and Ito, which every eye tells apart, but for the last.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#8A8A00")
# What is not fastadv is grey or black.
STYLES: dict[str, dict[str, Any]] = {
    FLOOR: {"color": "black", "linestyle": "--", "linewidth": 1},
    "public code, fp32": {"color": "0.65", "marker": "x"},
    "handwritten, best": {"color": "0.45", "marker": "+"},
    "fastadv, eager": {"color": "#E69F00", "marker": "o"},
    "fastadv, compile": {"color": "#56B4E9", "marker": "s"},
    "fastadv, graph": {"color": "#009E73", "marker": "D"},
    "fastadv, auto": {"color": "#D55E00", "marker": "*", "markersize": 9},
    "fastadv, twin": {"color": "#CC79A7", "marker": "^"},
    "fastadv, signs": {"color": "#0072B2", "marker": "v"},
    "fastadv, channels_last": {"color": "#CC79A7", "marker": "p"},
}
Panel = tuple[str, str, str]  # model, kind of work, precision
Lines = dict[str, dict[int, float]]  # images a second by batch size, by label


def main() -> int:
    *results, picture = map(Path, sys.argv[1:])
    draw([json.loads(path.read_text()) for path in results], picture)
    return 0


def draw(results: list[dict[str, Any]], picture: Path) -> None:
    """:func:`speeds` as a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if not _panels(results):
        print("nothing was measured, so there is nothing to draw", file=sys.stderr)
        return
    figure = speeds(results)
    FigureCanvasAgg(figure)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


def read(name: str) -> dict[str, Any]:
    """A kept result, by its name."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def speeds(results: list[dict[str, Any]]) -> Figure:
    """Images a second by batch size: a panel for each model (columns), kind of work and precision (rows) that was measured."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    panels = _panels(results)
    models = list(dict.fromkeys(model for model, _, _ in panels))
    kinds = list(dict.fromkeys((what, precision) for _, what, precision in panels))
    figure = Figure(figsize=(2 + 3.4 * len(models), 1.4 + 2.6 * len(kinds)), dpi=120, layout="constrained")
    grid = figure.subplots(len(kinds), len(models), squeeze=False)
    shown: dict[str, Any] = {}
    for i, (what, precision) in enumerate(kinds):
        for j, model in enumerate(models):
            axes, lines = grid[i][j], panels.get((model, what, precision), {})
            if not lines:
                axes.set_axis_off()
                continue
            for label in sorted(lines, key=list(STYLES).index):
                batches, rates = zip(*sorted(lines[label].items()), strict=True)
                (shown[label],) = axes.loglog(batches, rates, **{"linewidth": 1.3, "markersize": 5, **STYLES[label]})
            batches = sorted({batch for points in lines.values() for batch in points})
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda speed, _: f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_locator(NullLocator())
            axes.grid(alpha=0.3)
            axes.set_title(f"{model}, {'PGD-10' if what == 'attack' else f'{what} step'}, {precision}", fontsize=10)
            axes.set_xlabel("batch size, images")
            axes.set_ylabel("images per second")
    labels = [label for label in STYLES if label in shown]
    handles, across = [shown[label] for label in labels], min(len(labels), 2 * len(models))
    figure.legend(handles, labels, loc="outside lower center", ncols=across, fontsize=9, frameon=False)
    figure.suptitle(_where(results[0]["environment"]), fontsize=10)
    return figure


def ratios(result: dict[str, Any], *families: str) -> Figure:
    """Each contender's time over fastadv's, a row for each case whose name begins with one of ``families``."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    cases = [case for case in result["cases"] if case["case"].startswith(families)]
    names = dict.fromkeys(row["name"] for case in cases for row in case["contenders"] if row["name"] != "fastadv")
    colours = dict(zip(names, itertools.cycle(COLOURS), strict=False))
    figure = Figure(figsize=(7.6, 1.9 + 0.3 * len(cases)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color="black", linewidth=1)
    for name, colour in colours.items():
        rows = {i: row for i, case in enumerate(cases) for row in case["contenders"] if row["name"] == name}
        yardstick = any(row["yardstick"] for row in rows.values())
        style = {"marker": "|", "color": "0.55", "markersize": 11} if yardstick else {"marker": "o", "color": colour}
        axes.plot([row["over fastadv"] for row in rows.values()], list(rows), linestyle="", label=name, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(cases)), [case["case"] for case in cases])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("time over fastadv's: right of the line, slower")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(_where(result["environment"]), fontsize=10)
    return figure


def evaluation(result: dict[str, Any]) -> Figure:
    """Seconds of each attack of an evaluation, by fastadv and by the reference, of the first network of a result."""
    from matplotlib.figure import Figure

    network = next(iter(result["networks"].values()))
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for side, (name, label, colour) in enumerate(
        (("reference", network["reference"], "0.55"), ("fastadv", f"fastadv, {result['engine']}", "#E69F00"))
    ):
        places = [row + 0.36 * (side - 0.5) for row in range(len(network["rows"]))]
        bars = axes.barh(places, [row[name]["seconds"] for row in network["rows"]], 0.34, color=colour, label=label)
        axes.bar_label(bars, fmt=" {:.0f} s", fontsize=9)
    axes.set_yticks(range(len(network["rows"])), [row["attack"] for row in network["rows"]])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds")
    axes.legend(frameon=False)
    figure.suptitle(_where(result["environment"]), fontsize=10)
    return figure


def _where(env: dict[str, Any]) -> str:
    device = env["device"] if "cuda" in env else f"{env['device']}, threads: {env['threads']}"
    return f"{device}\ntorch {env['torch']}, fastadv {env['fastadv']} at {str(env['commit'])[:10]}"


def _panels(results: list[dict[str, Any]]) -> dict[Panel, Lines]:
    panels: dict[Panel, Lines] = defaultdict(lambda: defaultdict(dict))
    for case in (case for result in results for case in result["cases"]):
        for row in case["contenders"]:
            if "images/s" in row and not row["name"].startswith("bare twin"):
                label = row["name"]
                if row["yardstick"]:  # of the model's own bare passes only the fastest
                    label = FLOOR
                elif label.startswith("fastadv"):  # whichever engine the twin or the signs ran by
                    label = f"fastadv, {label.split(', ')[-1]}"
                points = panels[case["model"], case["what"], case["precision"]][label]
                points[case["batch"]] = max(row["images/s"], points.get(case["batch"], 0.0))
    return panels


if __name__ == "__main__":
    sys.exit(main())
