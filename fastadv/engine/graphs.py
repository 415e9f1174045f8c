"""CUDA graphs: one step recorded, replayed for every other.

A recorded step costs one launch, whatever it holds; it pays where Python is slower than the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .passes import mark

_pools: dict[tuple[int, int], Any] = {}


def available(device: torch.device) -> bool:
    return device.type == "cuda"


def record(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Records what ``step`` launches, without running it; the result runs it, on the tensors it was recorded with.

    Recordings of one process share their memory for intermediate results, which is right as long as they are replayed one
    after the other: there is one pool for each stream that replays.
    """
    graph = torch.cuda.CUDAGraph()
    # "thread_local": a data loader's thread may go on pinning memory meanwhile.
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=_pool(device), capture_error_mode="thread_local"):
        step()

    def replay() -> None:
        with mark("replayed step"):
            graph.replay()

    return replay


def _pool(device: torch.device) -> Any:
    key = (device.index or 0, torch.cuda.current_stream(device).cuda_stream)
    if key not in _pools:
        _pools[key] = torch.cuda.graph_pool_handle()
    return _pools[key]
