"""Sanity checks of an evaluation: each alarm rings for what it is there for, and none for an honest model."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace

import pytest
import torch
from models import FailsAt, cnn, digits, linear, one_thread, state, surroundings, trained_lenet  # noqa: F401
from torch import nn
from torch.autograd import grad

from fastadv.evaluation import CHECKLIST, alarms, planted, sanity_checks
from fastadv.evaluation.probes import Probe, inside, surface

EPS = 0.15  # of digits in [0, 1]

pytestmark = pytest.mark.usefixtures("quick_alarms")


class Fronted(nn.Module):
    """A model with something before or after it."""

    def __init__(self, net, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


class Purifying(nn.Module):
    """Moves its input towards what it is sure of before it answers: optimisation at inference."""

    def __init__(self, net, differentiate):
        super().__init__()
        self.net, self.differentiate = net, differentiate

    def forward(self, x):
        with torch.enable_grad():
            z = x.detach().clone().requires_grad_()
            gradient = self.differentiate(lambda z: self.net(z).logsumexp(1).sum(), z)
        return self.net(x + 0.01 * gradient.sign())


def by_grad(f, z):
    return grad(f(z), z)[0]  # a name of one's own, which replacing torch.autograd.grad would not reach


def by_backward(f, z):
    f(z).backward()
    return z.grad


def by_func(f, z):
    return torch.func.grad(f)(z)


def some_digits(n):
    x, y = digits()
    return x[1200 : 1200 + n], y[1200 : 1200 + n]


def ringing(found):
    return {a.name for a in found if a.rings}


def mask(*standing):
    return torch.tensor(standing, dtype=torch.bool)


def fraction(share, n=1000):
    """[n], that share of it True."""
    return torch.arange(n) < round(share * n)


# ---------------------------------------------------------------------------------------------- the report as a whole


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_honest_model_is_silent(norm):
    x, y = some_digits(40)
    found = sanity_checks(trained_lenet(), x, y, {"linf": EPS, "l2": 0.8, "l1": 4.0}[norm], norm, surrogate=linear(10, 64))
    assert ringing(found) == set()
    assert len({a.name for a in found}) == len(found) == 19
    assert next(a for a in found if a.name == "planted adversarial missed").numbers["planted"] >= 5


def test_scale_of_logits_is_seen_through():
    """Cross-entropy's own gradient is zero here. The attacks' is not, so their result is right, and silence too."""
    x, y = some_digits(40)
    assert ringing(sanity_checks(Fronted(trained_lenet(), after=lambda z: 1e4 * z), x, y, EPS)) == set()


NO_GRADIENT = {"unavailable gradients", "zero gradients", "loss does not rise", "unconstrained failure"}
FAILING = NO_GRADIENT | {"accuracy does not reach chance", "planted adversarial missed", "transfer beats white-box"}
WEAK = {  # attacks find by luck what they should find by gradients
    "random noise beats white-box", "more restarts still gain", "more steps still gain", "single-step beats iterative",
    "accuracy not monotone in eps", "incomplete optimisation", "unstable predictions",
}  # fmt: skip
MASKED = {  # the model, what must ring, what besides may
    "quantised": ({"before": lambda x: (8 * x).round() / 8}, FAILING, WEAK),
    "saturated": (
        {"before": lambda x: torch.sigmoid(3000 * (x - 0.47))},
        {"unavailable gradients", "zero gradients", "transfer beats white-box"},
        FAILING | WEAK,
    ),
    "random": (
        {"before": lambda x: x + 0.3 * torch.randn_like(x)},
        {"randomised model", "unstable predictions", "silent success", "transfer failure"},
        WEAK | {"transfer beats white-box", "unconstrained failure", "planted adversarial missed", "loss does not rise"},
    ),
    "probabilities": ({"after": lambda z: z.softmax(1)}, {"probabilities instead of logits"}, set()),
    "gradient of something else": (
        {"before": lambda x: (8 * x).round() / 8 + 1e-3 * (x.flip(-1) - x.flip(-1).detach())},
        {"transfer beats white-box", "planted adversarial missed"},
        FAILING | WEAK,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKED)
def test_masked_model_rings(kind):
    x, y = some_digits(40)
    fronts, must, may = MASKED[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = ringing(sanity_checks(Fronted(trained_lenet(), **fronts), x, y, EPS, surrogate=trained_lenet()))
    assert must <= found
    assert found <= must | may


def test_model_without_a_way_back_to_its_input():
    x, y = some_digits(10)
    found = sanity_checks(Fronted(trained_lenet(), before=torch.Tensor.detach), x, y, EPS)
    assert ringing(found) == {"unavailable gradients"}
    assert len(found) == 5


def test_nan_gradients_ring_without_a_warning():
    """0 * inf: of sqrt at 0."""
    x, y = some_digits(10)
    model = Fronted(trained_lenet(), before=lambda x: x + (0 * x).sqrt())
    assert "unavailable gradients" in ringing(sanity_checks(model, x, y, EPS))


@pytest.mark.parametrize("n", [0, 1, 5])
def test_few_samples(n):
    x, y = some_digits(n)
    assert len(sanity_checks(trained_lenet(), x, y, EPS)) == 18


def test_model_that_is_always_wrong():
    x, _ = some_digits(10)
    wrong = (trained_lenet()(x).argmax(1) + 1) % 10
    assert ringing(sanity_checks(trained_lenet(), x, wrong, EPS)) == set()


def test_untrained_model():
    x, y = some_digits(20)
    assert ringing(sanity_checks(cnn(classes=10, dropout=0.0), x.expand(-1, 3, -1, -1).contiguous(), y, EPS)) <= {
        "more restarts still gain"
    }


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_other_boxes_types_and_radii(classes):
    g = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(12, 30, generator=g, dtype=torch.float64) - 2
    model = linear(classes, 30).double()
    y = model(x).argmax(1)
    eps = torch.linspace(0.01, 0.5, 12)
    assert ringing(sanity_checks(model, x, y, eps, bounds=(-2, 2))) == set()
    unbounded = sanity_checks(model, x, y, eps, bounds=None)
    assert ringing(unbounded) == set()
    assert not {"unconstrained failure", "accuracy does not reach chance"} & {a.name for a in unbounded}


def test_results_do_not_depend_on_batches():
    x, y = some_digits(9)
    parts, whole = sanity_checks(trained_lenet(), x, y, EPS, batch_size=4), sanity_checks(trained_lenet(), x, y, EPS)
    for a, b in zip(parts, whole, strict=True):
        assert (a.name, a.rings) == (b.name, b.rings)
        assert a.numbers == pytest.approx(b.numbers, rel=1e-4)


def test_attacks_of_the_evaluation_are_what_is_compared_with():
    """Had they found nothing, twice the steps and restarts of PGD would gain."""
    x, y = some_digits(20)
    found = ringing(sanity_checks(trained_lenet(), x, y, 2 * EPS, standing=torch.ones(20, dtype=torch.bool)))
    assert {"more steps still gain", "more restarts still gain"} <= found
    assert ringing(sanity_checks(trained_lenet(), x, y, 2 * EPS, standing=torch.zeros(20, dtype=torch.bool))) == set()
    with pytest.raises(ValueError, match="standing must be bool"):
        sanity_checks(trained_lenet(), x, y, EPS, standing=y)


def test_samples_are_spread_evenly():
    """Data that is sorted by class is not looked at only in its first class."""
    x, y = some_digits(40)
    seen = []
    sanity_checks(lambda z: (seen.append(z), trained_lenet()(z))[1], x, y, 0.0, samples=4)
    assert torch.equal(seen[0], x[::10])


def test_report_is_plain_data():
    x, y = some_digits(10)
    found = sanity_checks(trained_lenet(), x, y, EPS)
    for alarm in found:
        assert json.loads(json.dumps(vars(alarm), allow_nan=False)) == vars(alarm)
        assert alarm.advice.endswith(".")
        assert alarm.name in str(alarm)
    stages = []
    sanity_checks(trained_lenet(), x, y, EPS, progress=stages.append)
    assert stages[0] == "the model"
    assert all(line.endswith(".") for line in CHECKLIST)


@pytest.mark.parametrize("fails_at", [None, 3, 8, 60])
def test_model_and_process_are_left_as_found(fails_at):
    x, y = some_digits(4)
    model = FailsAt(trained_lenet(), -1 if fails_at is None else fails_at)
    model.train()
    before, around = state(model), surroundings()
    run_backward = torch.autograd._engine_run_backward
    if fails_at is None:
        sanity_checks(model, x, y, EPS)
    else:
        with pytest.raises(RuntimeError, match="as the test asked"):
            sanity_checks(model, x, y, EPS)
    assert state(model) == before
    assert surroundings() == around
    assert torch.autograd._engine_run_backward is run_backward
    model.eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l0"}, "norm"), ({"eps": -1.0}, "eps"), ({"samples": 0}, "samples"), ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"), ({"bounds": (0, 0.5)}, "x must lie"), ({"y": torch.full((4,), 10)}, "labels in"),
        ({"y": torch.rand(4, 10)}, "integer labels"), ({"x": torch.zeros(4, dtype=torch.long)}, "floating"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    x, y = some_digits(4)
    with pytest.raises(ValueError, match=message):
        sanity_checks(**({"model": trained_lenet(), "x": x, "y": y, "eps": EPS} | change))


# ------------------------------------------------------------------------------------------------------ alarm by alarm


def test_randomised():
    z, y = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([1, 0])
    assert not alarms.randomised([z, z + 1e-5], y).rings
    assert not alarms.randomised([z, 2 * z], y).rings  # the same up to their length
    assert alarms.randomised([z, z, z + torch.tensor([0.0, 1e-3])], y).rings


def test_probabilities():
    p = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
    assert alarms.probabilities(p).rings
    assert not alarms.probabilities(p + 1e-3).rings
    assert not alarms.probabilities(torch.tensor([[-1.0, 2.0]])).rings


@pytest.mark.parametrize(
    ("gradient", "zero", "unavailable"),
    [
        ([[1.0, 0.0], [0.0, 2.0]], False, False),
        ([[1.0, 0.0], [0.0, 0.0]], True, True),
        ([[1.0, 0.0], [math.nan, 2.0]], False, True),
    ],
)
def test_zero_and_unavailable_gradients(gradient, zero, unavailable):
    assert alarms.zero_gradients(torch.tensor(gradient)).rings == zero
    assert alarms.unavailable_gradients(torch.tensor(gradient)).rings == unavailable
    assert alarms.unavailable_gradients(None).rings


def test_comparisons_are_per_sample():
    white_box, other = mask(1, 1, 0, 0), mask(0, 0, 1, 1)
    assert not alarms.still_gains("steps", white_box, mask(1, 0, 0, 0)).rings  # one sample is luck
    assert alarms.beats_white_box("transfer", white_box, ~other).numbers["fraction fooled by transfer only"] == 0.5
    assert not alarms.beats_white_box("transfer", white_box, ~white_box).rings
    assert alarms.beats_white_box("transfer", white_box, ~other).rings  # though both leave half standing
    assert alarms.still_gains("steps", white_box, other).numbers["drop"] == 0.5


def test_what_square_finds_gradients_may_find_with_as_many_queries():
    before, after = fraction(0.5), fraction(0.48)
    for missed, rings in ((1.0, True), (0.3, True), (0.25, False), (0.0, False)):  # of 20 samples; 5 of 1,000 are half a point
        assert alarms.square_beats_white_box(before, after, missed).rings == rings
    assert not alarms.square_beats_white_box(before, before, 0.0).rings
    x, y = some_digits(24)
    net = trained_lenet()
    probe, numbers = Probe(net, seed=3), torch.arange(24)

    def missed(asked, starts):
        return alarms.missed_by_gradients(replace(probe, model=asked), x, y, EPS, numbers, int(2 * starts * alarms.AGAIN))

    alone = [probe.pgd(x, y, EPS, numbers, alarms.AGAIN, start).standing for start in (1, 2, 3)]
    assert 0 < missed(net, 1) == float(alone[0].double().mean()) < 1
    assert missed(net, 3) == float((alone[0] & alone[1] & alone[2]).double().mean())
    assert missed(net, 0.5) == missed(net, 1)  # one start, whatever it costs
    assert missed(Fronted(net, before=lambda x: (8 * x).round() / 8), 3) > missed(net, 3)
    assert missed(Fronted(net, before=torch.Tensor.detach), 3) == 1


@pytest.mark.parametrize(
    ("check", "most"),
    [
        (lambda lost: alarms.square_beats_white_box(fraction(0.5), fraction(0.5 - lost), 1.0), 0.005),
        (lambda lost: alarms.still_gains("steps", fraction(0.5), fraction(0.5 - lost)), 0.005),
        (lambda lost: alarms.beats_white_box("transfer", fraction(0.5), fraction(lost)), 0.005),
        (lambda lost: alarms.single_step_beats_iterative(fraction(0.5 - lost), fraction(0.5)), 0.005),
        (lambda lost: alarms.silent_success(fraction(lost), fraction(0.5)), 0.005),
        (lambda lost: alarms.transfer_failure(fraction(lost), fraction(0.5)), 0.005),
        (lambda lost: alarms.unconstrained_failure(fraction(lost)), 0.005),
        (lambda lost: alarms.not_monotone({"a": fraction(0.5), "b": fraction(0.5 + lost), "c": fraction(0)}), 0.005),
        (lambda lost: alarms.above_chance(fraction(0.1 + lost), torch.arange(1000) % 10), 0.005),
        (lambda lost: alarms.loss_does_not_rise(torch.stack([torch.zeros(1000), (~fraction(lost)).float()])), 0.1),
        (lambda lost: alarms.unstable_predictions(torch.full((5,), lost)), 0.1),
        (lambda lost: alarms.planted_adversarial_missed(~fraction(lost), fraction(0)), 0.05),
    ],
)
def test_thresholds(check, most):
    assert not check(most - 0.001).rings
    assert check(most + 0.001).rings


def test_incomplete_optimisation():
    """The best loss so far matters, and a rise of more than 5% of the whole one in the last ten iterates."""
    done = torch.cat([torch.linspace(0, 1, 30), torch.full((10,), 0.99)])
    falling = torch.cat([torch.linspace(0, 1, 30), torch.linspace(0, 0.9, 10)])
    rising = torch.linspace(0, 1, 40)
    flat = torch.zeros(40)
    rings = [alarms.incomplete_optimisation(1e4 * path[:, None] - 7).rings for path in (done, falling, rising, flat)]
    assert rings == [False, False, True, False]


# ------------------------------------------------------------------------------------------- optimisation at inference


@pytest.mark.parametrize("differentiate", [by_grad, by_backward, by_func])
def test_optimisation_at_inference_is_noticed(differentiate):
    x, _ = some_digits(10)
    assert alarms.optimises_at_inference(Purifying(trained_lenet(), differentiate), x).rings
    assert not alarms.optimises_at_inference(trained_lenet(), x).rings


def test_optimisation_of_weights_is_noticed():
    """Which cannot succeed: weights are frozen."""
    x, _ = some_digits(4)
    net = trained_lenet()
    before = state(net)

    def adapting(x):
        net(x).sum().backward()
        return net(x)

    module = nn.Module()
    module.net, module.forward = net, adapting
    assert alarms.optimises_at_inference(module, x).rings
    assert state(net) == before


def test_compiled_model_does_not_optimise():
    """Though one whose weights were not frozen would be differentiated while it is compiled."""
    x, _ = some_digits(4)
    compiled = torch.compile(linear(10, 64), backend="aot_eager")
    assert not alarms.optimises_at_inference(compiled, x).rings
    torch._dynamo.reset()


def test_somebody_elses_backward_is_not_the_models():
    x, _ = some_digits(4)

    def model(x):
        other = threading.Thread(target=lambda: torch.ones(1, requires_grad=True).sum().backward())
        other.start()
        other.join()
        return trained_lenet()(x)

    assert not alarms.optimises_at_inference(model, x).rings


# ----------------------------------------------------------------------------------------------------- what is planted


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_noise_lies_on_and_in_the_ball(norm, bounds):
    from fastadv.attacks.draws import Draws
    from fastadv.attacks.norms import norms

    x, eps = torch.rand(6, 3, 4, 4), torch.linspace(0, 5, 6)
    draws = Draws(0, torch.arange(6))
    on, within = surface(draws, 0, x, eps, norm), inside(draws, 0, x, eps, norm)
    assert torch.allclose(norms(on, norm), eps, rtol=1e-5)
    assert (norms(within, norm) <= eps + 1e-5).all()
    assert (norms(within, norm)[1:] > 0).all()


class Beside(nn.Module):
    """Logits with a graph, though what the last linear layer reads has none."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 10), nn.Linear(10, 10)

    def forward(self, x):
        z = self.first(x.flatten(1))
        with torch.no_grad():
            correction = self.last(z.detach())
        return z + 0.1 * correction


