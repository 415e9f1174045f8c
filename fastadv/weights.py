"""Perturbing the weights of a model during a training step: AWP (adversarial) and RWP (random).

    awp = fastadv.AWP(model, gamma=5e-3)
    with awp.perturb(lambda: criterion.loss(model, x, y, x_adv)):     # weights move up the loss, by gamma |w| each
        criterion.loss(model, x, y, x_adv).backward()                 # the training gradient, at the moved weights
    optimizer.step()                                                  # the weights are back, bit for bit

Wu, Xia and Wang, "Adversarial Weight Perturbation Helps Robust Generalization", 2020.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import checks, ops
from .shards import is_shard, local, reshard

Loss = Callable[[], Tensor]
Select = Callable[[str, nn.Parameter], bool]

SYNCS = ("auto", "global", "local")
RESTORES = ("before_step", "after_step")
LOST = (
    "weights changed inside perturb(), and that change would be lost: with restore='before_step' call optimizer.step() after "
    "the block, or use restore='after_step'"
)


def conv_and_linear_weights(name: str, parameter: nn.Parameter) -> bool:
    """The papers' choice: parameters of two dimensions or more with "weight" in their name; no biases, no batch norms."""
    return parameter.dim() > 1 and "weight" in name


class _WeightPerturbation:
    """What AWP and RWP share: which weights move, how they come back, and what ranks agree on."""

    def __init__(
        self,
        model: nn.Module,
        gamma: float,
        alpha: float | None,
        steps: int,
        select: Select,
        warmup: int,
        sync: str,
        restore: str,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module; got {type(model).__name__}")
        for name, value in (("gamma", gamma), ("alpha", 0.0 if alpha is None else alpha)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, relative to each weight's norm; got {value!r}")
        checks.integer("steps", steps)
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise ValueError(f"warmup must be an integer >= 0, in calls of perturb(); got {warmup!r}")
        checks.one_of("sync", sync, SYNCS)
        checks.one_of("restore", restore, RESTORES)
        if not callable(select):
            raise ValueError(f"select must be callable on (name, parameter); got {type(select).__name__}")
        self.model, self.gamma, self.alpha, self.steps, self.select = model, gamma, alpha, steps, select
        self.warmup, self.sync, self.restore, self.calls = warmup, sync, restore, 0
        ddp = next((m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)), None)
        self._ddp, self._group = ddp, None if ddp is None else ddp.process_group
        self._is_global = sync == "global" or (sync == "auto" and ddp is not None)
        self._buffers: dict[str, list[Tensor]] = {}  # kept between calls: fresh memory costs more than the kernels
        self._active = False
        selected = self._selected()
        if not selected:
            raise ValueError("no parameter to perturb: select(name, parameter) is false for all that require grad")
        apart = self._ranks() > 1 and not self._is_global and not is_shard(selected[0])  # each rank by its own gradient
        if apart and restore == "after_step":
            raise ValueError(
                "restore='after_step' with sync='local' lets ranks drift apart (weight decay acts on each rank's own "
                "perturbed weights); use sync='global' or restore='before_step'"
            )
        if apart and sync == "auto":
            warnings.warn(
                "each rank perturbs its weights by its own gradient, since model does not hold DistributedDataParallel: "
                "pass the wrapper, or say sync='global' or 'local'",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, int]:
        """How many calls of ``perturb`` there were: what the warm-up counts."""
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where :meth:`state_dict` was taken."""
        self.calls = state["calls"]

    # ------------------------------------------------------------------------------------------------------- the weights

    def _selected(self) -> list[nn.Parameter]:
        """Each parameter once, however often it is tied, in the model's order; asked anew, since users freeze and replace."""
        reshard(self.model)
        return [p for name, p in self.model.named_parameters() if p.requires_grad and self.select(name, p)]

    @contextlib.contextmanager
    def _perturbed(self, gradients: Callable[[list[nn.Parameter]], list[Tensor]]) -> Iterator[None]:
        if self._active:
            raise RuntimeError("perturb() inside perturb(): the weights are already perturbed")
        self.calls += 1
        parameters = self._selected()
        if self.calls <= self.warmup or self.gamma == 0 or not parameters:  # all may have been frozen since
            yield
            return
        weights = [local(p).detach() for p in parameters]
        origins = self._like("origins", weights)
        recorded, self._active = False, True
        try:
            for step in range(self.steps):
                grads = self._agreed(parameters, gradients(parameters))
                sums = self._sums(parameters, weights, grads, origins, record=step == 0)
                recorded = True  # the backup is whole before any weight moves: whatever interrupts, they come back
                ops.perturb_(weights, grads, origins if step else weights, sums, self.gamma, self.alpha)
                torch.clear_autocast_cache()  # of weights cast before they moved
            del grads
            if self.restore == "after_step":
                moved = self._like("moved", weights)
                ops.restore_(moved, weights)
                yield
                with torch.no_grad():  # as the papers: what the optimiser did at the perturbed weights, at the weights
                    torch._foreach_sub_(weights, moved)
                    torch._foreach_add_(weights, origins)
            else:
                versions = [w._version for w in weights]
                with self._steps_refused(parameters):
                    yield
                if versions != [w._version for w in weights]:
                    raise RuntimeError(LOST)
                ops.restore_(weights, origins)
        except BaseException:
            if recorded:
                ops.restore_(weights, origins)
            raise
        finally:
            self._active = False
            torch.clear_autocast_cache()
            reshard(self.model)

    def _like(self, name: str, weights: list[Tensor]) -> list[Tensor]:
        """Buffers like the weights, the same ones in every call."""
        kept = self._buffers.get(name, [])
        if [(b.shape, b.stride(), b.dtype, b.device) for b in kept] != [
            (w.shape, w.stride(), w.dtype, w.device) for w in weights
        ]:
            with torch.inference_mode(False):  # usable outside of it later
                kept = self._buffers[name] = [torch.empty_like(w, requires_grad=False) for w in weights]
        return kept

    @contextlib.contextmanager
    def _steps_refused(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Before they are done; and fused ones, as ``SGD(fused=True)``, do not count versions."""
        ours = {id(p) for p in parameters}

        def refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if self._active and any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
                raise RuntimeError(LOST)

        hook = register_optimizer_step_pre_hook(refuse)
        try:
            yield
        finally:
            hook.remove()

    # --------------------------------------------------------------------------------------------------------- the ranks

    def _ranks(self) -> int:
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        return torch.distributed.get_world_size(self._group) if ready else 1

    def _agreed(self, parameters: list[nn.Parameter], grads: list[Tensor]) -> list[Tensor]:
        """The gradients' mean over ranks where the perturbation is global: one flat all-reduce for each dtype."""
        if not self._is_global or self._ranks() == 1 or is_shard(parameters[0]):
            return grads
        for dtype in {g.dtype: None for g in grads}:  # in one order on all ranks
            same = [g for g in grads if g.dtype == dtype]
            flat = torch.cat([g.reshape(-1) for g in same]).div_(self._ranks())  # first: their sum may overflow
            torch.distributed.all_reduce(flat, group=self._group)
            parts = torch.split(flat, [g.numel() for g in same])
            torch._foreach_copy_(same, [part.view_as(g) for part, g in zip(parts, same, strict=True)])
        return grads

    def _sums(
        self, parameters: list[nn.Parameter], weights: list[Tensor], grads: list[Tensor], origins: list[Tensor], record: bool
    ) -> Tensor:
        """The sums over whole tensors, also where each rank holds a shard."""
        sums = ops.weight_sums(weights, grads, origins, record=record)
        if is_shard(parameters[0]):
            for group in parameters[0].device_mesh.get_all_groups():  # type: ignore[attr-defined]
                torch.distributed.all_reduce(sums, group=group)
        return sums


class AWP(_WeightPerturbation):
    """Adversarial weight perturbation: train at the weights, within ``gamma`` of these, where the loss is higher.

    For each selected tensor, ``v = gamma |w| g/|g|`` with g the gradient of the loss, its norms over the whole tensor; the
    training gradient is taken at ``w + v``.

    Args:
        model: the module that trains, also under torch.compile, DistributedDataParallel or FSDP2 (``fully_shard``).
        gamma: radius relative to each weight's norm: 5e-3 for TRADES, 1e-2 for PGD-AT in the paper. 0 perturbs nothing.
        alpha: step size, likewise relative; default ``gamma``, with which one step ends on the sphere, as the paper's code.
        steps: ascent steps, each a forward and a backward of the loss; projected onto the ball of ``gamma |w|``.
        select: ``(name, parameter) -> bool``; by default, as the papers, those with two dimensions or more and "weight" in
            their name. Frozen parameters never move; tied ones move once.
        warmup: calls of :meth:`perturb` that perturb nothing yet (the paper's TRADES-AWP: 10 epochs, times the batches).
        sync: what ranks of torch.distributed agree on. "global": all perturb by the gradient of the global batch (one
            all-reduce, in the process group of DistributedDataParallel). "local": each by its own. "auto": global where
            ``model`` is or holds DistributedDataParallel, else local. The shards of FSDP2 always belong to one global
            perturbation.
        restore: "before_step": the weights are restored, bit for bit, when the block ends; call ``optimizer.step()`` after
            it. "after_step": call it inside; the block's end takes v off again, so weight decay has acted on w + v, as in
            the papers' code. Costs a third copy of the weights.

    The ascent leaves ``.grad``, buffers (batch statistics) and DistributedDataParallel's reducer alone.

    Raises:
        ValueError: an argument is not as described, nothing is selected, or DistributedDataParallel has a static graph.
    """

    def __init__(
        self,
        model: nn.Module,
        gamma: float = 5e-3,
        alpha: float | None = None,
        steps: int = 1,
        select: Select = conv_and_linear_weights,
        warmup: int = 0,
        sync: str = "auto",
        restore: str = "before_step",
    ) -> None:
        super().__init__(model, gamma, alpha, steps, select, warmup, sync, restore)
        if self._ddp is not None and self._ddp.static_graph:
            raise ValueError("DistributedDataParallel(static_graph=True) takes the ascent for training; wrap without it")

    def perturb(self, loss: Loss) -> contextlib.AbstractContextManager[None]:
        """Moves the weights up ``loss`` for the length of a ``with`` block, which may span several micro-batches.

        Args:
            loss: called without arguments, once a step, returns the scalar to ascend: the training loss, on the same images.
                A positive factor changes nothing, so under fp16 pass ``lambda: scaler.scale(...)`` that small gradients
                do not underflow.

        A tensor whose gradient is zero or not finite stays. On an exception, KeyboardInterrupt included, in ``loss`` or in
        the block, the weights are restored bit for bit.

        Raises:
            ValueError: ``loss()`` is not a scalar that depends on the weights.
            RuntimeError: perturb() is already active; or the weights are changed inside "before_step", by an optimiser or else.
        """
        if not callable(loss):
            raise ValueError(
                f"loss must be callable without arguments and return the scalar to ascend; got {type(loss).__name__}"
            )
        return self._perturbed(lambda parameters: self._ascent(loss, parameters))

    def _ascent(self, loss: Loss, parameters: list[nn.Parameter]) -> list[Tensor]:
        sharded = is_shard(parameters[0])
        aside = _grads_set_aside(list(self.model.parameters())) if sharded else contextlib.nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), _buffers_restored(self.model), aside:
            value = loss()
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                got = checks.describe(value) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"loss() must return a scalar tensor that depends on the model's weights; got {got}")
            if not sharded:
                return list(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True))
            value.backward()  # type: ignore[no-untyped-call]  # which alone reaches the shards of FSDP2
            reshard(self.model)
            if all(p.grad is None for p in parameters):
                raise ValueError(
                    "loss() gave no sharded weight a gradient; if FSDP2 was told not to reduce, call "
                    "set_requires_gradient_sync(True) before perturb()"
                )
            return [torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in parameters]


