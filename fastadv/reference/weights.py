"""Adversarial weight perturbation (AWP; Wu, Xia and Wang, 2020): sums over each tensor, and the step on its relative ball."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def widest(t: Tensor) -> torch.dtype:
    """The dtype to add squares up in: those of small fp32 gradients underflow. Apple's GPUs have no float64."""
    return torch.float32 if t.device.type == "mps" else torch.float64


def weight_sums(weights: Sequence[Tensor], grads: Sequence[Tensor], origins: Sequence[Tensor]) -> Tensor:
    """``|o|^2, <d,d>, <d,g>, <g,g>`` of each tensor, d = w - o: [K, 4]. Those of a tensor's shards add up to its own."""
    rows = []
    for weight, grad, origin in zip(weights, grads, origins, strict=True):
        w, g, o = (t.to(widest(t)) for t in (weight, grad, origin))
        d = w - o
        rows.append(torch.stack([(o * o).sum(), (d * d).sum(), (d * g).sum(), (g * g).sum()]))
    return torch.stack(rows)


def perturb(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    origins: Sequence[Tensor],
    sums: Tensor,
    gamma: float,
    alpha: float,
) -> list[Tensor]:
    """``o + project(d + alpha |o| g/|g|)``, per tensor, onto the ball of ``gamma |o|``; d = w - o.

    One step from the origin with ``alpha = gamma`` is the papers' AWP: ``w + gamma |w| g/|g|``. A tensor whose gradient is
    zero or not finite is not moved. ``sums`` is that of :func:`weight_sums`.
    """
    perturbed = []
    for weight, grad, origin, (oo, dd, dg, gg) in zip(weights, grads, origins, sums, strict=True):
        w, g, o = (t.to(sums.dtype) for t in (weight, grad, origin))
        moves = (gg > 0) & gg.isfinite()
        length = torch.where(moves, alpha * oo.sqrt(), 0.0)
        per_g = torch.where(moves, 1 / gg.sqrt(), 0.0)
        v = w - o + torch.where(moves, length * per_g * g, 0.0)
        v_norm = (dd + 2 * length * per_g * dg.nan_to_num() + length * length).clamp(min=0).sqrt()
        radius = gamma * oo.sqrt()
        perturbed.append((o + torch.where(v_norm > radius, v * (radius / v_norm), v)).to(weight.dtype))
    return perturbed
