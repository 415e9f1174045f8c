"""Tighter bounds than intervals, by the package auto_LiRPA: CROWN and its kin, for any network that it can trace.

Zhang et al., "Efficient Neural Network Robustness Certification with General Activation Functions", 2018 (CROWN); Xu et al.,
"Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond", 2020 (auto_LiRPA); Xu et al., "Fast and
Complete: Enabling Complete Neural Network Verification with Rapid and Massively Parallel Incomplete Verifiers", 2021
(alpha-CROWN).
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from .. import checks
from ..engine import Model

METHODS = {"crown-ibp": "CROWN-IBP", "crown": "CROWN", "alpha-crown": "CROWN-Optimized"}  # by auto_LiRPA's names
INSTALL = "pip install git+https://github.com/Verified-Intelligence/auto_LiRPA"


def worst_logits(
    model: Model, x: Tensor, y: Tensor, eps: float, bounds: tuple[float, float] | None = (0.0, 1.0), method: str = "crown"
) -> Tensor:
    """Upper bounds [N, C] of ``z_j - z_y`` over the linf ball and the box, as :func:`fastadv.intervals.worst_logits`; detached.

    Args:
        method: "crown-ibp": linear bounds of the logits, on intervals of the layers before; "crown": linear bounds of all
            layers; "alpha-crown": with slopes that are optimised for each image.

    Raises:
        ValueError: auto_LiRPA is not installed, or it cannot bound this model.
    """
    checks.one_of("method", method, METHODS)
    try:
        from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
    except ImportError as error:
        raise ValueError(f"method={method!r} needs the package auto_LiRPA ({error}): {INSTALL}") from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, which auto_LiRPA can trace; got {type(model).__name__}")
    lo, hi = checks.bounds(bounds)
    network = copy.deepcopy(model)
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.Dropout | nn.Dropout2d):  # nothing in eval mode, where auto_LiRPA refuses it
                parent._modules[name] = nn.Identity()
    network.eval().requires_grad_(False)
    lower, upper = (x - eps).clamp(lo, hi), (x + eps).clamp(lo, hi)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():  # alpha-crown optimises
        try:
            bounded = BoundedModule(network, x[:1], device=x.device)
            images = BoundedTensor(x, PerturbationLpNorm(norm=math.inf, x_L=lower, x_U=upper))
            classes = network(x[:1]).shape[1]
            identity = torch.eye(classes, dtype=x.dtype, device=x.device)
            apart = identity - identity[y][:, None]  # [N, C, C]: row j asks for z_j - z_y
            _, worst = bounded.compute_bounds(x=(images,), C=apart, method=METHODS[method], bound_lower=False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of whatever kind it is
            raise ValueError(f"auto_LiRPA cannot bound this model: {type(error).__name__}: {error}") from error
    found: Tensor = worst.detach()
    return found
