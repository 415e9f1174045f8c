"""``python -m benchmarks.plots RESULT.json... PICTURE.png``: images a second by batch size, from what end_to_end wrote."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

FLOOR = "fastest bare passes"
# Colours of Okabe and Ito, which every eye tells apart; what is not fastadv is grey or black.
STYLES: dict[str, dict[str, Any]] = {
    FLOOR: {"color": "black", "linestyle": "--", "linewidth": 1},
    "public code, fp32": {"color": "0.6", "marker": "x"},
    "handwritten, best": {"color": "0.3", "marker": "+"},
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
    """A panel for each model (columns), kind of work and precision (rows) that was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    panels = _panels(results)
    if not panels:
        print("nothing was measured, so there is nothing to draw", file=sys.stderr)
        return
    models = list(dict.fromkeys(model for model, _, _ in panels))
    kinds = list(dict.fromkeys((what, precision) for _, what, precision in panels))
    figure = Figure(figsize=(2 + 3.4 * len(models), 1.4 + 2.6 * len(kinds)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(kinds), len(models), squeeze=False)
    shown: dict[str, Any] = {}
    for i, (what, precision) in enumerate(kinds):
        for j, model in enumerate(models):
            axes, lines = grid[i][j], panels.get((model, what, precision), {})
            if not lines:
                axes.set_axis_off()
                continue
            for label in sorted(lines, key=list(STYLES).index):
                batches, speeds = zip(*sorted(lines[label].items()), strict=True)
                (shown[label],) = axes.loglog(batches, speeds, **{"linewidth": 1.3, "markersize": 5, **STYLES[label]})
            batches = sorted({batch for points in lines.values() for batch in points})
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda speed, _: f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_locator(NullLocator())
            axes.grid(linewidth=0.3)
            axes.set_title(f"{model}, {'PGD-10' if what == 'attack' else f'{what} step'}, {precision}", fontsize=10)
            axes.set_xlabel("batch size, images")
            axes.set_ylabel("images per second")
    labels = [label for label in STYLES if label in shown]
    handles, across = [shown[label] for label in labels], min(len(labels), 2 * len(models))
    figure.legend(handles, labels, loc="outside lower center", ncols=across, fontsize=9)
    env = results[0]["environment"]
    where = env["device"] if "cuda" in env else f"{env['device']}, threads: {env['threads']}"
    figure.suptitle(f"{where}\ntorch {env['torch']}, fastadv {env['fastadv']} at {str(env['commit'])[:10]}", fontsize=10)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


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
