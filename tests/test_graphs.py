"""Where recordings keep their memory, on a CUDA that is pretended."""

from __future__ import annotations

import contextlib
import gc
import itertools
from types import SimpleNamespace

import pytest
import torch

from fastadv.engine import graphs


@pytest.fixture
def cuda(monkeypatch):
    """Pools die with the last recording in them, and recording into a dead one fails, as in torch's allocator."""
    pools = SimpleNamespace(handles=itertools.count(), users={}, stream=1)

    class Graph:
        def pool(self):
            return self.handle

        def replay(self):
            pass

        def __del__(self):
            pools.users[self.handle] -= 1

    @contextlib.contextmanager
    def recording(graph, pool, capture_error_mode):
        assert pools.users.setdefault(pool, None) != 0, "use_count > 0 INTERNAL ASSERT FAILED"
        pools.users[pool] = (pools.users[pool] or 0) + 1
        graph.handle = pool
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools.handles))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=pools.stream))
    return pools


def record():
    return graphs.record(lambda: None, torch.device("cuda", 0))


def test_recordings_of_a_stream_share_a_pool(cuda):
    kept = [record(), record()]
    cuda.stream = 2
    kept.append(record())
    assert cuda.users == {0: 2, 1: 1}
    assert len(kept) == 3


def test_a_pool_is_left_when_its_recordings_are_gone(cuda):
    first = record()
    del first
    gc.collect()
    assert record() is not None
    assert list(cuda.users) == [0, 1]
