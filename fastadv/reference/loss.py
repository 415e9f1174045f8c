"""Per-sample losses with their closed-form gradients with respect to the logits.

``logits`` are ``[N, C]`` of any floating dtype, ``y`` integer labels ``[N]``. Every function returns ``(loss [N], dlogits
[N, C])`` with ``dlogits[i] = d loss[i] / d logits[i]``; kl and se return ``(loss, dlogits_ref, dlogits)``. Losses are fp32
(fp64 for fp64), gradients have the dtype of their logits. An attack ascends the loss: it grows as the sample is misclassified.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .step import arithmetic


def one_hot(index: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).scatter_(1, index[:, None], 1.0)


def classes_of(y: Tensor) -> Tensor:
    """Class indices [N]; of soft labels or logits [N, C], the likeliest."""
    return y.argmax(1) if y.is_floating_point() else y


def pick(z: Tensor, index: Tensor) -> Tensor:
    """z[i, index[i]], [N]."""
    return z.gather(1, index[:, None]).squeeze(1)


def without(z: Tensor, y: Tensor) -> Tensor:
    """The logits with those of the labels at -inf."""
    return z.scatter(1, y[:, None], -torch.inf)


def ce(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy ``-<t, log p>``, gradient ``p sum(t) - t``; t is the one-hot label, or y itself when it is soft [N, C]."""
    z = arithmetic(logits)
    target = y.to(z) if y.is_floating_point() else one_hot(y, z)
    log_p = z.log_softmax(1)
    loss = -torch.where(target == 0, torch.zeros_like(z), target * log_p).sum(1)
    return loss, (log_p.exp() * target.sum(1, keepdim=True) - target).to(logits.dtype)


def log_odds(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``log((1 - p_y) / p_y)``, the attack form of cross-entropy: ce = softplus(log_odds).

    Its gradient ``softmax(z without y) - 1_y`` is that of ce over ``1 - p_y``: the same direction, sample by sample, and
    unlike it this one does not underflow to zero on confident models.
    """
    z = arithmetic(logits)
    others = without(z, y)
    loss = others.logsumexp(1) - pick(z, y)
    return loss, (others.softmax(1) - one_hot(y, z)).to(logits.dtype)


def margin(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``max_{k != y} z_k - z_y``: positive iff misclassified (Carlini and Wagner, 2017). Ties: the first class."""
    z = arithmetic(logits)
    rival = stable_ranks(without(z, y))[:, 0]
    return pick(z, rival) - pick(z, y), (one_hot(rival, z) - one_hot(y, z)).to(logits.dtype)


def dlr(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``(max_{k != y} z_k - z_y) / (z_(1) - z_(3) + 1e-12)`` (Croce and Hein, 2020); below 3 classes the margin."""
    z = arithmetic(logits)
    if z.shape[1] < 3:
        return margin(logits, y)
    rival = stable_ranks(without(z, y))[:, 0]
    first, third = stable_ranks(z)[:, [0, 2]].unbind(1)
    return logits_ratio(logits, y, rival, first, third, third)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``(z_target - z_y) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)``; below 4 classes ``z_target - z_y``."""
    z = arithmetic(logits)
    if z.shape[1] < 4:
        return pick(z, target) - pick(z, y), (one_hot(target, z) - one_hot(y, z)).to(logits.dtype)
    first, third, fourth = stable_ranks(z)[:, [0, 2, 3]].unbind(1)
    return logits_ratio(logits, y, target, first, third, fourth)


def logits_ratio(
    logits: Tensor, y: Tensor, rival: Tensor, first: Tensor, third: Tensor, fourth: Tensor
) -> tuple[Tensor, Tensor]:
    """``rise / gap`` with rise = z_rival - z_y, gap = z_first - (z_third + z_fourth)/2 + 1e-12, by the quotient rule."""
    z = arithmetic(logits)
    rise = pick(z, rival) - pick(z, y)
    gap = pick(z, first) - (pick(z, third) + pick(z, fourth)) / 2 + 1e-12
    d_rise = one_hot(rival, z) - one_hot(y, z)
    d_gap = one_hot(first, z) - (one_hot(third, z) + one_hot(fourth, z)) / 2
    dlogits = d_rise / gap[:, None] - d_gap * (rise / (gap * gap))[:, None]
    return rise / gap, dlogits.to(logits.dtype)


def stable_ranks(z: Tensor) -> Tensor:
    """Class indices by falling logit, equal ones in class order: torch.topk leaves ties undefined, a specification may not."""
    return z.sort(dim=1, descending=True, stable=True).indices


def kl(logits_ref: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``KL(p || q)``, p = softmax(logits_ref), q = softmax(logits); gradients ``p ((log p - log q) - KL)`` and ``q - p``.

    Computed from logits, a probability that underflows to 0 contributes 0; torch's kl_div has NaN gradients there.
    """
    z_p, z_q = arithmetic(logits_ref), arithmetic(logits)
    log_p, log_q = z_p.log_softmax(1), z_q.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    ratio = torch.where(p > 0, log_p - log_q, torch.zeros_like(p))
    loss = (p * ratio).sum(1)
    d_ref = torch.where(p > 0, p * (ratio - loss[:, None]), torch.zeros_like(p))
    return loss, d_ref.to(logits_ref.dtype), (q - p).to(logits.dtype)


def se(logits_ref: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``|q - p|^2`` of the softmaxes (SCORE, Pang et al., 2022); with a = q - p: ``-2p(a - <p,a>)`` and ``2q(a - <q,a>)``."""
    p, q = arithmetic(logits_ref).softmax(1), arithmetic(logits).softmax(1)
    a = q - p
    d_ref = -2 * p * (a - (p * a).sum(1, keepdim=True))
    d_logits = 2 * q * (a - (q * a).sum(1, keepdim=True))
    return a.square().sum(1), d_ref.to(logits_ref.dtype), d_logits.to(logits.dtype)
