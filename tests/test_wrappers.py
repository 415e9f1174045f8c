"""Modules that give attacks a gradient (EoT, BPDA), and images made on other models (Transfer)."""

from __future__ import annotations

import math

import pytest
import torch
from models import FailsAt, batch, cnn, count_calls, linear, one_thread, seed, state, surroundings  # noqa: F401
from torch import nn

import fastadv
from fastadv import BPDA, EoT, Transfer


class Noisy(nn.Module):
    """Weights of a two-class linear model that are drawn anew in each call, for the whole batch, round known ones."""

    def __init__(self, features: int = 192, noise: float = 3.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(features, generator=seed(1)).sign())
        self.noise, self.generator = noise, generator

    def forward(self, x):
        weight = self.mean + self.noise * torch.randn(self.mean.shape, generator=self.generator)
        score = 0.02 * (x - 0.5).flatten(1) @ weight.to(x.dtype)
        return torch.stack([score, -score], 1)


def quantised(x):
    return (x * 8).round() / 8


# -------------------------------------------------------------------------------------------------------------- EoT


@pytest.mark.parametrize("recompute", [False, True])
def test_logits_are_the_log_of_the_mean_prediction(recompute):
    x, _ = batch(dtype=torch.float64)
    net = Noisy()
    calls = count_calls(net)
    torch.manual_seed(0)
    logits = EoT(net, 5, recompute)(x)
    assert len(calls) == 5
    torch.manual_seed(0)
    runs = torch.stack([net(x).softmax(1) for _ in range(5)])
    assert not torch.allclose(runs[0], runs[1])
    torch.testing.assert_close(logits, runs.mean(0).log())


def test_of_a_model_that_is_sure_of_itself_nothing_underflows():
    """Probabilities of e^-5000 add up as their logarithms do, and their gradient arrives."""
    x, y = batch(dtype=torch.float64)
    net = linear().double()
    sure = EoT(lambda z: 5000 * net(z), 3)
    torch.testing.assert_close(sure(x), (5000 * net(x)).log_softmax(1))
    attack = fastadv.PGD(sure, 0.01, init="zero")
    assert torch.equal(attack(x, y), fastadv.pgd(lambda z: 5000 * net(z), x, y, 0.01, init="zero"))
    assert not attack.info.zero_grad.any()


def test_half_precision_logits_are_averaged_in_fp32():
    x, _ = batch(dtype=torch.bfloat16)
    assert EoT(linear().bfloat16(), 2)(x).dtype == torch.float32


def test_finds_what_a_single_run_misses():
    """The best attack on the mean is the sign of the mean weights: one run shows their noise, 100 runs show them."""
    x, _ = batch(n=20)
    net, y = Noisy(), torch.zeros(20, dtype=torch.long)
    best = -net.mean.view(1, *x.shape[1:]).expand_as(x)

    def agreement(model):
        torch.manual_seed(0)
        return ((fastadv.fgsm(model, x, y, 0.1, bounds=None) - x).sign() == best).float().mean()

    assert agreement(net) < 0.75
    assert agreement(EoT(net, 400)) > 0.99


@pytest.mark.parametrize("weights", [False, True])
def test_recomputing_gives_the_same_bits_from_one_graph_at_a_time(weights):
    x, y = batch()
    net = nn.Sequential(cnn(dropout=0.5), nn.Dropout(0.1)).train()
    found = []
    for recompute in (False, True):
        packed: list[int] = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, p=packed: (p.append(t.numel()), t)[1], lambda t: t):
            logits = EoT(net, 6, recompute)(x.requires_grad_())
        inputs = [x, *net.parameters()] if weights else [x]
        grads = torch.autograd.grad(nn.functional.cross_entropy(logits, y), inputs)
        found.append((logits, grads, torch.get_rng_state(), sum(packed)))
    (logits, grads, rng, kept), (logits_, grads_, rng_, kept_) = found
    assert torch.equal(logits, logits_)
    assert all(map(torch.equal, grads, grads_))
    assert torch.equal(rng, rng_)
    assert kept_ < kept / 10


