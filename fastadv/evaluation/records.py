"""What an evaluation has found, sample by sample: kept on disk as it goes, so that an interrupted one loses a batch at most."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import replacing, write_text

HEADER = "evaluation.json"


@dataclass
class Record:
    """What one attack did to some samples.

    Attributes:
        samples: their numbers, int64 [n].
        claimed: whether the attack says that it fooled the model, bool [n].
        fooled: whether it did: asked once more, in ball and box, bool [n].
        predicted: the model's classes for the attack's images, int64 [n].
        distance: of the images from the clean ones, in the norm, [n].
        queries: forward passes of each sample, int64 [n].
        images: adversarial ones of the fooled, in their order.
        seconds: that it took.
    """

    samples: Tensor
    claimed: Tensor
    fooled: Tensor
    predicted: Tensor
    distance: Tensor
    queries: Tensor
    images: Tensor
    seconds: float


class Records:
    """The records of an evaluation, by attack: in memory, and in a folder where one is given.

    A record is one file, written whole; in memory it has no ``images`` unless they are asked for. A folder that holds an
    evaluation with other settings, data or weights is refused.

    Raises:
        ValueError: the folder belongs to another evaluation; it says which settings differ.
    """

    def __init__(self, folder: str | Path | None, header: dict[str, Any], images: bool = False) -> None:
        self.folder = None if folder is None else Path(folder)
        self.images = images
        self._found: dict[str, list[Record]] = {}
        if self.folder is None:
            return
        claim(self.folder, header)
        for file in sorted(self.folder.glob("*.pt")):
            try:
                record = Record(**torch.load(file, weights_only=True))
            except Exception as error:
                raise ValueError(f"{file} is no record of an evaluation, remove it and go on: {error}") from error
            self._remember(file.stem.rsplit("-", 1)[0], record)

    def add(self, attack: str, record: Record) -> None:
        if self.folder is not None:
            # A part of a tensor would take all of it along.
            held = {name: value.clone() if isinstance(value, Tensor) else value for name, value in vars(record).items()}
            with replacing(self.folder / f"{attack}-{int(record.samples[0]):08d}.pt") as temporary:
                torch.save(held, temporary)
        self._remember(attack, record)

    def _remember(self, attack: str, record: Record) -> None:
        if not self.images:
            record.images = record.images[:0].clone()
        self._found.setdefault(attack, []).append(record)

    def of(self, attack: str) -> Iterator[Record]:
        return iter(self._found.get(attack, ()))

    def done(self, attack: str, samples: int) -> Tensor:
        """Which of so many samples the attack has tried, bool [samples]."""
        tried = torch.zeros(samples, dtype=torch.bool)
        for record in self.of(attack):
            tried[record.samples] = True
        return tried


def claim(folder: Path, header: dict[str, Any]) -> None:
    """Says in the folder whose it is.

    Raises:
        ValueError: it is another one's; the message says in what they differ.
    """
    path = folder / HEADER
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if differing := sorted(k for k in {*header, *known} if header.get(k) != known.get(k)):
            shown = "; ".join(f"{k}: {known.get(k)!r} there, {header.get(k)!r} here" for k in differing)
            raise ValueError(f"resume={str(folder)!r} holds another evaluation ({shown}); name another folder or remove it")
    else:
        write_text(path, json.dumps(header, indent=1))


def fingerprint(*tensors: Tensor) -> str:
    """A hash of what tensors hold."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.dtype} {list(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint_of(model: Any, x: Tensor | None = None) -> str:
    """A hash of what a module is and holds; of another callable, of its name and its answers to the first of ``x``."""
    if isinstance(model, nn.Module):
        state = model.state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in state.items() if name not in tensors}
        told = f"{model}{list(tensors)}{others}"
    else:
        told, tensors = getattr(model, "__qualname__", type(model).__qualname__), {}
        if x is not None:
            with torch.no_grad():
                tensors = {"answers": model(x[:4])}
    return hashlib.sha256(f"{told}{fingerprint(*tensors.values())}".encode()).hexdigest()[:16]
