"""Randomised smoothing: what votes say, that they are what they claim to be, and where all is known in closed form."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
from models import batch, cnn, linear, one_thread, state, surroundings  # noqa: F401
from scipy.stats import binom, binomtest, norm
from torch import Tensor, nn

import fastadv
from fastadv import cli
from fastadv.attacks.draws import Draws, numbers_of
from fastadv.certify import ABSTAIN, Certificates, Smooth, certify, protocol, smoothing
from fastadv.engine.twin import Twin

SIGMA = 0.5


def halfspace(w: Tensor, b: float = 0.0) -> nn.Module:
    """Class 1 where <w, x> + b > 0."""
    layer = nn.Linear(w.numel(), 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([-w, w]) / 2)
        layer.bias.copy_(torch.tensor([-b, b]) / 2)
    return nn.Sequential(nn.Flatten(), layer)


W = torch.tensor([3.0, 0.0, -4.0, 0.0])  # of length 5


def at_distance(*distances: float) -> Tensor:
    """Points [N, 1, 2, 2] so far on the side of class 1."""
    torch.manual_seed(0)
    x = torch.randn(len(distances), 4)
    unit = W / 5
    return (x + (torch.tensor(distances) - x @ unit)[:, None] * unit).view(-1, 1, 2, 2)


# ------------------------------------------------------------------------------------------------------ what votes say


def test_the_bound_is_that_of_clopper_and_pearson():
    """As scipy's exact interval has it, and where it is known by hand: all of n votes say p >= alpha^(1/n)."""
    for n, k in ((10, 0), (10, 7), (100, 99), (1000, 993), (100_000, 99_900)):
        known = binomtest(k, n, alternative="greater").proportion_ci(0.999, "exact").low
        assert float(smoothing.lower_bound(torch.tensor(k), n, 0.001)) == pytest.approx(known, rel=1e-9, abs=1e-12)
    assert float(smoothing.lower_bound(torch.tensor(50), 50, 0.001)) == pytest.approx(0.001 ** (1 / 50), rel=1e-12)


@pytest.mark.parametrize(("n", "most"), [(100, 1.50), (1000, 2.463), (10_000, 3.199), (100_000, 3.812)])
def test_the_largest_radius_that_votes_can_show(n, most):
    """In sigma, at alpha 0.001, as published."""
    bound = smoothing.lower_bound(torch.tensor(n), n, 0.001)
    assert float(smoothing.distance(bound)) == pytest.approx(most, abs=5e-3)


@pytest.mark.parametrize("n", [5, 12, 100, 1000])
@pytest.mark.parametrize("distance", [0.0, 0.3, 2.0, 9.0])
def test_the_fewest_votes_are_the_first_that_suffice(n, distance):
    bounds = smoothing.lower_bound(torch.arange(n + 1), n, 0.001)
    enough = (bounds >= norm.cdf(distance)).nonzero()
    assert smoothing.least_votes(n, 0.001, distance) == (int(enough[0]) if len(enough) else n + 1)


def test_two_classes_are_told_apart_as_the_binomial_test_does():
    for first, second in ((10, 0), (11, 0), (9, 3), (60, 30), (51, 49), (7, 7), (3, 8), (0, 0)):
        p = binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
        told = smoothing.tells_apart(torch.tensor([first]), torch.tensor([second]), 0.001)
        assert bool(told) == (first > second and p <= 0.001)


# --------------------------------------------------------------------------------------------------- in closed form


def test_a_linear_classifier_has_its_distance_as_radius():
    """The smoothed classifier is the classifier, and p = Phi(distance / sigma): sigma Phi^-1(p) is the distance itself."""
    distances = (0.1, 0.3, 0.6, 1.0)
    x, n = at_distance(*distances), 20_000
    found = Smooth(halfspace(W), SIGMA, seed=1, batch_size=5000).certify(x, n=n)
    assert found.labels.tolist() == [1] * 4
    for radius, votes, distance in zip(found.radius.tolist(), found.votes.tolist(), distances, strict=True):
        assert radius <= distance  # but for one in 1000
        assert radius > distance - 0.06
        p = norm.cdf(distance / SIGMA)
        assert abs(votes - n * p) < 5 * math.sqrt(n * p * (1 - p))
    assert torch.equal(found.right(torch.tensor([1, 1, 0, 1]), 0.2), torch.tensor([False, True, False, True]))


