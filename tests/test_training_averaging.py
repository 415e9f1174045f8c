"""Averages of weights against the papers' formulas in fp64; what they share with the model (nothing); and resuming."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from models import (
    SYNCS,
    Ops,
    batch,
    cnn,
    one_thread,  # noqa: F401
    seeded,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import fastadv
from fastadv.training.averaging import EMA, SWA, Average

EXACT = {"rtol": 0.0, "atol": 1e-13}


class Net(nn.Module):
    """Running statistics, a tied and a frozen weight, and buffers that are constants: one infinite, one not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.flat = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten()
        self.first, self.second = nn.Linear(36, 10, bias=False), nn.Linear(36, 10)
        self.second.weight = self.first.weight
        self.stem.bias.requires_grad_(False)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("scale", torch.tensor(0.1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.flat(F.relu(self.norm(self.stem(x))))
        return self.first(z) + self.scale * self.second(z)


@seeded
def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    return Net().to(dtype).train()


def steps(model: nn.Module, n: int, start: int = 0) -> Iterator[int]:
    """Trains for n steps, and says after each which it was, from 1."""
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(start, start + n):
        x, y = batch(6 + i, dtype=dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        yield i + 1


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that it holds."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, n=name: f"{n}: {m}"
        )


# -------------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("warmup", [0, 1, 7.35, 100])
def test_dm_improves_at(warmup):
    """The parameters by its formulas, the buffers the model's."""
    model, tau = net(), 0.8
    ema = EMA(model, decay=tau, warmup_steps=warmup)
    expected = values(model)
    for step in steps(model, 60):
        ema.update()
        delta = step - warmup
        decay = min(tau, (1 + delta) / (10 + delta)) if step >= warmup else 0.0
        now, learnt = values(model), dict(model.named_parameters())
        expected = {n: decay * expected[n] + (1 - decay) * v if n in learnt else v for n, v in now.items()}
    assert_same(values(ema.module), expected, **EXACT)


def test_deepmind():
    """Its steps count from 0, and there is no warm-up: ours is the first step."""
    model, tau = net(), 0.9
    ema = EMA(model, decay=tau, warmup_steps=1)
    expected = dict(values(model))
    for step in steps(model, 30):
        ema.update()
        decay = min(tau, step / (9 + step))  # (1 + d)/(10 + d) with d = step - 1
        for name, p in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    learnt = dict(model.named_parameters())
    assert_same({n: v for n, v in values(ema.module).items() if n in learnt}, {n: expected[n] for n in learnt}, **EXACT)


def test_gkl():
    """The whole state, running statistics too, copied throughout epoch 3 of 4 and averaged from then on; integers are not."""
    model, tau, batches, start = net(), 0.9, 5, 3
    ema = EMA(model, decay=tau, warmup_steps=start * batches + 1, ramp=False, buffers="average")
    expected: dict[str, Tensor] = {}
    for step in steps(model, 4 * batches):
        ema.update(step)
        epoch, now = (step - 1) // batches + 1, {name: v.clone() for name, v in model.state_dict().items()}
        if epoch == start:
            expected = now
        elif epoch > start:
            expected = {n: (1 - tau) * v + tau * expected[n] if v.is_floating_point() else v for n, v in now.items()}
    found = ema.module.state_dict()
    assert_same(dict(found), expected, **EXACT)
    assert not torch.equal(found["norm.running_mean"], model.norm.running_mean)


def test_gkl_over_checkpoints():
    """Its other average: of the models that epochs end with."""
    model, tau = net(), 0.9
    ema, expected = EMA(model, decay=tau, warmup_steps=2, ramp=False, buffers="average"), {}
    for epoch in range(1, 6):
        for _ in steps(model, 3):
            pass
        ema.update()
        now = values(model)
        blend = epoch > 1
        expected = {
            n: (1 - tau) * v + tau * expected[n] if blend and v.is_floating_point() and n not in ("mask", "scale") else v
            for n, v in now.items()
        }
    assert_same(values(ema.module), expected, **EXACT)


@pytest.mark.parametrize(("start", "every"), [(1, 1), (10, 5), (7, 3)])
def test_swa(start, every):
    """The mean of the models that it takes in, as torch's; it stays between them, and follows the model before."""
    model = net()
    swa, reference, taken = SWA(model, start, every), AveragedModel(model), []
    for step in steps(model, 30):
        before = values(swa.module)
        swa.update()
        if step < start:
            assert_same(values(swa.module), values(model))
        elif (step - start) % every:
            assert_same(values(swa.module), before)
        else:
            reference.update_parameters(model)
            taken.append(values(model))
    found = values(swa.module)
    for name, p in reference.module.named_parameters():
        torch.testing.assert_close(found[name], p.detach(), **EXACT)
        torch.testing.assert_close(found[name], torch.stack([t[name] for t in taken]).mean(0), **EXACT)
    assert_same({n: found[n] for n in taken[-1] if "running" in n}, {n: v for n, v in taken[-1].items() if "running" in n})


def test_update_bn():
    """The mean over batches of each batch's statistics, by the averaged weights; nothing else changes."""
    model = net()
    swa = SWA(model, 1)
    for _ in steps(model, 5):
        swa.update()
    images, before, live = [batch(8 + i, dtype=torch.float64)[0] for i in range(3)], values(swa.module), values(model)
    swa.update_bn(iter(images))
    with torch.no_grad():
        seen = [swa.module.stem(x).transpose(0, 1).flatten(1) for x in images]
    after = values(swa.module)
    torch.testing.assert_close(after.pop("norm.running_mean"), torch.stack([z.mean(1) for z in seen]).mean(0), **EXACT)
    torch.testing.assert_close(after.pop("norm.running_var"), torch.stack([z.var(1) for z in seen]).mean(0), **EXACT)
    assert after.pop("norm.num_batches_tracked") == 3
    assert_same(after, {name: before[name] for name in after})
    assert_same(values(model), live)
    assert swa.module.norm.momentum == 0.1
    assert not any(m.training for m in swa.module.modules())


def test_update_bn_that_fails():
    swa = SWA(net(), 1)
    before = values(swa.module)
    with pytest.raises(ValueError, match="batches must hold at least one batch of images; got none"):
        swa.update_bn([])
    assert_same(values(swa.module), before)
    with pytest.raises(RuntimeError):
        swa.update_bn([torch.zeros(1, 7, dtype=torch.float64)])
    assert not any(m.training for m in swa.module.modules())


def test_update_bn_without_batch_norm():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    SWA(linear, 1).update_bn([batch()[0]])


# --------------------------------------------------------------------------------------------------------------- resuming

AVERAGES: dict[str, Callable[[nn.Module], Average]] = {
    "dm": lambda model: EMA(model, 0.9, warmup_steps=2.5),
    "gkl": lambda model: EMA(model, 0.9, warmup_steps=6, ramp=False, buffers="average"),
    "swa": lambda model: SWA(model, 4, 3),
}


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("at", [0, 1, 5, 9])
def test_resumes_bit_for_bit(kind, at):
    model = net(torch.float32)
    average = AVERAGES[kind](model)
    for _ in steps(model, at):
        average.update()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "average": average.state_dict()}, file)
    for _ in steps(model, 11, start=at):
        average.update()

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = net(torch.float32, seed=1)
    resumed = AVERAGES[kind](again)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["average"])
    assert resumed.step == at
    for _ in steps(again, 11, start=at):
        resumed.update()
    assert_same(values(again), values(model))
    assert_same(values(resumed.module), values(average.module))
    assert resumed.step == average.step


