"""What is read from folders of runs, and ``fastadv analyze``: every analysis from files to a page."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from models import one_thread  # noqa: F401 - a fixture
from torch import nn

from fastadv import analysis, cli, demo
from fastadv.analysis import command
from fastadv.analysis.runs import pareto
from fastadv.training import log

CONFIG = {
    "model": {"name": "demo-cnn"},
    "data": {"name": "mnist5k"},
    "method": {"name": "trades", "beta": 6.0},
    "attack": {"eps": 0.3},
    "schedule": {"name": "cosine", "lr": 0.1},
    "epochs": 4,
}


def row(epoch: int, clean: float | None = None, robust: float | None = None, trained: float | None = None) -> dict:
    return {"epoch": epoch, "step": epoch, "loss": 1.0, "clean": clean, "robust": robust, "train_robust": trained}


def a_run(folder: Path, clean: float = 0.75, robust: float = 0.5, history: list | None = None, **changes) -> str:
    """What a run leaves, without the run: validated after every second epoch, best after the second."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))
    best = [
        row(1, trained=0.25),
        row(2, clean, robust, 0.5),
        row(3, trained=0.625),
        row(4, clean + 0.125, robust - 0.125, 0.75),
    ]
    with log.Log(folder) as written:
        written._board = log._NoBoard()  # TensorBoard takes seconds to import
        written.write(best if history is None else history, {})
    return str(folder)


def trades(beta: float) -> dict:
    return {"method": {"name": "trades", "beta": beta}}


# ------------------------------------------------------------------------------------------------------------- runs


def test_overfitting_is_from_the_best_epoch_to_the_last(tmp_path):
    found = analysis.robust_overfitting(a_run(tmp_path / "mine"))
    (run,) = found.runs.values()
    assert (run.validation, run.best, run.gap) == ([(2, 0.5), (4, 0.375)], (2, 0.5), 0.125)
    assert run.training == [(1, 0.25), (2, 0.5), (3, 0.625), (4, 0.75)]
    assert str(found) == (
        "mine: robust accuracy is 50.0% after epoch 2, its best, and 37.5% after epoch 4, its last, a gap of 12.5 points; "
        "on training images it ends at 75.0%."
    )


def test_the_figure_marks_best_and_last(tmp_path):
    folders = [a_run(tmp_path / "a"), a_run(tmp_path / "b", robust=0.25, history=[row(1, 0.5, 0.25)])]
    (axis,) = analysis.robust_overfitting(folders).figure().axes
    marked = [(line.get_marker(), *line.get_xydata().ravel()) for line in axis.lines if line.get_marker() in ("D", "o")]
    assert marked == [("D", 2, 0.5), ("o", 4, 0.375), ("D", 1, 0.25), ("o", 1, 0.25), ("D",), ("o",)]  # and the legend's


def test_the_frontier_is_of_those_that_none_beats():
    first = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.8, "e": 0.6, "f": 0.8}
    second = {"a": 0.1, "b": 0.4, "c": 0.4, "d": 0.3, "e": 0.5, "f": 0.4}
    assert pareto(first, second) == ["e", "b", "f", "a"]


def test_the_tradeoff_is_of_the_best_epochs(tmp_path):
    folders = [
        a_run(tmp_path / f"run{beta}", clean, robust, **trades(beta))
        for beta, clean, robust in ((1.0, 0.75, 0.25), (6.0, 0.5, 0.5), (9.0, 0.375, 0.375))
    ]
    found = analysis.robustness_tradeoff(folders)
    assert found.clean == {"run1.0": 0.75, "run6.0": 0.5, "run9.0": 0.375}
    assert found.robust == {"run1.0": 0.25, "run6.0": 0.5, "run9.0": 0.375}
    assert found.labels == {"run1.0": "beta 1", "run6.0": "beta 6", "run9.0": "beta 9"}
    assert found.frontier == ["run6.0", "run1.0"]
    (axis,) = found.figure().axes
    assert axis.lines[0].get_xydata().tolist() == [[0.5, 0.5], [0.75, 0.25]]
    assert [text.get_text() for text in axis.texts] == ["beta 1", "beta 6", "beta 9"]