def test_the_bound_is_wrong_as_rarely_as_it_says():
    """Of 2,000 certificates at alpha 0.05 about 100, or fewer, are too large; of the others none would be a bound."""
    n, distance = 50, 0.2
    x = at_distance(*[distance] * 2000)
    found = Smooth(halfspace(W), SIGMA, batch_size=5000).certify(x, n0=20, n=n, alpha=0.05)
    wrong = int((found.radius > distance).sum())
    k = smoothing.least_votes(n, 0.05, distance / SIGMA)
    expected = 2000 * binom.sf(k - 1, n, norm.cdf(distance / SIGMA))
    assert abs(wrong - expected) < 5 * math.sqrt(expected)
    assert wrong <= 100 + 5 * math.sqrt(100)


def test_on_the_boundary_it_abstains():
    smooth = Smooth(halfspace(W), SIGMA, batch_size=2000)
    x = at_distance(0.0, 0.0, 2.0)
    assert smooth.predict(x).tolist() == [ABSTAIN, ABSTAIN, 1]
    found = smooth.certify(x, n=1000)
    assert found.labels.tolist() == [ABSTAIN, ABSTAIN, 1]
    assert found.radius[:2].tolist() == [0, 0]
    assert smooth.predict(x, n=10).tolist() == [ABSTAIN, ABSTAIN, ABSTAIN]  # whose p is 0.00195 at best


def test_nan_votes_for_nobody():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), math.nan)

    found = Smooth(Broken(), SIGMA).certify(torch.rand(2, 4), n=200)
    assert found.votes.tolist() == [0, 0]
    assert found.labels.tolist() == [ABSTAIN, ABSTAIN]


# ------------------------------------------------------------------------------------------------------- sooner decided


def test_votes_are_those_of_the_noise_that_the_seed_gives():
    """Counted one by one: draw k of an image is of its content, the seed and k."""
    net, (x, _) = cnn().eval(), batch(3)
    smooth = Smooth(net, SIGMA, seed=5, batch_size=7)
    with smooth._asking(x) as asked:
        votes, runs = smooth._vote(asked, x, 130, smoothing.ESTIMATION)
    for image, number, counted in zip(x, numbers_of(x), votes, strict=True):
        noise = [Draws(5, number[None], smoothing.ESTIMATION).normal(k, *image.shape) for k in range(130)]
        with torch.no_grad():
            predicted = net(image + SIGMA * torch.cat(noise)).argmax(1)
        assert torch.equal(predicted.bincount(minlength=10), counted)
    assert runs.tolist() == [130] * 3


def test_who_is_decided_early_is_decided_right(monkeypatch):
    """Answers are those of all votes; and fewer are cast."""
    x = at_distance(0.0, 0.02, 0.1, 0.2, 0.31, 0.4, 1.0, 3.0)
    smooth = Smooth(halfspace(W), SIGMA, batch_size=4000)
    radius = 0.25
    predicted, at_once = smooth.predict(x), smooth.certify(x, n=4000)
    asked = smooth.certify(x, n=4000, radius=radius)
    monkeypatch.setattr(smoothing, "ROUNDS", 1)  # all votes before anybody looks
    assert torch.equal(smooth.predict(x), predicted)
    whole = smooth.certify(x, n=4000)
    assert (whole.runs == 4000).all()
    assert torch.equal(whole.labels, at_once.labels)
    assert torch.equal(whole.radius, at_once.radius)
    assert torch.equal(whole.radius >= radius, asked.radius >= radius)
    assert (asked.radius <= whole.radius + 1e-12).all()
    assert asked.runs[0] < 3072 == asked.runs[-1]
    assert at_once.runs[0] < 4000 == at_once.runs[-1]


