"""What an attack costs: model passes, counted in floating-point operations, and nothing that waits for the device."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastadv


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10)
    )


X, Y = torch.rand(4, 3, 12, 12), torch.tensor([0, 1, 2, 3])


class NoModules(contextlib.nullcontext):
    """In place of the counter's breakdown by module, whose hooks torch cannot run on the leaf inputs of autograd.grad."""

    parents = frozenset({"Global"})


def flops(call) -> int:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 2 * 10),  # a step is a forward and an input gradient: no weight gradients
        ({"loss": "kl"}, 2 * 10 + 1),  # and the clean forward once
        ({"keep_best": True}, 2 * 10 + 1),  # and the last image's forward
        ({"restarts": 2}, 2 * (2 * 10 + 1)),
        ({"bn": "train"}, 2 * 10),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_an_attack_is_its_model_passes(options, passes, training):
    model = conv_net().train(training)
    forward = flops(lambda: model(X))
    attack = fastadv.PGD(model, eps=0.03, **options)
    assert flops(lambda: attack(X, Y)) == passes * forward


class Ops(TorchDispatchMode):
    """Records what torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("options", [{}, {"keep_best": True}, {"loss": "kl"}, {"targeted": True}], ids=str)
def test_no_step_waits_for_the_device(norm, options):
    """Checks and the random seed may, once a call; a step that does would stall a GPU and break graph capture."""
    syncs = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::item", "aten::is_nonzero"}

    def waits(steps: int) -> int:
        with Ops() as ran:
            fastadv.PGD(conv_net(), eps=0.03, steps=steps, norm=norm, **options)(X, Y)
        return sum(name in syncs for name in ran.names)

    assert waits(2) == waits(9)


def test_a_plain_step_runs_few_ops_besides_the_model():
    """Beyond the model's forward and backward: a detach and the fused kernels, which torch does not see."""

    def ran(call) -> int:
        with Ops() as recorded:
            call()
        return len(recorded.names)

    model = conv_net().eval().requires_grad_(False)

    def bare_pass() -> None:
        x = X.clone().requires_grad_()
        torch.autograd.grad(model(x), x, torch.ones(4, 10))

    bare = ran(bare_pass) - ran(lambda: (X.clone(), torch.ones(4, 10)))
    steps = [ran(lambda n=n: fastadv.PGD(model, eps=0.03, steps=n)(X, Y)) for n in (3, 13)]
    assert (steps[1] - steps[0]) / 10 <= bare + 2