@pytest.mark.parametrize("kind", AVERAGES)
def test_steps_may_be_given(kind):
    model = net()
    counted, given = AVERAGES[kind](model), AVERAGES[kind](model)
    for step in steps(model, 9):
        counted.update()
        given.update(step)
    assert_same(values(counted.module), values(given.module))
    assert given.step == counted.step == 9


# --------------------------------------------------------------------------------------------------------------- the copy


def memory(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}


@pytest.mark.parametrize("kind", AVERAGES)
def test_shares_no_memory(kind):
    """DM-Improves-AT's average has the model's own running statistics, which go on changing under it."""
    model = net()
    average = AVERAGES[kind](model)
    homes = memory(average.module)
    for _ in steps(model, 12):
        average.update()
        assert not memory(average.module) & memory(model)
    average.load_state_dict(copy.deepcopy(average.state_dict()))
    assert memory(average.module) == homes  # in place, all along
    before = values(average.module)
    for _ in steps(model, 3):
        pass
    assert_same(values(average.module), before)
    live = values(model)
    for t in average.module.state_dict().values():
        t.zero_()
    assert_same(values(model), live)


def test_is_ready_to_evaluate():
    """In eval mode, without gradients of its own; the model's modes, gradients and versions of weights stay."""
    model = cnn().train()
    modes = [m.training for m in model.modules()]
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    grads, versions = [p.grad.clone() for p in model.parameters()], [p._version for p in model.parameters()]
    ema = EMA(model)
    ema.update()
    assert [m.training for m in model.modules()] == modes
    assert [p._version for p in model.parameters()] == versions
    assert all(torch.equal(p.grad, g) and p.requires_grad for p, g in zip(model.parameters(), grads, strict=True))
    assert not any(m.training for m in ema.module.modules())
    assert not any(p.requires_grad or p.grad is not None for p in ema.module.parameters())
    assert (fastadv.pgd(ema.module, x, y, eps=8 / 255, steps=2) != x).any()