def test_recomputing_what_cannot_be_repeated_is_refused():
    x, y = batch(n=4)
    net = EoT(Noisy(generator=seed()), 3, recompute=True)
    with pytest.raises(RuntimeError, match="draws from a generator that is not torch's global one"):
        fastadv.fgsm(net, x, y % 2, 0.1)
    fastadv.fgsm(EoT(Noisy(generator=seed()), 3), x, y % 2, 0.1)


@pytest.mark.parametrize("bn", ["eval", "batch", "train"])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norms_behind_wrappers_do_what_the_attack_says(bn, training):
    """A wrapper is in train mode by birth; an attack would take norms in eval mode inside for frozen by the caller."""
    x, y = batch()
    net = cnn(dropout=0.0).train(training)
    options = {"eps": 0.03, "init": "zero", "bn": bn, "loss": "margin"}
    expected = fastadv.pgd(net, x, y, **options)
    statistics = net[1].running_mean.clone()
    net = cnn(dropout=0.0).train(training)
    wrapped = EoT(net, 1)
    before, around = state(wrapped, buffers=bn != "train"), surroundings()
    torch.testing.assert_close(fastadv.pgd(wrapped, x, y, **options), expected)
    assert state(wrapped, buffers=bn != "train") == before
    assert surroundings() == around
    torch.testing.assert_close(net[1].running_mean, statistics)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("k", range(6))
def test_eot_of_a_model_that_raises_leaves_it_as_found(k, recompute):
    x, y = batch()
    failing = FailsAt(cnn(), k)
    net = EoT(failing, 3, recompute)
    before, around = state(net), surroundings()
    with pytest.raises(RuntimeError, match="as the test asked"):
        fastadv.pgd(net, x, y, 0.03, steps=2, init="zero")
    assert state(net) == before
    assert surroundings() == around


@pytest.mark.parametrize("model", [Noisy(), lambda x: Noisy()(x)])
def test_eot_of_modules_and_of_functions(model):
    x, y = batch()
    assert fastadv.pgd(EoT(model, 2), x, y % 2, 0.1).shape == x.shape
    assert len(list(EoT(model, 2).buffers())) == isinstance(model, nn.Module)


@pytest.mark.parametrize("samples", [0, 1.5, True, "all"])
def test_bad_arguments_of_eot(samples):
    with pytest.raises(ValueError, match="samples must be an integer >= 1"):
        EoT(linear(), samples)
    with pytest.raises(ValueError, match="model must be callable"):
        EoT(3)


# -------------------------------------------------------------------------------------------------------------- BPDA


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bpda_is_its_forward_bit_for_bit(dtype):
    x = torch.rand(1000, 2, generator=seed()).to(dtype)

    def rough(z):
        return (z * 7).round() / 7 + 1e-3

    assert torch.equal(BPDA(rough)(x), rough(x))
    assert torch.equal(BPDA(rough, lambda z: 1e6 * z.sin())(x), rough(x))
    assert not torch.equal(x + (rough(x) - x), rough(x))  # what people write


def test_bpda_has_the_gradient_of_its_backward():
    x = torch.rand(5, 3, generator=seed(), dtype=torch.float64)
    v = torch.randn(5, 3, generator=seed(1), dtype=torch.float64)
    for backward, expected in ((None, v), (torch.sin, v * x.cos()), (lambda z: z.flip(-1), v.flip(1))):
        net = BPDA(quantised, backward)
        z = x.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(net(z), z, v)[0], expected)
        value, pullback = torch.func.vjp(net, x)
        assert torch.equal(value, quantised(x))
        torch.testing.assert_close(pullback(v)[0], expected)
        torch.testing.assert_close(
            torch.func.vmap(torch.func.grad(lambda row, d, net=net: (net(row) * d).sum()))(x, v), expected
        )


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_a_quantised_front_end_hides_the_gradient_and_bpda_finds_it(engine):
    """On a linear model the attack past the front end is the one without it, for its gradient is the same everywhere."""
    x, _ = batch(n=20, classes=2)
    net = linear(2)
    y = net(quantised(x)).argmax(1)
    hidden, past = nn.Sequential(BPDA(quantised, lambda z: 0 * z), net), nn.Sequential(BPDA(quantised), net)
    options = {"eps": 0.1, "steps": 5, "init": "zero", "loss": "margin", "keep_best": True}
    plain = fastadv.PGD(lambda z: net(quantised(z)), **options)
    assert torch.equal(plain(x, y), x)
    assert plain.info.zero_grad.all()
    for model, found in ((hidden, False), (past, True)):
        attack = fastadv.PGD(model, **options, engine=engine)
        for _ in range(2):  # the first call is eager
            adv = attack(x, y)
        assert any(engine in plan for plan in attack.stats.steps)
        assert attack.info.success.any() == found
        if found:
            reached = fastadv.pgd(net, x, y, 0.1, steps=5, init="zero", loss="margin")
            torch.testing.assert_close(adv, reached)
            assert torch.equal(attack.info.success, net(quantised(adv)).argmax(1) != y)