AWP = {"awp": {"gamma": 0.005}}
LABELS = {
    "nothing differs": ([{}, {"about": {"paper": "P"}}], ["a", "b"], None),
    "a section that one lacks": ([{}, AWP], ["a", "gamma 0.005"], None),
    "a name speaks for itself": ([{"method": {"name": "pgd-at"}}, {}], ["pgd-at", "trades, beta 6"], None),
    "a fraction": ([{"attack": {"eps": "8/255"}}, {"attack": {"eps": "4/255"}}], ["eps 8/255", "eps 4/255"], "radii"),
    "two of a word": (
        [{"validation": {"eps": 0.1}, "attack": {"eps": 0.1}}, {"validation": {"eps": 0.1}, "attack": {"eps": 0.2}}, {}],
        ["attack.eps 0.1, validation.eps 0.1", "attack.eps 0.2, validation.eps 0.1", "attack.eps 0.3"],
        "radii",
    ),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_tell_what_differs(tmp_path, case):
    changes, labels, warned = LABELS[case]
    found = analysis.robustness_tradeoff([a_run(tmp_path / name, **c) for name, c in zip("abc", changes, strict=False)])
    assert list(found.labels.values()) == labels
    assert ("different radii" in str(found)) == (warned == "radii")
    found.figure().draw_without_rendering()


def test_folders_of_one_name_are_told_apart(tmp_path):
    folders = [a_run(tmp_path / up / "run") for up in "ab"]
    assert list(analysis.robust_overfitting(folders).runs) == folders


@pytest.mark.parametrize("function", [analysis.robust_overfitting, analysis.robustness_tradeoff])
def test_a_folder_without_a_validated_epoch_is_refused(tmp_path, function):
    with pytest.raises(ValueError, match=r"it has no config.yaml"):
        function(tmp_path)
    with pytest.raises(ValueError, match=r"no epoch of the run in .*new' was validated"):
        function(a_run(tmp_path / "new", history=[row(1, trained=0.5)]))
    with pytest.raises(ValueError, match="folders must hold one at least"):
        function([])


# ---------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def digits(monkeypatch) -> demo.Digits:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 10
    held = demo.Digits(torch.rand(40, 1, 28, 28, generator=g), labels, torch.rand(12, 1, 28, 28, generator=g), labels[:12])
    monkeypatch.setattr(demo, "load_digits", lambda seed=0: held)
    return held


def tiny() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


@pytest.fixture
def folder(tmp_path, monkeypatch, digits) -> Path:
    """Where there are two checkpoints and a run."""
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        torch.save({"model": "fastadv.demo:build_network", "seed": 0, "state_dict": tiny().state_dict()}, f"{name}.pt")
    a_run(tmp_path / "run")
    return tmp_path


MODEL = ["--model", f"{__name__}:tiny", "--device", "cpu"]
GIVEN = {
    command.CHECKPOINTS: ["first.pt", "second.pt", *MODEL, "--samples", "2"],
    command.RUNS: ["run"],
    command.NOTHING: [],
}
NO_EPS = {"input-gradients", *(name for name, a in command.ANALYSES.items() if a.of != command.CHECKPOINTS)}


def exists(name: str) -> bool:
    return importlib.util.find_spec(f"fastadv.analysis.{command.ANALYSES[name].module}") is not None


@pytest.mark.parametrize("name", [name for name in command.ANALYSES if exists(name)])
def test_every_analysis_writes_its_page(name, folder, capsys, monkeypatch):
    monkeypatch.setattr(analysis.capacity_sweep, "__defaults__", ((1,), 1, 0))
    monkeypatch.setattr(analysis.score_toy, "__defaults__", ((60_000, 6), 1.0, 20, 0))
    of = command.ANALYSES[name].of
    options = [] if name in NO_EPS else ["--eps", "1/100"]
    assert cli.main(["analyze", name, *GIVEN[of], *options, "--out", "out"]) == 0
    told = capsys.readouterr().out
    assert told.endswith(f"Page: out/{name}.html\n")
    assert sorted(path.name for path in (folder / "out").iterdir()) == [f"{name}.{kind}" for kind in ("html", "json", "svg")]
    page = (folder / "out" / f"{name}.html").read_text()
    assert page.count("<svg") == 1
    assert f"fastadv analyze {name}" in page
    assert "<svg" in (folder / "out" / f"{name}.svg").read_text()
    found = json.loads((folder / "out" / f"{name}.json").read_text())
    assert found
    if of == command.CHECKPOINTS:
        assert "first" in told
        assert "second" in told


def test_the_landscape_has_the_training_images_of_the_data(folder):
    cli.main(["analyze", "weight-landscape", "first.pt", *MODEL, "--eps", "0.01", "--samples", "2"])
    found = json.loads((folder / "fastadv-analysis" / "weight-landscape.json").read_text())
    assert found["training_accuracy"].keys() == {"first"}
    torch.save((torch.rand(4, 1, 28, 28), torch.arange(4)), "own.pt")
    assert command.training_images("own.pt") is None


def test_training_images_are_those_of_the_split(digits):
    x, y = command.training_images("digits")
    torch.testing.assert_close(x, digits.x_train, rtol=0, atol=0.5 / 255 + 1e-6)
    assert torch.equal(y, digits.y_train)


def test_without_a_name_all_are_listed(capsys):
    assert cli.main(["analyze"]) == 0
    told = capsys.readouterr().out
    for name, one in command.ANALYSES.items():
        assert re.search(rf"^  {name} +{re.escape(one.line)}$", told, re.MULTILINE)


def test_names_are_those_of_public_functions():
    for name, one in command.ANALYSES.items():
        if exists(name):
            function = command.function_of(name)
            assert function is getattr(analysis, name.replace("-", "_"))
            assert function.__module__ == f"fastadv.analysis.{one.module}"


BAD = {
    "an unknown name": (["weight-landscap"], "there is no analysis 'weight-landscap'; did you mean 'weight-landscape'?"),
    "no eps": (["loss-surface", "first.pt"], "loss-surface needs --eps"),
    "no checkpoint": (["loss-surface", "--eps", "1"], "loss-surface takes checkpoints; got none"),
    "a path too many": (["capacity-sweep", "first.pt"], "capacity-sweep takes no path; got first.pt"),
    "an option too many": (["robust-overfitting", "run", "--eps", "1"], "robust-overfitting takes no --eps"),
    "data of none": (["capacity-sweep", "--data", "digits"], "capacity-sweep takes no --data"),
    "norm of none": (["loss-surface", "first.pt", "--eps", "1", "--norm", "l2"], "loss-surface takes no --norm"),
    "no file": (["input-gradients", "third.pt"], "there is no checkpoint 'third.pt'"),
    "no run": (["robust-overfitting", "out"], "'out' is no folder of fastadv train"),
    "digits of another split": (["input-gradients", "first.pt", *MODEL, "--data", "digits:3"], "the checkpoint was trained"),
    "no sample": (["input-gradients", "first.pt", *MODEL, "--samples", "0"], "samples must be an integer >= 1; got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_a_line(case, folder, capsys):
    arguments, message = BAD[case]
    assert cli.main(["analyze", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"fastadv analyze: {message}")
    assert case == "an unknown name" or told.count("\n") == 1


def test_without_matplotlib_it_says_so_at_once(folder, capsys, monkeypatch):
    monkeypatch.setattr(command, "has_matplotlib", lambda: False)
    assert cli.main(["analyze", "input-gradients", "first.pt"]) == 2
    assert "pip install 'fastadv[plot]'" in capsys.readouterr().err
