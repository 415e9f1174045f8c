"""What fgsm, pgd and PGD compute: where the results lie, what they equal, and what the arguments mean."""

from __future__ import annotations

import functools
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from models import NaNGradient, batch, cnn, count_calls, linear, one_thread, seed  # noqa: F401
from torch import nn

import fastadv

NORMS = ("linf", "l2", "l1")
LOSSES = ("ce", "margin", "dlr", "kl", "se")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 3.0}  # of 3x8x8 images


def per_image(t, like):
    return t.view(-1, *[1] * (like.dim() - 1))


def distance(adv, x, norm):
    """[N], in fp64."""
    d = (adv.double() - x.double()).flatten(1)
    return {"linf": d.abs().amax, "l2": d.norm, "l1": d.abs().sum}[norm](dim=1)


def cross_entropy(logits, y):
    return F.cross_entropy(logits, y, reduction="none")


def carlini_wagner(logits, y):
    others = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -math.inf)
    return others.amax(1) - logits.gather(1, y[:, None])[:, 0]


def start_in_ball(x, eps, value=0):
    """Inside the linf ball of radius eps and the unit box."""
    return (x + torch.empty_like(x).uniform_(-eps, eps, generator=seed(value))).clamp(0, 1)


def handwritten_pgd(model, x, y, eps, alpha, steps, loss, norm="linf", start=None):
    """The loop that people write, in plain PyTorch."""
    adv = x if start is None else start
    for _ in range(steps):
        adv = adv.detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(model(adv), y).sum(), adv)
        adv = adv.detach()
        if norm == "linf":
            adv = (adv + alpha * g.sign()).clamp(x - eps, x + eps).clamp(0, 1)
        else:
            d = adv + alpha * g / per_image(g.flatten(1).norm(dim=1), g) - x
            length = per_image(d.flatten(1).norm(dim=1), d)
            adv = (x + torch.where(length > eps, d * eps / length, d)).clamp(0, 1)
    return adv


def linear_in(dtype, classes=10):
    return linear(classes).to(dtype)


# ------------------------------------------------------------------------------------------------------- ball and box


