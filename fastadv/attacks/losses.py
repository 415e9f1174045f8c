"""What attacks ascend: losses of logits with their gradient in closed form, so that no loss enters the autograd graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..engine import Losses

CustomLoss = Callable[[Tensor, Tensor | None], Tensor]

LABEL_LOSSES = {"ce": ops.ce, "margin": ops.margin, "dlr": ops.dlr}
DIVERGENCES = {"kl": ops.kl, "se": ops.se}


@dataclass(frozen=True)
class AttackLoss:
    """``loss(logits [N, C], y, reference)`` to per-sample losses [N] and their gradient [N, C].

    Attributes:
        of: a name of the two tables above, or the user's callable ``(logits, y) -> [N]``.
        targeted: y are classes to reach, and the attack descends.
        coupled: samples depend on each other through batch statistics. The sizes of their losses then matter; else a positive
            factor on a sample's loss changes nothing, and "ce" takes a form that cannot saturate.
    """

    of: str | CustomLoss
    targeted: bool = False
    coupled: bool = False

    def __hash__(self) -> int:  # a callable may have none
        return hash((self.of if isinstance(self.of, str) else id(self.of), self.targeted, self.coupled))

    def __repr__(self) -> str:  # the same in the next process, which looks up by it what was measured in this one
        name = self.of if isinstance(self.of, str) else getattr(self.of, "__qualname__", type(self.of).__qualname__)
        return f"AttackLoss({name}, targeted={self.targeted}, coupled={self.coupled})"

    @property
    def is_divergence(self) -> bool:
        """Measured from the clean prediction, without labels."""
        return isinstance(self.of, str) and self.of in DIVERGENCES

    @property
    def needs_reference(self) -> bool:
        """Whether ``reference``, the clean logits, is used."""
        return self.is_divergence or (self.of == "dlr" and self.targeted)

    def check(self, y: Tensor | None) -> None:
        """Raises ValueError where labels are missing or of the wrong kind."""
        if y is None and (self.targeted or (isinstance(self.of, str) and not self.is_divergence)):
            raise ValueError(f"y is needed for loss={self.of!r}, targeted={self.targeted}; only 'kl' and 'se' need none")
        if y is not None and y.is_floating_point() and self.of in ("margin", "dlr"):
            raise ValueError(f"y must be integer labels for loss={self.of!r}; got soft labels {list(y.shape)}")

    def __call__(self, logits: Tensor, y: Tensor | None, reference: Tensor | None, out: Losses | None = None) -> Losses:
        """Into ``out`` where possible."""
        if not isinstance(self.of, str):
            return _custom(self.of, logits, y)
        if self.is_divergence:
            assert reference is not None
            return DIVERGENCES[self.of](reference, logits, out=out)
        assert y is not None
        if self.of == "dlr" and self.targeted:
            assert reference is not None
            # From the clean prediction to the target; the attack descends, and this rises on the way.
            loss, dlogits = ops.dlr_targeted(logits, reference.argmax(1), y, out=out)
            return loss.neg_(), dlogits.neg_()
        if self.of != "ce" or self.coupled:
            return LABEL_LOSSES[self.of](logits, y, out=out)
        if y.is_floating_point():
            # A one-hot row is a hard label, and like one it must not saturate.
            (loss, dlogits), (odds, d_odds) = ops.ce(logits, y), ops.log_odds(logits, y.argmax(1))
            one_hot = (y.amax(1) == 1) & (y.sum(1) == 1)
            return torch.where(one_hot, odds, loss), torch.where(one_hot[:, None], d_odds, dlogits)
        return ops.log_odds(logits, y, out=out)


@dataclass(frozen=True)
class Towards:
    """The targeted DLR from the labels y to the classes [N] that stand for the reference; the attack ascends it."""

    targeted: ClassVar[bool] = False  # whatever class is reached, it counts

    def __call__(self, logits: Tensor, y: Tensor | None, reference: Tensor | None, out: Losses | None = None) -> Losses:
        assert y is not None
        assert reference is not None
        return ops.dlr_targeted(logits, y, reference, out=out)


def _custom(loss: CustomLoss, logits: Tensor, y: Tensor | None) -> Losses:
    """The user's loss and, by differentiation over the logits alone, its gradient."""
    if torch.compiler.is_compiling():
        value, pullback = torch.func.vjp(lambda z: loss(z, y), logits)  # type: ignore[misc]  # three only with has_aux
        return value, pullback(torch.ones_like(value))[0]
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        value = loss(z, y)
        if not isinstance(value, Tensor) or value.shape != z.shape[:1] or not value.requires_grad:
            got = checks.describe(value) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss(logits, y) must return per-sample losses [{z.shape[0]}] that depend on logits; got {got}")
        (dlogits,) = torch.autograd.grad(value.sum(), z, allow_unused=True)
        if dlogits is None:
            raise ValueError("loss(logits, y) must depend on logits; its gradient does not reach them")
    return value.detach(), dlogits
