"""How attacks are executed: whatever the engine, the same attack, and a model left as it was found.

CUDA graphs are tested here with the recording replaced by one that runs the step again on the tensors it was recorded with,
which is what a replay does; tests/test_gpu.py replays real ones.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import pickle
import weakref
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import (
    SYNCS,
    FailsAt,
    Ops,
    batch,
    cnn,
    count_calls,
    digits,
    linear,
    one_thread,  # noqa: F401
    seed,
    state,
    surroundings,
    trained_lenet,
)
from torch import nn
from ways import aot

import fastadv
from fastadv.engine import choices, engine, graphs

# ------------------------------------------------------------------------------- the contracts of an attack, by engine

OPTIONS = {
    "plain": {},
    "l2": {"norm": "l2", "eps": 0.5},
    "l1": {"norm": "l1", "eps": 5.0},
    "best": {"keep_best": True, "restarts": 2},
    "early": {"early_stop": True},
    "kl": {"loss": "kl", "init": "normal"},
    "targeted": {"targeted": True, "loss": "dlr"},
    "eps each": {"eps": torch.linspace(0.01, 0.06, 6), "alpha": torch.linspace(0.005, 0.01, 6)},
    "bn batch": {"bn": "batch"},
}


def attack_by(way, net, **options):
    return fastadv.PGD(net, **{"eps": 0.03, "steps": 3, "generator": seed(), **options, **way})


@pytest.mark.parametrize("options", OPTIONS)
def test_every_call_is_the_eager_attack(way, options):
    """The first is eager, the second sets up, the third and fourth reuse; another batch in between, of another size too."""
    options = OPTIONS[options]
    if "twin" in way and options.get("bn"):
        with pytest.raises(ValueError, match="twin"):
            attack_by(way, cnn(), **options)
        return
    if options.get("norm") == "l1" and "precision" in way:
        pytest.skip("which few elements an l1 step moves is decided by the last bits")
    net = cnn(dropout=0.0)
    x, y = batch()
    other_x, other_y = batch(4)
    ours, theirs = attack_by(way, net, **options), attack_by({}, net, **options)
    exact = not {"twin", "precision"} & way.keys() and way.get("engine") not in ("compile", "auto")
    for i, (images, labels) in enumerate([(x, y), (x, y), (other_x, other_y), (x.flip(0), y.flip(0)), (x, y), (x, y)]):
        if isinstance(options.get("eps"), torch.Tensor) and len(images) != 6:
            continue
        adv, expected = ours(images, labels), theirs(images, labels)
        assert adv.dtype == images.dtype
        assert adv.stride() == images.stride()
        assert not adv.requires_grad
        assert adv.data_ptr() != images.data_ptr()
        if exact:
            assert torch.equal(adv, expected), i
        elif "precision" not in way:
            assert ((adv - expected).abs() > 1e-5).double().mean() < 0.02, i
        elif options.get("loss") != "kl":  # whose first gradient, next to the clean image, is smaller than bf16 resolves
            moves = [(images_ - images).flatten() for images_ in (adv, expected)]
            assert F.cosine_similarity(*moves, dim=0) > 0.7, i
        if expected_success := theirs.info.success is not None:
            assert expected_success
            agreed = ours.info.success == theirs.info.success
            assert agreed.all() if "precision" not in way else agreed.double().mean() > 0.6
            success = net.eval()(adv).argmax(1) == labels if options.get("targeted") else net.eval()(adv).argmax(1) != labels
            assert torch.equal(ours.info.success, success)  # re-scored by the model itself


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("bn", ["eval", "batch"])
def test_nothing_is_disturbed(way, bn, mode):
    if "twin" in way and bn != "eval":
        return
    net = getattr(cnn(), mode)()
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    attack = attack_by(way, net, bn=bn)
    before, x_before, around = state(net), x.clone(), surroundings()
    for _ in range(3):
        attack(x, y)
        assert state(net) == before
        if mode == "eval":  # else dropout draws
            assert surroundings() == around
    assert torch.equal(x, x_before)


@pytest.mark.parametrize(
    ("k", "error"), [*((k, RuntimeError) for k in (0, 1, 4, 6, 7)), (1, KeyboardInterrupt), (6, KeyboardInterrupt)]
)
def test_nothing_is_disturbed_by_an_exception(way, k, error):
    """Nor by Ctrl-C: in the eager call, in setting up a plan, in a step by it."""
    if way.get("engine") == "compile":
        pytest.skip("whose passes call no forward in Python")
    if way.get("engine") == "auto" and (k, error) not in ((1, KeyboardInterrupt), (6, RuntimeError)):
        pytest.skip("one in the eager call and one in a plan are enough: each call compiles anew, for seconds")
    net = FailsAt(cnn(), k, error)
    x, y = batch()
    attack = attack_by(way, net)
    before, around = state(net), surroundings()
    for _ in range(4):
        with contextlib.suppress(error):
            attack(x, y)
        assert state(net) == before
        assert surroundings() == around
    assert net.calls > k or "twin" in way  # which calls the model itself now and then only
    net.k = 10**6
    assert torch.isfinite(attack(x, y)).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((6,), 10), r"y must be labels in \[0, 10\); got labels from 10 to 10"),
        (torch.ones(6, 9), r"soft labels y must be \[6, 10\] like the logits; got \[6, 9\]"),
    ],
    ids=["hard", "soft"],
)
def test_labels_are_checked_in_every_call(way, labels, message):
    """A recorded or compiled step cannot: there they would be read from, or written to, memory of somebody else."""
    net = cnn(dropout=0.0)
    x, _ = batch()
    good = labels % 10 if labels.dim() == 1 else torch.full((6, 10), 0.1)
    attack = attack_by(way, net)
    for _ in range(3):
        attack(x, good)
        with pytest.raises(ValueError, match=message):
            attack(x, labels)


def test_running_statistics_move_as_in_eager_calls(way):
    """bn="train", where an engine takes it."""
    if "twin" in way or way.get("engine") == "compile":
        with pytest.raises(ValueError, match=r"bn|running statistics"):
            attack_by(way, cnn(), bn="train")
        return
    nets = [cnn(dropout=0.0).train() for _ in range(2)]
    x, y = batch()
    for net, options in zip(nets, (way, {}), strict=True):
        attack = attack_by(options, net, bn="train", init="zero")
        for _ in range(3):
            attack(x, y)
    for ours, theirs in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=0.02 if "precision" in way else 1e-6, rtol=0)


def test_frozen_parameters_and_gradients_stay(way):
    net = cnn()
    for p in [*net[0].parameters(), net[1].weight]:
        p.requires_grad_(False)
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    attack = attack_by(way, net)
    before = state(net)
    for _ in range(3):
        attack(x, y)
        assert state(net) == before


def test_within_the_callers_autocast(way):
    """Its cache may hold no cast of the images, which move, nor one of weights without their graph."""
    if "precision" in way:
        return  # has its own
    x, y = batch()
    net, alone = cnn(dropout=0.0).eval(), cnn(dropout=0.0).eval()
    attack = attack_by(way, net, init="zero")
    for _ in range(3):
        for p in (*net.parameters(), *alone.parameters()):
            p.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            adv = attack(x, y)
            F.cross_entropy(net(x), y).backward()
            F.cross_entropy(alone(x), y).backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), alone.parameters(), strict=True))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = fastadv.pgd(alone, x, y, 0.03, steps=3, init="zero")
    assert F.cosine_similarity((adv - x).flatten(), (expected - x).flatten(), dim=0) > 0.9


def test_ddp_is_left_out(way, process_group):
    x, y = batch()
    net = cnn(dropout=0.0)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(net))
    calls = count_calls(wrapped)
    ours, theirs = attack_by(way, wrapped, init="zero"), attack_by(way, net, init="zero")
    for _ in range(3):
        torch.testing.assert_close(ours(x, y), theirs(x, y))
    assert not calls


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_within_any_grad_mode(way, context):
    net = cnn(dropout=0.0)
    x, y = batch()
    attack = attack_by(way, net, init="zero")
    outside = [attack(x, y) for _ in range(3)][-1]
    attack = attack_by(way, net, init="zero")
    with context():
        inside = [attack(*batch()) for _ in range(3)][-1]
    torch.testing.assert_close(inside.clone(), outside)
    F.cross_entropy(net(inside.clone()), y).backward()
    assert net[0].weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(way, dtype):
    if dtype == torch.bfloat16 and "precision" in way:
        pytest.skip("a model in half precision has its precision")
    net = cnn(dropout=0.0).to(dtype)
    x, y = batch(dtype=dtype)
    attack = attack_by(way, net)
    for _ in range(3):
        adv = attack(x, y)
        assert adv.dtype == dtype
        assert ((adv.double() - x.double()).abs() <= 0.03 + 1e-7).all()
        assert not torch.equal(adv, x)


@pytest.mark.parametrize("n", [0, 1])
def test_small_batches(way, n):
    net = cnn()
    x, y = batch(6)
    attack = attack_by(way, net)
    for _ in range(3):
        assert attack(x[:n], y[:n]).shape == x[:n].shape


def test_soft_labels_and_channels_last(way):
    net = cnn(dropout=0.0).to(memory_format=torch.channels_last)
    x, y = batch()
    x, y = x.to(memory_format=torch.channels_last), F.one_hot(y, 10).float() * 0.9 + 0.01
    attack = attack_by(way, net, init="zero")
    for _ in range(3):
        adv = attack(x, y)
        assert adv.stride() == x.stride()


def test_weights_may_change_between_calls(way):
    """By a fused optimiser, by ``.data``, by loading, by assignment and by moving: the next call attacks the new ones."""
    net = cnn(dropout=0.0).eval()
    x, y = batch()
    attack = attack_by(way, net, init="zero", steps=1)
    g = torch.Generator().manual_seed(1)

    def noise(p):
        return 0.3 * torch.randn(p.shape, generator=g)

    def optimiser():
        for p in net.parameters():
            p.grad = noise(p)
        torch.optim.SGD(net.parameters(), lr=1.0, fused=True).step()
        net.zero_grad()

    def data():
        for p in net.parameters():
            p.data.add_(noise(p))

    def load(**options):
        net.load_state_dict({k: v + noise(v) if v.is_floating_point() else v for k, v in net.state_dict().items()}, **options)
        net[1].running_var.abs_()
        net[5].running_var.abs_()

    def assign():
        load(assign=True)

    def replace():
        net[0] = copy.deepcopy(net[0])
        data()

    def statistics():
        net[1].running_mean.add_(0.5)
        net[1].running_var.mul_(3)

    for _ in range(3):
        attack(x, y)
    for change in (optimiser, data, load, statistics, assign, replace, lambda: None):
        change()
        adv, expected = attack(x, y), fastadv.pgd(net, x, y, 0.03, steps=1, init="zero")
        assert ((adv - expected).abs() > 1e-5).double().mean() < (0.1 if "precision" in way else 0.01), change
        assert not torch.equal(adv, x)


@pytest.mark.parametrize("objective", [fastadv.PGDAT, fastadv.TRADES, fastadv.MART, fastadv.SCORE], ids=lambda o: o.__name__)
def test_objectives_attack_by_any_engine(way, objective):
    net = cnn(dropout=0.0)
    x, y = batch()
    given = {"init": x + 0.02 * torch.rand(x.shape, generator=seed()), "steps": 3, "bn": "eval"}
    ours, plain = (objective(objective.paper_attack(net, **given, **options)) for options in (way, {}))
    for _ in range(3):
        adv, expected = (o.adversarial(net, x, y) for o in (ours, plain))
        moves = [(images - x).flatten() for images in (adv, expected)]
        assert F.cosine_similarity(*moves, dim=0) > (0.4 if "precision" in way else 0.99)
    assert ours.loss(net, x, y, adv).isfinite()
    assert ours.attack.stats.precision == way.get("precision", "fp32")


def test_settings_are_seen_and_not_reassigned():
    attack = fastadv.PGD(cnn(), 0.03, precision="bf16", twin=True)
    assert "Engine(engine='eager', precision='bf16', twin=True, memory='normal')" in repr(attack)
    with pytest.raises(AttributeError):
        attack.engine = "graph"
    attack.bn = "batch"
    x, y = batch()
    before = state(attack.model)
    with pytest.raises(ValueError, match=r"twin=True needs bn='eval'.*got bn='batch'"):
        attack(x, y)
    assert state(attack.model) == before


# --------------------------------------------------------------------------------------------------------- CUDA graphs


def test_a_shape_is_recorded_when_it_comes_again_and_then_replayed(recorder):
    net = cnn(dropout=0.0)
    x, y = batch()
    attack = fastadv.PGD(net, 0.03, steps=5, engine="graph")
    for sizes, recorded, replays in [(6, 0, 0), (6, 1, 5), (4, 1, 5), (6, 1, 10), (4, 2, 15), (6, 2, 20)]:
        attack(x[:sizes], y[:sizes])
        assert (len(recorder.recorded), recorder.replays) == (recorded, replays)
    assert attack.stats.steps == {"eager": 10, "graph": 20}
    assert (attack.stats.recorded, attack.stats.moved) == (2, 0)


@contextlib.contextmanager
def multiplied_in(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_a_recording_depends_on(recorder, monkeypatch):
    """A change of these is another recording; of eps, alpha and weights, none."""
    monkeypatch.setattr(engine, "KEPT", 99)
    net = cnn(dropout=0.0)
    x, y = batch()
    attack = fastadv.PGD(net, 0.03, 0.01, steps=2, engine="graph", bn="batch")
    attack(x, y), attack(x, y)
    assert len(recorder.recorded) == 1
    attack.eps, attack.alpha = 0.02, 0.015
    assert torch.equal(attack(x, y, None), attack(x, y)) is False  # random starts
    attack.init = "zero"
    assert torch.equal(attack(x, y), fastadv.pgd(net, x, y, 0.02, 0.015, steps=2, init="zero", bn="batch"))
    assert len(recorder.recorded) == 1
    changes: list[Callable[[], contextlib.AbstractContextManager]] = [
        lambda: contextlib.nullcontext(setattr(attack, "norm", "l2")),
        lambda: contextlib.nullcontext(setattr(attack, "loss", "margin")),
        lambda: contextlib.nullcontext(setattr(attack, "targeted", True)),
        lambda: contextlib.nullcontext(setattr(attack, "bounds", None)),
        lambda: contextlib.nullcontext(setattr(attack, "eps", torch.full((6,), 0.02))),
        lambda: contextlib.nullcontext(setattr(attack, "keep_best", True)),
        lambda: contextlib.nullcontext(net[1].train(False)),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: fastadv.use_backend("reference"),
        lambda: contextlib.nullcontext(monkeypatch.setattr(graphs, "stream", lambda device: 1)),
        lambda: multiplied_in("high"),
    ]
    for i, change in enumerate(changes, 2):
        with change():
            for _ in range(3):
                attack(x, y)
        assert len(recorder.recorded) == i, i
    assert attack.stats.moved == 0


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="a torch with one interface to TF32")
def test_tf32_by_either_of_torchs_interfaces(recorder):
    """Once the newer is used, torch refuses to answer through the older."""
    x, y = batch()
    attack = fastadv.PGD(linear(), 0.03, steps=1, engine="graph")
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for i, precision in enumerate(("ieee", "tf32"), 1):
            matmul.fp32_precision = precision
            attack(x, y), attack(x, y)
            assert len(recorder.recorded) == i
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("number", [np.float32, np.float64, Fraction, torch.tensor], ids=lambda f: f.__name__)
def test_sizes_of_any_kind_of_number_are_no_part_of_a_recording(recorder, number):
    x, y = batch()
    attack = fastadv.PGD(linear(), number(0.5), steps=2, init="zero", engine="graph")
    attack(x, y), attack(x, y)
    attack.eps = number(0.25)
    assert torch.equal(attack(x, y), fastadv.pgd(linear(), x, y, 0.25, steps=2, init="zero"))
    assert attack.stats.recorded == 1


def test_all_that_a_recorded_step_reads_is_on_its_device():
    """Sizes may be 0-dim tensors on the CPU, which would be copied in each step."""

    class Steps(fastadv.engine.Loop):
        STATE = ("adv", "eps", "alpha")
        adv, eps, alpha = torch.rand(2, 3, device="meta"), torch.tensor(0.5), 0.25

    fixed = Steps().fixed(torch.device("meta"))
    assert {fixed.adv.device.type, fixed.eps.device.type, fixed.alpha.device.type} == {"meta"}


def test_a_step_is_run_before_it_is_recorded_and_leaves_no_trace(recorder, monkeypatch):
    """Kernels are loaded and tuned at their first launch, which may not be within a recording."""
    x, y = batch()
    seen, before = [], []
    record = graphs.record
    monkeypatch.setattr(graphs, "record", lambda *arguments: before.append(len(seen)) or record(*arguments))
    nets = [cnn().train() for _ in range(2)]  # with dropout
    nets[0].register_forward_hook(lambda *_: seen.append(1))
    images = []
    for net, way in zip(nets, ("graph", "eager"), strict=True):
        torch.manual_seed(0)
        attack = fastadv.PGD(net, 0.03, steps=2, bn="train", engine=way)
        images.append([attack(x, y) for _ in range(3)])
    assert before == [3]
    assert all(torch.equal(a, b) for a, b in zip(*images, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].buffers(), nets[1].buffers(), strict=True))


def test_weights_that_move_are_recorded_again(recorder):
    net = cnn(dropout=0.0)
    x, y = batch()
    attack = fastadv.PGD(net, 0.03, steps=2, init="zero", engine="graph")
    attack(x, y), attack(x, y)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.01)
    attack(x, y)
    assert attack.stats.recorded == 1
    net[0].weight = nn.Parameter(-net[0].weight.detach())
    assert torch.equal(attack(x, y), fastadv.pgd(net, x, y, 0.03, steps=2, init="zero"))
    assert (attack.stats.recorded, attack.stats.moved) == (2, 1)
    del net[5].running_mean
    net[5].register_buffer("running_mean", torch.ones(8))
    attack(x, y)
    assert attack.stats.moved == 2


def test_another_model_starts_anew(recorder):
    x, y = batch()
    attack = fastadv.PGD(cnn(dropout=0.0), 0.03, steps=2, init="zero", engine="graph")
    attack(x, y), attack(x, y)
    old = weakref.ref(attack.model)
    attack.model = cnn(dropout=0.0, seed=1)
    assert torch.equal(attack(x, y), fastadv.pgd(attack.model, x, y, 0.03, steps=2, init="zero"))
    gc.collect()
    assert old() is None
    assert recorder.recorded[0]() is None


def test_ten_thousand_calls_of_changing_sizes_leak_nothing(recorder):
    """Eight recordings are kept, of the sizes that come most; what is let go is freed."""
    net = linear(features=4).eval()
    x, y = torch.rand(40, 4), torch.randint(10, (40,))
    attack = fastadv.PGD(net, 0.03, steps=1, init="zero", engine="graph")
    g = torch.Generator().manual_seed(0)
    sizes = (40 * torch.rand(10_000, generator=g) ** 3).int().add_(1).tolist()
    tensors = []
    for i, n in enumerate(sizes):
        attack(x[:n], y[:n])
        if i in (999, 9999):
            gc.collect()
            tensors.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    alive = [loop for loop in recorder.recorded if loop() is not None]
    assert len(alive) <= engine.KEPT
    assert abs(tensors[1] - tensors[0]) <= 8
    assert recorder.replays > 4000  # the frequent sizes are replayed
    assert attack.stats.recorded < 200  # and the rare ones do not push them out


def test_early_stopping_reuses_recordings_of_shrinking_batches(recorder):
    x, y = digits()
    x, y, net = x[1200:1264], y[1200:1264], trained_lenet()
    options = {"eps": 0.12, "steps": 10, "early_stop": True, "init": "zero", "alpha": 0.02}
    attack = fastadv.PGD(net, **options, engine="graph")
    expected = fastadv.PGD(net, **options)
    for _ in range(5):
        assert torch.equal(attack(x, y), expected(x, y))
        assert torch.equal(attack.info.success, expected.info.success)
    assert 2 <= attack.stats.recorded <= engine.KEPT
    assert attack.stats.steps["graph"] > attack.stats.steps["eager"]


def test_graphs_by_name_need_a_gpu_and_a_module(monkeypatch):
    x, y = batch()
    net = cnn()
    before = state(net)
    with pytest.raises(ValueError, match=r"engine='graph' needs an nn.Module on a CUDA device.*Sequential on cpu"):
        fastadv.PGD(net, 0.03, engine="graph")(x, y)
    monkeypatch.setattr(graphs, "available", lambda device: True)
    with pytest.raises(ValueError, match=r"nn.Module.*function on cpu"):
        fastadv.PGD(lambda z: net(z), 0.03, engine="graph")(x, y)
    assert state(net) == before


def test_a_step_that_cannot_be_recorded_says_so(monkeypatch):
    def fail(step, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "available", lambda device: True)
    monkeypatch.setattr(graphs, "record", fail)
    net = cnn()
    x, y = batch()
    attack = fastadv.PGD(net, 0.03, engine="graph")
    attack(x, y)
    before = state(net)
    with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph, use engine='eager': operation not permitted"):
        attack(x, y)
    assert state(net) == before
    attack = fastadv.PGD(net, 0.03, engine="auto")  # which has other ways
    monkeypatch.setattr(torch, "compile", aot)
    for _ in range(3):
        attack(x, y)
    assert "cannot be recorded" in attack.stats.failed["graph"]


def test_attacks_can_be_copied_and_pickled(recorder):
    net = linear()
    attack = fastadv.PGD(net, 0.03, engine="graph", init="zero")
    x, y = batch()
    expected = [attack(x, y) for _ in range(3)][-1]
    for other in (copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert torch.equal(other(x, y), expected)
        assert other.engine.engine == "graph"


# ---------------------------------------------------------------------------------------------------- compile and auto


def test_a_compiled_attack_is_the_same_attack():
    """By torch's own compiler, on the trained network: the same images up to rounding, the same success."""
    x, y = digits()
    x, y, net = x[1200:1300], y[1200:1300], trained_lenet()
    attack = fastadv.PGD(net, 0.1, steps=5, init="zero", engine="compile", keep_best=True)
    expected = fastadv.PGD(net, 0.1, steps=5, init="zero", keep_best=True)
    for _ in range(2):
        adv = attack(x, y)
    torch.testing.assert_close(adv, expected(x, y), atol=1e-5, rtol=0)
    assert torch.equal(attack.info.success, expected.info.success)
    assert attack.stats.steps == {"eager": 5, "compile": 5} or attack.stats.steps == {"eager": 5, "compile, channels_last": 5}


