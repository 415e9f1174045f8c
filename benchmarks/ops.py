"""The cases of the ops: one call of a step or a loss.

A step's burst is ten steps from the same start, as in a PGD-10, and the start is put back before each (not timed): l1 steps
take longer on some images than on others, so all contenders have to see the same ones. Every contender owns its buffers, and
all share the gradient and the clean images. Losses modify nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastadv
from fastadv import reference

from . import baselines
from .timing import Case, Contender

SMALL, LARGE = (128, 3, 32, 32), (128, 3, 224, 224)
CLASSES = (10, 100, 1000)
LO, HI = 0.0, 1.0
FRACTION = 0.02


def cases(quick: bool) -> list[Case]:
    shapes = [SMALL] if quick else [SMALL, LARGE]
    classes = CLASSES[:1] if quick else CLASSES
    steps = [step_case(norm, shape) for norm in ("linf", "l2", "l1") for shape in shapes]
    losses = [loss_case(op, c) for op in ("ce", "log_odds", "margin", "dlr", "kl", "se") for c in classes]
    return steps + losses


# ----------------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class StepInputs:
    start: Tensor
    grad: Tensor
    x: Tensor
    scalars: tuple[float, ...]  # alpha, eps, lo, hi, and of an l1 step the fraction of pixels that it moves


def step_case(norm: str, shape: tuple[int, ...]) -> Case:
    op, op_ = f"{norm}_step", f"{norm}_step_"
    elements, large = math.prod(shape), shape == LARGE
    step_, plain, chain_ = getattr(fastadv.ops, op_), getattr(reference.step, op), getattr(baselines, op_)

    def inputs(device: torch.device) -> StepInputs:
        draw = torch.Generator(device).manual_seed(0)
        x = torch.rand(shape, device=device, generator=draw)
        noise = torch.rand(shape, device=device, generator=draw).sub_(0.5).mul_(2 * 8 / 255)
        grad = torch.randn(shape, device=device, generator=draw)
        pixels = math.prod(shape[1:]) / (3 * 32 * 32)  # radii as used on CIFAR, and of the same size a pixel on larger images
        eps = {"linf": 8 / 255, "l2": 0.5 * math.sqrt(pixels), "l1": 12.0 * pixels}[norm]
        fraction = (FRACTION,) if norm == "l1" else ()
        start = step_(x + noise, grad, x, 0.0, eps, LO, HI, *fraction)  # a step of length 0: a random start in ball and box
        return StepInputs(start, grad, x, (eps / 4, eps, LO, HI, *fraction))

    def judge(given: StepInputs, result: Tensor) -> dict[str, float]:
        few = 2  # samples are independent, and the l1 reference in fp64 is slow
        start, grad, x = (t[:few].double() for t in (given.start, given.grad, given.x))
        truth = plain(start, grad, x, *given.scalars)
        return {"error": float((result[:few] - truth).abs().max())}

    contenders: dict[str, Callable[[StepInputs], Contender]] = {
        "fastadv": lambda given: _in_place(step_, given),
        "eager reference": lambda given: _functional(plain, given),
        "eager in place": lambda given: _hoisted(given) if norm == "linf" else _in_place(chain_, given),
        "compiled reference": lambda given: _functional(plain, given, compiled=True),
        "compiled in place": lambda given: _in_place(chain_, given, compiled=True),
        "copy": _copy,
    }
    goals: dict[str, float] = {}
    if norm == "linf":
        goals = {"eager reference": 40.0, "compiled in place": 1.0}
        if not large:
            goals = {"eager reference": 6.0, "compiled reference": 2.0}
    return Case(
        name=f"{op_} {_by(shape)}",
        inputs=inputs,
        contenders=contenders,
        baseline="eager reference",
        burst=1 if large else 10,
        rounds=3 if large and norm == "l1" else None,  # sorting takes the reference seconds
        bytes=16 * elements,  # any step reads adv, grad and x once and writes adv
        bytes_of={"copy": 8 * elements},
        judge=judge,
        limits={"error": 1e-5},
        goals=goals,
    )


def _in_place(step_: Callable[..., Tensor], given: StepInputs, compiled: bool = False) -> Contender:
    adv, grad, x, scalars = given.start.clone(), given.grad, given.x, given.scalars

    def run_on(adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        return step_(adv, grad, x, *scalars)

    call = torch.compile(run_on, dynamic=False) if compiled else run_on
    return Contender(run=lambda: call(adv, grad, x), prepare=lambda: adv.copy_(given.start))


def _functional(step: Callable[..., Tensor], given: StepInputs, compiled: bool = False) -> Contender:
    adv, grad, x, scalars = [given.start], given.grad, given.x, given.scalars

    def run_on(adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        return step(adv, grad, x, *scalars)

    call = torch.compile(run_on, dynamic=False) if compiled else run_on

    def run() -> Tensor:
        adv[0] = call(adv[0], grad, x)
        return adv[0]

    def prepare() -> None:
        adv[0] = given.start

    return Contender(run, prepare)


def _hoisted(given: StepInputs) -> Contender:
    adv, grad, x = given.start.clone(), given.grad.clone(), given.x
    alpha, eps, lo, hi = given.scalars
    lower, upper = (x - eps).clamp_(lo, hi), (x + eps).clamp_(lo, hi)
    return Contender(
        run=lambda: baselines.linf_step_hoisted_(adv, grad, lower, upper, alpha),
        prepare=lambda: (adv.copy_(given.start), grad.copy_(given.grad)),
    )


def _copy(given: StepInputs) -> Contender:
    adv = given.start.clone()
    return Contender(run=lambda: adv.copy_(given.x), yardstick=True)


# ---------------------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class LossInputs:
    first: tuple[Tensor, ...]  # (logits_ref,) of a divergence
    logits: Tensor
    last: tuple[Tensor, ...]  # (y,) of a loss with labels

    def with_logits(self, logits: Tensor) -> tuple[Tensor, ...]:
        return (*self.first, logits, *self.last)


def loss_case(op: str, classes: int, rows: int = 128) -> Case:
    divergence = op in ("kl", "se")
    fused, eager, plain = getattr(fastadv.ops, op), getattr(baselines, op), getattr(reference.loss, op)

    def inputs(device: torch.device) -> LossInputs:
        draw = torch.Generator(device).manual_seed(0)
        logits, other = 3 * torch.randn(2, rows, classes, device=device, generator=draw)
        y = torch.randint(classes, (rows,), device=device, generator=draw)
        return LossInputs((other,), logits, ()) if divergence else LossInputs((), logits, (y,))

    def closed_form(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        value, *_, dlogits = plain(*arguments)  # a divergence has a gradient for its reference too: not asked for here
        return value, dlogits

    def fastadv_(given: LossInputs) -> Contender:
        arguments = given.with_logits(given.logits)
        return Contender(lambda: fused(*arguments))

    def fastadv_out(given: LossInputs) -> Contender:
        arguments = given.with_logits(given.logits)
        out = fused(*arguments)
        return Contender(lambda: fused(*arguments, out=out))

    def autograd(given: LossInputs) -> Contender:
        logits = given.logits.clone().requires_grad_()
        arguments, ones = given.with_logits(logits), torch.ones(rows, device=logits.device)

        def run() -> tuple[Tensor, Tensor]:
            value = eager(*arguments)
            return value, torch.autograd.grad(value, logits, ones)[0]

        return Contender(run)

    def formula(given: LossInputs) -> Contender:
        arguments = given.with_logits(given.logits)
        return Contender(lambda: closed_form(*arguments))

    def compiled(given: LossInputs) -> Contender:
        arguments = given.with_logits(given.logits)
        call = torch.compile(closed_form, dynamic=False)
        return Contender(lambda: call(*arguments))

    def judge(given: LossInputs, result: tuple[Tensor, Tensor]) -> dict[str, float]:
        wide = LossInputs(tuple(t.double() for t in given.first), given.logits.double(), given.last)
        truth: Any = closed_form(*wide.with_logits(wide.logits))
        return {
            name: float((t.detach().double() - exact).abs().max())
            for name, t, exact in zip(("error of value", "of gradient"), result, truth, strict=True)
        }

    return Case(
        name=f"{op} {rows}x{classes}",
        inputs=inputs,
        contenders={
            "fastadv": fastadv_,
            "fastadv, out=": fastadv_out,
            "eager autograd": autograd,
            "eager closed form": formula,
            "compiled closed form": compiled,
        },
        baseline="eager autograd",
        judge=judge,
        limits={"error of value": 1e-3, "of gradient": 1e-3},
        goals={"eager autograd": {10: 4.0, 1000: 3.0}[classes]} if op == "ce" and classes in (10, 1000) else {},
    )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
