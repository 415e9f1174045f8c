"""The one home of measurement: what a case is, and how its contenders are timed against each other.

All contenders of a case run in one process on the same inputs, interleaved: every round times each of them once, in rotating
order. A machine that slows down for a minute then slows all of them, and ratios are taken within a round. Compilers, caches
and allocators are warm before the first round, the garbage collector is off, and no input is all zeros.

Both clocks are kept: wall time, and the CPU time of this process, which neighbours on a shared machine disturb less (with
one thread the two agree on a quiet machine). On a CUDA device each block ends with a synchronisation, and a third clock is kept
of cases that count bytes: what a burst takes the device alone, replayed as a CUDA graph. Where wall time is longer, Python was
slower than the kernels.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

CLOCKS = ("wall", "cpu", "gpu")


class UnavailableError(Exception):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case."""

    run: Callable[[], Any]  # one unit of work; returns its result
    prepare: Callable[[], Any] | None = None  # not timed: puts back what runs modify
    yardstick: bool = False  # does not do the work: a bound to compare with, as a plain copy
    setting: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext  # not timed: entered around runs
    floor: Callable[[], str] | None = None  # once it has run: the name of the yardstick that it cannot be faster than


@dataclass(frozen=True)
class Ratio:
    """A goal: what one contender's time over another's, or over its own floor's, has to be."""

    of: str
    over: str = ""
    at_most: float | None = None
    at_least: float | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """A piece of work and who competes in it. Nothing is built before it is measured."""

    name: str
    inputs: Callable[[torch.device], Any]
    contenders: dict[str, Callable[[Any], Contender]]  # from the inputs; raises UnavailableError
    baseline: str
    burst: int = 1  # units between two calls of prepare
    waits: bool = True  # False: the clock stops when the host is done and the device may still be computing
    rounds: int | None = None  # of a case that takes minutes: at least so many, in place of the plan's
    bytes: int | None = None  # what one unit has to move at the least
    bytes_of: dict[str, int] = field(default_factory=dict)  # the same, of contenders that do something else
    judge: Callable[[Any, Any], dict[str, float]] | None = None  # (inputs, result) -> what to know about the result
    limits: dict[str, float] = field(default_factory=dict)  # of what the judge says: beyond, the result is wrong
    goals: dict[str, float] = field(default_factory=dict)  # by contender: the least time over fastadv's
    at_most: dict[str, float] = field(default_factory=dict)  # by contender: the most seconds a unit
    ratios: tuple[Ratio, ...] = ()
    images: int | None = None  # that one unit works through
    tags: dict[str, Any] = field(default_factory=dict)  # for whoever reads the record


@dataclass(frozen=True)
class Plan:
    """How long to measure. Times in seconds."""

    block: float  # what is timed in one go lasts at least this long
    budget: float  # for all rounds of a case
    rounds: tuple[int, int]  # at least, at most


FULL = Plan(block=0.02, budget=20.0, rounds=(5, 51))
GPU = Plan(block=0.01, budget=3.0, rounds=(5, 51))
QUICK = Plan(block=0.001, budget=0.3, rounds=(1, 5))


def plan_for(device: torch.device, quick: bool) -> Plan:
    return QUICK if quick else GPU if device.type == "cuda" else FULL


@dataclass
class Samples:
    """Seconds a unit, one for each round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)  # empty where there is none or the contender cannot be captured

    def quartiles(self, clock: str) -> tuple[float, float, float]:
        values = getattr(self, clock)
        first, median, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return first, median, third

    def over(self, other: Samples, clock: str) -> float:
        """How many times longer than ``other`` this took: the median over rounds of the ratio within a round."""
        return statistics.median(a / b for a, b in zip(getattr(self, clock), getattr(other, clock), strict=True))


@dataclass(frozen=True)
class Result:
    """A contender's times and what the judge said, or why there are none."""

    samples: Samples | None = None
    facts: dict[str, float] = field(default_factory=dict)
    yardstick: bool = False
    floor: str = ""
    absent: str = ""


