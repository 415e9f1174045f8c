"""The objectives' losses against their formulas, written down again in plain PyTorch, in float64 within 1e-9."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from models import one_thread  # noqa: F401
from table import ROUNDING, name
from torch import Tensor

from fastadv import HypersphereHead, HypersphereMargin, LabelSmoothing, MMCHead, functional

CLASSES = (2, 3, 10, 100)
EXACT = {"rtol": 1e-9, "atol": 1e-12}
ROWS = 7


def logits_and_labels(classes: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """z, z' in float64 and y. At scale 20 most probabilities are below 1e-12, and MART's constants are seen."""
    g = torch.Generator().manual_seed(classes)
    z, z_adv = scale * torch.randn(2, ROWS, classes, generator=g, dtype=torch.float64)
    return z, z_adv, torch.randint(classes, (ROWS,), generator=g)


def soft_labels(classes: int) -> Tensor:
    """As CutMix makes them: two classes each."""
    y = F.one_hot(logits_and_labels(classes)[2], classes).double()
    return 0.7 * y + 0.3 * y.flip(0)


def class_means(classes: int) -> Tensor:
    g = torch.Generator().manual_seed(classes + 1)
    return (2 * torch.randn(classes, classes, generator=g, dtype=torch.float64)).softmax(1)


# ------------------------------------------------------------------------------------------------ the formulas, naively


def one_hot(y, z):
    return y if y.is_floating_point() else F.one_hot(y, z.shape[1]).to(z)


def cross_entropy(z, y):
    return -(one_hot(y, z) * z.softmax(1).log()).sum(1).mean()


def smoothed_over_others(z, y, amount):
    nll = -z.log_softmax(1)
    true = nll.gather(1, y[:, None])[:, 0]
    return ((1 - amount) * true + amount / (z.shape[1] - 1) * (nll.sum(1) - true)).mean()


def kl(z, z_adv):
    p, q = z.softmax(1), z_adv.softmax(1)
    return (p * (p.log() - q.log())).sum(1)


def trades(z, z_adv, y, beta=6.0):
    return cross_entropy(z, y) + beta * kl(z, z_adv).sum() / len(z)


def mart(z, z_adv, y, beta=5.0):
    """With each of the original's constants, one sample after the other."""
    p, q = z.softmax(1), z_adv.softmax(1)
    total = 0.0
    for i, label in enumerate(y.tolist()):
        rival = max(q[i, k] for k in range(q.shape[1]) if k != label)
        boosted = -z_adv[i].log_softmax(0)[label] - torch.log(1.0001 - rival + 1e-12)
        divergence = sum(p[i, k] * (torch.log(p[i, k]) - torch.log(q[i, k] + 1e-12)) for k in range(q.shape[1]))
        total = total + boosted + beta * divergence * (1.0000001 - p[i, label])
    return total / len(y)


def score(z, z_adv, y, beta=4.0, clip=0.0, clip_clean=False, label_smoothing=0.0):
    p, q, classes = z.softmax(1), z_adv.softmax(1), z.shape[1]
    t = (1 - classes * label_smoothing / (classes - 1)) * one_hot(y, z) + label_smoothing / (classes - 1)
    clean, adversarial = ((p - t) ** 2).sum(1), ((q - p) ** 2).sum(1)
    if clip_clean:
        return F.relu(clean + beta * adversarial - clip).mean()
    return clean.mean() + beta * F.relu(adversarial - clip).mean()


def pairwise(z, z_adv, pi):
    """GKL's M over all pairs of classes, [B, K, K]."""
    total = 0.0
    for i in range(len(z)):
        difference = (z[i][:, None] - z[i][None]) - (z_adv[i][:, None] - z_adv[i][None])
        total = total + (pi[i][:, None] * pi[i][None] * difference**2).sum()
    return total / 4 / (pi.sum(1) ** 2).sum()


def gkl(z, z_adv, y, means=None, alpha=4.0, beta=20.0, power=1.0):
    pi = torch.ones_like(z) if means is None else means[y] ** power
    soft = -(z.detach().softmax(1) * z_adv.log_softmax(1)).sum(1).mean()
    return cross_entropy(z, y) + alpha * soft + beta * pairwise(z, z_adv, pi)


