"""The cases of weight perturbation: all weights of a model up a gradient and back, without the passes of the model.

Every contender has a model of its own and the same gradients. Between there and back it returns the last layer's weights, by
which the judge sees that they moved as the formula says; and how far they are off when they are back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastadv
from fastadv.weights import conv_and_linear_weights

from . import baselines, models, ops
from .timing import Case, Contender

GAMMA = 5e-3
LAST = "head.weight"


def cases(quick: bool, device: torch.device) -> list[Case]:
    gpu = device.type == "cuda"
    return [awp_case("wrn-34-1", 1, gpu) if quick else awp_case("wrn-34-10", 10, gpu)]


@dataclass(frozen=True)
class WeightInputs:
    model: nn.Module
    grads: dict[str, Tensor]  # of the weights that move

    @property
    def last(self) -> Tensor:
        return self.model.get_parameter(LAST)


class Given(torch.autograd.Function):
    """A loss with these gradients, at no cost."""

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.grads = grads
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Any) -> tuple[Any, ...]:
        return None, *ctx.grads


def awp_case(name: str, widen: int, gpu: bool) -> Case:
    with torch.device("meta"):
        elements = sum(p.numel() for n, p in models.wide_resnet(34, widen).named_parameters() if conv_and_linear_weights(n, p))

    def inputs(device: torch.device) -> WeightInputs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = models.wide_resnet(34, widen).to(device)
        draw = torch.Generator(device).manual_seed(0)
        named = [(n, p) for n, p in model.named_parameters() if conv_and_linear_weights(n, p)]
        grads = {n: torch.empty_like(p, requires_grad=False).normal_(std=1e-2, generator=draw) for n, p in named}
        return WeightInputs(model, grads)

    def fastadv_(given: WeightInputs) -> Contender:
        model, grads = copy.deepcopy(given.model), list(given.grads.values())
        weights, last = [model.get_parameter(n) for n in given.grads], model.get_parameter(LAST)
        awp = fastadv.AWP(model, GAMMA)

        def run() -> tuple[Tensor, Tensor]:
            with awp.perturb(lambda: Given.apply(grads, *weights)):
                moved = last.detach().clone()
            return moved, last

        return Contender(run)

    def contender(build: Callable[[nn.Module, float], Any]) -> Callable[[WeightInputs], Contender]:
        def built(given: WeightInputs) -> Contender:
            model = copy.deepcopy(given.model)
            awp, last = build(model, GAMMA), model.get_parameter(LAST)

            def run() -> tuple[Tensor, Tensor]:
                held = awp.perturb(given.grads)
                moved = last.detach().clone()
                awp.restore(held)
                return moved, last

            return Contender(run)

        return built

    def plain_copy(given: WeightInputs) -> Contender:
        weights = [given.model.get_parameter(n).detach() for n in given.grads]
        copies = [w.clone() for w in weights]
        return Contender(lambda: torch._foreach_copy_(copies, weights), yardstick=True)

    def judge(given: WeightInputs, result: tuple[Tensor, Tensor]) -> dict[str, float]:
        w, g = given.last.detach().double(), given.grads[LAST].double()
        v, length = GAMMA * w.norm() / g.norm() * g, GAMMA * w.norm()
        moved, back = (t.detach().double() for t in result)
        return {"error": float((moved - w - v).norm() / length), "off when back": float((back - w).abs().max())}

    return Case(
        name=f"awp {name}",
        inputs=inputs,
        contenders={
            "fastadv": fastadv_,
            **({"fastadv, triton": ops.on_triton(fastadv_)} if gpu else {}),
            "proxy model": contender(baselines.ProxyAWP),
            "layer by layer": contender(baselines.LayerwiseAWP),
            "foreach": contender(baselines.ForeachAWP),
            "copy": plain_copy,
        },
        baseline="proxy model",
        bytes=32 * elements,  # sums read weights and gradients and write the backup, 12; the step 12; the way back 8
        bytes_of={"copy": 8 * elements},
        judge=judge,
        limits={"error": 1e-2, "off when back": 1e-6},
        goals={"proxy model": 5.0, "layer by layer": 1.0, "foreach": 1.0},
    )
