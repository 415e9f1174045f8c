"""Bad input is refused at the door: which argument, which value, what was expected; and nothing has happened yet."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import Answers, batch, cnn, linear, one_thread, state, surroundings  # noqa: F401

import fastadv

NAN, INF = math.nan, math.inf
X, Y = batch()
ON_CUDA = SimpleNamespace(device=torch.device("cuda", 0))  # a generator that a CPU-only machine can have


def ce(logits, y):
    return F.cross_entropy(logits, y, reduction="none")


def with_value(value, at=(2, 1, 0, 0)):
    x = X.clone()
    x[at] = value
    return x


def label(value, dtype=torch.int64):
    y = Y.to(dtype, copy=True)
    y[3] = value
    return y


# Refused when the attack object is made. (arguments, words of the message)
SETTINGS = [
    ({"eps": -0.1}, ["eps", "-0.1", ">= 0"]),
    ({"eps": NAN}, ["eps", "nan", "finite"]),
    ({"eps": INF}, ["eps", "inf", "finite"]),
    ({"eps": True}, ["eps", "True", "number"]),
    ({"eps": "8/255"}, ["eps", "'8/255'", "number"]),
    ({"eps": None}, ["eps", "None", "number"]),
    ({"eps": [0.1] * 6}, ["eps", "[0.1", "tensor"]),
    ({"eps": torch.tensor([0.1, -0.1])}, ["eps", "-0.1", ">= 0"]),
    ({"eps": torch.tensor(NAN)}, ["eps", "nan", "finite"]),
    ({"eps": torch.tensor(True)}, ["eps", "True"]),
    ({"eps": torch.tensor(1j)}, ["eps", "j"]),
    ({"alpha": -0.1}, ["alpha", "-0.1", ">= 0"]),
    ({"alpha": NAN}, ["alpha", "nan", "finite"]),
    ({"alpha": INF}, ["alpha", "inf", "finite"]),
    ({"alpha": False}, ["alpha", "False", "number"]),
    ({"alpha": "2/255"}, ["alpha", "'2/255'", "number"]),
    ({"alpha": torch.tensor([INF])}, ["alpha", "inf", "finite"]),
    ({"steps": 0}, ["steps", "0", ">= 1"]),
    ({"steps": -1}, ["steps", "-1", ">= 1"]),
    ({"steps": 1.5}, ["steps", "1.5", "integer"]),
    ({"steps": True}, ["steps", "True", "integer"]),
    ({"steps": "10"}, ["steps", "'10'", "integer"]),
    ({"restarts": 0}, ["restarts", "0", ">= 1"]),
    ({"restarts": 2.0}, ["restarts", "2.0", "integer"]),
    ({"bounds": ()}, ["bounds", "()", "(lo, hi)"]),
    ({"bounds": (0, 0)}, ["bounds", "(0, 0)", "lo < hi"]),
    ({"bounds": (1, 0)}, ["bounds", "(1, 0)", "lo < hi"]),
    ({"bounds": (0, NAN)}, ["bounds", "nan", "lo < hi"]),
    ({"bounds": (0, 1, 2)}, ["bounds", "(0, 1, 2)", "pair"]),
    ({"bounds": 1.0}, ["bounds", "1.0", "pair"]),
    ({"bounds": ("a", "b")}, ["bounds", "'a'", "numbers"]),
    ({"bounds": (torch.zeros(3), torch.ones(3))}, ["bounds", "tensor", "numbers"]),  # a bound for each channel
    ({"norm": "linfty"}, ["norm", "'linfty'", "'linf', 'l2', 'l1'"]),
    ({"norm": 2}, ["norm", "2", "'linf', 'l2', 'l1'"]),
    ({"loss": "cw"}, ["loss", "'cw'", "'ce'", "'margin'", "'dlr'", "'kl'", "'se'"]),
    ({"loss": None}, ["loss", "None", "'ce'"]),
    ({"init": "random"}, ["init", "'random'", "'uniform', 'normal', 'zero'"]),
    ({"init": 0}, ["init", "0", "'zero'"]),
    ({"bn": "frozen"}, ["bn", "'frozen'", "'eval', 'batch', 'train'"]),
    ({"loss": "kl", "init": "zero"}, ["init", "'zero'", "'kl'", "gradient is zero", "'normal'"]),
    ({"loss": "se", "init": "zero"}, ["init", "'zero'", "'se'"]),
    ({"loss": "kl", "targeted": True}, ["targeted", "'kl'", "labels"]),
    ({"generator": 0}, ["generator", "int", "torch.Generator"]),
    ({"model": None}, ["model", "callable", "NoneType"]),
    ({"model": "resnet18"}, ["model", "callable", "str"]),
]

# Refused when the attack is called, before the model is.
BATCHES = [
    ({"x": X.tolist()}, ["x", "list", "floating tensor"]),
    ({"x": X.numpy()}, ["x", "ndarray", "floating tensor"]),
    ({"x": (255 * X).byte()}, ["x", "uint8", "float() / 255"]),
    ({"x": X.long()}, ["x", "int64", "floating"]),
    ({"x": X > 0.5}, ["x", "bool", "floating"]),
    ({"x": torch.tensor(0.5)}, ["x", "[N, ...]", "[]"]),
    ({"x": torch.rand(6)}, ["x", "[N, ...]", "[6]"]),
    ({"x": with_value(NAN)}, ["x", "NaN"]),
    ({"x": with_value(NAN), "bounds": None}, ["x", "NaN"]),
    ({"x": with_value(INF), "bounds": None}, ["x", "inf"]),
    ({"x": with_value(INF)}, ["x", "(0, 1)", "inf"]),
    ({"x": with_value(1.25)}, ["x", "(0, 1)", "1.25", "0.25 outside", "bounds", "Normalize"]),
    ({"x": with_value(-0.5)}, ["x", "(0, 1)", "-0.5", "0.5 outside"]),
    ({"x": with_value(1.001)}, ["x", "0.001 outside"]),
    ({"x": 255 * X}, ["x", "(0, 1)", "outside"]),
    ({"bounds": (-1, 0.5)}, ["x", "(-1, 0.5)", "outside"]),
    ({"y": None}, ["y", "needed", "'ce'"]),
    ({"y": None, "loss": ce, "targeted": True}, ["y", "needed", "targeted=True"]),
    ({"y": Y.tolist()}, ["y", "list", "tensor"]),
    ({"y": Y.numpy()}, ["y", "ndarray", "tensor"]),
    ({"y": 3}, ["y", "int", "tensor"]),
    ({"y": Y[:5]}, ["y", "[5]", "[6]"]),
    ({"y": Y[:, None]}, ["y", "[6, 1]", "[6]"]),
    ({"y": Y[0]}, ["y", "[]", "[6]"]),
    ({"y": Y.float()}, ["y", "float32", "integer"]),
    ({"y": Y > 4}, ["y", "bool", "integer"]),
    ({"y": torch.rand(5, 10)}, ["y", "[5, 10]", "[6, C]"]),
    ({"y": Y.to("meta")}, ["y", "meta", "cpu"]),
    ({"y": F.one_hot(Y, 10).float(), "loss": "margin"}, ["y", "'margin'", "integer", "[6, 10]"]),
    ({"y": F.one_hot(Y, 10).float(), "loss": "dlr"}, ["y", "'dlr'", "integer", "[6, 10]"]),
    ({"model": cnn().to("meta")}, ["x", "cpu", "model", "meta"]),
    ({"eps": torch.full((5,), 0.1)}, ["eps", "[5]", "[6]"]),
    ({"eps": torch.full((6, 1, 1, 1), 0.1)}, ["eps", "[6, 1, 1, 1]", "[6]"]),
    ({"alpha": torch.full((2,), 0.1)}, ["alpha", "[2]", "[6]"]),
    ({"init": X[:5]}, ["init", "[5, 3, 8, 8]", "[6, 3, 8, 8]"]),
    ({"init": X[0]}, ["init", "[3, 8, 8]", "[6, 3, 8, 8]"]),
    ({"init": with_value(NAN)}, ["init", "NaN"]),
    ({"init": X.to("meta")}, ["init", "meta", "cpu"]),
    ({"generator": ON_CUDA}, ["generator", "cuda", "cpu"]),
]

# Known only from the model's first answer: refused after one forward pass and before any step.
ANSWERS = [
    ({"model": lambda z, x: z[:, 0]}, ["model", "[6, C]", "[6]"]),
    ({"model": lambda z, x: z[:, :, None]}, ["model", "[6, C]", "[6, 10, 1]"]),
    ({"model": lambda z, x: z[:3]}, ["model", "[6, C]", "[3, 10]"]),
    ({"model": lambda z, x: z[:, :1]}, ["model", "C >= 2", "[6, 1]"]),
    ({"model": lambda z, x: z.argmax(1)}, ["model", "floating", "int64"]),
    ({"model": lambda z, x: z.long()}, ["model", "floating", "int64"]),
    ({"model": lambda z, x: (z, x)}, ["model", "tensor", "tuple"]),
    ({"model": lambda z, x: {"logits": z}}, ["model", "tensor", "dict"]),
    ({"model": lambda z, x: None}, ["model", "tensor", "NoneType"]),
    ({"model": lambda z, x: z.detach()}, ["model", "depend on x", "detach"]),
    ({"model": lambda z, x: torch.ones(6, 10)}, ["model", "depend on x"]),
    ({"model": lambda z, x: torch.ones(6, 10, requires_grad=True) * 2}, ["model", "depend on x"]),  # but on something
    ({"model": lambda z, x: torch.tensor(z.detach().numpy())}, ["model", "depend on x", "numpy"]),
    ({"y": label(10)}, ["y", "[0, 10)", "10"]),
    ({"y": label(-1)}, ["y", "[0, 10)", "-1"]),
    ({"y": label(-100)}, ["y", "[0, 10)", "-100"]),  # torch's ignore_index
    ({"y": label(200, torch.uint8)}, ["y", "[0, 10)", "200"]),
    ({"y": torch.rand(6, 9)}, ["y", "[6, 10]", "[6, 9]"]),
    ({"loss": lambda z, y: ce(z, y).mean()}, ["loss", "per-sample", "[6]", "[]"]),
    ({"loss": lambda z, y: z}, ["loss", "per-sample", "[6]", "[6, 10]"]),
    ({"loss": lambda z, y: ce(z.detach(), y)}, ["loss", "depend on logits"]),
    ({"loss": lambda z, y: ce(z.detach() * torch.ones(10, requires_grad=True), y)}, ["loss", "depend on logits"]),
    ({"loss": lambda z, y: 1.0}, ["loss", "per-sample", "float"]),
]


def identify(case):
    return " ".join(f"{k}={v}" if isinstance(v, (int, float, str)) else k for k, v in case.items())


def table(cases):
    return pytest.mark.parametrize(("arguments", "words"), [pytest.param(*c, id=identify(c[0])) for c in cases])


def refuse(attack, words, model):
    """ValueError with these words, and neither the model nor anything else was touched."""
    model.train()
    before = state(model)
    with pytest.raises(ValueError, match=r".") as refusal:
        attack()
    message = str(refusal.value)
    assert [w for w in words if w not in message] == [], message
    assert re.search("must|need|does not|starts|move", message), f"{message!r} does not say what was expected"
    assert len(message) < 600, "a message is not a dump of tensors"
    assert state(model) == before


@table(SETTINGS)
def test_settings_are_refused_at_once(arguments, words):
    model = Answers(lambda z, x: z)
    around = surroundings()
    refuse(lambda: fastadv.PGD(**{"model": model, "eps": 0.1, **arguments}), words, model)
    assert surroundings() == around


@table([*SETTINGS, *BATCHES])
def test_calls_are_refused_before_the_model_runs(arguments, words):
    model = Answers(lambda z, x: z)
    around = surroundings()
    refuse(lambda: fastadv.pgd(**{"model": model, "x": X, "y": Y, "eps": 0.1, **arguments}), words, model)
    assert model.calls == 0
    assert surroundings() == around


@table(ANSWERS)
def test_answers_are_refused_before_anything_moves(arguments, words):
    model = Answers(arguments.get("model", lambda z, x: z))
    refuse(lambda: fastadv.pgd(**{"x": X, "y": Y, "eps": 0.1, **arguments, "model": model}), words, model)
    assert model.calls <= 1


@table(
    [
        ({"eps": -1}, ["eps", "-1"]),
        ({"alpha": NAN}, ["alpha", "nan"]),
        ({"norm": "l3"}, ["norm", "'l3'"]),
        ({"x": 255 * X}, ["x", "outside"]),
        ({"loss": "kl"}, ["init", "'zero'", "'kl'"]),
    ]
)
def test_fgsm_refuses_the_same(arguments, words):
    model = Answers(lambda z, x: z)
    refuse(lambda: fastadv.fgsm(**{"model": model, "x": X, "y": Y, "eps": 0.1, **arguments}), words, model)
    assert model.calls == 0


@pytest.mark.parametrize("name", ["eps", "alpha"])
def test_reassigned_sizes_are_checked_again(name):
    attack = fastadv.PGD(linear(), 0.1)
    setattr(attack, name, NAN)
    with pytest.raises(ValueError, match=f"{name} .*nan"):
        attack(X, Y)


@pytest.mark.parametrize(
    ("values", "bounds", "accepted"),
    [
        ((-3e-8, 1 + 5e-7), (0, 1), True),  # what x / 255 * 255 and normalising back and forth leave
        ((0, 1 + 5e-6), (0, 1), False),
        ((-5e-6, 1), (0, 1), False),
        ((0, 255 + 1e-4), (0, 255), True),  # in proportion to the range
        ((0, 255 + 1e-3), (0, 255), False),
        ((-3e8, 3e8), None, True),
    ],
)
def test_rounding_at_the_bounds_is_accepted(values, bounds, accepted):
    x = with_value(values[0])
    x[0, 0, 0, 0] = values[1]
    if accepted:
        adv = fastadv.pgd(linear(), x, Y, 0.1, bounds=bounds)
        lo, hi = bounds or (-INF, INF)
        assert adv.min() >= lo
        assert adv.max() <= hi
    else:
        with pytest.raises(ValueError, match="outside"):
            fastadv.pgd(linear(), x, Y, 0.1, bounds=bounds)


def test_numbers_of_numpy_are_numbers():
    """What configuration files and sweeps produce."""
    attack = fastadv.PGD(linear(), np.float32(0.1), np.float64(0.01), np.int64(3), init="zero", bounds=np.array([0.0, 1.0]))
    torch.testing.assert_close(attack(X, Y), fastadv.pgd(linear(), X, Y, 0.1, 0.01, 3, init="zero"))
