"""fastadv.profile: time goes to the row that took it, the rows share out the call, and nothing else is changed."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import threading
import time
from collections import Counter

import pytest
import torch
from models import FailsAt, batch, cnn, linear, one_thread, state, surroundings  # noqa: F401 - one_thread is a fixture
from torch import nn

import fastadv
from fastadv import profiling
from fastadv.engine import graphs, passes

FORWARD, BACKWARD, REST = "model forward", "model backward", "everything else"
NAP = 0.004
CALLS = profiling.WARM_UP + profiling.CALLS + 1


class Nap(torch.autograd.Function):
    """Takes its time on the way there or on the way back."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        time.sleep(there)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.back)
        return gradient, None, None


class Napping(nn.Module):
    def __init__(self, there: float, back: float) -> None:
        super().__init__()
        self.net, self.there, self.back = linear(), there, back

    def forward(self, x):
        return self.net(Nap.apply(x, self.there, self.back))


def napping_loss(logits, y):
    time.sleep(NAP)
    return nn.functional.cross_entropy(logits, y, reduction="none")


@pytest.mark.parametrize(
    ("row", "model", "loss"),
    [
        (FORWARD, Napping(NAP, 0), "ce"),
        (BACKWARD, Napping(0, NAP), "ce"),
        (REST, Napping(0, 0), napping_loss),
    ],
    ids=["forward", "backward", "rest"],
)
def test_time_is_in_the_row_that_takes_it(row, model, loss):
    profile = fastadv.profile(fastadv.PGD(model, 8 / 255, steps=3, loss=loss), *batch())
    assert list(profile.seconds) == [FORWARD, BACKWARD, REST]
    assert profile.seconds[row] >= 3 * NAP
    assert profile.seconds[row] > 0.6 * profile.total
    assert profile.overhead == profile.seconds[REST] / profile.total
    assert profile.steps == 3


def test_passes_without_a_gradient_are_forward_too():
    """The clean reference of "kl", and the last image of keep_best: three forward passes for one step."""
    attack = fastadv.PGD(Napping(NAP, 0), 8 / 255, steps=1, loss="kl", keep_best=True)
    profile = fastadv.profile(attack, batch()[0])
    assert attack.info.forwards == 3
    assert profile.seconds[FORWARD] >= 3 * NAP
    assert profile.seconds[REST] < 2 * NAP


