"""What an attack costs: model passes, counted in floating-point operations, and nothing that waits for the device."""

from __future__ import annotations

import pytest
import torch
from models import (
    SYNCS,
    Ops,
    one_thread,  # noqa: F401
)
from torch import nn

import fastadv
from fastadv.training.cost import flops


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10)
    )


X, Y = torch.rand(4, 3, 12, 12), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 2 * 10),  # a step is a forward and an input gradient: no weight gradients
        ({"loss": "kl"}, 2 * 10 + 1),  # and the clean forward once
        ({"keep_best": True}, 2 * 10 + 1),  # and the last image's forward
        ({"restarts": 2}, 2 * (2 * 10 + 1)),
        ({"bn": "train"}, 2 * 10),
        ({"twin": True}, 2 * 10),
        ({"memory": "signs"}, 2 * 10),
        ({"precision": "bf16"}, 2 * 10),
        ({"precision": "bf16", "keep_best": True}, 2 * 10 + 2),  # and the model itself looks at the best images
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_an_attack_is_its_model_passes(options, passes, training):
    model = conv_net().train(training)
    forward = flops(lambda: model(X))
    attack = fastadv.PGD(model, eps=0.03, **options)
    attack(X, Y)  # a twin is checked when it is made
    assert flops(lambda: attack(X, Y)) == passes * forward


STEPS = {  # forwards' worth of a training step: 2 an attack step, 1 a forward, 3 with its backward
    "Standard": (lambda m: fastadv.Standard(), 0, 1),
    "PGDAT": (lambda m: fastadv.PGDAT(), 20, 1),
    "TRADES": (lambda m: fastadv.TRADES(), 20 + 1, 2),
    "TRADES bn=batch": (lambda m: fastadv.TRADES(fastadv.TRADES.paper_attack(m, bn="batch")), 20, 2),
    "TRADES bn_parity": (lambda m: fastadv.TRADES(bn_parity=True), 20 + 2, 2),
    "DM": (lambda m: fastadv.DM(), 20, 2),
    "SCORE": (lambda m: fastadv.SCORE(), 20, 2),
    "SCOREPGDAT": (lambda m: fastadv.SCOREPGDAT(), 20, 1),
    "MART": (lambda m: fastadv.MART(), 20, 2),
    "RST": (lambda m: fastadv.RST(), 20 + 1, 2),
    "RSTStability": (lambda m: fastadv.RSTStability(), 0, 2),
    "GKL": (lambda m: fastadv.GKL(10), 10 + 1, 2),
    "ALP": (lambda m: fastadv.ALP(), 20 + 1, 2),
    "HalfHalf": (lambda m: fastadv.HalfHalf(), 20, 2),
    "FGSMRS": (lambda m: fastadv.FGSMRS(), 2, 1),
    "NFGSM": (lambda m: fastadv.NFGSM(), 2, 1),
    "FeatureScatter": (lambda m: fastadv.FeatureScatter(), 2 + 1, 1),
    "MMC": (lambda m: fastadv.MMC(10), 20, 1),
    "IBP": (lambda m: fastadv.IBP(warmup=0, ramp=0), 0, 3),  # of the images, and of the boxes' centres and radii
    "IBP warming up": (lambda m: fastadv.IBP(), 0, 1),
    "Consistency": (lambda m: fastadv.Consistency(fastadv.PGDAT()), 20, 1),  # of a batch of two views
}


def trained_pass(model: nn.Module) -> int:
    """Forward and weight gradients: 3 forwards' worth but for the images' gradient, which no training step needs."""
    return 3 * flops(lambda: model(X)) - flops(lambda: model[0](X))


@pytest.mark.parametrize("case", STEPS)
def test_a_training_step_is_its_model_passes(case):
    """PGD-AT 23, TRADES 27, or 26 where attack and step share the clean forward, MART 26, FGSM-RS 5."""
    build, attack, trained = STEPS[case]
    model = conv_net()
    objective = build(model)
    counted = flops(lambda: objective(model, X, Y).loss.backward())
    assert counted == attack * flops(lambda: model(X)) + trained * trained_pass(model)


@pytest.mark.parametrize(("objective", "passes"), [(fastadv.PGDAT(), 1), (fastadv.TRADES(), 2), (fastadv.MART(), 2)])
def test_adversarial_weights_cost_the_loss_once_more(objective, passes):
    """3 for PGD-AT, 6 for TRADES and MART: weight gradients alone, and no pass to perturb or restore."""
    model = conv_net()
    awp = fastadv.AWP(model)

    def step() -> None:
        with awp.perturb(lambda: objective.loss(model, X, Y, X)):
            objective.loss(model, X, Y, X).backward()

    assert flops(step) == 2 * passes * trained_pass(model)


@pytest.mark.parametrize("replays", [1, 4])
def test_free_training_is_its_replays(replays):
    """3 each: the images' gradient is the weights' own backward, to its end."""
    model = conv_net()
    forward = flops(lambda: model(X))

    def step() -> None:
        for out in fastadv.FreeAT(replays=replays)(model, X, Y):
            out.loss.backward()

    assert flops(step) == replays * 3 * forward


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("options", [{}, {"keep_best": True}, {"loss": "kl"}, {"targeted": True}], ids=str)
def test_no_step_waits_for_the_device(norm, options):
    """Checks and the random seed may, once a call; a step that does would stall a GPU and break graph capture."""

    def waits(steps: int) -> int:
        with Ops() as ran:
            fastadv.PGD(conv_net(), eps=0.03, steps=steps, norm=norm, **options)(X, Y)
        return sum(name in SYNCS for name in ran.names)

    assert waits(2) == waits(9)


@pytest.mark.parametrize("case", STEPS)
def test_no_loss_waits_for_the_device(case):
    """Whatever an objective does between the attack and the optimiser, metrics included."""
    model = conv_net()
    objective = STEPS[case][0](model)
    with Ops() as ran:
        objective.forward(model, X, Y, X.flip(0)).loss.backward()
    assert not SYNCS.intersection(ran.names)
    assert "aten::convolution" in ran.names


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
