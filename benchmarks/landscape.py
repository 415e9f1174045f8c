"""``python -m benchmarks.landscape``: does AWP flatten the loss around the weights? Two trainings of the demo's network.

PGD-AT, and PGD-AT with adversarial weight perturbation, from the same initial weights on the same batches of 4,000 digits;
then :func:`fastadv.analysis.weight_landscape` of both on test digits. Some ten minutes on one thread; the documentation's
gallery draws what the file holds. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from fastadv import analysis, demo, files

from . import report, run
from .plots import RESULTS

FILE = RESULTS / "cpu-xeon-landscape.json"


def recorded(path: Path = FILE) -> analysis.WeightLandscape:
    """What a run has written."""
    found = json.loads(path.read_text())["landscape"]
    losses = {name: torch.tensor(rows) for name, rows in found["losses"].items()}
    return analysis.WeightLandscape(**found | {"alphas": torch.tensor(found["alphas"]), "losses": losses})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.landscape", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--gamma", type=float, default=0.005, help="of AWP")
    parser.add_argument("--samples", type=int, default=500, help="test digits, and training digits")
    parser.add_argument("--directions", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=FILE, metavar="FILE")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    digits, networks = demo.load_digits(given.seed), {}
    for name, gamma in (("PGD-AT", 0.0), ("PGD-AT with AWP", given.gamma)):
        networks[name] = demo.build_network(seed=given.seed)
        demo.train_robust(networks[name], digits, given.epochs, given.seed, [], gamma=gamma)
    x, y, x_test, y_test = (t[: given.samples] for t in digits)
    found = analysis.weight_landscape(
        networks, x_test, y_test, demo.EPS, directions=given.directions, samples=given.samples, training=(x, y), seed=given.seed
    )
    settings = {name: value for name, value in vars(given).items() if name != "json"}
    content = {
        "environment": report.environment(torch.device("cpu"), given.threads),
        "settings": settings,
        "landscape": files.plain(found),
    }
    run.save(content, given.json)
    print(found)


if __name__ == "__main__":
    main()
