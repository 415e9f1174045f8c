"""Every training method against its own training step written down plainly: images, loss, gradients, statistics, weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import batch, cnn, count_calls, one_thread, seeded, state, surroundings  # noqa: F401
from test_functional import consistency, mart, score, smoothed_over_others, transport
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


def score_pgd_at(model, x, y):
    def error(adv):
        return ((model(adv).softmax(1) - F.one_hot(y, CLASSES)) ** 2).sum(1)

    adv = climb(model, x, uniform(x), lambda adv: error(adv).sum(), bn="train")
    return adv, F.relu(error(adv) - (0.4**2 + 0.4**2 / 9)).mean()


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


def attack(method, **changes):
    return lambda model: method.paper_attack(model, **changes)


# name: the objective on a model, the plain step, the model's head, what else is done to a batch
STEPS = {
    "Standard": (lambda m: fastadv.Standard(), standard),
    "PGDAT": (lambda m: fastadv.PGDAT(), pgd_at),
    "PGDAT eval": (lambda m: fastadv.PGDAT(fastadv.PGDAT.paper_attack(m, bn="eval")), lambda *a: pgd_at(*a, bn="eval")),
    "PGDAT batch": (lambda m: fastadv.PGDAT(fastadv.PGDAT.paper_attack(m, bn="batch")), lambda *a: pgd_at(*a, bn="batch")),
    "HalfHalf": (lambda m: fastadv.HalfHalf(), half_half),
    "HalfHalf apart": (lambda m: fastadv.HalfHalf(together=False), lambda *a: half_half(*a, together=False)),
    "FGSMRS": (lambda m: fastadv.FGSMRS(), lambda *a: pgd_at(*a, steps=1, alpha=10 / 255)),
    "NFGSM": (lambda m: fastadv.NFGSM(), n_fgsm),
    "NFGSM eval": (lambda m: fastadv.NFGSM(noise=0.5, bn="eval"), lambda *a: n_fgsm(*a, noise=0.5, bn="eval")),
    "ALP": (lambda m: fastadv.ALP(), alp),
    "TRADES": (lambda m: fastadv.TRADES(), trades),
    "TRADES uniform": (
        lambda m: fastadv.TRADES(fastadv.TRADES.paper_attack(m, init="uniform", eps=EPS), beta=1.0),
        lambda *a: trades(*a, beta=1.0, start=uniform, eps=EPS),
    ),
    "TRADES parity": (lambda m: fastadv.TRADES(bn_parity=True), lambda *a: trades(*a, parity=True)),
    "TRADES batch": (
        lambda m: fastadv.TRADES(fastadv.TRADES.paper_attack(m, bn="batch")),
        lambda *a: trades(*a, bn="batch"),
    ),
    "TRADES batch parity": (
        lambda m: fastadv.TRADES(fastadv.TRADES.paper_attack(m, bn="batch"), bn_parity=True),
        lambda *a: trades(*a, bn="batch", parity=True),
    ),
    "DM": (lambda m: fastadv.DM(), dm),
    "MART": (lambda m: fastadv.MART(), mart_step),
    "SCORE": (lambda m: fastadv.SCORE(), score_step),
    "SCORE clip": (
        lambda m: fastadv.SCORE(beta=3.0, clip=1e-4, label_smoothing=0.1),
        lambda *a: score_step(*a, 3.0, 1e-4, False, 0.1),
    ),
    "SCORE clip_clean": (
        lambda m: fastadv.SCORE(beta=6.0, clip=0.9, clip_clean=True),
        lambda *a: score_step(*a, 6.0, 0.9, True),
    ),
    "SCOREPGDAT": (lambda m: fastadv.SCOREPGDAT(), score_pgd_at),
    "PGD-HE": (
        lambda m: fastadv.PGDAT(fastadv.MART.paper_attack(m), fastadv.HypersphereMargin(10.0, 0.2)),
        pgd_he,
        (fastadv.HypersphereHead, 72, CLASSES, 10.0),
    ),
    "TRADES-HE": (
        lambda m: fastadv.TRADES(label_loss=fastadv.HypersphereMargin(15.0, 0.2)),
        trades_he,
        (fastadv.HypersphereHead, 72, CLASSES),
    ),
    "ALP-HE": (
        lambda m: fastadv.ALP(fastadv.MART.paper_attack(m), 0.5 / 20**2, fastadv.HypersphereMargin(20.0, 0.3), together=False),
        alp_he,
        (fastadv.HypersphereHead, 72, CLASSES, 20.0),
    ),
    "FeatureScatter": (lambda m: fastadv.FeatureScatter(), feature_scatter),
    "RST": (lambda m: fastadv.RST(), rst, (), partly_labelled),
    "RST entropy": (
        lambda m: fastadv.RST(beta=3.0, entropy_weight=0.7),
        lambda *a: rst(*a, beta=3.0, entropy_weight=0.7),
        (),
        partly_labelled,
    ),
    "RSTStability": (lambda m: fastadv.RSTStability(), rst_stability, (), partly_labelled),
    "MMC": (lambda m: fastadv.MMC(CLASSES), mmc, (fastadv.MMCHead, 72, CLASSES, 16)),
    "Consistency": (lambda m: fastadv.Consistency(fastadv.PGDAT()), consistent, (), two_views),
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
    objective_on, plain, *rest = STEPS[case]
    head, change = (*rest, *((), lambda x, y: (x, y))[len(rest) :])
    data = [change(x, y) for x, y in batches()]
    model = net(*head)
    objective = objective_on(model)

    def step(model, x, y):
        out = objective(model, x, y)
        return out.x_adv, out.loss

    expected = train(net(*head), plain, data)
    assert_same(train(model, step, data), expected)
