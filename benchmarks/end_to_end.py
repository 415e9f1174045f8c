"""``python -m benchmarks.end_to_end``: whole attacks and training steps by every engine and precision, against public code.

PGD-10 and a step of PGD-AT, TRADES and PGD-AT with AWP: for each model and batch size one case in each precision. Public code
is in fp32 in every case: a loop with ``loss.backward()``, and for training the steps of training.py. On CUDA, fp32 multiplies
in TF32 and cuDNN chooses its kernels by trying them, for everyone.

The floor of an attack is bare model passes, ten forwards and ten input gradients, run as the attack runs them: eagerly,
compiled or as a replayed CUDA graph, in that precision and memory layout. Each row of fastadv names its floor, which for
"auto" says what it chose. Before they are timed, attacks and training steps have run three times: the first call is eager, the
second compiles, records or measures.

Also counted, in the same run: what memory="signs" saves. Epochs of 50,000 images are computed from the time of a step.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fastadv
from fastadv.engine import Plan, graphs
from fastadv.engine.passes import DTYPES, dtype_for
from fastadv.engine.twin import Twin, TwinError

from . import attacks, baselines, memory, models, plots, report, run, timing, training
from .attacks import STEPS, AttackInputs
from .timing import Case, Contender, Ratio, UnavailableError
from .training import TrainingInputs

ENGINES = ("eager", "compile", "graph", "auto")
PRECISIONS = ("fp32", "bf16", "fp16")
TRAINING_PRECISIONS = ("fp32", "bf16")  # fp16 would need a scaled loss
WHAT = ("attack", "pgd-at", "trades", "awp")

PUBLIC = "public code, fp32"
EPOCH = 50_000  # images
GOOD_TO_TRAIN_AT = 64  # images at least: training at less is measured where its batch is asked for


@dataclass(frozen=True)
class Subject:
    """A model with the shape of its images, and the batches to attack it at by default on a CPU and on CUDA."""

    build: Callable[[], nn.Module]
    image: tuple[int, ...]
    eps: float
    cpu: tuple[int, ...]
    cuda: tuple[int, ...]


MODELS = {
    "demo-cnn": Subject(models.demo_cnn, (1, 28, 28), 0.3, (1, 64, 256), (1, 16, 128, 1024)),
    "preact-resnet18": Subject(models.preact_resnet18, (3, 32, 32), 8 / 255, (1, 8, 64), (1, 16, 128, 1024)),
    "wrn-28-10": Subject(lambda: models.wide_resnet(28, 10), (3, 32, 32), 8 / 255, (1, 8), (1, 16, 128, 512)),
    "wrn-34-10": Subject(lambda: models.wide_resnet(34, 10), (3, 32, 32), 8 / 255, (1, 8), (1, 16, 128, 512)),
    "vit-s": Subject(models.vit_small, (3, 32, 32), 8 / 255, (1, 8, 64), (1, 16, 128, 1024)),
    "resnet-50": Subject(models.resnet50, (3, 224, 224), 4 / 255, (1, 8), (1, 16, 128, 256)),
}
BY_DEFAULT = {"cpu": ("demo-cnn", "preact-resnet18"), "cuda": tuple(MODELS)}


def cases(
    names: Sequence[str],
    batches: Sequence[int] | None,
    what: Sequence[str],
    engines: Sequence[str],
    precisions: Sequence[str],
    device: torch.device,
    rounds: int | None = None,
    anyway: bool = False,
) -> list[Case]:
    """``batches``, ``rounds``: None for each model's own. ``anyway``: also precisions that the hardware only emulates."""
    chosen: list[Case] = []
    for name in names:
        for batch in batches or getattr(MODELS[name], device.type):
            for work in what:
                if work != "attack" and batches is None and batch < GOOD_TO_TRAIN_AT:
                    continue
                for precision in precisions:
                    if work == "attack" or precision in TRAINING_PRECISIONS:
                        entrants = _entrants(work, engines, precision, device, anyway)
                        case = _case(name, batch, work, precision, device, entrants)
                        few = 3 if name != "demo-cnn" and device.type == "cpu" else None
                        chosen.append(dataclasses.replace(case, rounds=rounds or few))
    return chosen


