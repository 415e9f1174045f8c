"""Auto-PGD against the paper's algorithm, written down once more for one sample in plain Python, and where optima are known."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from models import SYNCS, Ops, batch, count_calls, digits, linear, one_thread, seeded, trained_lenet  # noqa: F401
from torch import nn

from fastadv.attacks import APGD, APGDT, apgd
from fastadv.attacks.apgd import _Ascent, _checkpoints

MODULE = sys.modules["fastadv.attacks.apgd"]  # fastadv.attacks.apgd itself is the function


@seeded
def smooth(classes: int = 5) -> nn.Module:
    """Differentiable everywhere, so that rounding does not decide about signs."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, classes)).double()


def by_the_paper(net, x, y, start, eps, steps, norm):
    """Algorithm 1 of Croce and Hein, 2020, for one sample: the trajectory's best loss, its image, and whether any fooled."""

    def project(z):
        d = z - x
        if norm == "linf":
            d = d.clamp(-eps, eps)
        elif d.norm() > eps:
            d = d * eps / d.norm()
        return (x + d).clamp(0, 1)

    def look(z):
        z = z.clone().requires_grad_()
        logits = net(z[None])[0]
        others = torch.cat([logits[:y], logits[y + 1 :]])
        loss = torch.logsumexp(others, 0) - logits[y]  # rises with cross-entropy, and has its direction
        (g,) = torch.autograd.grad(loss, z)
        return loss.item(), g, int(logits.argmax()) != y

    def step(z, g, alpha):
        return project(z + alpha * (g.sign() if norm == "linf" else g / g.norm()))

    # Checkpoints by the recurrence of section 3: p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06).
    interval, checkpoints, at = max(int(0.22 * steps), 1), [], 0
    while (at := at + interval) < steps:
        checkpoints.append((at, interval))
        interval = max(interval - int(0.03 * steps), int(0.06 * steps))

    alpha, now, before = 2 * eps, start, start
    loss, g, fooled = look(now)
    best = (loss, now, g)
    halved, best_then, rises = True, loss, 0
    for k in range(steps):
        share = 0.75 if k else 1.0
        moved = project(now + share * (step(now, g, alpha) - now) + (1 - share) * (now - before))
        before, now, was = now, moved, loss
        loss, g, fools = look(now)
        fooled |= fools
        rises += loss > was
        if loss > best[0]:
            best = (loss, now, g)
        for at, interval in checkpoints:
            if k + 1 == at:
                halve = rises <= 0.75 * interval or (not halved and best_then >= best[0])
                if halve:
                    alpha, now, g = alpha / 2, best[1], best[2]
                halved, best_then, rises = halve, best[0], 0
    return best[0], best[1], fooled


@pytest.mark.parametrize("steps", [1, 7, 40, 100])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.6)])
def test_it_is_the_papers_algorithm(monkeypatch, norm, eps, steps):
    x, y = batch(8, classes=5, dtype=torch.float64)
    net, start = smooth(), (x + 0.02).clamp(0, 1)
    monkeypatch.setattr(MODULE, "_start", lambda _: start.clone())
    ends = []
    monkeypatch.setattr(_Ascent, "update", spying(ends))
    attack = APGD(net, eps, steps=steps, norm=norm)
    adv = attack(x, y)
    highest, highest_at = ends[-1].highest_score, ends[-1].highest
    fooled_at_all = 0
    for i in range(8):
        loss, image, fooled = by_the_paper(net, x[i], int(y[i]), start[i], eps, steps, norm)
        assert highest[i].item() == pytest.approx(loss, abs=1e-9), i
        assert torch.allclose(highest_at[i], image, atol=1e-8), i
        assert bool(attack.info.success[i]) == fooled
        if not fooled:
            assert torch.allclose(adv[i], image, atol=1e-8)
        fooled_at_all += fooled
    assert steps < 40 or fooled_at_all > 0


def spying(ends):
    """Ends a loop as usual, and keeps it."""
    update = _Ascent.update

    def kept(self, other, rows):
        update(self, other, rows)
        ends.append(self)

    return kept


