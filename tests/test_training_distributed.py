"""Training in two processes on one machine: the same run as in one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import CONFIG, data, given, same, weights  # noqa: F401 - data is a fixture

from fastadv.training import build

# What each process runs: a training, and whether all ranks end with the same bits.
SCRIPT = """
import hashlib, json, sys, torch
from pathlib import Path
from fastadv import processes
from fastadv.training import build, config

torch.set_num_threads(1)
held, out, minutes = json.loads(sys.argv[1]), sys.argv[2], float(sys.argv[3])
with processes.processes("gloo") as rank:
    trainer = build.trainer(config.check(held), out, device="cpu", minutes=minutes)
    trainer.fit()
    bits = lambda module: hashlib.sha256(b"".join(t.numpy().tobytes() for t in module.state_dict().values())).hexdigest()
    speed = ("seconds", "images_per_second", "efficiency")
    rows = [{k: v for k, v in row.items() if k not in speed} for row in trainer.history]
    seen = processes.gathered((bits(trainer.model), bits(trainer.average.module) if trainer.average else "", rows))
    if rank == 0:
        Path(out, "ranks.json").write_text(json.dumps(seen))
"""


def on_ranks(n: int, held: dict, out: Path, minutes: float = 10.0) -> list:
    """The training on so many processes; what each saw in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", SCRIPT, json.dumps(held), str(out), str(minutes)]
    processes = [
        subprocess.Popen(arguments, env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE)
        for r in range(n)
    ]
    told = [process.communicate(timeout=240)[1].decode() for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(told)
    return json.loads((out / "ranks.json").read_text())


def held(file: Path, **changes) -> dict:
    return given(file, **changes).model_dump(mode="json", exclude_unset=True)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"batch_size": 15}, id="uneven last batch"),  # 80 = 5 * 15 + 5: parts of 8 and 7, of 3 and 2
        pytest.param({"awp": {"restore": "after_step"}}, id="awp after the step"),
        pytest.param({"method": {"name": "pgd-at", "beta": None}, "data": {"mix": "mixup"}, "awp": None}, id="mixup"),
    ],
)
def test_two_processes_are_one(data, tmp_path, changes):  # noqa: F811
    changes = changes | {"attack": {"alpha": 0.007}}  # large steps by signs of gradients near 0 make much of rounding
    one = build.trainer(given(data, **changes), device="cpu")
    one.fit()
    first, second = on_ranks(2, held(data, **changes), tmp_path)
    assert first == second  # bit for bit, and what they report
    state = torch.load(tmp_path / "last.pt", weights_only=True)["state_dict"]
    for name, value in weights(one).items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=3e-6)
    mine, theirs = first[2], one.history
    for name in ("loss", "train_clean", "train_robust", "clean", "robust", "average_robust"):
        assert [row[name] for row in mine] == pytest.approx([row[name] for row in theirs], abs=1e-5), name


@pytest.mark.parametrize("sync", ["global", "local"])
def test_ranks_stay_the_same_bits_whatever_awp_shares(data, tmp_path, sync):  # noqa: F811
    first, second = on_ranks(2, held(data, awp={"sync": sync, "warmup": 0}, epochs=5), tmp_path)  # 25 steps
    assert first == second


def test_two_processes_resume_what_two_began(data, tmp_path):  # noqa: F811
    changes = {"model": {"name": "small-cnn"}, "epochs": 2}  # whose dropout is drawn by each rank's own generator
    whole = on_ranks(2, held(data, **changes), tmp_path / "whole")
    on_ranks(2, held(data, **changes, max_steps=7), tmp_path / "part")
    assert on_ranks(2, held(data, **changes), tmp_path / "part") == whole
