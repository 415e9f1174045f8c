"""AWP and RWP on models: the papers' arithmetic, weights that always come back, and what a training loop has around them."""

from __future__ import annotations

import copy
import math
import signal
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import (
    batch,
    one_thread,  # noqa: F401
    seeded,
    state,
    surroundings,
)
from torch import Tensor, nn

import fastadv
from fastadv import ops
from fastadv.weights import conv_and_linear_weights

GAMMA, LR, STEPS = 0.05, 0.1, 20
EXACT = {"rtol": 0.0, "atol": 1e-12}


class Net(nn.Module):
    """One of everything: batch norms, a tied, a frozen, an unused and an empty weight, a 2-D parameter that is no weight."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)
        self.conv, self.norm2 = nn.Conv2d(4, 5, 2), nn.BatchNorm2d(5)
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, 20))
        self.mix, self.remix = nn.Linear(20, 20), nn.Linear(20, 20)
        self.remix.weight = self.mix.weight
        self.dropout = nn.Dropout(dropout)
        self.unused = nn.Linear(3, 3)
        self.empty = nn.ParameterDict({"weight": nn.Parameter(torch.empty(0, 4))})
        self.head = nn.Linear(20, 10)
        self.stem.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.norm(self.stem(x)))
        z = F.relu(self.norm2(self.conv(z))).flatten(1) + self.pos_embed
        return self.head(self.dropout(self.remix(F.relu(self.mix(z)))))


MOVED = ["conv.weight", "mix.weight", "head.weight"]  # of those selected, the ones that have a gradient


@seeded
def net(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Net:
    return Net(dropout).to(dtype).train()


def images(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x, y = batch(8, dtype=dtype)
    return x, y, (x + 0.05 * (batch(9, dtype=dtype)[0][:8] - 0.5)).clamp(0, 1)


def ce(model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    _, y, x_adv = images(dtype)
    return F.cross_entropy(model(x_adv), y)


def trades(model: nn.Module) -> Tensor:
    x, y, x_adv = images()
    clean = model(x)
    kl = F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(clean, 1), reduction="batchmean")
    return F.cross_entropy(clean, y) + 6 * kl


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moved(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=0.05)


def gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor] = ce) -> dict[str, Tensor]:
    """By backward on a copy, of all parameters."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    loss(twin).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in twin.named_parameters()}


# ----------------------------------------------------------------------------------------------- the papers' arithmetic


class ProxyAWP:
    """As the authors' code: a second model takes an SGD step up the loss; the difference of the two models is the direction."""

    def __init__(self, model: nn.Module, gamma: float) -> None:
        self.model, self.proxy, self.gamma = model, copy.deepcopy(model), gamma
        self.optimizer = torch.optim.SGD(self.proxy.parameters(), lr=1.0)

    def difference(self, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
        self.proxy.load_state_dict(self.model.state_dict())
        self.proxy.train()
        self.optimizer.zero_grad()
        (-loss(self.proxy)).backward()
        self.optimizer.step()
        difference = {}
        for (name, old), new in zip(self.model.state_dict().items(), self.proxy.state_dict().values(), strict=True):
            if old.dim() > 1 and "weight" in name:
                d = new - old
                difference[name] = self.gamma * old.norm() / (d.norm() + 1e-20) * d
        return difference

    @torch.no_grad()
    def add(self, difference: dict[str, Tensor], sign: int) -> None:
        for name, p in self.model.named_parameters():
            if name in difference:
                p.add_(sign * difference[name])


@pytest.mark.parametrize("loss", [ce, trades])
@pytest.mark.parametrize("restore", ["after_step", "before_step"])
def test_twenty_steps_equal_the_authors_algorithm(restore, loss):
    """Everything in the state dict, batch statistics and their counters included, under momentum and weight decay."""
    ours, theirs = net(), net()
    awp, proxy = fastadv.AWP(ours, GAMMA, restore=restore), ProxyAWP(theirs, GAMMA)
    optimizer, their_optimizer = sgd(ours), sgd(theirs)
    for _ in range(STEPS):
        with awp.perturb(lambda: loss(ours)):
            optimizer.zero_grad()
            loss(ours).backward()
            if restore == "after_step":
                optimizer.step()
        if restore == "before_step":
            optimizer.step()

        difference, saved = proxy.difference(loss), weights(theirs)
        proxy.add(difference, +1)
        their_optimizer.zero_grad()
        loss(theirs).backward()
        if restore == "after_step":
            their_optimizer.step()
            proxy.add(difference, -1)
        else:
            with torch.no_grad():
                for name, p in theirs.named_parameters():
                    p.copy_(saved[name])
            their_optimizer.step()
    assert ours.norm.num_batches_tracked == STEPS * (2 if loss is trades else 1)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **EXACT)
    assert moved(ours, weights(net())) != [], "training happened"


