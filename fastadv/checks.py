"""Bad input is refused at the door: each check raises before any work, naming argument, value and expectation."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def describe(t: Tensor) -> str:
    return f"{list(t.shape)} {t.dtype} on {t.device}"


def one_of(name: str, value: Any, known: Collection[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}{nearest(value, known)}")


def nearest(name: Any, known: Collection[str]) -> str:
    """How an error about an unknown name ends: with the known one that looks most like it, if any does."""
    found = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def integer(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}; got {value!r}")
    return int(value)


def number(name: str, value: Any, positive: bool = False) -> float:
    """A finite number >= 0, or > 0."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not 0 <= float(value) < math.inf or (positive and not value):
        raise ValueError(f"{name} must be a finite number {'>' if positive else '>='} 0; got {value!r}")
    return float(value)


def non_negative(name: str, value: Any) -> None:
    """A finite number >= 0, or a tensor of such."""
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool or not bool(((value >= 0) & value.isfinite()).all()):
            raise ValueError(f"{name} must be finite and >= 0 for every sample; got {value}")
    elif isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0 or a tensor of them; got {value!r}")


def per_sample(name: str, value: Any, x: Tensor) -> None:
    """A number, or one for each sample of x, on its device."""
    if isinstance(value, Tensor):
        if value.shape not in (torch.Size(), x.shape[:1]):
            raise ValueError(f"{name} must be a number or have shape [{x.shape[0]}] like x's samples; got {describe(value)}")
        if value.dim() and value.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x; got {value.device}")


def bounds(value: Any) -> tuple[float, float]:
    """``(lo, hi)`` with lo < hi; None is no bounds."""
    if value is None:
        return -math.inf, math.inf
    try:
        lo, hi = (float(v) for v in value)
    except (TypeError, ValueError):
        raise ValueError(f"bounds must be a pair (lo, hi) of numbers or None; got {value!r}") from None
    if not lo < hi:
        raise ValueError(f"bounds must be (lo, hi) with lo < hi; got {value!r}")
    return lo, hi


def images(x: Any, lo: float, hi: float) -> None:
    """A floating batch inside the bounds, up to rounding."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = describe(x) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a floating tensor [N, ...]; got {got}; integer images: x.float() / 255")
    if x.dim() < 2:
        raise ValueError(f"x must be a batch of samples, [N, ...] with two dimensions or more; got {describe(x)}")
    if not x.numel():
        return
    smallest, largest = (float(v) for v in x.detach().aminmax())
    if math.isnan(smallest):
        raise ValueError("x must not contain NaN")
    slack = 1e-6 * (hi - lo) if math.isfinite(hi - lo) else 1e-6  # what resizing and normalising back and forth leaves
    if not (smallest >= lo - slack and largest <= hi + slack):
        raise ValueError(
            f"x must lie in bounds ({lo:g}, {hi:g}); its values span ({smallest:g}, {largest:g}), "
            f"{max(lo - smallest, largest - hi):.3g} outside. Pass the bounds of your data, or put the "
            "normalisation inside the model (fastadv.Normalize)"
        )
    if not math.isfinite(largest - smallest):
        raise ValueError(f"x must be finite; its values span ({smallest:g}, {largest:g})")


def same_device(name: str, model: Any, x: Tensor) -> None:
    """Some parameter of the module is where x is."""
    devices = {p.device for p in model.parameters()} if isinstance(model, nn.Module) else set()
    if devices and x.device not in devices:
        raise ValueError(f"x is on {x.device} but {name} is on {', '.join(map(str, devices))}; move one to the other")


def labels(y: Any, x: Tensor) -> None:
    """Integer labels [N] >= 0 or soft labels [N, C], on x's device. Their upper end is known once the model has answered."""
    if not isinstance(y, Tensor):
        raise ValueError(f"y must be a tensor of integer labels [{x.shape[0]}] or soft labels [N, C]; got {type(y).__name__}")
    if y.device != x.device:
        raise ValueError(f"y must be on {x.device} like x; got {y.device}")
    hard = y.dtype in INTEGERS and y.shape == x.shape[:1]
    soft = y.is_floating_point() and y.dim() == 2 and y.shape[0] == x.shape[0]
    if not hard and not soft:
        raise ValueError(f"y must be integer labels [{x.shape[0]}] or soft labels [{x.shape[0]}, C]; got {describe(y)}")


def labelled(x: Tensor, y: Any, lo: float, hi: float) -> None:
    """Images inside the bounds with integer labels, one at least."""
    images(x, lo, hi)
    labels(y, x)
    if y.is_floating_point() or not len(x):
        raise ValueError(f"y must be integer labels of at least one sample; got {describe(y)}")


def logits(value: Any, x: Tensor, y: Tensor | None, source: str = "model(x) must return") -> None:
    """What the model returned: [N, C], and wide enough for the labels."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{source} a tensor of logits [{x.shape[0]}, C]; got {type(value).__name__}")
    if value.dim() != 2 or value.shape[0] != x.shape[0] or value.shape[1] < 2 or not value.is_floating_point():
        raise ValueError(f"{source} floating logits [{x.shape[0]}, C] with C >= 2; got {describe(value)}")
    if y is None:
        return
    if y.is_floating_point():
        if y.shape != value.shape:
            raise ValueError(f"soft labels y must be {list(value.shape)} like the logits; got {list(y.shape)}")
    else:
        label_range(y, value.shape[1])


def label_range(y: Tensor, classes: int) -> None:
    """Integer labels in [0, classes)."""
    smallest, largest = (int(v) for v in y.aminmax()) if y.numel() else (0, 0)
    if smallest < 0 or largest >= classes:
        raise ValueError(f"y must be labels in [0, {classes}); got labels from {smallest} to {largest}")