class RWP(_WeightPerturbation):
    """Random weight perturbation, the baseline that AWP is measured against: ``v = gamma |w| n/|n|``, n ~ N(0, I), anew in
    every call. Arguments as :class:`AWP`, and ``generator``, the source of n. (Not the "robust weight perturbation" of 2022.)
    """

    def __init__(
        self,
        model: nn.Module,
        gamma: float = 5e-3,
        select: Select = conv_and_linear_weights,
        warmup: int = 0,
        sync: str = "auto",
        restore: str = "before_step",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, gamma, None, 1, select, warmup, sync, restore)
        self.generator = generator

    def perturb(self) -> contextlib.AbstractContextManager[None]:
        """Moves the weights for the length of a ``with`` block, as :meth:`AWP.perturb`."""
        return self._perturbed(self._noise)

    def _noise(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        noise = [torch.empty_like(local(p)).normal_(generator=self.generator) for p in parameters]
        for p, n in zip(parameters, noise, strict=True) if is_shard(parameters[0]) else ():
            for group, placement in zip(p.device_mesh.get_all_groups(), p.placements, strict=True):  # type: ignore[attr-defined]
                if placement.is_replicate():  # of shards, in HSDP: their sum has as good a direction as each
                    torch.distributed.all_reduce(n, group=group)
        return noise


# ------------------------------------------------------------------------------------------------------------- the model


@contextlib.contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    """Gives all buffers their values back: running statistics, which torch changes without counting versions, and others."""
    places = [(m._buffers, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    buffers = [buffer for _, _, buffer in places]
    before = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        for home, name, buffer in places:  # where forward binds new ones
            home[name] = buffer
        ops.restore_(buffers, before)


@contextlib.contextmanager
def _grads_set_aside(parameters: list[nn.Parameter]) -> Iterator[None]:
    """No parameter has a ``.grad`` inside, and each the one that it had afterwards."""
    before = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        yield
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad
