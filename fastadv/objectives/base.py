"""What every objective is: an inner attack, an outer loss, and the two in one call.

out = objective(model, x, y)                                # attack, forward passes, loss
out.loss.backward()

x_adv = objective.adversarial(model, x, y)                  # the same in two halves, for AWP and the like
objective.loss(model, x, y, x_adv).backward()
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..attacks import PGD
from ..attacks.draws import Source
from ..engine import Model, attacking, unwrap
from ..reference.loss import classes_of


@dataclass(frozen=True)
class Output:
    """One training step's results, all tensors: nothing waits for the device.

    Attributes:
        loss: scalar; its graph is the training step's.
        logits: [N, C] of the clean images, where the objective runs them.
        logits_adv: [N, C] of the adversarial ones, likewise.
        x_adv: the adversarial images, detached.
        metrics: "accuracy" and "robust_accuracy" of this batch, 0-dim, as far as there are logits and labels.
    """

    loss: Tensor
    logits: Tensor | None
    logits_adv: Tensor | None
    x_adv: Tensor | None
    metrics: dict[str, Tensor]


class Objective:
    """A training method. ``attack``: a :class:`fastadv.PGD`, or None for the paper's (:meth:`paper_attack`).

    A PGD is used as it is: made without ``loss``, it ascends cross-entropy in TRADES too (a warning says so).

    Subclasses say in ``PAPER`` how their paper attacks and in :meth:`forward` what it minimises.
    """

    PAPER: ClassVar[dict[str, Any]] = {}

    def __init__(self, attack: PGD | None = None) -> None:
        if attack is not None and not isinstance(attack, PGD):
            raise ValueError(f"attack must be a fastadv.PGD, or None for the paper's; got {type(attack).__name__}")
        inner = self.PAPER.get("loss", "ce")
        if attack is not None and attack.loss == "ce" != inner:
            name, shown = type(self).__name__, getattr(inner, "__name__", repr(inner))
            message = f"this attack ascends 'ce', where {name}'s ascends {shown}: {name}.paper_attack(model, eps=...) does"
            warnings.warn(message, stacklevel=3)
        self.attack = attack
        self._source: Source = None
        self._paper_attack: PGD | None = None

    @classmethod
    def paper_attack(cls, model: Model, **changes: Any) -> PGD:
        """The paper's attack on ``model``, with ``changes``: ``TRADES.paper_attack(model, eps=0.3, alpha=0.01, steps=40)``."""
        return PGD(model, **{**cls.PAPER, **changes})

    def attack_on(self, model: Model) -> PGD:
        """The attack: the given one, else the paper's on ``model``, kept until another model comes."""
        if self.attack is not None:
            return self.attack
        if self._paper_attack is None or self._paper_attack.model is not model:
            self._paper_attack = self.paper_attack(model, generator=self._source)
        return self._paper_attack

    def draw_from(self, source: Source) -> None:
        """Sets where all that the objective draws comes from, its attack's starts included: as the ``generator`` of
        :class:`fastadv.PGD`."""
        self._source = source
        for attack in (self.attack, self._paper_attack):
            if attack is not None:
                attack.generator = source

    def adversarial(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """The inner maximisation: adversarial images like x, detached. The model is left as :class:`fastadv.PGD` does."""
        return self.attack_on(model)(x, y)

    def forward(self, model: Model, x: Tensor, y: Tensor, x_adv: Tensor) -> Output:
        """The outer loss on images that were attacked already: the forward passes that a training step needs."""
        raise NotImplementedError

    def loss(self, model: Model, x: Tensor, y: Tensor, x_adv: Tensor) -> Tensor:
        """The scalar of :meth:`forward`: what AWP ascends and the optimiser descends."""
        return self.forward(model, x, y, x_adv).loss

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Output:
        """Attacks the batch and evaluates the loss, in the modes that the model's submodules are in.

        Args:
            model: [N, ...] to logits [N, C]; may be wrapped in DistributedDataParallel or compiled.
            x: clean images [N, ...] inside the attack's bounds.
            y: labels [N], integer; soft labels [N, C] where the objective's formula is one in soft labels.

        Raises:
            ValueError: from the attack (:class:`fastadv.PGD`), before any work.
        """
        out = self.forward(model, x, y, self.adversarial(model, x, y))
        self.observe(out.logits, y)
        return out

    # What methods that remember something fill in. A training loop calls all four.

    def observe(self, logits: Tensor | None, y: Tensor) -> None:
        """Sees the clean logits of a batch. Calling the objective does it; a loop of the two halves calls it once a batch."""

    def end_epoch(self) -> None:
        """To be called after each epoch."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, so that training resumes where it was."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""

    def __repr__(self) -> str:
        shown = {
            name: getattr(value, "__name__", None) or repr(value)
            for name, value in vars(self).items()
            if not name.startswith("_") and not isinstance(value, Tensor)
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"


def check_batch(attack: PGD, x: Tensor, y: Tensor) -> None:
    """Refuses bad images and labels, where an objective works before its attack, which would."""
    checks.images(x, *checks.bounds(attack.bounds))
    checks.labels(y, x)


def clean_logits(attack: PGD, x: Tensor, y: Tensor) -> Tensor:
    """What the attacked model answers to clean images, in the attack's mode. Raises as the attack does."""
    check_batch(attack, x, y)
    model = unwrap(attack.model)
    with attacking(model, attack.bn), torch.no_grad():
        logits: Tensor = model(x)
    if x.numel():
        checks.logits(logits, x, y)
    return logits


def output(loss: Tensor, y: Tensor, logits: Tensor | None, logits_adv: Tensor | None, x_adv: Tensor | None) -> Output:
    """An :class:`Output` with its metrics. Labels below 0 are unknown and count in no accuracy."""
    label = classes_of(y)
    known = label >= 0
    metrics = {
        name: ((z.detach().argmax(1) == label) & known).sum() / known.sum()
        for name, z in (("accuracy", logits), ("robust_accuracy", logits_adv))
        if z is not None
    }
    return Output(loss, logits, logits_adv, x_adv, metrics)