def _entrants(
    work: str, engines: Sequence[str], precision: str, device: torch.device, anyway: bool
) -> dict[str, Callable[[Any], Contender]]:
    if not anyway and (reason := _lacking(precision, device)):
        return {"fastadv, any engine": _absent(reason)}
    if work == "attack":
        return attack_entrants(engines, precision, device)
    return training_entrants(work, engines, precision, device)


def _case(
    name: str, batch: int, work: str, precision: str, device: torch.device, entrants: dict[str, Callable[[Any], Contender]]
) -> Case:
    subject, attacked = MODELS[name], work == "attack"
    shape = (batch, *subject.image)

    def inputs(device: torch.device) -> AttackInputs | TrainingInputs:
        given = attacks.inputs(subject.build, shape, subject.eps, device)
        return given if attacked else TrainingInputs(given.network.train(), given.x, given.y)

    at_most, ratios = goals(name, batch, work, precision, device, [e for e in entrants if e.startswith("fastadv")])
    return Case(
        name=f"{f'pgd-{STEPS}' if attacked else f'train {work}'} {name} {'x'.join(map(str, shape))} {precision}",
        inputs=inputs,
        contenders=entrants,
        baseline=PUBLIC,
        judge=attacks.judge if attacked else training.judge,
        limits={"radius/eps": 1.0001} if attacked else {},
        at_most=at_most,
        ratios=ratios,
        images=batch,
        tags={"model": name, "batch": batch, "what": work, "precision": precision},
    )


def goals(
    name: str, batch: int, work: str, precision: str, device: torch.device, ours: Sequence[str]
) -> tuple[dict[str, float], tuple[Ratio, ...]]:
    """What was aimed at: the most seconds a unit by contender, and ratios."""
    case = (name, batch, work, precision)
    if device.type == "cuda":
        plain = [label for label in ours if "twin" not in label and "signs" not in label]
        epochs = {"preact-resnet18": 6.0, "wrn-34-10": 77.0} if work == "pgd-at" and precision == "bf16" else {}
        at_most = dict.fromkeys(plain, epochs[name] * batch / EPOCH) if name in epochs and batch == 128 else {}
        if work == "attack" and name != "demo-cnn":
            return {}, tuple(Ratio(label, at_most=1.02) for label in plain)
        if case == ("preact-resnet18", 128, "pgd-at", "bf16"):
            return at_most, tuple(Ratio(PUBLIC, label, at_least=3.0) for label in plain)
        return at_most, ()
    ratios: list[Ratio] = []
    if case == ("preact-resnet18", 64, "attack", "fp32"):
        ratios.append(Ratio(PUBLIC, "fastadv, auto", at_least=1.7))
    if case == ("preact-resnet18", 64, "attack", "bf16"):
        ratios.append(Ratio(PUBLIC, "fastadv, auto", at_least=3.2))
    if work == "attack" and name == "preact-resnet18" and precision == "fp32":
        ratios.append(Ratio("fastadv, eager", at_most=1.02))
    if work == "attack" and name == "demo-cnn" and precision == "fp32":
        ratios.append(Ratio("fastadv, auto", "fastadv, eager", at_most=1.03))
    return {}, tuple(ratios)


def _lacking(precision: str, device: torch.device) -> str:
    """Why this hardware does not multiply in ``precision``; empty if it does."""
    if precision == "bf16" and dtype_for("auto", device) is None:
        return "this CPU has neither AVX512_BF16 nor AMX" if device.type == "cpu" else "this GPU has no bf16"
    if precision == "fp16" and device.type == "cpu":
        with contextlib.suppress(OSError):
            flags = Path("/proc/cpuinfo").read_text().split()
            if "avx512_fp16" in flags or "amx_fp16" in flags:
                return ""
        return "this CPU has neither AVX512_FP16 nor AMX_FP16"
    return ""


