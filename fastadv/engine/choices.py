"""What ``engine="auto"`` has measured on this machine, kept in a file so that the next process need not, and runs alike.

``$FASTADV_CACHE/choices.json``, by default in ``~/.cache/fastadv``. Delete it to measure again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

from ..files import replacing
from .guest import Model


class Choice(TypedDict):
    """One measurement: the fastest way, milliseconds a step of each, and what it was of."""

    plan: str
    milliseconds: dict[str, float]
    model: str
    inputs: str
    device: str


def file() -> Path:
    root = os.environ.get("FASTADV_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastadv"
    return Path(root) / "choices.json"


def fingerprint(model: Model, *given: object) -> str | None:
    """The same for the same architecture, inputs, attack, machine and torch in any process; None for a plain callable."""
    if not isinstance(model, nn.Module):
        return None
    weights = [(name, tuple(p.shape), str(p.dtype), p.stride()) for name, p in model.named_parameters()]
    facts = (type(model).__qualname__, str(model), weights, given, torch.__version__)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def known() -> dict[str, Choice]:
    """All choices on file; none if it cannot be read."""
    try:
        content: dict[str, Choice] = json.loads(file().read_text())
        complete = all(Choice.__annotations__.keys() <= choice.keys() for choice in content.values())
    except (OSError, ValueError, AttributeError):
        return {}
    return content if complete else {}


def remember(key: str, choice: Choice) -> None:
    """Adds to the file, in one piece or not at all; a home that cannot be written to is no error."""
    with contextlib.suppress(OSError), replacing(file()) as temporary:
        temporary.write_text(json.dumps({**known(), key: choice}, indent=1))
