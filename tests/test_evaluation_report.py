"""The outcome of an evaluation: its numbers, its page and its files; and the curves on the page."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from models import batch, cnn, linear, one_thread  # noqa: F401 - a fixture
from torch import nn

from fastadv.evaluation import Alarm, Curves, Evaluation, Row, robustness_curves
from fastadv.evaluation.outcome import ROBUSTBENCH, radius, wilson
from fastadv.evaluation.page import by_class, page, reproduction

FILES = ["evaluation-report.html", "report.json", "report.md", "robustbench.json"]
SETTINGS = {
    "eps": 8 / 255, "norm": "linf", "version": "standard", "bounds": [0.0, 1.0], "seed": 3, "samples": 20,
    "attacks": {"apgd-ce": "APGD(<eps>)", "square": "Square()"}, "engine": "eager", "precision": "fp32", "fastadv": "9.9",
    "device": "a processor",
}  # fmt: skip
SILENT = Alarm("zero gradients", False, {"fraction of samples": 0.25}, "never shown", "Croce and Hein, 2020")
RINGING = Alarm("Square beats white-box", True, {"drop": 0.05, "planted": 32.0}, "Do <this>.", "Croce and Hein, 2020")
CURVES = Curves(20, 0.5, [0.0, 0.1, 0.2], [0.9, 0.7, 0.4], [0.9, 0.75, 0.7], [0.1, 0.8, 1.25])


def outcome(shape: tuple[int, ...] = (1, 4, 4), **changes) -> Evaluation:
    """Of 20 samples of two classes: 18 right, 14 after APGD, 13 after Square."""
    broken_by = ["clean"] * 2 + ["apgd-ce"] * 4 + ["square"] + [""] * 13
    labels = torch.arange(20) % 2
    broken = torch.tensor([bool(name) for name in broken_by])
    g = torch.Generator().manual_seed(0)
    x = torch.rand(20, *shape, generator=g)
    moved = broken.view(-1, *[1] * len(shape)) & (torch.arange(20) > 1).view(-1, *[1] * len(shape))
    distance = torch.where(broken, 0.03, math.inf)
    rows = [Row("apgd-ce", 18, 4, 0, 0.7, 33.5, 12.0), Row("square", 14, 1, 2, 0.65, 4000.25, 100.0)]
    return Evaluation(
        0.9, 0.65, rows, broken_by, labels, torch.where(broken, 1 - labels, labels), distance, dict(SETTINGS),
        **({"x": x, "x_adv": (x + 0.03 * moved).clamp(0, 1)} | changes),
    )  # fmt: skip


def rows(shown: str) -> list[list[str]]:
    """The cells of all tables."""
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", shown)]


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("right", "n", "lo", "hi"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (880, 1000, 0.8584, 0.8987), (1, 1, 0.2065, 1.0)],
)
def test_wilson_intervals(right, n, lo, hi):
    assert wilson(right / n, n) == pytest.approx((lo, hi), abs=5e-5)


def test_a_thousand_digits_tell_two_points():
    lo, hi = wilson(0.88, 1000)
    assert 0.035 < hi - lo < 0.045


def test_text_has_intervals_and_what_rings():
    text = str(outcome(alarms=[SILENT, RINGING]))
    assert text.splitlines() == [
        "linf eps 8/255, 20 samples, version standard, seed 3",
        "clean        90.00%  [69.9%, 97.2%]",
        "apgd-ce      70.00%  [48.1%, 85.5%]  4 of 18 broken, 12.0 s",
        "square       65.00%  [43.3%, 81.9%]  1 of 14 broken, 100.0 s",
        "ALARM Square beats white-box: Do <this>.",
    ]


def test_trust_needs_alarms_that_were_looked_for():
    assert not outcome().trusted
    assert outcome(alarms=[SILENT]).trusted
    assert not outcome(alarms=[SILENT, RINGING]).trusted


@pytest.mark.parametrize(("eps", "text"), [(8 / 255, "8/255"), (0.3, "0.3"), (0.5, "0.5"), (2**-0.5, "0.707107"), (0.0, "0")])
def test_radii_as_papers_write_them(eps, text):
    assert radius(eps) == text


def test_classes():
    assert by_class(outcome()) == [(0, 10, 0.9, 0.6), (1, 10, 0.9, 0.7)]


def test_json_is_plain_and_complete():
    found = outcome(alarms=[SILENT, RINGING], curves=CURVES)
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["clean_accuracy"] == 0.9
    assert told["robust_interval"] == pytest.approx(found.interval(0.65))
    assert told["attacks"][1] == dataclasses.asdict(found.rows[1])
    assert told["alarms"][1] == dataclasses.asdict(RINGING)
    assert told["curves"] == dataclasses.asdict(CURVES)
    assert told["settings"] == SETTINGS
    assert told["environment"]["torch"] == torch.__version__
    assert told["trusted"] is False
    samples = told["samples"]
    assert samples["broken_by"] == found.broken_by
    assert samples["label"] == found.labels.tolist()
    assert samples["predicted"] == found.predicted.tolist()
    assert samples["distance"][2] == pytest.approx(0.03)
    assert samples["distance"][19] is None  # there is no adversarial image
    assert "x" not in told
    assert "x_adv" not in told


def test_json_takes_numbers_that_are_not_finite():
    odd = dataclasses.replace(SILENT, numbers={"lowest": -math.inf, "loss": math.nan})
    told = outcome(alarms=[odd]).to_json()
    assert told["alarms"][0]["numbers"] == {"lowest": None, "loss": None}


def test_robustbench_has_its_fields_in_percent():
    told = outcome(alarms=[SILENT]).robustbench(name="A paper", dataset="cifar10", number_forward_passes=1)
    assert tuple(told) == ROBUSTBENCH
    assert told | {"footnote": ""} == {
        "link": "", "name": "A paper", "authors": "", "additional_data": None, "number_forward_passes": 1, "dataset": "cifar10",
        "venue": "", "architecture": "", "eps": "8/255", "clean_acc": "90.00", "reported": "65.00", "autoattack_acc": "65.00",
        "footnote": "", "unreliable": False,
    }  # fmt: skip
    assert "20 samples" in told["footnote"]


def test_robustbench_claims_no_more_than_was_done():
    quick = outcome()
    quick.settings["version"] = "quick"
    told = quick.robustbench()
    assert told["autoattack_acc"] is None  # another protocol
    assert told["unreliable"] is None  # nobody looked
    assert outcome(alarms=[RINGING]).robustbench()["unreliable"] is True
    with pytest.raises(ValueError, match=r"fields must be among link, name, .*; got author$"):
        quick.robustbench(author="me")


# --------------------------------------------------------------------------------------------------------------- files


def test_write_leaves_four_files(tmp_path):
    path = outcome(alarms=[SILENT], curves=CURVES).write(tmp_path / "new" / "folder", authors="A. Author")
    assert path == tmp_path / "new" / "folder" / "evaluation-report.html"
    assert files(path.parent) == FILES
    assert json.loads((path.parent / "robustbench.json").read_text())["authors"] == "A. Author"
    assert json.loads((path.parent / "report.json").read_text())["robust_accuracy"] == 0.65
    assert (path.parent / "report.md").read_text().startswith("# Robustness evaluation\n\nlinf eps 8/255, 20 samples")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_previous_files(error, tmp_path, monkeypatch, no_matplotlib):
    outcome().write(tmp_path)
    before = {name: (tmp_path / name).read_text() for name in FILES}
    write_text = Path.write_text

    def half(self, text, **kwargs):
        write_text(self, text[: len(text) // 2], **kwargs)
        raise error

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(type(error)):
        outcome(alarms=[RINGING]).write(tmp_path)
    assert files(tmp_path) == FILES
    assert {name: (tmp_path / name).read_text() for name in FILES} == before


def test_bad_fields_write_nothing(tmp_path):
    with pytest.raises(ValueError, match="fields"):
        outcome().write(tmp_path / "new", author="me")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------------- page


def test_the_page_has_all_parts_in_order():
    found = outcome(alarms=[SILENT, RINGING], curves=CURVES)
    shown = page(found).html()
    parts = [
        "Robustness evaluation", "linf eps 8/255, 20 samples", "An alarm rings: Square beats white-box", "<b>65.0%</b>",
        "43.3 to 81.9%, 95% interval", "<b>90.0%</b>", "1 of 2", "Attack by attack", "<svg", "<td>apgd-ce</td>",
        "4,000", "Can it be believed?", "<td>Square beats white-box</td>", "drop: 5.0%; planted: 32", "Do &lt;this&gt;.",
        "zero gradients", "fraction of samples: 25.0%", "Curves", "<svg", "<svg", "Class by class", "<svg",
        "Adversarial examples", "Sample 2, class 0, is read as 1 after apgd-ce, linf distance 0.03.",
        "What no program can check", "State the threat model", "How to get this again", "eps=8 / 255", "<td>a processor</td>",
        "APGD(&lt;eps&gt;)", torch.__version__,
    ]  # fmt: skip
    place = 0
    for part in parts:
        assert part in shown[place:], f"{part!r} is missing, or out of place"
        place = shown.index(part, place)
    assert "never shown" not in shown  # advice of what does not ring


def test_the_page_is_self_contained():
    shown = page(outcome(alarms=[SILENT], curves=CURVES)).html()
    assert shown.count("<svg ") == 1 + 2 + 1 + 5  # attacks, curves, classes, and all that were broken
    assert shown.count('role="img"') == len(re.findall(r'aria-label="[^"]{20,}"', shown)) == 9
    assert not re.search(r"https?:|<script|<link|@import|\bsrc=", shown)
    assert shown == page(outcome(alarms=[SILENT], curves=CURVES)).html()  # the same bytes again


def test_examples_are_shown_where_there_are_images():
    for found in (outcome((3, 5, 7)), outcome((192,)), outcome((4, 3, 3)), outcome(x=None, x_adv=None)):
        has_images = found.x is not None and found.x.dim() == 4 and found.x.shape[1] in (1, 3)
        assert ("Adversarial examples" in page(found).html()) == has_images
    unbounded = outcome((3, 5, 7))
    unbounded.settings["bounds"] = None
    assert "bounds=None" in page(unbounded).html()


def test_without_matplotlib_there_are_tables(no_matplotlib):
    found = outcome(alarms=[SILENT], curves=CURVES)
    shown = page(found).html()
    assert "<svg" not in shown
    assert '<tr><td class="number">0.2</td><td class="number">40.0%</td></tr>' in shown  # accuracy against eps
    assert '<td class="number">2</td><td class="number">70.0%</td><td class="number">1.25</td>' in shown  # against steps
    assert (
        '<td class="number">1</td><td class="number">10</td><td class="number">90.0%</td><td class="number">70.0%</td>' in shown
    )
    assert page(found, figures=False).markdown() == page(found).markdown()


def test_a_page_of_little():
    """One class, nothing broken, no alarms looked for, one sample."""
    found = Evaluation(
        1.0, 1.0, [Row("square", 1, 0, 0, 1.0, 5.0, 4000.0)], [""], torch.tensor([7]), torch.tensor([7]),
        torch.tensor([math.inf]), SETTINGS | {"samples": 1}, x=torch.rand(1, 1, 3, 3), x_adv=torch.rand(1, 1, 3, 3),
    )  # fmt: skip
    shown = page(found).html()
    assert "1 sample, version" in shown
    assert "not looked for" in shown
    assert "1.1 h" in shown
    for part in ("Class by class", "Adversarial examples", "Can it be believed?", "Curves"):
        assert part not in shown


def test_many_classes_show_the_hardest():
    found = outcome()
    found.labels = torch.arange(20) // 2 * 2 + torch.arange(20) % 2  # 20 classes
    assert "Accuracy of each class." in page(found, figures=False).html()
    many = outcome()
    for name in ("labels", "predicted", "distance"):
        setattr(many, name, torch.cat([getattr(many, name)] * 2))
    many.labels, many.broken_by = torch.arange(40), many.broken_by * 2
    shown = page(many, figures=False).html()
    assert "The 20 of 40 classes with the least robust accuracy." in shown
    assert (
        '<tr><td class="number">2</td><td class="number">1</td><td class="number">100.0%</td><td class="number">0.0%</td>'
        in shown
    )


def test_how_to_get_it_again():
    call = reproduction(SETTINGS)
    assert call == (
        "fastadv.evaluate(model, (x, y), eps=8 / 255, norm='linf', version='standard', bounds=(0.0, 1.0), seed=3, "
        "engine='eager', precision='fp32')"
    )
    assert "version=['apgd-ce', 'square']" in reproduction(SETTINGS | {"version": "custom"})
    assert reproduction(SETTINGS | {"command": "fastadv evaluate x.pt"}) == "fastadv evaluate x.pt"


# -------------------------------------------------------------------------------------------------------------- curves


def two_classes() -> nn.Module:
    """Says 1 where the first pixel is above one half; the other three do not matter."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0] * 4, [10.0, 0.0, 0.0, 0.0]]))
        model[1].bias.copy_(torch.tensor([0.0, -5.0]))
    return model


