"""Random views, and the masked attack over them: closed forms, the mask, the draws, and how the model is left."""

from __future__ import annotations

import pytest
import torch
from models import FailsAt, batch, cnn, digits, linear, one_thread, seed, state, surroundings, trained_lenet  # noqa: F401
from torch import nn

import fastadv
from fastadv import RP2, EoT
from fastadv.attacks.physical import Affine, Light, Noise

MASK = torch.zeros(8, 8)
MASK[2:6, 1:5] = 1


def always(value: float):
    """In place of random numbers."""
    return lambda *shape: torch.full((6, *shape), value)


# -------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("view", [Affine(0, (1, 1), 0), Light(0, 0), Noise(0)], ids=str)
def test_views_of_no_strength_show_the_image(view):
    x, _ = batch()
    torch.testing.assert_close(view(x), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("view", [Affine(), Light(), Noise()], ids=str)
def test_each_image_is_seen_in_its_own_way_and_anew_in_each_call(view):
    x = batch(n=1)[0].expand(6, -1, -1, -1)
    first, second = view(x), view(x)
    assert first.shape == x.shape
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first, second)


def test_affine_shifts_by_a_fraction_of_width_and_height():
    x = torch.rand(6, 3, 8, 4, generator=seed())
    right = Affine(0, (1, 1), 0.25)(x, lambda *shape: torch.tensor([0.5, 0.5, 0.0, 1.0]).expand(6, 4))
    torch.testing.assert_close(right[:, :, :6, 1:], x[:, :, 2:, :3], rtol=0, atol=1e-5)


def test_affine_scales_about_the_centre():
    x = torch.zeros(6, 1, 8, 8)
    x[:, :, 3:5, 3:5] = 1
    twice = Affine(0, (2, 2), 0)(x, always(0.5))
    assert twice.sum() == pytest.approx(4 * float(x.sum()))
    half = Affine(0, (0.5, 0.5), 0)(x.repeat_interleave(2, 2).repeat_interleave(2, 3), always(0.5))
    assert half.shape == (6, 1, 16, 16)
    assert half.sum() == pytest.approx(float(x.sum()))


