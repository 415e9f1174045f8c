"""Modules round a model that give any attack the gradient it needs: of an expectation, or past a step that has none.

    attack = fastadv.PGD(fastadv.EoT(model, samples=20), eps=8/255)          # a randomised model
    attack = fastadv.PGD(nn.Sequential(fastadv.BPDA(jpeg), model), eps=8/255)  # a front end without a gradient

Athalye et al., "Synthesizing Robust Adversarial Examples", 2018 (expectation over transformation); Athalye, Carlini and Wagner,
"Obfuscated Gradients Give a False Sense of Security", 2018 (backward pass differentiable approximation).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from .. import checks
from ..engine import Model, unwrap


class EoT(nn.Module):
    """The expectation of a randomised model: its logits are ``log mean softmax(model(x))``, over several runs.

    An attack on it ascends the loss of the mean prediction, where one on the model chases the noise of a single run. Each run
    draws from whatever generator the model uses. Attacks put modules in eval mode, which switches ``nn.Dropout`` off: a
    defence that randomises its predictions has to draw in eval mode, too.

    Args:
        model: any callable that maps a batch [N, ...] to logits [N, C]. DistributedDataParallel is unwrapped.
        samples: runs a forward pass, >= 1. Each costs what the model costs.
        recompute: keep the graph of one run at a time and not of all, by running the model again in the backward pass: 3
            forward passes a run in place of 2. The same bits, for what a run drew from torch's global generators is drawn
            again. Not for ``memory="signs"`` or ``engine="graph"``; without effect under torch.compile, which chooses itself
            what to keep.

    Raises:
        ValueError: an argument is not as described.
        RuntimeError: with ``recompute``, a run is not the same when repeated: the model draws from another generator.
    """

    def __init__(self, model: Model, samples: int = 20, recompute: bool = False) -> None:
        super().__init__()
        if not callable(model):
            raise ValueError(f"model must be callable on a batch; got {type(model).__name__}")
        self.samples, self.recompute = checks.integer("samples", samples), bool(recompute)
        self.model = unwrap(model)
        self.training = getattr(self.model, "training", False)  # by which an attack tells what the caller has frozen

    def forward(self, x: Tensor) -> Tensor:
        run = self._recomputed if self.recompute and not torch.compiler.is_compiling() else self.model
        # Of each run apart: a model that draws once for a whole batch would draw the same for all copies of an image in one.
        predictions = [_wide(run(x)).log_softmax(1) for _ in range(self.samples)]
        return torch.logsumexp(torch.stack(predictions), 0) - math.log(self.samples)

    def _recomputed(self, x: Tensor) -> Tensor:
        first: list[Tensor] = []

        def run(x: Tensor) -> Tensor:
            logits: Tensor = self.model(x)
            if first and not torch.equal(first[0], logits):
                raise RuntimeError(
                    "recompute=True repeats each run in the backward pass, and this model answered differently: it draws from "
                    "a generator that is not torch's global one. Use recompute=False"
                )
            first.append(logits.detach())
            return logits

        with set_checkpoint_early_stop(False):  # which would not get as far as the logits
            logits: Tensor = checkpoint(run, x, use_reentrant=False)
        return logits

    def extra_repr(self) -> str:
        return f"samples={self.samples}, recompute={self.recompute}"


class BPDA(nn.Module):
    """``forward(x)``, exactly, with the gradient of ``backward(x)``: ``nn.Sequential(fastadv.BPDA(jpeg), model)``.

    For what has no gradient or a useless one: quantisation, compression, denoising by another program.

    Args:
        forward: [N, ...] to [N, ...]; run without a graph, so it may leave torch and come back.
        backward: a differentiable approximation of it, with results of the same shape; run beside it, and only its gradient is
            used. None: the identity, so the gradient passes as if ``forward`` were not there.

    ``torch.func``, ``torch.compile`` (for a ``forward`` that it can see through; ``engine="eager"`` for others), autocast and
    half precision compose with it. A twin is refused: the model itself is attacked.

    Raises:
        ValueError: an argument is not callable; in a call: the two results are no tensors of one shape.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        if not callable(forward):
            raise ValueError(f"forward must be callable on a batch; got {type(forward).__name__}")
        if backward is not None and not callable(backward):
            raise ValueError(f"backward must be callable on a batch or None; got {type(backward).__name__}")
        self.exact, self.approximate = forward, backward
        self.training = getattr(forward, "training", False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            value = self.exact(x.detach())
        approximation = x if self.approximate is None else self.approximate(x)
        if not isinstance(value, Tensor) or value.shape != approximation.shape:
            got = checks.describe(value) if isinstance(value, Tensor) else type(value).__name__
            name = "x" if self.approximate is None else "backward(x)"
            raise ValueError(f"forward(x) must be a tensor shaped like {name}, {list(approximation.shape)}; got {got}")
        # The difference is 0, so that the sum is the value; value - x, in x + (value - x), would be rounded.
        return value + (approximation - approximation.detach())


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
