"""Certified accuracy against linf perturbations, by bounds on the logits: proofs for the network itself, without any chance."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .._version import __version__
from ..engine import Model, attacking, unwrap
from ..evaluation.outcome import radius, wilson
from ..evaluation.probes import device_of
from ..evaluation.protocol import gathered
from ..intervals import worst_logits
from ..machine import device_name
from ..reference.loss import without
from . import lirpa

METHODS = ("ibp", *lirpa.METHODS)


@dataclass(frozen=True)
class Verification:
    """The outcome of :func:`certify_intervals`.

    Attributes:
        right: bool [N], whether the model is right about the image itself.
        margins: [N], a lower bound of ``z_y - z_j`` over all other classes j and all images in the ball: above 0, none in it is
            misclassified. How far above is what rounding would have to make up.
        settings: method, eps, bounds, samples, device, seconds and the version.
    """

    right: Tensor
    margins: Tensor
    settings: dict[str, Any]

    @property
    def certified(self) -> Tensor:
        """bool [N], whether the model is certainly right in the whole ball."""
        return self.right & (self.margins > 0)

    @property
    def clean_accuracy(self) -> float:
        return float(self.right.double().mean())

    @property
    def certified_accuracy(self) -> float:
        """In [0, 1]: no attack brings accuracy below it. Where it is low, accuracy under attack may still be high."""
        return float(self.certified.double().mean())

    def __str__(self) -> str:
        told = self.settings
        lines = [f"linf eps {radius(told['eps'])}, {told['samples']:,} samples, by {told['method']}: {told['seconds']:.1f} s"]
        for name, accuracy in (("clean", self.clean_accuracy), ("certified", self.certified_accuracy)):
            lo, hi = wilson(accuracy, len(self.right))
            lines.append(f"{name:<12}{accuracy:7.2%}  [{lo:.1%}, {hi:.1%}]")
        return "\n".join(lines)


def certify_intervals(
    model: Model,
    data: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
    eps: float,
    method: str = "ibp",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> Verification:
    """Certified accuracy by bounds: ``print(fastadv.certify.certify_intervals(model, (x, y), eps=0.1))``.

    Args:
        model: as :func:`fastadv.intervals.interval_bounds` for "ibp", any feed-forward nn.Module that auto_LiRPA can trace for
            the others. In eval mode, without autocast; left as found. In fp64 (``model.double()`` and images likewise) the
            bounds are rounded 1e-9 times as much as in fp32 (:mod:`fastadv.intervals`).
        data: ``(x, y)``, images in the bounds and integer labels, or batches of them, which are gathered first.
        eps: linf radius in units of x.
        method: "ibp": interval bounds, at the price of two forward passes. By the package auto_LiRPA, ever tighter and dearer:
            "crown-ibp", "crown", "alpha-crown" (:mod:`fastadv.certify.lirpa`).
        bounds: (lo, hi) of every element, or None.
        batch_size: images at once. Bounds hold N x C x features numbers, and CROWN many times as much.
        device: where to work; default: that of the model.

    Raises:
        ValueError: an argument, the data or the model is not as described, or auto_LiRPA is missing.
    """
    checks.number("eps", eps)
    checks.one_of("method", method, METHODS)
    checks.integer("batch_size", batch_size)
    x, y = gathered(data)
    checks.labelled(x, y, *checks.bounds(bounds))
    network = unwrap(model)
    on = torch.device(device) if device is not None else device_of(network, x)
    bound = worst_logits if method == "ibp" else partial(lirpa.worst_logits, method=method)
    start, right, margins = time.monotonic(), [], []
    with attacking(network), torch.no_grad(), torch.autocast(on.type, enabled=False):
        for part, labels in zip(torch.split(x, batch_size), torch.split(y.long(), batch_size), strict=True):
            part, labels = part.to(on), labels.to(on)
            logits = network(part)
            checks.logits(logits, part, labels)
            right.append((logits.argmax(1) == labels).cpu())
            worst = bound(network, part, labels, eps, bounds)
            margins.append(-without(worst, labels).amax(1).cpu())
    settings = {
        "method": method, "eps": float(eps), "bounds": None if bounds is None else list(checks.bounds(bounds)),
        "samples": len(x), "device": device_name(on), "seconds": time.monotonic() - start, "fastadv": __version__,
    }  # fmt: skip
    return Verification(torch.cat(right), torch.cat(margins), settings)