def test_bpda_may_leave_torch():
    x, y = batch()
    front = BPDA(lambda z: torch.from_numpy((z.numpy() * 8).round() / 8))
    net = nn.Sequential(front, linear())
    adv = fastadv.pgd(net, x, y, 0.1, init="zero", loss="margin")
    assert torch.equal(adv, fastadv.pgd(nn.Sequential(BPDA(quantised), linear()), x, y, 0.1, init="zero", loss="margin"))
    assert not torch.equal(adv, x)


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"memory": "signs"}, {"precision": "bf16", "engine": "compile"}])
def test_bpda_in_every_precision_and_memory(options):
    x, y = batch()
    net = nn.Sequential(BPDA(quantised), cnn(dropout=0.0)).eval()
    attack = fastadv.PGD(net, 0.1, init="zero", **options)
    expected = fastadv.pgd(net, x, y, 0.1, init="zero")
    for _ in range(2):
        agreement = (attack(x, y) == expected).float().mean()
    assert agreement > (0.8 if "precision" in options else 0.999)


@pytest.mark.parametrize(
    ("forward", "backward", "message"),
    [
        (3, None, "forward must be callable"),
        (quantised, 3, "backward must be callable on a batch or None"),
        (lambda x: x[:, :1], None, r"shaped like x, \[6, 3, 8, 8\]; got \[6, 1, 8, 8\]"),
        (lambda x: x[:, :1], lambda x: x[:, :2], r"shaped like backward\(x\)"),
        (lambda x: x.numpy(), None, "got ndarray"),
    ],
)
def test_bad_arguments_of_bpda(forward, backward, message):
    with pytest.raises(ValueError, match=message):
        BPDA(forward, backward)(batch()[0])


def test_bpda_may_change_the_shape_with_a_backward_that_does():
    x, _ = batch()
    assert BPDA(lambda z: z[:, :1].round(), lambda z: z[:, :1])(x).shape == (6, 1, 8, 8)


# --------------------------------------------------------------------------------------------------- engines and twins


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_attack_on_an_expectation(recompute):
    x, _ = batch(n=20)
    net, y = Noisy(), torch.zeros(20, dtype=torch.long)
    attack = fastadv.PGD(EoT(net, 40, recompute), 0.1, steps=8, init="zero", engine="compile", bounds=None)
    for _ in range(2):
        adv = attack(x, y)
    assert sum("compile" in plan for plan in attack.stats.steps) == 1
    assert ((adv - x).sign() == -net.mean.view(1, *x.shape[1:])).float().mean() > 0.9


@pytest.mark.parametrize(
    "model",
    [EoT(Noisy(), 2), nn.Sequential(BPDA(quantised), linear(2)), EoT(Noisy(), 2, recompute=True)],
    ids=["EoT", "BPDA", "recompute"],
)
def test_a_twin_is_refused_and_the_model_attacked(model):
    x, y = batch()
    attack = fastadv.PGD(model, 0.1, twin=True)
    assert not torch.equal(attack(x, y % 2), x)
    assert attack.stats.twin.startswith("none: ")


# ---------------------------------------------------------------------------------------------------------- Transfer


