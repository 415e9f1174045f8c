"""Two processes on one machine: what DistributedDataParallel and FSDP2 must not change.

The checks run one after the other in one pair of processes, which a fixture starts once; each is a test of its own here.
The first failure ends its process, and so what the other waits for: nothing hangs, and the checks that follow say why they
were not run.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import batch, cnn, seeded, state
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastadv
from fastadv import shards
from fastadv.training.averaging import EMA

RANKS, SECONDS = 2, 300
GAMMA, LR, STEPS = 0.05, 0.1, 20
EXACT = {"rtol": 0.0, "atol": 1e-12}
REFUSED = ("local", "after_step")
CHECKS: dict[str, Callable[[], None]] = {}

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


# ----------------------------------------------------------------------------------------------------- the two processes


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    rendezvous = {"init_method": f"file://{folder}/rendezvous", "rank": rank, "world_size": RANKS}
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30), **rendezvous)
    results = {}
    for name, function in CHECKS.items():
        start = time.perf_counter()
        try:
            function()
            results[name] = f"passed after {time.perf_counter() - start:.2f} s"
        except BaseException:
            results[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(results))
        if not results[name].startswith("passed"):
            return  # which closes the connection, so that the other process fails too
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """By rank, what became of each check."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, folder), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    end = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        process.kill()
    written = [folder / f"{rank}.json" for rank in range(RANKS)]
    return [json.loads(path.read_text()) if path.exists() else {} for path in written]


# --------------------------------------------------------------------------------------------------------------- models


@seeded
def net() -> nn.Module:
    """No batch norm: a batch in halves is then the whole batch. A tied and a frozen weight."""
    first, last = nn.Linear(24, 24), nn.Linear(24, 24)
    last.weight = first.weight
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), first, nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), last, nn.Linear(24, 10)
    ).double()
    model[5].requires_grad_(False)
    return model


def ce(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def whole() -> tuple[Tensor, Tensor]:
    return batch(8, dtype=torch.float64)


def mine() -> tuple[Tensor, Tensor]:
    x, y = whole()
    return x.chunk(RANKS)[dist.get_rank()], y.chunk(RANKS)[dist.get_rank()]


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=0.05)


def spread(model: nn.Module) -> float:
    """The largest difference between ranks of any parameter."""
    largest = 0.0
    for p in model.parameters():
        copies = [torch.empty_like(p) for _ in range(RANKS)]
        dist.all_gather(copies, p.detach())
        largest = max(largest, *((copies[0] - c).abs().max().item() for c in copies[1:]))
    return largest


def plainly(model: nn.Module, optimizer: torch.optim.Optimizer, restore: str, gamma: float = GAMMA) -> None:
    """A training step on the whole batch in one process, by the formula."""
    x, y = whole()
    x = x.to(next(model.parameters()).dtype)
    chosen = [p for n, p in model.named_parameters() if "weight" in n and p.dim() > 1 and p.requires_grad]
    grads = torch.autograd.grad(ce(model, x, y), chosen)
    origins = [p.detach().clone() for p in chosen]
    v = [gamma * o.norm() * g / g.norm() for o, g in zip(origins, grads, strict=True)]
    with torch.no_grad():
        torch._foreach_add_(chosen, v)
    optimizer.zero_grad()
    ce(model, x, y).backward()
    with torch.no_grad():
        if restore == "before_step":
            torch._foreach_copy_(chosen, origins)
            optimizer.step()
        else:
            optimizer.step()
            torch._foreach_sub_(chosen, v)


