"""The cases of training: a whole step of PGD-AT and of TRADES on PreActResNet-18: attack, loss, backward, SGD.

Against the form of the public code, written anew for this comparison: PGD-AT with ``loss.backward()`` in the attack, a forward
for the bookkeeping of restarts and a clean forward for monitoring (35 forwards' worth of work at 10 steps); TRADES with the
clean logits computed anew in every step and two clean forwards in the loss (39). And against the handwritten best: the same
passes as fastadv's (23 and 27). Every contender trains its own copy of the model, in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv

from . import baselines, models
from .timing import Case, Contender

EPS, ALPHA, STEPS, BETA, GAMMA = 8 / 255, 2 / 255, 10, 6.0, 1e-2


@dataclass(frozen=True)
class TrainingInputs:
    network: nn.Module
    x: Tensor
    y: Tensor


def cases(quick: bool) -> list[Case]:
    shape = (2 if quick else 32, 3, 32, 32)
    return [
        training_case("pgd-at", shape, _fastadv_pgd_at, best_pgd_at, public_pgd_at),
        training_case("trades", shape, _fastadv_trades, best_trades, public_trades),
    ]


Step = Callable[[Tensor, Tensor], Tensor]  # images and labels to the loss, the weights updated
Build = Callable[[nn.Module, torch.optim.Optimizer], Step]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def training_case(method: str, shape: tuple[int, ...], ours: Callable[[nn.Module], Loss], best: Loss, public: Loss) -> Case:
    def inputs(device: torch.device) -> TrainingInputs:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = models.preact_resnet18().train()
            return TrainingInputs(network.to(device), torch.rand(shape).to(device), torch.randint(10, shape[:1]).to(device))

    return Case(
        name=f"train {method} preact-resnet18 {'x'.join(map(str, shape))}",
        inputs=inputs,
        contenders={
            "fastadv": contender(lambda model, optimizer: descent(ours(model))(model, optimizer)),
            "handwritten, best": contender(descent(best)),
            "public code": contender(descent(public)),
        },
        baseline="handwritten, best",
        rounds=3,
        judge=judge,
        goals={"public code": 1.35},
    )


def judge(given: TrainingInputs, loss: Tensor) -> dict[str, float]:
    return {"loss": float(loss)}


def contender(build: Build, layout: torch.memory_format = torch.contiguous_format) -> Callable[[TrainingInputs], Contender]:
    def built(given: TrainingInputs) -> Contender:
        model, x = copy.deepcopy(given.network).to(memory_format=layout), given.x.clone(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        step = build(model, optimizer)
        return Contender(lambda: step(x, given.y))

    return built


def descent(loss_of: Loss) -> Build:
    """A step that descends a loss on the batch."""

    def build(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = loss_of(model, x, y)  # leaves gradients of its own, if it is the public code
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    return build


# ------------------------------------------------------------------------------------------------------------- PGD-AT


def _fastadv_pgd_at(model: nn.Module) -> Loss:
    objective = fastadv.PGDAT()
    return lambda model, x, y: objective(model, x, y).loss


def best_pgd_at(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(baselines.pgd_best(model, x, y, EPS, ALPHA, STEPS)), y)


def public_pgd_at(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x_adv = baselines.pgd_backward(model, x, y, EPS, ALPHA, STEPS)
    F.cross_entropy(model(x_adv), y, reduction="none")  # to choose among restarts, of which there is one
    loss = F.cross_entropy(model(x_adv), y)
    model(x)  # clean accuracy, for the log
    return loss


# ------------------------------------------------------------------------------------------------------------- TRADES


def _fastadv_trades(model: nn.Module) -> Loss:
    objective = fastadv.TRADES(fastadv.TRADES.paper_attack(model, eps=EPS, alpha=ALPHA), BETA)
    return lambda model, x, y: objective(model, x, y).loss


def kl_sum(logits: Tensor, logits_adv: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits_adv, 1), F.softmax(logits, 1), reduction="sum")


def best_trades(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        clean = model(x)
    lower, upper = (x - EPS).clamp_(0, 1), (x + EPS).clamp_(0, 1)
    adv = x + 0.001 * torch.randn_like(x)
    for _ in range(STEPS):
        adv.requires_grad_()
        (grad,) = torch.autograd.grad(kl_sum(clean, model(adv)), adv)
        adv = baselines.linf_step_hoisted_(adv.detach(), grad, lower, upper, ALPHA)
    model.train()
    logits = model(x)
    return F.cross_entropy(logits, y) + BETA / len(x) * kl_sum(logits, model(adv))


def public_trades(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.eval()
    adv = x + 0.001 * torch.randn_like(x)
    for _ in range(STEPS):
        adv.requires_grad_()
        (grad,) = torch.autograd.grad(kl_sum(model(x), model(adv)), adv)
        adv = baselines.textbook_step(adv.detach(), grad, x, EPS, ALPHA)
    model.train()
    loss = F.cross_entropy(model(x), y)
    return loss + BETA / len(x) * kl_sum(model(x), model(adv))


# ------------------------------------------------------------------------------------------------------- PGD-AT with AWP


def public_awp(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """As AT-AWP's code: a proxy finds the direction, and the weights come back after the optimiser's step."""
    awp = baselines.ProxyAWP(model, GAMMA)

    def step(x: Tensor, y: Tensor) -> Tensor:
        x_adv = baselines.pgd_backward(model, x, y, EPS, ALPHA, STEPS)
        F.cross_entropy(model(x_adv), y, reduction="none")  # to choose among restarts, of which there is one
        difference = awp.perturb(_weight_gradients(model, x_adv, y))
        loss = F.cross_entropy(model(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        awp.restore(difference)
        model(x)  # clean accuracy, for the log
        return loss.detach()

    return step


def _weight_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """By a pass on the model, where the public code runs it on the proxy, which has the same weights."""
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(F.cross_entropy(model(x), y), list(named.values())), strict=True))


PUBLIC: dict[str, Build] = {"pgd-at": descent(public_pgd_at), "trades": descent(public_trades), "awp": public_awp}
BEST: dict[str, Build] = {"pgd-at": descent(best_pgd_at), "trades": descent(best_trades)}