def test_many_attacks_are_compiled_in_one_process(no_codegen):
    """torch stops at eight recompilations of one function."""
    x, y = batch()
    for i in range(12):
        attack = fastadv.PGD(linear(seed=i), 0.03, steps=1, init="zero", engine="compile")
        attack(x, y), attack(x, y)
        assert attack.stats.steps == {"eager": 1, "compile, channels_last": 1}


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = linear()

    def forward(self, x):
        return self.net(x) if float(x.sum()) > 0 else -self.net(x)


def test_a_model_that_cannot_be_compiled(no_codegen):
    x, y = batch()
    net = Branches()
    attack = fastadv.PGD(net, 0.03, engine="compile")
    attack(x, y)
    before = state(net)
    with pytest.raises(Exception, match=r"(?i)graph break|data.dependent|unsupported"):
        attack(x, y)
    assert state(net) == before
    attack = fastadv.PGD(net, 0.03, engine="auto")
    attack(x, y), attack(x, y)
    assert "compile, channels_last" in attack.stats.failed


class Counts(nn.Module):
    """An attribute that torch.compile takes for a constant changes in each call."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = linear(), 0

    def forward(self, x):
        self.calls += 1
        return self.net(x) + 0 * self.calls


def test_auto_does_without_a_plan_that_fails_while_it_is_timed(no_codegen):
    """torch.compile refuses to compile again and again."""
    x, y = batch()
    attack = fastadv.PGD(Counts(), 0.03, steps=1, init="zero", engine="auto")
    attack(x, y)
    assert torch.equal(attack(x, y), fastadv.pgd(Counts(), x, y, 0.03, steps=1, init="zero"))
    assert "compile, channels_last" in attack.stats.failed
    assert "eager" in attack.stats.steps


def test_a_remembered_plan_that_does_not_run_here_is_measured_anew(monkeypatch, own_choices):
    """The same by name and weights, but its code has changed since; or there is no compiler on this machine."""
    seconds = {"eager": 1.0, "eager, channels_last": 1.0, "compile, channels_last": 0.5}
    timed = pretend(monkeypatch, seconds)
    x, y = batch()
    attack = fastadv.PGD(linear(), 0.03, steps=1, engine="auto")
    attack(x, y), attack(x, y)
    assert attack.stats.steps == {"eager": 1, "compile, channels_last": 1}

    def fail(function, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    del timed[:]
    attack = fastadv.PGD(linear(), 0.03, steps=1, engine="auto")
    attack(x, y), attack(x, y)
    assert timed
    assert attack.stats.steps == {"eager": 2}
    assert attack.stats.failed == {"compile, channels_last": "RuntimeError: no compiler"}


def pretend(monkeypatch, seconds: dict[str, float]) -> list[str]:
    """Makes plans appear to take so long; the names of those that were timed."""
    timed: list[str] = []
    realised = engine.Engine._realised
    monkeypatch.setattr(torch, "compile", aot)

    def _realised(self, kept, loop):
        loop, step = realised(self, kept, loop)
        step.__func__.plan = str(kept.plan)
        plan = str(kept.plan)

        def named():
            step()

        named.plan = plan
        return loop, named

    def _seconds(step, device, repeat=1):
        step()
        timed.append(step.plan)
        return seconds.get(step.plan, 1.0) * repeat

    monkeypatch.setattr(engine.Engine, "_realised", _realised)
    monkeypatch.setattr(engine, "_seconds", _seconds)
    return timed


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"eager": 1.0, "eager, channels_last": 0.9, "compile, channels_last": 0.8}, "compile, channels_last"),
        ({"eager": 1.0, "eager, channels_last": 0.8, "compile, channels_last": 0.9}, "eager, channels_last"),
        ({"eager": 1.0, "eager, channels_last": 0.98, "compile, channels_last": 1.5}, "eager"),  # not worth a change
    ],
)
def test_auto_takes_the_fastest_and_remembers(monkeypatch, own_choices, seconds, chosen):
    timed = pretend(monkeypatch, seconds)
    net, (x, y) = cnn(dropout=0.0), batch()
    attack = fastadv.PGD(net, 0.03, steps=2, engine="auto")
    attack(x, y)
    assert not timed  # a shape that comes once is not worth it
    attack(x, y)
    assert set(timed) == set(seconds)
    measured = len(timed)
    attack(x, y)
    assert len(timed) == measured
    assert attack.stats.steps[chosen] == (4 if chosen != "eager" else 6)
    (shown,) = attack.stats.choices.values()
    assert shown == {plan: 1e3 * t for plan, t in seconds.items()}
    # Another object, and so another process, has it from the file; another kind of inputs or model has not.
    again = fastadv.PGD(cnn(dropout=0.0), 0.03, steps=2, engine="auto")
    again(x, y), again(x, y)
    assert len(timed) == measured
    assert again.stats.choices == attack.stats.choices
    assert len(choices.known()) == 1
    for other in (
        fastadv.PGD(cnn(classes=7, dropout=0.0), 0.03, engine="auto"),
        fastadv.PGD(net, 0.03, norm="l2", engine="auto"),
    ):
        other(x, y % 7), other(x, y % 7)
        assert len(timed) > measured
        measured = len(timed)
    assert len(choices.known()) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"k": 1}', '{"k": {"plan": "eager"}}'])
def test_a_damaged_file_of_choices_is_measured_anew(monkeypatch, own_choices, content):
    timed = pretend(monkeypatch, {})
    (own_choices / "choices.json").write_text(content)
    net, (x, y) = linear(), batch()
    attack = fastadv.PGD(net, 0.03, steps=1, engine="auto")
    attack(x, y), attack(x, y)
    assert timed
    assert len(json.loads((own_choices / "choices.json").read_text())) == 1
    assert [f.name for f in own_choices.iterdir()] == ["choices.json"]


def test_choices_for_a_loss_of_the_users_are_found_again(monkeypatch):
    """By its name: its address is another in each process, and the file would grow by each."""
    pretend(monkeypatch, {})
    x, y = batch()
    for _ in range(3):
        attack = fastadv.PGD(linear(), 0.03, steps=1, loss=lambda z, y: -z.gather(1, y[:, None])[:, 0], engine="auto")
        attack(x, y), attack(x, y)
    assert len(choices.known()) == 1


def test_a_home_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    pretend(monkeypatch, {})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTADV_CACHE", str(tmp_path / "file"))
    x, y = batch()
    attack = fastadv.PGD(linear(), 0.03, steps=1, engine="auto")
    attack(x, y), attack(x, y)
    assert attack.stats.choices


def test_choices_are_shown_by_info(monkeypatch):
    pretend(monkeypatch, {})
    from fastadv import info

    assert "auto" not in info.report()
    x, y = batch()
    attack = fastadv.PGD(linear(), 0.03, steps=1, engine="auto")
    attack(x, y), attack(x, y)
    assert "Sequential" in info.report()
    assert "6x3x8x8 float32" in info.report()


def test_measuring_leaves_running_statistics_and_generators_alone(monkeypatch):
    """bn="train": each step moves them; measuring must not."""
    pretend(monkeypatch, {})
    x, y = batch()
    nets = [cnn().train() for _ in range(2)]
    for way, net in zip(("auto", "eager"), nets, strict=True):
        torch.manual_seed(0)
        attack = fastadv.PGD(net, 0.03, steps=2, bn="train", engine=way)
        for _ in range(3):
            attack(x, y)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].buffers(), nets[1].buffers(), strict=True))


# ------------------------------------------------------------------------------------------------------------ precision


def test_precision_reaches_the_model_and_not_the_images():
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(192, 10)

        def forward(self, x):
            seen.append((x.dtype, self.linear(x.flatten(1)).dtype))
            return self.linear(x.flatten(1))

    x, y = batch()
    for precision, dtype in [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]:
        seen.clear()
        attack = fastadv.PGD(Net(), 0.03, steps=2, precision=precision)
        attack(x, y)
        assert seen == [(torch.float32, dtype)] * 2
        assert attack.stats.precision == precision


def test_auto_precision_asks_the_hardware(monkeypatch):
    x, y = batch()
    for supported, precision in [(False, "fp32"), (True, "bf16")]:
        for name in ("avx512_bf16", "amx_tile"):
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda supported=supported: supported, raising=False)
        attack = fastadv.PGD(linear(), 0.03, steps=1, precision="auto")
        attack(x, y)
        assert attack.stats.precision == precision


@pytest.mark.parametrize("bn", ["eval", "batch"])
def test_fp16_gradients_deep_in_a_model_do_not_underflow(bn):
    """Small weights in between: without a scale the gradient is zero for most of the images."""

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear()

        def forward(self, x):
            return self.net(1e-4 * x) * 1e-2 + 0 * x.flatten(1)[:, :10]

    x, y = batch(32)
    attack = fastadv.PGD(Deep(), 0.03, steps=1, init="zero", precision="fp16", bn=bn)
    adv = attack(x, y)
    assert not attack.info.zero_grad.any()
    assert not attack.info.nan_grad.any()
    expected = fastadv.pgd(Deep(), x, y, 0.03, steps=1, init="zero")
    assert ((adv - expected).abs() > 1e-6).double().mean() < 0.05


@pytest.mark.parametrize("options", [{"keep_best": True, "restarts": 2}, {"early_stop": True}], ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_as_strong_and_scored_in_fp32(precision, options):
    """Success within half a point of fp32's, on 500 digits; the last word is the model's own."""
    x, y = digits()
    x, y, net = x[1200:], y[1200:], trained_lenet()
    options = {"eps": 0.1, "steps": 20, **options}
    exact = fastadv.PGD(net, **options, generator=seed())
    exact(x, y)
    attack = fastadv.PGD(net, **options, precision=precision, generator=seed())
    adv = attack(x, y)
    assert torch.equal(attack.info.success, net(adv).argmax(1) != y)
    assert abs(attack.info.success.double().mean() - exact.info.success.double().mean()) <= 0.005
    if "restarts" in options:
        assert attack.info.forwards == exact.info.forwards + 1
    loss = fastadv.ops.log_odds(net(adv).detach(), y)[0]
    torch.testing.assert_close(attack.info.loss, loss)


def test_a_restart_is_not_left_out_on_the_word_of_lower_precision():
    """In which the last images of a restart seem to fool this model."""
    net = linear()
    x, _ = batch()
    y = net(x).argmax(1)
    steps = []

    def model(z):
        steps.extend([1] * torch.is_grad_enabled())
        return -net(z) if torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled() else net(z)

    attack = fastadv.PGD(model, 1e-5, steps=2, restarts=3, early_stop=True, precision="bf16")
    attack(x, y)
    assert len(steps) == 6
    assert not attack.info.success.any()


def test_stopping_without_labels_is_by_the_models_own_prediction():
    """A model whose answer in lower precision is another one."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear()

        def forward(self, x):
            logits = self.linear(x)
            return logits.roll(1, 1) if torch.is_autocast_enabled("cpu") else logits

    x, _ = batch()
    net = Net()
    attack = fastadv.PGD(net, 0.5, loss="kl", early_stop=True, precision="bf16", generator=seed())
    adv = attack(x)
    assert attack.info.success.any()
    assert torch.equal(attack.info.success, net(adv).argmax(1) != net(x).argmax(1))