def test_nothing_is_planted_in_features_without_a_gradient():
    torch.manual_seed(0)
    x, y = some_digits(4)
    assert planted.plant(Probe(Beside()), x[:1], EPS, torch.tensor([3])) is None
    found = {alarm.name: alarm for alarm in sanity_checks(Beside(), x, y, EPS)}
    assert not found["planted adversarial missed"].rings


@pytest.mark.parametrize("model", [trained_lenet, lambda: Fronted(trained_lenet(), after=torch.tanh)])
def test_image_that_is_planted_is_there(model):
    """The readout takes some image on the surface of the ball, and neither x nor any that it was fitted to, for a 1."""
    x, _ = some_digits(1)
    probe = Probe(model())
    readout = planted.plant(probe, x, EPS, torch.tensor([3]))
    asked = replace(probe, model=readout)
    n = 1000
    zeros = torch.zeros(n, dtype=torch.long)
    assert not asked.fooled_by_noise(x.expand(n, -1, -1, -1), zeros, EPS, torch.arange(n), 1).all()
    assert asked.right(x, zeros[:1]).all()
    adv = asked.pgd(x, zeros[:1], EPS, zeros[:1], 50)
    assert not adv.standing.any()
    assert ((adv.images - x).abs() <= EPS + 1e-6).all()


def test_attack_that_does_nothing_is_found_out():
    x, _ = some_digits(6)
    found, by_noise = planted.planted_adversarials(
        Probe(trained_lenet()), x, EPS, torch.arange(6), lambda model, x, y, eps, samples: x, 10
    )
    assert len(found) == len(by_noise) == 6
    assert not found.any()


def test_nothing_is_planted_where_nothing_changes():
    x, _ = some_digits(2)
    constant = Fronted(trained_lenet(), before=torch.zeros_like)
    found, _ = planted.planted_adversarials(Probe(constant), x, EPS, torch.arange(2), lambda *a: x, 10)
    assert len(found) == 0
    assert not alarms.planted_adversarial_missed(found, found).rings


def test_nothing_is_planted_that_cannot_be_told_from_the_rest():
    """On the surface this model says what it also says inside."""
    x, _ = some_digits(1)

    def model(z):
        distance = (z - x).flatten(1).abs().amax(1)
        return torch.stack([(60 * distance).sin(), 0 * distance], 1)

    assert planted.plant(Probe(model), x, EPS, torch.tensor([0])) is None