@pytest.mark.parametrize("init", ["uniform", "normal", "zero", "tensor in the ball", "tensor outside"])
@pytest.mark.parametrize("bounds", [(0, 1), None, (-2.1, 2.64), (-1, -0.25)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_result_is_in_ball_and_box(norm, dtype, bounds, init):
    lo, hi = (-1.5, 1.5) if bounds is None else bounds
    x, y = batch(n=5)
    x = (lo + (hi - lo) * x).to(dtype)
    x[0, 0] = -1.0 if bounds == (-1, -0.25) else 0.0  # on the wall, where low precision is finest
    eps = EPS[norm] * torch.tensor([0.0, 0.1, 1.0, 3.0, 100.0])
    noise = torch.randn(x.shape, generator=seed())
    starts = {"tensor in the ball": x + 1e-3 * noise.to(dtype), "tensor outside": 7 * noise}
    adv = fastadv.pgd(linear_in(dtype), x, y, eps, eps / 3, 4, norm, init=starts.get(init, init), bounds=bounds)
    low = dtype in (torch.bfloat16, torch.float16)
    # Low precision is exactly inside. Elsewhere x + d is rounded once, which an l1 length sums over the image.
    ulp = 0.0 if low else torch.finfo(dtype).eps
    slack = 4 * ulp * (eps + {"linf": 3, "l2": 3 * 14, "l1": 3 * 192}[norm]) * (eps > 0)
    assert (distance(adv, x, norm) <= eps.double() + slack).all()
    if bounds is not None:
        lo, hi = (torch.tensor(v, dtype=torch.promote_types(dtype, torch.float32)).double() for v in bounds)
        assert (adv.double() >= lo).all()
        assert (adv.double() <= hi).all()
    assert adv.dtype == dtype
    assert (distance(adv, x, norm)[2:] > EPS[norm] / 3).all()  # it went somewhere


@pytest.mark.parametrize("init", ["uniform", "normal", "tensor"])
@pytest.mark.parametrize("norm", NORMS)
def test_start_that_is_returned_is_in_ball_and_box(norm, init):
    """keep_best may return the start itself: alpha 0 makes sure that it does."""
    x, y = batch()
    x[:3] = 0
    start = torch.ones_like(x) if init == "tensor" else init
    adv = fastadv.pgd(linear(), x, y, 1e-4, 0.0, 1, norm, init=start, keep_best=True)
    assert (distance(adv, x, norm) <= 1e-4 + 1e-6).all()
    assert adv.min() >= 0
    assert adv.max() <= 1


@pytest.mark.parametrize("init", ["uniform", "zero"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_eps_zero_returns_x(norm, dtype, init):
    x, y = batch(dtype=dtype)
    assert torch.equal(fastadv.pgd(linear_in(dtype), x, y, 0.0, 0.1, 2, norm, init=init), x)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_small_steps_add_up_in_low_precision(dtype):
    """A step far below the spacing of bf16 numbers near 1 is kept in fp32, not lost."""
    x, y = batch()
    x = (0.6 + 0.3 * x).to(dtype)
    adv = fastadv.pgd(linear_in(dtype), x, y, 0.05, 0.05 / 100, 100, init="zero", bounds=None)
    assert (adv.double() - x.double()).abs().mean() > 0.04


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_low_precision_is_inside_a_ball_that_fp32_rounds_up(dtype, as_tensor):
    """fp32 cannot tell this eps from 1/32, and x + 1/32 is representable."""
    x, eps = torch.full((6, 192), 0.5, dtype=dtype), 1 / 32 - 1e-10
    y = torch.zeros(6, dtype=torch.long)
    adv = fastadv.pgd(linear_in(dtype), x, y, torch.tensor(eps, dtype=torch.float64) if as_tensor else eps)
    assert (distance(adv, x, "linf") <= eps).all()
    assert (distance(adv, x, "linf") > 0.9 * eps).all()


# ------------------------------------------------------------------------------------- equal to an independent attack


@pytest.mark.parametrize(
    ("norm", "loss", "theirs", "dtype", "exact"),
    [
        ("linf", "margin", carlini_wagner, torch.float32, True),  # its logit gradient is exact: every bit agrees
        ("linf", "margin", carlini_wagner, torch.float64, True),
        ("linf", "ce", cross_entropy, torch.float64, True),  # up to a positive factor a sample, which no sign sees
        ("linf", cross_entropy, cross_entropy, torch.float32, True),
        ("l2", "ce", cross_entropy, torch.float64, False),
        ("l2", "margin", carlini_wagner, torch.float64, False),
    ],
)
@pytest.mark.parametrize("start", ["zero", "tensor"])
def test_equals_handwritten_pgd(norm, loss, theirs, dtype, exact, start):
    x, y = batch(dtype=dtype)
    net, eps = cnn().to(dtype).eval(), EPS[norm]
    begin = x if start == "zero" else start_in_ball(x, 0.03)
    expected = handwritten_pgd(net, x, y, eps, eps / 4, 10, theirs, norm, begin)
    adv = fastadv.pgd(net, x, y, eps, eps / 4, 10, norm, loss, "zero" if start == "zero" else begin)
    if exact:
        assert torch.equal(adv, expected)
    else:
        torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1, 30])
def test_ce_has_the_direction_of_cross_entropy(scale):
    x, y = batch(dtype=torch.float64)
    net = cnn().double().eval()
    point = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy(scale * net(point), y).sum(), point)
    moved = fastadv.fgsm(lambda z: scale * net(z), x, y, 1.0, norm="l2", bounds=None) - x
    torch.testing.assert_close(moved, g / per_image(g.flatten(1).norm(dim=1), g), rtol=0, atol=1e-10)


def test_kl_starts_from_the_clean_prediction():
    x, y = batch(dtype=torch.float64)
    net, start = cnn().double().eval(), x + 1e-3 * torch.randn(x.shape, generator=seed(), dtype=torch.float64)
    clean = net(x).detach()

    def kl(logits, _):
        return F.kl_div(logits.log_softmax(1), clean.softmax(1), reduction="none").sum(1)

    expected = handwritten_pgd(net, x, None, 8 / 255, 2 / 255, 5, kl, start=start)
    adv = fastadv.pgd(net, x, y, 8 / 255, 2 / 255, 5, loss="kl", init="normal", generator=seed())
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)  # the start's rounding may differ
    assert torch.equal(adv, fastadv.pgd(net, x, None, 8 / 255, 2 / 255, 5, loss="kl", init="normal", generator=seed()))


