"""Lengths, directions and balls in the norms that attacks know, for batches of perturbations [N, ...]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..engine import round_towards
from ..reference.step import Scalar, per_sample, project_l1_box, rows, spread

ORDERS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
DUAL = {"l1": "linf", "l2": "l2", "linf": "l1"}


def norms(d: Tensor, norm: str) -> Tensor:
    """Lengths [N] of perturbations [N, ...]; "l0" counts elements."""
    d = rows(d)
    if norm == "l0":
        return (d != 0).sum(1).to(d.dtype)
    # Torch's vector_norm adds up squares fast, and absolute values and maxima several times slower than these.
    return d.norm(dim=1) if norm == "l2" else d.abs().sum(1) if norm == "l1" else d.abs().amax(1)


def unit(d: Tensor, norm: str = "l2") -> Tensor:
    """Each sample's direction, of length 1; zero where it has none, or one that is not finite."""
    # Dividing by the largest element first keeps the squares of tiny ones from underflowing.
    largest = torch.linalg.vector_norm(rows(d), math.inf, dim=1)
    d = d / spread(largest, d)
    length = torch.linalg.vector_norm(rows(d), ORDERS[norm], dim=1)
    known = (largest > 0) & largest.isfinite()
    return torch.where(spread(known, d), d / spread(length, d), 0.0)


def project(d: Tensor, radius: Scalar, norm: str, low: Tensor, high: Tensor) -> Tensor:
    """``d`` brought into the ball and into ``low <= d <= high``, elementwise bounds that hold 0.

    The nearest such d for linf and l1, and for l0, where ``radius`` elements are kept at most; for l2 the ball's nearest,
    then the box's, which lies in both.
    """
    each = torch.as_tensor(radius, dtype=torch.float64, device=d.device).to(d.dtype).view(-1, 1)
    if norm == "l1":
        return project_l1_box(rows(d), each, rows(low), rows(high)).view_as(d)
    radius, clipped = spread(each, d), d.clamp(low, high)
    if norm == "l0":
        # By an element that is kept, d comes nearer in square: it would be d^2 away, and is (d - clipped)^2.
        kept = largest(rows(d.square() - (d - clipped).square()), each)
        return clipped * kept.view_as(d)
    if norm == "linf":
        return clipped.clamp(-radius, radius)
    length = spread(torch.linalg.vector_norm(rows(d), dim=1), d)
    return torch.where(length > radius, d * (radius / length), d).clamp(low, high)


def rounded(adv: Tensor, x: Tensor, dtype: torch.dtype, eps: Scalar | None = None, norm: str = "linf") -> Tensor:
    """Images as the model gets them: in the caller's precision, no farther from x, and inside the ball, there too."""
    if adv.dtype == dtype:
        return adv
    farthest = math.inf if eps is None or norm != "linf" else per_sample(eps, adv, torch.float64)
    return round_towards(x.to(dtype), adv.detach(), farthest)


def largest(size: Tensor, count: Tensor) -> Tensor:
    """Which elements of each row [N, D] are its ``count`` [N or 1, 1] largest; of equals the first, never more."""
    order = size.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(size.shape[1], device=size.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return rank + 1 <= count