def test_the_two_orders_differ_by_weight_decay_alone():
    results = {}
    for restore in ("before_step", "after_step"):
        for decay in (0.0, 0.05):
            model = net()
            awp = fastadv.AWP(model, GAMMA, restore=restore)
            optimizer = torch.optim.SGD(model.parameters(), LR, weight_decay=decay)
            with awp.perturb(lambda model=model: ce(model)):
                ce(model).backward()
                if restore == "after_step":
                    optimizer.step()
            if restore == "before_step":
                optimizer.step()
            results[restore, decay] = model.state_dict()
    torch.testing.assert_close(results["before_step", 0.0], results["after_step", 0.0], **EXACT)
    assert (results["before_step", 0.05]["mix.weight"] - results["after_step", 0.05]["mix.weight"]).abs().max() > 1e-6


def test_one_step_is_the_closed_formula():
    model = net()
    before, grads = weights(model), gradients(model)
    with fastadv.AWP(model, GAMMA).perturb(lambda: ce(model)):
        assert moved(model, before) == MOVED
        for name, p in model.named_parameters():
            if name in MOVED:
                w, g = before[name], grads[name]
                torch.testing.assert_close(p, w + GAMMA * w.norm() / g.norm() * g, **EXACT)


@pytest.mark.parametrize(("alpha", "steps"), [(GAMMA / 2, 3), (GAMMA / 2, 1), (2 * GAMMA, 2), (None, 3), (0.0, 1)])
def test_several_steps_and_the_projection(alpha, steps):
    """Against a loop in PyTorch. One step of half the radius ends inside; three of it, or one of twice, on the sphere."""
    model, plain = net(), net()
    origins = weights(plain)
    for _ in range(steps):
        grads = gradients(plain)
        with torch.no_grad():
            for name, p in plain.named_parameters():
                if name in MOVED:
                    o, g = origins[name], grads[name]
                    v = p - o + (GAMMA if alpha is None else alpha) * o.norm() * g / g.norm()
                    p.copy_(o + v * min(1.0, GAMMA * o.norm() / v.norm()) if v.any() else o)
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        return ce(model)

    with fastadv.AWP(model, GAMMA, alpha, steps).perturb(loss):
        torch.testing.assert_close(weights(model), weights(plain), **EXACT)
    assert calls == steps
    assert same(weights(model), origins)


def test_it_raises_the_loss():
    model = net()
    before = ce(model).item()
    with fastadv.AWP(model, GAMMA).perturb(lambda: ce(model)):
        assert ce(model).item() > 1.02 * before


def test_a_small_gradient_in_fp32_keeps_its_direction():
    """The difference of two models, w' - w, rounds to w's precision: at this gradient 1 % of the direction would be left."""
    model = net(torch.float32)
    before, grads = weights(model), gradients(model, lambda m: ce(m, torch.float32))
    with fastadv.AWP(model, 0.5).perturb(lambda: 1e-8 * ce(model, torch.float32)):
        for name in MOVED:
            v, g = (model.get_parameter(name) - before[name]).flatten(), grads[name].flatten()
            assert F.cosine_similarity(v, g, dim=0) > 1 - 1e-6


# --------------------------------------------------------------------------------------------- the weights come back


