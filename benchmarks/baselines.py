"""The competition from PyTorch itself: ops, AWP and PGD as one would write them by hand, plainly and as well as possible."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------ steps, all in place


def linf_step_(adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float, lo: float, hi: float) -> Tensor:
    """What one hands to torch.compile, which makes one loop of it. Eager, it allocates three temporaries."""
    return adv.add_(grad.sign(), alpha=alpha).clamp_(x - eps, x + eps).clamp_(lo, hi)


def linf_step_hoisted_(adv: Tensor, grad: Tensor, lower: Tensor, upper: Tensor, alpha: float) -> Tensor:
    """The best eager chain: ball and box are intersected once per attack, the gradient is used up, nothing is allocated."""
    return adv.add_(grad.sign_(), alpha=alpha).clamp_(lower, upper)


def l2_step_(adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float, lo: float, hi: float) -> Tensor:
    """Scaling factors are [N], so no temporary is as large as the images."""
    per_sample = (-1, *[1] * (adv.dim() - 1))
    length = grad.flatten(1).norm(dim=1)
    rate = torch.where(length > 0, alpha / length, 0.0)
    adv.sub_(x).addcmul_(grad, rate.view(per_sample))
    shrink = (eps / adv.flatten(1).norm(dim=1)).clamp_(max=1.0)
    return adv.mul_(shrink.view(per_sample)).add_(x).clamp_(lo, hi)


def l1_step_(adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float, lo: float, hi: float, fraction: float) -> Tensor:
    """The projection by bisection: some 30 passes over one buffer, where the reference sorts and gathers 2D corners."""
    a, g, c = adv.flatten(1), grad.flatten(1), x.flatten(1)
    pull = g.abs().masked_fill_(((a >= hi) & (g > 0)) | ((a <= lo) & (g < 0)), 0.0)  # not into a wall
    threshold = pull.topk(max(1, int(fraction * g.shape[1])), dim=1).values[:, -1:]
    movers = pull.ge_(threshold)
    movers.mul_(alpha / movers.sum(1, keepdim=True))
    u = a.sub_(c).addcmul_(g.sign(), movers)
    sign, room = u.sign(), torch.where(u < 0, c - lo, hi - c)
    u.abs_()
    low, buffer = torch.zeros_like(threshold), torch.empty_like(u)
    high = u.amax(1, keepdim=True)
    for _ in range(30):
        middle = (low + high) / 2
        torch.sub(u, middle, out=buffer).clamp_(min=0)
        too_long = torch.minimum(buffer, room, out=buffer).sum(1, keepdim=True) > eps
        low, high = torch.where(too_long, middle, low), torch.where(too_long, high, middle)
    # A sample inside the ball is left alone: there the bisection has come down to almost, but not exactly, zero.
    high.masked_fill_(torch.minimum(u, room, out=buffer).sum(1, keepdim=True) <= eps, 0.0)
    u.sub_(high).clamp_(min=0)
    torch.minimum(u, room, out=u).mul_(sign).add_(c).clamp_(lo, hi)
    return adv


# --------------------------------------------------------------------- losses [N] of logits [N, C], for autograd to derive


def ce(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    return _without(logits, y).logsumexp(1) - _pick(logits, y)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    return _without(logits, y).amax(1) - _pick(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def kl(logits_ref: Tensor, logits: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, 1), F.softmax(logits_ref, 1), reduction="none").sum(1)


def se(logits_ref: Tensor, logits: Tensor) -> Tensor:
    return (F.softmax(logits, 1) - F.softmax(logits_ref, 1)).square().sum(1)


def _pick(z: Tensor, y: Tensor) -> Tensor:
    return z.gather(1, y[:, None]).squeeze(1)


def _without(z: Tensor, y: Tensor) -> Tensor:
    return z.scatter(1, y[:, None], -torch.inf)


# ------------------------------------------- adversarial weight perturbation: move up the given gradients, do the rest, return


class ProxyAWP:
    """As the authors' code: a second model takes an SGD step, and what it moved by is the direction."""

    def __init__(self, model: nn.Module, gamma: float) -> None:
        self.model, self.proxy, self.gamma = model, copy.deepcopy(model), gamma
        self.optimizer = torch.optim.SGD(self.proxy.parameters(), lr=0.01)

    def perturb(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        self.proxy.load_state_dict(self.model.state_dict())
        for name, p in self.proxy.named_parameters():
            p.grad = grads.get(name)  # as after (-loss).backward(), up to the sign
        self.optimizer.step()
        difference = {}
        for (name, old), new in zip(self.model.state_dict().items(), self.proxy.state_dict().values(), strict=True):
            if old.dim() > 1 and "weight" in name:
                d = new - old
                difference[name] = old.norm() / (d.norm() + 1e-20) * d
        self._add(difference, -self.gamma)
        return difference

    def restore(self, difference: dict[str, Tensor]) -> None:
        self._add(difference, self.gamma)

    @torch.no_grad()
    def _add(self, difference: dict[str, Tensor], coefficient: float) -> None:
        for name, p in self.model.named_parameters():
            if name in difference:
                p.add_(coefficient * difference[name])


class LayerwiseAWP:
    """Tensor by tensor on the model itself, with a copy of it to come back to."""

    def __init__(self, model: nn.Module, gamma: float) -> None:
        self.weights, self.gamma = dict(model.named_parameters()), gamma

    @torch.no_grad()
    def perturb(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        backup = {}
        for name, g in grads.items():
            w = self.weights[name]
            backup[name] = w.clone()
            w.add_(g * (self.gamma * w.norm() / (g.norm() + 1e-20)))
        return backup

    @torch.no_grad()
    def restore(self, backup: dict[str, Tensor]) -> None:
        for name, was in backup.items():
            self.weights[name].copy_(was)


class ForeachAWP:
    """PyTorch's own multi-tensor ops, into a backup that is kept."""

    def __init__(self, model: nn.Module, gamma: float) -> None:
        self.named, self.gamma = dict(model.named_parameters()), gamma
        self.backup: list[Tensor] = []

    @torch.no_grad()
    def perturb(self, grads: dict[str, Tensor]) -> list[Tensor]:
        weights, directions = [self.named[name] for name in grads], list(grads.values())
        self.backup = self.backup or [torch.empty_like(w) for w in weights]
        torch._foreach_copy_(self.backup, weights)
        lengths = torch._foreach_norm(weights)
        torch._foreach_mul_(lengths, self.gamma)
        torch._foreach_div_(lengths, torch._foreach_norm(directions))
        torch._foreach_addcmul_(weights, directions, lengths)
        return weights

    @torch.no_grad()
    def restore(self, weights: list[Tensor]) -> None:
        torch._foreach_copy_(weights, self.backup)


# ------------------------------------------------------------------------------- PGD, linf, with a random start in [0, 1]


def random_start(x: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x).uniform_(-eps, eps).add_(x).clamp_(0, 1)


def pgd_best(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Tensor:
    """Gradients of the input only, ball and box intersected once, everything after the gradient in place."""
    lower, upper = (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1)
    adv = random_start(x, eps)
    for _ in range(steps):
        adv.requires_grad_()
        loss = F.cross_entropy(model(adv), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, adv)
        adv = linf_step_hoisted_(adv.detach(), grad, lower, upper, alpha)
    return adv


def pgd_textbook(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Tensor:
    """As in most papers' code: the same gradient, then a chain of eight ops with a new tensor from each."""
    adv = random_start(x, eps)
    for _ in range(steps):
        adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(adv), y, reduction="sum"), adv)
        adv = textbook_step(adv.detach(), grad, x, eps, alpha)
    return adv


def pgd_backward(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Tensor:
    """As in most tutorials: ``loss.backward()``, which also computes the gradients of all weights."""
    adv = random_start(x, eps)
    for _ in range(steps):
        adv.requires_grad_()
        model.zero_grad()
        F.cross_entropy(model(adv), y, reduction="sum").backward()
        adv = textbook_step(adv.detach(), adv.grad, x, eps, alpha)
    return adv


def textbook_step(adv: Tensor, grad: Tensor, x: Tensor, eps: float, alpha: float) -> Tensor:
    adv = adv + alpha * grad.sign()
    return torch.min(torch.max(adv, x - eps), x + eps).clamp(0, 1)


def model_passes(model: nn.Module, x: Tensor, cotangent: Tensor, steps: int) -> Tensor:
    """The floor of an attack: its forward and input-gradient passes and nothing else."""
    for _ in range(steps):
        (grad,) = torch.autograd.grad(model(x), x, cotangent)
    return grad