@pytest.mark.parametrize("shape", [(8, 8), (8, 4), (5, 9)], ids=str)
def test_affine_rotates_without_distortion(shape):
    x = torch.rand(6, 3, *shape, generator=seed())
    torch.testing.assert_close(
        Affine(180, (1, 1), 0)(x, lambda *_: torch.tensor([1.0, 0.5, 0.5, 0.5]).expand(6, 4)), x.flip(2, 3)
    )
    dot = torch.zeros(6, 1, *shape)
    dot[:, :, shape[0] // 2, shape[1] // 2] = 1
    turned = Affine(90, (1, 1), 0)(dot, lambda *_: torch.tensor([1.0, 0.5, 0.5, 0.5]).expand(6, 4))
    if shape[0] == shape[1]:
        torch.testing.assert_close(turned, dot.rot90(1, (2, 3)))
    assert turned.sum() == pytest.approx(6, abs=1e-3)


def test_light_moves_mean_and_contrast():
    x, _ = batch()
    mean = x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(Light(0.2, 0.5)(x, always(1.0)), (x - mean) * 1.5 + mean + 0.2)
    torch.testing.assert_close(Light(0.2, 0.5)(x, always(0.0)), (x - mean) * 0.5 + mean - 0.2)


def test_noise_is_standard_normal_times_std():
    x = torch.zeros(50, 3, 16, 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noise = Noise(0.3)(x)
    assert abs(float(noise.mean())) < 0.01
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02)
    assert float((noise.abs() > 0.6).float().mean()) == pytest.approx(0.0455, abs=0.004)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Affine(degrees=-1), "degrees must be a finite number >= 0"),
        (lambda: Affine(scale=(1.1, 0.9)), "scale must be"),
        (lambda: Affine(scale=(0, 1)), "scale must be"),
        (lambda: Affine(scale=1), "scale must be"),
        (lambda: Affine(shift="far"), "shift must be"),
        (lambda: Affine()(torch.rand(6, 4)), r"x must be images \[N, C, H, W\]"),
        (lambda: Light(brightness=-1), "brightness must be"),
        (lambda: Light(contrast=None), "contrast must be"),
        (lambda: Noise(-1), "std must be"),
    ],
)
def test_bad_views(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("shape", ["H, W", "C, H, W", "N, 1, H, W", "bool"])
def test_on_a_linear_model_the_masked_corner_and_nothing_else(shape):
    x, _ = batch(n=6)
    net, mask = linear(2), MASK
    mask = {"H, W": mask, "C, H, W": mask.expand(3, 8, 8), "N, 1, H, W": mask.expand(6, 1, 8, 8), "bool": mask.bool()}[shape]
    y = net(x).argmax(1)
    sign = (net[1].weight[1] - net[1].weight[0]).detach().sign().view(3, 8, 8) * (1 - 2 * y).view(-1, 1, 1, 1)
    adv = RP2(net, mask, eps=0.1, steps=10)(x, y)
    torch.testing.assert_close(adv, (x + 0.1 * sign * MASK).clamp(0, 1))
    assert torch.equal(adv[:, :, MASK == 0], x[:, :, MASK == 0])
    walls = RP2(net, mask, steps=10)(x, y)
    torch.testing.assert_close(walls, torch.where(MASK == 1, (sign + 1) / 2, x))


def test_without_views_it_is_pgd_from_x():
    x, y = batch(dtype=torch.float64)
    net = cnn().double().eval()
    adv = RP2(net, torch.ones(1, dtype=torch.float64), eps=0.05, steps=10, samples=1)(x, y)
    torch.testing.assert_close(adv, fastadv.pgd(net, x, y, 0.05, steps=10, init="zero"))
    adv = RP2(net, torch.ones(()), eps=0.5, steps=10, samples=1, norm="l2", targeted=True)(x, y)
    torch.testing.assert_close(adv, fastadv.pgd(net, x, y, 0.5, steps=10, init="zero", norm="l2", targeted=True))


def test_eps_and_alpha_per_sample_and_no_bounds():
    x, y = batch(dtype=torch.float64)
    eps = torch.linspace(0.1, 0.6, 6).double()
    adv = RP2(linear().double(), MASK, eps=eps, bounds=None, steps=3)(x * 10, y)
    torch.testing.assert_close((adv - x * 10).abs().amax((1, 2, 3)), eps)
    adv = RP2(linear().double(), MASK, alpha=eps, bounds=None, steps=2, norm="l2")(x, y)
    assert (((adv - x).flatten(1).norm(dim=1) - 2 * eps).abs() < 0.1).all()


def test_shared_is_one_perturbation_up_the_sum_of_the_losses():
    x, y = batch(n=6, dtype=torch.float64)
    net = cnn().double().eval()
    adv = RP2(net, MASK, eps=0.1, alpha=0.1, steps=1, shared=True, bounds=None)(x, y)
    moved = adv - x
    assert torch.allclose(moved, moved[:1].expand_as(moved))
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fastadv.ops.log_odds(net(z), y)[0].sum(), z)
    torch.testing.assert_close(moved[0], 0.1 * gradient.sum(0).sign() * MASK)
    together = RP2(net, MASK, eps=0.1, steps=10, shared=True)(x, y)
    assert together.min() >= 0
    assert together.max() <= 1
    with pytest.raises(ValueError, match="must be numbers where the perturbation is shared"):
        RP2(net, MASK, eps=torch.ones(6), shared=True)