def test_results_depend_on_neither_batches_nor_order():
    net, (x, _) = cnn().eval(), batch(5)
    found = Smooth(net, SIGMA, batch_size=256).certify(x, n=600)
    for size in (1, 37, 1000):
        assert torch.equal(Smooth(net, SIGMA, batch_size=size).certify(x, n=600).votes, found.votes)
    order = torch.tensor([3, 1, 4])
    assert torch.equal(Smooth(net, SIGMA).certify(x[order], n=600).votes, found.votes[order])
    assert not torch.equal(Smooth(net, SIGMA, seed=1).certify(x, n=600).votes, found.votes)


def test_a_twin_votes_as_the_model_does_at_its_present_weights():
    net, (x, _) = cnn().eval(), batch(3)
    smooth = Smooth(net, SIGMA, twin=True)
    for _ in range(2):
        assert torch.equal(smooth.certify(x, n=600).votes, Smooth(net, SIGMA).certify(x, n=600).votes)
        assert smooth.stats.twin == "used"
        with torch.no_grad():
            net[-1].bias.add_(torch.arange(10.0))


def test_a_twins_convolutions_are_fused_or_it_is_run_as_it_is(monkeypatch):
    net, (x, _) = cnn().eval(), batch(3)
    twin = Twin(net)
    fused = twin.forward(x)
    assert fused is not twin.module
    assert "BatchNorm" not in str(fused.inlined_graph)
    torch.testing.assert_close(fused(x), net(x))
    monkeypatch.setattr(torch.jit, "optimize_for_inference", lambda frozen: lambda x: net(x) + 1)  # what goes wrong is seen
    assert twin.forward(x) is twin.module
    monkeypatch.delattr(torch.jit, "trace")
    assert twin.forward(x) is twin.module


def test_votes_may_be_cast_in_half_precision():
    seen = []
    net, (x, _) = cnn().eval(), batch(2)
    net[-1].register_forward_hook(lambda module, args, logits: seen.append(logits.dtype))
    smooth = Smooth(net, SIGMA, precision="bf16")
    whole = Smooth(net, SIGMA).certify(x, n=600).votes
    seen.clear()
    assert (smooth.certify(x, n=600).votes - whole).abs().max() < 60
    assert set(seen) == {torch.bfloat16}
    assert smooth.stats.precision == "bf16"


# ------------------------------------------------------------------------------------------------------------ contracts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_model_and_the_surroundings_are_left_as_found(dtype):
    x, _ = batch(2)
    net = cnn().train().to(dtype)
    before, around = state(net), surroundings()
    Smooth(net, SIGMA).predict(x.to(dtype), n=100)
    assert state(net) == before
    assert surroundings() == around


def test_a_channels_last_model_sees_channels_last_images():
    seen = []

    class Looks(nn.Module):
        def forward(self, x):
            seen.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
            return x.flatten(1)[:, :3]

    x = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    Smooth(Looks(), SIGMA).predict(x, n=100)
    assert all(seen)