VARIANTS = {
    "plain": {},
    "keep_best": {"keep_best": True},
    "early_stop": {"early_stop": True, "eps": 0.5},
    "restarts": {"restarts": 2},
    "bf16": {"precision": "bf16", "keep_best": True},
    "fp16": {"precision": "fp16"},
    "bn batch": {"bn": "batch"},
    "bn train": {"bn": "train"},
    "l2": {"norm": "l2"},
    "l1": {"norm": "l1"},
    "kl": {"loss": "kl", "init": "normal"},
    "signs": {"memory": "signs"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_share_out_the_call_and_the_trace_has_them(variant, tmp_path):
    attack = fastadv.PGD(cnn(), **{"eps": 0.01, "steps": 3, **VARIANTS[variant]})
    profile = fastadv.profile(attack, *batch())
    assert list(profile.seconds) == [FORWARD, BACKWARD, REST]
    assert all(seconds > 0 for seconds in profile.seconds.values())
    assert profile.total == sum(profile.seconds.values())
    shares = [float(line.split("%")[0].split()[-1]) for line in profile.table.splitlines()[2:]]
    assert sum(shares[:-1]) == pytest.approx(shares[-1], abs=0.2)
    assert shares[-1] == 100

    assert profile.save_trace(tmp_path / "new" / "trace.json") == tmp_path / "new" / "trace.json"
    events = json.loads((tmp_path / "new" / "trace.json").read_text())["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    (total,) = (event for event in ranges if event["name"] == "total")
    assert all(total["ts"] <= e["ts"] and e["ts"] + e["dur"] <= total["ts"] + total["dur"] for e in ranges)
    found = Counter(event["name"] for event in ranges)
    assert found[FORWARD] == attack.info.forwards  # of the last call, which was traced
    assert 1 <= found[BACKWARD] <= attack.restarts * attack.steps
    assert set(found) == {FORWARD, BACKWARD, "total"}
    assert any(event["name"].startswith("aten::") for event in events), "no operators under the ranges"


def test_each_row_is_its_median_over_the_calls_and_torchs_profiler_is_not_in_it():
    model, seen = Napping(0, 0), []
    naps = iter([0, 0, 0, 0.002, 0.1, 0.002, 0.1, 0.1])  # two calls to warm up, five to measure, one for the trace

    def nap_and_see(*_):
        seen.append(torch._C._autograd._profiler_enabled())
        time.sleep(next(naps))

    model.register_forward_pre_hook(nap_and_see)
    profile = fastadv.profile(fastadv.PGD(model, 8 / 255, steps=1), *batch())
    assert 0.002 <= profile.seconds[FORWARD] < 0.1
    assert seen == [False] * (CALLS - 1) + [True]


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_is_as_after_as_many_ordinary_calls(variant):
    x, y = batch()
    outcomes = []
    for profiled in (True, False):
        attack = fastadv.PGD(cnn(), **{"eps": 0.01, "steps": 2, **VARIANTS[variant]})
        torch.manual_seed(1)
        before = state(attack.model)
        if profiled:
            fastadv.profile(attack, x, y)
        else:
            for _ in range(CALLS):
                attack(x, y)
        assert passes.listener is None
        if attack.bn != "train":
            assert state(attack.model) == before
        settings = {name: value for name, value in vars(attack).items() if name not in ("model", "_engine", "info")}
        weights = [t.tolist() for t in attack.model.state_dict().values()]
        info = [v.tolist() if isinstance(v, torch.Tensor) else v for v in vars(attack.info).values()]
        outcomes.append((settings, weights, info, copy.deepcopy(attack.stats), surroundings(), attack(x, y).tolist()))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("call", [0, profiling.WARM_UP + 1, CALLS - 1], ids=["warm-up", "measured", "traced"])
def test_an_exception_leaves_nobody_listening(call):
    attack = fastadv.PGD(FailsAt(linear(), call), 8 / 255, steps=1)
    with pytest.raises(RuntimeError, match="as the test asked"):
        fastadv.profile(attack, *batch())
    assert passes.listener is None
    assert not torch._C._autograd._profiler_enabled()
    fastadv.profile(attack, *batch())  # and the next may


def test_a_compiled_attack_has_one_row_for_the_model(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    both = "model forward and backward, compiled"
    profile = fastadv.profile(fastadv.PGD(linear(), 8 / 255, steps=2, engine="compile"), *batch())
    assert list(profile.seconds) == [both, REST]
    assert profile.overhead == profile.seconds[REST] / profile.total
    assert "loss" not in profile.table, "it is in the compiled row"
    assert "compile, channels_last" in profile.table.splitlines()[0]

    attack = fastadv.PGD(linear(), 8 / 255, steps=2, engine="compile", keep_best=True, precision="bf16")
    last_look = "model forward, compiled"
    assert set(fastadv.profile(attack, *batch()).seconds) == {both, last_look, FORWARD, REST}


def test_a_replayed_step_has_one_row(monkeypatch):
    """With a recording that only takes time, as there is no GPU."""

    class Recording:
        def replay(self):
            time.sleep(NAP)

    monkeypatch.setattr(graphs, "available", lambda device: True)
    monkeypatch.setattr(graphs, "_pool", lambda place: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    profile = fastadv.profile(fastadv.PGD(linear(), 8 / 255, steps=3, engine="graph"), *batch())
    assert list(profile.seconds) == ["replayed step", REST]
    assert profile.seconds["replayed step"] >= 3 * NAP
    assert profile.overhead is None


def test_the_table():
    seconds = {FORWARD: 0.006, BACKWARD: 0.0128, REST: 0.0012}
    profile = fastadv.Profile("PGD of 10 steps", seconds, steps=10, trace="")
    assert str(profile) == profile.table
    assert profile.overhead == pytest.approx(0.06)
    assert profile.table.splitlines() == [
        "PGD of 10 steps",
        "                                        ms/call   share    ms/step",
        "model forward                             6.000   30.0%     0.6000",
        "model backward                           12.800   64.0%     1.2800",
        "everything else (loss, step, checks)      1.200    6.0%     0.1200",
        "total                                    20.000  100.0%     2.0000",
    ]
    first = str(fastadv.profile(fastadv.PGD(linear(), 8 / 255, steps=2), *batch())).splitlines()[0]
    assert first == "PGD of 2 steps on 6x3x8x8 float32 on cpu: eager, fp32"


def test_bad_input():
    x, y = batch()
    with pytest.raises(ValueError, match=r"attack must be a fastadv\.PGD; got Linear"):
        fastadv.profile(nn.Linear(2, 2), x, y)
    with pytest.raises(ValueError, match=r"attack must be a fastadv\.PGD; got function"):
        fastadv.profile(fastadv.pgd, x, y)
    attack = fastadv.PGD(linear(), 8 / 255)
    with pytest.raises(ValueError, match=r"x must hold an image.*\[0, 3, 8, 8\]"):
        fastadv.profile(attack, x[:0], y[:0])
    with pytest.raises(ValueError, match="x must lie in bounds"):
        fastadv.profile(attack, x + 1, y)
    with pytest.raises(ValueError, match="y is needed"):
        fastadv.profile(attack, x)
    assert passes.listener is None


def test_one_at_a_time():
    x, y = batch()
    inner = fastadv.PGD(linear(), 8 / 255, steps=1)

    def profiling_loss(logits, y):
        fastadv.profile(inner, x, y)

    with pytest.raises(RuntimeError, match="already running"):
        fastadv.profile(fastadv.PGD(linear(), 8 / 255, loss=profiling_loss), x, y)
    with torch.profiler.profile(), pytest.raises(RuntimeError, match=r"torch\.profiler"):
        fastadv.profile(inner, x, y)
    fastadv.profile(inner, x, y)


def test_attacks_inside_the_model_and_in_other_threads_take_no_row_of_this_one():
    x, y = batch()
    watch = profiling._Stopwatch(x.device)
    with profiling._listening(watch):
        with passes.mark(FORWARD):
            with passes.mark(BACKWARD):  # of a defence that attacks, say
                time.sleep(NAP)
            time.sleep(2 * NAP)
        other = threading.Thread(target=fastadv.PGD(Napping(NAP, NAP), 8 / 255, steps=1), args=(x, y))
        other.start()
        other.join()
    assert len(watch.changes) == 5
    seconds = watch.seconds()
    assert seconds[BACKWARD] >= NAP
    assert seconds[FORWARD] >= 2 * NAP
    assert seconds[REST] >= 2 * NAP


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_on_a_gpu_rows_are_times_of_its_stream(engine):
    class Busy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear()

        def forward(self, x):
            torch.cuda._sleep(10_000_000)  # cycles: some milliseconds, of which the host sees nothing
            return self.net(x)

    x, y = (t.cuda() for t in batch())
    profile = fastadv.profile(fastadv.PGD(Busy().cuda(), 8 / 255, steps=3, engine=engine), x, y)
    row = FORWARD if engine == "eager" else "replayed step"
    assert profile.seconds[row] > 0.003
    assert profile.seconds[row] > 0.5 * profile.total
    annotations = [e for e in json.loads(profile.trace)["traceEvents"] if e.get("cat") == "gpu_user_annotation"]
    assert row in {event["name"] for event in annotations}
