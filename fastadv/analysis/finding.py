"""What all analyses have in common: what they take and what they give back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

from ..engine import Model, unwrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Models: TypeAlias = Model | Mapping[str, Model]  # one, or several by name, to be compared in one figure


class Finding(Protocol):
    """What an analysis found: a dataclass of plain numbers and tensors on the CPU."""

    def __str__(self) -> str:
        """What came out, in a few sentences with their numbers."""

    def figure(self) -> Figure:
        """Draws it. Needs matplotlib (``pip install 'fastadv[plot]'``)."""


def named(models: Models) -> dict[str, Model]:
    """The models by name, without wrappers such as DistributedDataParallel.

    Raises:
        ValueError: there is none, or one is not callable.
    """
    given = dict(models) if isinstance(models, Mapping) else {"model": models}
    if not given:
        raise ValueError("models must be a model, or some by name; got an empty mapping")
    for name, model in given.items():
        if not callable(model):
            raise ValueError(f"models[{name!r}] must be callable on a batch; got {type(model).__name__}")
    return {name: unwrap(model) for name, model in given.items()}
