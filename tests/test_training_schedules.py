"""Schedules against torch's own schedulers, and against the formulas that papers' code has; all groups get what is theirs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop, lr_scheduler

from fastadv.training.schedules import CYCLES, SHAPES, Curve, Schedule, param_groups

CLOSE = {"rel": 1e-12, "abs": 1e-15}
EPOCHS, BATCHES, LR = 200, 7, 0.1
TIMES = [i / BATCHES for i in range(EPOCHS * BATCHES)]
SPARSE = TIMES[::11]


def weights(n: int = 1) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)) for _ in range(n)]


def sgd(lr: float = LR) -> SGD:
    return SGD(weights(), lr=lr, momentum=0.9)


def followed(optimizer: Optimizer, scheduler: lr_scheduler.LRScheduler, steps: int) -> list[tuple[float, float]]:
    """(lr, momentum) at each step under a scheduler of torch's."""
    values = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        values.append((group["lr"], group["betas"][0] if "betas" in group else group["momentum"]))
        optimizer.step()
        scheduler.step()
    return values


def lrs(schedule: Schedule, times: list[float]) -> list[float]:
    return [schedule.at(t)[0] for t in times]


# ------------------------------------------------------------------------------------------------------ torch's schedulers


@pytest.mark.parametrize("epochs", [400, 120, 41, 39, 15, 2, 1])
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_cosinew_is_one_cycle(epochs, kind):
    """Also below 40 epochs, where torch's peak is before the first step."""
    optimizer = kind(weights(), lr=1.0)
    expected = followed(optimizer, lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, pct_start=0.025, total_steps=epochs), epochs)
    schedule = Schedule("cosinew", epochs, lr=0.2)
    for epoch, (lr, momentum) in enumerate(expected):
        for t in (epoch, epoch + 0.99):  # held for the epoch
            assert schedule.at(t) == pytest.approx((lr, momentum), **CLOSE)


def test_cosinew_as_documented():
    """0.04 of the largest, that at epoch 9 of 400, and 4e-6 of it in the last."""
    schedule = Schedule("cosinew", 400, lr=0.2)
    assert schedule.at(0) == pytest.approx((0.2 * 0.04, 0.95), **CLOSE)
    assert schedule.at(9) == pytest.approx((0.2, 0.85), **CLOSE)
    assert schedule.at(399) == schedule.at(400) == pytest.approx((0.2 * 4e-6, 0.95), **CLOSE)
    assert Schedule("cosinew", 40, lr=0.2).at(0) == pytest.approx((0.2, 0.85), **CLOSE)  # where torch divides by zero


def test_cosinew_per_iteration_is_one_cycle_in_small_steps():
    epochs, batches = 4, 500
    optimizer = sgd()
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, pct_start=0.25, total_steps=epochs * batches)
    schedule = Schedule("cosinew", epochs, lr=0.2, per="iteration", rise=0.25)
    for i, (lr, momentum) in enumerate(followed(optimizer, scheduler, epochs * batches)):
        assert schedule.at(i / batches) == pytest.approx((lr, momentum), abs=1e-3)


@pytest.mark.parametrize("rise", [0.5, 0.4])
def test_cyclic_is_cyclic(rise):
    """Fast AT: 15 epochs, a step at a time, the first at 0."""
    epochs, batches, optimizer = 15, 20, sgd()
    up = round(rise * epochs * batches)
    scheduler = lr_scheduler.CyclicLR(optimizer, 0.0, 0.2, step_size_up=up, step_size_down=epochs * batches - up)
    schedule = Schedule("cyclic", epochs, lr=0.2, momentum=(0.8, 0.9), rise=rise)
    for i, (lr, momentum) in enumerate(followed(optimizer, scheduler, epochs * batches)):
        assert schedule.at(i / batches) == pytest.approx((lr, momentum), rel=1e-9, abs=1e-12)
    assert schedule.at(0) == (0.0, 0.9)
    assert schedule.at(15) == (0.0, 0.9)


@pytest.mark.parametrize("final", [0.0, 1e-5])
def test_cosine_is_cosine_annealing(final):
    optimizer = sgd()
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS, eta_min=final * LR)
    schedule = Schedule("cosine", EPOCHS, LR, final=final)
    for epoch, (lr, _) in enumerate(followed(optimizer, scheduler, EPOCHS)):
        assert schedule.at(epoch)[0] == pytest.approx(lr, rel=1e-8)
    assert schedule.at(EPOCHS)[0] == pytest.approx(final * LR, abs=1e-17)


