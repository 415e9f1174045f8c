"""Free adversarial training: one backward serves both the weights and the perturbation, on each batch several times.

Shafahi et al., "Adversarial Training for Free!", 2019.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import checks, ops
from ..attacks.draws import Source
from ..engine import Model
from .base import Output, output
from .labels import LabelLoss, checked, cross_entropy


class FreeAT:
    """Replays a batch ``replays`` times; the loop's own backward moves the images, which the next batch's start from.

        free = fastadv.FreeAT(eps=8/255, replays=8)
        for out in free(model, x, y):
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()

    Args:
        eps: linf radius, units of x.
        alpha: step size; default eps.
        replays: passes over each batch, 8 for CIFAR-10, 4 for ImageNet. Divide the epochs by it.
        label_loss: ``(logits, y) -> scalar``. A positive factor on the loss (GradScaler) changes no step.
        bounds: (lo, hi) of every element, or None.
        reclamp: keep the perturbation carried over from the last batch inside the bounds of the new images. The original
            does not, and its first forward sees values up to 1 + eps.

    The perturbation is kept for the largest batch so far; a smaller one uses its first rows.
    """

    def __init__(
        self,
        eps: float = 8 / 255,
        alpha: float | None = None,
        replays: int = 8,
        label_loss: LabelLoss = cross_entropy,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        reclamp: bool = True,
    ) -> None:
        self.eps, self.alpha = checks.number("eps", eps), checks.number("alpha", eps if alpha is None else alpha)
        self.replays, self.label_loss = checks.integer("replays", replays), checked(label_loss)
        self.bounds, self.reclamp = checks.bounds(bounds), reclamp
        self._delta: Tensor | None = None

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Iterator[Output]:
        """Yields an :class:`Output` for each replay; call ``out.loss.backward()`` before asking for the next.

        Raises:
            ValueError: x or y are not as in :class:`fastadv.PGD`. RuntimeError: no backward was called.
        """
        lo, hi = self.bounds
        checks.images(x, lo, hi)
        checks.labels(y, x)
        x = x.detach()
        x_adv = x + self._carried(x)
        if self.reclamp:
            ops.linf_step_(x_adv, x_adv, x, 0.0, self.eps, lo, hi)  # a step of length 0 is the projection
        for _ in range(self.replays):
            x_adv.requires_grad_()
            logits = model(x_adv)
            yield output(self.label_loss(logits, y), y, None, logits, x_adv.detach())
            if x_adv.grad is None:
                raise RuntimeError("call out.loss.backward() on each output of FreeAT: the images move by its gradient")
            x_adv = ops.linf_step(x_adv.detach(), x_adv.grad, x, self.alpha, self.eps, lo, hi)
            self._carried(x).copy_(x_adv - x)

    # What a training loop calls on every method, as fastadv.Objective has it.

    def draw_from(self, source: Source) -> None:
        """Nothing is drawn."""

    def observe(self, logits: Tensor | None, y: Tensor) -> None:
        """Nothing is remembered of logits."""

    def end_epoch(self) -> None:
        """Nothing changes with epochs."""

    def state_dict(self) -> dict[str, Tensor | None]:
        """The perturbation that the next batch starts from."""
        return {"delta": self._delta}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        delta = state["delta"]
        self._delta = None if delta is None else delta.clone()

    def _carried(self, x: Tensor) -> Tensor:
        """This batch's part of the perturbation, a view."""
        kept = self._delta
        if kept is not None and kept.device != x.device:  # from a checkpoint
            kept = self._delta = kept.to(x.device)
        if kept is None or kept.shape[1:] != x.shape[1:] or kept.dtype != x.dtype:
            kept = self._delta = torch.zeros_like(x)
        if len(kept) < len(x):
            kept = self._delta = torch.cat([kept, torch.zeros_like(x[len(kept) :])])
        return kept[: len(x)]
