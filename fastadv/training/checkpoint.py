"""Checkpoints that are never half-written, and what to do when one is damaged all the same.

A run's folder keeps the two last ones, ``checkpoints/000001234.pt`` by their step. Each is one file with a checksum, moved into
place when it is whole and on the disk. It holds tensors, numbers and text only, and is loaded with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from ..files import replacing

KEPT = 2
DIGEST = 32  # bytes of SHA-256 at a file's end
NAME = "{:09d}.pt"


class Checkpoints:
    """The checkpoints in a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes the one of this step and removes the oldest."""
        path = self.folder / NAME.format(step)
        write(path, state)
        for old in self.paths()[KEPT:]:
            old.unlink(missing_ok=True)
        return path

    def paths(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob("[0-9]*.pt"), reverse=True)

    def newest(self) -> dict[str, Any] | None:
        """The newest that can be read, or None where there is none; a damaged one is passed over with a warning.

        Raises:
            ValueError: there are some, and none can be read.
        """
        problems = []
        for path in self.paths():
            try:
                state = read(path)
            except ValueError as error:
                problems.append(str(error))
                warnings.warn(f"{error}; going on from the one before", stacklevel=3)
                path.rename(path.with_suffix(".damaged"))  # it would count as one of those to keep
            else:
                return state
        if problems:
            raise ValueError("no checkpoint can be read: " + "; ".join(problems))
        return None


def write(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint in one piece: whoever looks, or pulls the plug, finds the old file or the new one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    held = buffer.getbuffer()
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(held)
        file.write(hashlib.sha256(held).digest())
        file.flush()
        os.fsync(file.fileno())


def read(path: str | Path) -> dict[str, Any]:
    """What :func:`write` wrote.

    Raises:
        ValueError: the file is missing, damaged, or no checkpoint of a training run.
    """
    path = Path(path)
    try:
        held = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    held, digest = held[:-DIGEST], held[-DIGEST:]
    if hashlib.sha256(held).digest() != digest:
        raise ValueError(f"{path} is damaged, or no checkpoint of fastadv train: its checksum is wrong")
    state: dict[str, Any] = torch.load(io.BytesIO(held), map_location="cpu", weights_only=True)
    return state


# ------------------------------------------------------------------------------------------------------- random generators


def random_state() -> dict[str, Any]:
    """Of all generators of this process that a model, or the user's code, may draw from."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, torch.from_numpy(keys.astype("int64")), *rest]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Goes on drawing where :func:`random_state` was taken."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state:
        import numpy

        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
