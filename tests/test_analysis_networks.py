"""What analyses say of networks is what is known of linear ones, and leaves them as they were."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import cnn, one_thread, seed, seeded, state, surroundings  # noqa: F401 - one_thread is a fixture
from torch import Tensor, nn

import fastadv
from fastadv import analysis, demo
from fastadv.analysis import capacity
from fastadv.analysis.landscape import random_direction

N, SIDE, EPS = 6, 5, 0.1
UNBOUNDED = {"bounds": None}


@seeded
def linear() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 2)).double()


def images(n: int = N) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 1, SIDE, SIDE, generator=seed(1), dtype=torch.float64), torch.arange(n) % 2


def difference(weights: Tensor, y: Tensor) -> Tensor:
    """[N, D], the weights of the other class minus those of the label: the gradient of the log-odds against it."""
    return weights[1 - y] - weights[y]


def worst(weights: Tensor, bias: Tensor, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """[N], the largest cross-entropy in the linf ball around each image."""
    d = difference(weights, y)
    return F.softplus((d * x.flatten(1)).sum(1) + bias[1 - y] - bias[y] + eps * d.abs().sum(1))


# ---------------------------------------------------------------------------------------------------- weights


def landscape(model: nn.Module, **changes) -> analysis.WeightLandscape:
    settings = {"directions": 2, "points": 5, "width": 2.0, "within": 1.0} | UNBOUNDED | changes
    return analysis.weight_landscape(model, *images(), EPS, **settings)


def test_the_landscape_of_a_linear_model_is_the_closed_form():
    model, (x, y) = linear(), images()
    found = landscape(model)
    generator = seed(0)
    assert found.alphas.tolist() == [-2, -1, 0, 1, 2]
    for curve in found.losses["model"]:
        (direction,) = random_direction(model, generator).values()
        expected = [
            worst(model[1].weight + alpha * direction, model[1].bias, x, y, EPS).mean().item() for alpha in found.alphas
        ]
        torch.testing.assert_close(curve.tolist(), expected, rtol=1e-6, atol=0)
    losses = found.losses["model"]
    assert found.sharpness["model"] == pytest.approx(float(losses[:, [1, 3]].mean() - losses[0, 2]))


def test_images_made_before_are_too_weak_for_other_weights():
    """At alpha = -2 against +2 the worst corner of the ball is another one."""
    anew, before = landscape(linear()), landscape(linear(), pregenerated=True)
    gap = anew.losses["model"] - before.losses["model"]
    assert torch.all(gap >= -1e-6)
    assert torch.all(gap[:, 2].abs() < 1e-6)
    assert torch.all(gap[:, [0, 4]] > 1e-3)
    assert "made once" in str(before)
    assert "made anew" in str(anew)


@pytest.mark.parametrize(("normalisation", "over"), [("filter", (1, 2, 3)), ("layer", (0, 1, 2, 3))])
def test_directions_are_as_long_as_the_weights(normalisation, over):
    model = cnn()
    direction = random_direction(model, seed(), normalisation)
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    assert direction.keys() == weights.keys()  # no biases, no batch norms
    for name, p in weights.items():
        lengths = (torch.linalg.vector_norm(t, dim=over[: len(over) - 4 + p.dim()]) for t in (direction[name], p.detach()))
        torch.testing.assert_close(*lengths)
        assert not torch.allclose(direction[name], p)


def test_scaling_a_filter_scales_its_direction():
    model = linear()
    before = random_direction(model, seed())["1.weight"]
    with torch.no_grad():
        model[1].weight[1] *= 100
    scale = torch.tensor([[1.0], [100.0]], dtype=torch.float64)
    torch.testing.assert_close(random_direction(model, seed())["1.weight"], scale * before)


def test_the_plane_crosses_the_weights_and_both_directions():
    model, (x, y) = linear(), images()
    found = analysis.weight_plane(model, x, y, EPS, points=3, **UNBOUNDED)
    generator = seed(0)
    first, second = (random_direction(model, generator)["1.weight"] for _ in range(2))
    for i, a in enumerate((-1, 0, 1)):
        for j, b in enumerate((-1, 0, 1)):
            weights = model[1].weight + a * first + b * second
            assert float(found.losses["model"][i, j]) == pytest.approx(
                worst(weights, model[1].bias, x, y, EPS).mean().item(), rel=1e-6
            )


def test_the_gap_is_between_training_and_other_images():
    """All training images have the label that the model reads, half of the others."""
    model, (x, _) = linear(), images()
    read = model(x).argmax(1)
    half = torch.where(torch.arange(N) % 2 == 0, read, 1 - read)
    found = analysis.weight_landscape({"a": model}, x, half, 0.0, directions=1, points=3, within=1.0, training=(x, read))
    assert (found.training_accuracy, found.robust_accuracy, found.gap) == ({"a": 1.0}, {"a": 0.5}, {"a": 0.5})
    assert "a gap of 50.0 points" in str(found)


def test_what_is_compiled_is_moved_too():
    losses = landscape(linear()).losses["model"]
    assert torch.equal(landscape(torch.compile(linear())).losses["model"], losses)


def test_a_flat_landscape_is_called_the_flattest():
    flat = linear()
    with torch.no_grad():
        flat[1].weight *= 0.01
    found = analysis.weight_landscape({"steep": linear(), "flat": flat}, *images(), EPS, directions=1, points=3, within=1.0)
    assert 0 < found.sharpness["flat"] < found.sharpness["steep"]
    assert str(found).endswith("The flattest is flat.")


# ----------------------------------------------------------------------------------------------------- inputs


def test_the_input_gradient_of_a_linear_model_is_its_weights():
    model, (x, y) = linear(), images()
    found = analysis.input_gradients(model, x, y)
    expected = difference(model[1].weight.detach(), y)
    torch.testing.assert_close(found.gradients["model"].flatten(1), expected)
    cosine = F.cosine_similarity(expected, x.flatten(1)).abs().mean()
    assert found.alignment["model"] == pytest.approx(float(cosine))


def test_pictures_of_gradients_are_cut_off_at_three_sigma():
    g = torch.zeros(1, 1, 10, 10)
    g[..., 0, 0], g[..., 0, 1] = 1.0, -0.1
    sigma = float(g.std(correction=0))
    finding = analysis.InputGradients(g.abs(), torch.tensor([0]), {"a": g}, {"a": 0.0})
    shown = finding.figure().axes[1].images[0].get_array()
    assert shown[0, 0] == 1.0
    assert shown[0, 1] == pytest.approx(0.5 - 0.5 * 0.1 / (3 * sigma), abs=1e-6)
    assert shown[5, 5] == 0.5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_large_eps_examples_of_a_linear_model_go_as_far_as_they_may(norm):
    model, (x, y) = linear(), images()
    found = analysis.large_eps_examples({"a": model}, x, y, 2.0, norm, None, steps=10)
    d, moved = difference(model[1].weight.detach(), y), (found.x_adv["a"] - x).flatten(1)
    if norm == "linf":
        torch.testing.assert_close(moved, 2.0 * d.sign())
    else:  # steps of 5 in all bring it close to the best direction, from any start
        torch.testing.assert_close(moved.norm(dim=1), torch.full_like(moved[:, 0], 2.0))
        assert torch.all(F.cosine_similarity(moved, d) > 0.97)
    probability = model(found.x_adv["a"]).softmax(1)
    torch.testing.assert_close(found.confidence["a"], probability.amax(1).detach())
    assert torch.equal(found.predicted["a"], probability.argmax(1))


def test_interpolations_lead_from_the_image_to_the_adversarial_one():
    model, (x, y) = linear(), images()
    found = analysis.class_interpolations(model, x, y, 2.0, "linf", None, points=5, steps=10, samples=N)
    assert found.t.tolist() == [0, 0.25, 0.5, 0.75, 1]
    for k, t in enumerate(found.t):
        way = x + t * (found.x_adv["model"] - x)
        torch.testing.assert_close(found.probabilities["model"][:, k], model(way).softmax(1).detach())
    # Log-odds are affine on the way, from where they start to the worst of the ball.
    weights, bias = model[1].weight.detach(), model[1].bias.detach()
    start, end = (worst(weights, bias, x, y, eps).expm1().log() for eps in (0.0, 2.0))
    first = (-start / (end - start)).clamp(min=0)
    expected = torch.where(end > 0, (first * 4).ceil() / 4, math.inf)
    assert torch.equal(found.crossing["model"].double(), expected)


def test_the_log_odds_of_a_linear_model_are_affine_on_the_surface():
    model, (x, y) = linear(), images()
    found = analysis.loss_surface(model, x, y, EPS, points=5, samples=N)
    odds = found.losses["model"].expm1().log()
    d = difference(model[1].weight.detach(), y)
    start = worst(model[1].weight.detach(), model[1].bias.detach(), x, y, 0.0).expm1().log()
    torch.testing.assert_close(odds[:, 2, 2], start)
    along = start[:, None] + found.distances * d.abs().sum(1)[:, None]
    torch.testing.assert_close(odds[:, :, 2], along)
    across = (odds[:, 2, 4] - start)[:, None, None]
    assert torch.all(across.abs().flatten() < EPS * d.abs().sum(1))
    torch.testing.assert_close(odds, along[:, :, None] + across * torch.linspace(-1, 1, 5, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------- attacks


def test_all_starts_on_a_linear_model_end_at_the_same_loss():
    model, (x, y) = linear(), images()
    found = analysis.pgd_convergence(model, x, y, EPS, bounds=None, steps=10, restarts=7, samples=N)
    losses = found.losses["model"]
    assert losses.shape == (N, 7, 11)
    torch.testing.assert_close(losses[:, 0, -1], worst(model[1].weight, model[1].bias, x, y, EPS).detach())
    assert torch.all(found.spread["model"] < 1e-12)
    assert torch.all(losses[..., 0].std(1) > 1e-4)  # they start apart
    assert torch.all(losses.diff(dim=2) > -1e-12)


def test_starts_do_not_depend_on_the_batch_size():
    first, second = (
        analysis.pgd_convergence(linear(), *images(), EPS, steps=3, restarts=4, batch_size=size) for size in (256, 3)
    )
    torch.testing.assert_close(first.losses["model"], second.losses["model"])


def test_accuracy_against_eps_is_that_of_each_model():
    models = {"a": linear(), "b": linear(seed=1)}
    found = analysis.accuracy_against_eps(models, *images(), EPS)
    for name, model in models.items():
        assert found.curves[name] == fastadv.evaluation.robustness_curves(model, *images(), EPS)
    assert "chance is 50.0%" in str(found)


# --------------------------------------------------------------------------------------------------- capacity


def test_the_sweep_trains_each_width_twice(monkeypatch):
    digits = demo.Digits(torch.rand(60, 1, 28, 28), torch.arange(60) % 10, torch.rand(20, 1, 28, 28), torch.arange(20) % 10)
    monkeypatch.setattr(demo, "load_digits", lambda seed: digits)
    found = analysis.capacity_sweep([1, 2], epochs=1)
    # conv 2x2, conv 4x4, linear, linear of widths 1, 2, 6 and 2, 4, 12
    assert found.parameters == [5 + 34 + 98 * 6 + 6 + 70, 10 + 132 + 196 * 12 + 12 + 130]
    for accuracies in (found.clean, found.robust):
        assert {name: len(values) for name, values in accuracies.items()} == {"standard": 2, "PGD-AT": 2}
    assert all(r <= c for t in capacity.TRAININGS for r, c in zip(found.robust[t], found.clean[t], strict=True))
    assert found.figure().axes[0].get_xlabel() == "width"


# -------------------------------------------------------------------------------------------------- contracts

QUICK = {
    "weight_landscape": {"eps": 0.1, "directions": 1, "points": 3, "within": 1.0, "steps": 2},
    "weight_plane": {"eps": 0.1, "points": 3, "steps": 2},
    "input_gradients": {},
    "large_eps_examples": {"eps": 1.0, "steps": 2},
    "class_interpolations": {"eps": 1.0, "steps": 2, "points": 2},
    "loss_surface": {"eps": 0.1, "points": 3},
    "pgd_convergence": {"eps": 0.1, "steps": 2, "restarts": 2},
    "accuracy_against_eps": {"eps": 0.01, "samples": 4},
}


class Failing(nn.Module):
    """Raises in the forward pass of this number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.model, self.left = cnn(), number

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise RuntimeError("as told")
        return self.model(x)