def test_no_images_are_no_error():
    found = Smooth(linear(), SIGMA).certify(torch.rand(0, 3, 8, 8), n=100)
    assert len(found.labels) == len(found.radius) == 0
    assert len(Smooth(linear(), SIGMA).predict(torch.rand(0, 3, 8, 8))) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Smooth(3, 1.0), "model must be callable on a batch; got int"),
        (lambda: Smooth(linear(), 0), "sigma must be a finite number > 0; got 0"),
        (lambda: Smooth(linear(), 1.0, batch_size=0), "batch_size must be an integer >= 1"),
        (lambda: Smooth(linear(), 1.0).predict(torch.rand(2, 3, 8, 8), n=0), "n must be an integer >= 1; got 0"),
        (lambda: Smooth(linear(), 1.0).predict(torch.rand(2, 3, 8, 8), alpha=1.0), r"alpha must be a probability in \(0, 1\)"),
        (lambda: Smooth(linear(), 1.0).certify(torch.rand(2, 3, 8, 8), n0=0), "n0 must be an integer >= 1; got 0"),
        (lambda: Smooth(linear(), 1.0).certify(torch.rand(2, 3, 8, 8), radius=-1), "radius must be a finite number >= 0"),
        (lambda: Smooth(linear(), 1.0).predict(torch.zeros(2, 3, 8, 8).long()), "x must be a floating tensor"),
        (lambda: Smooth(linear(), 1.0, precision="int8"), "precision must be one of"),
        (lambda: Smooth(linear(), 1.0, seed=2**63), "seed must be less than 2\\^63"),
        (lambda: Smooth(linear(), 1.0).certify(torch.rand(2, 3, 8, 8), n=1000, radius=2.5), "can show, at most 2.463; got 2.5"),
        (lambda: Smooth(linear().to("meta"), 1.0).predict(torch.rand(2, 3, 8, 8)), "x is on cpu but model is on meta"),
        (lambda: Smooth(lambda x: x, 1.0).predict(torch.rand(2, 3, 8, 8)), "must return floating logits"),
        (lambda: certify(linear(), (torch.rand(2, 3, 8, 8), torch.rand(2, 10)), 1.0), "y must be integer labels"),
        (lambda: certify(linear(), (torch.rand(2, 3, 8, 8), torch.arange(2)), 1.0, n=-1), "n must be an integer"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_smoothed_network_can_be_attacked():
    """By the gradient of its mean prediction, it is pushed over the boundary; the certified ball is never left so."""
    x, y = at_distance(0.3, 0.3), torch.tensor([1, 1])
    smooth = Smooth(halfspace(W), SIGMA, batch_size=2000)
    torch.manual_seed(0)
    attack = fastadv.PGD(smooth.expectation(200), 0.6, steps=5, norm="l2", init="zero", bounds=None)
    assert smooth.predict(attack(x, y), n=2000).tolist() == [0, 0]
    inside = float(smooth.certify(x, n=2000).radius.min())
    attack = fastadv.PGD(smooth.expectation(200), inside, steps=5, norm="l2", init="zero", bounds=None)
    assert smooth.predict(attack(x, y), n=20_000).tolist() == [1, 1]


# -------------------------------------------------------------------------------------------------------- a whole data set


def test_a_data_set_is_certified():
    x = at_distance(-1.0, 0.1, 0.4, 0.8)
    found = certify(halfspace(W), (x, torch.ones(4).long()), SIGMA, n=2000, batch_size=2000, progress=False)
    assert found.certificates.labels.tolist() == [0, 1, 1, 1]
    assert [found.accuracy(r) for r in (0.0, 0.2, 0.5, 1.0)] == [0.75, 0.5, 0.25, 0.0]
    assert [found.accuracy(r, "linf") for r in (0.0, 0.1, 0.25, 0.5)] == [0.75, 0.5, 0.25, 0.0]  # r sqrt(4)
    assert found.mean_radius == pytest.approx(float(found.certificates.radius[1:].sum()) / 4)
    printed = str(found)
    assert "sigma 0.5, 4 samples, 2,000 votes, alpha 0.001: 8,000 noisy images" in printed
    assert "75.00%" in printed
    assert found.radii()[0] == 0.0
    line = found.figure().axes[0].lines[0]
    assert line.get_ydata()[0] == 0.75
    assert line.get_ydata()[-1] == 0.0


def test_killed_it_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "VOTES", 1)  # one image at a time
    monkeypatch.setattr(protocol, "SECONDS", 0.0)  # kept after each
    x, y = at_distance(-1.0, 0.1, 0.4, 0.8), torch.ones(4).long()
    arguments = {"n": 500, "batch_size": 500, "progress": False}
    whole = certify(halfspace(W), (x, y), SIGMA, **arguments)
    calls = []

    class KilledError(Exception):
        pass

    def certified(self, some, *more, **asked):
        if len(some):
            calls.append(len(some))
        if len(calls) == 3 and len(some):
            raise KilledError
        return original(self, some, *more, **asked)

    original = Smooth.certify
    monkeypatch.setattr(Smooth, "certify", certified)
    with pytest.raises(KilledError):
        certify(halfspace(W), (x, y), SIGMA, resume=tmp_path, **arguments)
    found = certify(halfspace(W), (x, y), SIGMA, resume=tmp_path, **arguments)
    assert calls == [1, 1, 1, 1, 1]  # the third was lost and came again
    assert vars(found.certificates).keys() == vars(whole.certificates).keys()
    for a, b in zip(vars(found.certificates).values(), vars(whole.certificates).values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="holds another evaluation"):
        certify(halfspace(W), (x, y), 2 * SIGMA, resume=tmp_path, **arguments)
    next(tmp_path.glob("*.pt")).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no certificates, remove it and go on"):
        certify(halfspace(W), (x, y), SIGMA, resume=tmp_path, **arguments)


