"""An attack is a guest: model, gradients, buffers, modes, generators and settings are left as they were found."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from models import (
    FailsAt,
    NaNGradient,
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

import fastadv

BN = ("eval", "batch", "train")


def margin_loss(logits, y):
    others = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf)
    return others.amax(1) - logits.gather(1, y[:, None])[:, 0]


# --------------------------------------------------------------------------------------------- the state of a model


def eval_mode(net):
    net.eval()


def train_mode(net):
    net.train()


def frozen_norm(net):
    """What fine-tuning code does; model.train() afterwards would undo it."""
    net.train()
    net[1].eval()


def dropout_only(net):
    """Monte-Carlo dropout: eval but for one submodule."""
    net.eval()
    net[3].train()


def frozen_parameters(net):
    net.train()
    for p in [*net[0].parameters(), net[1].weight]:
        p.requires_grad_(False)


def existing_grads(net):
    net.train()
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    net[0].weight.grad = None


def hooked(net):
    """Hooks that would fire if a parameter got a gradient."""
    net.train()

    def fail(*_):
        raise AssertionError("a parameter received a gradient")

    for p in net.parameters():
        p.register_hook(fail)
        p.register_post_accumulate_grad_hook(fail)


PREPARE = [eval_mode, train_mode, frozen_norm, dropout_only, frozen_parameters, existing_grads, hooked]


@pytest.mark.parametrize("prepare", PREPARE)
@pytest.mark.parametrize("bn", BN)
def test_model_and_surroundings_are_left_as_found(bn, prepare):
    x, y = batch()
    net = cnn(dropout=0.0 if bn != "eval" else 0.5)  # only an active dropout may draw from the global generator
    prepare(net)
    before, around = state(net, buffers=bn != "train"), surroundings()
    for options in ({}, {"keep_best": True, "restarts": 2}, {"loss": "kl", "init": "normal"}, {"loss": margin_loss}):
        fastadv.pgd(net, x, y, 0.03, steps=2, bn=bn, generator=seed(), **options)
        assert state(net, buffers=bn != "train") == before
        assert surroundings() == around


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("k", range(7))
@pytest.mark.parametrize("bn", BN)
def test_also_when_the_model_raises_at_any_call(bn, k, error):
    """kl and keep_best: the clean forward, four steps, and the last look. A peer leaves the model in eval mode."""
    x, y = batch()
    net = cnn(dropout=0.0)
    frozen_norm(net)
    failing = FailsAt(net, k, error)
    before, around = state(failing, buffers=bn != "train"), surroundings()
    buffers = [b.clone() for b in net.buffers()]
    attack = fastadv.PGD(failing, 0.03, steps=4, loss="kl", bn=bn, keep_best=True, generator=seed())
    with pytest.raises(error, match="as the test asked") if k < 6 else contextlib.nullcontext():
        attack(x, y)
    assert failing.calls == min(k + 1, 6)
    if k < 6:  # "train" takes back what it had counted
        assert all(torch.equal(b, was) for b, was in zip(net.buffers(), buffers, strict=True))
    assert state(failing, buffers=bn != "train") == before
    assert surroundings() == around
    # The same object attacks again, as if nothing had happened.
    failing.k = -1
    fresh = fastadv.PGD(copy.deepcopy(failing), 0.03, steps=4, loss="kl", bn=bn, keep_best=True, generator=seed(1))
    attack.generator = seed(1)
    assert torch.equal(attack(x, y), fresh(x, y))


@pytest.mark.parametrize("prepare", [eval_mode, train_mode, frozen_norm])
@pytest.mark.parametrize("bn", BN)
def test_modes_during_the_attack(bn, prepare):
    """Modes decide three things: the statistics, whether the running ones move, and dropout. Weights are constants."""
    net = cnn()
    prepare(net)
    seen = []

    def look(*_):
        assert not any(p.requires_grad for p in net.parameters())
        seen.append((net[1].training, net[3].training, net[5].training, net[1].track_running_stats))

    net[8].register_forward_pre_hook(look)
    x, y = batch()
    fastadv.pgd(net, x, y, 0.03, steps=2, bn=bn)
    dropout, frozen = net.training and bn != "eval", prepare is frozen_norm
    statistics = bn != "eval"
    tracks = bn != "batch" or frozen  # a frozen one uses its running statistics
    assert seen == [(statistics and not frozen, dropout, statistics, tracks)] * 2


@pytest.mark.parametrize("prepare", [train_mode, frozen_norm])
@pytest.mark.parametrize("bn", BN)
def test_attack_and_buffers_are_those_of_the_reference_loop(bn, prepare):
    """Images, running statistics and dropout draws, bit for bit, as people write it for each kind of method."""
    x, y = batch()
    net = cnn()
    prepare(net)
    theirs = copy.deepcopy(net)
    if bn == "eval":
        theirs.eval()
    torch.manual_seed(3)
    expected = x.clone()
    for _ in range(4):
        expected.requires_grad_()
        (g,) = torch.autograd.grad(margin_loss(theirs(expected), y).sum(), expected)
        expected = (expected.detach() + 0.01 * g.sign()).clamp(x - 0.03, x + 0.03).clamp(0, 1)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    adv = fastadv.pgd(net, x, y, 0.03, 0.01, 4, loss="margin", init="zero", bn=bn)
    assert torch.equal(adv, expected)
    assert torch.equal(torch.get_rng_state(), after)
    reference = (cnn() if bn == "batch" else theirs).buffers()
    assert all(torch.equal(ours, b) for ours, b in zip(net.buffers(), reference, strict=True))
    assert (int(net[5].num_batches_tracked), int(net[1].num_batches_tracked)) == (
        4 * (bn == "train"),
        4 * (bn == "train" and prepare is train_mode),
    )


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("bn", ["eval", "batch"])
def test_running_statistics_stay_put_in_any_normalisation(bn, norm, track):
    x, y = batch()
    net = nn.Sequential(norm(3, affine=True, track_running_stats=track), linear())
    before = state(net)
    fastadv.pgd(net, x, y, 0.03, steps=2, bn=bn)
    assert state(net) == before


def test_a_refused_call_moves_no_running_statistics():
    """The logits are checked after a forward pass, which under bn="train" has already counted its batch."""
    x, _ = batch()
    net = cnn()
    before, buffers = state(net, buffers=False), {name: b.clone() for name, b in net.named_buffers()}
    with pytest.raises(ValueError, match=r"labels in \[0, 10\)"):
        fastadv.pgd(net, x, torch.full((6,), 10), 0.03, bn="train")
    assert state(net, buffers=False) == before
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())  # rolled back, so their versions moved


def test_sizes_may_be_reassigned():
    x, y = batch()
    net = linear()
    attack = fastadv.PGD(net, 0.1, 0.01, init="zero")
    attack(x, y)
    attack.eps, attack.alpha = torch.full((6,), 0.02), 0.005
    assert torch.equal(attack(x, y), fastadv.pgd(net, x, y, 0.02, 0.005, init="zero"))
    attack.eps = -1.0
    with pytest.raises(ValueError, match="eps"):
        attack(x, y)


# ------------------------------------------------------------------------------------------------- where it is called

CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "anomaly": torch.autograd.detect_anomaly,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    "options",
    [
        {"keep_best": True},
        {"restarts": 2},
        {"early_stop": True},
        {"bn": "train"},
        {"loss": "kl"},
        {"loss": margin_loss},
        {"init": torch.rand(6, 3, 8, 8, generator=seed())},
        {"eps": torch.full((6,), 0.5), "alpha": torch.full((6,), 0.1)},
    ],
    ids=lambda o: " ".join(o),
)
def test_contexts_change_nothing(options, norm, context):
    options = {"eps": 0.5, "steps": 3, "norm": norm, **options}
    plain_x, plain_y = batch()
    expected = fastadv.pgd(cnn(dropout=0.0), plain_x, plain_y, **options, generator=seed())
    net = cnn(dropout=0.0)
    with CONTEXTS[context]():
        x, y = batch()
        options = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        around = surroundings()
        adv = fastadv.pgd(net, x, y, **options, generator=seed())
        assert surroundings() == around
    assert torch.equal(adv, expected)
    F.cross_entropy(net(adv.clone()), plain_y).backward()  # and the result is fit for training
    assert net[0].weight.grad is not None


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("options", [{}, {"keep_best": True}, {"loss": "kl"}], ids=str)
def test_an_attack_within_a_training_step_under_autocast(options, as_function):
    """Autocast caches the weights it casts: cached without a graph, they would get no gradient in the training step."""
    x, y = batch()
    grads = []
    for attack_first in (True, False):
        net = cnn(dropout=0.0).eval()
        with torch.autocast("cpu", torch.bfloat16):
            if attack_first:
                fastadv.pgd((lambda z, net=net: net(z)) if as_function else net, x, y, 0.03, **options)
            F.cross_entropy(net(x), y).backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("as_function", [False, True])
def test_each_step_under_autocast_sees_the_images_of_the_last(as_function):
    """Autocast caches casts of leaves that require grad, and the images are one, which moves in place."""
    net = cnn(dropout=0.0).eval()
    (x, y), adv = batch(), batch()[0]
    with torch.autocast("cpu", torch.bfloat16):
        ours = fastadv.pgd((lambda z: net(z)) if as_function else net, x, y, 0.03, 0.01, steps=4, init="zero")
        assert torch.is_autocast_cache_enabled()
    for _ in range(4):
        z = adv.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(z)
        (grad,) = torch.autograd.grad(logits, z, fastadv.ops.log_odds(logits.detach(), y)[1])
        fastadv.ops.linf_step_(adv, grad, x, 0.01, 0.03, 0.0, 1.0)
    assert torch.equal(ours, adv)


def test_a_graph_recorded_before_the_attack_still_goes_backward_after_it():
    """As in TRADES with a shared clean forward."""
    x, y = batch()
    grads = []
    for attacks in (0, 1):
        net = cnn(dropout=0.0)
        loss = F.cross_entropy(net(x), y)
        for _ in range(attacks):
            fastadv.pgd(net, x, y, 0.03)
        loss.backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class AttackedImages(torch.utils.data.Dataset):
    def __init__(self, net, x, y):
        self.net, self.x, self.y = net, x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        adv = fastadv.pgd(self.net, self.x[i : i + 1], self.y[i : i + 1], 0.03, loss="margin", init="zero")
        return adv[0], torch.utils.data.get_worker_info().id


@pytest.mark.skipif("fork" not in torch.multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_in_a_forked_worker():
    x, y = batch()
    net = linear()
    expected = fastadv.pgd(net, x, y, 0.03, loss="margin", init="zero")  # the kernels have run before the fork
    loader = torch.utils.data.DataLoader(
        AttackedImages(net, x, y), batch_size=6, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    adv, worker = next(iter(loader))
    torch.testing.assert_close(adv, expected)
    assert worker.tolist() == [0] * 6


def test_ddp_wrapper_is_left_out_of_the_attack(process_group):
    """Its forward prepares a gradient reduction that an attack never finishes."""
    x, y = batch()
    plain = cnn(dropout=0.0)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    before = state(wrapped.module)
    wrapper_calls, module_calls = count_calls(wrapped), []
    handle = wrapped.module.register_forward_hook(lambda *_: module_calls.append(1))
    loss = F.cross_entropy(wrapped(x), y)  # an attack between a forward and its backward
    adv = fastadv.pgd(wrapped, x, y, 0.03, steps=3, bn="batch", init="zero")
    loss.backward()
    assert (len(wrapper_calls), len(module_calls)) == (1, 4)
    handle.remove()
    F.cross_entropy(plain(x), y).backward()
    for ours, theirs in zip(wrapped.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(adv, fastadv.pgd(plain, x, y, 0.03, steps=3, bn="batch", init="zero"))
    assert [m[1] for m in state(wrapped.module)[0]] == [m[1] for m in before[0]]
    assert all(p.requires_grad for p in wrapped.parameters())


# ---------------------------------------------------------------------- what goes wrong in peers and is not said above


def robust_accuracy(net, x, y, **options):
    adv = fastadv.pgd(net, x, y, generator=seed(), **options)
    return 100 * (net(adv).argmax(1) == y).double().mean().item()


def eager_pgd(net, x, y, eps, steps):
    """Cross-entropy through autograd, averaged over the batch, as peers do."""
    adv = x.clone()
    for _ in range(steps):
        adv.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(net(adv), y), adv)
        adv = (adv.detach() + 2.5 * eps / steps * g.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return adv


def test_confident_model_is_attacked_as_well():
    """Logits x100: fp32 cross-entropy has no gradient left, and a peer reports 98% robust accuracy where it is 65%."""
    (x, y), net = digits(), trained_lenet()
    x, y = x[1200:], y[1200:]

    def confident(z):
        return 100 * net(z)

    options = {"eps": 0.05, "steps": 20, "restarts": 3}
    truth = robust_accuracy(net, x, y, **options)
    assert truth < 95
    assert abs(robust_accuracy(confident, x, y, **options) - truth) <= 1
    assert 100 * (confident(eager_pgd(confident, x, y, 0.05, 20)).argmax(1) == y).double().mean() > truth + 3


def test_fp16_gradients_do_not_underflow():
    """Averaged cross-entropy in fp16 has an all-zero gradient for most images of a large batch."""
    (x, y), net = digits(), copy.deepcopy(trained_lenet()).half()
    x, y = x[1200:].half(), y[1200:]

    def model(z):
        return 3 * net(z)

    attack = fastadv.PGD(model, 0.05, steps=1, init="zero")
    attack(x, y)
    point = x.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(F.cross_entropy(model(point), y), point)
    assert (theirs.flatten(1).abs().amax(1) == 0).double().mean() > 0.3
    assert not attack.info.zero_grad.any()


@pytest.mark.parametrize("bounds", [(-2.1, 2.64), None])
def test_normalised_inputs_are_not_clamped_to_the_unit_interval(bounds):
    """Peers move such images by up to 2 under eps 0.1."""
    x, y = batch()
    x = -2.1 + 4.74 * x
    adv = fastadv.pgd(linear(), x, y, 0.1, bounds=bounds)
    assert adv.min() < -1.5
    assert adv.max() > 2
    assert (adv - x).abs().max() <= 0.1 + 1e-6


def test_nan_warning_can_be_an_error_and_still_leaves_the_model_alone():
    """Warnings are errors in this test suite unless asked for."""
    x, y = batch()
    net = NaNGradient(cnn(), row=0)
    before = state(net)
    with pytest.raises(fastadv.NaNGradientWarning):
        fastadv.pgd(net, x, y, 0.03)
    assert state(net) == before