def test_fgsm_is_one_step_of_eps_from_x_by_default():
    x, y = batch()
    net = cnn().eval()
    expected = handwritten_pgd(net, x, y, 0.05, 0.05, 1, carlini_wagner)
    assert torch.equal(fastadv.fgsm(net, x, y, 0.05, loss="margin"), expected)
    start = start_in_ball(x, 0.05)
    expected = handwritten_pgd(net, x, y, 0.05, 0.0625, 1, carlini_wagner, start=start)
    assert torch.equal(fastadv.fgsm(net, x, y, 0.05, 0.0625, loss="margin", init=start), expected)
    random = {"eps": 0.05, "alpha": 0.0625, "init": "uniform"}  # FGSM-RS
    expected = fastadv.pgd(net, x, y, **random, steps=1, generator=seed())
    assert torch.equal(fastadv.fgsm(net, x, y, **random, generator=seed()), expected)


def test_default_alpha_is_two_and_a_half_eps_over_steps():
    x, y = batch()
    assert torch.equal(
        fastadv.pgd(linear(), x, y, 0.1, steps=5, init="zero"), fastadv.pgd(linear(), x, y, 0.1, 0.05, 5, init="zero")
    )


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 10])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_rises_for_any_number_of_classes(loss, classes):
    """The peers' attacks raise IndexError below 10 classes."""
    x, _ = batch(n=8, dtype=torch.float64)
    net = linear_in(torch.float64, classes)
    begin = start_in_ball(x, 0.03)
    y = net(begin).argmax(1)  # DLR rises steadily only until the model is fooled

    def value(adv):
        attack = fastadv.PGD(net, 1.0, 0.0, 1, loss=loss, init=adv, keep_best=True)
        assert torch.equal(attack(x, y), adv)
        return attack.info.loss

    adv = fastadv.pgd(net, x, y, 0.03, 0.002, 5, loss=loss, init=begin)
    assert (value(adv) > value(begin)).all()


def test_probabilities_instead_of_logits_can_be_attacked():
    x, y = batch()
    net = nn.Sequential(linear(), nn.Softmax(1))
    adv = fastadv.pgd(net, x, y, 0.1)
    rows = torch.arange(len(y))
    assert (net(adv)[rows, y] < net(x)[rows, y]).all()


# --------------------------------------------------------------------------------------------------- what y may be


def test_integer_labels_of_any_width_are_the_same_labels():
    x, y = batch()
    results = [
        fastadv.pgd(linear(), x, y.to(d), 0.1, init="zero", keep_best=True)
        for d in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    ]
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("label_dtype", [torch.float32, torch.float64])
def test_soft_labels(label_dtype):
    x, y = batch(dtype=torch.float64)
    net = linear_in(torch.float64)
    soft = 0.7 * F.one_hot(y, 10) + 0.3 * F.one_hot(y.roll(1), 10).to(label_dtype)
    expected = handwritten_pgd(net, x, soft.double(), 0.1, 0.02, 5, cross_entropy)
    attack = fastadv.PGD(net, 0.1, 0.02, 5, init="zero", keep_best=True)
    attack(x, soft)
    assert torch.equal(attack.info.success, net(attack(x, soft)).argmax(1) != soft.argmax(1))
    assert torch.equal(fastadv.pgd(net, x, soft, 0.1, 0.02, 5, init="zero"), expected)


