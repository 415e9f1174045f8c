"""What autograd saves for the input gradient of an attack: bytes of activations, counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine import attacking
from fastadv.engine.signs import signs_only

KINDS = ("normal", "signs")


def saved_bytes(model: nn.Module, x: Tensor, signs: bool) -> int:
    """Bytes that a forward pass keeps for the gradient of ``x``, without the model's own; ``signs``: with memory="signs"."""
    own = {t.untyped_storage().data_ptr() for group in (model.parameters(), model.buffers()) for t in group}
    saved: dict[int, int] = {}  # bytes by storage; many tensors may be views of one, which lives as long as the graph

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with attacking(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        inputs = x.detach().clone().requires_grad_()
        if signs:
            with signs_only():
                logits = model(inputs)
        else:
            logits = model(inputs)
        del logits  # not before: its graph holds what was saved
    return sum(saved.values())


def saved_images(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Saved MiB an image with memory="normal" and "signs", counted on ``x``; and, computed, how many fit 80 GB."""
    row: dict[str, Any] = {"counted on": list(x.shape)}
    for kind in KINDS:
        bytes_an_image = saved_bytes(model, x, kind == "signs") / len(x)
        row[kind] = {"MiB an image": bytes_an_image / 2**20, "images in 80 GB": int(80e9 / bytes_an_image)}
    return row