def awp_step(awp: fastadv.AWP, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    with awp.perturb(lambda: ce(model, x, y)):
        optimizer.zero_grad()
        ce(model, x, y).backward()
        if awp.restore == "after_step":
            optimizer.step()
    if awp.restore == "before_step":
        optimizer.step()


# ------------------------------------------------------------------------------------------- DistributedDataParallel


@check
def a_global_perturbation_is_that_of_one_process_on_the_whole_batch() -> None:
    for restore in ("before_step", "after_step"):
        alone = net()
        optimizer = sgd(alone)
        for _ in range(STEPS):
            plainly(alone, optimizer, restore)
        for sync in ("auto", "global"):
            model = DistributedDataParallel(net())
            awp, optimizer = fastadv.AWP(model, GAMMA, sync=sync, restore=restore), sgd(model)
            for _ in range(STEPS):
                awp_step(awp, model, optimizer, *mine())
            torch.testing.assert_close(model.module.state_dict(), alone.state_dict(), **EXACT)


@check
def ranks_never_drift_apart() -> None:
    """With batch norm, dropout and a batch of its own on each; "local" too moves by its own gradient and comes back."""
    allowed = [(s, r) for s in ("global", "auto", "local") for r in ("before_step", "after_step") if (s, r) != REFUSED]
    for sync, restore in allowed:
        model = DistributedDataParallel(cnn())
        awp, optimizer = fastadv.AWP(model, GAMMA, sync=sync, restore=restore, steps=2), sgd(model)
        x, y = batch(8)
        for _ in range(STEPS):
            with awp.perturb(lambda: ce(model, x, y)):  # noqa: B023
                apart = spread(model)
                assert (apart == 0) == (sync != "local"), (sync, apart)
                optimizer.zero_grad()
                ce(model, x, y).backward()
                if restore == "after_step":
                    optimizer.step()
            if restore == "before_step":
                optimizer.step()
        assert spread(model) == 0, (sync, restore)


@check
def a_local_perturbation_cannot_be_taken_off_after_the_step() -> None:
    for model, sync in ((DistributedDataParallel(net()), "local"), (net(), "local"), (net(), "auto")):
        for build in (fastadv.AWP, fastadv.RWP):
            with pytest.raises(ValueError, match=r"restore='after_step' with sync='local' lets ranks drift apart"):
                build(model, sync=sync, restore="after_step")


@check
def a_perturbation_that_is_local_by_itself_says_so() -> None:
    with pytest.warns(UserWarning, match="each rank perturbs its weights by its own gradient"):
        fastadv.AWP(net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastadv.AWP(net(), sync="local")
        fastadv.AWP(DistributedDataParallel(net()))


@check
def a_static_graph_is_refused() -> None:
    """Its first backward, which would be the ascent's, is taken as the pattern of all, and reduces gradients at its end."""
    model = DistributedDataParallel(net(), static_graph=True)
    with pytest.raises(ValueError, match=r"DistributedDataParallel\(static_graph=True\) takes the ascent for training"):
        fastadv.AWP(model)
    with fastadv.RWP(model).perturb():  # has no ascent
        ce(model, *mine()).backward()


@check
def the_ascent_reduces_no_gradients_and_leaves_none() -> None:
    """However DistributedDataParallel is set up: its reducer must find the training pass as it would without an ascent."""
    for options in ({}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}):
        model = DistributedDataParallel(net(), **options)
        reductions = []

        def hook(_, bucket):  # unannotated: torch compares annotations with types, and here they are strings
            reductions.append(bucket.index())  # noqa: B023
            return dist.all_reduce(bucket.buffer() / RANKS, async_op=True).get_future().then(lambda f: f.value()[0])

        model.register_comm_hook(None, hook)
        awp, optimizer, alone = fastadv.AWP(model, GAMMA), sgd(model), net()
        its_optimizer, (x, y) = sgd(alone), mine()
        for i in range(3):
            before = [p.grad for p in model.parameters()]
            bits = [None if g is None else g.clone() for g in before]
            with awp.perturb(lambda: ce(model, x, y)):  # noqa: B023
                assert not reductions, (options, i)
                for p, grad, was in zip(model.parameters(), before, bits, strict=True):
                    assert p.grad is grad or "gradient_as_bucket_view" in options  # whose second forward moves its buckets
                    assert (p.grad is None and was is None) or torch.equal(p.grad, was)
                assert i or all(g is None for g in before)
                optimizer.zero_grad(set_to_none=i == 1)
                ce(model, x, y).backward()
                assert reductions, options
            optimizer.step()
            reductions.clear()
            plainly(alone, its_optimizer, "before_step")
        torch.testing.assert_close(model.module.state_dict(), alone.state_dict(), **EXACT)


@check
def buffers_are_broadcast_in_the_training_pass_as_without_an_ascent() -> None:
    """DistributedDataParallel sends rank 0's batch statistics before each forward."""
    results = []
    for gamma in (0.0, 1e-30):
        model, x, y = DistributedDataParallel(cnn(dropout=0.0)), *batch(8 + dist.get_rank())
        awp = fastadv.AWP(model, gamma)
        for _ in range(3):
            with awp.perturb(lambda: ce(model, x, y)):  # noqa: B023
                ce(model, x, y).backward()
        results.append([b.clone() for b in model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@check
def gradients_accumulate_without_synchronisation() -> None:
    """The ascent on all of the rank's batch, under no_sync or not, then micro-batches of which only the last reduces."""
    for quiet in (False, True):
        model, alone = DistributedDataParallel(net()), net()
        awp, optimizer, its_optimizer = fastadv.AWP(model, GAMMA), sgd(model), sgd(alone)
        x, y = mine()

        def ascent() -> Tensor:
            with model.no_sync() if quiet else contextlib.nullcontext():  # noqa: B023
                return ce(model, x, y)  # noqa: B023

        for _ in range(3):
            optimizer.zero_grad()
            with awp.perturb(ascent):
                with model.no_sync():
                    (ce(model, x[:2], y[:2]) / 2).backward()
                (ce(model, x[2:], y[2:]) / 2).backward()
            optimizer.step()
            plainly(alone, its_optimizer, "before_step")
        torch.testing.assert_close(model.module.state_dict(), alone.state_dict(), **EXACT)


@check
def a_grad_scaler_changes_nothing() -> None:
    results = []
    for enabled in (False, True):
        model = DistributedDataParallel(cnn(dropout=0.0))
        awp, optimizer = fastadv.AWP(model, GAMMA, restore="after_step"), sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        x, y = batch(8 + dist.get_rank())
        for _ in range(3):
            with awp.perturb(lambda: scaler.scale(ce(model, x, y))):  # noqa: B023
                optimizer.zero_grad()
                scaler.scale(ce(model, x, y)).backward()
                scaler.step(optimizer)
                scaler.update()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@check
def an_overflow_on_one_rank_moves_no_rank() -> None:
    model = DistributedDataParallel(net())
    before = copy.deepcopy(model.module.state_dict())
    factor = float("inf") if dist.get_rank() == 1 else 1.0
    with fastadv.AWP(model, GAMMA).perturb(lambda: factor * ce(model, *mine())):
        assert all(torch.equal(t, before[name]) for name, t in model.module.state_dict().items())


@check
def ranks_agree_within_the_group_of_their_model() -> None:
    """In a group of one the perturbation is the rank's own; in any other the all-reduce is that group's."""
    alone = [dist.new_group([rank]) for rank in range(RANKS)][dist.get_rank()]
    model = DistributedDataParallel(net(), process_group=alone)
    (expected,) = torch.autograd.grad(ce(model.module, *mine()), model.module[1].weight)
    w = model.module[1].weight.detach().clone()
    with fastadv.AWP(model, GAMMA, restore="after_step").perturb(lambda: ce(model, *mine())):
        torch.testing.assert_close(model.module[1].weight - w, GAMMA * w.norm() / expected.norm() * expected, **EXACT)

    both = dist.new_group([0, 1])
    model = DistributedDataParallel(net(), process_group=both)
    with (
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce,
        fastadv.AWP(model, GAMMA).perturb(lambda: ce(model, *mine())),
    ):
        assert [call.kwargs["group"] for call in all_reduce.call_args_list] == [both]


@check
def a_wrapper_around_the_wrapper_is_seen() -> None:
    for wrap in (nn.Sequential, lambda m: torch.compile(m, backend="eager")):
        model = wrap(DistributedDataParallel(net()))
        with fastadv.AWP(model, GAMMA, restore="after_step").perturb(lambda: ce(model, *mine())):  # noqa: B023
            assert spread(model) == 0


@check
def random_perturbations_agree_across_ranks() -> None:
    """Though each rank draws from a generator of its own."""
    model = DistributedDataParallel(net())
    generator = torch.Generator().manual_seed(dist.get_rank())
    rwp, optimizer, (x, y) = fastadv.RWP(model, GAMMA, restore="after_step", generator=generator), sgd(model), mine()
    w = model.module[1].weight
    for _ in range(STEPS):
        before = w.detach().clone()
        with rwp.perturb():
            assert spread(model) == 0
            torch.testing.assert_close((w - before).norm(), GAMMA * before.norm(), **EXACT)
            optimizer.zero_grad()
            ce(model, x, y).backward()
            optimizer.step()
    assert spread(model) == 0


@check
def attacks_on_a_wrapped_model_stay_on_their_rank() -> None:
    """Another number of steps on each: a collective would wait for ever."""
    for mode in (True, False):
        model = DistributedDataParallel(cnn(dropout=0.0)).train(mode)
        before, (x, y) = state(model), batch(8)
        adv = fastadv.pgd(model, x, y, 0.03, steps=2 + dist.get_rank(), generator=torch.Generator().manual_seed(0))
        assert state(model) == before
        assert all(p.grad is None for p in model.parameters())
        alone = fastadv.pgd(model.module, x, y, 0.03, steps=2 + dist.get_rank(), generator=torch.Generator().manual_seed(0))
        assert torch.equal(adv, alone)
        ce(model.train(), adv, y).backward()  # and training goes on
        assert spread(model) == 0


# ---------------------------------------------------------------------------------------------------------------- FSDP2


@seeded
def uneven() -> nn.Module:
    """First dimensions of 25, 7 and 1: shards of 13 and 12, of 4 and 3, of 1 and 0 rows. And an unused weight."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 25), nn.ReLU(), nn.Linear(25, 7), nn.ReLU(), nn.Linear(7, 1), Widen())
    model.unused = nn.Linear(3, 3)
    return model


class Widen(nn.Module):
    """[N, 1] to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Chain(nn.Module):
    """Does not call what is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = uneven()

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:-1]:
            x = layer(x)
        return x


def sharded(replicas: int = 1) -> nn.Module:
    """In one shard for each rank, or as replicas of which each has its ranks' shards (HSDP)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (replicas, RANKS // replicas), mesh_dim_names=("replicate", "shard"))
    model, mesh = Chain(), mesh if replicas > 1 else mesh["shard"]
    for layer in model.layers:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(t: Tensor) -> Tensor:
    return t.detach().full_tensor().clone()  # one shard is itself the whole


def mine32() -> tuple[Tensor, Tensor]:
    x, y = mine()
    return x.float(), y


@check
def sharded_weights_move_as_whole_ones() -> None:
    """Norms are those of whole tensors, though shards are uneven and one is empty; restored exactly; no .grad is touched."""
    for with_grads in (False, True):
        model, alone = sharded(), Chain()
        if with_grads:
            ce(model, *mine32()).backward()
        kept = [(p.grad, None if p.grad is None else p.grad.to_local().clone()) for p in model.parameters()]
        shards = [p.to_local().detach().clone() for p in model.parameters()]
        assert any(s.numel() == 0 for s in shards) == (dist.get_rank() == 1)
        x, y = whole()
        names = [n for n, p in alone.named_parameters() if p.dim() > 1]
        grads = torch.autograd.grad(ce(alone, x.float(), y), [alone.get_parameter(n) for n in names], allow_unused=True)
        with fastadv.AWP(model, GAMMA).perturb(lambda: ce(model, *mine32())):  # noqa: B023
            for name, g in zip(names, grads, strict=True):
                w, moved = alone.get_parameter(name).detach(), full(model.get_parameter(name))
                expected = w if g is None else w + GAMMA * w.norm() / g.norm() * g
                torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
            with torch.no_grad():
                assert ce(model, *mine32()) != ce(alone, *mine32()), "the forward sees the moved weights"
        for p, was, (grad, bits) in zip(model.parameters(), shards, kept, strict=True):
            assert torch.equal(p.to_local(), was)
            assert p.grad is grad
            assert bits is None or torch.equal(grad.to_local(), bits)


@check
def sharded_training_is_that_of_one_process() -> None:
    for replicas, restore in ((1, "before_step"), (1, "after_step"), (2, "before_step"), (2, "after_step")):
        model, alone = sharded(replicas), Chain()
        awp, optimizer, its_optimizer = fastadv.AWP(model, GAMMA, restore=restore), sgd(model), sgd(alone)
        for _ in range(5):
            awp_step(awp, model, optimizer, *mine32())
            chain_step(alone, its_optimizer, restore)
        for name, p in alone.named_parameters():
            torch.testing.assert_close(full(model.get_parameter(name)), p.detach(), rtol=0, atol=1e-6)


def chain_step(model: nn.Module, optimizer: torch.optim.Optimizer, restore: str) -> None:
    model.layers.unused.requires_grad_(False)
    plainly(model, optimizer, restore)


@check
def sharded_weights_are_not_mistaken_for_gathered_ones() -> None:
    """FSDP2 keeps the root's weights gathered after a forward that has no backward, as attacks and evaluation end in."""
    x, y = mine32()
    for method in ("AWP", "RWP"):
        model, alone = sharded(), Chain()
        perturbed = fastadv.AWP(model, GAMMA) if method == "AWP" else fastadv.RWP(model, GAMMA)
        shards = {n: p.to_local().detach().clone() for n, p in model.named_parameters()}
        for _ in range(2):
            with torch.no_grad():
                model(x)
            with perturbed.perturb(lambda: ce(model, x, y)) if method == "AWP" else perturbed.perturb():  # noqa: B023
                moved = {n: full(p) for n, p in model.named_parameters()}
                alone.load_state_dict(moved)
                with torch.no_grad():
                    assert (moved["layers.1.weight"] != Chain().layers[1].weight).any()
                    assert (moved["layers.6.fc.weight"] != Chain().layers[6].fc.weight).any()
                    torch.testing.assert_close(model(x), alone(x), rtol=0, atol=1e-6)
            with torch.no_grad():
                torch.testing.assert_close(model(x), Chain()(x), rtol=0, atol=1e-6)
            model.reshard()
            assert all(torch.equal(p.to_local(), shards[n]) for n, p in model.named_parameters())


@check
def sharded_weights_that_stay_gathered_after_a_backward_move_too() -> None:
    model, alone = sharded(), Chain()
    model.set_reshard_after_backward(False)
    awp, optimizer, its_optimizer = fastadv.AWP(model, GAMMA, restore="after_step"), sgd(model), sgd(alone)
    for _ in range(3):
        awp_step(awp, model, optimizer, *mine32())
        chain_step(alone, its_optimizer, "after_step")
    model.reshard()
    for name, p in alone.named_parameters():
        torch.testing.assert_close(full(model.get_parameter(name)), p.detach(), rtol=0, atol=1e-6)


@check
def a_step_inside_before_step_is_refused_for_shards_too() -> None:
    model = sharded()
    shards = [p.to_local().detach().clone() for p in model.parameters()]
    optimizer = sgd(model)
    ce(model, *mine32()).backward()
    with pytest.raises(RuntimeError, match="that change would be lost"):  # noqa: SIM117
        with fastadv.AWP(model, GAMMA).perturb(lambda: ce(model, *mine32())):
            optimizer.step()
    assert all(torch.equal(p.to_local(), was) for p, was in zip(model.parameters(), shards, strict=True))


@check
def gradients_of_shards_accumulate_without_synchronisation() -> None:
    """The ascent needs reduced gradients, and says so where they are off; then micro-batches of which only the last reduces."""
    model, alone = sharded(), Chain()
    awp, optimizer, its_optimizer = fastadv.AWP(model, GAMMA), sgd(model), sgd(alone)
    x, y = mine32()
    for _ in range(3):
        optimizer.zero_grad()
        with awp.perturb(lambda: ce(model, x, y)):
            model.set_requires_gradient_sync(False)
            (ce(model, x[:2], y[:2]) / 2).backward()
            model.set_requires_gradient_sync(True)
            (ce(model, x[2:], y[2:]) / 2).backward()
        optimizer.step()
        chain_step(alone, its_optimizer, "before_step")
    for name, p in alone.named_parameters():
        torch.testing.assert_close(full(model.get_parameter(name)), p.detach(), rtol=0, atol=1e-6)
    model.set_requires_gradient_sync(False)
    with pytest.raises(ValueError, match=r"call set_requires_gradient_sync\(True\) before perturb\(\)"):  # noqa: SIM117
        with awp.perturb(lambda: ce(model, x, y)):
            raise AssertionError("entered")


@check
def random_perturbations_of_shards_have_the_length_of_whole_ones() -> None:
    """And replicas of shards, each with a generator of its own, agree."""
    for replicas in (1, 2):
        model = sharded(replicas)
        before = [full(p) for p in model.parameters()]
        with fastadv.RWP(model, GAMMA, generator=torch.Generator().manual_seed(dist.get_rank())).perturb():
            for p, was in zip(model.parameters(), before, strict=True):
                moved = full(p)
                if p.dim() > 1:
                    torch.testing.assert_close((moved - was).norm(), GAMMA * was.norm(), rtol=1e-4, atol=0)
                copies = [torch.empty_like(moved) for _ in range(RANKS)]
                dist.all_gather(copies, moved)
                assert torch.equal(*copies)
        assert all(torch.equal(full(p), was) for p, was in zip(model.parameters(), before, strict=True))


@check
def attacks_on_a_sharded_model() -> None:
    model, alone = sharded(), Chain()
    x, y = batch(8)
    adv = fastadv.pgd(model, x, y, 0.03, steps=3, init="zero")
    assert torch.equal(adv, fastadv.pgd(alone, x, y, 0.03, steps=3, init="zero"))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    ce(model, x, y).backward()  # and training goes on
    assert all(p.grad is not None for n, p in model.named_parameters() if "unused" not in n)


@check
def attacks_leave_gathered_weights_as_they_found_them() -> None:
    """The root's stay gathered after a forward, are stale once an optimizer has moved their shards, and are other parameters
    than those that an attack freezes."""
    model, alone = sharded(), Chain()
    x, y = batch(8)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, weight_decay=1.0) for m in (model, alone)]
    for m, optimizer in zip((model, alone), optimizers, strict=True):
        ce(m, x, y).backward()
        with torch.no_grad():
            m(x)
        optimizer.step()
        optimizer.zero_grad()
    theirs, ours = (fastadv.pgd(m, x, y, 0.3, norm="l2", init="zero", keep_best=True) for m in (model, alone))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())
    ce(model, x, y).backward()
    ce(alone, x, y).backward()
    for name, p in alone.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(full(model.get_parameter(name).grad), p.grad, rtol=0, atol=1e-6)