def _absent(reason: str) -> Callable[[Any], Contender]:
    def build(given: Any) -> Contender:
        raise UnavailableError(reason)

    return build


def _autocast(precision: str, device: torch.device, cache: bool = True) -> contextlib.AbstractContextManager[Any]:
    dtype = DTYPES.get(precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=cache)


# ------------------------------------------------------------------------------------------------------------ attacks


def attack_entrants(
    engines: Sequence[str], precision: str, device: torch.device
) -> dict[str, Callable[[AttackInputs], Contender]]:
    replays = graphs.available(device)
    plans = [Plan(channels_last=layout) for layout in (False, True)]
    if replays and {"graph", "auto"} & set(engines):
        plans += [plan._replace(replayed=True) for plan in plans]
    if {"compile", "auto"} & set(engines):
        plans.append(Plan(compiled=True, replayed=replays, channels_last=True))
    entrants: dict[str, Callable[[AttackInputs], Contender]] = {
        PUBLIC: lambda given: _handwritten(given, baselines.pgd_backward, "fp32"),
        "handwritten, best": lambda given: _handwritten(given, baselines.pgd_best, precision),
        **{_bare(plan): _bare_passes(plan, precision) for plan in plans},
        **{f"fastadv, {engine}": _fastadv(engine, precision) for engine in engines if engine != "graph" or replays},
    }
    steady = "graph" if replays and "graph" in engines else "eager"
    entrants[f"fastadv, {steady}, signs"] = _fastadv(steady, precision, memory="signs")
    if precision != "fp16":
        twins = Plan(replayed=steady == "graph", channels_last=True)
        entrants[_bare(twins, twin=True)] = _bare_passes(twins, precision, twin=True)
        entrants[f"fastadv, {steady}, twin"] = _fastadv(steady, precision, twin=True)
    if "graph" in engines and not replays:
        entrants["fastadv, graph"] = _absent("CUDA graphs need a CUDA device")
    return entrants


def _handwritten(given: AttackInputs, pgd: Callable[..., Tensor], precision: str) -> Contender:
    model = given.model()

    def attack() -> Tensor:
        with _autocast(precision, given.x.device):
            return pgd(model, given.x, given.y, given.eps, given.alpha, STEPS)

    return Contender(attack)


def _fastadv(engine: str, precision: str, **options: Any) -> Callable[[AttackInputs], Contender]:
    def build(given: AttackInputs) -> Contender:
        attack = fastadv.PGD(given.model(), given.eps, given.alpha, STEPS, engine=engine, precision=precision, **options)
        attack(given.x, given.y)
        twin = bool(options.get("twin"))
        if twin and attack.stats.twin != "used":
            raise UnavailableError(f"twin: {attack.stats.twin}")
        # The plans of all calls are in the order of their first use: the last one is in use.
        return Contender(lambda: attack(given.x, given.y), floor=lambda: _bare(list(attack.stats.steps)[-1], twin))

    return build


def _bare(plan: Plan | str, twin: bool = False) -> str:
    return f"bare{' twin' * twin}, {plan}"


