"""What holds for every attack, by every engine: the model is left as found, images are in ball and box, samples independent."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from models import FailsAt, batch, cnn, linear, one_thread, state, surroundings  # noqa: F401
from torch import nn

import fastadv
from fastadv import attacks
from fastadv.attacks.base import Attack
from fastadv.attacks.norms import norms

MASK = torch.ones(1, 8, 8)

# Each attack with eps on a model, a few steps of it; by its name and norm.
ATTACKS = {
    "APGD linf": lambda net, **o: fastadv.APGD(net, **{"eps": 0.05, "steps": 4} | o),
    "APGD l2": lambda net, **o: fastadv.APGD(net, **{"eps": 0.5, "steps": 4, "norm": "l2"} | o),
    "APGD l1": lambda net, **o: fastadv.APGD(net, **{"eps": 3.0, "steps": 6, "norm": "l1"} | o),
    "APGD early": lambda net, **o: fastadv.APGD(net, **{"eps": 0.05, "steps": 4, "early_stop": True, "restarts": 2} | o),
    "APGDT": lambda net, **o: fastadv.APGDT(net, **{"eps": 0.05, "steps": 3, "targets": 2} | o),
    "MIFGSM": lambda net, **o: fastadv.MIFGSM(net, **{"eps": 0.05, "steps": 3} | o),
    "FAB linf": lambda net, **o: fastadv.FAB(net, **{"eps": 0.05, "steps": 3} | o),
    "FABT l2": lambda net, **o: fastadv.FABT(
        net, **{"eps": 0.5, "steps": 3, "targets": 2, "norm": "l2", "early_stop": True} | o
    ),
    "DeepFool l2": lambda net, **o: fastadv.DeepFool(net, **{"eps": 0.5, "steps": 3} | o),
    "DeepFool linf": lambda net, **o: fastadv.DeepFool(net, **{"eps": 0.05, "steps": 3, "norm": "linf"} | o),
    "CW": lambda net, **o: fastadv.CW(net, **{"eps": 0.5, "steps": 3, "search_steps": 2} | o),
    "DDN": lambda net, **o: fastadv.DDN(net, **{"eps": 0.5, "steps": 4} | o),
    "FMN linf": lambda net, **o: fastadv.FMN(net, **{"eps": 0.05, "steps": 4, "norm": "linf"} | o),
    "FMN l0": lambda net, **o: fastadv.FMN(net, **{"eps": 20, "steps": 4, "norm": "l0"} | o),
    "PGD0": lambda net, **o: fastadv.PGD0(net, **{"eps": 5, "steps": 3, "restarts": 1} | o),
    "Square linf": lambda net, **o: fastadv.Square(net, **{"eps": 0.05, "queries": 8} | o),
    "Square l2": lambda net, **o: fastadv.Square(net, **{"eps": 0.5, "queries": 8, "norm": "l2"} | o),
    "Square l1": lambda net, **o: fastadv.Square(net, **{"eps": 3.0, "queries": 8, "norm": "l1"} | o),
    "SPSA": lambda net, **o: fastadv.SPSA(net, **{"eps": 0.05, "steps": 2, "directions": 4} | o),
    "Boundary": lambda net, **o: fastadv.Boundary(net, **{"eps": 0.5, "steps": 20} | o),
    "HopSkipJump l2": lambda net, **o: fastadv.HopSkipJump(net, **{"eps": 0.5, "steps": 2, "queries": 8} | o),
    "HopSkipJump linf": lambda net, **o: fastadv.HopSkipJump(
        net, **{"eps": 0.05, "steps": 2, "queries": 8, "norm": "linf"} | o
    ),
    "RandomNoise": lambda net, **o: fastadv.RandomNoise(net, **{"eps": 0.05, "draws": 4} | o),
    "RP2": lambda net, **o: fastadv.RP2(net, **{"mask": MASK, "eps": 0.05, "steps": 3, "samples": 2} | o),
    "FeatureAttack": lambda net, **o: fastadv.FeatureAttack(net, **{"eps": 0.05, "steps": 3, "layer": "0"} | o),
}
MOVED_BY_THE_LAST_BITS = ("APGD l1", "FMN l0", "PGD0", "Boundary", "HopSkipJump l2", "HopSkipJump linf")


def ball(attack: Attack, adv: torch.Tensor, x: torch.Tensor) -> None:
    """Every image in box and ball, up to rounding; "l0" of PGD0 counts pixels, not elements."""
    assert ((adv >= 0) & (adv <= 1)).all()
    far = norms((adv - x).double(), attack.norm)
    limit = attack.eps * (x.shape[1] if isinstance(attack, fastadv.PGD0) else 1)
    assert (far <= limit * (1 + 1e-5) + 1e-6).all(), far


def test_none_is_forgotten():
    known = {
        value for name in attacks.__all__ if inspect.isclass(value := getattr(attacks, name)) and issubclass(value, Attack)
    }
    here = {type(make(linear())) for make in ATTACKS.values()}
    assert known - here == {Attack, fastadv.Transfer}  # whose images are another attack's


@pytest.mark.parametrize("name", ATTACKS)
def test_images_and_what_is_said_of_them(name):
    x, y = batch()
    net = cnn(dropout=0.0).eval()
    attack = ATTACKS[name](net)
    adv = attack(x.to(memory_format=torch.channels_last).requires_grad_(), y)
    assert adv.shape == x.shape
    assert adv.dtype == x.dtype
    assert adv.is_contiguous(memory_format=torch.channels_last)
    assert not adv.requires_grad
    ball(attack, adv, x)
    assert torch.equal(attack.info.success, net(adv).argmax(1) != y)
    far = norms((adv - x).abs().amax(1) if isinstance(attack, fastadv.PGD0) else adv - x, attack.norm)
    assert torch.allclose(attack.info.distance, torch.where(attack.info.success, far, math.inf), rtol=1e-4, atol=1e-6)
    assert (attack.info.queries >= 1).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_model_and_surroundings_are_left_as_found(name):
    x, y = batch()
    net = cnn(dropout=0.0).train()
    for p in net[0].parameters():
        p.requires_grad_(False)
    net[4].weight.grad = torch.ones_like(net[4].weight)
    before, around = state(net), surroundings()
    ATTACKS[name](net)(x, y)
    assert state(net) == before
    assert surroundings() == around


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", ATTACKS)
def test_also_when_the_model_raises(name, share):
    """At the first call, half way, or at the last."""
    x, _ = batch()
    failing = FailsAt(cnn(dropout=0.0).train(), -1, KeyboardInterrupt)
    layer = {"layer": "net.0"} if name == "FeatureAttack" else {}
    y = failing.net.eval()(x).argmax(1)
    failing.train()
    expected = ATTACKS[name](failing, **layer)(x, y)
    failing.k, failing.calls = int(share * failing.calls), 0
    before, around = state(failing), surroundings()
    attack = ATTACKS[name](failing, **layer)
    with pytest.raises(KeyboardInterrupt):
        attack(x, y)
    assert state(failing) == before
    assert surroundings() == around
    failing.k = -1
    assert torch.equal(attack(x, y), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", ATTACKS)
def test_contexts_change_nothing(name, context):
    x, y = batch()
    net = cnn(dropout=0.0).eval()
    expected = ATTACKS[name](net)(x, y)
    with context():
        adv = ATTACKS[name](net)(x.clone(), y.clone())
    assert torch.equal(adv, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ATTACKS)
def test_other_types(name, dtype):
    x, y = batch(dtype=dtype)
    net = linear().to(dtype) if name != "FeatureAttack" else cnn(dropout=0.0).eval().to(dtype)
    attack = ATTACKS[name](net)
    adv = attack(x, y)
    assert adv.dtype == dtype
    assert adv.isfinite().all()
    assert ((adv >= 0) & (adv <= 1)).all()
    if attack.norm == "linf":
        assert ((adv.double() - x.double()).abs() <= attack.eps * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_samples_are_on_their_own(name):
    x, y = batch(6, dtype=torch.float64)
    net = cnn(dropout=0.0).eval().double()
    whole = ATTACKS[name](net, seed=3)(x, y)
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    for rows in order.split([1, 2, 3]):
        part = ATTACKS[name](net, seed=3)(x[rows], y[rows], samples=rows)
        assert torch.allclose(part, whole[rows], atol=1e-6), rows


@pytest.mark.parametrize("name", ATTACKS)
def test_none_one_and_no_labels(name):
    net = cnn(dropout=0.0).eval()
    attack = ATTACKS[name](net)
    x, _ = batch(1)
    assert attack(x[:0]).shape == (0, 3, 8, 8)
    assert attack.info.success.shape == (0,)
    adv = attack(x)
    ball(attack, adv, x)
    assert torch.equal(attack.info.success, net(adv).argmax(1) != net(x).argmax(1))


@pytest.mark.parametrize("name", ATTACKS)
def test_every_engine_runs_it(name, way):
    """The first call is eager, the second sets up, the third reuses, with another batch in between."""
    if ("twin" in way and name == "FeatureAttack") or ("precision" in way and name in MOVED_BY_THE_LAST_BITS):
        pytest.skip("has no twin, or is decided by the last bits")
    if way.get("engine") == "auto" and name not in ("APGD linf", "FMN linf", "Square linf", "DeepFool l2"):
        pytest.skip("which takes one of the others")
    x, _ = batch()
    net = cnn(dropout=0.0)
    y = net.eval()(x).argmax(1)
    net.train()
    expected = ATTACKS[name](net)
    image = expected(x, y)
    before, around = state(net), surroundings()
    attack = ATTACKS[name](net, **way)
    for _ in range(3):
        adv = attack(x, y)
        ball(attack, adv, x)
        assert torch.equal(attack.info.success, net.eval()(adv).argmax(1) != y)
        net.train()
        if way in ({}, {"engine": "graph"}, {"memory": "signs"}):
            assert torch.equal(adv, image)
        elif "precision" not in way and name not in MOVED_BY_THE_LAST_BITS:
            assert (attack.info.success == expected.info.success).float().mean() >= 5 / 6
        attack(x.flip(0)[:4], y.flip(0)[:4])
    assert state(net) == before
    assert surroundings() == around


@pytest.mark.parametrize("name", ATTACKS)
def test_bad_input_is_refused_before_any_work(name):
    x, y = batch()
    net = nn.Sequential(cnn(dropout=0.0))
    attack = ATTACKS[name](net, **({"layer": "0.0"} if name == "FeatureAttack" else {}))
    calls = []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    for arguments, message in [
        ((x * 255, y), r"x must lie in bounds \(0, 1\)"),
        (((x * 255).byte(), y), "x must be a floating tensor"),
        ((x, y[:3]), r"y must be integer labels \[6\]"),
        ((x, torch.rand(6, 10)), "y must be integer labels"),
        ((x, y, torch.arange(5)), r"samples must be int64 \[6\]"),
        ((x.clone().fill_(math.nan), y), "x must not contain NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            attack(*arguments)
    assert not calls
    with pytest.raises(ValueError, match=r"y must be labels in \[0, 10\)"):
        attack(x, y + 10)
    for wrong in ({"eps": -1.0}, {"norm": "l7"}, {"seed": 0.5}, {"engine": "fast"}, {"precision": "int8"}, {"bounds": (1, 0)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            ATTACKS[name](net, **wrong)
    if inspect.signature(type(attack)).parameters["eps"].default is not None:
        with pytest.raises(ValueError, match=r"eps must be a finite number >= 0 .* got None"):
            ATTACKS[name](net, eps=None)