def test_views_average_to_what_they_let_through():
    """Shifts by any amount on a linear model: what counts is the mean of the shifted weights, and one view shows it badly."""
    x = torch.full((4, 1, 8, 8), 0.5)
    net, y = linear(2, 64), torch.zeros(4, dtype=torch.long)
    weight = (net[1].weight[1] - net[1].weight[0]).detach().view(1, 1, 8, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        z = torch.zeros(4000, 1, 8, 8, requires_grad=True)
        (mean,) = torch.autograd.grad((Affine(20, (0.8, 1.2), 0.25)(z) * weight).sum(), z)
    best = mean.mean(0).sign()
    agreement = [
        ((RP2(net, torch.ones(()), [Affine(20, (0.8, 1.2), 0.25)], 0.1, 0.1, 1, samples)(x, y) - x).sign() == best)
        .float()
        .mean()
        for samples in (1, 300)
    ]
    assert agreement[0] < 0.8
    assert agreement[1] > 0.93


# ------------------------------------------------------------------------------------------------------- the contracts

VIEWS = [Affine(), Light(), Noise()]


def test_batches_pieces_and_orders_agree_and_torchs_generator_rests():
    x, y = batch(n=7, dtype=torch.float64)
    net = cnn().double()

    def attacked(chosen, value=3):
        return RP2(net, MASK, VIEWS, 0.2, steps=3, samples=2, seed=value)(x[chosen], y[chosen], samples=chosen)

    around = surroundings()
    whole, order = attacked(torch.arange(7)), torch.tensor([4, 0, 6, 2, 5, 1, 3])
    torch.testing.assert_close(attacked(order), whole[order])
    torch.testing.assert_close(torch.cat([attacked(torch.arange(3)), attacked(torch.arange(3, 7))]), whole)
    assert surroundings() == around
    assert not torch.allclose(attacked(torch.arange(7), 4), whole)


def test_each_view_draws_anew():
    """In each step, for each of its samples, and for each view of one sample."""
    x, y = batch()
    seen: list[bytes] = []

    def look(z, uniform):
        seen.extend(row.numpy().tobytes() for _ in range(2) for row in uniform(3))
        return z

    attack = RP2(linear(), MASK, [look, look], steps=3, samples=2)
    attack(x, y)
    assert len(set(seen)) == len(seen) == 6 * 2 * 2 * 3 * 2
    first = seen.copy()
    seen.clear()
    attack(x, y)
    assert seen == first
    assert attack.info.forwards == 3 * 2 + 1


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize(
    "options", [{"engine": "compile"}, {"twin": True}, {"memory": "signs"}, {"precision": "bf16"}], ids=str
)
def test_engines_agree(options):
    x, y = batch()
    net = linear() if "engine" in options else cnn().eval()
    expected = RP2(net, MASK, VIEWS, 0.2, steps=3, samples=2)(x, y)
    attack = RP2(net, MASK, VIEWS, 0.2, steps=3, samples=2, **options)
    for _ in range(2):  # the first call is eager
        adv = attack(x, y)
    assert ((adv - expected).abs() < 1e-5).float().mean() > (0.95 if "precision" not in options else 0.9)
    assert ("compile" in str(attack.stats.steps)) == ("engine" in options)
    assert attack.stats.twin == ("used" if "twin" in options else "none")


@pytest.mark.parametrize("k", [0, 1, 3, 4])
def test_the_model_is_left_as_found_also_when_it_raises(k):
    x, y = batch()
    net = FailsAt(cnn().train(), k)
    before, around = state(net), surroundings()
    attack = RP2(net, MASK, VIEWS, steps=2, samples=2)
    with pytest.raises(RuntimeError, match="as the test asked"):
        attack(x, y)
    assert state(net) == before
    net.k = -1
    attack(x, y)
    assert state(net) == before
    assert surroundings() == around


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [0, 1, 6])
def test_dtypes_and_few_samples(n, dtype):
    x, y = (t[:n] for t in batch(dtype=dtype))
    adv = RP2(linear().to(dtype), MASK, VIEWS, 0.1, steps=2, samples=1, shared=True)(x, y)
    assert adv.dtype == dtype
    assert ((adv.double() - x.double()).abs() <= 0.1 + 1e-12).all()
    assert n == 0 or not torch.equal(adv, x)


def test_any_rank_without_views_that_need_images():
    x, y = torch.rand(6, 12, generator=seed()), torch.zeros(6, dtype=torch.long)
    mask = torch.tensor([1.0, 0, 0] * 4)
    adv = RP2(linear(3, 12), mask, [Light(), Noise()], 0.1, steps=3)(x, y)
    assert torch.equal(adv[:, mask == 0], x[:, mask == 0])
    assert (adv[:, mask == 1] != x[:, mask == 1]).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": 0.5 * MASK}, "mask must be a tensor of zeros and ones"),
        ({"mask": [0, 1]}, "mask must be a tensor of zeros and ones"),
        ({"mask": torch.ones(7, 8)}, "mask must broadcast to x"),
        ({"mask": torch.ones(2, 6, 3, 8, 8)}, "mask must broadcast to x"),
        ({"views": Affine()}, "views must be a sequence of callables"),
        ({"views": [3]}, "views must be a sequence of callables"),
        ({"views": [lambda z, _: z.detach()]}, "does not depend on x differentiably"),
        ({"bounds": None}, "alpha is needed"),
        ({"norm": "l2"}, "alpha is needed"),
        ({"norm": "l1"}, "norm must be one of 'linf', 'l2'"),
        ({"steps": 0}, "steps must be"),
        ({"samples": 0}, "samples must be"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"eps": torch.ones(5)}, "eps must be a number or have shape"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        RP2(**{"model": linear(), "mask": MASK, "steps": 1, **settings})(*batch())


# ------------------------------------------------------------------------------------------------------------- digits


def test_what_survives_shifts_was_made_for_them():
    x, y = (t[1200:1300] for t in digits())
    net, views = trained_lenet(), [Affine(0, (1, 1), 0.15)]
    seen = nn.Sequential(*views, net)

    def survives(adv):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return torch.stack([(seen(adv).argmax(1) != y).float().mean() for _ in range(20)]).mean()

    once = RP2(net, torch.ones(()), (), 0.2, steps=20, samples=1)(x, y)
    many = RP2(net, torch.ones(()), views, 0.2, steps=20)(x, y)
    through_eot = fastadv.pgd(EoT(seen, 4), x, y, 0.2, steps=20, init="zero")
    assert survives(many) > survives(once) + 0.04
    assert survives(through_eot) > survives(once) + 0.04