def rst(z, z_adv, y, beta=6.0, entropy_weight=0.0):
    labelled = [i for i, label in enumerate(y.tolist()) if label >= 0]
    unlabelled = [i for i, label in enumerate(y.tolist()) if label < 0]
    p = z.softmax(1)
    loss = beta * kl(z, z_adv).mean()
    if labelled:
        loss = loss + cross_entropy(z[labelled], y[labelled])
    if unlabelled:
        loss = loss - entropy_weight * (p * p.log()).sum(1)[unlabelled].mean()
    return loss


def some_unlabelled(y):
    return torch.where(torch.arange(len(y)) % 3 == 0, -1, y)


def alp(z, z_adv, y, weight=0.5):
    pairs = sum((z[i, k] - z_adv[i, k]) ** 2 for i in range(len(z)) for k in range(z.shape[1]))
    return (cross_entropy(z, y) + cross_entropy(z_adv, y)) / 2 + weight * pairs / z.numel()


def consistency(z, z_adv, temperature=0.5):
    p, q = (z / temperature).softmax(1), (z_adv / temperature).softmax(1)
    mean = ((p + q) / 2).clamp(min=1e-8)  # the original's
    return ((p * (p / mean).log()).sum(1) / 2 + (q * (q / mean).log()).sum(1) / 2).mean()


def transport(z_adv, z, iterations=100):
    """Sinkhorn's iterations on sums of exponentials, [N]: what each sample of z' pays."""
    n, reg = len(z), 0.01
    cosine = (z / z.norm(dim=1, keepdim=True)) @ (z_adv / z_adv.norm(dim=1, keepdim=True)).T
    cost = F.relu(1 - cosine)
    u = v = torch.zeros(n, dtype=z.dtype)
    for _ in range(iterations):
        before = u
        u = reg * (math.log(1 / n) - (((u[:, None] + v[None] - cost) / reg).exp().sum(1) + 1e-6).log()) + u
        v = reg * (math.log(1 / n) - (((u[:, None] + v[None] - cost) / reg).exp().sum(0) + 1e-6).log()) + v
        if (u - before).abs().sum() < 0.1:
            break
    return (((u[:, None] + v[None] - cost) / reg).exp() * cost).sum(0)


class Case(NamedTuple):
    """Ours and the formula, on (z, z') and what ``given(classes)`` adds."""

    ours: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    given: Callable[[int], tuple] = lambda classes: (logits_and_labels(classes)[2],)
    logits: int = 2

    def arguments(self, classes: int, scale: float = 3.0) -> tuple[list[Tensor], tuple]:
        return [z.requires_grad_() for z in logits_and_labels(classes, scale)[: self.logits]], self.given(classes)


def soft(classes):
    return (soft_labels(classes),)


