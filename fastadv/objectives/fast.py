"""Adversarial training with one gradient step: FGSM-RS, N-FGSM, and the alarm that both need.

Wong, Rice and Kolter, "Fast is Better than Free: Revisiting Adversarial Training", 2020; de Jorge et al., "Make Some Noise:
Reliable and Efficient Single-Step Adversarial Training", 2022.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..attacks import PGD
from ..attacks.draws import Source, check_source, uniform_start
from ..engine import BN_MODES, Model, attacking, unwrap
from ..reference.loss import classes_of
from .labels import LabelLoss, cross_entropy
from .pgd_at import PGDAT


class FGSMRS(PGDAT):
    """``CE(f(x'), y)``, x' one step of 10/255 from a uniform start in the ball of 8/255. Arguments as :class:`PGDAT`.

    Known weakness: catastrophic overfitting. Within one epoch robust accuracy may fall to zero while that under FGSM rises:
    watch it (:class:`CatastrophicOverfitting`). Smaller steps (5/255 on 100 classes) delay it.
    """

    PAPER: ClassVar[dict[str, Any]] = {"eps": 8 / 255, "alpha": 10 / 255, "steps": 1, "bn": "train"}


class NFGSM(PGDAT):
    """``CE(f(x'), y)``, x' one step of eps from noise of ``noise * eps``, not projected onto the ball of eps afterwards.

    Args:
        eps: radius of the threat model, units of x. The images may leave it: by up to ``noise * eps``.
        noise: 2 in the paper; more noise resists catastrophic overfitting at larger eps.
        bn, bounds, generator: as :class:`fastadv.PGD`. label_loss: as :class:`PGDAT`.
    """

    PAPER: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        eps: float = 8 / 255,
        noise: float = 2.0,
        label_loss: LabelLoss = cross_entropy,
        bn: str = "train",
        bounds: tuple[float, float] | None = (0.0, 1.0),
        generator: Source = None,
    ) -> None:
        super().__init__(None, label_loss)
        checks.one_of("bn", bn, BN_MODES)
        self.eps, self.noise, self.bn = checks.number("eps", eps), checks.number("noise", noise), bn
        self.bounds, self.generator = checks.bounds(bounds), generator

    def draw_from(self, source: Source) -> None:
        self.generator = source

    def adversarial(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        checks.images(x, *self.bounds)
        checks.labels(y, x)
        check_source(self.generator, x)
        start = uniform_start(x, self.noise * self.eps, *self.bounds, self.generator)
        reach = (self.noise + 1) * self.eps  # a ball that holds start and step: its projection moves nothing
        return PGD(model, reach, self.eps, 1, init=start, bn=self.bn, bounds=self.bounds)(x, y)


class CatastrophicOverfitting:
    """The alarm: rings when robust accuracy under a multi-step attack falls by more than ``drop`` from one epoch to the next.

        alarm = CatastrophicOverfitting(fastadv.PGD(model, eps=8/255, alpha=2/255, steps=5))
        if alarm(x, y):            # after each epoch, on a batch of it
            ...                    # go back to the weights of the epoch before, and stop

    Args:
        attack: several steps; one step sees nothing.
        drop: 0.2 in the paper's code.

    ``accuracies`` holds what was seen so far, in [0, 1]. Ranks of torch.distributed may hear different things: let one decide.
    """

    def __init__(self, attack: PGD, drop: float = 0.2) -> None:
        if not isinstance(attack, PGD) or attack.steps < 2:
            raise ValueError(f"attack must be a fastadv.PGD of several steps to see catastrophic overfitting; got {attack!r}")
        self.attack, self.drop = attack, checks.number("drop", drop)
        self.accuracies: list[float] = []

    def __call__(self, x: Tensor, y: Tensor) -> bool:
        x_adv, model = self.attack(x, y), unwrap(self.attack.model)
        with attacking(model, self.attack.bn), torch.no_grad():
            self.accuracies.append(float((model(x_adv).argmax(1) == classes_of(y)).float().mean()))
        return len(self.accuracies) > 1 and self.accuracies[-1] < self.accuracies[-2] - self.drop
