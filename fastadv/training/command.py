"""``fastadv train``: from a config file to a folder of weights, checkpoints and a log."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch

from ..files import write_text
from ..processes import processes, rank
from .build import trainer
from .config import Config, dump, find, load
from .cost import passes, petaflops

CONFIG = "config.yaml"


def run(
    config: str,
    changes: Sequence[str] = (),
    out: str | None = None,
    resume: str = "auto",
    device: str | None = None,
    minutes: float = 10.0,
) -> Path:
    """Trains by a config file and returns the folder of the run.

    Args:
        config: a YAML file, or the name of a recipe. changes: "key=value" each (:func:`fastadv.training.config.load`).
        out: folder; default: runs/ and the config's name.
        resume: "auto" goes on with what is in the folder; "never" refuses a folder with a run in it.
        device: default: a GPU where there is one. minutes: between checkpoints within an epoch.

    Under torchrun the processes train one model together, and the first one writes.

    Raises:
        ValueError, OSError: something is not as described; the message says what. Nothing has been written then.
    """
    chosen = load(config, changes)
    folder = Path(out or Path("runs") / find(config).stem)
    with processes("cpu:gloo,cuda:nccl" if device != "cpu" and torch.cuda.is_available() else "gloo"):
        _check_same(folder, chosen)
        training = trainer(chosen, folder, device, minutes)
        if rank() == 0:
            write_text(folder / CONFIG, dump(chosen))
        training.fit(resume)
    return folder


def _check_same(folder: Path, chosen: Config) -> None:
    """Refuses a folder of another run. Where data lie, parallel and max_steps may have changed."""
    if not (folder / CONFIG).is_file():
        return
    before, now = (dump(elsewhere(config)) for config in (config_of(folder), chosen))
    if before != now:
        lines = [line for line in difflib.unified_diff(before.splitlines(), now.splitlines(), n=0) if line[1:2] not in "-+@"]
        raise ValueError(f"{folder} holds another run (- there, + here); name another --out:\n" + "\n".join(lines))


def elsewhere(config: Config) -> Config:
    """Without what does not change the training, or by rounding alone."""
    data = config.data.model_copy(update={"root": None, "extra": config.data.extra and "elsewhere"})
    return config.model_copy(update={"about": None, "max_steps": None, "parallel": "ddp", "data": data})


def cost(config: Config) -> str:
    """What a run costs, in a line."""
    forwards = passes(config)
    return f"{forwards} forward passes an image and step, {petaflops(config, forwards):.4g} PFLOP in all"


def config_of(folder: str | Path) -> Config:
    """The config that a folder's run was trained by."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is no folder of fastadv train: it has no {CONFIG}")
    return load(path)
