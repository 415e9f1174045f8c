"""The model of somebody else: run for forward passes and input gradients, and left as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ..shards import reshard

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
    - "train": batch normalisation uses the statistics of the batch and updates its running ones; after an exception they
      are as before.

    "batch" and "train" leave other modules (dropout) as the caller has them, and batch normalisation that the caller
    froze, in eval mode inside a model in train mode, stays frozen. A model that is not an nn.Module is run as it is.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    with contextlib.ExitStack() as restore:
        reshard(model)  # gathered parameters take after their shards, and are others than these
        restore.callback(reshard, model)
        restore.enter_context(torch.inference_mode(False))
        restore.enter_context(torch.enable_grad())
        # The images require grad and move in place: a cast of them that the caller's autocast kept would be the first step's.
        restore.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        for parameter in [p for m in modules for p in m.parameters(recurse=False) if p.requires_grad and p.is_leaf]:
            parameter.requires_grad_(False)
            restore.callback(parameter.requires_grad_, True)
        if bn == "eval":
            for m in modules:
                _assign(restore, m, training=False)
        else:
            norms = [m for m in modules if isinstance(m, _NormBase)]
            if not getattr(model, "training", False):  # else what is in eval mode was frozen
                for m in norms:
                    _assign(restore, m, training=True)
            for m in norms:
                if bn == "train":
                    restore.push(_on_error(_snapshot(m)))
                elif m.training:
                    _assign(restore, m, track_running_stats=False)
                    if isinstance(m, _InstanceNorm):  # which updates its running statistics whatever that flag says
                        _assign(restore, m, running_mean=None, running_var=None)
        yield


def _assign(restore: contextlib.ExitStack, module: nn.Module, **values: Any) -> None:
    """Sets attributes of a module until ``restore`` unwinds."""
    for name, value in values.items():
        before = getattr(module, name)
        if before is not value:
            setattr(module, name, value)
            restore.callback(setattr, module, name, before)


@contextlib.contextmanager
def keeping_buffers(model: Model) -> Iterator[None]:
    """Gives all buffers of ``model`` their present values back on exit."""
    with contextlib.ExitStack() as restore:
        for m in model.modules() if isinstance(model, nn.Module) else ():
            restore.callback(_snapshot(m))
        yield


def _snapshot(module: nn.Module) -> Callable[[], None]:
    """A function that gives the module's own buffers their present values back."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers(recurse=False)]

    def roll_back() -> None:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)

    return roll_back


def _on_error(roll_back: Callable[[], None]) -> Callable[..., None]:
    """An exit that rolls back if there was an exception."""

    def on_exit(kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            roll_back()

    return on_exit


def input_gradient(logits: Tensor, inputs: Tensor, dlogits: Tensor, again: bool = False) -> Tensor:
    """The gradient of ``<logits, dlogits>`` with respect to ``inputs`` and to nothing else; no ``.grad`` is touched.

    ``again``: another one of the same logits will follow.
    """
    if logits.requires_grad:
        (gradient,) = torch.autograd.grad(logits, inputs, dlogits, retain_graph=again, allow_unused=True)
        if gradient is not None:
            return gradient
    raise ValueError(
        "model(x) does not depend on x differentiably, so there is no gradient to attack with: the model must not detach, "
        "convert to numpy, run under torch.no_grad(), or round its input"
    )


def round_towards(x: Tensor, adv: Tensor, limit: float | Tensor) -> Tensor:
    """``adv`` in the (lower) precision of ``x``, no element farther from x than it was, nor farther than ``limit``.

    Rounding to nearest would leave the ball: by up to 6% of eps = 8/255 in bf16. ``limit`` is a float or a float64 tensor
    that broadcasts.
    """
    rounded, centre = adv.to(x.dtype), x.double()
    too_far = (rounded.double() - centre).abs() > (adv.double() - centre).abs().clamp(max=limit)
    return torch.where(too_far, torch.nextafter(rounded, x), rounded)
