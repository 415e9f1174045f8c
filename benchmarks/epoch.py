"""``python -m benchmarks.epoch``: TRADES on PreActResNet-18 by ``fastadv train``, and by a loop as public code has it.

Digits of scikit-learn, enlarged to 3x32x32. Both sides start from the same weights, see the same batches and start their
attacks at the same points, so their losses must agree: what differs is the work, 39 forward passes an image there (the clean
logits anew in every step, two clean passes in the loss) and 28 here (27, and one that keeps batch norms' statistics those of
the original). They take turns batch by batch in one process. Seconds are those of the loop's steps, by the wall clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fastadv
from fastadv.attacks.draws import Draws, normal_like
from fastadv.training import build, config
from fastadv.training.batches import Batch
from fastadv.training.trainer import ATTACK, Trainer

from . import baselines, report, run
from .training import ALPHA, BETA, EPS, STEPS, kl_sum

LR = 0.01


def ours(batches: int, batch_size: int, channels_last: bool, engine: str) -> Trainer:
    """The training, as a config file would ask for it."""
    held: dict[str, Any] = {
        "model": {"name": "preact-resnet18"},
        "data": {"name": "sklearn-digits", "size": 32, "channels": 3},
        "method": {"name": "trades", "beta": BETA, "bn_parity": True},
        "attack": {"eps": EPS, "alpha": ALPHA, "steps": STEPS, "init": "normal", "engine": engine},
        "optimizer": {"momentum": 0.9, "weight_decay": 5e-4},
        "schedule": {"name": "constant", "lr": LR},
        "epochs": 1,
        "batch_size": batch_size,
        "channels_last": channels_last,
        "max_steps": batches,
    }
    return build.trainer(config.check(held), device="cpu")


def public_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, step: int) -> Tensor:
    """TRADES as its code does it, from the same start as ours."""
    x, y = batch.x, batch.y
    model.eval()
    adv = x + normal_like(x, Draws(0, batch.samples, ATTACK + step)) * 0.001
    for _ in range(STEPS):
        adv.requires_grad_()
        (grad,) = torch.autograd.grad(kl_sum(model(x), model(adv)), adv)
        adv = baselines.textbook_step(adv.detach(), grad, x, EPS, ALPHA)
    model.train()
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y) + BETA / len(x) * kl_sum(model(x), model(adv))
    loss.backward()
    optimizer.step()
    return loss.detach()


def compared(batches: int, batch_size: int, channels_last: bool, engine: str) -> dict[str, list[float]]:
    """Losses and seconds of each batch, by either side."""
    trainer = ours(batches, batch_size, channels_last, engine)
    model = fastadv.models.build("preact-resnet18")
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4)
    found: dict[str, list[float]] = {"fastadv": [], "public code": [], "loss, fastadv": [], "loss, public code": []}
    trainer.model.train()
    for step, batch in zip(range(batches), trainer.batches.epoch(0), strict=False):
        sides = ("fastadv", "public code")
        for side in sides if step % 2 else sides[::-1]:
            start = time.perf_counter()
            if side == "fastadv":
                before = trainer.sums[0, 0].item()
                trainer._train(batch)
                loss = (trainer.sums[0, 0].item() - before) / len(batch.x)
            else:
                loss = float(public_step(model, optimizer, batch, step))
            found[side].append(time.perf_counter() - start)
            found[f"loss, {side}"].append(loss)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.epoch", description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true", help="of fastadv's side")
    parser.add_argument("--engine", default="eager", help="of fastadv's attack (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    found = compared(given.batches, given.batch_size, given.channels_last, given.engine)
    content = {"environment": report.environment(torch.device("cpu"), given.threads), "settings": vars(given) | {"json": None}}
    run.save(content | found, given.json)
    # The first batch of either side pays for what is made once.
    seconds = {side: found[side][1:] for side in ("public code", "fastadv")}
    rows = [
        [side, f"{sum(taken):.2f}", f"{statistics.median(taken):.2f}", f"{min(taken):.2f} to {max(taken):.2f}"]
        for side, taken in seconds.items()
    ]
    print(tabulate(rows, ["side", "seconds", "median a batch", "range"], tablefmt="github", disable_numparse=True))
    print(f"{sum(seconds['public code']) / sum(seconds['fastadv']):.2f} times faster")
    apart = max(abs(a - b) for a, b in zip(found["loss, fastadv"], found["loss, public code"], strict=True))
    print("losses:", ", ".join(f"{loss:.4f}" for loss in found["loss, fastadv"]), f"(at most {apart:.1g} apart)")
    return 0


if __name__ == "__main__":
    fastadv.tune_allocator()  # for both
    sys.exit(main())
