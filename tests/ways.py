"""The ways to execute an attack, for tests without a GPU and without a compiler's minutes.

CUDA graphs are replaced by a recording that runs the step again on the tensors it was recorded with, which is what a replay
does; torch.compile stops where code would be generated.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastadv.engine import graphs
from fastadv.evaluation import alarms


@pytest.fixture(autouse=True)
def own_choices() -> Path:
    """Where engine="auto" keeps what it measured, without what earlier tests left. A folder for each test would take longer."""
    folder = Path(os.environ["FASTADV_CACHE"])
    (folder / "choices.json").unlink(missing_ok=True)
    return folder


class Recorder:
    """In place of torch's CUDA graphs: keeps the recorded steps alive no longer than the engine does."""

    def __init__(self) -> None:
        self.recorded: list[weakref.ref] = []
        self.replays = 0

    def record(self, step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        self.recorded.append(weakref.ref(step.__self__))
        loop = step.__self__
        recorded_at = {name: t.data_ptr() for name, t in vars(loop).items() if isinstance(t, torch.Tensor)}

        def replay() -> None:
            for name in loop.STATE:  # a graph reads and writes addresses
                t = getattr(loop, name)
                assert not isinstance(t, float), f"{name} would be baked into the recording"
                assert t is None or t.data_ptr() == recorded_at[name]
            self.replays += 1
            loop.step()

        return replay


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(graphs, "available", lambda device: True)
    monkeypatch.setattr(graphs, "record", recorder.record)
    return recorder


def aot(function, **options):
    """torch.compile up to the point where code is generated, which is slow and not ours."""
    return COMPILE(function, **{**options, "backend": "aot_eager"})


COMPILE = torch.compile


@pytest.fixture
def no_codegen(monkeypatch):
    """For who asks for compiled passes, and not for a compiler."""
    monkeypatch.setattr(torch, "compile", aot)


@pytest.fixture
def quick_alarms(monkeypatch):
    """Shorter attacks, fewer draws."""
    for name, value in {"STEPS": 40, "NOISE_DRAWS": 20, "NEIGHBOURS": 20, "PLANTED": 6}.items():
        monkeypatch.setattr(alarms, name, value)


WAYS = {
    "eager": {},
    "graph": {"engine": "graph"},
    "compile": {"engine": "compile"},
    "auto": {"engine": "auto"},
    "twin": {"twin": True},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "signs": {"memory": "signs"},
    "graph of a twin in bf16": {"engine": "graph", "twin": True, "precision": "bf16"},
}


@pytest.fixture(params=WAYS)
def way(request, no_codegen):
    if "graph" in request.param:
        request.getfixturevalue("recorder")
    return WAYS[request.param]