class Block:
    """What is timed in one go: ``repeats`` times an untimed prepare and ``units`` timed runs."""

    def __init__(self, contender: Contender, case: Case, plan: Plan, device: torch.device) -> None:
        self.contender, self.case, self.device = contender, case, device
        self.units, self.repeats = case.burst, 1
        self.seconds = sum(self.time()[:1]) * self.units
        # Until it lasts long enough, more of it: longer bursts where nothing has to be put back, else more bursts. Bursts
        # that are not waited for stay short: the device's queue would fill, and the host wait after all.
        while self.seconds < plan.block:
            factor = min(100, max(2, round(1.2 * plan.block / self.seconds)))
            if contender.prepare is None and case.waits:
                self.units *= factor
            else:
                self.repeats *= factor
            self.seconds = self.time()[0] * self.units * self.repeats
        self.replays = 1
        self.graph = _capture(contender, case.burst) if device.type == "cuda" and case.bytes is not None else None
        if self.graph is not None:
            self.replays = max(1, round(plan.block / (self.replay() * case.burst)))

    def burst(self) -> None:
        run = self.contender.run
        for _ in range(self.units):
            run()

    def time(self) -> tuple[float, float]:
        """Wall and CPU seconds a unit."""
        wall = cpu = 0.0
        with self.contender.setting():
            for _ in range(self.repeats):
                if self.contender.prepare is not None:
                    self.contender.prepare()
                _synchronize(self.device)
                cpu_start, wall_start = time.process_time(), time.perf_counter()
                self.burst()
                if self.case.waits:
                    _synchronize(self.device)
                wall += time.perf_counter() - wall_start
                cpu += time.process_time() - cpu_start
        units = self.units * self.repeats
        return wall / units, cpu / units

    def replay(self) -> float:
        """Seconds a unit takes the device alone."""
        assert self.graph is not None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        milliseconds = 0.0
        for _ in range(self.replays):
            if self.contender.prepare is not None:
                self.contender.prepare()
            torch.cuda._sleep(HEAD_START)
            start.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            milliseconds += start.elapsed_time(end)
        return milliseconds / 1e3 / (self.case.burst * self.replays)


HEAD_START = 2_000_000  # cycles, about a millisecond, that the device sleeps while the host launches a graph


def _capture(contender: Contender, units: int) -> torch.cuda.CUDAGraph | None:
    """A burst of a contender, which has run before, as a graph; None where it does what cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with contender.setting():
            if contender.prepare is not None:
                contender.prepare()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                for _ in range(units):
                    contender.run()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        return None
    return graph


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One of ``calls`` after the other: on enough different tensors that none is found in a cache.

    Each result lives until its call comes round again, so that new outputs do not land in the same warm memory either.
    """
    if len(calls) == 1:
        return calls[0]
    results: list[Any] = [None] * len(calls)
    turn = itertools.cycle(range(len(calls)))

    def run() -> Any:
        i = next(turn)
        results[i] = calls[i]()
        return results[i]

    return run


def measure(case: Case, plan: Plan, device: torch.device) -> dict[str, Result]:
    """Times all contenders of a case. One that is missing or fails takes no part and says why."""
    torch.compiler.reset()  # else functions compiled for other cases' shapes count towards this one's recompilations
    if device.type == "cuda":
        gc.collect()  # what the last case left
        torch.cuda.empty_cache()
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):  # graphs are not captured on the default one
            return _measure(case, plan, device)
    return _measure(case, plan, device)


def _measure(case: Case, plan: Plan, device: torch.device) -> dict[str, Result]:
    inputs = case.inputs(device)
    blocks: dict[str, Block] = {}
    results: dict[str, Result] = {}
    for name, build in case.contenders.items():
        try:
            contender = build(inputs)
            facts = first_run(case, inputs, contender)
            blocks[name] = Block(contender, case, plan, device)
        except UnavailableError as reason:
            results[name] = Result(absent=str(reason))
        except Exception as error:  # a peer's bug must not take the other numbers with it
            results[name] = Result(absent=f"failed: {type(error).__name__}: {error}".splitlines()[0])
        else:
            floor = contender.floor() if contender.floor is not None else ""
            results[name] = Result(Samples(), facts, contender.yardstick, floor)
    least, most = plan.rounds
    least = least if case.rounds is None else min(least, case.rounds)
    clocks = 2 if any(block.graph is not None for block in blocks.values()) else 1
    rounds = min(most, max(least, int(plan.budget / max(1e-9, clocks * sum(b.seconds for b in blocks.values())))))
    names = list(blocks)
    if device.type == "cuda":
        for block in blocks.values():  # each capture handed the allocator's memory back
            block.time()
    with _no_garbage_collection():
        for i in range(rounds if names else 0):
            turn = i % len(names)
            for name in names[turn:] + names[:turn]:
                samples, block = results[name].samples, blocks[name]
                assert samples is not None
                wall, cpu = block.time()
                samples.wall.append(wall)
                samples.cpu.append(cpu)
                if block.graph is not None:
                    samples.gpu.append(block.replay())
    return results


def first_run(case: Case, inputs: Any, contender: Contender) -> dict[str, float]:
    """The first run, which compiles what is compiled lazily, also shows that the contender computes the right thing."""
    with contender.setting():
        if contender.prepare is not None:
            contender.prepare()
        result = contender.run()
    if case.judge is None or contender.yardstick:
        return {}
    facts = case.judge(inputs, result)
    for name, limit in case.limits.items():
        if not facts[name] <= limit:
            raise ArithmeticError(f"wrong result, so not timed: {name} is {facts[name]:.3g}")
    return facts


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
