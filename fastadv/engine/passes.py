"""The two things an attack asks of a model: logits, and logits with the gradient of the input; eagerly or compiled."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..reference.step import spread
from .guest import Model, input_gradient
from .signs import signs_only

Losses: TypeAlias = tuple[Tensor, Tensor]  # per sample [N], and their gradient with respect to the logits [N, C]
Loss: TypeAlias = Callable[..., Losses]  # (logits, y, reference, out=None)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", *DTYPES, "auto")

FP16_SCALE = 256.0  # of the largest cotangent: the middle, in powers of two, of what fp16 can hold above its smallest normal


def dtype_for(precision: str, device: torch.device) -> torch.dtype | None:
    """What autocast is to compute in; None: as the caller has it. "auto" is bf16 where the hardware multiplies in it."""
    if precision != "auto":
        return DTYPES.get(precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "cpu" and any(
        getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile")
    ):
        return torch.bfloat16
    return None


listener: Callable[[str], AbstractContextManager[Any]] | None = None  # fastadv.profile, while it looks
_NOTHING = contextlib.nullcontext()


def mark(stretch: str) -> AbstractContextManager[Any]:
    """Names a stretch of an attack's work to whoever listens."""
    return _NOTHING if listener is None else listener(stretch)


class Passes:
    """Runs ``model`` eagerly.

    Args:
        dtype: of an autocast around each forward; None: none but the caller's.
        signs: save for the backward only what the gradient of an input needs (:mod:`fastadv.engine.signs`).
        coupled: samples depend on each other through batch statistics, so the sizes of their losses matter.
        check: given the first logits.
    """

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype | None = None,
        signs: bool = False,
        coupled: bool = False,
        check: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.model, self.dtype, self.signs, self.coupled, self.check = model, dtype, signs, coupled, check

    def are_of(self, model: Model) -> bool:
        """Whether these are the model's own forward passes: of no twin, in no other precision."""
        return self.model is model and self.dtype is None

    def logits(self, inputs: Tensor) -> Tensor:
        """One forward pass, in the precision; a half-precision answer to autocast comes as fp32."""
        with mark("model forward"):
            logits = self.answer(inputs)
        if self.check is not None:
            self.check(logits)
            self.check = None
        return self.widened(logits)

    def answer(self, inputs: Tensor) -> Tensor:
        """What the model says, in the type in which it says it. Has no mark, for it gets compiled."""
        if self.dtype is None and not self.signs:
            return self.model(inputs)  # type: ignore[no-any-return]
        nothing = contextlib.nullcontext()
        # The cache would hold casts of weights made without a graph, which a training step could then meet.
        precision = nothing if self.dtype is None else torch.autocast(inputs.device.type, self.dtype, cache_enabled=False)
        with precision, signs_only() if self.signs else nothing:  # torch.compile sees through this, not through an ExitStack
            logits: Tensor = self.model(inputs)
        return logits

    def widened(self, logits: Tensor) -> Tensor:
        return logits if self.dtype is None else logits.to(torch.promote_types(logits.dtype, torch.float32))

    def gradient(
        self, inputs: Tensor, loss: Loss, y: Tensor | None, reference: Tensor | None, out: Losses | None = None
    ) -> tuple[Tensor, Losses, Tensor]:
        """Logits, losses (into ``out`` where possible) and the losses' gradient with respect to ``inputs``, up to its scale."""
        logits = self.logits(inputs.requires_grad_())
        values = logits.detach()
        losses = loss(values, y, reference, out)
        cotangent = self.cotangent(losses[1])
        with mark("model backward"):
            gradient = input_gradient(logits, inputs, cotangent)
        return values, losses, gradient

    def gradients(self, inputs: Tensor, cotangents: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the input gradients [K, N, ...], to scale, of K sums of them with weights ``cotangents`` [K, N, C]."""
        logits, pullback = self.pullback(inputs)
        return logits, torch.stack([self.to_scale(pullback(c), c) for c in cotangents])

    def pullback(self, inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits, and the gradient with respect to ``inputs`` by that of the logits [N, C]: several of them from one forward.

        Each up to its scale, as in :meth:`gradient`. Never compiled.
        """
        logits = Passes.logits(self, inputs.requires_grad_())

        def gradient(dlogits: Tensor) -> Tensor:
            with mark("model backward"):
                return input_gradient(logits, inputs, self.cotangent(dlogits), again=True)

        return logits.detach(), gradient

    def cotangent(self, dlogits: Tensor) -> Tensor:
        """``dlogits``, scaled for fp16 so that gradients deep in the model do not underflow.

        A step uses the direction of each sample's gradient alone; where samples are coupled, that of the whole batch's.
        """
        return dlogits if self.dtype != torch.float16 else dlogits * self._scale(dlogits)

    def to_scale(self, gradient: Tensor, dlogits: Tensor) -> Tensor:
        """What :meth:`gradient` gave for ``dlogits``, with that scale taken out, for who needs its length."""
        return gradient if self.dtype != torch.float16 else gradient / spread(self._scale(dlogits), gradient)

    def _scale(self, dlogits: Tensor) -> Tensor:
        largest = dlogits.abs().amax() if self.coupled else dlogits.abs().amax(1, keepdim=True)
        least = FP16_SCALE * torch.finfo(dlogits.dtype).tiny  # of what is zero, the scale stays finite
        return FP16_SCALE / largest.clamp(min=least)


class CompiledPasses(Passes):
    """Forward pass, loss and input gradient as one compiled graph, for one shape of inputs; the forward alone as another.

    Each is compiled when it is first asked for. ``torch.func.vjp`` and not ``torch.autograd.grad``, which torch.compile
    cannot see through.
    """

    def __init__(self, eager: Passes) -> None:
        super().__init__(eager.model, eager.dtype, False, eager.coupled)

        def whole(inputs: Tensor, loss: Loss, y: Tensor | None, reference: Tensor | None) -> tuple[Tensor, Losses, Tensor]:
            pullback: Callable[[Tensor], tuple[Tensor]]
            # mypy thinks of has_aux=True, with which it would be three.
            logits, pullback = torch.func.vjp(lambda x: self.widened(self.answer(x)), inputs)  # type: ignore[misc]
            losses = loss(logits, y, reference)
            (gradient,) = pullback(self.cotangent(losses[1]))
            return logits, losses, gradient

        def several(inputs: Tensor, cotangents: Tensor) -> tuple[Tensor, Tensor]:
            pullback: Callable[[Tensor], tuple[Tensor]]
            logits, pullback = torch.func.vjp(lambda x: self.widened(self.answer(x)), inputs)  # type: ignore[misc]
            return logits, torch.stack([self.to_scale(pullback(self.cotangent(c))[0], c) for c in cotangents.unbind()])

        def forward(inputs: Tensor) -> Tensor:
            return self.widened(self.answer(inputs))

        self._whole: Callable[..., tuple[Tensor, Losses, Tensor]] = _compiled(whole)
        self._several: Callable[..., tuple[Tensor, Tensor]] = _compiled(several)
        self._forward: Callable[[Tensor], Tensor] = _compiled(forward)

    def logits(self, inputs: Tensor) -> Tensor:
        with mark("model forward, compiled"), torch.no_grad():
            return self._forward(inputs.detach())

    def gradient(
        self, inputs: Tensor, loss: Loss, y: Tensor | None, reference: Tensor | None, out: Losses | None = None
    ) -> tuple[Tensor, Losses, Tensor]:
        with mark("model forward and backward, compiled"), torch.no_grad():
            return self._whole(inputs.detach(), loss, y, reference)

    def gradients(self, inputs: Tensor, cotangents: Tensor) -> tuple[Tensor, Tensor]:
        with mark("model forward and backward, compiled"), torch.no_grad():
            return self._several(inputs.detach(), cotangents)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Torch counts recompilations by code object, and stops at eight: each model and shape gets one of its own."""
    assert isinstance(function, types.FunctionType)
    own = types.FunctionType(function.__code__.replace(), globals(), function.__name__, None, function.__closure__)
    made: list[Callable[..., Any]] = []

    def compiled(*arguments: Any) -> Any:  # most attacks need but one of several
        if not made:
            made.append(torch.compile(own, dynamic=False, fullgraph=True))
        return made[0](*arguments)

    return compiled
