"""CUDA graphs: one step recorded, replayed for every other.

A recorded step costs one launch, whatever it holds; it pays where Python is slower than the kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from .passes import mark

_latest: weakref.WeakValueDictionary[tuple[int, int], torch.cuda.CUDAGraph] = weakref.WeakValueDictionary()


def available(device: torch.device) -> bool:
    return device.type == "cuda"


def record(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Records what ``step`` launches, without running it; the result runs it, on the tensors it was recorded with.

    Recordings of one process share their memory for intermediate results, which is right as long as they are replayed one
    after the other: there is one pool for each stream that replays, as long as recordings use it.
    """
    graph, place = torch.cuda.CUDAGraph(), (device.index or 0, stream(device))
    # "thread_local": a data loader's thread may go on pinning memory meanwhile.
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=_pool(place), capture_error_mode="thread_local"):
        step()
    _latest[place] = graph

    def replay() -> None:
        with mark("replayed step"):
            graph.replay()

    return replay


def stream(device: torch.device) -> int:
    """The present one, by its address. What was recorded for one is not replayed on another: they share memory, unordered."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _pool(place: tuple[int, int]) -> Any:
    """That of the latest recording. A pool whose recordings are all gone can never be used again, so then a new one."""
    latest = _latest.get(place)
    return torch.cuda.graph_pool_handle() if latest is None else latest.pool()