@pytest.mark.parametrize("way", ["compile", "auto"])
def test_shrinking_batches_are_not_compiled(monkeypatch, way):
    x, y = digits()
    x, y, net = x[1200:1264], y[1200:1264], trained_lenet()
    compiled = []

    def counting(function, **options):
        compiled.append(function)
        return aot(function, **options)

    monkeypatch.setattr(torch, "compile", counting)
    attack = fastadv.PGD(net, 0.12, 0.02, early_stop=True, init="zero", engine=way)
    for _ in range(4):
        attack(x, y)
    assert len(compiled) == 1
    assert attack.stats.steps["eager"] > 10


def test_rescoring_measures_divergences_from_the_models_own_prediction():
    x, _ = digits()
    x, net = x[1200:1300], trained_lenet()
    attack = fastadv.PGD(net, 0.1, steps=5, loss="kl", keep_best=True, precision="bf16", generator=seed())
    adv = attack(x)
    with torch.no_grad():
        torch.testing.assert_close(attack.info.loss, fastadv.ops.kl(net(x), net(adv))[0])
        assert torch.equal(attack.info.success, net(adv).argmax(1) != net(x).argmax(1))


# ----------------------------------------------------------------------------------------------------------- compaction


@pytest.mark.parametrize("options", [{}, {"restarts": 3}, {"loss": "margin"}, {"eps": "each"}, {"targeted": True}], ids=str)
def test_fooled_samples_leave_the_batch_and_nothing_else_changes(options):
    x, y = digits()
    x, y, net = x[1200:1300].double(), y[1200:1300], copy.deepcopy(trained_lenet()).double()
    if options.get("targeted"):
        y, options = (y + 1) % 10, {"eps": 0.3, **options}
    if options.get("eps") == "each":
        options = {"eps": torch.linspace(0.02, 0.2, 100, dtype=torch.float64), "alpha": torch.linspace(0.004, 0.04, 100)}
    options = {"eps": 0.1, "steps": 10, "early_stop": True, **options}
    alone = fastadv.PGD(net, **options, generator=seed())
    rows = count_calls(net)
    adv = alone(x, y)
    sizes = [len(r) for r in rows]
    assert sizes[0] == 100
    assert min(sizes) <= 75
    assert len(set(sizes)) <= 14
    whole = fastadv.PGD(net, **options, generator=seed())
    whole._shrinks = lambda: False
    expected = whole(x, y)
    torch.testing.assert_close(adv, expected, atol=1e-12, rtol=0)
    assert torch.equal(alone.info.success, whole.info.success)
    torch.testing.assert_close(alone.info.loss, whole.info.loss)
    assert sum(sizes) < sum(len(r) for r in rows[len(sizes) :])