def test_accuracy_against_eps_is_that_of_the_closed_form():
    x = torch.full((8, 1, 2, 2), 0.5)
    gap = torch.tensor([0.02, 0.06, 0.09, 0.11, 0.16, 0.22, 0.35, 0.45])
    y = torch.arange(8) % 2
    x[:, 0, 0, 0] += torch.where(y == 1, gap, -gap)
    curves = robustness_curves(two_classes(), x, y, eps=0.1, norm="linf")
    assert curves.samples == 8
    assert curves.chance == 0.5
    assert curves.eps == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1, 0.15])  # to the first of chance or less
    assert curves.accuracy == [1.0, 0.875, 0.875, 0.75, 0.625, 0.5]
    assert len(curves.accuracy_by_step) == len(curves.loss_by_step) == 51
    assert curves.accuracy_by_step[-1] == 0.625
    # In the end each first pixel is as far on the wrong side as it gets, 0.1 from where it was.
    worst = 10 * (0.1 - gap)
    assert curves.loss_by_step[-1] == pytest.approx(float(nn.functional.softplus(worst).mean()), rel=1e-4)


class Misleading(nn.Module):
    """Says 1 where the first pixel is above one half, with gradients that lead back to the right side of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = 10 * (x.flatten(1)[:, :1] - 0.5)
        z = z.detach() - (z - z.detach())
        return torch.cat([-z, z], 1)


def test_who_was_fooled_once_stays_so():
    y = torch.arange(24) % 2
    x = torch.full((24, 1, 1, 2), 0.5)
    x[:, 0, 0, 0] += (2 * y - 1) * 0.02
    curves = robustness_curves(Misleading(), x, y, 0.1)
    assert 0.3 < curves.accuracy_by_step[0] < 0.9  # a random start fools some, and all steps lead away from there
    assert curves.accuracy_by_step == [curves.accuracy_by_step[0]] * 51
    assert curves.loss_by_step[-1] < curves.loss_by_step[0]
    assert sorted(curves.accuracy, reverse=True) == curves.accuracy


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_curves_leave_the_model_and_depend_on_the_seed_alone(norm):
    (x, y), model = batch(12), cnn().train()
    model[0].weight.requires_grad_(False)
    state, rng = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    first = robustness_curves(model, x, y, 0.1, norm, seed=1)
    assert first == robustness_curves(model, x, y, 0.1, norm, seed=1)
    pieces = robustness_curves(model, x, y, 0.1, norm, seed=1, batch_size=5)
    assert pieces.loss_by_step == pytest.approx(first.loss_by_step, rel=1e-3)  # convolutions of other batches round otherwise
    assert dataclasses.replace(pieces, loss_by_step=first.loss_by_step) == first
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert first.loss_by_step != robustness_curves(model, x, y, 0.1, norm, seed=2).loss_by_step


def test_curves_of_some_samples_evenly_spaced():
    x, y = batch(10)
    model = linear()
    some = robustness_curves(model, x, y, 0.05, samples=5)
    assert some.samples == 5
    clean = (model(x[::2]).argmax(1) == y[::2]).double().mean()
    assert some.accuracy[0] == float(clean)


class Switch(nn.Module):
    """Says 1 where the first pixel is above one half, with zero gradients, and counts the samples that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        on = (x.flatten(1)[:, :1] > 0.5).float()
        logits = torch.cat([1 - on, on], 1) + 0 * x.flatten(1)[:, :2]
        self.seen += len(x)
        if logits.requires_grad:
            logits.register_hook(self.count)
        return logits

    def count(self, gradient: torch.Tensor) -> None:
        self.seen += len(gradient)


def test_curves_cost_what_they_say():
    """F is one forward, or one backward, of all samples; nobody is fooled here, which is the worst case."""
    y = torch.arange(6) % 2
    model = Switch()
    curves = robustness_curves(model, y.float().view(6, 1, 1, 1).repeat(1, 1, 2, 2), y, 0.1)
    assert curves.accuracy == [1.0] * 9
    assert model.seen == (1 + 8 * 44 + 104) * 6 == 457 * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": -1}, "eps must be"),
        ({"norm": "l3"}, "norm must be one of 'linf', 'l2', 'l1'"),
        ({"samples": 0}, "samples must be"),
        ({"x": batch(4)[0] + 1}, "x must lie in bounds"),
        ({"x": batch(4)[0][:0], "y": batch(4)[1][:0]}, "at least one sample"),
        ({"y": torch.tensor([0, 1, 2, 10])}, r"y must be labels in \[0, 10\)"),
    ],
)
def test_curves_refuse_bad_input(changes, message):
    x, y = batch(4)
    with pytest.raises(ValueError, match=message):
        robustness_curves(**({"model": linear(), "x": x, "y": y, "eps": 0.1} | changes))
