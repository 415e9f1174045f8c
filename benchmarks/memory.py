"""The memory of an attack: what autograd keeps between a forward and its backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine import attacking
from fastadv.engine.signs import signs_only

KINDS = ("normal", "signs")


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves for the backward of ``forward()``, whole storages, each once, the model's own not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # the storages themselves, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def saved_images(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """MiB an image that an attack saves with memory="normal" and "signs", counted on ``x``; computed: how many fit 80 GB."""
    row: dict[str, Any] = {"counted on": list(x.shape)}
    for kind in KINDS:
        with attacking(model), signs_only() if kind == "signs" else contextlib.nullcontext():
            leaf = x.detach().clone().requires_grad_()
            an_image = saved_bytes(model, lambda: model(leaf)) / len(x)  # noqa: B023
        row[kind] = {"MiB an image": an_image / 2**20, "images in 80 GB": int(80e9 / an_image)}
    return row