@pytest.mark.parametrize(
    "options", [{"bn": "batch"}, {"loss": lambda z, y: -z.gather(1, y[:, None])[:, 0]}], ids=["bn", "loss"]
)
def test_coupled_samples_stay_together(options):
    net = cnn(dropout=0.0).train()
    x, y = batch(16)
    seen = count_calls(net)
    fastadv.PGD(net, 0.3, early_stop=True, **options)(x, y)
    assert {len(s) for s in seen} == {16}


def test_sizes_of_shrinking_batches():
    from fastadv.attacks.search import bucket

    assert [bucket(s, 64) for s in (64, 49, 48, 33, 32, 25, 24, 17, 16, 13, 12, 3, 2, 1)] == [
        64, 64, 48, 48, 32, 32, 24, 24, 16, 16, 12, 3, 2, 1,
    ]  # fmt: skip
    for of in range(1, 200):
        sizes = [bucket(s, of) for s in range(1, of + 1)]
        assert all(s <= b <= of for s, b in enumerate(sizes, 1))
        assert len(set(sizes)) <= 17


# -------------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fast"}, "engine must be one of 'auto', 'eager', 'compile', 'graph'; got 'fast'"),
        ({"precision": "fp8"}, "precision must be one of 'fp32', 'bf16', 'fp16', 'auto'; got 'fp8'"),
        ({"memory": "low"}, "memory must be one of 'normal', 'signs'; got 'low'"),
        ({"twin": True, "bn": "batch"}, "twin=True needs bn='eval'.*got bn='batch'"),
        ({"engine": "compile", "bn": "train"}, "engine='compile' cannot update running statistics"),
        ({"engine": "compile", "memory": "signs"}, "engine='compile' chooses what to save itself"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fastadv.PGD(linear(), 0.03, **options)


# ------------------------------------------------------------------------------------------------- nothing but the model


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    "options", [{}, {"keep_best": True}, {"early_stop": True}, {"loss": "kl"}, {"memory": "signs"}], ids=str
)
def test_a_recorded_step_may_not_wait_for_the_device(recorder, norm, options, precision):
    """Within a recording it would be an error."""
    net = cnn(dropout=0.0)
    x, y = batch()
    seen = []
    record = graphs.record

    def linted(step, device):
        with Ops() as ran:
            step()
        seen.append(SYNCS.intersection(ran.names))
        return record(step, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "record", linted)
        attack = fastadv.PGD(net, 1e-4, steps=2, norm=norm, precision=precision, engine="graph", **options)
        attack(x, y), attack(x, y)
    assert seen == [set()]


def test_no_memory_is_taken_in_the_loop_but_the_models():
    """After the first step: what the model's own passes take, and nothing else of an image's size."""

    class Empties(Ops):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            returned = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
            given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            self.names += [func._schema.name for t in returned if t.untyped_storage().data_ptr() not in given]
            return out

    net = cnn(dropout=0.0).eval().requires_grad_(False)
    x, y = batch()

    def bare():
        z = x.clone().requires_grad_()
        torch.autograd.grad(net(z), z, torch.ones(6, 10))

    with Empties() as passes:
        bare()
    taken = []
    for steps in (2, 12):
        with Empties() as ran:
            fastadv.PGD(net, 0.03, steps=steps)(x, y)
        taken.append(len(ran.names))
    assert (taken[1] - taken[0]) / 10 <= len(passes.names) - 2  # the clone and the ones
