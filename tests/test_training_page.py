"""The page of a training run: what it says is what was logged and what an attack finds, whatever state the run is in."""

from __future__ import annotations

import html
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from models import one_thread  # noqa: F401 - a fixture
from torch import Tensor, nn

import fastadv
from fastadv import cli, models
from fastadv.evaluation import Evaluation
from fastadv.evaluation.command import load_data
from fastadv.evaluation.outcome import wilson
from fastadv.training import log, page

ARGUMENTS = {"name": "demo-cnn", "classes": 3, "seed": 0}
N, EPS = 40, 0.005
CONFIG = {
    "model": {"name": "demo-cnn"},
    "data": {"name": "FILE"},
    "method": {"name": "pgd-at"},
    "attack": {"eps": EPS, "steps": 2},
    "awp": {"gamma": 0.005},
    "schedule": {"name": "cosine", "lr": 0.1},
    "average": {"start": 1},
    "validation": {"samples": 10, "steps": 3, "every": 2},
    "epochs": 6,
}
ABOUT = {
    "paper": "A. Author, <A Paper>, 2020",
    "code": "author/code abc",
    "published": {"clean": 80, "best pgd-20": 50, "aa": 40.5},
}
PUBLISHED = {"about": ABOUT}


def images() -> Tensor:
    return (torch.rand(N + 10, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)


def network() -> nn.Module:
    """Untrained, but of one mind about no class."""
    model = models.build(**ARGUMENTS)
    with torch.no_grad():
        model[-1].bias -= model(images().float() / 255).mean(0)
    return model


def own(classes: int, width: int = 4) -> nn.Module:
    """What a user might train."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, classes))


def row(epoch: int, robust: float | None = None, average: float | None = None) -> dict[str, float | None]:
    found = {
        "epoch": epoch,
        "step": 10 * epoch,
        "lr": 0.1 / epoch,
        "loss": 2.0 / epoch,
        "train_clean": 0.5,
        "train_robust": None,
    }
    found |= {"seconds": 1.0, "images_per_second": 123.0}
    for prefix, share in (("", robust), ("average_", average)):
        if share is not None:
            found |= {
                prefix + "clean": share + 0.25,
                prefix + "robust": share,
                prefix + "fgsm": share,
                prefix + "zero_grad": 0.0,
            }
    return found


HISTORY = [row(1), row(2, 0.25, 0.3), row(3), row(4, 0.375, 0.35), row(5), row(6, 0.3125, 0.4)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images of three classes that the untrained network reads as most labels say, so that there is something to break."""
    x = images()
    y = network()(x.float() / 255).argmax(1)
    y[::5] = (y[::5] + 1) % 3
    path = tmp_path_factory.mktemp("data") / "images.pt"
    torch.save({"x": x[N:], "y": y[N:], "x_test": x[:N], "y_test": y[:N]}, path)
    return path


def a_run(
    folder: Path, data: Path, history: list = HISTORY, alarms: dict | None = None, weights: str = "best", **changes
) -> Path:
    """What a run leaves, without the run."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "data": {"name": str(data)}, **changes}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    saved = {"model": "fastadv.models:build", "arguments": ARGUMENTS, "seed": 0, "epoch": 4}
    torch.save({**saved, "state_dict": network().state_dict()}, folder / f"{weights}.pt")
    with log.Log(folder) as written:
        written._board = log._NoBoard()  # TensorBoard takes seconds to import
        written.write(history, alarms or {})
    return folder


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    return a_run(tmp_path_factory.mktemp("runs") / "mine", data, **PUBLISHED)


@pytest.fixture(scope="module")
def shown(folder) -> str:
    path = page.write(folder, device="cpu")
    assert path == folder / "report.html"
    return path.read_text()


def found_in(folder: Path, samples: int = 1000) -> tuple[page.Run, Evaluation]:
    run = page.read(folder)
    return run, page.attacked(run, samples, "cpu")


def directly(data: Path, steps: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, and what the network reads of the clean images and of those that PGD makes of what it reads rightly."""
    held, model = torch.load(data), network()
    x, y = held["x_test"].float() / 255, held["y_test"]
    attack = fastadv.PGD(model, EPS, steps=steps, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean = model(x).argmax(1)
        read = clean.clone()
        read[clean == y] = model(attack(x[clean == y], y[clean == y])).argmax(1)
    return y, clean, read


# ------------------------------------------------------------------------------------------------------------ what it says


def test_accuracies_are_those_of_the_attack(data, folder, shown):
    y, clean, read = directly(data)
    right, stands = (float((labels == y).double().mean()) for labels in (clean, read))
    assert 0 < stands < right < 1
    lo, hi = wilson(stands, N)
    assert f"Robust accuracy <b>{stands:.1%}</b> <small>PGD-20, {100 * lo:.1f} to {hi:.1%}" in shown
    assert f"Clean accuracy <b>{right:.1%}</b>" in shown
    assert f"best.pt on {N} test images, with 95% intervals, attacked by PGD of 20 steps on ce loss, linf eps {EPS}." in shown
    for label in range(3):
        of = y == label
        cells = [
            str(label),
            str(int(of.sum())),
            *(f"{float((labels == y)[of].double().mean()):.1%}" for labels in (clean, read)),
        ]
        assert "".join(f'<td class="number">{cell}</td>' for cell in cells) in shown
        wrong = read[of & (read != y)].bincount(minlength=3)
        assert not wrong.any() or f"{label} for {int(wrong.argmax())}" in shown
    assert f"of the {int(((clean == y) & (read != y)).sum())} samples that an attack broke" in shown


def test_the_log_is_told(shown):
    assert "<title>Training run mine</title>" in shown
    assert "demo-cnn by pgd-at with AWP on" in shown
    assert "seed 0, 6 of 6 epochs" in shown
    assert "Best epoch <b>4</b> <small>of 6, by validation" in shown
    assert "Gap to the last <b>6.2</b>" in shown  # 0.375 - 0.3125, to even
    assert "best.pt is of epoch 4, which had 62.5% clean, 37.5% robust on validation images." in shown
    assert "best-average.pt is of epoch 6, which had 65.0% clean, 40.0% robust on validation images." in shown
    assert "No alarm rang while it trained." in shown
    assert "not at its end" not in shown


def test_the_curves_mark_the_best_epoch(shown):
    assert shown.count("<!-- best, epoch 4 -->") == 2  # in the legends of both accuracies
    told = "Robust accuracy over 6 epochs: validation from 25.0% to 31.2%, averaged from 30.0% to 40.0%."
    assert told in shown  # the method has no robust accuracy of its own, so there is no line of training
    assert "Clean accuracy over 6 epochs: training from 50.0% to 50.0%, validation from 50.0% to 56.2%, averaged" in shown
    for told in ("Loss over 6 epochs: from 2 to 0.3333.", "Learning rate over 6 epochs: from 0.1 to 0.01667.",
                 "Images per second over 6 epochs: from 123 to 123."):  # fmt: skip
        assert told in shown


def test_the_page_has_all_parts_in_order(folder, shown):
    parts = ["Training run mine", "Robust accuracy", "Curves", "Class by class", "Adversarial examples", "is read as",
             "What stronger attacks find", "A. Author, &lt;A Paper&gt;, 2020. Code: author/code abc.", "PGD is an upper bound",
             "fastadv evaluate", "Config", "name: cosine", "Environment", torch.__version__, "attacked on"]  # fmt: skip
    place = 0
    for part in parts:
        assert part in shown[place:], f"{part!r} is missing, or out of place"
        place = shown.index(part, place)
    assert html.escape((folder / "config.yaml").read_text().strip()) in shown


def test_the_page_is_one_file_that_loads_nothing(folder, shown):
    assert shown.count("<svg ") == shown.count('role="img"') >= 5 + 2 + 1
    assert not re.search(r"https?:|<script|<link|@import|\bsrc=|xlink:href=\"(?!#|data:image/png)|<iframe", shown)
    assert sorted(path.name for path in folder.iterdir()) == [
        "alarms.json", "best.pt", "config.yaml", "report.html", "report.md", "summary.csv",
    ]  # fmt: skip
    assert (folder / "report.md").read_text().startswith("# Training run mine\n")


def test_published_numbers_stand_beside_these(data, shown):
    y, clean, read = directly(data)
    right, stands = (f"{float((labels == y).double().mean()):.2%}" for labels in (clean, read))
    for name, published, ours in (("clean", "80.00%", right), ("best pgd-20", "50.00%", stands), ("aa", "40.50%", "")):
        assert re.search(rf"<tr><td>{name}</td><td[^>]*>{published}</td><td>{ours}</td></tr>", shown)


# --------------------------------------------------------------------------------------------------- whatever state it is in


@pytest.fixture
def plain(monkeypatch):
    """Pages without their figures, which take a second each."""
    monkeypatch.setattr(fastadv.report.Report, "figure", lambda report, fig, caption, alt: report.text(f"{alt} {caption}"))


def test_alarms_are_shown(data, tmp_path, plain):
    alarms = {"robust overfitting": "it fell <far>", "zero gradients": "1.5% of gradients are zero"}
    shown = page.page(*found_in(a_run(tmp_path, data, alarms=alarms))).html()
    assert '<p class="note" role="note">Alarm, robust overfitting: it fell &lt;far&gt;.</p>' in shown
    assert '<p class="note" role="note">Alarm, zero gradients: 1.5% of gradients are zero.</p>' in shown
    assert "No alarm" not in shown


def test_a_run_that_goes_on(data, tmp_path, plain):
    """One epoch, nothing validated, hence no best.pt."""
    shown = page.write(a_run(tmp_path, data, HISTORY[:1], weights="last"), device="cpu").read_text()
    assert "1 of 6 epochs" in shown
    assert "No epoch has been validated yet" in shown
    assert "The run is not at its end" in shown
    assert "Accuracies are of last.pt" in shown
    assert "Clean accuracy over 1 epochs: training from 50.0% to 50.0%." in shown
    for absent in ("Best epoch", "Gap to the last", "averaged", "The recipe"):
        assert absent not in shown


def test_few_samples_are_evenly_spaced(data, tmp_path, plain):
    folder = a_run(tmp_path, data)
    held = torch.load(data)
    found = found_in(folder, 8)[1]
    assert torch.equal(found.labels, held["y_test"][::5])
    assert torch.equal(found.x, held["x_test"][::5].float() / 255)
    shown = page.page(*found_in(folder, 1)).html()
    assert "Class by class" not in shown  # of one
    assert "The weakest first." not in shown


def test_validation_says_how_to_attack(data, tmp_path):
    chosen = {"steps": 30, "eps": 0.01, "loss": "margin", "select": "test"}
    run, found = found_in(a_run(tmp_path, data, validation=chosen, attack={"eps": EPS, "norm": "l2"}))
    attack = found.settings["attacks"]["pgd"]
    for part in ("eps=0.01", "steps=30", "norm='l2'", "loss='margin'"):
        assert part in attack
    assert "--eps 0.01 --norm l2" in page.judging(run, found)


def test_chosen_by_the_test_set_it_says_so(data, tmp_path, plain):
    shown = page.page(*found_in(a_run(tmp_path, data, validation={"select": "test"}))).html()
    assert '<p class="note" role="note">best.pt was chosen by the test set' in shown


def test_many_classes(folder, plain):
    run, found = found_in(folder)
    found.labels, found.predicted = torch.arange(N), torch.arange(N).roll(1)
    shown = page.page(run, found).html()
    assert "What is read under attack" not in shown
    assert shown.count("<tr>") < 20 + 25


def test_the_judge_takes_the_test_images(data, tmp_path, monkeypatch):
    folder = a_run(tmp_path / "it's mine", data)
    run, found = found_in(folder)
    words = shlex.split(page.judging(run, found))
    assert words == ["fastadv", "evaluate", f"{folder}/best.pt", "--data", str(data), "--eps", str(EPS)]
    x, y = load_data(words[4])
    held = torch.load(data)
    assert torch.equal(x, held["x_test"].float() / 255)
    assert torch.equal(y, held["y_test"])
    monkeypatch.setattr(type(run.config.data), "arguments", {"seed": 3})
    for name, root, there in (("mnist5k", None, "digits:3"), ("cifar10", "/data", "cifar10:/data")):
        monkeypatch.setitem(run.config.data.__dict__, "name", name)
        monkeypatch.setitem(run.config.data.__dict__, "root", root)
        assert page.judging(run, found) == shlex.join([*words[:4], there, *words[5:]])


# ------------------------------------------------------------------------------------------------------------ whose code runs


def test_a_network_of_the_users_own(data, tmp_path):
    """The config is the user's, so what it names is built."""
    name = f"{__name__}:own"
    folder = a_run(tmp_path, data, model={"name": name, "width": 5})
    arguments = {"name": name, "classes": 3, "width": 5, "seed": 0, "mean": None, "std": None}
    state = {"model": "fastadv.models:build", "arguments": arguments, "state_dict": models.build(**arguments).state_dict()}
    torch.save(state, folder / "best.pt")
    run, found = found_in(folder)
    assert found.settings["samples"] == N
    assert page.judging(run, found).endswith(f"--model {name}")


def test_weights_cannot_ask_for_code(data, tmp_path):
    folder = a_run(tmp_path, data)
    for asked in ({"model": "os:system"}, {"model": "fastadv.models:build", "arguments": {"name": "os:system"}}):
        torch.save({**torch.load(folder / "best.pt"), **asked}, folder / "best.pt")
        with pytest.raises(ValueError, match="asks for 'os:system', which is code"):
            page.write(folder, device="cpu")


# -------------------------------------------------------------------------------------------------------- what it refuses


def unlink(name: str):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unlink("config.yaml"), "is no folder of fastadv train: it has no config.yaml"),
        (lambda folder: (folder / "config.yaml").write_text("a: [b"), "is not YAML"),
        (unlink("summary.csv"), "has no epoch done yet: there is no .*summary.csv"),
        (unlink("alarms.json"), "has no epoch done yet: there is no .*alarms.json"),
        (unlink("best.pt"), "there is no checkpoint .*last.pt"),
        (lambda folder: (folder / "best.pt").write_bytes(b"PK"), "best.pt is not a file of tensors"),
        (unlink("images.pt"), "the data of .* cannot be loaded from here: there is no file .*images.pt"),
        (lambda folder: torch.save(dict.fromkeys(("x", "x_test"), torch.rand(3, 3, 8, 8)) |
                                   dict.fromkeys(("y", "y_test"), torch.arange(3)), folder / "images.pt"),
         "cannot be asked about these images"),
    ],
)  # fmt: skip
def test_refusals(data, tmp_path, damage, message, capsys):
    folder = a_run(tmp_path, tmp_path / "images.pt")
    (folder / "images.pt").write_bytes(data.read_bytes())
    damage(folder)
    assert cli.main(["report", str(folder), "--device", "cpu"]) == 2
    assert re.search(f"^fastadv report: .*{message}", capsys.readouterr().err)
    assert not (folder / "report.html").exists()


def test_what_it_cannot_do(folder, tmp_path, monkeypatch, capsys):
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "is no folder of fastadv train" in capsys.readouterr().err
    assert cli.main(["report", str(folder), "--samples", "0"]) == 2
    assert "samples must be an integer >= 1; got 0" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["report", str(folder)]) == 2
    assert "needs matplotlib; install it with: pip install 'fastadv[train]'" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "fastadv.training.page")
    monkeypatch.delattr("fastadv.training.page")
    monkeypatch.delitem(sys.modules, "fastadv.training.command")
    monkeypatch.setitem(sys.modules, "pydantic", None)
    monkeypatch.delitem(sys.modules, "fastadv.training.config")
    assert cli.main(["report", str(folder)]) == 2
    assert "fastadv report needs pydantic: pip install 'fastadv[train]'" in capsys.readouterr().err


def test_the_command(data, tmp_path, plain, capsys):
    folder = a_run(tmp_path, data)
    assert cli.main(["report", str(folder), "--samples", "7", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"Report: {folder / 'report.html'}\n"
    assert "best.pt on 7 test images" in (folder / "report.html").read_text()