def test_piecewise_is_multi_step():
    """Bag of Tricks."""
    optimizer = sgd()
    expected = followed(optimizer, lr_scheduler.MultiStepLR(optimizer, [100, 105], gamma=0.1), 110)
    schedule = Schedule("piecewise", 110, LR, milestones=[100, 105])
    assert lrs(schedule, list(range(110))) == pytest.approx([lr for lr, _ in expected], **CLOSE)


def test_onedrop_is_multi_step():
    optimizer = sgd()
    expected = followed(optimizer, lr_scheduler.MultiStepLR(optimizer, [100], gamma=0.06), EPOCHS)
    assert lrs(Schedule("onedrop", EPOCHS, LR, factor=0.06), list(range(EPOCHS))) == pytest.approx(
        [lr for lr, _ in expected], **CLOSE
    )


# ------------------------------------------------------------------------------------------------------ papers' formulas


def interpolated(*points: tuple[float, float]) -> Callable[[float], float]:
    return lambda t: float(np.interp([t], *zip(*points, strict=True))[0])


RICE = {  # of lr 0.1 in 200 epochs, t in epochs
    "piecewise": lambda t: LR if t / EPOCHS < 0.5 else LR / 10 if t / EPOCHS < 0.75 else LR / 100,
    "superconverge": interpolated((0, 0), (0.4 * EPOCHS, LR), (EPOCHS, 0)),
    "linear": interpolated((0, LR), (EPOCHS / 3, LR), (2 * EPOCHS / 3, LR / 10), (EPOCHS, LR / 100)),
    "onedrop": lambda t: LR if t < 100 else 0.01,
    "multipledecay": lambda t: LR - (t // (EPOCHS / 10)) * LR / 10,
    "cosine": lambda t: LR * 0.5 * (1 + math.cos(t / EPOCHS * math.pi)),
    "cyclic": interpolated((0, 0), (0.5 * EPOCHS, LR), (EPOCHS, 0)),
    "constant": lambda t: LR,
}


@pytest.mark.parametrize("name", RICE)
def test_robust_overfitting(name):
    schedule = Schedule(name, EPOCHS, LR)
    assert lrs(schedule, [*TIMES, EPOCHS]) == pytest.approx([RICE[name](t) for t in [*TIMES, EPOCHS]], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("epochs", "starts"), [(76, (75, 90, 100)), (120, (75, 90, 100)), (100, (55, 75, 90))])
def test_trades_and_mart(epochs, starts):
    """Their epochs count from 1."""
    schedule = Schedule("piecewise", epochs, LR, milestones=[start - 1 for start in starts])
    for epoch in range(1, epochs + 1):
        expected = LR * 0.1 ** sum(epoch >= start for start in starts)
        for step in range(BATCHES):
            assert schedule.at(epoch - 1 + step / BATCHES)[0] == pytest.approx(expected, **CLOSE)


def test_rst():
    """A cosine that steps once an epoch, counted from 1."""
    schedule = Schedule("cosine", EPOCHS, LR, per="epoch")
    for epoch in range(1, EPOCHS + 1):
        expected = LR * 0.5 * (1 + math.cos((epoch - 1) / EPOCHS * math.pi))
        assert lrs(schedule, [epoch - 1, epoch - 0.5, epoch - 0.01]) == pytest.approx([expected] * 3, **CLOSE)


def test_deepmind():
    """Ten epochs of warm-up, then half a cosine over the rest."""
    lr, epochs, warmup = 0.4, 400, 10
    schedule = Schedule("cosine", epochs, lr, warmup=warmup)
    for t in (0, 1 / 98, 5, 9.99, 10, 10.5, 205, 399.99, 400):
        part = (t - warmup) / (epochs - warmup)
        expected = lr * t / warmup if t < warmup else lr * 0.5 * (1 + math.cos(math.pi * part))
        assert schedule.at(t)[0] == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("name", sorted(set(SHAPES) - set(CYCLES) - {"cosine"}))
def test_warmup_leads_to_the_shape(name):
    plain, warm = Schedule(name, EPOCHS, LR), Schedule(name, EPOCHS, LR, warmup=5)
    assert lrs(warm, [0, 1, 2.5]) == pytest.approx([0, LR / 5, LR / 2], **CLOSE)
    assert lrs(warm, [t for t in TIMES if t >= 5]) == lrs(plain, [t for t in TIMES if t >= 5])
    stepped = Schedule(name, EPOCHS, LR, warmup=5, per="epoch")
    assert lrs(stepped, [0, 0.9, 1, 4.9, 5]) == pytest.approx([LR / 5, LR / 5, 2 * LR / 5, LR, LR], **CLOSE)


def test_eps_of_gkl():
    """eps epoch/E, with epochs from 1."""
    eps = Curve("constant", EPOCHS, 8 / 255, per="epoch", warmup=EPOCHS)
    for epoch in range(1, EPOCHS + 1):
        for t in (epoch - 1, epoch - 0.5, epoch - 1e-9):
            assert eps.at(t) == pytest.approx(8 / 255 * epoch / EPOCHS, **CLOSE)
    assert eps.at(EPOCHS) == 8 / 255


def test_eps_over_the_first_epochs():
    eps = Curve("constant", EPOCHS, 8 / 255, warmup=10)
    assert [eps.at(t) for t in (0, 2.5, 10, 11, EPOCHS)] == pytest.approx([0, 2 / 255, 8 / 255, 8 / 255, 8 / 255], **CLOSE)
    assert Curve("constant", EPOCHS, 8 / 255).at(0) == 8 / 255


# ----------------------------------------------------------------------------------------------------- whatever the name


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("per", ["iteration", "epoch", None])
@pytest.mark.parametrize("epochs", [0.5, 1, 2, 3, 40, 200])
def test_values_are_parts_of_the_largest(name, per, epochs):
    curve = Curve(name, epochs, 3.0, per=per)
    values = [curve.at(epochs * i / 360) for i in range(361)]
    assert all(0 <= v <= 3.0 + 1e-12 for v in values)
    if epochs >= 40 and per != "epoch":
        assert max(values) == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize("name", SHAPES)
def test_per_epoch_holds_what_the_epoch_begins_with(name):
    held, followed = Curve(name, 20, 1.0, per="epoch"), Curve(name, 20, 1.0, per="iteration")
    for t in (0, 3, 10, 19, 20):
        assert {held.at(min(t + part, 20)) for part in (0, 0.25, 0.999)} == {held.at(t)}
        if name != "cosinew":
            assert held.at(t) == followed.at(t)


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_is_remembered(name):
    schedule = Schedule(name, EPOCHS, LR)
    forwards = [schedule.at(t) for t in SPARSE]
    assert [schedule.at(t) for t in reversed(SPARSE)] == forwards[::-1]
    assert [Schedule(name, EPOCHS, LR).at(t) for t in SPARSE] == forwards


def test_momentum():
    assert Schedule("cosine", 10, 1.0).at(5)[1] is None
    assert Schedule("cosine", 10, 1.0, momentum=0.9).at(5)[1] == 0.9
    assert Schedule("cosinew", 400, 1.0, momentum=0.9).at(9)[1] == 0.9  # said so: it does not cycle
    assert Schedule("cyclic", 10, 1.0).at(5)[1] is None
    assert Schedule("cyclic", 10, 1.0, momentum=[0.8, 0.9]).at(2.5)[1] == pytest.approx(0.85)  # a list, as of YAML
    assert Schedule("superconverge", 10, 1.0, momentum=(0.8, 0.9)).at(4)[1] == pytest.approx(0.8)


def test_none_is_the_default():
    """So that a configuration file may leave arguments empty."""
    assert Schedule("piecewise", 8, 1.0, per=None, milestones=None, factor=None).at(5) == Schedule("piecewise", 8, 1.0).at(5)


# ------------------------------------------------------------------------------------------------------------- optimizers


def test_every_group_is_set():
    """Rice's code forgets all but the first."""
    optimizer = SGD([{"params": weights()}, {"params": weights(), "lr_scale": 0.1}, {"params": weights()}], lr=7.0)
    Schedule("piecewise", EPOCHS, LR, momentum=0.8).set(optimizer, 120)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.001, 0.01])
    assert [group["momentum"] for group in optimizer.param_groups] == [0.8] * 3


