"""The nearest-neighbour defence: what it answers, that it looks robust and rings the alarm, and that BPDA breaks it."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from models import FailsAt, batch, cnn, digits, linear, one_thread, seed, state, surroundings, trained_lenet  # noqa: F401
from torch import nn

import fastadv
from fastadv import NearestNeighbors, defenses

DATABASE = torch.tensor([[0.0], [1.0], [2.0], [3.0]])[:, None]  # four images of one pixel
LOGITS = torch.tensor([[4.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0]])


def table(x):
    """A model that knows the four images alone."""
    return LOGITS[x.flatten().round().long()]


@pytest.fixture(scope="module")
def defended():
    """A network trained on digits, behind its own training images."""
    x, y = digits()
    net = trained_lenet()
    return net, NearestNeighbors(net, net[:-1], x[:1200], k=20), x[1200:1300], y[1200:1300]


@pytest.mark.parametrize("search", ["torch", pytest.param("faiss", marks=pytest.mark.filterwarnings("ignore"))])
def test_answers_by_hand(search):
    if search == "faiss":
        pytest.importorskip("faiss")
    x = torch.tensor([[0.4], [1.6], [2.9]])[:, None]
    p = LOGITS.softmax(1)
    neighbours = [[0, 1], [2, 1], [3, 2]]
    uniform = NearestNeighbors(table, nn.Flatten(), DATABASE, k=2, search=search)
    torch.testing.assert_close(uniform(x).exp(), torch.stack([p[n].mean(0) for n in neighbours]))
    sure = math.log(3) + (p * p.log()).sum(1)
    weighted = NearestNeighbors(table, nn.Flatten(), DATABASE, k=2, weights="entropy", search=search)
    expected = torch.stack([(sure[n, None] * p[n]).sum(0) / sure[n].sum() for n in neighbours])
    torch.testing.assert_close(weighted(x).exp(), expected)
    assert weighted.search == search


def test_neighbours_that_know_nothing_answer_that_they_know_nothing():
    clueless = NearestNeighbors(lambda x: torch.zeros(len(x), 3), nn.Flatten(), DATABASE, k=2, weights="entropy")
    torch.testing.assert_close(clueless(DATABASE), torch.full((4, 3), -math.log(3)))


def test_the_stand_in_is_its_formula_and_never_nan():
    defence = NearestNeighbors(table, nn.Flatten(), DATABASE, k=2)
    x = torch.tensor([[0.5], [1e6]])[:, None].double().requires_grad_()
    squares = (x.flatten(1) - DATABASE.flatten()) ** 2
    scale = squares.detach().sort().values[:, :2].mean(1, keepdim=True)
    expected = ((-squares / scale).softmax(1) @ LOGITS.double().softmax(1)).log()
    double = NearestNeighbors(lambda z: table(z).double(), nn.Flatten(), DATABASE.double(), k=2)
    torch.testing.assert_close(double.soft(x), expected)
    gradients = [torch.autograd.grad(z[:, 0].sum(), x)[0] for z in (double.soft(x), expected)]
    torch.testing.assert_close(*gradients)
    on_top = NearestNeighbors(table, nn.Flatten(), DATABASE, k=1)
    image = DATABASE[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(on_top.soft(image)[:, 0].sum(), image)
    assert bool(on_top.soft(image).isfinite().all() & gradient.isfinite().all())
    assert torch.equal(defence.soft(x.float()).argmax(1)[:1], defence(x.float()).argmax(1)[:1])


def test_it_looks_robust_and_the_alarm_rings(defended):
    net, defence, x, y = defended
    assert float((defence(x).argmax(1) == y).float().mean()) > 0.9
    attack = fastadv.PGD(defence, 0.3, steps=20)
    naive = float((defence(attack(x, y)).argmax(1) == y).float().mean())
    assert attack.info.zero_grad.all()
    found = fastadv.evaluate(defence, (x[:2], y[:2]), 0.3, version=["apgd-ce"], progress=False)
    assert "zero gradients" in [alarm.name for alarm in found.ringing]
    undefended = fastadv.pgd(net, x, y, 0.3, steps=20)
    assert naive > 0.5 > 0.2 > float((net(undefended).argmax(1) == y).float().mean())


def test_bpda_breaks_it(defended):
    _, defence, x, y = defended
    attack = fastadv.PGD(defence.attackable(), 0.3, steps=20, keep_best=True)
    adv = attack(x, y)
    assert float((defence(adv).argmax(1) == y).float().mean()) < 0.1
    assert not attack.info.zero_grad.any()
    assert torch.equal(attack.info.success, defence(adv).argmax(1) != y)


def test_what_is_attacked_gives_the_same_answers_with_another_gradient(defended):
    _, defence, x, _ = defended
    image = x[:5].clone().requires_grad_()
    weights = torch.randn(5, 10, generator=seed())
    answers = defence.attackable()(image)
    assert torch.equal(answers, defence(image))
    found, soft, own = (
        torch.autograd.grad((z * weights).sum(), image)[0] for z in (answers, defence.soft(image), defence(image))
    )
    torch.testing.assert_close(found, soft)
    assert not own.any()
    assert found.flatten(1).any(1).all()


def test_faiss_and_torch_find_the_same(defended):
    pytest.importorskip("faiss")
    net, by_torch, x, _ = defended
    by_faiss = NearestNeighbors(net, net[:-1], digits()[0][:1200], k=20, search="faiss")
    torch.testing.assert_close(by_faiss(x), by_torch(x))
    torch.testing.assert_close(copy.deepcopy(by_faiss)(x), by_torch(x))


def test_a_loaded_database_is_indexed_anew(monkeypatch):
    net, x, indexed = cnn().eval(), batch(20)[0], []
    monkeypatch.setattr(defenses, "_index", lambda database, search: indexed.append(database.clone()))
    one, other = (NearestNeighbors(net, net[:-1], images, k=3) for images in (x, x.flip(3)))
    one.load_state_dict(other.state_dict())
    assert len(indexed) == 3
    assert torch.equal(indexed[2], other.database)
    assert not torch.equal(indexed[2], indexed[0])


def test_searching_in_parts_is_the_same(defended, monkeypatch):
    net, _, x, _ = defended
    defence = NearestNeighbors(net, net[:-1], digits()[0][:1200], k=20, search="torch", batch_size=700)
    expected = defence(x)
    monkeypatch.setattr(defenses, "TOGETHER", 3000)  # two images' distances
    torch.testing.assert_close(defence(x), expected)


@pytest.mark.parametrize("k", [-1, 0, 3])
def test_the_model_is_left_as_found(k):
    """Asked in eval mode, also where it is its own features and where it fails."""
    x, _ = batch(20)
    net = FailsAt(cnn(), k)
    before, around = state(net), surroundings()
    if k < 0:
        defence = NearestNeighbors(net, net.net[:-1], x, k=3)
        torch.testing.assert_close(defence.votes, net.eval()(x).log_softmax(1).detach())
        assert not any(t.requires_grad for t in (defence.votes, defence.database))
        assert len(list(defence.state_dict())) == len(list(net.net[:-1].state_dict())) + 2
        net.train()
    else:
        with pytest.raises(RuntimeError, match="as the test asked"):
            NearestNeighbors(net, net.net[:-1], x, k=3, batch_size=5)
    assert state(net) == before
    assert surroundings() == around


def test_without_faiss_torch_searches_unless_faiss_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert NearestNeighbors(table, nn.Flatten(), DATABASE, k=2).search == "torch"
    with pytest.raises(ValueError, match=r"search='faiss' needs the package faiss .*: pip install faiss-cpu"):
        NearestNeighbors(table, nn.Flatten(), DATABASE, k=2, search="faiss")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model must be callable"),
        ({"features": None}, "features must be callable"),
        ({"database_x": (255 * DATABASE).byte()}, "x must be a floating tensor"),
        ({"k": 5}, "k must be at most the database's 4 images; got 5"),
        ({"k": 0}, "k must be an integer >= 1"),
        ({"weights": "diversity"}, "weights must be one of 'uniform', 'entropy'"),
        ({"search": "annoy"}, "search must be one of"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"model": nn.Flatten()}, r"floating logits \[4, C\] with C >= 2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NearestNeighbors(**{"model": table, "features": nn.Flatten(), "database_x": DATABASE, "k": 2} | arguments)