def test_checkpoints_are_those_of_the_paper():
    looked = []

    class Loop:
        def check(self, steps):
            looked.append((step + 1, steps))

    for step in range(100):
        _checkpoints("linf", 100)(Loop(), step)
    assert [at for at, _ in looked] == [22, 41, 57, 70, 80, 87, 93, 99]
    assert [interval for _, interval in looked] == [22, 19, 16, 13, 10, 7, 6, 6]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_linear_model_it_reaches_the_optimum(norm):
    """Two classes: the margin rises by eps |w|_q at most, q dual to the norm, where no wall is near."""
    net = linear(classes=2).double()
    x = torch.full((4, 3, 8, 8), 0.5, dtype=torch.float64) + 0.01 * batch(4)[0]
    y = net(x).argmax(1)
    w = net[1].weight[1] - net[1].weight[0]
    eps = 0.01
    adv = APGD(net, eps, steps=30, norm=norm, loss="margin")(x, y)
    rise = (margins(net, adv, y) - margins(net, x, y)).abs()
    assert torch.allclose(rise, torch.full_like(rise, eps * w.norm(1 if norm == "linf" else 2).item()), rtol=1e-3)


def margins(net, x, y):
    z = net(x).detach()
    return z.gather(1, 1 - y[:, None])[:, 0] - z.gather(1, y[:, None])[:, 0]


def test_in_the_l1_ball_it_nearly_reaches_the_optimum():
    """All of eps goes to the largest weights, as far as the box lets it."""
    net = linear(classes=2).double()
    x = torch.full((4, 3, 8, 8), 0.5, dtype=torch.float64)
    y = net(x).argmax(1)
    w, eps = (net[1].weight[1] - net[1].weight[0]).abs().sort(descending=True).values, 3.2
    best = (0.5 * w[:6]).sum() + 0.2 * w[6]
    for multi_eps, least in ((True, 0.98), (False, 0.9)):
        adv = APGD(net, eps, steps=100, norm="l1", loss="margin", multi_eps=multi_eps)(x, y)
        assert ((adv - x).abs().flatten(1).sum(1) <= eps * (1 + 1e-9)).all()
        rise = (margins(net, adv, y) - margins(net, x, y)).abs()
        assert (rise <= best * (1 + 1e-9)).all()
        assert (rise >= least * best).all(), (multi_eps, rise / best)


def test_how_sparse_the_first_l1_steps_are(monkeypatch):
    """Of two thirds of the elements, for noise was in all of them; in later stages, of as many as have changed, over 1.5."""
    x, y = batch(4, classes=5)
    shares, counted, begin = [], [], _Ascent.begin

    def begun(self, model, share):
        forwards = begin(self, model, share)
        shares.append(self.share.clone())
        changed = ((self.adv - self.centre) != 0).flatten(1).sum(1)
        counted.append((self.changed.clone(), changed.to(self.changed)))
        return forwards

    monkeypatch.setattr(_Ascent, "begin", begun)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    APGD(net, 3.0, steps=10, norm="l1")(x, y)
    assert len(shares) == 3
    assert shares[0].tolist() == pytest.approx([2 / 3] * 4)
    assert counted[0][0].tolist() == [192.0] * 4
    for share, (taken, changed) in zip(shares[1:], counted[1:], strict=True):
        assert torch.equal(taken, changed)
        assert share.tolist() == pytest.approx((changed / 192 / 1.5).tolist())
    shares.clear()
    APGD(net, 3.0, steps=10, norm="l1", multi_eps=False)(x, y)
    assert shares[0].tolist() == pytest.approx([0.2] * 4)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.12), ("l2", 0.8), ("l1", 1.5)])
@pytest.mark.parametrize("kind", [APGD, APGDT])
def test_stopping_early_fools_the_same(kind, norm, eps):
    x, y = (t[1200:1260] for t in digits())
    net = trained_lenet()
    to_the_end, early = (kind(net, eps, steps=20, norm=norm, early_stop=stop) for stop in (False, True))
    to_the_end(x, y)
    adv = early(x, y)
    assert torch.equal(early.info.success, to_the_end.info.success)
    assert 0 < early.info.success.sum() < 60
    assert torch.equal(net(adv).argmax(1) != y, early.info.success)
    assert early.info.queries.sum() < to_the_end.info.queries.sum()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.8), ("l1", 1.5)])
@pytest.mark.parametrize("early_stop", [False, True])
def test_a_samples_image_does_not_depend_on_the_batch(norm, eps, early_stop):
    x, y = (t[1200:1224] for t in digits())
    attack = APGDT(trained_lenet().double(), eps, steps=12, targets=2, norm=norm, early_stop=early_stop)
    x = x.double()
    whole = attack(x, y)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    pieces = torch.empty_like(whole)
    for rows in order.split([1, 6, 17]):
        pieces[rows] = attack(x[rows], y[rows], samples=rows)
    trained_lenet().float()
    assert torch.allclose(whole, pieces, atol=1e-7)
    assert not torch.allclose(
        attack.__class__(trained_lenet().double(), eps, seed=1, steps=12, norm=norm)(x, y), whole, atol=1e-3
    )
    trained_lenet().float()


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes(classes):
    x, _ = batch(6)
    net = linear(classes)
    y = net(x).argmax(1)
    for attack in (APGD(net, 0.05, steps=5, loss="dlr"), APGDT(net, 0.05, steps=5)):
        assert attack.info is None
        adv = attack(x, y)
        assert torch.equal(net(adv).argmax(1) != y, attack.info.success)
        assert attack.info.success.any()


