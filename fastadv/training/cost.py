"""What a training costs before it is run: forward passes a step, and the arithmetic of the whole run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import models
from ..weights import AWP
from .config import Config
from .trainer import descents


class _NoModules(contextlib.nullcontext[None]):
    """In place of the counter's breakdown by module, whose hooks torch cannot run on the leaf inputs of autograd.grad."""

    parents = frozenset({"Global"})


def flops(call: Callable[[], object]) -> int:
    """Floating-point operations of what ``call()`` runs."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        call()
    return int(counter.get_total_flops())


def passes(config: Config) -> int:
    """Forward passes' worth of work for each image of a step: 23 for PGD-10 adversarial training, 27 for TRADES.

    Counted in one step of a small network: its layers' gradients for inputs and for weights cost a forward pass each, but for
    the first layer, which is next to nothing here.
    """
    from .build import build_objective  # which holds more than this needs, this function among it

    classes, n, views = 10, 4, 2 if config.method.consistency else 1
    with torch.random.fork_rng(devices=[]):
        hidden = [nn.Linear(256, 256) for _ in range(4)]
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 256), nn.ReLU(), *hidden, nn.Linear(256, classes))
        x, y = torch.rand(n, 1, 2, 2), torch.arange(n)
        plain = {"engine": None, "precision": None, "twin": None, "memory": None}  # none of which changes the work
        config = config.model_copy(update={"attack": config.attack.model_copy(update=plain)})
        objective = build_objective(config, model, classes)
        awp = None if config.awp is None else AWP(model, config.awp.gamma, steps=config.awp.steps, sync="local")

        def step() -> None:
            for _ in descents(objective, model, x.repeat(views, 1, 1, 1), y.repeat(views), Tensor.backward, awp):
                pass

        step()  # what is made once is made
        return round(flops(step) / flops(lambda: model(x)))


@dataclass(frozen=True)
class Known:
    """A data set's training images."""

    count: int
    shape: tuple[int, int, int]
    classes: int


SIZES = {
    "mnist5k": Known(4000, (1, 28, 28), 10),
    "sklearn-digits": Known(1437, (1, 28, 28), 10),
    "cifar10": Known(50_000, (3, 32, 32), 10),
    "cifar100": Known(50_000, (3, 32, 32), 100),
    "svhn": Known(73_257, (3, 32, 32), 10),
    "imagenet": Known(1_281_167, (3, 224, 224), 1000),
}


def petaflops(config: Config, passes: int) -> float:
    """Of the whole training at so many :func:`passes`, validation not counted: 10^15 multiplications and additions."""
    known = SIZES.get(config.data.name)
    if known is None:
        raise ValueError(f"data.name: the cost is known for {', '.join(SIZES)}; got {config.data.name!r}")
    with torch.device("meta"):
        model = models.build(config.model.name, known.classes, **config.model.arguments)
    forward = models.forward_flops(model, known.shape)
    batches = math.ceil((known.count - config.validation.held_out) / config.batch_size)
    return passes * forward * batches * config.batch_size * config.epochs / 1e15
