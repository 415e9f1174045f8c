"""Models too large for one device, their weights cut among the processes by FSDP2 (``torch.distributed.fsdp.fully_shard``).

    average = EMA(model)                        # copies the model, so before it is sharded
    for network in (model, average.module):
        shard(network)
    optimizer = torch.optim.AdamW(model.parameters())

A forward pass is a conversation then, in which each process sends its part of the weights to all: they must make the same ones,
in the same order. So is :func:`whole`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from . import processes


def shard(model: nn.Module) -> None:
    """Cuts the model's weights among all processes, in place: in later forward passes each block's are gathered as it runs.

    Blocks are the modules made of others that stand in an ``nn.Sequential`` or ``nn.ModuleList``, as those of ResNets and
    transformers do. What is in none is gathered as one piece, and so is a model that ties weights, as they must stay together.
    Weights become contiguous, also where they were in channels_last; buffers stay whole.

    Raises:
        ValueError: a weight is a scalar; or it is on a CPU, where torch 2.6 has no FSDP2.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device.type
    if device == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError(f"model must be on a GPU: FSDP2 runs on a CPU since torch 2.7, and this is {torch.__version__}")
    for p in model.parameters():
        p.data = p.data.contiguous()  # which FSDP2 asks for
    mesh = init_device_mesh(device, (processes.world(),))
    lists = (nn.Sequential, nn.ModuleList)
    members = {member for module in model.modules() if isinstance(module, lists) for member in module.children()}
    tied = len(list(model.parameters())) < len(list(model.named_parameters(remove_duplicate=False)))
    for module in reversed(list(model.modules())):  # inner ones first
        is_block = module in members and len(list(module.children())) and len(list(module.parameters()))
        if is_block and not tied and not isinstance(module, nn.ModuleList | nn.ModuleDict):  # which have no forward pass
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def sharded(model: object) -> list[Any]:
    """The modules of FSDP2 in a model, each of which gathers and frees weights as one piece."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if not imported, which takes a second, then not used
    if fsdp is None or not isinstance(model, nn.Module):
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def reshard(model: object) -> None:
    """Frees what is gathered. FSDP2 keeps it after a forward without a backward, as attacks end in: stale once shards move."""
    for module in sharded(model):
        module.reshard()


def is_shard(t: object) -> bool:
    return hasattr(t, "to_local")  # a DTensor, whose class costs a second to import


def local(t: Any) -> Tensor:
    """Of a tensor what is on this rank, in the same memory: of an FSDP2 parameter its shard."""
    return t.to_local() if is_shard(t) else t  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------------------- state dicts


def whole(state: Any) -> Any:
    """A state dict with each sharded tensor whole and on the CPU, in the first process; None in its place in the others."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if not is_shard(state):
        return state
    full = state.full_tensor()  # of which there is one at a time
    return full.cpu() if processes.rank() == 0 else None


def load(part: Any, state: dict[str, Any]) -> None:
    """``part.load_state_dict(state)`` of a model, an optimizer or what holds one, sharded or not; ``state`` is whole."""
    like = part.state_dict()
    if isinstance(part, torch.optim.Optimizer):  # what it keeps of a weight is cut as the weight is
        like = {"state": dict(enumerate(p for group in part.param_groups for p in group["params"]))}
    part.load_state_dict(_cut(state, like))


def _cut(state: Any, like: Any) -> Any:
    if isinstance(state, dict):
        return {key: _cut(value, like.get(key) if isinstance(like, dict) else like) for key, value in state.items()}
    if is_shard(like) and isinstance(state, Tensor) and state.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(state, like.device_mesh, like.placements)
    return state
