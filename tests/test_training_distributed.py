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

# What each process runs: trainings one after the other, and whether all ranks end with the same bits.
SCRIPT = """
import hashlib, json, sys, torch
from pathlib import Path
from fastadv import processes
from fastadv.training import build, config

torch.set_num_threads(1)
seen = []
with processes.processes("gloo") as rank:
    for out, held in json.loads(sys.argv[1]):
        trainer = build.trainer(config.check(held), out, device="cpu")
        trainer.fit()
        bits = lambda module: hashlib.sha256(b"".join(t.numpy().tobytes() for t in module.state_dict().values())).hexdigest()
        speed = ("seconds", "images_per_second", "efficiency")
        rows = [{k: v for k, v in row.items() if k not in speed} for row in trainer.history]
        seen.append(processes.gathered((bits(trainer.model), bits(trainer.average.module) if trainer.average else "", rows)))
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(seen))
"""


def on_ranks(n: int, runs: list[tuple[Path, dict]], told: Path) -> list:
    """The trainings, each in its folder, on so many processes; what each rank saw in the end, in a list for each training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", SCRIPT, json.dumps([(str(out), held) for out, held in runs]), str(told)]
    processes = [
        subprocess.Popen(arguments, env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE)
        for r in range(n)
    ]
    errors = [process.communicate(timeout=480)[1].decode() for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return json.loads(told.read_text())


def held(file: Path, **changes) -> dict:
    return given(file, **changes).model_dump(mode="json", exclude_unset=True)


NEAR = {"attack": {"alpha": 0.007}}  # large steps by signs of gradients near 0 make much of rounding
AS_ONE = {
    "uneven last batch": {"batch_size": 15},  # 80 = 5 * 15 + 5: parts of 8 and 7, of 3 and 2
    "awp after the step": {"awp": {"restore": "after_step"}},
    "mixup": {"method": {"name": "pgd-at", "beta": None}, "data": {"mix": "mixup"}, "awp": None},
}
SHARED = {sync: {"awp": {"sync": sync, "warmup": 0}, "epochs": 5} for sync in ("global", "local")}  # 25 steps
RESUMED = {"model": {"name": "small-cnn"}, "epochs": 2}  # whose dropout is drawn by each rank's own generator


@pytest.fixture(scope="module")
def by_two(data, tmp_path_factory) -> dict[str, list]:  # noqa: F811
    """What two processes saw of every training below, all by one pair of processes; and its folder."""
    folder = tmp_path_factory.mktemp("by two")
    runs = {name: held(data, **changes | NEAR) for name, changes in AS_ONE.items()}
    runs |= {name: held(data, **changes) for name, changes in SHARED.items()}
    runs |= {"whole": held(data, **RESUMED), "part": held(data, **RESUMED, max_steps=7), "rest": held(data, **RESUMED)}
    folders = [folder / {"rest": "part"}.get(name, name) for name in runs]
    found = on_ranks(2, list(zip(folders, runs.values(), strict=True)), folder / "ranks.json")
    return {name: [*ranks, out] for name, ranks, out in zip(runs, found, folders, strict=True)}


@pytest.mark.parametrize("name", AS_ONE)
def test_two_processes_are_one(data, by_two, name):  # noqa: F811
    one = build.trainer(given(data, **AS_ONE[name] | NEAR), device="cpu")
    one.fit()
    first, second, folder = by_two[name]
    assert first == second  # bit for bit, and what they report
    state = torch.load(folder / "last.pt", weights_only=True)["state_dict"]
    for key, value in weights(one).items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=3e-6)
    mine, theirs = first[2], one.history
    for key in ("loss", "train_clean", "train_robust", "clean", "robust", "average_robust"):
        assert [row[key] for row in mine] == pytest.approx([row[key] for row in theirs], abs=1e-5), key


@pytest.mark.parametrize("sync", SHARED)
def test_ranks_stay_the_same_bits_whatever_awp_shares(by_two, sync):
    first, second, _ = by_two[sync]
    assert first == second


def test_two_processes_resume_what_two_began(by_two):
    assert by_two["rest"][:2] == by_two["whole"][:2]
    assert by_two["part"][0] != by_two["whole"][0]