def test_one_hot_soft_labels_saturate_no_more_than_integers():
    x, _ = batch()
    net = linear()
    y = net(x).argmax(1)
    hard, soft = (fastadv.PGD(lambda z: 1000 * net(z), 0.01, steps=1, init="zero") for _ in range(2))
    assert torch.equal(soft(x, F.one_hot(y, 10).float()), hard(x, y))
    assert not soft.info.zero_grad.any()


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "one-hot"])
@pytest.mark.parametrize("bn", ["batch", "train"])
def test_cross_entropy_keeps_its_size_where_batch_statistics_couple_the_samples(bn, soft):
    """An image also moves for the others' losses, so no factor may be dropped sample by sample."""
    x, y = batch(dtype=torch.float64)
    net = cnn(dropout=0.0).double().train()
    adv = fastadv.pgd(net, x, F.one_hot(y, 10).double() if soft else y, 0.1, 0.02, 5, init="zero", bn=bn)
    torch.testing.assert_close(adv, handwritten_pgd(net, x, y, 0.1, 0.02, 5, cross_entropy))


@pytest.mark.parametrize("loss", ["kl", "se", lambda z, y: -z.amax(1)], ids=["kl", "se", "callable"])
def test_without_labels_success_is_a_change_of_prediction(loss):
    x, _ = batch()
    net = linear()
    attack = fastadv.PGD(net, 0.1, loss=loss, keep_best=True, generator=seed())
    adv = attack(x)
    assert torch.equal(attack.info.success, net(adv).argmax(1) != net(x).argmax(1))
    assert attack.info.success.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", cross_entropy])
def test_targeted_reaches_the_target(loss, dtype):
    """Also in low precision, where a peer's targeted attack ascends."""
    x, y = batch(dtype=dtype)
    net, target = linear_in(dtype), (linear()(x.float()).argmax(1) + 1 + y % 8) % 10
    attack = fastadv.PGD(net, 0.5, loss=loss, targeted=True, keep_best=True)
    adv = attack(x, target)
    last = fastadv.pgd(net, x, target, 0.5, loss=loss, targeted=True)
    if loss == "dlr":  # promises no more than that the target overtakes the clean class; a third one may pass both
        for logits in (net(adv), net(last)):
            own, goal = (logits.gather(1, k[:, None]) for k in (net(x).argmax(1), target))
            assert (goal > own).all()
        return
    assert (net(adv).argmax(1) == target).all()
    assert attack.info.success.all()
    assert (net(last).argmax(1) == target).all()


class UnhashableLoss:
    __hash__ = None

    def __call__(self, logits, y):
        return cross_entropy(logits, y)


@pytest.mark.parametrize("loss", [cross_entropy, nn.CrossEntropyLoss(reduction="none"), UnhashableLoss()])
def test_a_loss_may_be_any_callable(loss):
    x, y = batch(dtype=torch.float64)
    net = cnn().double()
    adv = fastadv.pgd(net, x, y, 0.03, steps=4, loss=loss, init="zero")
    assert torch.equal(adv, fastadv.pgd(net, x, y, 0.03, steps=4, init="zero"))


# ----------------------------------------------------------------------------------------- per-sample sizes, shapes


@pytest.mark.parametrize("norm", NORMS)
def test_scalar_eps_and_alpha_may_be_floats_or_tensors(norm):
    x, y = batch()
    e = EPS[norm]
    first, *rest = (
        fastadv.pgd(linear(), x, y, eps, alpha, 3, norm, generator=seed())
        for eps, alpha in [
            (e, e / 4), (torch.tensor(e), torch.tensor(e / 4)), (torch.full((6,), e), torch.full((6,), e / 4)),
            (torch.full((6,), e, dtype=torch.float64), e / 4), (e, torch.full((6,), e / 4, dtype=torch.float64)),
        ]
    )  # fmt: skip
    assert all(torch.equal(r, first) for r in rest)


@pytest.mark.parametrize("norm", NORMS)
def test_per_sample_eps_and_alpha_are_those_of_separate_attacks(norm):
    x, y = batch(dtype=torch.float64)
    net, eps = linear_in(torch.float64), EPS[norm] * torch.arange(6, dtype=torch.float64)
    alpha = eps.flip(0) / 4
    together = fastadv.pgd(net, x, y, eps, alpha, 5, norm, init="zero")
    for i in range(6):
        alone = fastadv.pgd(net, x[i : i + 1], y[i : i + 1], float(eps[i]), float(alpha[i]), 5, norm, init="zero")
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("option", ["keep_best", "early_stop", "restarts"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_batch_of_one_and_an_empty_one(norm, option):
    x, y = batch(n=1)
    attack = fastadv.PGD(linear(), EPS[norm], norm=norm, **{option: 2 if option == "restarts" else True})
    assert attack(x, y).shape == x.shape
    empty = attack(x[:0], y[:0])
    assert empty.shape == (0, 3, 8, 8)
    assert empty.dtype == x.dtype
    assert attack.info.forwards == 0
    assert attack.info.zero_grad.shape == attack.info.nan_grad.shape == (0,)
    hollow = attack(torch.zeros(6, 0), torch.zeros(6, dtype=torch.long))
    assert hollow.shape == (6, 0)
    assert attack.info.zero_grad.shape == (6,)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1,), (192,), (3, 64), (3, 2, 4, 8)], ids=str)