def colour_images() -> tuple[Tensor, Tensor]:
    return torch.rand(4, 3, 8, 8, generator=seed(2)), torch.arange(4)


@pytest.mark.parametrize("name", QUICK)
def test_the_model_is_left_as_it_was(name):
    model = cnn().train()
    model[0].eval()
    before, around = state(model), surroundings()
    found = getattr(analysis, name)({"first": model, "second": cnn(seed=1)}, *colour_images(), **QUICK[name])
    assert (state(model), surroundings()) == (before, around)
    figure = found.figure()
    figure.draw_without_rendering()
    assert "first" in str(found)
    assert any(axis.has_data() for axis in figure.axes)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("number", [1, 3])
def test_also_on_an_exception(name, number):
    model = Failing(number)
    before = state(model)
    if name == "input_gradients" and number > 1:
        pytest.skip("asks the model once")
    with pytest.raises(RuntimeError, match="as told"):
        getattr(analysis, name)(model, *colour_images(), **QUICK[name])
    assert state(model) == before


def flat(x: Tensor) -> Tensor:
    return torch.zeros(len(x), 2)


X, Y = images()
BAD = {
    "no module": (lambda: analysis.weight_landscape(F.relu, X, Y, 0.1), r"models\['model'\] must be an nn.Module.*function"),
    "no model": (lambda: analysis.loss_surface({}, X, Y, 0.1), "models must be a model, or some by name"),
    "not callable": (lambda: analysis.loss_surface({"a": 3}, X, Y, 0.1), r"models\['a'\] must be callable"),
    "even points": (lambda: analysis.weight_plane(linear(), X, Y, 0.1, points=4), "points must be odd.*got 4"),
    "width": (lambda: analysis.weight_plane(linear(), X, Y, 0.1, width=0), "width must be a finite number > 0; got 0"),
    "within": (lambda: analysis.weight_landscape(linear(), X, Y, 0.1, within=0.01), "within must reach.*0.2; got 0.01"),
    "normalisation": (
        lambda: analysis.weight_landscape(linear(), X, Y, 0.1, normalisation="filters"),
        "normalisation must be one of 'filter', 'layer'.*did you mean 'filter'",
    ),
    "no weights": (
        lambda: analysis.weight_landscape(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(25).double()), X, Y, 0.1),
        "no weights to move",
    ),
    "norm": (lambda: analysis.pgd_convergence(linear(), X, Y, 0.1, "linf2"), "norm must be one of 'linf'"),
    "eps": (lambda: analysis.large_eps_examples(linear(), X, Y, -1.0), "eps must be a finite number >= 0; got -1.0"),
    "no room": (lambda: analysis.loss_surface(linear(), X, Y, 0.0), "eps must be a finite number > 0; got 0.0"),
    "outside": (lambda: analysis.pgd_convergence(linear(), 2 * X, Y, 0.1), r"x must lie in bounds \(0, 1\)"),
    "soft": (lambda: analysis.input_gradients(linear(), X, torch.rand(N, 2)), "y must be integer labels"),
    "none": (lambda: analysis.input_gradients(linear(), X[:0], Y[:0]), "at least one sample"),
    "samples": (lambda: analysis.input_gradients(linear(), X, Y, samples=0), "samples must be an integer >= 1; got 0"),
    "one point": (lambda: analysis.class_interpolations(linear(), X, Y, 1.0, points=1), "points must be an integer >= 2"),
    "no gradient": (lambda: analysis.input_gradients({"a": flat}, X, Y), r"models\['a'\] has no gradient at its input"),
    "restarts": (lambda: analysis.pgd_convergence(linear(), X, Y, 0.1, restarts=0), "restarts must be an integer >= 1"),
    "no width": (lambda: analysis.capacity_sweep([]), "widths must hold one at least"),
    "width 0": (lambda: analysis.capacity_sweep([0]), "widths must be an integer >= 1; got 0"),
    "no picture": (
        lambda: analysis.input_gradients(nn.Linear(4, 2), torch.rand(3, 4), Y[:3]).figure(),
        r"only images \[N, 1 or 3, H, W\] can be drawn; x is \[3, 4\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