def test_setting_is_not_cumulative_and_survives_resuming():
    def build():
        return SGD([{"params": weights(), "lr_scale": 0.5}, {"params": weights()}], lr=1.0)

    schedule, optimizer = Schedule("cosine", 10, 1.0), build()
    for t in (3, 1, 5, 5):
        schedule.set(optimizer, t)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25, 0.5])
    resumed = build()
    resumed.load_state_dict(optimizer.state_dict())
    schedule.set(resumed, 0)
    assert [group["lr"] for group in resumed.param_groups] == [0.5, 1.0]


def test_adam_has_its_momentum_in_betas():
    optimizer = AdamW([{"params": weights()}, {"params": weights(), "betas": (0.9, 0.95)}], lr=1.0)
    Schedule("cosinew", 400, 0.2).set(optimizer, 9)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.85, 0.999), (0.85, 0.95)]
    Schedule("cosine", 400, 0.2).set(optimizer, 9)
    assert [group["betas"][0] for group in optimizer.param_groups] == [0.85, 0.85]  # left alone


def test_other_optimizers():
    rms = RMSprop(weights(), lr=1.0)
    Schedule("cosine", 10, 0.2, momentum=0.9).set(rms, 0)
    assert (rms.param_groups[0]["lr"], rms.param_groups[0]["momentum"]) == (0.2, 0.9)
    ada = torch.optim.Adagrad(weights(), lr=1.0)
    Schedule("cosine", 10, 0.2).set(ada, 0)
    assert ada.param_groups[0]["lr"] == 0.2
    with pytest.raises(ValueError, match=r"momentum must be None for Adagrad, which has none; got 0.9"):
        Schedule("cosine", 10, 0.2, momentum=0.9).set(ada, 0)


