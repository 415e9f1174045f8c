"""Every method of ``fastadv demo --method`` learns to be robust: a few steps on real digits lower the robust loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import one_thread  # noqa: F401 - a fixture
from torch import Tensor, nn

from fastadv import AWP, PGD, cli, demo
from fastadv.methods import METHODS

EPS = 0.1


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = demo.load_digits(seed=0)
    return data.x_train[:20], data.y_train[:20]


def robust_loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Cross-entropy on PGD-10 images, from the same random start each time."""
    x_adv = PGD(model, EPS, steps=10, generator=torch.Generator().manual_seed(0))(x, y)
    with torch.no_grad():
        return float(F.cross_entropy(model(x_adv), y))


@pytest.mark.parametrize(("name", "gamma"), [*((name, 0.0) for name in METHODS), ("pgd-at", 0.005), ("gkl", 0.005)])
def test_a_few_steps_lower_the_robust_loss(name, gamma, digits):
    x, y = digits
    method, model, generator = METHODS[name], demo.small_cnn(0, METHODS[name].head), torch.Generator().manual_seed(0)
    objective = method.objective(lambda **settings: PGD(model, 0.0, **{"steps": 4, "generator": generator, **settings}))
    demo.set_eps(objective, model, EPS, method.alpha)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    hidden = torch.arange(len(y)) >= method.labelled * len(y)
    batch = x.repeat(method.views, 1, 1, 1), y.masked_fill(hidden, -1).repeat(method.views)
    x, y = x[~hidden], y[~hidden]
    before = robust_loss(model, x, y)
    for _ in range(30):
        demo.train_step(objective, AWP(model, gamma) if gamma else None, model, optimizer, *batch, method.clip)
    assert robust_loss(model, x, y) < 0.75 * before


@pytest.mark.parametrize("name", ["pgd-at", "free"])
def test_a_step_is_as_long_as_the_clipped_gradient(name, digits):
    method, model = METHODS[name], demo.small_cnn()
    objective = method.objective(lambda **settings: PGD(model, EPS, steps=1, **settings))
    before = [p.detach().clone() for p in model.parameters()]
    demo.train_step(objective, None, model, torch.optim.SGD(model.parameters(), lr=1.0), *digits, clip=1e-3)
    moved = math.sqrt(sum(float((p - start).square().sum()) for p, start in zip(model.parameters(), before, strict=True)))
    steps = 4 if name == "free" else 1
    assert 0 < moved <= steps * 1.001e-3


@pytest.mark.parametrize("name", METHODS)
def test_training_depends_on_the_seed_alone(name, digits):
    x, y = digits
    few = demo.Digits(x, y, x[:10], y[:10])

    def train() -> dict[str, Tensor]:
        torch.rand(7)  # the global generator is somewhere else each time
        model = demo.small_cnn(3, METHODS[name].head)
        demo.train_robust(model, few, 1, 3, [], [], METHODS[name])
        return model.state_dict()

    first, second = train(), train()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_training_ends_with_the_average_of_its_second_half(digits, monkeypatch):
    seen = []

    class Watched(demo.EMA):
        def update(self, step=None):
            super().update(step)
            alike = all(torch.equal(a, b) for a, b in zip(self.module.parameters(), self.model.parameters(), strict=True))
            seen.append((alike, self.module))

    monkeypatch.setattr(demo, "EMA", Watched)
    monkeypatch.setattr(demo, "BATCH", 5)
    x, y = digits
    model = demo.small_cnn(3)
    demo.train_robust(model, demo.Digits(x[:20], y[:20], x[:10], y[:10]), 1, 3, [])
    assert [alike for alike, _ in seen] == [True, False, False, False]  # a copy while eps grows
    average = seen[-1][1]
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), model.parameters(), strict=True))


def test_the_command_line_knows_every_method(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(demo, "run", lambda *arguments: asked.append(arguments) or 0)
    for name in METHODS:
        assert cli.main(["demo", "--method", name, "--awp", "0.005"]) == 0
    assert asked == [("fastadv-demo", False, 0, name, 0.005) for name in METHODS]
    with pytest.raises(SystemExit):
        cli.main(["demo", "--method", "hope"])
    assert "invalid choice: 'hope' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "hope"}, "method must be one of 'pgd-at'"),
        ({"gamma": -1.0}, "gamma must be a finite number >= 0"),
        ({"method": "free", "gamma": 0.005}, "gamma must be 0 with method='free'"),
    ],
)
def test_bad_arguments_fail_before_any_work(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        demo.run(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_another_method_is_named_in_the_report_and_times_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "WATCHED", 10)
    findings = demo.Findings(0, "trades", 0.005)
    demo.experiment(findings, quick=True, folder=tmp_path)
    assert findings.complete
    assert not findings.rounds
    assert "trades with AWP (gamma 0.005)" in demo.build_report(findings).html()
