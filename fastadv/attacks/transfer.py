"""Attacks on surrogates: images made where gradients can be had, judged by the model that they are meant for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from .. import ops
from ..engine import Model
from ..reference.step import spread
from .base import Attack, Batch
from .pgd import PGD

Made: TypeAlias = Attack | PGD


class Transfer(Attack):
    """Images of other attacks, each on a model of its own, judged by ``model``.

    Papernot et al., "Transferability in Machine Learning", 2016. Of several attacks each sample gets the image that leads
    ``model`` farthest astray by its margin ``max_{k != y} z_k - z_y`` (targeted: ``z_y - max_{k != y} z_k``), hence one that
    fools it if any does.

    Args:
        model: the victim, any callable that maps a batch [N, ...] to logits [N, C]: one forward pass an attack, no gradient.
        attack: an attack object on a surrogate, or a sequence of them, which agree in norm, bounds and ``targeted``. Radii are
            theirs.

    ``info`` is the victim's, as are the predictions that change where y is None. What the surrogates saw is in
    ``attacks[i].info``.

    Raises:
        ValueError: there is no attack, or they disagree; otherwise as :class:`Attack`.
    """

    NORMS: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    GRADIENTS: ClassVar[bool] = False  # of the victim
    EPS_OPTIONAL: ClassVar[bool] = True  # the attacks have their own

    def __init__(self, model: Model, attack: Made | Sequence[Made]) -> None:
        self.attacks = list(attack) if isinstance(attack, Sequence) else [attack]
        for made in self.attacks:
            if not isinstance(made, Attack | PGD):
                raise ValueError(f"attack must be an attack object, or a sequence of them; got {type(made).__name__}")
        if not self.attacks:
            raise ValueError("attack must be one or more attacks; got none")
        for name in ("norm", "bounds", "targeted"):
            values = [getattr(made, name) for made in self.attacks]
            if any(value != values[0] for value in values):
                raise ValueError(f"attacks must agree in {name}; got {', '.join(map(repr, values))}")
        first = self.attacks[0]
        super().__init__(model, None, first.norm, first.targeted, first.bounds)

    def _attack(self, batch: Batch) -> Tensor:
        x, samples = batch.x.to(batch.dtype), batch.draws.samples
        best, score = x, torch.full((len(x),), -math.inf, device=x.device)
        for attack in self.attacks:
            adv = attack(x, batch.y, samples=samples) if isinstance(attack, Attack) else attack(x, batch.y)
            margin = ops.margin(batch.logits(adv), batch.y)[0]
            astray = -margin if self.targeted else margin
            better = astray > score
            best = torch.where(spread(better, x), adv, best)
            score = torch.where(better, astray, score)
        return best

    def __repr__(self) -> str:
        return f"Transfer({', '.join(map(repr, self.attacks))})"
