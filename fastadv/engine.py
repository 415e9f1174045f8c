"""How an attack runs a model: nothing but forward passes and input gradients, and the model left as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Model = Callable[..., Any]

BN_MODES = ("eval", "batch", "train")


def unwrap(model: Model) -> Model:
    """The module inside a DistributedDataParallel: an attack's backward must not start its gradient reduction."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model  # type: ignore[no-any-return]


@contextlib.contextmanager
def attacking(model: Model, bn: str = "eval") -> Iterator[None]:
    """Prepares ``model`` for input gradients and restores it on exit, also after an exception.

    Inside, autograd records (even under no_grad or inference_mode around it), parameters take no gradient, and batch
    statistics come from where the method says:

    - "eval": every submodule is in eval mode.
    - "batch": batch normalisation uses the statistics of the batch and leaves its running ones alone.
    - "train": batch normalisation uses the statistics of the batch and updates its running ones.

    "batch" and "train" leave other modules (dropout) as the caller has them, and batch normalisation that the caller
    froze, in eval mode inside a model in train mode, stays frozen. A model that is not an nn.Module is run as it is.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = [p for m in modules for p in m.parameters(recurse=False) if p.requires_grad and p.is_leaf]
    modes = [(m, m.training) for m in modules]
    norms = [m for m in modules if isinstance(m, _NormBase)]
    tracking = [(m, m.track_running_stats) for m in norms]
    with torch.inference_mode(False), torch.enable_grad():
        try:
            if bn == "eval":
                for m, training in modes:
                    if training:
                        m.training = False
            else:
                whole_model_trains = getattr(model, "training", False)
                for m in norms:
                    if not whole_model_trains:
                        m.training = True
                    if bn == "batch" and m.training:
                        m.track_running_stats = False
            for p in parameters:
                p.requires_grad_(False)
            yield
        finally:
            for m, training in modes:
                if m.training != training:
                    m.training = training
            for m, tracks in tracking:
                m.track_running_stats = tracks
            for p in parameters:
                p.requires_grad_(True)


def input_gradient(logits: Tensor, inputs: Tensor, dlogits: Tensor) -> Tensor:
    """The gradient of ``<logits, dlogits>`` with respect to ``inputs`` and to nothing else; no ``.grad`` is touched."""
    if logits.requires_grad:
        (gradient,) = torch.autograd.grad(logits, inputs, dlogits, allow_unused=True)
        if gradient is not None:
            return gradient
    raise ValueError(
        "model(x) does not depend on x differentiably, so there is no gradient to attack with: the model must not detach, "
        "convert to numpy, run under torch.no_grad(), or round its input"
    )


def round_towards(x: Tensor, adv: Tensor, limit: float | Tensor) -> Tensor:
    """``adv`` in the (lower) precision of ``x``, no element farther from x than it was, nor farther than ``limit``.

    Rounding to nearest would leave the ball: by up to 6% of eps = 8/255 in bf16.
    """
    rounded, centre = adv.to(x.dtype), x.double()
    allowed = torch.minimum((adv.double() - centre).abs(), torch.as_tensor(limit, dtype=torch.float64, device=x.device))
    too_far = (rounded.double() - centre).abs() > allowed
    return torch.where(too_far, torch.nextafter(rounded, x), rounded)