def test_samples_of_any_shape(shape, norm):
    x, y = batch(shape=shape)
    attack = fastadv.PGD(linear(features=math.prod(shape)), EPS[norm], norm=norm, keep_best=True)
    adv = attack(x, y)
    assert adv.shape == x.shape
    assert not torch.equal(adv, x)
    assert attack.info.zero_grad.shape == attack.info.nan_grad.shape == attack.info.success.shape == (6,)


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}


@pytest.mark.parametrize("options", [{}, {"keep_best": True}, {"restarts": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_memory_format_is_kept_and_changes_nothing(norm, layout, dtype, options):
    x, y = batch(dtype=dtype)
    strange = LAYOUTS[layout](x)
    adv = fastadv.pgd(linear_in(dtype), strange, y, EPS[norm], norm=norm, init=strange, **options)
    assert adv.stride() == torch.empty_like(strange).stride()
    plain = strange.contiguous()
    expected = fastadv.pgd(linear_in(dtype), plain, y, EPS[norm], norm=norm, init=plain, **options)
    torch.testing.assert_close(adv, expected)


# ------------------------------------------------------------------------------------- what the model may be


@pytest.mark.parametrize(
    "model",
    [lambda z: z.flatten(1)[:, :10], linear().forward, functools.partial(torch.mul, 2), nn.Identity()],
    ids=["function", "method", "partial", "identity"],
)
def test_any_callable_is_a_model(model):
    """Identity-like models hand the attack its own image as logits."""
    x, y = batch(shape=(10,) if not hasattr(model, "__self__") else (192,))
    adv = fastadv.pgd(model, x, y, 0.1, keep_best=True, init="zero")
    assert (carlini_wagner(model(adv), y) > carlini_wagner(model(x), y)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", [*LOSSES, cross_entropy])
def test_autocast_model_on_fp32_images(norm, loss):
    x, y = batch()
    attack = fastadv.PGD(cnn(), EPS[norm], norm=norm, loss=loss, keep_best=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert attack.model(x).dtype == torch.bfloat16
        adv = attack(x, y)
    assert adv.dtype == torch.float32
    assert (distance(adv, x, norm) <= EPS[norm] * (1 + 1e-5)).all()
    assert not attack.info.zero_grad.any()


def test_model_with_a_wider_output():
    x, y = batch()
    net = linear()
    narrow = fastadv.pgd(net, x, y, 0.1, init="zero")
    assert torch.equal(fastadv.pgd(lambda z: net(z).double(), x, y, 0.1, init="zero"), narrow)


# ------------------------------------------------------------------------------- the best iterate, restarts, info


def best_of(candidates, net, y, targeted):
    """Per sample: a fooling image before any other, then the higher loss (the lower, for a target)."""
    images = torch.stack(candidates)  # [K, N, ...]
    logits = torch.stack([net(c) for c in candidates])
    loss = torch.stack([cross_entropy(z, y) for z in logits])
    fooled = (logits.argmax(2) == y) if targeted else (logits.argmax(2) != y)
    rank = fooled * 1e6 + (-loss if targeted else loss)
    best = rank.argmax(0)
    return images[best, torch.arange(len(y))], fooled.any(0)


@pytest.mark.parametrize("eps", [0.01, 0.1], ids=["few fooled", "many fooled"])
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_keep_best_returns_the_best_of_all_iterates(targeted, eps):
    x, y = batch(n=24, dtype=torch.float64)
    net = cnn().double().eval()
    if not targeted:
        y = torch.where(torch.arange(24) < 4, y, net(x).argmax(1))
    start = start_in_ball(x, eps)
    # Steps so long that the last iterate is not the best.
    args = {"eps": eps, "alpha": 1.5 * eps, "targeted": targeted, "init": start}
    iterates = [fastadv.pgd(net, x, y, **args, steps=k) for k in range(1, 8)]
    expected, fooled = best_of([start, *iterates], net, y, targeted)
    attack = fastadv.PGD(net, **args, steps=7, keep_best=True)
    adv = attack(x, y)
    assert not torch.equal(expected, iterates[-1])
    assert torch.equal(attack.info.success, fooled)
    torch.testing.assert_close(cross_entropy(net(adv), y), cross_entropy(net(expected), y), rtol=0, atol=1e-9)


@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_restarts_return_the_best_run_of_each_sample(targeted, keep_best):
    """Not the last one of all samples, as a peer does; so a sample is never worse off than in a single run."""
    x, y = batch(n=24, dtype=torch.float64)
    net = cnn().double().eval()
    y = y if targeted else net(x).argmax(1)
    generator = seed()
    options = {"eps": 0.03, "alpha": 0.045, "steps": 5, "targeted": targeted, "keep_best": keep_best}
    runs = [fastadv.pgd(net, x, y, **options, generator=generator) for _ in range(4)]
    expected, fooled = best_of(runs, net, y, targeted)
    attack = fastadv.PGD(net, **options, restarts=4, generator=seed())
    adv = attack(x, y)
    assert not torch.equal(expected, runs[-1])
    assert torch.equal(adv, expected)
    assert torch.equal(attack.info.success, fooled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"keep_best": True}, {"restarts": 3}, {"early_stop": True}], ids=str)
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_info_is_what_the_returned_images_do(targeted, options, dtype):
    """Also in low precision: what was evaluated is what is returned, not an fp32 original of it."""
    x, y = batch(n=32, dtype=dtype)
    net = linear_in(dtype)
    y = y if targeted else net(x).argmax(1)
    attack = fastadv.PGD(net, 0.02, targeted=targeted, generator=seed(), **options)
    logits = net(attack(x, y))
    fooled = logits.argmax(1) == y if targeted else logits.argmax(1) != y
    assert torch.equal(attack.info.success, fooled)
    assert 0 < fooled.sum() < len(y)  # both answers occur
    ours = attack.info.loss.double()
    expected = cross_entropy(logits.double(), y).expm1().log()  # log((1 - p) / p)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "with_labels", "forwards"),
    [
        ({}, True, 5),
        ({"keep_best": True}, True, 6),
        ({"restarts": 3}, True, 18),
        ({"restarts": 3, "keep_best": True}, True, 18),
        ({"loss": "kl"}, True, 6),
        ({"loss": "kl"}, False, 6),
        ({"loss": "kl", "keep_best": True, "restarts": 2}, False, 13),
        ({"loss": "dlr", "targeted": True}, True, 6),  # from the clean prediction
        ({"loss": cross_entropy}, True, 5),
        ({"loss": lambda z, y: z.logsumexp(1)}, False, 5),
        ({"loss": lambda z, y: z.logsumexp(1), "keep_best": True}, False, 7),  # one for the clean prediction
        ({"early_stop": True, "eps": 0.0}, True, 6),  # nothing is fooled: no stop
        ({"early_stop": True, "eps": 1.0, "restarts": 3}, True, 2),  # everything is, after one step: one stop for all
    ],
    ids=lambda value: re.sub(r"<function (.+?) at .*?>", r"\1", str(value)),  # the same in every process
)
def test_forwards_are_as_few_as_documented_and_counted(options, with_labels, forwards):
    x, _ = batch()
    net = linear()
    y = net(x).argmax(1) if with_labels else None
    calls = count_calls(net)
    init = "normal" if options.get("loss") == "kl" else "zero"
    attack = fastadv.PGD(net, **{"eps": 0.1, "alpha": 1.0, "steps": 5, "init": init, **options})
    attack(x, y)
    assert attack.info.forwards == len(calls) == forwards


def test_early_stop_moves_no_sample_that_fools_the_model():
    x, _ = batch(n=16, dtype=torch.float64)
    net = linear_in(torch.float64)
    y = net(x).argmax(1)
    y[:3] = (y[:3] + 1) % 10  # these fool it from the start
    iterates = [x, *(fastadv.pgd(net, x, y, 0.03, 0.003, k, init="zero") for k in range(1, 11))]
    fooled = torch.stack([net(z).argmax(1) != y for z in iterates])  # [11, N]
    stop = torch.where(fooled.any(0), fooled.double().argmax(0), 10)  # each sample's first fooling iterate, or the last
    assert len(set(stop.tolist())) > 3  # samples stop at different times
    seen = count_calls(net)
    attack = fastadv.PGD(net, 0.03, 0.003, 10, init="zero", early_stop=True)
    adv = attack(x, y)
    for i, s in enumerate(stop):
        assert torch.equal(adv[i], iterates[s][i])
    for k, images in enumerate(seen):  # those that stand go on, in batches that shrink, beside some that stopped
        expected = torch.stack([iterates[min(k, s + 1)][i] for i, s in enumerate(stop)])
        present = (images[:, None] == expected).flatten(2).all(2).any(0)
        assert int(present.sum()) == len(images)
        assert present[stop > k].all()
    assert len(seen[0]) == 16 > len(seen[-1])
    assert torch.equal(attack.info.success, fooled.any(0))


def test_robust_samples_are_not_returned_clean():
    """Adversarial training needs them; peers hand back x."""
    x, _ = batch()
    net = linear()
    attack = fastadv.PGD(net, 1e-3, keep_best=True, generator=seed())
    adv = attack(x, net(x).argmax(1))
    assert not attack.info.success.any()
    assert (distance(adv, x, "linf") > 0.9e-3).all()


def test_zero_gradient_is_reported():
    x, y = batch()
    net = linear()
    attack = fastadv.PGD(lambda z: net(torch.where(torch.arange(6)[:, None, None, None] < 2, 0 * z, z)), 0.1)
    attack(x, y)
    assert attack.info.zero_grad.tolist() == [True, True, False, False, False, False]
    assert not attack.info.nan_grad.any()


def test_black_images_that_need_no_step_have_no_zero_gradient():
    x, y = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)
    net = linear()
    attack = fastadv.PGD(net, 0.1, init="zero", early_stop=True)
    attack(x, (net(x).argmax(1) + 1) % 10 + y)
    assert attack.info.success.all()
    assert attack.info.forwards == 1
    assert not attack.info.zero_grad.any()  # no gradient was taken


# ------------------------------------------------------------------------------------------------------- randomness


def test_generator_makes_the_attack_reproducible_and_spares_the_global_one():
    x, y = batch()
    before = torch.get_rng_state()
    runs = [fastadv.pgd(linear(), x, y, 0.1, 0.01, 3, restarts=2, generator=seed(s)) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), before)


