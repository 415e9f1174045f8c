"""The nearest adversarial image is found where it is known, l0 PGD keeps to its pixels, and all keep the rules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from models import SYNCS, FailsAt, Ops, batch, cnn, linear, one_thread, seeded, state, surroundings  # noqa: F401
from torch import nn

import fastadv
from fastadv.attacks import minimum_norm
from fastadv.attacks.norms import project, unit

ATTACKS = {
    "deepfool l2": (fastadv.DeepFool, {"norm": "l2"}),
    "deepfool linf": (fastadv.DeepFool, {"norm": "linf"}),
    "cw": (fastadv.CW, {"steps": 200, "search_steps": 7, "lr": 0.1}),
    "ddn": (fastadv.DDN, {}),
    "fmn l0": (fastadv.FMN, {"norm": "l0"}),
    "fmn l1": (fastadv.FMN, {"norm": "l1"}),
    "fmn l2": (fastadv.FMN, {"norm": "l2"}),
    "fmn linf": (fastadv.FMN, {"norm": "linf"}),
}
SHORT = {"cw": {"steps": 20, "search_steps": 2}, "ddn": {"steps": 10}, "fmn": {"steps": 10}, "deepfool": {"steps": 4}}
EVERY = {**ATTACKS, "pgd0": (fastadv.PGD0, {"eps": 3, "steps": 5, "restarts": 2})}
EPS = {"l0": 4, "l1": 2.0, "l2": 0.4, "linf": 0.03}  # of 3x8x8 images, of which some are then fooled and some are not


def made(name: str, model, **settings):
    """The attack ``name``, of few steps."""
    kind, own = EVERY[name]
    return kind(model, **{**own, **SHORT.get(name.split()[0], {}), **settings})


def distance(adv, x, norm):
    """[N], in fp64."""
    d = (adv.double() - x.double()).flatten(1)
    if norm == "l0":
        return (d != 0).sum(1).double()
    return {"linf": d.abs().amax, "l2": d.norm, "l1": d.abs().sum}[norm](dim=1)


@seeded
def flat_model(classes: int, features: int = 40) -> nn.Module:
    net = nn.Linear(features, classes).double()
    net.weight.data = 3 * torch.randn(classes, features, dtype=torch.float64)
    return net


def flat_batch(features: int = 40, n: int = 24):
    return torch.rand(n, features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def nearest(net: nn.Linear, x, norm, lo=-math.inf, hi=math.inf):
    """The distance of each x from the other classes of a linear model in the box, [N]: exactly.

    With s the price of the constraint, an element moves along w by its share: l2 s w, linf s sign(w), l1 all the way in order
    of |w| (l0: of what an element can do); each until it meets a wall.
    """
    found = []
    for row, y in zip(x, net(x).argmax(1), strict=True):
        best = math.inf
        for k in range(net.out_features):
            if k == y:
                continue
            w, gap = net.weight[k] - net.weight[y], (net(row)[y] - net(row)[k]).item()
            room = torch.where(w > 0, hi - row, row - lo)
            if norm in ("l1", "l0"):
                length, first = 0.0, (w.abs() if norm == "l1" else w.abs() * room).argsort(descending=True)
                for size, way in zip(w.abs()[first].tolist(), room[first].tolist(), strict=True):
                    part = min(way, gap / size)
                    gap, length = gap - part * size, length + (part if norm == "l1" else 1)
                    if gap <= 1e-12:
                        break
                best = min(best, length if gap <= 1e-12 else math.inf)
                continue
            low, high = 0.0, 1e4
            for _ in range(100):
                s = (low + high) / 2
                d = torch.minimum(s * (w.abs() if norm == "l2" else torch.ones_like(w)), room)
                low, high = (low, s) if (d * w.abs()).sum() >= gap else (s, high)
            if (d * w.abs()).sum() >= gap * (1 - 1e-9):
                best = min(best, d.norm().item() if norm == "l2" else d.max().item())
        found.append(best)
    return torch.tensor(found, dtype=torch.float64)


# ------------------------------------------------------------------------------------- where the nearest image is known


# Of the median sample and of the worst, by how much the distance may exceed the shortest.
EXCESS = {
    "deepfool l2": (0.021, 0.03), "deepfool linf": (0.023, 0.05), "ddn": (2e-3, 0.06), "fmn l2": (1e-4, 0.3),
    "fmn linf": (1e-4, 0.3), "fmn l1": (0.01, 0.5), "fmn l0": (0.0, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("name", EXCESS)
def test_nearest_image_of_a_linear_model_without_a_box(name, classes):
    kind, settings = ATTACKS[name]
    net, x = flat_model(classes), flat_batch()
    attack = kind(net, bounds=None, **settings)
    adv = attack(x, net(x).argmax(1))
    shortest = nearest(net, x, attack.norm)
    ratio = attack.info.distance / shortest
    assert attack.info.success.all()
    torch.testing.assert_close(attack.info.distance, distance(adv, x, attack.norm))
    assert (ratio >= 1 - 1e-9).all()
    middle, worst = EXCESS[name]
    assert ratio.median() <= 1 + middle
    assert ratio.max() <= 1 + worst


BOXED = {
    "deepfool l2": (1e-3, 0.08), "deepfool linf": (2e-3, 0.05), "cw": (4e-3, 0.2), "ddn": (2e-3, 0.07), "fmn l2": (1e-3, 0.08),
    "fmn linf": (1e-4, 0.15), "fmn l1": (1e-3, 0.2), "fmn l0": (0.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-3.0, 5.0)], ids=str)
@pytest.mark.parametrize("name", BOXED)
def test_nearest_image_of_a_linear_model_in_a_box_that_is_in_the_way(name, bounds):
    kind, settings = ATTACKS[name]
    lo, hi = bounds
    net, x = flat_model(3), lo + (hi - lo) * flat_batch().mul(1.4).sub(0.2).clamp(0, 1)  # some elements stand at a wall
    attack = kind(net, bounds=bounds, **settings)
    adv = attack(x, net(x).argmax(1))
    shortest, free = (nearest(net, x, attack.norm, *box) for box in ((lo, hi), (-math.inf, math.inf)))
    if attack.norm != "l0":
        assert (shortest > 1.01 * free).double().mean() > 0.3  # the box is in the way
    assert adv.min() >= lo
    assert adv.max() <= hi
    possible = shortest < math.inf
    assert attack.info.success[possible].all()
    ratio = (attack.info.distance / shortest)[possible]
    assert (ratio >= 1 - 1e-9).all()
    middle, worst = BOXED[name]
    assert ratio.median() <= 1 + middle
    assert ratio.max() <= 1 + worst


@pytest.mark.parametrize("name", ["deepfool l2", "cw", "ddn", "fmn l2"])
def test_nearest_image_of_a_ball(name):
    """Class 0 within a radius of a centre: the nearest other image is straight outward."""
    centre, radius = torch.full((20,), 0.5, dtype=torch.float64), 0.7
    x = centre + 0.9 * radius * unit(flat_batch(20) - 0.5)

    def ball(z):
        far = (z - centre).square().sum(1) - radius**2
        return torch.stack([torch.zeros_like(far), far], 1)

    finer = {"lr": 0.01, "search_steps": 9} if name == "cw" else {}
    attack = ATTACKS[name][0](ball, **{**ATTACKS[name][1], "bounds": (-1.0, 2.0), **finer})
    attack(x, torch.zeros(len(x), dtype=torch.long))
    ratio = attack.info.distance / (radius - (x - centre).norm(dim=1))
    assert (ratio >= 1 - 1e-9).all()
    assert ratio.max() <= (1.085 if name == "deepfool l2" else 1.02)  # 0.19 / 1.8 for 0.1, and the overshoot


@pytest.mark.parametrize("name", ["cw", "ddn", "fmn l1", "fmn l2", "fmn linf"])
def test_targeted_reaches_the_target_at_its_distance(name):
    net, x = flat_model(2), flat_batch()
    target = 1 - net(x).argmax(1)  # of two classes, the other one
    kind, settings = ATTACKS[name]
    there, away = (kind(net, targeted=t, bounds=(-9.0, 9.0), **settings) for t in (True, False))
    assert (net(there(x, target)).argmax(1) == target).all()
    away(x, 1 - target)
    torch.testing.assert_close(there.info.distance, away.info.distance, rtol=1e-6, atol=0)
    net3 = flat_model(3)
    target = (net3(x).argmax(1) + 1) % 3
    adv = kind(net3, targeted=True, bounds=(-9.0, 9.0), **settings)(x, target)
    assert (net3(adv).argmax(1) == target).all()


def test_cw_reaches_the_confidence():
    net, x = flat_model(3), flat_batch()
    attack = fastadv.CW(net, confidence=0.5, steps=300, bounds=(-9.0, 9.0))
    logits = net(attack(x, net(x).argmax(1)))
    own = logits.gather(1, net(x).argmax(1)[:, None])
    lead = logits.scatter(1, net(x).argmax(1)[:, None], -math.inf).amax(1) - own[:, 0]
    assert (lead >= 0.5).all()
    assert lead.median() < 0.52


# ---------------------------------------------------------------------------------------------------- ball, box, results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_result_is_in_ball_and_box(name, dtype):
    x, y = batch(8, dtype=dtype)
    norm = EVERY[name][1].get("norm", "l0" if name == "pgd0" else "l2")
    eps = EPS[norm] * torch.tensor([0.0, 0.1, 1.0, 1.0, 1.0, 2.0, 3.0, 100.0], dtype=torch.float64)
    net = linear().to(dtype)
    attack = made(name, net, eps=eps)
    adv = attack(x, y)
    assert adv.dtype == dtype
    assert adv.min() >= 0
    assert adv.max() <= 1
    if name == "pgd0":
        assert (pixels(adv, x) <= eps).all()
    else:
        low = dtype in (torch.bfloat16, torch.float16)
        slack = 0 if norm == "l0" else 100 * torch.finfo(torch.float32 if low else dtype).eps
        assert (distance(adv, x, norm) <= eps * (1 + slack)).all()
    assert torch.equal(attack.info.success, net(adv).argmax(1) != y)
    assert not adv.requires_grad


@pytest.mark.parametrize("name", ATTACKS)
def test_eps_refuses_what_is_farther_and_keeps_what_is_nearer(name):
    net, x = flat_model(3), flat_batch()
    y = net(x).argmax(1)
    kind, settings = ATTACKS[name]
    free = kind(net, bounds=(-9.0, 9.0), **settings)
    free(x, y)
    found = free.info.distance
    eps = found.median()
    held = kind(net, eps=eps, bounds=(-9.0, 9.0), **settings)
    adv = held(x, y)
    assert (distance(adv, x, held.norm) <= eps * (1 + 1e-9)).all()
    sure = found * 1.03 < eps if held.norm != "l0" else found <= eps
    assert held.info.success[sure].all()
    assert not held.info.success[nearest(net, x, held.norm, -9.0, 9.0) > eps].any()
    assert (held.info.distance[~held.info.success] == math.inf).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_who_is_misclassified_comes_back_as_it_is(name):
    net, x = flat_model(3), flat_batch()
    attack = made(name, net)
    assert torch.equal(attack(x, (net(x).argmax(1) + 1) % 3), x)
    assert (attack.info.distance == 0).all()


@pytest.mark.parametrize("name", EVERY)
def test_who_cannot_be_fooled_comes_back_finite_and_changed(name):
    """A third class that always wins: the loss of the clean class can be raised, but in vain."""
    x, y = batch(4)
    net = linear(2)

    def stubborn(z):
        return torch.cat([0.01 * net(z), torch.full((len(z), 1), 99.0)], 1)

    attack = made(name, stubborn, **({} if name == "pgd0" else {"eps": EPS[EVERY[name][1].get("norm", "l2")]}))
    adv = attack(x, torch.full_like(y, 2))
    assert adv.isfinite().all()
    assert not attack.info.success.any()
    assert (adv != x).flatten(1).any(1).all()


# --------------------------------------------------------------------------------------------------------- the contracts


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_model_and_surroundings_are_left_as_found(name, fails):
    x, _ = batch(3)
    y = cnn().eval()(x).argmax(1)
    net = FailsAt(cnn().train(), 1 if fails else -1)
    net.net[0].weight.grad = torch.ones_like(net.net[0].weight)
    net.net[4].weight.requires_grad_(False)
    before = state(net), surroundings(), x.clone()
    attack = made(name, net)
    if fails:
        with pytest.raises(RuntimeError, match="as the test asked"):
            attack(x, y)
    else:
        attack(x, y)
    assert (state(net), surroundings()) == before[:2]
    assert torch.equal(x, before[2])


@pytest.mark.parametrize("name", EVERY)
def test_samples_do_not_see_each_other(name):
    """One batch, its pieces and another order: the same images, by sample number, and the same counts."""
    x, y = (t.double() if t.is_floating_point() else t for t in batch(6))
    net = cnn().double().eval()
    attack = made(name, net)
    whole, queries = attack(x, y), attack.info.queries
    for rows in (torch.tensor([4, 1]), torch.tensor([5, 4, 3, 2, 1, 0]), torch.tensor([3])):
        part = attack(x[rows], y[rows], samples=rows)
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-9)
        assert torch.equal(attack.info.queries, queries[rows])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 3, 4), (2, 2, 2, 2)], ids=str)
def test_any_rank_any_layout_no_labels_and_any_number_of_samples(name, shape):
    size = math.prod(shape)
    net = nn.Sequential(nn.Flatten(), flat_model(3, size))
    for n in (0, 1, 5):
        x = flat_batch(size, n).view(n, *shape)
        attack = made(name, net)
        adv = attack(x, None)
        assert adv.shape == x.shape
        assert attack.info.success.shape == (n,)
    if len(shape) == 3:
        flipped = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(attack(flipped, None), adv)


@pytest.mark.parametrize("name", EVERY)
def test_no_gradient_and_nan_gradient_move_nothing_into_nan(name):
    x, _ = batch(4)
    for net in (
        lambda z: linear()(z) + (0 * z.flatten(1).sum(1, keepdim=True)).sqrt(),  # 0, with the derivative 0 * inf
        lambda z: linear()(z.detach()) + 0 * z.flatten(1).sum(1, keepdim=True),
    ):
        adv = made(name, net)(x, linear()(x).argmax(1))
        assert adv.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_a_step_waits_for_nothing(name):
    """What a CUDA graph needs. Counted over a whole attack: syncs may not grow with the steps."""
    x, y = batch(3)
    counts = []
    for steps in (4, 8):
        settings = (
            {"overshoot": 0.0} if "deepfool" in name else {"abort_early": False, "search_steps": 1} if name == "cw" else {}
        )
        attack = made(name, lambda z: linear()(z) + torch.tensor([99.0] + 9 * [0.0]), steps=steps, **settings)
        with Ops() as ops:
            attack(x, torch.zeros_like(y))
        counts.append(sum(op in SYNCS for op in ops.names))
    if name in ("pgd0", "deepfool l2", "deepfool linf"):  # whose driver asks after each step who still stands
        assert counts[1] - counts[0] <= 2 * 4 * 2
    else:
        assert counts[0] == counts[1]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "settings", [{"precision": "bf16"}, {"precision": "fp16"}, {"twin": True}, {"memory": "signs"}], ids=str
)
def test_other_passes_fool_the_model_itself(name, settings):
    x, _ = batch(6)
    net = cnn().eval()
    y = net(x).argmax(1)
    plain, other = made(name, net), made(name, net, **settings)
    plain(x, y), other(x, y)
    if name == "pgd0":  # which takes another path with every bit
        assert other.info.success.double().mean() >= plain.info.success.double().mean() - 0.2
        return
    assert (other.info.success >= plain.info.success).all()
    near = plain.info.success
    assert (other.info.distance[near] <= 1.5 * plain.info.distance[near] + 2 * (plain.norm == "l0")).all()


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("name", ["deepfool l2", "cw", "fmn linf"])
def test_compiled(name):
    x, _ = batch(4)
    net = cnn().eval()
    y = net(x).argmax(1)  # who is not fooled yet stays in the batch, which as a whole is compiled
    few = {"classes": 3} if name == "deepfool l2" else {}  # each is another backward pass to compile
    plain, compiled = made(name, net, **few), made(name, net, engine="compile", **few)
    expected = plain(x, y)
    for _ in range(2):  # the first call is eager
        adv = compiled(x, y)
    assert any("compile" in plan for plan in compiled.stats.steps)
    torch.testing.assert_close(adv, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", EVERY)
def test_replayed_steps_are_the_eager_ones(name, monkeypatch):
    """A recording reads and writes the tensors it was made with: here the step runs again on them."""
    from fastadv.engine import graphs

    monkeypatch.setattr(graphs, "available", lambda device: True)

    def record(step, device):
        loop = step.__self__
        scalars = [n for n in loop.STATE if isinstance(getattr(loop, n), (int, float))]
        assert not scalars, f"{scalars} would be baked in"
        places = {n: getattr(loop, n).data_ptr() for n in loop.STATE if getattr(loop, n) is not None}

        def replay():
            assert all(getattr(loop, n).data_ptr() == at for n, at in places.items())
            step()
            assert all(getattr(loop, n).data_ptr() == at for n, at in places.items())

        return replay

    monkeypatch.setattr(graphs, "record", record)
    x, y = batch(5)
    net = cnn().eval()
    expected = made(name, net)(x, y)
    attack = made(name, net, engine="graph")
    for _ in range(3):
        torch.testing.assert_close(attack(x, y), expected, rtol=0, atol=1e-6)
    assert attack.stats.recorded > 0


@pytest.mark.parametrize("name", EVERY)
def test_function_is_the_class_in_one_call(name):
    x, y = batch(3)
    kind, settings = EVERY[name]
    settings = {**settings, **SHORT.get(name.split()[0], {})}
    function = getattr(fastadv, kind.__name__.lower())
    assert torch.equal(function(linear(), x, y, **settings), kind(linear(), **settings)(x, y))


# ------------------------------------------------------------------------------------------------------------- l0 PGD


def pixels(adv, x):
    return (adv != x).any(1).flatten(1).sum(1) if x.dim() > 2 else (adv != x).sum(1)


def test_pgd0_changes_the_pixels_that_matter():
    """Of a linear model with two classes the best k pixels are known: those that gain most when all channels go to a wall."""
    net = nn.Sequential(nn.Flatten(), flat_model(2, 3 * 16))
    x = flat_batch(48, 12).view(12, 3, 4, 4)
    y = net(x).argmax(1)
    w = net[1].weight[1 - y] - net[1].weight[y]
    gain = torch.maximum(w * (1 - x.flatten(1)), -w * x.flatten(1)).view(12, 3, 16).sum(1)
    logits = net(x)
    gap = logits.gather(1, y[:, None])[:, 0] - logits.gather(1, 1 - y[:, None])[:, 0]
    needed = 1 + (gain.sort(1, descending=True).values.cumsum(1) < gap[:, None]).sum(1)
    for extra in (0, -1):
        attack = fastadv.PGD0(net, eps=(needed + extra).double())
        adv = attack(x, y)
        assert (pixels(adv, x) <= needed + extra).all()
        assert attack.info.success.double().mean() >= 0.9 if extra == 0 else not attack.info.success.any()
        found = attack.info.success
        assert torch.equal(attack.info.distance[found], pixels(adv, x)[found].double())


def test_pgd0_projection_is_the_nearest():
    """Against all choices of pixels."""
    from fastadv.attacks.sparse import _PGD0

    g = torch.Generator().manual_seed(0)
    x, moved = torch.rand(5, 2, 5, generator=g), 3 * torch.randn(5, 2, 5, generator=g)
    loop = _PGD0.__new__(_PGD0)
    loop.centre, loop.lo, loop.hi, loop.count = x, 0.0, 1.0, torch.full((5, 1), 2)
    found = loop.projected(moved)
    choices = []
    for kept in itertools.combinations(range(5), 2):
        candidate = x.clone()
        candidate[:, :, kept] = moved[:, :, kept].clamp(0, 1)
        choices.append((candidate - moved).flatten(1).norm(dim=1))
    torch.testing.assert_close((found - moved).flatten(1).norm(dim=1), torch.stack(choices).amin(0))
    assert (pixels(found, x) <= 2).all()


@pytest.mark.parametrize("norm", ["l0", "l1", "l2", "linf"])
def test_projection_is_in_ball_and_box_and_leaves_what_is(norm):
    g = torch.Generator().manual_seed(0)
    d, room = torch.randn(8, 12, generator=g), torch.rand(8, 12, generator=g)
    radius = torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 50.0, math.inf])
    p = project(d, radius, norm, -room, room)
    assert (p.abs() <= room).all()
    assert (distance(p, torch.zeros_like(p), norm) <= radius.double() * (1 + 1e-6)).all()
    torch.testing.assert_close(project(p, radius, norm, -room, room), p)
    torch.testing.assert_close(p[-1], d[-1].clamp(-room[-1], room[-1]))


def test_fmn_walks_on_the_sphere_and_keeps_the_elements_that_its_step_moves_most():
    """Inside the l2 ball it left 4 points more digits standing than adv-lib's; and 1.4 in l0, with elements at walls last.

    With no more elements than the radius says it left 0.8 points more than foolbox's, which keeps one more.
    """
    walk = object.__new__(minimum_norm._FMN)
    walk.radius = torch.tensor([2.0, 1.0])
    d = torch.tensor([[0.3, 0.4, 0.0], [3.0, -0.5, 4.0]])
    walk.norm = "l2"
    torch.testing.assert_close(
        walk.within(d), torch.tensor([[1.2, 1.6, 0.0], [3.0, -0.5, 4.0]]) / torch.tensor([[1.0], [25.25**0.5]])
    )
    walk.norm, walk.limit = "l0", torch.tensor([2.0, 3.0])
    assert walk.within(d).tolist() == [pytest.approx([0.3, 0.4, 0.0]), [3.0, 0.0, 4.0]]
    walk.limit = torch.tensor([1.0, 1.0])  # eps, beyond which it does not look
    assert walk.within(d).tolist() == [pytest.approx([0.0, 0.4, 0.0]), [0.0, 0.0, 4.0]]


def test_unit_has_no_direction_where_there_is_none():
    d = torch.tensor([[3.0, 4.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [3e-30, 4e-30]])
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(unit(d), expected)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (fastadv.DeepFool, {"steps": 0}, "steps must be an integer >= 1; got 0"),
        (fastadv.DeepFool, {"overshoot": -0.1}, "overshoot must be a finite number >= 0; got -0.1"),
        (fastadv.DeepFool, {"classes": 1}, "classes must be an integer >= 2; got 1"),
        (fastadv.DeepFool, {"norm": "l1"}, "norm must be one of 'l2', 'linf'; got 'l1'"),
        (fastadv.CW, {"bounds": None}, "bounds must be finite for CW"),
        (fastadv.CW, {"bounds": (0.0, math.inf)}, "bounds must be finite for CW"),
        (fastadv.CW, {"lr": 0.0}, "lr must be a finite number > 0; got 0.0"),
        (fastadv.CW, {"search_steps": 0}, "search_steps must be an integer >= 1; got 0"),
        (fastadv.CW, {"initial_c": 0}, "initial_c must be a finite number > 0; got 0"),
        (fastadv.CW, {"confidence": -1}, "confidence must be a finite number >= 0; got -1"),
        (fastadv.DDN, {"gamma": 1.0}, r"gamma must be in \(0, 1\); got 1.0"),
        (fastadv.DDN, {"init_norm": 0.0}, "init_norm must be a finite number > 0; got 0.0"),
        (fastadv.DDN, {"eps": -1.0}, "eps must be a finite number >= 0"),
        (fastadv.FMN, {"gamma_final": 0.1}, "gamma_final must be at most gamma, 0.05; got 0.1"),
        (fastadv.FMN, {"alpha": 0.0}, "alpha must be a finite number > 0; got 0.0"),
        (fastadv.FMN, {"norm": "lp"}, "norm must be one of 'l0', 'l1', 'l2', 'linf'; got 'lp'"),
        (fastadv.PGD0, {"eps": None}, "eps must be a finite number >= 0"),
        (fastadv.PGD0, {"eps": 3, "bounds": None}, "bounds must be finite for PGD0"),
        (fastadv.PGD0, {"eps": 3, "restarts": 0}, "restarts must be an integer >= 1; got 0"),
        (fastadv.PGD0, {"eps": 3, "alpha": 0.0}, "alpha must be a finite number > 0; got 0.0"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(attack, settings, message):
    with pytest.raises(ValueError, match=message):
        attack(linear(), **settings)