@pytest.mark.parametrize("restore", ["before_step", "after_step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_restored_bit_for_bit(dtype, restore):
    """In "after_step" too, where nothing stepped; w + v - v is off in the last places of most elements."""
    model = net(dtype)
    awp, before = fastadv.AWP(model, GAMMA, restore=restore), weights(model)
    for _ in range(3):
        with awp.perturb(lambda: ce(model, dtype)):
            assert moved(model, before) == MOVED
            ce(model, dtype).backward()
        assert same(weights(model), before)


@pytest.mark.parametrize("restore", ["before_step", "after_step"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", ["first loss", "second loss", "block"])
def test_restored_after_an_exception(failing, error, restore):
    model = net()
    awp, calls = fastadv.AWP(model, GAMMA, steps=2, restore=restore), 0
    before = state(model)[0], weights(model), {name: b.clone() for name, b in model.named_buffers()}

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        value = ce(model)
        if failing == ("first loss", "second loss")[calls - 1]:
            raise error("as the test asked")
        return value

    def block() -> None:
        with awp.perturb(loss):
            assert failing == "block"
            assert moved(model, before[1]) == MOVED
            raise error("as the test asked")

    with pytest.raises(error, match="as the test asked"):
        block()
    assert same(weights(model), before[1])
    assert same(dict(model.named_buffers()), before[2])
    assert state(model)[0] == before[0]
    failing = ""
    calls = 0
    with awp.perturb(loss):  # the same object works on
        assert moved(model, before[1]) == MOVED
    assert same(weights(model), before[1])


@pytest.mark.parametrize("restore", ["before_step", "after_step"])
@pytest.mark.parametrize("k", range(8))
def test_restored_after_an_interrupt_behind_each_kernel(k, restore, monkeypatch):
    """The kernel has done its work, and nothing that follows it has."""
    model = net()
    awp, before, calls = fastadv.AWP(model, GAMMA, steps=2, restore=restore), weights(model), 0

    def interrupted(function: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal calls
            result = function(*args, **kwargs)
            calls += 1
            if calls == k + 1:
                raise KeyboardInterrupt
            return result

        return call

    for op in ("weight_sums", "perturb_", "restore_"):
        monkeypatch.setattr(ops, op, interrupted(getattr(ops, op)))
    if k < 7:  # two steps: buffers back, sums, step; then the weights back, or a copy of the moved ones
        with pytest.raises(KeyboardInterrupt), awp.perturb(lambda: ce(model)):
            pass
    else:
        with awp.perturb(lambda: ce(model)):
            assert calls == 6 + (restore == "after_step")
    assert same(weights(model), before)
    assert not awp._active


def where_signals_arrive(n: int) -> Callable:
    """A profiler that raises at the n-th place in our code or contextlib's where CPython looks for signals: a function's
    start, and behind a C function. ``seen`` counts them."""

    def profile(frame, event, _):
        files = ("weights.py", "ops.py", "contextlib.py")
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith(files):
            profile.seen += 1
            if profile.seen == n:
                raise KeyboardInterrupt

    profile.seen = 0
    return profile


@pytest.mark.parametrize("restore", ["before_step", "after_step"])
def test_restored_after_an_interrupt_at_every_place_where_python_takes_one(restore):
    """In "after_step" that, or the step is whole. (A signal at the first instruction of contextlib's ``__exit__`` finds the
    generator suspended: the weights return when the traceback, which holds it, is dropped. That is how ``with`` is.)"""
    model = nn.Linear(3, 2)
    x = torch.ones(1, 3)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    awp, before = fastadv.AWP(model, GAMMA, restore=restore), model.weight.detach().clone()
    with awp.perturb(lambda: model(x).square().sum()):
        pass  # the first call allocates
    stepped, seen, n = before, 0, 0
    while n <= seen:  # n = 0: none, which counts them
        with torch.no_grad():
            model.weight.copy_(before)
        profile = where_signals_arrive(n)
        interrupted = False
        try:
            sys.setprofile(profile)
            with awp.perturb(lambda: model(x).square().sum()):
                model.weight.grad = torch.ones_like(model.weight)
                if restore == "after_step":
                    optimizer.step()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.setprofile(None)
            torch.set_grad_enabled(True)  # torch.no_grad's own exit may have been what was interrupted
        assert interrupted == (n > 0)
        if n == 0:
            seen, stepped = profile.seen, model.weight.detach().clone()
            assert seen > 50
            assert torch.equal(stepped, before) == (restore == "before_step")
        else:
            assert torch.equal(model.weight, before) or torch.equal(model.weight, stepped), n
            assert not awp._active
        n += 1


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers on this system")
def test_restored_after_real_signals():
    model = nn.Linear(3, 2)
    x = torch.ones(1, 3)
    awp, before, interrupts = fastadv.AWP(model, GAMMA), model.weight.detach().clone(), 0

    def handler(*_):
        raise KeyboardInterrupt

    def train() -> None:
        while True:
            with awp.perturb(lambda: model(x).square().sum()):
                model(x).sum().backward()

    previous = signal.signal(signal.SIGALRM, handler)
    delays = torch.empty(300).uniform_(1e-5, 3e-3, generator=torch.Generator().manual_seed(0)).tolist()
    try:
        for delay in delays:
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                train()
            except KeyboardInterrupt:
                interrupts += 1
            torch.set_grad_enabled(True)  # torch.no_grad's own exit may have been what was interrupted
            assert torch.equal(model.weight, before)
            assert not awp._active
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupts == len(delays)


def test_a_nan_loss_moves_nothing():
    model = net()
    before = weights(model)
    with fastadv.AWP(model, GAMMA).perturb(lambda: math.nan * ce(model)):
        assert moved(model, before) == []
    assert same(weights(model), before)


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_step_inside_before_step_is_refused(build, options):
    """It would be lost without a word. Refused before it is done: biases, momentum and step counts stay too."""
    model = net()
    awp, before, optimizer = fastadv.AWP(model, GAMMA), weights(model), build(model.parameters(), LR, **options)
    ce(model).backward()
    match = r"call optimizer\.step\(\) after the block, or use restore='after_step'"
    with pytest.raises(RuntimeError, match=match), awp.perturb(lambda: ce(model)):
        optimizer.step()
    assert same(weights(model), before)
    assert not optimizer.state
    other = build([nn.Parameter(torch.ones(2, 2))], LR, **options)
    other.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    with awp.perturb(lambda: ce(model)):
        other.step()  # is nobody's business
    optimizer.step()
    assert set(MOVED) < set(moved(model, before))


def test_any_other_change_inside_before_step_is_refused():
    model = net()
    awp, before = fastadv.AWP(model, GAMMA), weights(model)
    with pytest.raises(RuntimeError, match="that change would be lost"), awp.perturb(lambda: ce(model)):
        model.mix.weight.detach().mul_(0.9)
    assert same(weights(model), before)


def test_perturb_inside_perturb_is_refused():
    model = net()
    awp, before = fastadv.AWP(model, GAMMA), weights(model)
    with pytest.raises(RuntimeError, match="already perturbed"), awp.perturb(lambda: ce(model)), awp.perturb(lambda: ce(model)):
        raise AssertionError("entered")
    assert same(weights(model), before)
    with pytest.raises(RuntimeError, match="already perturbed"):  # noqa: SIM117
        with awp.perturb(lambda: awp.perturb(lambda: ce(model)).__enter__() or ce(model)):
            raise AssertionError("entered")
    assert same(weights(model), before)
    with awp.perturb(lambda: ce(model)):
        assert moved(model, before) == MOVED


def test_the_backups_are_allocated_once():
    model = net()
    awp = fastadv.AWP(model, GAMMA, restore="after_step", steps=2)

    def pointers() -> list[int]:
        with awp.perturb(lambda: ce(model)):
            pass
        return [b.data_ptr() for buffers in awp._buffers.values() for b in buffers if b.numel()]

    first = pointers()
    assert len(first) == 2 * (len(MOVED) + 1)  # and the unused weight
    assert pointers() == first
    model.mix = nn.Linear(20, 20, dtype=torch.float64)  # one more weight, now that the tie is cut
    assert len(pointers()) == 2 * (len(MOVED) + 2)
    assert pointers() == pointers()


# ------------------------------------------------------------------------------------------------ what the ascent leaves


def test_the_ascent_leaves_the_model_as_found():
    """All but the weights: gradients by identity, version and bits, buffers, modes, flags, generators."""
    model = net()
    ce(model).backward()
    model.head.weight.grad = None
    model.norm.eval()  # as fine-tuning code does
    trainable = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda _: pytest.fail("accumulated")) for p in trainable]
    kept = [(p.grad, p.grad is not None and (p.grad.clone(), p.grad._version)) for p in model.parameters()]
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    modes = [(m, m.training) for m in model.modules()]
    frozen = [p.requires_grad for p in model.parameters()]
    around = surroundings()
    with fastadv.AWP(model, GAMMA, steps=2).perturb(lambda: ce(model)):
        assert surroundings() == around, "no generator was touched"
        assert [(m, m.training) for m in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == frozen
        for p, (grad, was) in zip(model.parameters(), kept, strict=True):
            assert p.grad is grad
            assert not was or (torch.equal(grad, was[0]) and grad._version == was[1])
        for name, b in model.named_buffers():
            assert b is buffers[name][0]
            assert torch.equal(b, buffers[name][1])
    for hook in hooks:
        hook.remove()
    assert surroundings() == around


class Centres(nn.Module):
    """Binds its buffer anew instead of writing into it, as much user code does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 10).double()
        self.register_buffer("centre", torch.zeros(10).double())

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc(x.flatten(1))
        self.centre = 0.9 * self.centre + 0.1 * z.mean(0).detach()
        return z - self.centre


def test_buffers_that_a_model_binds_anew_are_restored_too():
    model = Centres()
    buffer = model.centre
    with fastadv.AWP(model, GAMMA).perturb(lambda: ce(model)):
        assert model.centre is buffer
        assert not buffer.any()
        ce(model)
        assert model.centre.any()


def test_dropout_draws_in_both_passes_and_nothing_else_draws():
    """Two forwards, two masks from the global generator, as with the papers' second model."""
    model = net(dropout=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model(images()[0])
        model(images()[0])
        expected = torch.get_rng_state()
        torch.manual_seed(5)
        before = weights(model)
        with fastadv.AWP(model, GAMMA).perturb(lambda: ce(model)):
            ce(model)
        assert torch.equal(torch.get_rng_state(), expected)
        assert same(weights(model), before)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad_and_inference_mode(around):
    """And the same object outside of them afterwards."""
    model = net()
    awp, before = fastadv.AWP(model, GAMMA, restore="after_step", steps=2), weights(model)
    with around(), awp.perturb(lambda: ce(model)):
        inside = weights(model)
    assert same(weights(model), before)
    with awp.perturb(lambda: ce(model)):
        assert same(weights(model), inside)
        ce(model).backward()
    assert same(weights(model), before)


# ---------------------------------------------------------------------------------------------------- which weights move


def test_the_papers_selection():
    """Conv and linear weights; no bias, no batch norm, no embedding of positions. Others would need a predicate."""
    assert [name for name, p in net().named_parameters() if conv_and_linear_weights(name, p)] == [
        "stem.weight", "conv.weight", "mix.weight", "unused.weight", "empty.weight", "head.weight",
    ]  # fmt: skip


def test_a_predicate_selects():
    model = net()
    before = weights(model)
    with fastadv.AWP(model, GAMMA, select=lambda name, p: name in ("pos_embed", "mix.bias")).perturb(lambda: ce(model)):
        assert moved(model, before) == ["pos_embed", "mix.bias"]
    assert same(weights(model), before)


def test_a_tied_weight_moves_once():
    """The formula holds for it with the gradient of both uses; moved twice, it would be off by the same again."""
    model = net()
    w, g = model.mix.weight.detach().clone(), gradients(model)["mix.weight"]
    with fastadv.AWP(model, GAMMA).perturb(lambda: ce(model)):
        assert model.remix.weight is model.mix.weight
        torch.testing.assert_close((model.mix.weight - w).norm(), GAMMA * w.norm(), **EXACT)
        torch.testing.assert_close(model.mix.weight - w, GAMMA * w.norm() / g.norm() * g, **EXACT)


def test_zero_gradients_and_zero_weights_stay():
    model = net()
    with torch.no_grad():
        model.conv.weight.zero_()
    before = weights(model)
    with fastadv.AWP(model, GAMMA).perturb(lambda: 0 * ce(model)):
        assert moved(model, before) == []
    with fastadv.AWP(model, GAMMA).perturb(lambda: ce(model)):
        assert moved(model, before) == ["mix.weight", "head.weight"], "a ball of radius gamma * 0"


def test_parameters_frozen_thawed_or_replaced_later():
    model = net()
    awp = fastadv.AWP(model, GAMMA)

    def moves() -> list[str]:
        before = weights(model)
        with awp.perturb(lambda: ce(model)):
            names = moved(model, before)
        assert same(weights(model), before)
        return names

    assert moves() == MOVED
    model.conv.weight.requires_grad_(False)
    assert moves() == ["mix.weight", "head.weight"]
    model.conv.weight.requires_grad_(True)
    model.stem.weight.requires_grad_(True)
    assert moves() == ["stem.weight", *MOVED]
    model.head = nn.Linear(20, 10, dtype=torch.float64)  # a new head for a new task
    model.mix.weight = nn.Parameter(torch.randn(20, 20, dtype=torch.float64))  # and untied
    assert moves() == ["stem.weight", "conv.weight", "mix.weight", "remix.weight", "head.weight"]


def test_nothing_to_perturb():
    for model, select in (
        (nn.BatchNorm2d(3), conv_and_linear_weights),
        (net().requires_grad_(False), conv_and_linear_weights),
        (net(), lambda name, p: False),
    ):
        with pytest.raises(ValueError, match="no parameter to perturb"):
            fastadv.AWP(model, select=select)
    model = net()
    awp = fastadv.AWP(model, GAMMA)
    model.requires_grad_(False)  # later, as in linear probing: the block runs
    before = weights(model)
    with awp.perturb(lambda: pytest.fail("no ascent without weights")):
        pass
    assert same(weights(model), before)


# --------------------------------------------------------------------------------------------------- counting and refusing


def test_warm_up_counts_calls_and_goes_on_from_a_checkpoint():
    model, before = net(), weights(net())

    def perturbs(awp: fastadv.AWP) -> bool:
        with awp.perturb(lambda: ce(model)):
            return bool(moved(model, before))

    awp = fastadv.AWP(model, GAMMA, warmup=3)
    assert [perturbs(awp) for _ in range(2)] == [False, False]
    resumed = fastadv.AWP(model, GAMMA, warmup=3)
    resumed.load_state_dict(copy.deepcopy(awp.state_dict()))
    assert [perturbs(a) for a in (awp, resumed) for _ in range(3)] == [False, True, True, False, True, True]
    assert awp.state_dict() == resumed.state_dict() == {"calls": 5}


def test_what_perturbs_nothing_computes_nothing():
    """gamma 0 and warm-up: no ascent, no copy; the block may step as it likes."""
    for options in ({"gamma": 0.0}, {"gamma": 0}, {"warmup": 1}):
        model = net()
        before, awp, optimizer = weights(model), fastadv.AWP(model, **options), sgd(model)
        with awp.perturb(lambda: pytest.fail("the loss was called")):
            assert moved(model, before) == []
            ce(model).backward()
            optimizer.step()
        assert moved(model, before) != []
        assert not awp._buffers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": lambda x: x}, r"model must be an nn\.Module; got function"),
        ({"gamma": -0.1}, r"gamma must be a finite number >= 0, relative to each weight's norm; got -0\.1"),
        ({"gamma": math.nan}, r"gamma must be .*; got nan"),
        ({"gamma": math.inf}, r"gamma must be .*; got inf"),
        ({"gamma": "0.1"}, r"gamma must be .*; got '0\.1'"),
        ({"gamma": True}, r"gamma must be .*; got True"),
        ({"gamma": None}, r"gamma must be .*; got None"),
        ({"alpha": -1.0}, r"alpha must be a finite number >= 0, relative to each weight's norm; got -1\.0"),
        ({"alpha": math.nan}, r"alpha must be .*; got nan"),
        ({"steps": 0}, r"steps must be an integer >= 1; got 0"),
        ({"steps": 1.5}, r"steps must be .*; got 1\.5"),
        ({"warmup": -1}, r"warmup must be an integer >= 0, in calls of perturb\(\); got -1"),
        ({"warmup": True}, r"warmup must be .*; got True"),
        ({"warmup": 2.0}, r"warmup must be .*; got 2\.0"),
        ({"sync": "none"}, r"sync must be one of 'auto', 'global', 'local'; got 'none'"),
        ({"restore": "never"}, r"restore must be one of 'before_step', 'after_step'; got 'never'"),
        ({"select": ["weight"]}, r"select must be callable on \(name, parameter\); got list"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        fastadv.AWP(**({"model": net()} | options))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m: None, r"loss\(\) must return a scalar tensor that depends on the model's weights; got NoneType"),
        (lambda m: 1.0, r"loss\(\) must return .*; got float"),
        (lambda m: m(images()[0]), r"loss\(\) must return .*; got \[8, 10\] torch\.float64 on cpu"),
        (lambda m: ce(m).detach(), r"loss\(\) must return .*; got \[\] torch\.float64 on cpu"),
    ],
)
def test_bad_losses_are_refused(loss, message):
    model = net()
    before, awp = weights(model), fastadv.AWP(model)
    with pytest.raises(ValueError, match=message), awp.perturb(lambda: loss(model)):
        raise AssertionError("entered")
    assert same(weights(model), before)
    assert not awp._active
    with pytest.raises(ValueError, match=r"loss must be callable without arguments and return the scalar to .*; got Tensor"):
        awp.perturb(ce(model))


def test_a_loss_of_one_element_is_a_scalar():
    model = net()
    before = weights(model)
    with fastadv.AWP(model, GAMMA).perturb(lambda: ce(model)[None]):
        assert moved(model, before) == MOVED


# ------------------------------------------------------------------------------------------------- what users have around it


def test_under_one_autocast_context():
    """Autocast caches what it has cast: the ascent's bf16 weights must not serve the training pass, nor its the next."""
    model, x = nn.Linear(192, 10), images(torch.float32)[0].flatten(1)
    with torch.autocast("cpu", torch.bfloat16):
        clean = model(x).detach()
        with fastadv.AWP(model, 0.5).perturb(lambda: model(x).square().sum()):
            perturbed = model(x).detach()
            expected = F.linear(x, model.weight.detach().clone(), model.bias)  # a tensor that no cache knows
            assert torch.equal(perturbed, expected)
            assert not torch.equal(perturbed, clean)
        assert torch.equal(model(x), clean)


def test_every_step_of_an_ascent_under_autocast_sees_the_weights_of_the_step_before():
    model, x = nn.Linear(192, 10), images(torch.float32)[0].flatten(1)
    values = []

    def loss() -> Tensor:
        values.append(model(x).float().square().sum())
        return values[-1]

    with torch.autocast("cpu", torch.bfloat16), fastadv.AWP(model, 0.5, alpha=0.2, steps=3).perturb(loss):
        pass
    assert values[0] < values[1] < values[2]


def test_a_grad_scaler_changes_nothing():
    """Scales are powers of two, so to the bit; also where an overflow makes it skip a step."""
    results = []
    for enabled in (False, True):
        model = net(torch.float32)
        awp, optimizer = fastadv.AWP(model, GAMMA, restore="after_step"), sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, enabled=enabled)
        for _ in range(5):
            with awp.perturb(lambda model=model, scaler=scaler: scaler.scale(ce(model, torch.float32))):
                optimizer.zero_grad()
                scaler.scale(ce(model, torch.float32)).backward()
                scaler.step(optimizer)
                scaler.update()
        results.append(model.state_dict())
    assert same(*results)
    before, model.head.bias.grad = weights(model), None
    with awp.perturb(lambda: scaler.scale(ce(model, torch.float32))):
        optimizer.zero_grad()
        (math.inf * scaler.scale(ce(model, torch.float32))).backward()
        scaler.step(optimizer)
    assert same(weights(model), before), "skipped, and restored exactly"


def test_gradients_accumulate_over_micro_batches_in_one_block():
    """The gradient of two halves at one perturbation is that of the whole."""
    x, y, _ = images()
    grads = []
    for halves in (1, 2):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.ReLU(), nn.Linear(20, 10)).double()
        model.load_state_dict({k: torch.linspace(-1, 1, v.numel()).view_as(v).double() for k, v in model.state_dict().items()})
        with fastadv.AWP(model, GAMMA).perturb(lambda model=model: F.cross_entropy(model(x), y)):
            for part, labels in zip(x.chunk(halves), y.chunk(halves), strict=True):
                (F.cross_entropy(model(part), labels) / halves).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_are_not_compiled_again(backend):
    torch._dynamo.reset()
    model, plain = net(torch.float32), net(torch.float32)
    results = []
    for m, run in ((plain, plain), (model, torch.compile(model, backend=backend))):
        awp, optimizer = fastadv.AWP(run, GAMMA), sgd(m)
        torch._dynamo.utils.counters.clear()
        for i in range(5):
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                with awp.perturb(lambda run=run: ce(run, torch.float32)):
                    optimizer.zero_grad()
                    ce(run, torch.float32).backward()
                optimizer.step()
        results.append(m.state_dict())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_channels_last():
    model, plain = net().to(memory_format=torch.channels_last), net()
    before = weights(model)
    with fastadv.AWP(model, GAMMA).perturb(lambda: ce(model)), fastadv.AWP(plain, GAMMA).perturb(lambda: ce(plain)):
        assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(weights(model), weights(plain), **EXACT)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert same(weights(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    model, x = nn.Linear(192, 10).to(dtype), images(dtype)[0].flatten(1)
    w = model.weight.detach().clone()
    (g,) = torch.autograd.grad(model(x).square().mean(), model.weight)
    with fastadv.AWP(model, 0.5).perturb(lambda: model(x).square().mean()):
        wide, g = w.double(), g.double()
        expected = wide + 0.5 * wide.norm() / g.norm() * g
        torch.testing.assert_close(model.weight.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)
    assert torch.equal(model.weight, w)


def test_checkpointed_activations():
    """Recomputed in the backward, and so also in the ascent's."""
    model, x = nn.Linear(192, 192), images(torch.float32)[0].flatten(1)

    def loss() -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum()

    before = weights(model)
    with fastadv.AWP(model, GAMMA).perturb(loss):
        assert moved(model, before) == ["weight"]
        loss().backward()
    assert same(weights(model), before)


# ---------------------------------------------------------------------------------------------------------------- RWP


@pytest.mark.parametrize("restore", ["before_step", "after_step"])
def test_random_perturbations(restore):
    """On the sphere, new in every call, from the given generator alone; the weights come back."""
    model = net()
    before, around = weights(model), surroundings()
    rwp = fastadv.RWP(model, GAMMA, restore=restore, generator=torch.Generator().manual_seed(3))
    seen = []
    for _ in range(2):
        with rwp.perturb():
            seen.append(weights(model))
            assert moved(model, before) == ["conv.weight", "mix.weight", "unused.weight", "head.weight"]
            for name in moved(model, before):
                torch.testing.assert_close((seen[-1][name] - before[name]).norm(), GAMMA * before[name].norm(), **EXACT)
        assert same(weights(model), before)
    assert surroundings() == around
    assert moved(model, before) == []
    assert not any(torch.equal(seen[0][name], seen[1][name]) for name in MOVED)
    again = fastadv.RWP(model, GAMMA, generator=torch.Generator().manual_seed(3))
    with again.perturb():
        assert same(weights(model), seen[0])


def test_random_perturbations_have_no_direction():
    """Gaussian: each coordinate's share of the squared length is 1/n on average."""
    model = nn.Linear(4, 1, dtype=torch.float64)
    rwp = fastadv.RWP(model, 1.0, generator=torch.Generator().manual_seed(0))
    w, draws = model.weight.detach().clone(), []
    for _ in range(2000):
        with rwp.perturb():
            draws.append((model.weight.detach() - w) / w.norm())
    v = torch.cat(draws)
    assert v.mean(0).abs().max() < 0.05
    assert (v.square().mean(0) - 0.25).abs().max() < 0.03


def test_random_perturbations_warm_up_and_refuse_as_awp():
    model = net()
    before, rwp = weights(model), fastadv.RWP(model, GAMMA, warmup=1)
    with rwp.perturb():
        assert moved(model, before) == []
    assert rwp.state_dict() == {"calls": 1}
    with rwp.perturb(), pytest.raises(RuntimeError, match="already perturbed"), rwp.perturb():
        pass
    assert same(weights(model), before)
    with pytest.raises(ValueError, match="gamma must be"):
        fastadv.RWP(model, -1.0)
