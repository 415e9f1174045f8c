"""MI-FGSM: what the paper computes, literally and in closed form, and what holds for every attack."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import Answers, FailsAt, NaNGradient, batch, cnn, linear, one_thread, state, surroundings  # noqa: F401
from torch import nn

import fastadv
from fastadv import MIFGSM, mifgsm

EPS = 8 / 255


def literal_mifgsm(model, x, y, eps, steps, decay, targeted=False):
    """Algorithm 1 of the paper, in plain PyTorch."""
    adv, velocity = x.clone(), torch.zeros_like(x)
    for _ in range(steps):
        adv.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(adv), y, reduction="sum"), adv)
        velocity = decay * velocity + (-g if targeted else g) / g.abs().flatten(1).sum(1).view(-1, 1, 1, 1)
        adv = (adv.detach() + eps / steps * velocity.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return adv


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_it_is_the_papers_algorithm(decay, classes, targeted):
    x, y = batch(classes=classes, dtype=torch.float64)
    model = cnn(classes).double().eval()
    expected = literal_mifgsm(model, x, y, 4 * EPS, 7, decay, targeted)
    torch.testing.assert_close(mifgsm(model, x, y, 4 * EPS, steps=7, decay=decay, targeted=targeted), expected)


def test_momentum_makes_a_difference():
    x, y = batch()
    model = cnn().eval()
    assert not torch.equal(mifgsm(model, x, y, 8 * EPS), mifgsm(model, x, y, 8 * EPS, decay=0.0))


def test_without_decay_it_is_the_iterative_fgsm():
    x, y = batch()
    model = cnn().eval()
    expected = fastadv.pgd(model, x, y, EPS, EPS / 10, 10, init="zero")
    assert torch.equal(mifgsm(model, x, y, EPS, decay=0.0), expected)


def test_a_linear_model_by_hand():
    """Two classes: the gradient is w all the way, however large it is; ten steps of eps/10 go to the corner of the ball."""
    x, y = batch(classes=2)
    x = 0.25 + 0.5 * x
    model = linear(2)
    w = (model[1].weight[0] - model[1].weight[1]).detach().view(1, *x.shape[1:])
    sign = torch.where(y == 1, 1.0, -1.0).view(-1, 1, 1, 1) * w.sign()
    eps = torch.linspace(0, 0.2, len(x))
    attack = MIFGSM(model, eps)
    torch.testing.assert_close(attack(x, y), x + eps.view(-1, 1, 1, 1) * sign)
    assert attack.info.forwards == 11  # ten steps and the last word
    assert attack.info.queries.tolist() == [11] * len(x)
    torch.testing.assert_close(MIFGSM(model, 0.2, alpha=0.01)(x, y), x + 0.1 * sign)


def test_a_gradient_that_vanishes_or_is_nan_leaves_the_others_alone():
    x, y = batch()
    net = cnn().eval()
    expected = mifgsm(net, x, y, EPS)
    adv = mifgsm(NaNGradient(net, 2), x, y, EPS)
    assert torch.equal(adv[2], x[2])
    others = torch.arange(len(x)) != 2
    assert torch.equal(adv[others], expected[others])
    flat = nn.Sequential(nn.ReLU(), linear())  # no gradient at all below 0
    assert torch.equal(mifgsm(flat, -0.1 - x, y, 0.05, bounds=None), -0.1 - x)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", lambda z, y: F.cross_entropy(z, y, reduction="none")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_images_are_in_ball_and_box_and_fool(dtype, loss):
    x, y = batch(dtype=dtype)
    model = cnn().to(dtype).eval()
    y = model(x).argmax(1)
    attack = MIFGSM(model, 0.1, loss=loss)
    adv = attack(x, y)
    assert adv.dtype == dtype
    assert not adv.requires_grad
    assert ((adv.double() - x.double()).abs() <= 0.1 + (1e-7 if dtype in (torch.float32, torch.float64) else 0)).all()
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert torch.equal(attack.info.success, model(adv).argmax(1) != y)
    assert attack.info.success.double().mean() > 0.5


@pytest.mark.parametrize("options", [{}, {"loss": "dlr"}, {"targeted": True}], ids=str)
def test_a_samples_result_does_not_depend_on_its_batch(options):
    x, y = batch(n=7, dtype=torch.float64)
    model, eps = cnn().double().eval(), torch.linspace(0.01, 0.1, 7)
    whole = mifgsm(model, x, y, eps, **options)
    for rows in (torch.tensor([4, 2, 6, 0, 5, 1, 3]), torch.tensor([5, 1]), *torch.arange(7)[:, None]):
        torch.testing.assert_close(mifgsm(model, x[rows], y[rows], eps[rows], **options), whole[rows])


def test_no_samples_and_no_labels():
    x, y = batch()
    model = cnn().eval()
    assert mifgsm(model, x[:0], y[:0], EPS).shape == (0, *x.shape[1:])
    assert torch.equal(mifgsm(model, x, None, EPS), mifgsm(model, x, model(x).argmax(1), EPS))


@pytest.mark.parametrize(
    "options", [{"twin": True}, {"memory": "signs"}, {"engine": "compile"}, {"precision": "bf16"}], ids=str
)
def test_every_way_of_running_it_attacks(options, no_codegen):
    x, y = batch()
    model = cnn().eval()
    attack = MIFGSM(model, 0.1, **options)
    for _ in range(3):
        adv = attack(x, y)
    cosine = F.cosine_similarity((adv - x).flatten(), (mifgsm(model, x, y, 0.1) - x).flatten(), dim=0)
    assert cosine > (0.9 if "precision" in options else 0.999)


@pytest.mark.parametrize("fails", [None, 3])
def test_nothing_is_disturbed(fails):
    x, y = batch()
    model = cnn().train()
    before, around, images = state(model), surroundings(), x.clone()
    if fails is None:
        mifgsm(model, x, y, EPS)
    else:
        with pytest.raises(RuntimeError, match="as the test asked"):
            mifgsm(FailsAt(model, fails), x, y, EPS)
    assert state(model) == before
    assert surroundings() == around
    assert torch.equal(x, images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l2"}, "norm must be one of 'linf'; got 'l2'"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"decay": -0.1}, "decay must be a finite number >= 0; got -0.1"),
        ({"decay": math.nan}, "decay must be a finite number >= 0"),
        ({"loss": "kl"}, "loss must be one of 'ce', 'margin', 'dlr'; got 'kl'"),
        ({"eps": None}, "eps must be a finite number >= 0"),
        ({"eps": -1}, "eps must be a finite number >= 0"),
        ({"alpha": math.inf}, "alpha must be a finite number >= 0"),
        ({"alpha": torch.ones(3)}, r"alpha must be a number or have shape \[6\]"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    x, y = batch()
    model = Answers(lambda logits, x: logits)
    with pytest.raises(ValueError, match=message):
        mifgsm(model, x, y, **{"eps": EPS, **options})
    assert model.calls == 0