def _bare_passes(plan: Plan, precision: str, twin: bool = False) -> Callable[[AttackInputs], Contender]:
    """Forward passes and input gradients and nothing else, run by a plan as an attack's steps are."""

    def build(given: AttackInputs) -> Contender:
        network, device = given.model().requires_grad_(False), given.x.device
        if twin:
            try:
                network = Twin(network, DTYPES.get(precision)).module
            except TwinError as reason:
                raise UnavailableError(f"twin: none: {reason}") from reason
        layout = torch.channels_last if plan.channels_last else torch.contiguous_format
        x = given.x.clone(memory_format=layout).requires_grad_()

        def forward(x: Tensor) -> Tensor:
            with _autocast(precision, device, cache=False):
                return network(x)

        def gradient(x: Tensor, cotangent: Tensor) -> Tensor:  # torch.compile does not see through torch.autograd.grad
            return torch.func.vjp(forward, x)[1](cotangent)[0]

        cotangent = torch.randn_like(forward(x)).detach()
        if plan.compiled:
            compiled, images = torch.compile(gradient, dynamic=False, fullgraph=True), x.detach()

            def one() -> None:
                with torch.no_grad():
                    compiled(images, cotangent)
        else:

            def one() -> None:
                torch.autograd.grad(forward(x), x, cotangent)

        one()
        passes = graphs.record(one, device) if plan.replayed else one

        def all_passes() -> None:
            for _ in range(STEPS):
                passes()

        return Contender(all_passes, yardstick=True)

    return build


# ----------------------------------------------------------------------------------------------------------- training


def training_entrants(
    method: str, engines: Sequence[str], precision: str, device: torch.device
) -> dict[str, Callable[[TrainingInputs], Contender]]:
    """fastadv attacks by the engines that a training loop would choose; forward and backward are as the user's code."""
    replays = graphs.available(device)
    used = [engine for engine in engines if engine in ("eager", "auto") or (engine == "graph" and replays)]
    entrants = {PUBLIC: training.contender(training.PUBLIC[method])}
    if precision == "fp32" and method in training.BEST:
        entrants["handwritten, best"] = training.contender(training.BEST[method])
    for engine in used:
        entrants[f"fastadv, {engine}"] = training.contender(_training_step(method, engine, precision))
    if replays and used:  # as users of tensor cores lay out their models
        step = _training_step(method, used[-1], precision)
        entrants[f"fastadv, {used[-1]}, channels_last"] = training.contender(step, torch.channels_last)
    return {name: _after_a_step(build) for name, build in entrants.items()}


def _after_a_step(build: Callable[[TrainingInputs], Contender]) -> Callable[[TrainingInputs], Contender]:
    def built(given: TrainingInputs) -> Contender:
        contender = build(given)
        contender.run()
        return contender

    return built


def _training_step(method: str, engine: str, precision: str) -> Callable[[nn.Module, torch.optim.Optimizer], training.Step]:
    def build(model: nn.Module, optimizer: torch.optim.Optimizer) -> training.Step:
        settings = {"eps": training.EPS, "alpha": training.ALPHA, "engine": engine, "precision": precision}
        objective: fastadv.Objective
        if method == "trades":
            objective = fastadv.TRADES(fastadv.TRADES.paper_attack(model, **settings), training.BETA)
        else:
            objective = fastadv.PGDAT(fastadv.PGDAT.paper_attack(model, **settings))
        awp = fastadv.AWP(model, training.GAMMA) if method == "awp" else None

        def step(x: Tensor, y: Tensor) -> Tensor:
            def loss() -> Tensor:
                with _autocast(precision, x.device):
                    return objective.loss(model, x, y, x_adv)

            x_adv = objective.adversarial(model, x, y)
            with contextlib.nullcontext() if awp is None else awp.perturb(loss):
                value = loss()
                optimizer.zero_grad()
                value.backward()
            optimizer.step()
            return value.detach()

        return step

    return build


# ------------------------------------------------------------------------------------------------------------- memory


def saved_memory(names: Sequence[str], device: torch.device, batch: int = 2) -> list[dict[str, Any]]:
    """What an attack's forward pass on each model keeps for its backward pass, in fp32."""
    rows = []
    for name in names:
        given = attacks.inputs(MODELS[name].build, (batch, *MODELS[name].image), MODELS[name].eps, device)
        rows.append({"model": name} | memory.saved_images(given.network, given.x))
    return rows