def test_ties_stay_and_move_once():
    model = net()
    ema = EMA(model, 0.5, ramp=False)
    before = values(model)["first.weight"]
    assert ema.module.first.weight is ema.module.second.weight
    for _ in steps(model, 1):
        ema.update()
    torch.testing.assert_close(ema.module.first.weight, (before + model.first.weight.detach()) / 2, **EXACT)


def test_copies_exactly_and_integers_always():
    model = net(torch.float32)
    ema = EMA(model, warmup_steps=3, buffers="average")
    for step in steps(model, 4):
        ema.update()
        if step < 3:
            assert_same(values(ema.module), values(model))
    assert ema.module.norm.num_batches_tracked.dtype == torch.int64
    assert ema.module.norm.num_batches_tracked == 4
    assert not torch.equal(ema.module.norm.running_var, model.norm.running_var)
    assert torch.equal(ema.module.mask, model.mask)  # whose difference is not a number
    model.scale.fill_(0.3)
    ema.update()
    assert ema.module.scale == model.scale


@pytest.mark.parametrize("kind", AVERAGES)
def test_few_kernels_and_no_waiting(kind):
    """One for each kind of tensor, however many there are."""
    model = net(torch.float32)
    average = AVERAGES[kind](model)
    for step in steps(model, 9):
        with Ops() as ran:
            average.update()
        assert not SYNCS & set(ran.names)
        assert len(ran.names) <= 3, f"step {step}: {ran.names}"
        assert {name.split(".")[0] for name in ran.names} <= {"aten::_foreach_lerp_", "aten::_foreach_copy_"}


def test_types_and_layouts_may_be_mixed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10).half())
    model = model.to(memory_format=torch.channels_last)
    ema = EMA(model, 0.5, ramp=False)
    assert ema.module[0].weight.stride() == model[0].weight.stride()
    before = values(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    ema.update()
    for name, p in ema.module.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.5, rtol=1e-3, atol=1e-3)
        assert p.dtype == before[name].dtype


def test_integer_parameters_are_copied():
    model = nn.ParameterDict({"codes": nn.Parameter(torch.tensor([3, 4]), requires_grad=False)})
    ema = EMA(model)
    model["codes"].data += 2
    ema.update()
    assert ema.module["codes"].tolist() == [5, 6]


def test_a_copy_forgets_what_was_not_finite():
    model = net()
    ema = EMA(model, warmup_steps=5)
    ema.module.first.weight.fill_(torch.nan)
    ema.update()
    assert_same(values(ema.module), values(model))


def test_without_buffers_or_parameters():
    linear = nn.Linear(2, 2)
    ema = EMA(linear, warmup_steps=5)
    ema.update()
    assert torch.equal(ema.module.weight, linear.weight)
    EMA(nn.Identity()).update()


# ------------------------------------------------------------------------------------------------------------- wrappers


def wrapped(how: str, model: nn.Module) -> nn.Module:
    for wrapper in how.split("(")[::-1]:
        if wrapper == "compile":
            model = torch.compile(model, backend="eager")
        elif wrapper == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        elif wrapper == "in place":
            model.compile(backend="eager")
        elif wrapper == "dp":
            model = nn.DataParallel(model)
    return model


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        *((how, "dm") for how in ("ddp", "compile", "in place", "dp", "ddp(compile", "compile(ddp")),
        *(("compile(ddp", kind) for kind in AVERAGES if kind != "dm"),
    ],
)
def test_wrappers_come_off(how, kind, process_group):
    """The average is of the module inside, under its own names, before and after wrapping."""
    plain, inner = net(), net()
    model = wrapped(how, inner)
    expected, found = AVERAGES[kind](plain), AVERAGES[kind](model)
    assert type(found.module) is Net
    for _ in steps(plain, 8):
        expected.update()
    for _ in steps(model, 8):
        found.update()
    assert_same(values(found.module), values(expected.module), **EXACT)
    x = batch(dtype=torch.float64)[0]
    assert torch.equal(found.module(x), expected.module(x))
    again = AVERAGES[kind](net(seed=1))
    again.load_state_dict(found.state_dict())
    assert_same(values(again.module), values(found.module) | {"scale": again.module.scale})


# ---------------------------------------------------------------------------------------------------------------- errors

WRONG: dict[str, Callable[[], object]] = {
    "model must be an nn.Module; got function": lambda: EMA(F.relu),
    r"decay must be in \[0, 1\); got 1": lambda: EMA(net(), 1),
    "decay must be a finite number >= 0; got 'x'": lambda: EMA(net(), "x"),
    "warmup_steps must be a finite number >= 0; got -1": lambda: EMA(net(), warmup_steps=-1),
    "buffers must be one of 'copy', 'average'; got 'avg'": lambda: EMA(net(), buffers="avg"),
    "start must be an integer >= 1; got 0": lambda: SWA(net(), 0),
    "every must be an integer >= 1; got 2.5": lambda: SWA(net(), 1, 2.5),
    "step must be an integer >= 1; got 0": lambda: EMA(net()).update(0),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()