def test_targets_are_the_likeliest_other_classes():
    x, _ = batch(6)
    net = linear(5)
    y = torch.arange(6) % 5  # also where the label is not the likeliest
    seen = []
    attack = APGDT(net, 0.01, steps=1, targets=9)
    run = attack._run
    attack._run = lambda batch, loss, reference: seen.append(reference) or run(batch, loss, reference)
    attack(x, y)
    ranked = net(x).argsort(dim=1, descending=True).tolist()
    expected = [[c for c in row if c != label] for row, label in zip(ranked, y.tolist(), strict=True)]
    assert torch.stack(seen, 1).tolist() == expected


def test_targeted():
    x, _ = batch(6)
    net = linear(4)
    y = (net(x).argmax(1) + 1) % 4
    attack = APGD(net, 0.1, steps=10, targeted=True)
    adv = attack(x, y)
    assert torch.equal(net(adv).argmax(1) == y, attack.info.success)
    assert attack.info.success.all()


def test_restarts_only_add():
    x, y = (t[1200:1260] for t in digits())
    net = trained_lenet()
    fooled = []
    for restarts in (1, 2, 4):
        attack = APGD(net, 0.1, steps=3, restarts=restarts, early_stop=True)
        attack(x, y)
        fooled.append(attack.info.success)
    assert (fooled[0] <= fooled[1]).all()
    assert (fooled[1] <= fooled[2]).all()
    assert fooled[0].sum() < fooled[2].sum()


def test_it_costs_what_it_says():
    x, _ = batch()
    net = linear()
    calls = count_calls(net)
    attack = APGD(net, 1e-4, steps=10)
    attack(x, net(x).argmax(1).detach())
    assert len(calls) - 1 == attack.info.forwards == 12  # eleven of its own, and the last word
    assert attack.info.queries.tolist() == [12] * 6


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_step_does_not_wait_for_the_device(monkeypatch, norm):
    x, y = batch()
    waited = []
    step = _Ascent.step

    def watched(self):
        with Ops() as ran:
            step(self)
        waited.append(SYNCS & set(ran.names))

    monkeypatch.setattr(_Ascent, "step", watched)
    APGD(linear(), 0.1, steps=4, norm=norm)(x, y)
    assert waited
    assert not any(waited)


def test_a_confident_model_is_attacked_as_well():
    """Its cross-entropy underflows to a gradient of zero; a peer reports 98% robust digits."""
    x, y = (t[1200:1300] for t in digits())
    net = trained_lenet()
    confident = nn.Sequential(net, Times(1e4))
    robust = [1 - attack_success(m, x, y) for m in (net, confident)]
    assert robust[1] <= robust[0] + 0.05
    assert robust[0] < 0.2


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, z):
        return self.factor * z


def attack_success(net, x, y):
    attack = APGD(net, 0.15, steps=20)
    attack(x, y)
    return attack.info.success.float().mean().item()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "kl"}, "loss must be one of 'ce', 'margin', 'dlr'; got 'kl'"),
        ({"loss": "dlr", "targeted": True}, "loss='dlr' has no targeted form"),
        ({"steps": 0}, "steps must be an integer >= 1; got 0"),
        ({"restarts": 1.5}, "restarts must be an integer >= 1; got 1.5"),
        ({"norm": "l0"}, "norm must be one of 'linf', 'l2', 'l1'; got 'l0'"),
        ({"seed": -1}, "seed must be an integer >= 0; got -1"),
        ({"seed": 2**63}, r"seed must be an integer in \[0, 2\^63\)"),
        ({"eps": -0.1}, "eps must be a finite number >= 0"),
        ({"eps": math.nan}, "eps must be a finite number >= 0"),
        ({"bounds": (1, 0)}, "bounds must be"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        APGD(linear(), **{"eps": 0.1} | arguments)


def test_as_a_function():
    x, y = batch()
    net = linear()
    assert torch.equal(apgd(net, x, y, 0.05, steps=3, seed=2), APGD(net, 0.05, steps=3, seed=2)(x, y))