def memory_table(rows: list[dict[str, Any]]) -> str:
    headers = ("saved for the backward pass, fp32", "MiB an image", 'with memory="signs"', "times less")
    fits = ("images in 80 GB, computed", "with signs")
    cells = [
        [
            row["model"],
            *(f"{row[m]['MiB an image']:.3g}" for m in memory.KINDS),
            f"{row['normal']['MiB an image'] / row['signs']['MiB an image']:.2f}",
            *(row[m]["images in 80 GB"] for m in memory.KINDS),
        ]
        for row in rows
    ]
    return tabulate(cells, [*headers, *fits], tablefmt="simple", disable_numparse=True)


# --------------------------------------------------------------------------------------------------------------- main


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="demo-cnn alone, small, without torch.compile: does it run, not how fast is it")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--threads", type=int, default=1)
    add("--rounds", type=int, help="of each case at least; default: 5, but 3 of large models on a CPU, which take minutes")
    add("--models", nargs="+", choices=tuple(MODELS), help="default: demo-cnn and preact-resnet18; on CUDA all")
    add("--batches", nargs="+", type=int, help="default: each model's own; training only at 64 and more")
    add("--what", nargs="+", choices=WHAT, default=WHAT)
    add("--engines", nargs="+", choices=ENGINES, help="default: all; compile and auto take a minute or more a case")
    add("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    add("--all", action="store_true", help="also in precisions that this CPU only emulates")
    add("--json", type=Path, metavar="FILE", help="write the results there, after each case")
    add("--plots", type=Path, metavar="FILE.png", help="images a second by batch size; also: python -m benchmarks.plots")
    add("--limit-seconds", type=float, metavar="S", help="stop then, and show what was finished")
    add("--clock", choices=("wall", "cpu"), default="wall", help="which one medians and ratios are of")
    given = parser.parse_args(arguments)
    if given.plots is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib")
    device, quick = given.device, given.quick
    names = given.models or (("demo-cnn",) if quick else BY_DEFAULT[device.type])
    batches = given.batches or ((2, 8) if quick else None)
    engines = given.engines or (("eager", "graph") if quick else ENGINES)

    torch.set_num_threads(given.threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    plan = timing.plan_for(device, quick)
    if given.rounds:
        plan = dataclasses.replace(plan, rounds=(given.rounds, max(given.rounds, plan.rounds[1])))
    chosen = cases(names, batches, given.what, engines, given.precisions, device, given.rounds, given.all)
    content: dict[str, Any] = {"environment": report.environment(device, given.threads), "quick": quick, "clock": given.clock}
    content["memory"] = saved_memory(names, device)
    with _choices_of_its_own():
        finished = run.run(chosen, content, plan, device, given.clock, given.json, given.limit_seconds, _with_epoch)

    print("\n".join(f"{name}: {value}" for name, value in content["environment"].items()), end="\n\n")
    print(report.table(content["cases"], given.clock), memory_table(content["memory"]), sep="\n\n")
    print(f"\nmedian and quartiles by {given.clock} clock; '/ x' is the time over that of x: above 1 is slower than x.")
    for text, met in report.verdicts(content["cases"]):
        print({True: "met    ", False: "MISSED ", None: "-      "}[met], text)
    if given.plots is not None:
        plots.draw([content], given.plots)
    return 0 if finished else 1


def _with_epoch(record: run.Record) -> None:
    if record["what"] != "attack":
        for row in record["contenders"]:
            if "images/s" in row:
                row["facts"]["computed epoch, s"] = EPOCH / row["images/s"]


@contextlib.contextmanager
def _choices_of_its_own() -> Iterator[None]:
    """Unless told where choices are kept, "auto" makes them in this run, and leaves none behind."""
    if "FASTADV_CACHE" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTADV_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["FASTADV_CACHE"]


if __name__ == "__main__":
    sys.exit(main())