CASES = {
    "cross_entropy": Case(functional.cross_entropy, cross_entropy, logits=1),
    "cross_entropy soft": Case(functional.cross_entropy, cross_entropy, soft, logits=1),
    "smoothed": Case(LabelSmoothing(0.1), lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), logits=1),
    "smoothed soft": Case(LabelSmoothing(0.1), lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), soft, logits=1),
    "smoothed over others": Case(
        LabelSmoothing(0.3, over="others"),
        lambda z, y: smoothed_over_others(z, y, 0.3),
        logits=1,
    ),
    "trades": Case(functional.trades_loss, trades),
    "trades beta": Case(lambda z, w, y: functional.trades_loss(z, w, y, 1.5), lambda z, w, y: trades(z, w, y, 1.5)),
    "trades soft": Case(functional.trades_loss, trades, soft),
    "trades smoothed": Case(
        lambda z, w, y: functional.trades_loss(z, w, y, 5.0, LabelSmoothing(0.1)),
        lambda z, w, y: F.cross_entropy(z, y, label_smoothing=0.1) + 5 * kl(z, w).mean(),
    ),
    "mart": Case(functional.mart_loss, mart),
    "mart beta": Case(lambda z, w, y: functional.mart_loss(z, w, y, 6.0), lambda z, w, y: mart(z, w, y, 6.0)),
    "score": Case(functional.score_loss, score),
    "score soft": Case(functional.score_loss, score, soft),
    "score clip": Case(
        lambda z, w, y: functional.score_loss(z, w, y, 3.0, 0.4, label_smoothing=0.1),
        lambda z, w, y: score(z, w, y, 3.0, 0.4, label_smoothing=0.1),
    ),
    "score clip_clean": Case(
        lambda z, w, y: functional.score_loss(z, w, y, 6.0, 2.0, clip_clean=True),
        lambda z, w, y: score(z, w, y, 6.0, 2.0, clip_clean=True),
    ),
    "label_error": Case(
        lambda z, y: functional.label_error(z, y).sum(),
        lambda z, y: F.mse_loss(z.softmax(1), one_hot(y, z), reduction="sum"),
        logits=1,
    ),
    "gkl uniform": Case(functional.gkl_loss, gkl),
    "gkl": Case(functional.gkl_loss, gkl, lambda c: (logits_and_labels(c)[2], class_means(c))),
    "gkl weights": Case(
        functional.gkl_loss, gkl, lambda c: (logits_and_labels(c)[2], class_means(c), 3.0, 15.0, 0.3)
    ),
    "weighted_mse": Case(
        functional.weighted_mse, pairwise, lambda c: (class_means(c)[logits_and_labels(c)[2]] * 1.7,)
    ),
    "rst": Case(functional.rst_loss, rst),
    "rst unlabelled": Case(
        functional.rst_loss, rst, lambda c: (some_unlabelled(logits_and_labels(c)[2]), 3.0, 0.7)
    ),
    "rst all unlabelled": Case(functional.rst_loss, rst, lambda c: (torch.full((ROWS,), -1), 3.0, 0.7)),
    "alp": Case(functional.alp_loss, alp),
    "alp weight": Case(lambda z, w, y: functional.alp_loss(z, w, y, 0.25), lambda z, w, y: alp(z, w, y, 0.25)),
    "half-half": Case(lambda z, w, y: functional.alp_loss(z, w, y, 0.0), lambda z, w, y: alp(z, w, y, 0.0)),
    "hypersphere": Case(
        lambda z, y: functional.hypersphere_loss(z, y, 10.0, 0.2),
        lambda z, y: F.cross_entropy(10 * (z / 10 - 0.2 * one_hot(y, z)), y),
        logits=1,
    ),
    "mmc": Case(functional.mmc_loss, lambda z, y: -sum(z[i, k] for i, k in enumerate(y)) / len(y), logits=1),
    "consistency": Case(functional.consistency_loss, consistency, lambda c: ()),
    "consistency warm": Case(functional.consistency_loss, consistency, lambda c: (2.0,)),
    "transport": Case(lambda w, z: functional.transport_cost(w, z).sum(), lambda w, z: transport(w, z).sum(), lambda c: ()),
}  # fmt: skip


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_the_formulas(case, classes):
    """Every gradient flows that flows through the formula, and no other: GKL's S alone holds its clean side fixed."""
    ours, formula, *_ = CASES[case]
    logits, given = CASES[case].arguments(classes)
    value, expected = ours(*logits, *given), formula(*logits, *given)
    assert value.shape == ()
    torch.testing.assert_close(value, expected, **EXACT)
    for got, want in zip(torch.autograd.grad(3 * value, logits), torch.autograd.grad(3 * expected, logits), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize("case", ["trades", "mart", "gkl", "score", "rst unlabelled", "alp"])
def test_also_where_probabilities_are_tiny(case, classes):
    ours, formula, *_ = CASES[case]
    logits, given = CASES[case].arguments(classes, scale=20.0)
    value, expected = ours(*logits, *given), formula(*logits, *given)
    torch.testing.assert_close(value, expected, **EXACT)
    for got, want in zip(torch.autograd.grad(value, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


# --------------------------------------------------------------------------------------------------- closed-form gradients


def trades_gradients(z, z_adv, t, beta=6.0):
    n, log_p, log_q = len(z), z.log_softmax(1), z_adv.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    return (p - t) / n + beta / n * p * ((log_p - log_q) - kl(z, z_adv)[:, None]), beta / n * (q - p)


def mart_gradients(z, z_adv, t, beta=5.0):
    n, tiny, p, q = len(z), 1e-12, z.softmax(1), z_adv.softmax(1)
    rival = F.one_hot((q - 2 * t).argmax(1), z.shape[1])
    p_y, q_j = (p * t).sum(1, keepdim=True), (q * rival).sum(1, keepdim=True)
    w, h, ratio = 1.0000001 - p_y, p * q / (q + tiny), p.log() - (q + tiny).log()
    kappa = (p * ratio).sum(1, keepdim=True)
    d_z = beta / n * (w * p * (ratio - kappa) - kappa * p_y * (t - p))
    boosted = (q - t) + q_j * (rival - q) / (1.0001 - q_j + tiny)
    return d_z, (boosted + beta * w * (q * h.sum(1, keepdim=True) - h)) / n


def score_gradients(z, z_adv, t, beta=4.0):
    n, p, q = len(z), z.softmax(1), z_adv.softmax(1)
    a, b = q - p, p - t

    def rows(weights, difference):  # of |difference|^2, one side
        return 2 * weights * (difference - (weights * difference).sum(1, keepdim=True))

    return (rows(p, b) - beta * rows(p, a)) / n, beta * rows(q, a) / n


def gkl_gradients(z, z_adv, t, means, alpha=4.0, beta=20.0):
    n, p, q, pi = len(z), z.softmax(1), z_adv.softmax(1), t @ means
    d, mass = z - z_adv, pi.sum(1, keepdim=True)
    pairs = beta * pi * (mass * d - (pi * d).sum(1, keepdim=True)) / (mass**2).sum()
    return (p - t) / n + pairs, alpha * (q - p) / n - pairs


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize(
    ("case", "gradients"),
    [("trades", trades_gradients), ("mart", mart_gradients), ("score", score_gradients), ("gkl", gkl_gradients)],
)
def test_gradients_in_closed_form(case, gradients, classes):
    logits, (y, *given) = CASES[case].arguments(classes)
    got = torch.autograd.grad(CASES[case].ours(*logits, y, *given), logits)
    for grad, want in zip(got, gradients(*(z.detach() for z in logits), F.one_hot(y, classes).double(), *given), strict=True):
        torch.testing.assert_close(grad, want, **EXACT)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("gkl")])
def test_gradients_by_finite_differences(case):
    """But for GKL's, whose S holds its clean side fixed; its M is weighted_mse."""
    logits, given = CASES[case].arguments(3)
    assert torch.autograd.gradcheck(lambda *z: CASES[case].ours(*z, *given), logits, atol=1e-7)


# ------------------------------------------------------------------------------------------------- numbers of other kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize("case", CASES)
def test_low_precision_is_that_of_the_logits_alone(case, dtype):
    """Losses are fp32: as if the rounded logits were exact. Gradients have their logits' type."""
    ours, formula, *_ = CASES[case]
    logits, given = CASES[case].arguments(10)
    low = [z.detach().to(dtype).requires_grad_() for z in logits]
    exact = [z.detach().double().requires_grad_() for z in low]
    value, expected = ours(*low, *given), formula(*exact, *given)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(torch.autograd.grad(value, low), torch.autograd.grad(expected, exact), strict=True):
        assert got.dtype == dtype
        rounding = ROUNDING[dtype]
        torch.testing.assert_close(got.double(), want, rtol=rounding, atol=10 * rounding * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("case", CASES)
def test_huge_logits_have_finite_losses_and_gradients(case, dtype):
    """A gap of 1e4 in both batches, on the same class and on others."""
    logits, given = CASES[case].arguments(10)
    for rolls in (0, 1):
        huge = [1e4 * F.one_hot(torch.arange(ROWS).roll(i * rolls), 10).to(dtype).requires_grad_() for i in range(len(logits))]
        value = CASES[case].ours(*huge, *given)
        for t in (value, *torch.autograd.grad(value, huge)):
            assert t.isfinite().all()


def test_torchs_own_divergence_is_not_a_number_there():
    """TRADES issue 30: the gradient with respect to a target that underflowed to 0 is 0 * inf."""
    z = (200 * torch.eye(3)).requires_grad_()
    z_adv, y = torch.zeros(3, 3), torch.arange(3)
    F.kl_div(z_adv.log_softmax(1), z.softmax(1), reduction="sum").backward()
    assert z.grad.isnan().any()
    (ours,) = torch.autograd.grad(functional.trades_loss(z, z_adv, y), z)
    assert torch.equal(ours, torch.zeros(3, 3)), "a vertex of the simplex: p - 1_y and p (log p/q - KL) are both 0"


# ------------------------------------------------------------------------------------------------------ labels and centres


@pytest.mark.parametrize("classes", CLASSES)
def test_the_two_label_smoothings(classes):
    """Mass on the true class: 1 - a + a/C over all, 1 - a over the others; and the same of a soft label."""
    y = torch.arange(classes)
    for over, own, other in (("all", 0.7 + 0.3 / classes, 0.3 / classes), ("others", 0.7, 0.3 / (classes - 1))):
        smooth = functional.smooth_labels(y, classes, 0.3, over)
        assert smooth.dtype == torch.float32
        exact = functional.smooth_labels(y, classes, 0.3, over, torch.float64)
        wanted = torch.full((classes, classes), other, dtype=torch.float64).fill_diagonal_(own)
        torch.testing.assert_close(exact, wanted, **EXACT)
        torch.testing.assert_close(smooth, wanted.float())
        mixed = functional.smooth_labels(0.6 * torch.eye(classes) + 0.4 * torch.eye(classes).flip(0), classes, 0.3, over)
        torch.testing.assert_close(mixed, 0.6 * smooth + 0.4 * smooth.flip(0))


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("spare", [-1, 0, 20])
def test_centres_are_as_far_apart_as_can_be(classes, spare):
    """A simplex, that C - 1 dimensions hold: cosines -1/(C - 1), all of one norm, which squares to distances of 222 at 10."""
    centres = functional.mmc_centres(classes, classes + spare, norm=10.0)
    assert centres.shape == (classes, classes + spare)
    wanted = torch.full((classes, classes), -100 / (classes - 1), dtype=torch.float64).fill_diagonal_(100)
    torch.testing.assert_close(centres @ centres.T, wanted, rtol=1e-9, atol=1e-7)
    assert centres[0, 0] == 10
    assert torch.equal(centres, centres.tril()), "the official recursion's, not a rotation of it"


def test_gkl_sees_small_differences_beside_a_common_shift():
    """Of all logits by one amount, which no softmax sees."""
    z, z_adv, _ = logits_and_labels(10)
    z_adv, pi = (z + z_adv / 100 + 30).float(), torch.ones(ROWS, 10)
    exact = pairwise(z.float().double(), z_adv.double(), pi.double())
    torch.testing.assert_close(functional.weighted_mse(z.float(), z_adv, pi).double(), exact, rtol=1e-4, atol=0)


def test_mmc_head_answers_minus_squared_distances():
    torch.manual_seed(0)
    head, features = MMCHead(5, 3, dimensions=4, norm=7.0).double(), torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(head.centres, functional.mmc_centres(3, 4, 7.0), rtol=1e-6, atol=1e-6)
    assert "centres" in head.state_dict()
    torch.testing.assert_close(MMCHead(5, 3).centres, functional.mmc_centres(3, 256, 10.0).float())
    phi, logits, y = head.embed(features), head(features), torch.tensor([0, 1, 2, 0, 1, 2])
    for i in range(6):
        for k in range(3):
            torch.testing.assert_close(logits[i, k], -(torch.dist(phi[i], head.centres[k]) ** 2), **EXACT)
    distances = torch.stack([torch.dist(phi[i], head.centres[k]) ** 2 for i, k in enumerate(y)])
    torch.testing.assert_close(functional.mmc_distance(logits, y), distances, **EXACT)
    torch.testing.assert_close(functional.mmc_loss(logits, y), distances.mean(), **EXACT)


def test_hypersphere_head_sees_angles_alone():
    torch.manual_seed(0)
    head, features = HypersphereHead(5, 3, scale=12.0).double(), torch.randn(6, 5, dtype=torch.float64)
    logits = head(features)
    for i in range(6):
        for k in range(3):
            cosine = features[i] @ head.weight[k] / (features[i].norm() * head.weight[k].norm())
            torch.testing.assert_close(logits[i, k], 12 * cosine, **EXACT)
    torch.testing.assert_close(head(100 * features), logits, **EXACT)
    assert [name for name, _ in head.named_parameters()] == ["weight"], "no bias"
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    by_margin = F.cross_entropy(12 * (logits / 12 - 0.3 * F.one_hot(y, 3).double()), y)
    torch.testing.assert_close(HypersphereMargin(12.0, 0.3)(logits, y), by_margin, **EXACT)
    (gradient,) = torch.autograd.grad(by_margin, head.weight)
    torch.testing.assert_close((gradient * head.weight).sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_score_names_its_clips_by_the_mass_that_moved():
    assert functional.clip_of(0.3, 10) == pytest.approx(0.1)
    assert functional.clip_of(0.4, 10) == pytest.approx(0.1778, abs=5e-5)
    label, moved = torch.eye(5)[0], functional.smooth_labels(torch.tensor([0]), 5, 0.4, "others")[0]
    assert functional.clip_of(0.4, 5) == pytest.approx(float((label - moved).square().sum()))


# -------------------------------------------------------------------------------------------------------------- transport


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("noise", [0.01, 3.0])
def test_sinkhorn(rows, noise):
    """Near the clean logits, as in training, and far from them; the gradient goes through the plan."""
    g = torch.Generator().manual_seed(rows)
    z = 3 * torch.randn(rows, 10, generator=g, dtype=torch.float64)
    z_adv = (z + noise * torch.randn(rows, 10, generator=g, dtype=torch.float64)).requires_grad_()
    for iterations in (1, 2, 100):
        cost, expected = functional.transport_cost(z_adv, z, iterations=iterations), transport(z_adv, z, iterations)
        torch.testing.assert_close(cost, expected, **EXACT)
        got, want = (torch.autograd.grad(value, z_adv, retain_graph=True)[0] for value in (cost.sum(), expected.sum()))
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12 + 1e-9 * float(want.abs().max()))
    if noise == 0.01:  # two iterations do, and what a sample pays is its own way
        assert torch.equal(cost, functional.transport_cost(z_adv, z, iterations=2))
        torch.testing.assert_close(cost.sum(), (1 - F.cosine_similarity(z, z_adv)).mean(), rtol=0.1, atol=0)


# ------------------------------------------------------------------------------------------------------------- bad input

Z = torch.rand(3, 5)
BAD = {
    "smoothing": (lambda: LabelSmoothing(1.0), r"amount must be in \[0, 1\); got 1.0"),
    "negative smoothing": (lambda: LabelSmoothing(-0.1), r"amount must be in \[0, 1\)"),
    "over": (lambda: LabelSmoothing(0.1, over="most"), "over must be one of 'all', 'others'; got 'most'"),
    "over in the function": (lambda: functional.smooth_labels(torch.zeros(2), 2, 0.1, "most"), "over must be one of"),
    "one class": (lambda: functional.mmc_centres(1, 5), "classes >= 2"),
    "too few dimensions": (lambda: functional.mmc_centres(10, 8), r"dimensions >= classes - 1; got 10 and 8"),
    "shapes": (lambda: functional.trades_loss(Z, Z[:2], torch.tensor([0, 1, 2])), "one shape and device"),
    "label": (lambda: functional.cross_entropy(Z, torch.tensor([0, 1])), r"integer labels \[3\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