def test_autocast_around_changes_nothing():
    net, (x, _) = cnn().eval(), batch(3)
    expected = Smooth(net, SIGMA).certify(x, n=600).votes
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Smooth(net, SIGMA).certify(x, n=600).votes, expected)


def test_one_radius_makes_no_curve():
    found = certify(halfspace(W), (at_distance(0.4), torch.ones(1).long()), SIGMA, n=500, radius=0.1, progress=False)
    assert found.radii() == [0.1]
    with pytest.raises(ValueError, match="which makes no curve"):
        found.figure()


def test_joined_certificates_are_in_order():
    parts = [Certificates(*(torch.tensor([float(i)]) for _ in range(4))) for i in range(3)]
    assert Certificates.joined(parts).labels.tolist() == [0, 1, 2]


# ---------------------------------------------------------------------------------------------------------- the command


def half() -> nn.Module:
    return halfspace(W)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(half().state_dict(), "net.pt")
    torch.save({"x": at_distance(0.1, 0.4, 0.8), "y": torch.ones(3).long()}, "data.pt")
    return tmp_path


def run(*more: str) -> int:
    given = ["net.pt", "--model", f"{__name__}:half", "--data", "data.pt", "--sigma", "1/2", "--n", "1000"]
    return cli.main(["certify", *given, *more])


def test_a_checkpoint_becomes_certificates(folder, capsys):
    assert run("--out", "out") == 0
    assert "3,000 noisy images" in capsys.readouterr().out
    told = json.loads((folder / "out" / "certification.json").read_text())
    assert told["accuracy"]["0"] == 1.0
    assert told["certificates"]["labels"] == [1, 1, 1]
    page = (folder / "out" / "certification.html").read_text()
    assert "Certified robustness" in page
    assert "<svg" in page
    assert "100.0%" in (folder / "out" / "certification.md").read_text()
    assert run("--out", "out", "--radius", "0.2") == 2  # another evaluation
    assert "radius: None there, 0.2 here" in capsys.readouterr().err
    assert run("--out", "other", "--radius", "0.2", "--twin", "--precision", "fp32") == 0
    printed = capsys.readouterr().out
    assert "66.67%" in printed
    assert "radius 0 " not in printed  # which has not been asked for
    told = json.loads((folder / "other" / "certification.json").read_text())
    assert list(told["accuracy"]) == ["0.2"]
    assert told["mean_radius"] is None
    assert "<svg" not in (folder / "other" / "certification.html").read_text()


def test_two_processes_certify_what_one_does(folder):
    command = ["certify", "net.pt", "--model", "test_smoothing:half", "--data", "data.pt", "--sigma", "1/2", "--n", "1000"]
    found = []
    for processes, out in ((1, "one"), (2, "two")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        script = f"import sys; from fastadv import cli; sys.exit(cli.main({[*command, '--out', out]}))"
        environment = os.environ | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        ranks = [
            subprocess.Popen([sys.executable, "-c", script], env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(processes)
        ]
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * processes
        found.append(json.loads((folder / out / "certification.json").read_text())["certificates"])
    assert found[0] == found[1]
    assert len(list((folder / "two" / "state").glob("*.pt"))) == 2  # each kept its own


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sigma", "0"], "sigma must be a finite number > 0"),
        (["--data", "none.npz"], "none.npz"),
        (["--samples", "0"], "samples must be an integer >= 1"),
        (["--device", "toaster"], "--device must be"),
    ],
)
def test_what_is_wrong_with_a_command_is_told(folder, more, message, capsys):
    assert run(*more) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "fastadv-certification").exists()