def draw_seed(x):
    torch.empty((), dtype=torch.int64).random_()


def draw_direction_and_length(x):
    torch.empty_like(x).normal_()
    x.new_empty(len(x)).uniform_()


@pytest.mark.parametrize(
    ("init", "norm", "draw"),
    [
        ("zero", "linf", lambda x: None),
        ("normal", "linf", lambda x: torch.empty_like(x).normal_()),
        ("uniform", "linf", draw_seed),
        ("uniform", "l2", draw_direction_and_length),
        ("uniform", "l1", draw_direction_and_length),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.parametrize("restarts", [1, 3])
def test_global_generator_gives_what_a_start_needs_and_is_not_reseeded(init, norm, draw, restarts):
    x, y = batch()
    for outer in (1, 2):
        torch.manual_seed(outer)
        for _ in range(restarts):
            draw(x)
        expected = torch.rand(3)
        torch.manual_seed(outer)
        fastadv.pgd(linear(), x, y, 0.1, 0.01, 2, norm, init=init, restarts=restarts)
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_uniform_start_is_spread_over_the_ball(norm, dtype):
    x, y = batch(n=64, dtype=dtype)
    start = fastadv.pgd(linear_in(dtype), x, y, EPS[norm], 0.0, 1, norm, bounds=None, generator=seed())
    d = (start.double() - x.double()) / EPS[norm]
    lengths = distance(d, 0 * d, norm) if norm != "linf" else d.flatten().abs()
    assert 0.4 < lengths.mean() < 0.6
    assert lengths.min() < 0.1
    assert 0.9 < lengths.max() <= 1 + 1e-6
    assert abs(d.mean() / d.std()) < 0.05  # no side is preferred
    assert abs(torch.corrcoef(d.flatten(1)[:2])[0, 1]) < 0.3  # samples draw for themselves


# ------------------------------------------------------------------------------------- what goes in and what comes out


def test_arguments_are_not_modified():
    x, y = batch()
    tensors = {"x": x, "y": y, "eps": torch.full((6,), 0.1), "alpha": torch.full((6,), 0.03), "init": x.flip(0)}
    copies = {k: (v.clone(), v._version) for k, v in tensors.items()}
    for norm, early_stop in itertools.product(NORMS, (False, True)):
        fastadv.pgd(linear(), **tensors, norm=norm, early_stop=early_stop, restarts=2)
    for k, (copy, version) in copies.items():
        assert torch.equal(tensors[k], copy), k
        assert tensors[k]._version == version, k


@pytest.mark.parametrize("name", ["x", "init", "eps", "alpha"])
def test_arguments_may_require_grad(name):
    x, y = batch()
    tensors = {"x": x, "init": x.flip(0).contiguous(), "eps": torch.full((6,), 0.1), "alpha": torch.full((6,), 0.03)}
    expected = fastadv.pgd(linear(), y=y, **tensors)
    leaf = tensors[name].clone().requires_grad_()
    leaf.grad = torch.ones_like(leaf)
    for value in (leaf, leaf * 1):  # a leaf and the middle of a graph
        adv = fastadv.pgd(linear(), y=y, **{**tensors, name: value})
        assert torch.equal(adv, expected)
        assert not adv.requires_grad
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    assert leaf.requires_grad


@pytest.mark.parametrize("options", [{}, {"keep_best": True}, {"restarts": 2}, {"steps": 1, "alpha": 0.0}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_is_detached_and_its_own(dtype, options):
    x, y = batch(dtype=dtype)
    attack = fastadv.PGD(linear_in(dtype), **{"eps": 0.1, "init": "zero", **options})
    first = attack(x, y)
    copy = first.clone()
    second = attack(x.flip(0), y)
    assert torch.equal(first, copy)  # a later call does not write into an earlier result
    assert len({t.untyped_storage().data_ptr() for t in (x, first, second)}) == 3
    assert first.is_leaf
    assert not first.requires_grad
    assert first.dtype == dtype


# ------------------------------------------------------------------------------------------------------- NaN


@pytest.mark.parametrize("options", [{}, {"keep_best": True}, {"restarts": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_nan_gradient_of_one_image_moves_nothing_and_spreads_nowhere(norm, dtype, options):
    x, y = batch(dtype=dtype)
    net, args = linear_in(dtype), {"eps": EPS[norm], "norm": norm, "init": "zero", **options}
    attack = fastadv.PGD(NaNGradient(net, row=2), **args)
    with pytest.warns(fastadv.NaNGradientWarning, match="not moved"):
        adv = attack(x, y)
    assert torch.equal(adv[2], x[2])
    others = torch.arange(6) != 2
    torch.testing.assert_close(adv[others], fastadv.pgd(net, x, y, **args)[others])
    assert attack.info.nan_grad.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("norm", NORMS)
def test_nan_logits_of_one_image_spread_nowhere(norm):
    x, y = batch()
    net, poison = linear(), torch.where(torch.arange(6) == 2, math.nan, 1.0)[:, None]
    args = {"eps": EPS[norm], "norm": norm, "init": "zero", "keep_best": True}
    with pytest.warns(fastadv.NaNGradientWarning):
        adv = fastadv.pgd(lambda z: net(z) * poison, x, y, **args)
    assert torch.equal(adv[2], x[2])
    others = torch.arange(6) != 2
    torch.testing.assert_close(adv[others], fastadv.pgd(net, x, y, **args)[others])
