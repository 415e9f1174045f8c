"""``python -m benchmarks.evaluation``: AutoAttack's standard version by fastadv and by the reference, on the demo's networks.

Both attack the same digits with the same network in one process. Per attack, one after the other: first the reference's, on
the samples that stand in its own evaluation, then fastadv's on those that stand in its own; so each has the order and the
survivors of a whole run, on the same machine. Seconds are of one run each, by the wall clock.

The reference is fra31/auto-attack as on PyPI (pyautoattack). The networks are those that ``fastadv demo`` leaves in its folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fastadv
from fastadv import demo
from fastadv.evaluation.command import load_model
from fastadv.evaluation.protocol import standard_attacks

from . import peers, report, run

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
BATCH = 256

Attack = Callable[[Tensor, Tensor], Tensor]


def ours(model: nn.Module, eps: float, seed: int, engine: str, twin: bool) -> dict[str, Attack]:
    known = standard_attacks("standard", "linf")
    return {name: known[name][0](model, eps, seed=seed, engine=engine, twin=twin, **known[name][1]) for name in ATTACKS}


def attacked(model: nn.Module, attack: Attack, x: Tensor, y: Tensor, standing: Tensor, eps: float) -> tuple[Tensor, float]:
    """Who stands afterwards, by the network itself and inside the ball, and the seconds that the attack took."""
    after, seconds = standing.clone(), 0.0
    for rows in torch.split(standing.nonzero()[:, 0], BATCH):
        start = time.perf_counter()
        adv = attack(x[rows].clone(), y[rows].clone())
        seconds += time.perf_counter() - start
        with torch.no_grad():
            inside = ((adv - x[rows]).abs().flatten(1).amax(1) <= eps + 1e-6) & ((adv >= 0) & (adv <= 1)).flatten(1).all(1)
            after[rows] = ~(inside & (model(adv).argmax(1) != y[rows]))
    return after, seconds


def compared(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int, engine: str, twin: bool) -> dict[str, Any]:
    theirs = {name: part.perturb for name, part in peers.pyautoattack(model, "linf", eps, seed).items()}
    mine = ours(model, eps, seed, engine, twin)
    with torch.no_grad():
        right = model(x).argmax(1) == y
    standing = {"reference": right, "fastadv": right}
    rows = []
    for name in ATTACKS:
        row: dict[str, Any] = {"attack": name}
        for who, attacks in (("reference", theirs), ("fastadv", mine)):
            before = standing[who]
            standing[who], seconds = attacked(model, attacks[name], x, y, before, eps)
            row[who] = {"tried": int(before.sum()), "robust": int(standing[who].sum()), "seconds": seconds}
            print(name, who, row[who], file=sys.stderr, flush=True)
        rows.append(row)
    disagree = int((standing["reference"] != standing["fastadv"]).sum())
    named = f"pyautoattack {importlib.metadata.version('pyautoattack')}"
    return {"reference": named, "clean": int(right.sum()), "samples": len(x), "rows": rows, "samples that differ": disagree}


def table(name: str, eps: float, found: dict[str, Any]) -> str:
    n = found["samples"]
    cells = [["clean", f"{found['clean'] / n:.1%}", "", f"{found['clean'] / n:.1%}", "", ""]]
    whole = {who: sum(row[who]["seconds"] for row in found["rows"]) for who in ("reference", "fastadv")}
    for row in found["rows"]:
        theirs, mine = row["reference"], row["fastadv"]
        cells.append([
            row["attack"], f"{theirs['robust'] / n:.1%}", f"{theirs['seconds']:.1f}", f"{mine['robust'] / n:.1%}",
            f"{mine['seconds']:.1f}", f"{theirs['seconds'] / max(mine['seconds'], 1e-9):.2f}",
        ])  # fmt: skip
    cells.append(
        ["all", "", f"{whole['reference']:.1f}", "", f"{whole['fastadv']:.1f}", f"{whole['reference'] / whole['fastadv']:.2f}"]
    )
    headers = (f"{name}, linf {eps:g}, {n} digits", found["reference"], "s", "fastadv", "s", "times faster")
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT=EPS", help="as fastadv-demo/robust.pt=0.3")
    parser.add_argument("--samples", type=int, default=1000, help="test digits (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="eager", help="of fastadv (default: %(default)s)")
    parser.add_argument("--twin", action="store_true", help="of fastadv")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    content: dict[str, Any] = {"environment": report.environment(torch.device("cpu"), given.threads), "networks": {}}
    content |= {"engine": given.engine, "twin": given.twin}
    digits = demo.load_digits(given.seed)
    x, y = digits.x_test[: given.samples], digits.y_test[: given.samples]
    for one in given.checkpoints:
        path, _, eps = one.rpartition("=")
        model = load_model(path)[0].eval()
        found = compared(model, x, y, float(eps), given.seed, given.engine, given.twin)
        content["networks"][one] = found
        run.save(content, given.json)
        print(table(Path(path).stem, float(eps), found), f"\n{found['samples that differ']} samples differ in the verdict\n")
    return 0


if __name__ == "__main__":
    fastadv.tune_allocator()  # for both
    sys.exit(main())