def test_a_learning_rate_in_a_tensor_changes_in_place():
    """torch gives all groups one and the same, which may not go on where scales differ."""
    groups = [{"params": weights()}, {"params": weights(), "lr_scale": 0.5}, {"params": weights(), "lr_scale": 0.1}]
    optimizer = AdamW(groups, lr=torch.tensor(1.0), foreach=False, capturable=False)
    schedule = Schedule("cosine", 10, 1.0)
    schedule.set(optimizer, 0)
    first = [group["lr"] for group in optimizer.param_groups]
    assert [float(lr) for lr in first] == pytest.approx([1.0, 0.5, 0.1])
    schedule.set(optimizer, 5)
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, first, strict=True))
    assert [float(lr) for lr in first] == pytest.approx([0.5, 0.25, 0.05])


def test_training_with_a_schedule_is_training_with_torchs():
    """The same weights, to the bit where the values are."""

    def train(step: Callable[[SGD, int], None], groups: bool) -> torch.Tensor:
        p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        optimizer = SGD([{"params": [p]}, {"params": [q], "weight_decay": 0.1}] if groups else [p], lr=0.1, momentum=0.9)
        for i in range(30):
            optimizer.zero_grad()
            (p.square().sum() + (q.square().sum() if groups else 0)).backward()
            step(optimizer, i)
        return torch.cat([p, q]).detach()

    def torchs(optimizer: SGD, i: int) -> None:
        optimizer.step()
        kept.setdefault(id(optimizer), lr_scheduler.MultiStepLR(optimizer, [10, 20])).step()

    def ours(optimizer: SGD, i: int) -> None:
        schedule.set(optimizer, i)
        optimizer.step()

    schedule = Schedule("piecewise", 30, 0.1, milestones=[10, 20])
    for groups in (False, True):
        kept: dict[int, lr_scheduler.MultiStepLR] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = train(torchs, groups)
        torch.testing.assert_close(train(ours, groups), expected, rtol=1e-6, atol=0)


# ----------------------------------------------------------------------------------------------------------------- errors

