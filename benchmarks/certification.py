"""``python -m benchmarks.certification``: randomised smoothing of the demo's network, and by a loop as public code has it.

The public loop (locuslab/smoothing): an image repeated, torch.randn for each batch of 1,000, argmax, and votes counted one by
one. Sides take turns, ten images each, in one process, one thread: that loop, fastadv, fastadv with a twin that votes, and
the same asked for one radius, which it decides with fewer votes. Votes on the noise that fastadv draws, cast by a plain loop
over the network, must be the same numbers: that is checked on every ``--check``-th image, untimed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn

import fastadv
from fastadv.attacks.draws import Draws, numbers_of
from fastadv.certify import Smooth, smoothing
from fastadv.evaluation.command import load_data, load_model

from . import report, run

PUBLIC_BATCH = 1000  # the default of its command
TOGETHER = 10  # images a turn


def public_votes(model: nn.Module, x: Tensor, sigma: float, n: int, classes: int) -> Tensor:
    counts = np.zeros(classes, dtype=int)
    with torch.no_grad():
        while n > 0:
            size = min(PUBLIC_BATCH, n)
            n -= size
            batch = x.repeat((size, 1, 1, 1))
            predictions = model(batch + torch.randn_like(batch) * sigma).argmax(1)
            for index in predictions.cpu().numpy():
                counts[index] += 1
    return torch.from_numpy(counts)


def votes_on_our_noise(model: nn.Module, x: Tensor, smooth: Smooth, n: int, classes: int) -> Tensor:
    """One draw of one image after the other, by a plain loop."""
    number, predictions = numbers_of(x), []
    with torch.no_grad():
        for first in range(0, n, PUBLIC_BATCH):
            draws = range(first, min(first + PUBLIC_BATCH, n))
            noise = torch.cat([Draws(smooth.seed, number, smoothing.ESTIMATION).normal(k, *x.shape[1:]) for k in draws])
            predictions.append(model(x + smooth.sigma * noise).argmax(1))
    return torch.cat(predictions).bincount(minlength=classes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.certification", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="of fastadv demo")
    parser.add_argument("--model", metavar="MODULE:FUNCTION")
    parser.add_argument("--samples", type=int, default=1000, help=f"a multiple of {TOGETHER}")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--radius", type=float, default=0.125)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--check", type=int, default=50, metavar="K")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    model, _ = load_model(str(given.checkpoint), given.model)
    model = model.eval().requires_grad_(False)
    x, y = (t[: given.samples] for t in load_data("digits"))
    smooth, twinned = (Smooth(model, given.sigma, batch_size=given.batch_size, twin=twin) for twin in (False, True))
    classes = 10
    sides: dict[str, Callable[[Tensor], object]] = {
        "public code": lambda images: [
            public_votes(model, image[None], given.sigma, n, classes) for image in images for n in (100, given.n)
        ],
        "fastadv": lambda images: smooth.certify(images, n=given.n),
        "fastadv, twin": lambda images: twinned.certify(images, n=given.n),
        f"fastadv, twin, {given.radius:g} or not": lambda images: twinned.certify(images, n=given.n, radius=given.radius),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    found: dict[str, list[object]] = {side: [] for side in sides}
    for side in sides.values():
        side(x[:1])  # what is made once is made
    torch.manual_seed(0)
    for turn, images in enumerate(torch.split(x, TOGETHER)):
        for side in list(sides) if turn % 2 else list(sides)[::-1]:
            start = time.perf_counter()
            found[side].append(sides[side](images))
            seconds[side].append((time.perf_counter() - start) / len(images))
    same = {"fastadv": True, "twin": True}
    for i in range(0, len(x), given.check):
        expected = votes_on_our_noise(model, x[i : i + 1], smooth, given.n, classes)
        for name, voters in zip(same, (smooth, twinned), strict=True):
            with voters._asking(x[i : i + 1]) as asked:
                votes = voters._vote(asked, x[i : i + 1], given.n, smoothing.ESTIMATION)[0]
            same[name] &= torch.equal(expected, votes[0])
    ours, by_twin, asked = (fastadv.certify.Certificates.joined(found[side]) for side in list(sides)[1:])  # type: ignore[arg-type]
    same["twin on all samples"] = torch.equal(ours.votes, by_twin.votes)
    agree = torch.equal(ours.right(y, given.radius), asked.right(y, given.radius))
    total = {side: TOGETHER * sum(taken) for side, taken in seconds.items()}
    quartiles = {
        side: torch.tensor(taken).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist() for side, taken in seconds.items()
    }
    content = {
        "environment": report.environment(torch.device("cpu"), given.threads),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()},
        "seconds": total, "quartiles an image": quartiles,
        "votes": {"fastadv": int(ours.runs.sum()), "radius": int(asked.runs.sum())},
        "same votes on the same noise": same, "same verdicts": agree,
        "certified accuracy": {f"{r:g}": float(ours.right(y, r).double().mean()) for r in (0.0, given.radius, given.sigma)},
    }  # fmt: skip
    run.save(content, given.json)
    rows = []
    for side, (low, median, high) in quartiles.items():
        times = f"{total['public code'] / total[side]:.2f}"
        rows.append([side, f"{total[side]:.1f}", f"{1e3 * median:.0f}", f"{1e3 * low:.0f} to {1e3 * high:.0f}", times])
    heads = ["side", "seconds", "ms an image", "quartiles", "times faster"]
    print(tabulate(rows, heads, tablefmt="github", disable_numparse=True))
    print(f"same votes on the same noise: {same}; same verdicts at the radius: {agree}; {content['certified accuracy']}")
    return 0


if __name__ == "__main__":
    fastadv.tune_allocator()  # for all sides
    sys.exit(main())
