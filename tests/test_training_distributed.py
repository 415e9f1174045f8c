"""Training in two processes on one machine: the same run as in one, with all weights in each or shards of them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import seeded
from test_training import CONFIG, data, given, same, weights  # noqa: F401 - data is a fixture
from torch import Tensor, nn

from fastadv.training import build, checkpoint

# What each process runs: trainings, one after the other, and whether all ranks end with the same bits.
SCRIPT = """
import hashlib, json, sys, torch
from pathlib import Path
from fastadv import processes
from fastadv.training import build, config

torch.set_num_threads(1)
full = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t
bits = lambda module: hashlib.sha256(b"".join(full(t).numpy().tobytes() for t in module.state_dict().values())).hexdigest()
with processes.processes("gloo") as rank:
    for held, out in json.loads(sys.argv[1]):
        trainer = build.trainer(config.check(held), out, device="cpu")
        trainer.fit()
        speed = ("seconds", "images_per_second", "efficiency")
        rows = [{k: v for k, v in row.items() if k not in speed} for row in trainer.history]
        seen = processes.gathered((bits(trainer.model), bits(trainer.average.module) if trainer.average else "", rows))
        if rank == 0:
            Path(out, "ranks.json").write_text(json.dumps(seen))
"""


def on_ranks(n: int, *runs: tuple[dict, Path]) -> list:
    """The trainings on so many processes, each with its folder; what each process saw at the end of the last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = [sys.executable, "-c", SCRIPT, json.dumps([(held, str(out)) for held, out in runs])]
    processes = [
        subprocess.Popen(arguments, env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE)
        for r in range(n)
    ]
    told = [process.communicate(timeout=480)[1].decode() for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(told)
    return seen(runs[-1][1])


def seen(out: Path) -> list:
    return json.loads((out / "ranks.json").read_text())


def held(file: Path, **changes) -> dict:
    return given(file, **changes).model_dump(mode="json", exclude_unset=True)


NEAR = {"attack": {"alpha": 0.007}}  # large steps by signs of gradients near 0 make much of rounding
AS_ONE = {
    "uneven last batch": {"batch_size": 15},  # 80 = 5 * 15 + 5: parts of 8 and 7, of 3 and 2
    "awp after the step": {"awp": {"restore": "after_step"}},
    "mixup": {"method": {"name": "pgd-at", "beta": None}, "data": {"mix": "mixup"}, "awp": None},
}
SYNCS = {sync: {"awp": {"sync": sync, "warmup": 0}, "epochs": 5} for sync in ("global", "local")}  # 25 steps
WHOLE = {"model": {"name": "small-cnn"}, "epochs": 2}  # whose dropout is drawn by each rank's own generator


@pytest.fixture(scope="module")
def by_two(data, tmp_path_factory) -> Path:  # noqa: F811
    """The folders of all trainings below, by one pair of processes."""
    folder = tmp_path_factory.mktemp("by two")
    runs = {name: changes | NEAR for name, changes in AS_ONE.items()} | SYNCS | {"whole": WHOLE}
    cut = [WHOLE | {"max_steps": 7}, WHOLE]
    on_ranks(
        2,
        *((held(data, **changes), folder / name) for name, changes in runs.items()),
        *((held(data, **changes), folder / "cut") for changes in cut),
    )
    return folder


@pytest.mark.parametrize("name", AS_ONE)
def test_two_processes_are_one(data, by_two, name):  # noqa: F811
    one = build.trainer(given(data, **AS_ONE[name] | NEAR), device="cpu")
    one.fit()
    first, second = seen(by_two / name)
    assert first == second  # bit for bit, and what they report
    state = torch.load(by_two / name / "last.pt", weights_only=True)["state_dict"]
    for key, value in weights(one).items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=3e-6)
    mine, theirs = first[2], one.history
    for key in ("loss", "train_clean", "train_robust", "clean", "robust", "average_robust"):
        assert [row[key] for row in mine] == pytest.approx([row[key] for row in theirs], abs=1e-5), key


@pytest.mark.parametrize("sync", SYNCS)
def test_ranks_stay_the_same_bits_whatever_awp_shares(by_two, sync):
    first, second = seen(by_two / sync)
    assert first == second


def test_two_processes_resume_what_two_began(by_two):
    assert seen(by_two / "cut") == seen(by_two / "whole")


# ---------------------------------------------------------------------------------------------------------------- FSDP2


class Residual(nn.Module):
    """What a transformer is made of, as far as sharding can tell: first dimensions of 1, of 25 and of 5."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(28, 25), nn.ModuleList(Block() for _ in range(2)), nn.Linear(25, 10)
        self.pos_embed = nn.Parameter(torch.randn(1, 28, 25) / 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.squeeze(1)) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(25), nn.Linear(25, 5), nn.Linear(5, 25)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@seeded
def residual() -> nn.Module:
    return Residual()


SHARDED = NEAR | {
    "model": {"name": "test_training_distributed:residual"},
    "awp": {"gamma": 0.05},
    "optimizer": {"name": "adamw", "clip": 0.5, "decay_biases": False},
    "schedule": {"lr": 0.003},
    "validation": {"samples": 21, "batch_size": 10},  # parts of 11 and of 10, so of two batches and of one
    "epochs": 2,
    "batch_size": 15,  # of 79: parts of 8 and 7
}


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 runs on a CPU since torch 2.7")
def test_two_processes_with_shards_are_one(data, tmp_path):  # noqa: F811
    """They start from a checkpoint of one process, and go on with one that they wrote, as one process does with it."""
    sharded = held(data, **SHARDED, parallel="fsdp2")
    one, cut, began, whole = (tmp_path / name for name in ("one", "cut", "began", "whole"))
    build.trainer(given(data, **SHARDED, max_steps=5), began, device="cpu").fit()
    shutil.copytree(began, whole)
    shutil.copytree(began, cut)
    # Cut in the second epoch, where AWP is on.
    first, second = on_ranks(2, (sharded, whole), (sharded | {"max_steps": 9}, cut), (sharded, cut))
    assert [first, first] == [first, second] == seen(whole)  # bit for bit

    (one / "checkpoints").mkdir(parents=True)
    shutil.copy(cut / "checkpoints" / checkpoint.NAME.format(9), one / "checkpoints")
    resumed = build.trainer(given(data, **SHARDED), one, device="cpu")
    with pytest.warns(UserWarning, match="the run had 2 processes"):
        resumed.fit()
    alone = build.trainer(given(data, **SHARDED), device="cpu")
    alone.fit()
    state = alone.state_dict()
    for run in (whole, one):
        kept = checkpoint.Checkpoints(run / "checkpoints").newest()
        for part in ("model", "average", "optimizer"):  # whole tensors, in the format of one process
            torch.testing.assert_close(kept[part], state[part], rtol=0, atol=3e-6)
        for name in ("loss", "train_clean", "train_robust", "clean", "robust", "average_robust"):
            assert [row[name] for row in kept["history"]] == pytest.approx([row[name] for row in alone.history], abs=1e-5), name
        assert same(torch.load(run / "last.pt", weights_only=True)["state_dict"], kept["model"])
