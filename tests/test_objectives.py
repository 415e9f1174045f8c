"""Every training method against its own training step written down plainly: images, loss, gradients, statistics, weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from models import batch, cnn, count_calls, one_thread, seeded, state, surroundings  # noqa: F401
from test_functional import consistency, mart, pairwise, score, smoothed_over_others, transport
from torch import nn

import fastadv
from fastadv.reference.step import linf_start

EXACT = {"rtol": 1e-9, "atol": 1e-12}
EPS, CLASSES = 8 / 255, 10


def net(head: type | None = None, *options: object) -> nn.Module:
    """In float64 and train mode; two batch norms, no dropout, whose draws would depend on how often the model runs."""
    model = cnn(CLASSES, dropout=0.0)
    if head is not None:
        model[8] = seeded(head)(*options)
    return model.double().train()


def batches(sizes=(6, 6)):
    drawn = [batch(n + i, CLASSES, torch.float64) for i, n in enumerate(sizes)]
    return [(x[:n], y[:n]) for (x, y), n in zip(drawn, sizes, strict=True)]


# ---------------------------------------------------------------------------------------------- the methods, written plainly


def uniform(x, eps=EPS):
    return linf_start(x, eps, 0.0, 1.0, int(torch.empty((), dtype=torch.int64).random_()))


def normal(x):
    return x + 0.001 * torch.randn(x.shape, dtype=x.dtype)


def track(model, on):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.track_running_stats = on


def climb(model, x, adv, loss, eps=EPS, alpha=2 / 255, steps=10, bn="eval"):
    """Ascends loss(x') by signs; "batch" uses the batch's statistics and keeps the running ones, "train" updates them."""
    model.train(bn != "eval")
    track(model, bn != "batch")
    for _ in range(steps):
        adv = adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(adv), adv)
        adv = (adv + alpha * gradient.sign()).detach()
        adv = torch.min(torch.max(adv, x - eps), x + eps).clamp(0, 1)
    model.train()
    track(model, True)
    return adv


def kl(z, z_adv):
    return F.kl_div(z_adv.log_softmax(1), z.softmax(1), reduction="sum")


def errors(z, z_adv):
    return ((z_adv.softmax(1) - z.softmax(1)) ** 2).sum()


def standard(model, x, y):
    return None, F.cross_entropy(model(x), y)


def pgd_at(model, x, y, bn="train", steps=10, alpha=2 / 255, eps=EPS, start=uniform, label_loss=F.cross_entropy):
    adv = climb(model, x, start(x), lambda adv: F.cross_entropy(model(adv), y), eps, alpha, steps, bn)
    return adv, label_loss(model(adv), y)


def n_fgsm(model, x, y, noise=2.0, bn="train"):
    adv = uniform(x, noise * EPS)
    return pgd_at(model, x, y, bn, steps=1, alpha=EPS, eps=math.inf, start=lambda _: adv)


def half_half(model, x, y, together=True):
    adv = climb(model, x, uniform(x), lambda adv: F.cross_entropy(model(adv), y))
    if together:
        return adv, F.cross_entropy(model(torch.cat([x, adv])), torch.cat([y, y]))
    return adv, 0.5 * F.cross_entropy(model(x), y) + 0.5 * F.cross_entropy(model(adv), y)


def alp(model, x, y):
    model.eval()
    least_likely = model(x).argmin(1)
    adv = climb(model, x, uniform(x, 16 / 255), lambda adv: -F.cross_entropy(model(adv), least_likely), 16 / 255)
    both = model(torch.cat([x, adv]))
    return adv, F.cross_entropy(both, torch.cat([y, y])) + 0.5 * F.mse_loss(both[:6], both[6:])


def trades(model, x, y, beta=6.0, start=normal, eps=0.031, alpha=0.007, bn="eval", label_loss=F.cross_entropy, parity=False):
    adv = climb(model, x, start(x), lambda adv: kl(model(x), model(adv)), eps, alpha, bn=bn)
    z, z_adv = model(x), model(adv)
    again = model(x) if parity else z
    return adv, label_loss(z, y) + beta / len(x) * kl(again, z_adv)


def dm(model, x, y):
    def smooth(z, y):
        return F.cross_entropy(z, y, label_smoothing=0.1)

    return trades(model, x, y, 5.0, uniform, EPS, 2 / 255, "batch", smooth)


def mart_step(model, x, y):
    adv = climb(model, x, normal(x), lambda adv: F.cross_entropy(model(adv), y), 0.031, 0.007)
    z, z_adv = model(x), model(adv)
    return adv, mart(z, z_adv, y)


def score_step(model, x, y, *options):
    adv = climb(model, x, uniform(x), lambda adv: errors(model(x), model(adv)), bn="batch")
    z, z_adv = model(x), model(adv)
    return adv, score(z, z_adv, y, *options)


def score_pgd_at(model, x, y, clip=0.4**2 + 0.4**2 / 9):
    def error(adv):
        return ((model(adv).softmax(1) - F.one_hot(y, CLASSES)) ** 2).sum(1)

    adv = climb(model, x, uniform(x), lambda adv: error(adv).sum(), bn="train")
    return adv, F.relu(error(adv) - clip).mean()


def margin_loss(scale, margin):
    return lambda z, y: F.cross_entropy(scale * (z / scale - margin * F.one_hot(y, CLASSES).to(z)), y)


def pgd_he(model, x, y):
    return pgd_at(model, x, y, "eval", 10, 0.007, 0.031, normal, margin_loss(10.0, 0.2))


def trades_he(model, x, y):
    return trades(model, x, y, label_loss=margin_loss(15.0, 0.2))


def alp_he(model, x, y):
    """Pairs cosines, unscaled."""
    adv = climb(model, x, normal(x), lambda adv: F.cross_entropy(model(adv), y), 0.031, 0.007)
    z, z_adv = model(x), model(adv)
    he = margin_loss(20.0, 0.3)
    return adv, 0.5 * he(z, y) + 0.5 * he(z_adv, y) + 0.5 * F.mse_loss(z / 20, z_adv / 20)


def feature_scatter(model, x, y):
    adv = climb(model, x, uniform(x), lambda adv: transport(model(adv), model(x)).sum(), EPS, EPS, 1)
    return adv, smoothed_over_others(model(adv), y, 0.5)


def rst_terms(z, z_adv, y, beta, entropy_weight):
    log_p, known = z.log_softmax(1), y >= 0
    entropy = -(log_p.exp() * log_p).sum(1)
    loss = F.cross_entropy(z, y, ignore_index=-1) + beta / len(z) * kl(z, z_adv)
    return loss + entropy_weight * entropy[~known].mean() if entropy_weight else loss


def rst(model, x, y, beta=6.0, entropy_weight=0.0):
    adv = climb(model, x, normal(x), lambda adv: kl(model(x), model(adv)), 0.031, 0.007)
    z_adv, z = model(adv), model(x)
    return adv, rst_terms(z, z_adv, y, beta, entropy_weight)


def partly_labelled(x, y):
    return x, torch.where(torch.arange(len(y)) % 3 == 0, -1, y)


def rst_stability(model, x, y):
    adv = (x + 0.25 * torch.randn(x.shape, dtype=x.dtype)).clamp(0, 1)
    z_adv, z = model(adv), model(x)
    return adv, rst_terms(z, z_adv, y, 6.0, 0.0)


def mmc(model, x, y):
    target = (y + torch.randint(1, CLASSES, y.shape)) % CLASSES
    adv = climb(model, x, uniform(x, 8 / 256), lambda adv: model(adv).gather(1, target[:, None]).sum(), 8 / 256, 2 / 256)
    phi = model[8].embed(model[:8](adv))
    return adv, ((phi - model[8].centres[y]) ** 2).sum(1).mean()


def two_views(x, y):
    return x, torch.cat([y[:3], y[:3]])


def consistent(model, x, y):
    adv = climb(model, x, uniform(x), lambda adv: F.cross_entropy(model(adv), y), bn="train")
    z = model(adv)
    return adv, F.cross_entropy(z, y) + consistency(z[:3], z[3:])


class Step(NamedTuple):
    """A method, ``objective(model)``, and its ``plain(model, x, y) -> (x_adv, loss)``."""

    objective: Callable[[nn.Module], fastadv.Objective]
    plain: Callable[..., tuple]
    head: tuple = ()
    prepare: Callable[..., tuple] = lambda x, y: (x, y)


STEPS = {
    "Standard": Step(lambda m: fastadv.Standard(), standard),
    "PGDAT": Step(lambda m: fastadv.PGDAT(), pgd_at),
    "PGDAT eval": Step(lambda m: fastadv.PGDAT(fastadv.PGDAT.paper_attack(m, bn="eval")), lambda *a: pgd_at(*a, bn="eval")),
    "PGDAT batch": Step(lambda m: fastadv.PGDAT(fastadv.PGDAT.paper_attack(m, bn="batch")), lambda *a: pgd_at(*a, bn="batch")),
    "HalfHalf": Step(lambda m: fastadv.HalfHalf(), half_half),
    "HalfHalf apart": Step(lambda m: fastadv.HalfHalf(together=False), lambda *a: half_half(*a, together=False)),
    "FGSMRS": Step(lambda m: fastadv.FGSMRS(), lambda *a: pgd_at(*a, steps=1, alpha=10 / 255)),
    "NFGSM": Step(lambda m: fastadv.NFGSM(), n_fgsm),
    "NFGSM eval": Step(lambda m: fastadv.NFGSM(noise=0.5, bn="eval"), lambda *a: n_fgsm(*a, noise=0.5, bn="eval")),
    "ALP": Step(lambda m: fastadv.ALP(), alp),
    "TRADES": Step(lambda m: fastadv.TRADES(), trades),
    "TRADES uniform": Step(
        lambda m: fastadv.TRADES(fastadv.TRADES.paper_attack(m, init="uniform", eps=EPS), beta=1.0),
        lambda *a: trades(*a, beta=1.0, start=uniform, eps=EPS),
    ),
    "TRADES parity": Step(lambda m: fastadv.TRADES(bn_parity=True), lambda *a: trades(*a, parity=True)),
    "TRADES batch": Step(
        lambda m: fastadv.TRADES(fastadv.TRADES.paper_attack(m, bn="batch")),
        lambda *a: trades(*a, bn="batch"),
    ),
    "TRADES batch parity": Step(
        lambda m: fastadv.TRADES(fastadv.TRADES.paper_attack(m, bn="batch"), bn_parity=True),
        lambda *a: trades(*a, bn="batch", parity=True),
    ),
    "DM": Step(lambda m: fastadv.DM(), dm),
    "MART": Step(lambda m: fastadv.MART(), mart_step),
    "SCORE": Step(lambda m: fastadv.SCORE(), score_step),
    "SCORE clip": Step(
        lambda m: fastadv.SCORE(beta=3.0, clip=0.01, label_smoothing=0.1),
        lambda *a: score_step(*a, 3.0, 0.01, False, 0.1),
    ),
    "SCORE clip_clean": Step(
        lambda m: fastadv.SCORE(beta=6.0, clip=0.95, clip_clean=True),
        lambda *a: score_step(*a, 6.0, 0.95, True),
    ),
    "SCOREPGDAT": Step(lambda m: fastadv.SCOREPGDAT(), score_pgd_at),
    "SCOREPGDAT clip": Step(lambda m: fastadv.SCOREPGDAT(clip=1.0), lambda *a: score_pgd_at(*a, clip=1.0)),
    "PGD-HE": Step(
        lambda m: fastadv.PGDAT(fastadv.MART.paper_attack(m), fastadv.HypersphereMargin(10.0, 0.2)),
        pgd_he,
        (fastadv.HypersphereHead, 72, CLASSES, 10.0),
    ),
    "TRADES-HE": Step(
        lambda m: fastadv.TRADES(label_loss=fastadv.HypersphereMargin(15.0, 0.2)),
        trades_he,
        (fastadv.HypersphereHead, 72, CLASSES),
    ),
    "ALP-HE": Step(
        lambda m: fastadv.ALP(fastadv.MART.paper_attack(m), 0.5 / 20**2, fastadv.HypersphereMargin(20.0, 0.3), together=False),
        alp_he,
        (fastadv.HypersphereHead, 72, CLASSES, 20.0),
    ),
    "FeatureScatter": Step(lambda m: fastadv.FeatureScatter(), feature_scatter),
    "RST": Step(lambda m: fastadv.RST(), rst, (), partly_labelled),
    "RST entropy": Step(
        lambda m: fastadv.RST(beta=3.0, entropy_weight=0.7),
        lambda *a: rst(*a, beta=3.0, entropy_weight=0.7),
        (),
        partly_labelled,
    ),
    "RSTStability": Step(lambda m: fastadv.RSTStability(), rst_stability, (), partly_labelled),
    "MMC": Step(lambda m: fastadv.MMC(CLASSES), mmc, (fastadv.MMCHead, 72, CLASSES, 16)),
    "Consistency": Step(lambda m: fastadv.Consistency(fastadv.PGDAT()), consistent, (), two_views),
}  # fmt: skip


def train(model, step, data, also=lambda i: None):
    """Trains by SGD on ``step(model, x, y) -> (x_adv, loss)`` and returns all that can be seen, by name."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)
    seen = {}
    for i, (x, y) in enumerate(data):
        adv, loss = step(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        seen |= {f"{i} images": adv, f"{i} loss": loss.detach()}
        seen |= {f"{i} gradient of {name}": p.grad for name, p in model.named_parameters()}
        optimizer.step()
        seen |= {f"{i} after: {name}": t.clone() for name, t in model.state_dict().items()}
        also(i)
    seen["random numbers"] = torch.rand(())
    return seen


def assert_same(seen, expected):
    assert seen.keys() == expected.keys()
    for name, want in expected.items():
        if want is None:
            assert seen[name] is None
        else:
            torch.testing.assert_close(seen[name], want, **EXACT, msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.parametrize("case", STEPS)
def test_training_steps_are_the_methods(case):
    objective_on, plain, head, prepare = STEPS[case]
    data = [prepare(x, y) for x, y in batches()]
    model = net(*head)
    objective = objective_on(model)

    def step(model, x, y):
        out = objective(model, x, y)
        return out.x_adv, out.loss

    expected = train(net(*head), plain, data)
    assert_same(train(model, step, data), expected)


@pytest.mark.parametrize(("power", "temperature"), [(1.0, 4.0), (0.3, 1.0)])
def test_gkl_weighs_by_the_class_means_of_the_epoch_before(power, temperature):
    """Uniform weights in the first epoch; then, and for a class without images, the mean prediction on each class."""
    weights = torch.full((CLASSES, CLASSES), 0.1, dtype=torch.float64)
    seen = []

    def plain(model, x, y):
        def soft(z, z_adv):
            return -(z.detach().softmax(1) * z_adv.log_softmax(1)).sum()

        adv = climb(model, x, normal(x), lambda adv: soft(model(x), model(adv)), EPS, 4 / 255, 5)
        z_adv, z = model(adv), model(x)
        seen.extend(zip(y.tolist(), (z.detach() / temperature).softmax(1), strict=True))
        pairs = pairwise(z, z_adv, weights[y] ** power)
        return adv, F.cross_entropy(z, y) + 4 * soft(z, z_adv) / len(x) + 20 * pairs

    def end_epoch(i):
        if i % 2:
            for k in range(CLASSES):
                of_class = [p for label, p in seen if label == k]
                weights[k] = torch.stack(of_class).mean(0) if of_class else 0.1
            seen.clear()

    data = batches([12] * 6)
    assert len(torch.cat([y for _, y in data[:2]]).unique()) < CLASSES
    gkl = fastadv.GKL(CLASSES, power=power, temperature=temperature)

    def step(model, x, y):
        out = gkl(model, x, y)
        return out.x_adv, out.loss

    expected = train(net(), plain, data, end_epoch)
    assert_same(train(net(), step, data, lambda i: gkl.end_epoch() if i % 2 else None), expected)
    torch.testing.assert_close(gkl.class_means, weights, **EXACT)


def test_free_training_moves_images_by_the_weights_own_backward():
    """The perturbation is carried over, through smaller and larger batches, and clamped for the new images."""
    data = batches((6, 4, 6, 8))
    model, theirs = net(), net()
    seen, expected = [], []
    delta = torch.zeros(8, *data[0][0].shape[1:], dtype=torch.float64)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for x, y in data:
        n = len(x)
        delta[:n] = (x + delta[:n]).clamp(0, 1) - x
        for _ in range(8):
            d = delta[:n].clone().requires_grad_()
            loss = F.cross_entropy(theirs(x + d), y)
            optimizer.zero_grad()
            loss.backward()
            expected.append((x + d.detach(), loss.detach(), [p.grad.clone() for p in theirs.parameters()]))
            moved = (d + EPS * d.grad.sign()).detach().clamp(-EPS, EPS)
            delta[:n] = torch.max(torch.min(moved, 1 - x), 0 - x)
            optimizer.step()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    free = fastadv.FreeAT()
    for x, y in data:
        for out in free(model, x, y):
            optimizer.zero_grad()
            out.loss.backward()
            assert not out.x_adv.requires_grad
            assert out.metrics.keys() == {"robust_accuracy"}
            seen.append((out.x_adv, out.loss.detach(), [p.grad.clone() for p in model.parameters()]))
            optimizer.step()
    assert len(seen) == 32
    torch.testing.assert_close(seen, expected, **EXACT)
    torch.testing.assert_close(model.state_dict(), theirs.state_dict(), **EXACT)


@pytest.mark.parametrize("reclamp", [True, False])
def test_free_training_reclamps_what_it_carries_over(reclamp):
    """The original shows the model images outside the box: 1 + eps."""
    model, y = net(), torch.arange(4)
    free = fastadv.FreeAT(replays=2, reclamp=reclamp)
    inputs = count_calls(model)
    for x in (torch.full((4, 3, 8, 8), 0.5, dtype=torch.float64), torch.ones(4, 3, 8, 8, dtype=torch.float64)):
        for out in free(model, x, y):
            out.loss.backward()
    assert float(inputs[2].max()) == pytest.approx(1.0 if reclamp else 1 + EPS)
    assert float(inputs[3].max()) <= 1
    assert float(inputs[2].min()) == pytest.approx(1 - EPS)


def test_free_training_needs_the_backward():
    model, (x, y) = net(), batches()[0]
    replays = fastadv.FreeAT()(model, x, y)
    next(replays)
    with pytest.raises(RuntimeError, match=r"call out.loss.backward\(\) on each output of FreeAT"):
        next(replays)


# ---------------------------------------------------------------------------------------------------- what a call gives

NO_CLEAN_IMAGES = ("PGDAT", "FGSMRS", "NFGSM", "SCOREPGDAT", "PGD-HE", "FeatureScatter", "MMC", "Consistency")


def prepared(case, dtype=torch.float64):
    """Model, objective and batch of a row of STEPS."""
    objective, _, head, prepare = STEPS[case]
    model = net(*head).to(dtype)
    x, y = prepare(*batches()[0])
    torch.manual_seed(0)
    return model, objective(model), x.to(dtype), y


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", STEPS)
def test_output(case, training):
    model, objective, x, y = prepared(case)
    model.train(training)
    out = objective(model, x, y)
    assert out.loss.shape == ()
    assert out.loss.requires_grad
    logits = {
        "accuracy": None if case.split()[0] in NO_CLEAN_IMAGES else out.logits,
        "robust_accuracy": None if case == "Standard" else out.logits_adv,
    }
    assert (out.logits is None, out.logits_adv is None) == tuple(z is None for z in logits.values())
    assert out.metrics.keys() == {name for name, z in logits.items() if z is not None}
    for name, metric in out.metrics.items():
        known = [(int(z.argmax()), label) for z, label in zip(logits[name], y.tolist(), strict=True) if label >= 0]
        assert not metric.requires_grad
        assert float(metric) == pytest.approx(sum(a == b for a, b in known) / len(known))
    if case == "Standard":
        assert out.x_adv is None
        return
    assert not out.x_adv.requires_grad
    assert 0 <= float(out.x_adv.min()) <= float(out.x_adv.max()) <= 1
    assert not torch.equal(out.x_adv, x)
    torch.testing.assert_close(objective.loss(model, x, y, out.x_adv), out.loss, **EXACT)
    if not training:
        for z, images in ((out.logits, x), (out.logits_adv, out.x_adv)):
            torch.testing.assert_close(z, z if z is None else model(images), **EXACT)


@pytest.mark.parametrize("case", STEPS)
def test_a_call_leaves_modes_parameters_and_gradients_alone(case):
    model, objective, x, y = prepared(case)
    F.cross_entropy(model(x), y.clamp(min=0)).backward()
    model[5].eval()  # frozen by fine-tuning code
    model[0].bias.requires_grad_(False)
    before = state(model, buffers=False)
    frozen = [b.clone() for b in model[5].buffers()]
    objective(model, x, y)
    assert state(model, buffers=False) == before
    assert all(torch.equal(b, was) for b, was in zip(model[5].buffers(), frozen, strict=True))


GENERATED = {
    "TRADES": (lambda m, g: fastadv.TRADES(fastadv.TRADES.paper_attack(m, generator=g)), ()),
    "NFGSM": (lambda m, g: fastadv.NFGSM(generator=g), ()),
    "RSTStability": (lambda m, g: fastadv.RSTStability(generator=g), ()),
    "MMC": (
        lambda m, g: fastadv.MMC(CLASSES, fastadv.MMC.paper_attack(m, generator=g), generator=g),
        (fastadv.MMCHead, 72, CLASSES, 16),
    ),
}


@pytest.mark.parametrize("case", GENERATED)
def test_a_generator_is_the_only_source_of_random_numbers(case):
    build, head = GENERATED[case]
    x, y = batches()[0]
    images = []
    around = surroundings()
    for seed in (1, 1, 2):
        model = net(*head)
        images.append(build(model, torch.Generator().manual_seed(seed))(model, x, y).x_adv)
    assert surroundings() == around
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_mmcs_targets_are_all_the_other_classes():
    model, x, y = net(fastadv.MMCHead, 72, 3, 16), torch.rand(300, 3, 8, 8, dtype=torch.float64), torch.arange(300) % 3
    attacked = []
    attack = fastadv.PGD(model, EPS, steps=1, targeted=True, loss=lambda z, t: attacked.append(t) or z.sum(1))
    fastadv.MMC(3, attack).adversarial(model, x, y)
    assert torch.bincount(3 * y + attacked[0], minlength=9).tolist()[::4] == [0, 0, 0]
    assert (torch.bincount(3 * y + attacked[0], minlength=9) > 30).sum() == 6
    attack.targeted = False
    fastadv.MMC(3, attack).adversarial(model, x, y)
    assert torch.equal(attacked[1], y), "an attack without a target leaves the label's own centre"


# ----------------------------------------------------------------------------------------------- where the attack comes from


def values(attack):
    return {
        name: getattr(attack, name)
        for name in ("eps", "alpha", "steps", "norm", "loss", "init", "bn", "targeted", "bounds", "restarts", "keep_best")
    }


DEFAULT = {"norm": "linf", "targeted": False, "bounds": (0.0, 1.0), "restarts": 1, "keep_best": False}
RICE = DEFAULT | {"eps": 8 / 255, "alpha": 2 / 255, "steps": 10, "loss": "ce", "init": "uniform", "bn": "train"}
ZHANG = DEFAULT | {"eps": 0.031, "alpha": 0.007, "steps": 10, "loss": "kl", "init": "normal", "bn": "eval"}
PAPERS = {
    fastadv.PGDAT: RICE,
    fastadv.FGSMRS: RICE | {"alpha": 10 / 255, "steps": 1},
    fastadv.HalfHalf: RICE | {"bn": "eval"},
    fastadv.ALP: RICE | {"eps": 16 / 255, "bn": "eval", "targeted": True},
    fastadv.TRADES: ZHANG,
    fastadv.RST: ZHANG,
    fastadv.MART: ZHANG | {"loss": "ce"},
    fastadv.DM: RICE | {"loss": "kl", "bn": "batch"},
    fastadv.SCORE: RICE | {"loss": "se", "bn": "batch"},
    fastadv.SCOREPGDAT: RICE | {"loss": fastadv.functional.label_error},
    fastadv.FeatureScatter: RICE | {"alpha": 8 / 255, "steps": 1, "loss": fastadv.functional.transport_cost, "bn": "eval"},
    fastadv.GKL: ZHANG | {"eps": 8 / 255, "alpha": 4 / 255, "steps": 5},
    fastadv.MMC: RICE
    | {"eps": 8 / 256, "alpha": 2 / 256, "loss": fastadv.functional.mmc_distance, "bn": "eval", "targeted": True},
}


@pytest.mark.parametrize("method", PAPERS, ids=lambda m: m.__name__)
def test_paper_attacks(method):
    model = net()
    assert values(method.paper_attack(model)) == PAPERS[method]
    assert values(method.paper_attack(model, eps=0.1, steps=3)) == PAPERS[method] | {"eps": 0.1, "steps": 3}
    objective = method(CLASSES) if method in (fastadv.GKL, fastadv.MMC) else method()
    attack = objective.attack_on(model)
    assert values(attack) == PAPERS[method]
    assert objective.attack_on(model) is attack, "kept, with its buffers"
    assert objective.attack_on(other := net()).model is other


@pytest.mark.parametrize("method", [fastadv.Standard, fastadv.NFGSM, fastadv.RSTStability, fastadv.Consistency])
def test_methods_without_an_attack_of_their_own(method):
    with pytest.raises(TypeError, match="eps"):
        method.paper_attack(net())


def test_an_attack_that_ascends_by_default_what_the_method_does_not_is_told():
    """TRADES with CE is a variant that people run, and a slip that they do not notice."""
    model = cnn()
    with pytest.warns(UserWarning, match=r"ascends 'ce', where TRADES's ascends 'kl': TRADES.paper_attack"):
        fastadv.TRADES(fastadv.PGD(model, eps=0.1))
    with pytest.warns(UserWarning, match="MMC's ascends mmc_distance"):
        fastadv.MMC(10, fastadv.PGD(model, eps=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastadv.TRADES(fastadv.PGD(model, eps=0.1, loss="margin"))
        fastadv.TRADES(fastadv.TRADES.paper_attack(model))
        fastadv.MART(fastadv.PGD(model, eps=0.1))


def test_betas_and_weights_are_the_papers():
    assert (fastadv.TRADES().beta, fastadv.DM().beta, fastadv.MART().beta, fastadv.SCORE().beta) == (6, 5, 5, 4)
    assert (fastadv.RST().beta, fastadv.RST().entropy_weight, fastadv.RSTStability().sigma) == (6, 0, 0.25)
    assert (fastadv.ALP().weight, fastadv.HalfHalf().weight, fastadv.FreeAT().replays) == (0.5, 0, 8)
    gkl = fastadv.GKL(CLASSES)
    assert (gkl.alpha, gkl.beta, gkl.power, gkl.temperature) == (4, 20, 1, 4)
    assert fastadv.SCORE().clip == 0


@pytest.mark.parametrize("bn", ["eval", "batch"])
def test_the_attack_may_be_on_another_model(bn):
    """On an average of the weights, say: its clean logits, not the training model's."""
    model, other, (x, y) = net(), cnn(CLASSES, dropout=0.0, seed=1).double().train(), batches()[0]
    for method in (fastadv.TRADES, fastadv.SCORE):
        images = [
            method(method.paper_attack(other, bn=bn, generator=torch.Generator().manual_seed(0)))(trained, x, y).x_adv
            for trained in (model, other)
        ]
        torch.testing.assert_close(*images, **EXACT)


def test_a_model_in_eval_mode_shares_no_clean_forward_with_an_attack_on_batch_statistics():
    model, (x, y) = net().eval(), batches()[0]
    attack = fastadv.DM.paper_attack(model, generator=torch.Generator().manual_seed(0))
    out = fastadv.DM(attack)(model, x, y)
    attack.generator.manual_seed(0)
    torch.testing.assert_close(out.x_adv, attack(x), **EXACT)


def test_feature_scatter_takes_an_attack_on_labels_too():
    model, (x, y) = net(), batches()[0]
    attack = fastadv.PGD(model, EPS, init="zero")
    assert torch.equal(fastadv.FeatureScatter(attack).adversarial(model, x, y), attack(x, y))


# --------------------------------------------------------------------------------------------------------- compositions

EVERYWHERE = ("PGDAT", "TRADES", "TRADES batch parity", "MART", "SCORE", "ALP", "FeatureScatter", "RST entropy", "TRADES-HE")


@pytest.mark.parametrize("case", ["PGDAT", "TRADES", "DM", "ALP"])
def test_compiled_model(case):
    losses = []
    for compiled in (False, True):
        model, objective, x, y = prepared(case)
        out = objective(torch.compile(model, backend="eager") if compiled else model, x, y)
        out.loss.backward()
        losses.append((out.loss.detach(), out.x_adv, *(p.grad for p in model.parameters()), *model.state_dict().values()))
    torch.testing.assert_close(*losses, **EXACT)


@pytest.mark.parametrize("case", ["PGDAT", "PGDAT batch", "FGSMRS", "TRADES", "DM", "SCORE", "SCOREPGDAT", "HalfHalf", "ALP"])
def test_soft_labels(case):
    """One-hot rows are the labels they stand for, and CutMix' rows are what the formulas say."""
    losses, labels = [], batches()[0][1]
    hot = F.one_hot(labels, CLASSES).double()
    for soft in (labels, hot, 0.6 * hot + 0.4 * hot.flip(0)):
        model, objective, x, _ = prepared(case)
        losses.append((out := objective(model, x, soft)).loss)
    torch.testing.assert_close(losses[0], losses[1], **EXACT)
    if case.startswith("PGDAT"):
        mixed = 0.6 * F.cross_entropy(out.logits_adv, labels) + 0.4 * F.cross_entropy(out.logits_adv, labels.flip(0))
        torch.testing.assert_close(losses[2], mixed, **EXACT)
        assert float(out.metrics["robust_accuracy"]) == float((out.logits_adv.argmax(1) == labels).double().mean())


@pytest.mark.parametrize("case", ["PGDAT", "TRADES", "DM", "ALP", "FeatureScatter", "RST"])
def test_only_training_forwards_go_through_a_ddp_wrapper(process_group, case):
    """Its forward prepares a gradient reduction, and in a second process waits for the others."""
    losses = []
    for wrap in (False, True):
        model, objective, x, y = prepared(case)
        wrapped = nn.parallel.DistributedDataParallel(model) if wrap else model
        calls = count_calls(wrapped)
        out = objective(wrapped, x, y)
        trained_on = len(calls)
        out.loss.backward()
        losses.append((out.loss.detach(), out.x_adv, *(p.grad for p in model.parameters())))
    assert trained_on == 1 + (case in ("TRADES", "DM", "RST"))
    torch.testing.assert_close(*losses, **EXACT)


@pytest.mark.parametrize("case", EVERYWHERE)
def test_autocast(case):
    """fp32 losses; every parameter gets a gradient, about that of the same step in fp32."""
    model, objective, x, y = prepared(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = objective(model, x, y)
    assert out.loss.dtype == torch.float32
    assert out.x_adv.dtype == torch.float32
    parameters = list(model.parameters())
    rough, fine = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        for loss in (out.loss, objective.loss(model, x, y, out.x_adv))
    )
    assert F.cosine_similarity(rough, fine, dim=0) > 0.98


@pytest.mark.parametrize("case", STEPS)
def test_channels_last(case):
    model, objective, x, y = prepared(case)
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    out = objective(model, x, y)
    if out.x_adv is not None:
        assert out.x_adv.is_contiguous(memory_format=torch.channels_last)
        x_adv, x = out.x_adv.contiguous(), x.contiguous()
        torch.testing.assert_close(objective.loss(model, x, y, x_adv), out.loss, **EXACT)


@pytest.mark.parametrize("case", ["PGDAT", "TRADES", "MART", "GKL"])
def test_adversarial_weights_and_an_average_of_them(case):
    """AWP ascends what the step descends; the average follows the restored weights, and may be attacked itself."""
    model, (x, y) = net(), batches()[0]
    objective = fastadv.GKL(CLASSES) if case == "GKL" else STEPS[case][0](model)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    expected = [p.detach().clone() for p in model.parameters()]
    awp, optimizer = fastadv.AWP(model, gamma=0.01), torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for step in range(6):
        x_adv = objective.adversarial(model, x, y)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        clean = float(objective.loss(model, x, y, x_adv).detach())
        with awp.perturb(lambda: objective.loss(model, x, y, x_adv)):  # noqa: B023 - called at once
            (loss := objective.loss(model, x, y, x_adv)).backward()
        assert float(loss.detach()) > clean
        losses.append(clean)
        assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
        optimizer.step()
        average.update_parameters(model)
        if step:
            expected = [(e + p.detach()) / 2 for e, p in zip(expected, model.parameters(), strict=True)]
        else:
            expected = [p.detach().clone() for p in model.parameters()]
    assert losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(list(average.module.parameters()), expected, **EXACT)
    assert fastadv.pgd(average, x, y, EPS).shape == x.shape


# --------------------------------------------------------------------------------------------------- what they remember


def test_gkl_state_survives_a_restart():
    """In the middle of its second epoch; from there on the two are apart."""
    data = batches((12, 12))
    model, gkl, resumed, fresh = net(), *(fastadv.GKL(CLASSES) for _ in range(3))
    gkl(model, *data[0])
    gkl.end_epoch()
    gkl(model, *data[1])
    resumed.load_state_dict(gkl.state_dict())
    assert torch.equal(resumed.class_means, gkl.class_means)
    for objective in (gkl, resumed):
        objective.observe(torch.arange(CLASSES).double()[None], data[1][1][:1])
        objective.end_epoch()
    assert torch.equal(resumed.class_means, gkl.class_means)
    assert not torch.equal(gkl.class_means[data[1][1][0]], torch.full((CLASSES,), 0.1, dtype=torch.float64))
    fresh.load_state_dict(fastadv.GKL(CLASSES).state_dict())
    assert fresh.class_means is None


def test_gkl_says_when_it_saw_nothing():
    """As in a loop with AWP, which asks for the loss alone, or under Consistency."""
    gkl, model, (x, y) = fastadv.GKL(CLASSES), net(), batches()[0]
    out = gkl.forward(model, x, y, x)
    with pytest.raises(RuntimeError, match="no predictions were observed in this epoch"):
        gkl.end_epoch()
    gkl.observe(out.logits, y)
    gkl.end_epoch()
    assert gkl.class_means is not None


def test_catastrophic_overfitting_rings_on_a_fall_and_not_before():
    """Of more than 0.2 from one epoch to the next: not on a slow decline, not on a low accuracy."""
    y, right = torch.zeros(10, dtype=torch.int64), 0

    class Scripted(nn.Module):
        def forward(self, x):
            return (torch.arange(10)[:, None] < right) * torch.tensor([2.0, 0.0]) + torch.tensor([0.0, 1.0]) + 0 * x.sum()

    model = Scripted().train()
    alarm = fastadv.CatastrophicOverfitting(fastadv.PGD(model, EPS, steps=5))
    rings = []
    for right in (1, 9, 7, 5, 4, 1):
        rings.append(alarm(torch.rand(10, 3, 2, 2), y if right % 2 else F.one_hot(y, 2).float()))
    assert rings == [False] * 5 + [True]
    assert alarm.accuracies == pytest.approx([0.1, 0.9, 0.7, 0.5, 0.4, 0.1])
    assert model.training


def test_catastrophic_overfitting_looks_in_the_attacks_mode():
    """On the images attacked, and as the attack ran the model."""
    model, (x, _) = net(), batch(40, CLASSES, torch.float64)
    model.eval()
    y = model(x).argmax(1)
    model.train()
    attack = fastadv.PGD(model, 0.02, steps=5, init="zero", bn="eval")
    before = state(model)
    alarm = fastadv.CatastrophicOverfitting(attack)
    alarm(x, y)
    assert state(model) == before
    x_adv = attack(x, y)
    model.eval()
    accuracies = [float((model(images).argmax(1) == y).float().mean()) for images in (x_adv, x)]
    attack.bn = "batch"
    alarm(x, y)
    x_adv = attack(x, y)
    accuracies += [float((model.train(mode)(x_adv).argmax(1) == y).float().mean()) for mode in (True, False)]
    assert alarm.accuracies == [accuracies[0], accuracies[2]]
    assert len(set(accuracies)) == 4, "attacked and clean images, batch statistics and running ones, all tell apart"


# ------------------------------------------------------------------------------------------------------------- bad input

MODEL = net()
BAD = {
    "attack": (lambda: fastadv.TRADES("pgd"), "attack must be a fastadv.PGD, or None for the paper's; got str"),
    "attack is the model": (lambda: fastadv.PGDAT(MODEL), "got Sequential"),
    "beta": (lambda: fastadv.TRADES(beta=-1.0), r"beta must be a finite number >= 0; got -1.0"),
    "infinite beta": (lambda: fastadv.MART(beta=math.inf), "beta must be a finite number >= 0; got inf"),
    "beta is true": (lambda: fastadv.SCORE(beta=True), "beta must be a finite number >= 0; got True"),
    "clip": (lambda: fastadv.SCORE(clip=-0.1), "clip must be a finite number >= 0"),
    "label_smoothing": (lambda: fastadv.SCORE(label_smoothing=-0.1), "label_smoothing must be a finite number >= 0; got -0.1"),
    "scale": (lambda: fastadv.HypersphereMargin(-1.0, 0.2), "scale must be a finite number > 0; got -1.0"),
    "margin": (lambda: fastadv.HypersphereMargin(10.0, None), "margin must be a finite number >= 0; got None"),
    "clip of PGD-AT": (lambda: fastadv.SCOREPGDAT(clip=math.nan), "clip must be a finite number >= 0"),
    "ALP's weight": (lambda: fastadv.ALP(weight="1"), "weight must be a finite number >= 0; got '1'"),
    "entropy_weight": (lambda: fastadv.RST(entropy_weight=-1.0), "entropy_weight must be"),
    "sigma": (lambda: fastadv.RSTStability(sigma=-1.0), "sigma must be"),
    "RSTStability's bounds": (lambda: fastadv.RSTStability(bounds=(1.0, 0.0)), r"bounds must be \(lo, hi\) with lo < hi"),
    "alpha": (lambda: fastadv.GKL(10, alpha=-1.0), "alpha must be"),
    "power": (lambda: fastadv.GKL(10, power=math.nan), "power must be a finite number >= 0; got nan"),
    "GKL's classes": (lambda: fastadv.GKL(1), "classes must be an integer >= 2; got 1"),
    "MMC's classes": (lambda: fastadv.MMC(True), "classes must be an integer >= 2; got True"),
    "GKL's temperature": (lambda: fastadv.GKL(10, temperature=0.0), "temperature must be a finite number > 0; got 0.0"),
    "Consistency's temperature": (lambda: fastadv.Consistency(fastadv.PGDAT(), temperature=-1), "temperature must be"),
    "Consistency's weight": (lambda: fastadv.Consistency(fastadv.PGDAT(), weight=-1), "weight must be"),
    "Consistency of an attack": (
        lambda: fastadv.Consistency(fastadv.PGDAT.paper_attack(MODEL)),
        "objective must be a fastadv objective; got PGD",
    ),
    "eps": (lambda: fastadv.NFGSM(eps=-1.0), "eps must be"),
    "noise": (lambda: fastadv.NFGSM(noise=-1.0), "noise must be"),
    "bn": (lambda: fastadv.NFGSM(bn="off"), "bn must be one of 'eval', 'batch', 'train'; got 'off'"),
    "replays": (lambda: fastadv.FreeAT(replays=0), "replays must be an integer >= 1; got 0"),
    "FreeAT's eps": (lambda: fastadv.FreeAT(eps=-1.0), "eps must be"),
    "FreeAT's alpha": (lambda: fastadv.FreeAT(alpha=-1.0), "alpha must be"),
    "FreeAT's bounds": (lambda: fastadv.FreeAT(bounds=(0.0,)), "bounds must be a pair"),
    "alarm": (lambda: fastadv.CatastrophicOverfitting(fastadv.PGD(MODEL, EPS, steps=1)), r"several steps .*; got PGD\("),
    "alarm on a model": (lambda: fastadv.CatastrophicOverfitting(MODEL), "must be a fastadv.PGD of several steps"),
    "label_loss": (lambda: fastadv.PGDAT(label_loss=0.1), r"label_loss must be callable on \(logits, y\); got 0.1"),
    "DM's label_loss": (lambda: fastadv.DM(label_loss=0.1), "label_loss must be callable"),
    "ALP's label_loss": (lambda: fastadv.ALP(label_loss="ce"), "label_loss must be callable"),
    "FreeAT's label_loss": (lambda: fastadv.FreeAT(label_loss=None), "label_loss must be callable"),
    "drop": (lambda: fastadv.CatastrophicOverfitting(fastadv.PGD(MODEL, EPS), drop=-1.0), "drop must be"),
    "paper's attack": (lambda: fastadv.TRADES.paper_attack(MODEL, steps=0), "steps must be an integer >= 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case):
    build, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        build()


X, Y = batches()[0]
BAD_BATCHES = {
    "odd": (fastadv.Consistency(fastadv.PGDAT()), X[:5], Y[:5], r"x must hold two views of each image, \[2N, ...\]; got 5"),
    "nothing attacked": (fastadv.Consistency(fastadv.Standard()), X, Y, "Standard runs no adversarial images"),
    "outside the box": (fastadv.TRADES(), X + 1, Y, r"x must lie in bounds \(0, 1\)"),
    "outside NFGSM's box": (fastadv.NFGSM(), X + 1, Y, r"x must lie in bounds \(0, 1\)"),
    "outside RSTStability's box": (fastadv.RSTStability(), X + 1, Y, r"x must lie in bounds \(0, 1\)"),
    "label": (fastadv.PGDAT(), X, Y + 10, r"labels in \[0, 10\)"),
    "labels of half": (fastadv.MART(), X, Y[:3], r"y must be integer labels \[6\]"),
    **{
        f"soft labels for {type(objective).__name__}": (
            objective,
            X,
            F.one_hot(Y, CLASSES).double(),
            r"y must be integer labels \[N\]; got",
        )
        for objective in (
            fastadv.MART(),
            fastadv.RST(),
            fastadv.GKL(CLASSES),
            fastadv.PGDAT(label_loss=fastadv.HypersphereMargin(1.0, 0.1)),
            fastadv.MMC(CLASSES),
        )
    },
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches_are_refused(case):
    objective, x, y, message = BAD_BATCHES[case]
    with pytest.raises(ValueError, match=message):
        objective(net(), x, y)


def test_free_training_checks_its_batch():
    model = net()
    calls = count_calls(model)
    with pytest.raises(ValueError, match=r"x must lie in bounds"):
        next(fastadv.FreeAT()(model, X + 1, Y))
    with pytest.raises(ValueError, match=r"y must be integer labels \[6\]"):
        next(fastadv.FreeAT()(model, X, Y[:3]))
    assert not calls


DOORS = {
    type(objective).__name__: objective
    for objective in (
        fastadv.PGDAT(),
        fastadv.TRADES(),
        fastadv.DM(),
        fastadv.SCORE(),
        fastadv.ALP(),
        fastadv.NFGSM(),
        fastadv.RST(),
        fastadv.RSTStability(),
        fastadv.FeatureScatter(),
        fastadv.MMC(CLASSES),
    )
}


@pytest.mark.parametrize("case", DOORS)
def test_a_refused_batch_leaves_no_trace(case):
    """Nothing is drawn, and the model does not run: not for clean logits that the attack or the loss will need either."""
    around, calls = surroundings(), count_calls(model := net())
    refused = [(X + 1, Y, "bounds"), ((255 * X).byte(), Y, "integer images"), (X, Y[:3], "y must be")]
    for x, y, message in refused:
        with pytest.raises(ValueError, match=message):
            DOORS[case](model, x, y)
    assert not calls
    assert surroundings() == around


@pytest.mark.parametrize("case", ["PGDAT", "TRADES", "ALP", "FeatureScatter", "MMC"])
def test_a_label_outside_the_classes_is_refused_before_the_attack(case):
    """In a loss on a GPU it would be a NaN, or the end of the process."""
    model, untouched = net(), net()
    with pytest.raises(ValueError, match=r"y must be labels in \[0, 10\); got labels from"):
        DOORS[case](model, X, Y + CLASSES)
    torch.testing.assert_close(model.state_dict(), untouched.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("objective", "shown"),
    [
        (fastadv.Standard(), "Standard(attack=None, label_loss=cross_entropy)"),
        (
            fastadv.DM(beta=4),
            "DM(attack=None, beta=4.0, label_loss=LabelSmoothing(0.1, over='all'), bn_parity=False)",
        ),
        (
            fastadv.PGDAT(label_loss=fastadv.HypersphereMargin(10.0, 0.2)),
            "PGDAT(attack=None, label_loss=HypersphereMargin(scale=10.0, margin=0.2))",
        ),
        (fastadv.MART(fastadv.PGD(MODEL, 0.1, 0.02)), f"MART(attack={fastadv.PGD(MODEL, 0.1, 0.02)!r}, beta=5.0)"),
        (fastadv.GKL(CLASSES), "GKL(attack=None, alpha=4.0, beta=20.0, power=1.0, temperature=4.0)"),
    ],
)
def test_repr(objective, shown):
    if isinstance(objective, fastadv.GKL):
        objective.observe(torch.zeros(1, CLASSES), torch.tensor([0]))
        objective.end_epoch()  # its table of means is no argument
    assert repr(objective) == shown


def test_heads_say_what_they_are():
    assert repr(fastadv.HypersphereHead(5, 3)) == "HypersphereHead(features=5, classes=3, scale=15.0)"
