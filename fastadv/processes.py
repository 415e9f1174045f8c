"""The processes of one run: alone, or those that torchrun (or SLURM) started, each with a device of its own."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(days=14)  # of a group
T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if connected() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if connected() else 1


def connected() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def processes(backend: str = "gloo") -> Iterator[int]:
    """This process's rank, connected with the others for the length of the block; 0 where it is alone.

    ``backend``: "gloo" for what lies on the CPU, "cpu:gloo,cuda:nccl" where tensors of GPUs are reduced too.
    """
    if dist.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group(backend)
        try:
            yield dist.get_rank()
        finally:
            dist.destroy_process_group()
            # gloo's threads take Python's lock to let go of the last tensors; one that asks for it when Python ends aborts.
            time.sleep(0.1)
    else:
        yield rank()


def device(name: str | None = None) -> torch.device:
    """By name; None: a GPU where there is one. "cuda" is this process's own (``LOCAL_RANK``)."""
    try:
        chosen = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:NUMBER; got {name!r}") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: torch sees no GPU")
        if chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return chosen


def total(t: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world() > 1:
        dist.all_reduce(t)
    return t


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process; all must ask."""
    if world() == 1:
        return flag
    t = torch.tensor(float(flag))
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return bool(t)


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What each process holds, in the order of ranks; all wait for all."""
    if world() == 1:
        return [value]
    values: list[T] = [value] * world()
    dist.all_gather_object(values, value, group=group)
    return values


class Group:
    """The processes that share a long work of single samples: one, or the ranks of torch.distributed.

    They meet in a group of their own, of CPU tensors and with no time limit worth mentioning: one may be far ahead.
    """

    def __init__(self) -> None:
        self.rank, self.number = rank(), world()
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.number > 1 else None

    def gathered(self, mine: T) -> list[T]:
        """Of each process what it gave; all wait for all."""
        return gathered(mine, self._group)