@check
def attacks_on_shards_are_eager_and_without_a_twin() -> None:
    model = sharded()
    x, y = batch(8)
    for engine in ("auto", "compile"):
        with pytest.raises(ValueError, match=r"engine must be 'eager' for a model of FSDP2.*got '" + engine):
            fastadv.PGD(model, 0.03, engine=engine)(x, y)
    attack = fastadv.PGD(model, 0.03, steps=1, init="zero", twin=True)
    assert torch.equal(attack(x, y), fastadv.pgd(Chain(), x, y, 0.03, steps=1, init="zero"))
    assert "FSDPChain cannot be copied" in attack.stats.twin


@check
def blocks_are_sharded_each_and_tied_weights_together() -> None:
    def names(model: nn.Module) -> list[str]:
        shards.shard(model)
        return [name for name, module in model.named_modules() if module in shards.sharded(model)]

    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())  # noqa: E731
    net = nn.Sequential(nn.Linear(4, 4), block(), nn.ModuleList([block(), nn.ModuleList([block()])]), nn.Sequential(nn.ReLU()))
    assert names(net) == ["", "1", "2.0", "2.1.0"]
    tied = nn.Sequential(block(), block())
    tied[1][0].weight = tied[0][0].weight
    assert names(tied) == [""]
    assert names(fastadv.models.build("wide-resnet", depth=10, widen=1)) == ["", "block1_1", "block2_1", "block3_1"]
    assert names(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)) == [""]
    with pytest.raises(ValueError, match="copied before FSDP2"):
        EMA(net)


@check
def an_average_of_shards_is_the_shard_of_the_average() -> None:
    """Also where it was looked at in between, which gathers its weights."""
    (model, alone), x = (Chain(), Chain()), batch(8)[0]
    averages = [EMA(m, 0.5, ramp=False) for m in (model, alone)]
    for network in (model, averages[0].module):
        shards.shard(network)
    for step in range(3):
        for m, average in zip((model, alone), averages, strict=True):
            with torch.no_grad():
                m(x)
                shards.reshard(m)
                for p in m.parameters():
                    p.add_(0.1 * (step + 1))
                average.update()
        torch.testing.assert_close(averages[0].module(x), averages[1].module(x), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_processes(name, reports):
    outcomes = [report.get(name) for report in reports]
    failed = {f"rank {rank}": text for rank, text in enumerate(outcomes) if text and not text.startswith("passed")}
    if failed:
        pytest.fail("\n".join(f"{rank}:\n{text}" for rank, text in failed.items()), pytrace=False)
    if None in outcomes:
        earlier = next((n for n in CHECKS for r in reports if not r.get(n, "passed").startswith("passed")), "a time limit")
        pytest.fail(f"not run after {earlier!r}", pytrace=False)
