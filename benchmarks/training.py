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

EPS, ALPHA, STEPS, BETA = 8 / 255, 2 / 255, 10, 6.0


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


Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


def training_case(method: str, shape: tuple[int, ...], ours: Callable[[nn.Module], Step], best: Step, public: Step) -> Case:
    def inputs(device: torch.device) -> TrainingInputs:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = models.preact_resnet18().train()
            return TrainingInputs(network.to(device), torch.rand(shape).to(device), torch.randint(10, shape[:1]).to(device))

    return Case(
        name=f"train {method} preact-resnet18 {'x'.join(map(str, shape))}",
        inputs=inputs,
        contenders={
            "fastadv": _contender(ours),
            "handwritten, best": _contender(lambda _: best),
            "public code": _contender(lambda _: public),
        },
        baseline="handwritten, best",
        rounds=3,
        judge=lambda given, loss: {"loss": float(loss)},
        goals={"public code": 1.35},
    )


def _contender(build: Callable[[nn.Module], Step]) -> Callable[[TrainingInputs], Contender]:
    def contender(given: TrainingInputs) -> Contender:
        model = copy.deepcopy(given.network)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        loss_of = build(model)

        def step() -> Tensor:
            loss = loss_of(model, given.x, given.y)  # leaves gradients of its own, if it is the public code
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return Contender(step)

    return contender


# ------------------------------------------------------------------------------------------------------------- PGD-AT


def _fastadv_pgd_at(model: nn.Module) -> Step:
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


def _fastadv_trades(model: nn.Module) -> Step:
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
