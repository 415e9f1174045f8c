"""Averages of a model's weights over training, often more robust than the weights that it ends with.

ema = EMA(model, decay=0.995, warmup_steps=0.025 * steps)
ema.update()                                                # after each optimizer.step(), once AWP has restored the weights
robust = fastadv.evaluate(ema.module, x, y)
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from .. import checks
from ..shards import local, reshard, sharded


class Average:
    """What averages are: ``module``, a copy of the model that each update moves towards it, by the step's :meth:`share`.

    Args:
        model: where it trains, also in DistributedDataParallel or compiled: what is inside of those is copied. The copy shares
            no memory with it, is in eval mode and takes no gradients. Where FSDP2 shards the model, it has to shard the copy
            alike, after this.
        buffers: "copy": the model's. "average": the running statistics (``running_mean``, ...) are averaged as the parameters
            are. Other buffers are constants and counters, and always the model's.
    """

    def __init__(self, model: nn.Module, buffers: str = "copy") -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module; got {type(model).__name__}")
        if sharded(model):
            raise ValueError("model must be copied before FSDP2 shards it: make its average first, then shard both")
        checks.one_of("buffers", buffers, ("copy", "average"))
        self.model, self.buffers, self.step = inside(model), buffers, 0
        self.module = copy.deepcopy(self.model).eval().requires_grad_(False)

    def share(self, step: int) -> float:
        """Of the model in the average after that step, from 1: 1 copies the model, 0 leaves the average as it was."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, step: int | None = None) -> None:
        """Call it after each step of the optimizer. ``step``: how many were done, default one more than last time."""
        self.step = self.step + 1 if step is None else checks.integer("step", step)
        share = self.share(self.step)
        alike: dict[tuple[bool, torch.dtype], list[tuple[Tensor, Tensor]]] = defaultdict(list)  # for which there is one kernel
        for mine, models, averaged in self._pairs() if share else ():
            alike[averaged and share < 1 and mine.is_floating_point(), mine.dtype].append((mine, models))
        for (blend, _), pairs in alike.items():
            ours, theirs = zip(*pairs, strict=True)
            torch._foreach_lerp_(ours, theirs, share) if blend else torch._foreach_copy_(ours, theirs)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Each tensor with the model's, once however often it is tied, and whether it is averaged; of shards, this rank's."""
        reshard(self.module)
        reshard(self.model)
        for mine, models in zip(self.module.parameters(), self.model.parameters(), strict=True):
            yield local(mine), local(models), True
        for (name, own), now in zip(self.module.named_buffers(), self.model.buffers(), strict=True):
            yield own, now, self.buffers == "average" and name.rpartition(".")[2].startswith("running")

    def update_bn(self, batches: Iterable[Tensor]) -> None:
        """Replaces the running statistics by those of the averaged weights on ``batches``, images as the model trains on.

        They last until the next update. With several processes give all the same batches.
        """
        if not (first := list(itertools.islice(iterator := iter(batches), 1))):
            raise ValueError("batches must hold at least one batch of images; got none")
        try:
            update_bn(itertools.chain(first, iterator), self.module)
        finally:
            self.module.eval()

    def state_dict(self) -> dict[str, Any]:
        """The average, its tensors as they are and not copies, and the steps done."""
        return {"step": self.step, "module": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken, bit for bit."""
        self.module.load_state_dict(state["module"])
        self.step = state["step"]


class EMA(Average):
    """``decay`` in [0, 1) times the average and the rest of the model, each step from ``warmup_steps`` on; a copy before.

    ramp: s steps after that the decay is at most (1 + s)/(10 + s), since a young average had better forget.

    Gowal et al., "Uncovering the Limits of Adversarial Training", 2020: decay 0.995, ``warmup_steps=1``. DM-Improves-AT: the
    same, but 2.5% of all steps. GKL, in the last quarter of 200 epochs: 0.9996, ``warmup_steps=150 * len(batches) + 1,
    ramp=False, buffers="average"``.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.995, warmup_steps: float = 0, ramp: bool = True, buffers: str = "copy"
    ) -> None:
        if checks.number("decay", decay) >= 1:
            raise ValueError(f"decay must be in [0, 1); got {decay!r}")
        self.decay, self.warmup_steps, self.ramp = decay, checks.number("warmup_steps", warmup_steps), ramp
        super().__init__(model, buffers)

    def share(self, step: int) -> float:
        past = step - self.warmup_steps
        young = (1 + past) / (10 + past) if self.ramp and past >= 0 else 1.0
        return 1.0 if past < 0 else 1 - min(self.decay, young)


class SWA(Average):
    """The mean of the models after steps ``start``, ``start + every``, ``start + 2 every``, ...; a copy of the model before.

    Its running statistics are the last model's, so :meth:`update_bn` comes before an evaluation.
    Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018.
    """

    def __init__(self, model: nn.Module, start: int, every: int = 1) -> None:
        self.start, self.every = checks.integer("start", start), checks.integer("every", every)
        super().__init__(model)

    def share(self, step: int) -> float:
        taken, off = divmod(step - self.start, self.every)
        return 1.0 if taken < 0 else 0.0 if off else 1 / (taken + 1)


def inside(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile, in whatever order."""
    wrapped = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while (name := "module" if isinstance(model, wrapped) else "_orig_mod") in model._modules:
        model = model.get_submodule(name)
    return model
