"""What is watched while training: accuracy on images that the training does not see, and the signs of a training gone wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..attacks import PGD
from ..attacks.draws import Draws
from ..engine import attacking
from ..processes import rank, total, world
from .data import Images

Row = Mapping[str, Any]

COLLAPSE = 0.5  # of the best clean accuracy so far: less is left where all images are called the same
DROP = 0.2  # of robust accuracy within an epoch: catastrophic overfitting (Wong et al., 2020)
GAP = 0.02  # below the best so far, while training still gains: robust overfitting (Rice et al., 2020)
MASKED = 0.01  # that one step fools more than ten do, or of gradients that are zero


class Validation:
    """Clean and robust accuracy: ``Validation(images, eps=8/255)(model)``.

    Args:
        images: the processes of a run share them, equally many each, as FSDP2 needs it: a last few may be seen twice, and count
            once.
        eps, steps, norm, loss, bounds: of PGD from a random start, the same one in each call.
        batch_size: at once, in each process.
        seed: of the starts.
        device: of the model.
    """

    def __init__(
        self,
        images: Images,
        eps: float,
        steps: int = 10,
        norm: str = "linf",
        loss: str = "ce",
        bounds: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 500,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not len(images):
            raise ValueError("images must hold at least one; got none")
        self.eps, self.steps = checks.number("eps", eps), checks.integer("steps", steps)
        self.norm, self.loss, self.bounds, self.seed = norm, loss, bounds, seed
        self.batch_size = checks.integer("batch_size", batch_size)
        self.count = len(images)
        self.numbers = torch.arange(math.ceil(self.count / world())) * world() + rank()
        self.images = images.rows(self.numbers % self.count)
        self.device = torch.device(device)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """In [0, 1]: "clean" accuracy, "robust" under PGD, "fgsm" under its first step alone (of eps), and the fraction of
        "zero_grad"ients. In eval mode; the model is left as found."""
        pgd = PGD(model, self.eps, steps=self.steps, norm=self.norm, loss=self.loss, bounds=self.bounds)
        fgsm = PGD(model, self.eps, self.eps, 1, self.norm, self.loss, "zero", bounds=self.bounds)
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for numbers, x, y in self._batches():
            pgd.generator = Draws(self.seed, numbers)
            with attacking(model, "eval"), torch.no_grad():
                found = [_correct(model, x, y), _correct(model, pgd(x, y), y), _correct(model, fgsm(x, y), y)]
            assert fgsm.info is not None
            assert fgsm.info.zero_grad is not None
            sums += (torch.stack([*found, fgsm.info.zero_grad]) & (numbers < self.count)).sum(1)
        means = (total(sums) / self.count).tolist()
        return dict(zip(("clean", "robust", "fgsm", "zero_grad"), means, strict=True))

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Numbers, images and labels."""
        for rows in torch.split(torch.arange(len(self.images)), self.batch_size):
            x, y = self.images.take(rows), self.images.y[rows]
            yield self.numbers[rows].to(self.device), x.to(self.device).float() / 255, y.to(self.device)


def _correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits: Tensor = model(x)
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def alarms(history: Sequence[Row]) -> dict[str, str]:
    """What is wrong with a training, by its epochs so far (the last one validated): name to a sentence."""
    found: dict[str, str] = {}
    if history and not math.isfinite(history[-1].get("loss", 0.0)):
        found["divergence"] = (
            f"the loss of epoch {history[-1]['epoch']} is not finite: start again with a smaller learning rate, optimizer.clip "
            "or precision fp32"
        )
    rows = [row for row in history if row.get("robust") is not None]
    if not rows:
        return found
    last = rows[-1]
    cleanest = max(row["clean"] for row in rows)
    if last["clean"] < COLLAPSE * cleanest:
        found["collapse"] = (
            f"clean accuracy is {last['clean']:.1%}, after {cleanest:.1%}: a step too far, from "
            "which training seldom recovers; start again with optimizer.clip, a smaller learning rate or attack.ramp"
        )
    if len(rows) > 1 and last["robust"] < rows[-2]["robust"] - DROP:
        found["catastrophic overfitting"] = (
            f"robust accuracy fell from {rows[-2]['robust']:.1%} to {last['robust']:.1%} in epoch {last['epoch']}: "
            "the attack has stopped working on this model; go back to best.pt and train with more steps or a smaller alpha"
        )
    best = max(rows, key=lambda row: row["robust"])
    gains = last.get("train_robust") is not None and last["train_robust"] > (best.get("train_robust") or 0.0)
    if best["robust"] - last["robust"] > GAP and gains:
        found["robust overfitting"] = (
            f"robust accuracy is {last['robust']:.1%}, {best['robust'] - last['robust']:.1%} below that of epoch "
            f"{best['epoch']}, while it rises on training images: use best.pt, stop earlier, or train with AWP or more data"
        )
    if last["fgsm"] < last["robust"] - MASKED:
        found["one step beats many"] = (
            f"one step leaves {last['fgsm']:.1%} standing where PGD leaves {last['robust']:.1%}: gradients are masked, "
            "and robust accuracy is lower than it looks; run fastadv evaluate"
        )
    if last["zero_grad"] > MASKED:
        found["zero gradients"] = (
            f"{last['zero_grad']:.1%} of gradients are zero: PGD cannot move these images; run fastadv evaluate"
        )
    return found
