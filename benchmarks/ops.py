"""The cases of the ops: one call of a step or a loss.

A step's burst is ten steps from the same start, as in a PGD-10, and the start is put back before each (not timed): l1 steps
take longer on some images than on others, so all contenders have to see the same ones. Every contender owns its buffers, and
all share the gradient and the clean images. Losses modify nothing.

On a GPU the calls go round enough sets of inputs that none is found in the L2 cache, both of fastadv's backends take part, and
so does a copy that moves as many bytes as the op has to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastadv
from fastadv import reference

from . import baselines
from .timing import Case, Contender, in_turn

Build = Callable[[Any], Contender]

SMALL, LARGE = (128, 3, 32, 32), (128, 3, 224, 224)
CLASSES = (10, 100, 1000)
LO, HI = 0.0, 1.0
FRACTION = 0.02

GPU_SHAPES = ((32, 3, 32, 32), SMALL, (512, 3, 32, 32), LARGE, (512, 3, 224, 224))
GPU_LOGITS = ((128, 10), (512, 100), (1024, 1000), (8192, 1000), (8192, 21841))
COLD = 256 * 2**20  # bytes between two uses of a tensor: five times the L2 of an H100
MOST_SETS = 256  # what is smaller waits for launches, not for memory
HOST = {"fastadv": 5e-6, "fastadv, triton": 15e-6}  # the most that a call may cost the host, seconds
TINY = (4, 3, 8, 8)


def cases(quick: bool, device: torch.device) -> list[Case]:
    if device.type == "cuda":
        return _gpu_cases(quick)
    shapes = [SMALL] if quick else [SMALL, LARGE]
    classes = CLASSES[:1] if quick else CLASSES
    steps = [step_case(norm, shape) for norm in ("linf", "l2", "l1") for shape in shapes]
    losses = [loss_case(op, c) for op in ("ce", "log_odds", "margin", "dlr", "kl", "se") for c in classes]
    return [*steps, noise_case(), *losses]


def _gpu_cases(quick: bool) -> list[Case]:
    shapes = [SMALL] if quick else GPU_SHAPES
    logits = GPU_LOGITS[:1] if quick else GPU_LOGITS
    steps = [step_case(norm, shape, gpu=True) for norm in ("linf", "l2") for shape in shapes]
    steps += [step_case("l1", shape, gpu=True) for shape in shapes if shape in (SMALL, LARGE)]
    losses = [loss_case(op, c, rows, gpu=True) for op in ("ce", "log_odds", "margin", "dlr", "kl", "se") for rows, c in logits]
    tiny = [step_case("linf", TINY, gpu=True), step_case("l2", TINY, gpu=True), loss_case("ce", 10, 4, gpu=True)]
    return [*steps, noise_case(gpu=True), *losses, *map(host_case, tiny)]


def host_case(case: Case) -> Case:
    """What a call costs the host, whatever the device does meanwhile: on one small set of inputs, without waiting."""
    return dataclasses.replace(
        case,
        name=f"{case.name}, host only",
        inputs=lambda device: case.inputs(device)[:1],
        contenders={name: build for name, build in case.contenders.items() if name != "copy"},
        burst=100,
        waits=False,
        bytes=None,
        goals={},
        at_most=HOST,
    )


def _sets(footprint: int) -> int:
    return min(MOST_SETS, math.ceil(COLD / footprint))


def _copy_of(moved: int) -> Build:
    """The yardstick on a GPU: a copy from device memory to device memory that moves so many bytes, half of them each way."""

    def build(given: Any) -> Contender:
        sources = [torch.rand(moved // 8, device=given[0].device) for _ in range(_sets(moved))]
        return Contender(in_turn([partial(torch.empty_like(source).copy_, source) for source in sources]), yardstick=True)

    return build


def on_triton(build: Build) -> Build:
    return lambda given: dataclasses.replace(build(given), setting=partial(fastadv.use_backend, "triton"))


# ----------------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class StepInputs:
    start: Tensor
    grad: Tensor
    x: Tensor
    scalars: tuple[float, ...]  # alpha, eps, lo, hi, and of an l1 step the fraction of pixels that it moves

    @property
    def device(self) -> torch.device:
        return self.x.device


def step_case(norm: str, shape: tuple[int, ...], gpu: bool = False) -> Case:
    op, op_ = f"{norm}_step", f"{norm}_step_"
    elements, large = math.prod(shape), math.prod(shape) >= math.prod(LARGE)
    sets = _sets(12 * elements) if gpu else 1
    step_, plain, chain_ = getattr(fastadv.ops, op_), getattr(reference.step, op), getattr(baselines, op_)

    def inputs(device: torch.device) -> list[StepInputs]:
        draw = torch.Generator(device).manual_seed(0)
        return [one_set(device, draw) for _ in range(sets)]

    def one_set(device: torch.device, draw: torch.Generator) -> StepInputs:
        x = torch.rand(shape, device=device, generator=draw)
        noise = torch.rand(shape, device=device, generator=draw).sub_(0.5).mul_(2 * 8 / 255)
        grad = torch.randn(shape, device=device, generator=draw)
        pixels = math.prod(shape[1:]) / (3 * 32 * 32)  # radii as used on CIFAR, and of the same size a pixel on larger images
        eps = {"linf": 8 / 255, "l2": 0.5 * math.sqrt(pixels), "l1": 12.0 * pixels}[norm]
        fraction = (FRACTION,) if norm == "l1" else ()
        start = step_(x + noise, grad, x, 0.0, eps, LO, HI, *fraction)  # a step of length 0: a random start in ball and box
        return StepInputs(start, grad, x, (eps / 4, eps, LO, HI, *fraction))

    def judge(given: list[StepInputs], result: Tensor) -> dict[str, float]:
        few = 2  # samples are independent, and the l1 reference in fp64 is slow
        start, grad, x = (t[:few].double() for t in (given[0].start, given[0].grad, given[0].x))
        truth = plain(start, grad, x, *given[0].scalars)
        return {"error": float((result[:few] - truth).abs().max())}

    def fastadv_(given: Sequence[StepInputs]) -> Contender:
        return _in_place(step_, given)

    contenders: dict[str, Build] = {
        "fastadv": fastadv_,
        **({"fastadv, triton": on_triton(fastadv_)} if gpu else {}),
        "eager reference": lambda given: _functional(plain, given),
        "eager in place": lambda given: _hoisted(given) if norm == "linf" else _in_place(chain_, given),
        "compiled reference": lambda given: _functional(plain, given, compiled=True),
        "compiled in place": lambda given: _in_place(chain_, given, compiled=True),
        "copy": _copy_of(16 * elements) if gpu else _copy,
    }
    goals: dict[str, float] = {}
    if gpu:
        goals = {"eager reference": 3.5, "compiled reference": 1.0, "compiled in place": 1.0}
        if large and norm != "l1":
            goals["copy"] = 0.9
    elif norm == "linf":
        goals = {"eager reference": 40.0, "compiled in place": 1.0}
        if not large:
            goals = {"eager reference": 6.0, "compiled reference": 2.0}
    return Case(
        name=f"{op_} {_by(shape)}",
        inputs=inputs,
        contenders=contenders,
        baseline="eager reference",
        burst=_whole_rounds(sets, 20) if gpu else 1 if large else 10,
        rounds=3 if large and norm == "l1" else None,  # sorting takes the reference seconds
        bytes=16 * elements,  # any step reads adv, grad and x once and writes adv
        bytes_of={} if gpu else {"copy": 8 * elements},
        judge=judge,
        limits={"error": 1e-5},
        goals=goals,
    )


def noise_case(gpu: bool = False) -> Case:
    """Noisy copies of images, as randomised smoothing asks for: they are made, not kept."""
    shape, copies, std = (4, 3, 32, 32), 1024 if gpu else 64, 0.25
    elements = copies * math.prod(shape)

    def inputs(device: torch.device) -> list[Tensor]:
        return [torch.rand(shape, device=device, generator=torch.Generator(device).manual_seed(0))]

    def judge(given: list[Tensor], result: Tensor) -> dict[str, float]:
        z = (result - given[0].repeat_interleave(copies, 0)).double() / std
        return {"error": float((z.square().mean() - 1).abs() + z.mean().abs())}

    def room(given: list[Tensor]) -> Tensor:
        return given[0].repeat_interleave(copies, 0)

    def fastadv_(given: list[Tensor]) -> Contender:
        return Contender(partial(fastadv.ops.normal_start, given[0], std, 7, None, 0, copies, out=room(given)))

    def eager(given: list[Tensor]) -> Contender:
        def run() -> Tensor:
            batch = given[0].repeat_interleave(copies, 0)
            return batch + torch.randn_like(batch) * std

        return Contender(run)

    def in_place(given: list[Tensor]) -> Contender:
        noise, x = room(given), given[0]
        return Contender(lambda: noise.normal_(std=std).view(len(x), copies, *x.shape[1:]).add_(x[:, None]).flatten(0, 1))

    return Case(
        name=f"normal_start {_by(shape)}, {copies} copies",
        inputs=inputs,
        contenders={
            "fastadv": fastadv_,
            **({"fastadv, triton": on_triton(fastadv_)} if gpu else {}),
            "eager": eager,
            "eager in place": in_place,
        },
        baseline="eager",
        bytes=4 * elements,
        judge=judge,
        limits={"error": 2e-2},
        goals={"eager": 2.0, "eager in place": 1.0},
    )


def _whole_rounds(sets: int, least: int) -> int:
    return sets * math.ceil(least / sets)


def _in_place(step_: Callable[..., Tensor], given: Sequence[StepInputs], compiled: bool = False) -> Contender:
    adv, scalars = [g.start.clone() for g in given], given[0].scalars

    def run_on(adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        return step_(adv, grad, x, *scalars)

    call = torch.compile(run_on, dynamic=False) if compiled else run_on
    return Contender(
        run=in_turn([partial(call, a, g.grad, g.x) for a, g in zip(adv, given, strict=True)]),
        prepare=partial(torch._foreach_copy_, adv, [g.start for g in given]),
    )


def _functional(step: Callable[..., Tensor], given: Sequence[StepInputs], compiled: bool = False) -> Contender:
    adv, scalars = [g.start for g in given], given[0].scalars

    def run_on(adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        return step(adv, grad, x, *scalars)

    call = torch.compile(run_on, dynamic=False) if compiled else run_on

    def run_set(i: int, grad: Tensor, x: Tensor) -> Tensor:
        adv[i] = call(adv[i], grad, x)
        return adv[i]

    def prepare() -> None:
        adv[:] = [g.start for g in given]

    return Contender(in_turn([partial(run_set, i, g.grad, g.x) for i, g in enumerate(given)]), prepare)


def _hoisted(given: Sequence[StepInputs]) -> Contender:
    adv, grad = [g.start.clone() for g in given], [g.grad.clone() for g in given]
    alpha, eps, lo, hi = given[0].scalars
    ends = [((g.x - eps).clamp_(lo, hi), (g.x + eps).clamp_(lo, hi)) for g in given]
    return Contender(
        run=in_turn([partial(baselines.linf_step_hoisted_, a, g, *e, alpha) for a, g, e in zip(adv, grad, ends, strict=True)]),
        prepare=partial(torch._foreach_copy_, adv + grad, [g.start for g in given] + [g.grad for g in given]),
    )


def _copy(given: Sequence[StepInputs]) -> Contender:
    adv = given[0].start.clone()
    return Contender(run=lambda: adv.copy_(given[0].x), yardstick=True)


# ---------------------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class LossInputs:
    first: tuple[Tensor, ...]  # (logits_ref,) of a divergence
    logits: Tensor
    last: tuple[Tensor, ...]  # (y,) of a loss with labels

    def with_logits(self, logits: Tensor) -> tuple[Tensor, ...]:
        return (*self.first, logits, *self.last)

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.with_logits(self.logits)


def loss_case(op: str, classes: int, rows: int = 128, gpu: bool = False) -> Case:
    divergence, sorts = op in ("kl", "se"), op in ("margin", "dlr")
    moved = (12 if divergence else 8) * rows * classes + (4 if divergence else 12) * rows  # logits, dlogits; loss, labels
    sets = _sets(moved) if gpu else 1
    fused, eager, plain = getattr(fastadv.ops, op), getattr(baselines, op), getattr(reference.loss, op)

    def inputs(device: torch.device) -> list[LossInputs]:
        draw = torch.Generator(device).manual_seed(0)
        return [one_set(device, draw) for _ in range(sets)]

    def one_set(device: torch.device, draw: torch.Generator) -> LossInputs:
        logits, other = 3 * torch.randn(2, rows, classes, device=device, generator=draw)
        y = torch.randint(classes, (rows,), device=device, generator=draw)
        return LossInputs((other,), logits, ()) if divergence else LossInputs((), logits, (y,))

    def closed_form(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        value, *_, dlogits = plain(*arguments)  # a divergence has a gradient for its reference too: not asked for here
        return value, dlogits

    def fastadv_(given: Sequence[LossInputs]) -> Contender:
        return Contender(in_turn([partial(fused, *g.arguments) for g in given]))

    def fastadv_out(given: Sequence[LossInputs]) -> Contender:
        return Contender(in_turn([partial(fused, *g.arguments, out=fused(*g.arguments)) for g in given]))

    def autograd(given: Sequence[LossInputs], compiled: bool = False) -> Contender:
        logits, call = [g.logits.clone().requires_grad_() for g in given], eager
        ones = torch.ones(rows, device=logits[0].device)
        if compiled:
            call = torch.compile(eager, dynamic=False)

        def run_on(z: Tensor, arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            value = call(*arguments)
            return value, torch.autograd.grad(value, z, ones)[0]

        return Contender(in_turn([partial(run_on, z, g.with_logits(z)) for z, g in zip(logits, given, strict=True)]))

    def formula(given: Sequence[LossInputs]) -> Contender:
        return Contender(in_turn([partial(closed_form, *g.arguments) for g in given]))

    def compiled(given: Sequence[LossInputs]) -> Contender:
        call = torch.compile(closed_form, dynamic=False)
        return Contender(in_turn([partial(call, *g.arguments) for g in given]))

    def judge(given: Sequence[LossInputs], result: tuple[Tensor, Tensor]) -> dict[str, float]:
        few = 128  # rows are independent, and those of margin and dlr are sorted for the truth
        truth: Any = closed_form(*(t[:few].double() if t.is_floating_point() else t[:few] for t in given[0].arguments))
        return {
            name: float((t[:few].detach().double() - exact).abs().max() / exact.abs().max().clamp(min=1))
            for name, t, exact in zip(("error of value", "of gradient"), result, truth, strict=True)
        }

    contenders: dict[str, Build] = {
        "fastadv": fastadv_,
        "fastadv, out=": fastadv_out,
        **({"fastadv, triton": on_triton(fastadv_)} if gpu else {}),
        "eager autograd": autograd,
        "eager closed form": formula,
        "compiled closed form": compiled,
    }
    goals = {"eager autograd": {10: 4.0, 1000: 3.0}[classes]} if op == "ce" and classes in (10, 1000) else {}
    if gpu:
        if sorts:  # each row: a specification, and no competition for large ones
            del contenders["eager closed form"], contenders["compiled closed form"]
        contenders |= {"compiled autograd": partial(autograd, compiled=True), "copy": _copy_of(moved)}
        goals = {name: 2.0 if (rows, classes) == (128, 10) else 1.0 for name in contenders if name.startswith("compiled")}
        if rows >= 8192:
            goals["copy"] = 0.85
    return Case(
        name=f"{op} {rows}x{classes}",
        inputs=inputs,
        contenders=contenders,
        baseline="eager autograd",
        burst=_whole_rounds(sets, 10) if gpu else 1,
        bytes=moved if gpu else None,
        judge=judge,
        limits={"error of value": 1e-3, "of gradient": 1e-3},
        goals=goals,
    )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