class Gives(fastadv.attacks.Attack):
    """An attack that returns the same image for all."""

    def __init__(self, value: float, **kwargs) -> None:
        super().__init__(lambda z: linear()(z.float()), 1.0, **kwargs)
        self.value = value

    def _attack(self, batch):
        self.seen = batch.draws.samples, batch.y
        return torch.full_like(batch.x, self.value)


def test_the_image_is_the_surrogates_and_the_verdict_the_victims():
    x, y = batch(n=40)
    victim, surrogate = linear(seed=1), linear(seed=2)
    attack = fastadv.PGD(surrogate, 0.1, init="zero")
    transfer = Transfer(victim, attack)
    adv = transfer(x, y)
    assert torch.equal(adv, attack(x, y))
    assert torch.equal(transfer.info.success, victim(adv).argmax(1) != y)
    assert not torch.equal(transfer.info.success, surrogate(adv).argmax(1) != y)
    assert (transfer.info.forwards, transfer.info.queries.tolist()) == (2, [2] * 40)


@pytest.mark.parametrize("targeted", [False, True])
def test_of_several_each_sample_gets_the_best(targeted):
    x, y = batch(n=40)
    victim = cnn().eval()
    attacks = [fastadv.PGD(linear(seed=k), 0.2, init="zero", targeted=targeted) for k in range(3)]
    adv = Transfer(victim, attacks)(x, y)
    images = torch.stack([attack(x, y) for attack in attacks])
    margins = torch.stack([fastadv.ops.margin(victim(z).detach(), y)[0] for z in images])
    best = (-margins if targeted else margins).argmax(0)
    assert len(best.unique()) == 3
    assert torch.equal(adv, images[best, torch.arange(40)])


def test_surrogates_get_the_samples_numbers_and_the_victims_prediction():
    x, _ = batch()
    net, gives = linear(), Gives(0.5)

    def victim(z):
        return net(z.float())

    samples = torch.arange(6).flip(0)
    transfer = Transfer(victim, [gives])
    adv = transfer(x, samples=samples)
    assert torch.equal(gives.seen[0], samples)
    assert torch.equal(gives.seen[1], victim(x).argmax(1))
    assert adv.eq(0.5).all()
    half = transfer(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16


def test_an_attack_that_the_victim_answers_with_nan_is_not_preferred():
    x, y = batch()
    victim = linear()

    def sometimes(z):
        return victim(z) + torch.where(z.flatten(1)[:, :1] == 0.75, math.nan, 0.0)

    assert Transfer(sometimes, [Gives(0.75), Gives(0.25), Gives(0.75)])(x, y).eq(0.25).all()


def test_transfer_leaves_all_models_as_found():
    x, y = batch()
    victim, surrogate = cnn(seed=1).train(), cnn(seed=2).train()
    failing = FailsAt(victim, 1)
    before, around = (state(failing), state(surrogate)), surroundings()
    attacks = [fastadv.PGD(surrogate, 0.1, init="zero"), fastadv.PGD(victim, 0.1, init="zero")]
    with pytest.raises(RuntimeError, match="as the test asked"):
        Transfer(failing, attacks)(x, y)
    assert (state(failing), state(surrogate)) == before
    failing.k = -1
    Transfer(failing, attacks)(x, y)
    assert (state(failing), state(surrogate)) == before
    assert surroundings() == around


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ([], "got none"),
        (3, "attack must be an attack object, or a sequence of them; got int"),
        ([fastadv.PGD(linear(), 0.1), fastadv.PGD(linear(), 0.1, norm="l2")], "agree in norm; got 'linf', 'l2'"),
        ([fastadv.PGD(linear(), 0.1), fastadv.PGD(linear(), 0.1, bounds=None)], "agree in bounds"),
        ([fastadv.PGD(linear(), 0.1), fastadv.PGD(linear(), 0.1, targeted=True)], "agree in targeted"),
    ],
)
def test_bad_arguments_of_transfer(attack, message):
    with pytest.raises(ValueError, match=message):
        Transfer(linear(), attack)


def test_labels_beyond_the_victims_classes_are_refused():
    x, _ = batch()
    with pytest.raises(ValueError, match=r"labels in \[0, 2\)"):
        Transfer(linear(2), Gives(0.5))(x, torch.full((6,), 5))
