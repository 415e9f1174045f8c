"""``python -m benchmarks.landscape``: does AWP flatten the loss around the weights? Trainings of the demo's network.

PGD-AT, and PGD-AT with adversarial weight perturbation, from the same initial weights on the same batches of 4,000 digits;
then :func:`fastadv.analysis.weight_landscape` of both on test digits. All that with several seeds, for networks of two seeds
differ by more than the methods may. Some four minutes a seed on one thread; the documentation's gallery draws what the file
holds. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastadv import analysis, demo, files

from . import report, run
from .plots import RESULTS

FILE = RESULTS / "cpu-xeon-landscape.json"


def recorded(path: Path = FILE) -> analysis.WeightLandscape:
    """What a run has written, all seeds together: their directions one after the other, and their means."""
    found = json.loads(path.read_text())["landscapes"]
    losses = {name: torch.cat([torch.tensor(one["losses"][name]) for one in found]) for name in found[0]["losses"]}
    means = {
        field: {name: statistics.mean(one[field][name] for one in found) for name in losses}
        for field in ("sharpness", "robust_accuracy", "training_accuracy")
    }
    return analysis.WeightLandscape(**found[0] | means | {"alphas": torch.tensor(found[0]["alphas"]), "losses": losses})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.landscape", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--gamma", type=float, default=0.005, help="of AWP")
    parser.add_argument("--samples", type=int, default=500, help="test digits, and training digits")
    parser.add_argument("--directions", type=int, default=4, help="with each seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=FILE, metavar="FILE")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    content: dict[str, Any] = {
        "environment": report.environment(torch.device("cpu"), given.threads),
        "settings": {name: value for name, value in vars(given).items() if name != "json"},
        "landscapes": [],
    }
    for seed in range(given.seeds):
        digits, networks = demo.load_digits(seed), {}
        for name, gamma in (("PGD-AT", 0.0), ("PGD-AT with AWP", given.gamma)):
            networks[name] = demo.build_network(seed=seed)
            demo.train_robust(networks[name], digits, given.epochs, seed, [], gamma=gamma)
        x, y, x_test, y_test = (t[: given.samples] for t in digits)
        found = analysis.weight_landscape(
            networks, x_test, y_test, demo.EPS, directions=given.directions, samples=given.samples, training=(x, y), seed=seed
        )
        print(f"seed {seed}: {found}\n", flush=True)
        content["landscapes"].append(files.plain(found))
        run.save(content, given.json)
    print(f"all: {recorded(given.json)}")


if __name__ == "__main__":
    main()
