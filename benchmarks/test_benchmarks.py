"""The same cases through pytest-benchmark: ``pytest benchmarks --benchmark-only`` (FASTADV_BENCH_QUICK=1: small and short).

pytest-benchmark times one contender after the other, so a change in the machine's mood lands in the ratios. Use it to follow
one contender over commits (``--benchmark-autosave``, ``--benchmark-compare``), and ``python -m benchmarks`` to compare.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from . import attacks, ops, timing, training, weights

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

QUICK = os.environ.get("FASTADV_BENCH_QUICK") == "1"
DEVICE = torch.device("cpu")
PLAN = timing.plan_for(DEVICE, QUICK)
CASES = ops.cases(QUICK, DEVICE) + weights.cases(QUICK, DEVICE) + attacks.cases(QUICK) + training.cases(QUICK)
PAIRS = [pytest.param(c, name, id=f"{c.name}-{name}") for c in CASES for name in c.contenders]


@functools.lru_cache(maxsize=1)  # parameters come case by case, and one case's tensors can fill the memory
def _inputs(case: timing.Case) -> Any:
    torch.compiler.reset()
    return case.inputs(DEVICE)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_speed(benchmark: Any, case: timing.Case, name: str) -> None:
    try:
        contender = case.contenders[name](_inputs(case))
    except timing.UnavailableError as reason:
        pytest.skip(str(reason))
    block = timing.Block(contender, case, PLAN, DEVICE)
    benchmark.group = f"{case.name}, {case.burst} in a row" if case.burst > 1 else case.name

    def burst() -> None:
        for _ in range(case.burst):
            contender.run()

    def prepare() -> None:
        contender.prepare()  # and drop what it returns: pytest-benchmark would take it for arguments

    benchmark.pedantic(
        burst,
        setup=prepare if contender.prepare is not None else None,
        iterations=block.units // case.burst,  # 1 where there is something to prepare
        rounds=max(PLAN.rounds[0], block.repeats),
        warmup_rounds=1,
    )


@pytest.mark.parametrize("case", ops.cases(True, torch.device("cuda")), ids=lambda case: case.name)
def test_the_cases_of_a_gpu_are_sound(case: timing.Case) -> None:
    """Run here on the CPU, but for Triton and torch.compile: each contender computes the right thing, by its first run."""
    given = case.inputs(DEVICE)
    for name, build in case.contenders.items():
        if "triton" not in name and not name.startswith("compiled"):
            timing.first_run(case, given, build(given))