WRONG = {
    "name must be one of .*'cosinew'.*; got 'cosin'; did you mean 'cosine'": {"name": "cosin"},
    r"name must be one of .*; got 3$": {"name": 3},
    "name must be one of .*; got \\['cosine'\\]": {"name": ["cosine"]},
    "'piecewise' must be one of 'milestones', 'factor'; got 'milestone'; did you mean 'milestones'": {"milestone": 3},
    "'piecewise' must be .*; got 'held'": {"held": 1.0},
    "'constant' takes no arguments of its own; got 'factor'": {"name": "constant", "factor": 0.1},
    "epochs must be a finite number > 0; got 0": {"epochs": 0},
    "epochs must be a finite number > 0; got 'ten'": {"epochs": "ten"},
    "lr must be a finite number >= 0; got -1": {"lr": -1},
    "lr must be a finite number >= 0; got nan": {"lr": math.nan},
    "per must be one of 'iteration', 'epoch'; got 'epochs'; did you mean 'epoch'": {"per": "epochs"},
    "warmup must be a finite number >= 0; got -1": {"warmup": -1},
    "warmup must be at most epochs = 10; got 11": {"warmup": 11},
    "warmup must be 0 for 'cyclic', which rises by itself; got 1": {"name": "cyclic", "warmup": 1},
    "milestones must be rising numbers of epochs; got \\[5, 3\\]": {"milestones": [5, 3]},
    "milestones must be rising numbers of epochs; got 5": {"milestones": 5},
    "milestones must be rising numbers of epochs; got \\(\\)": {"milestones": ()},
    "milestones must be a finite number >= 0; got 'x'": {"milestones": ["x"]},
    "factor must be a finite number >= 0; got -0.1": {"factor": -0.1},
    "rise must be a part of the whole, from 0 to 1; got 3": {"name": "cyclic", "rise": 3},
    "final must be a part of the whole, from 0 to 1; got 2": {"name": "cosine", "final": 2},
    r"momentum must be a number in \[0, 1\), .*; got 1$": {"momentum": 1},
    r"momentum must be .*; got \(0.9, 0.8\)": {"name": "cyclic", "momentum": (0.9, 0.8)},
    r"momentum must be .*; got \(0.9,\)": {"name": "cyclic", "momentum": (0.9,)},
    "momentum must be a finite number >= 0; got 'a'": {"momentum": "ab"},
    r"momentum must be one number for 'piecewise', which never rises; got \(0.8, 0.9\)": {"momentum": (0.8, 0.9)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"name": "piecewise", "epochs": 10, "lr": 1.0} | WRONG[message])


@pytest.mark.parametrize("t", [-0.001, 10.001, math.nan, math.inf])
def test_time_is_within_training(t):
    with pytest.raises(ValueError, match=r"t must be the epochs done, from 0 to 10; got"):
        Schedule("cosine", 10, 1.0).at(t)


# ----------------------------------------------------------------------------------------------------------------- groups


class RMSNorm2d(nn.Module):
    """As people write their own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))


class NormedLinear(nn.Module):
    """Whose weight is none of a normalisation layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 5, 4))
        self.stem, self.batch, self.group = nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.layer, self.rms, self.head = nn.LayerNorm([2, 4]), RMSNorm2d(), NormedLinear()
        self.attention = nn.MultiheadAttention(4, 2)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.stem.bias.requires_grad_(False)


NORMS = {"batch.weight", "batch.bias", "group.weight", "group.bias", "layer.weight", "layer.bias", "rms.gain"}
BIASES = {"stem.bias", "batch.bias", "group.bias", "layer.bias", "attention.in_proj_bias", "attention.out_proj.bias"}
BIASES |= {"tied.bias", "cls_token", "pos_embed"}


@pytest.mark.parametrize(
    ("norms", "biases", "spared"),
    [(True, True, set()), (False, True, NORMS), (True, False, BIASES), (False, False, NORMS | BIASES)],
)
def test_what_decays(norms, biases, spared):
    model = ViT()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups(model, 5e-4, decay_norms=norms, decay_biases=biases)
    found = [[names[id(p)] for p in group["params"]] for group in groups]
    assert [group["weight_decay"] for group in groups] == ([5e-4, 0.0] if spared else [5e-4])
    assert set(found[0]) == set(names.values()) - spared
    assert set().union(*found[1:]) == spared
    assert sum(map(len, found)) == len(names)  # each once, the tied and the frozen one too
    SGD(groups, lr=0.1)


def test_weight_decay_is_checked():
    with pytest.raises(ValueError, match="weight_decay must be a finite number >= 0; got -1"):
        param_groups(nn.Linear(2, 2), -1)
