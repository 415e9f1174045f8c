"""Adversarial weight perturbation (AWP; Wu, Xia and Wang, 2020): norms, and the perturbation on the relative sphere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .step import arithmetic


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Frobenius norm of each tensor, 0-dim, in its arithmetic dtype."""
    return [arithmetic(t).norm() for t in tensors]


def perturb(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    gamma: float,
    alpha: float | None = None,
    origins: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """``origin + project(weight - origin + alpha |origin| grad/|grad|)``, per tensor, onto the ball of ``gamma |origin|``.

    One step from the origin with ``alpha = gamma`` (the defaults) is the papers' AWP: ``w + gamma |w| g/|g|``. Several
    steps pass the unperturbed weights as ``origins``. A tensor whose gradient is zero or not finite is not moved.
    """
    perturbed = []
    for weight, grad, origin in zip(weights, grads, weights if origins is None else origins, strict=True):
        w, g, o = arithmetic(weight), arithmetic(grad).to(arithmetic(weight)), arithmetic(origin)
        w_norm, g_norm = o.norm(), g.norm()
        unit = torch.where((g_norm > 0) & g_norm.isfinite(), g / g_norm, torch.zeros_like(g))
        v = w - o + (gamma if alpha is None else alpha) * w_norm * unit
        v_norm = v.norm()
        v = torch.where(v_norm > gamma * w_norm, v * (gamma * w_norm / v_norm), v)
        perturbed.append((o + v).to(weight.dtype))
    return perturbed
