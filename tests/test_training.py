"""The training loop: what a step is, that nothing is lost whatever happens, and that it says what goes wrong."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import fastadv
from fastadv import cli
from fastadv.evaluation.command import load_model
from fastadv.training import Trainer, build, checkpoint, config
from fastadv.training.trainer import TrainingAlarm, descents
from fastadv.training.validation import Validation, alarms

CONFIG = {
    "model": {"name": "demo-cnn"},
    "data": {"name": "FILE", "augment": [{"crop": 1}]},
    "method": {"name": "trades", "beta": 1},
    "attack": {"eps": 0.1, "steps": 2, "ramp": {"name": "constant", "warmup": 1}},
    "awp": {"gamma": 0.005, "warmup": 1},
    "optimizer": {},
    "schedule": {"name": "cosine", "lr": 0.05},
    "average": {"decay": 0.9, "start": 1},
    "validation": {"samples": 20, "steps": 2},
    "epochs": 3,
    "batch_size": 16,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """100 images of 10 classes that a network can tell apart, and 30 more."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(130) % 10
    x = torch.rand(130, 1, 28, 28, generator=g) * 0.3
    for image, label in zip(x, y, strict=True):
        image[:, 2 * label : 2 * label + 4, 4:24] += 0.6
    path = tmp_path_factory.mktemp("data") / "digits.pt"
    torch.save({"x": x[:100], "y": y[:100], "x_test": x[100:], "y_test": y[100:]}, path)
    return path


def given(file: Path, **changes) -> config.Config:
    held = {**CONFIG, "data": {**CONFIG["data"], "name": str(file)}}
    for key, value in changes.items():
        merged = {**held[key], **value} if isinstance(value, dict) and isinstance(held.get(key), dict) else value
        held[key] = {k: v for k, v in merged.items() if v is not None} if isinstance(merged, dict) else merged
    return config.check(held)


def trained(data: Path, out: Path | None = None, **changes) -> Trainer:
    trainer = build.trainer(given(data, **changes), out, device="cpu")
    trainer.fit()
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------------- what it does


def test_a_run_leaves_weights_a_log_and_checkpoints(data, tmp_path):
    trainer = trained(data, tmp_path)
    assert trainer.epoch == 3
    assert trainer.step == 15  # 80 images in batches of 16
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("train_robust", "clean", "robust", "average_robust"))
    assert json.loads((tmp_path / "alarms.json").read_text()) == trainer.ringing
    for name in ("last", "best", "best-average"):
        network, seed = load_model(str(tmp_path / f"{name}.pt"))  # as fastadv evaluate does
        assert isinstance(network, nn.Module)
        assert seed == 0
    assert same(load_model(str(tmp_path / "last.pt"))[0].state_dict(), weights(trainer))
    assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == checkpoint.KEPT


def test_building_draws_nothing(data):
    before = torch.get_rng_state()
    build.trainer(given(data), device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore::fastadv.training.TrainingAlarm")
def test_it_learns(data):
    # AWP off: at this size its radius is not the point.
    history = trained(data, epochs=12, attack={"eps": 0.02}, awp=None, schedule={"name": "cosine", "lr": 0.1}).history
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["robust"] > 0.5


def test_a_step_is_a_plain_one(data):
    """Two epochs, written out by hand."""
    trainer = build.trainer(given(data, awp=None, average=None, epochs=2), device="cpu")
    model = fastadv.models.build("demo-cnn")
    attack = fastadv.TRADES.paper_attack(model, eps=0.1, alpha=None, steps=2)
    objective = fastadv.TRADES(attack, beta=1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    step = 0
    for epoch in range(2):
        for batch in trainer.batches.epoch(epoch):
            t = epoch + (step % 5) / 5
            optimizer.param_groups[0]["lr"] = trainer.schedule.at(t)[0]
            attack.eps = 0.1 * min(t, 1.0)
            attack.generator = fastadv.attacks.draws.Draws(0, batch.samples, (1 << 40) + step)
            optimizer.zero_grad()
            objective(model, batch.x, batch.y).loss.backward()
            optimizer.step()
            step += 1
    trainer.fit()
    assert same(weights(trainer), model.state_dict())


# ----------------------------------------------------------------------------------------------------------- nothing is lost


class Killed(BaseException):
    pass


def killed(trainer: Trainer, after: int) -> None:
    """Trains until so many steps are done, then nothing more is run, as after a SIGKILL."""
    train = trainer._train

    def dying(batch) -> None:
        if trainer.step == after:
            raise Killed
        train(batch)

    trainer._train = dying
    with pytest.raises(Killed):
        trainer.fit()


def test_resumed_it_is_the_same_run(data, tmp_path):
    whole = trained(data)
    for after in (0, 3, 5, 14):  # before anything, within epochs, between them, in the last step
        out = tmp_path / str(after)
        killed(build.trainer(given(data), out, device="cpu", minutes=0), after)
        random.seed(1)  # another process draws otherwise
        torch.manual_seed(1)
        rest = build.trainer(given(data), out, device="cpu")
        rest.fit()
        assert rest.step == 15
        assert same(weights(rest), weights(whole))
        assert same(rest.average.module.state_dict(), whole.average.module.state_dict())
        assert rest.best == whole.best
        for mine, theirs in zip(rest.history, whole.history, strict=True):
            assert {k: v for k, v in mine.items() if k not in SPEED} == {k: v for k, v in theirs.items() if k not in SPEED}


SPEED = ("seconds", "images_per_second", "efficiency")


@pytest.mark.filterwarnings("ignore::fastadv.training.TrainingAlarm")
@pytest.mark.parametrize("method", build.OBJECTIVES)
def test_every_method_trains_and_resumes(data, method, tmp_path):
    held = {**CONFIG, "data": {"name": str(data)}, "method": {"name": method}, "attack": {"eps": 0.1}}
    held |= {"awp": None, "average": None, "epochs": 2, "batch_size": 40, "validation": {"samples": 20, "steps": 2, "eps": 0.1}}
    if method in ("standard", "rst-stability"):  # which attack nothing
        held["attack"] = {}
    if method == "ibp":  # with the ramp in the steps that are resumed
        held["method"] |= {"warmup": 1, "ramp": 4}
    if method == "mmc":
        held["model"] = {"name": "demo-cnn", "head": "mmc", "dimensions": 16}
    whole = build.trainer(config.check(held), device="cpu")
    whole.fit()
    assert len(whole.history) == 2
    killed(build.trainer(config.check(held), tmp_path, device="cpu", minutes=0), 3)  # of 4
    rest = build.trainer(config.check(held), tmp_path, device="cpu")
    rest.fit()
    assert same(weights(rest), weights(whole))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"name": "small-cnn"}},  # which has dropout, drawn by torch's own generator
        {"optimizer": {"name": "adamw", "clip": 1.0}, "schedule": {"lr": 1e-3}},
        {"precision": "bf16"},
        {"average": {"name": "swa", "start": 1, "every": 0.4, "decay": None}},
        {"awp": {"restore": "after_step"}},
        {"method": {"consistency": 1.0}},
        {"data": {"mix": "cutmix"}, "method": {"name": "pgd-at", "beta": None}},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_resumed_with(data, changes, tmp_path):
    chosen = given(data, **{"epochs": 2, "batch_size": 27} | changes)
    whole = build.trainer(chosen, device="cpu")
    whole.fit()
    killed(build.trainer(chosen, tmp_path, device="cpu", minutes=0), 4)  # of 6
    rest = build.trainer(chosen, tmp_path, device="cpu")
    rest.fit()
    assert same(weights(rest), weights(whole))


def test_a_damaged_checkpoint_is_passed_over(data, tmp_path):
    whole = trained(data)
    killed(build.trainer(given(data), tmp_path, device="cpu", minutes=0), 9)
    newest, _ = checkpoint.Checkpoints(tmp_path / "checkpoints").paths()
    held = bytearray(newest.read_bytes())
    held[len(held) // 2] ^= 1
    newest.write_bytes(held)
    rest = build.trainer(given(data), tmp_path, device="cpu")
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged.*going on from the one before"):
        rest.fit()
    assert same(weights(rest), weights(whole))


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"XX" + b[2:]], ids=["half", "empty", "other"]
)
def test_where_none_can_be_read_it_says_so(data, tmp_path, damage):
    killed(build.trainer(given(data), tmp_path, device="cpu", minutes=0), 3)
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        path.write_bytes(damage(path.read_bytes()))
    trainer = build.trainer(given(data), tmp_path, device="cpu")
    warnings.simplefilter("ignore")
    with pytest.raises(ValueError, match=r"no checkpoint can be read.*is damaged"):
        trainer.fit()


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "ran"),)

    checkpoint.write(tmp_path / "000000001.pt", {"model": Evil()})
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.read(tmp_path / "000000001.pt")
    assert not (tmp_path / "ran").exists()


def test_never_refuses_a_run(data, tmp_path):
    trained(data, tmp_path, epochs=1)
    with pytest.raises(ValueError, match="holds a run already"):
        build.trainer(given(data, epochs=1), tmp_path, device="cpu").fit("never")


def command(file: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "fastadv.train", "-c", str(file), "--out", str(out), "--device", "cpu", *more]


@pytest.fixture
def file(data, tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "data": {**CONFIG["data"], "name": str(data)}, "epochs": 6}))
    return path


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def test_sigkill_at_any_moment_loses_nothing(data, file, tmp_path):
    """The real thing: processes that are killed, wherever they are, until one gets to the end."""
    whole = build.trainer(config.load(file), device="cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole.fit()
    torch.set_num_threads(threads)
    out, patience = tmp_path / "out", random.Random(0)
    for _ in range(2):
        process = subprocess.Popen(command(file, out, "--minutes", "0"), env=ENVIRONMENT, stderr=subprocess.PIPE)
        before = _newest(out)
        while process.poll() is None and _newest(out) <= before:
            time.sleep(0.01)
        time.sleep(patience.random() * 0.5)  # a step or three, a checkpoint after each
        process.kill()
        process.communicate()
    assert 0 < _newest(out) < 30
    subprocess.run(command(file, out), env=ENVIRONMENT, check=True, capture_output=True)
    assert same(torch.load(out / "last.pt", weights_only=True)["state_dict"], weights(whole))
    assert not list(out.rglob("*.tmp"))


def _newest(out: Path) -> int:
    return max((int(path.stem) for path in out.glob("checkpoints/[0-9]*.pt")), default=0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop_it_keeps_the_step(file, tmp_path, number, code):
    out = tmp_path / "out"
    process = subprocess.Popen(command(file, out, "--set", "epochs=1000"), env=ENVIRONMENT, stderr=subprocess.PIPE)
    while _newest(out) < 5:  # the first epoch's
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code, told.decode()
    state = checkpoint.Checkpoints(out / "checkpoints").newest()
    assert state is not None
    assert state["step"] >= 5
    assert b"Traceback" not in told


def test_the_folder_of_another_run_is_refused(file, tmp_path, capsys):
    out = str(tmp_path / "out")
    quick = ["train", "-c", str(file), "--out", out, "--device", "cpu", "--set", "max_steps=1"]
    assert cli.main(quick) == 0
    before = (tmp_path / "out" / "config.yaml").read_bytes()
    assert cli.main([*quick, "schedule.lr=0.5"]) == 2
    told = capsys.readouterr().err
    assert "holds another run" in told
    assert "-  lr: 0.05" in told
    assert "+  lr: 0.5" in told
    assert (tmp_path / "out" / "config.yaml").read_bytes() == before


# -------------------------------------------------------------------------------------------------------- what it watches


def test_validation_counts_what_it_should(data):
    trainer = trained(data, epochs=1)
    model = trainer.model
    model.train()
    found = trainer.validation(model)
    assert model.training
    images = trainer.validation.images
    x, y = images.x.float() / 255, images.y
    model.eval()
    with torch.no_grad():
        assert found["clean"] == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
        fgsm = fastadv.fgsm(model, x, y, 0.1)
        assert found["fgsm"] == pytest.approx(float((model(fgsm).argmax(1) == y).float().mean()))
    assert found["robust"] <= found["clean"]
    assert trainer.validation(model) == found  # the same starts each time
    small = Validation(images, 0.1, 2, batch_size=7)
    assert small(model) == found  # whatever the batch


def test_nothing_held_out_is_trained_on(data):
    trainer = build.trainer(given(data), device="cpu")
    held_out = {image.numpy().tobytes() for image in trainer.validation.images.x}
    seen = {image.numpy().tobytes() for image in trainer.batches.images.x}
    assert len(held_out) == 20
    assert len(seen) == 80
    assert not held_out & seen


def test_choosing_by_the_test_set_is_warned_about(data):
    with pytest.warns(UserWarning, match="test set"):
        build.trainer(given(data, validation={"select": "test"}), device="cpu")


@pytest.mark.filterwarnings("ignore::fastadv.attacks.pgd.NaNGradientWarning")
def test_a_run_that_diverges_is_noticed(data):
    trainer = build.trainer(given(data, schedule={"lr": 1e30}, average=None, awp=None), device="cpu")
    with pytest.warns(TrainingAlarm, match="divergence: the loss of epoch . is not finite"):
        trainer.fit()
    assert trainer.history[-1]["robust"] == 0  # NaN is no class


def test_another_radius_has_another_alpha(data):
    given_eps = build.trainer(given(data, attack={"alpha": None}), device="cpu").objective.attack
    assert given_eps.alpha is None  # 2.5 eps / steps, and not the paper's 0.007
    both = build.trainer(given(data, attack={"alpha": 0.05}), device="cpu").objective.attack
    assert both.alpha == 0.05


def test_free_at_under_autocast_sees_its_own_steps(data):
    """The cache of cast weights would hide them from the later replays."""
    changes = {
        "method": {"name": "free", "beta": None},
        "attack": {"steps": None},
        "awp": None,
        "average": None,
        "precision": "bf16",
        "epochs": 2,
    }
    trainer = build.trainer(given(data, **changes, max_steps=1), device="cpu")
    seen = []
    backward = torch.Tensor.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", lambda loss: (seen.append(loss.item()), backward(loss))[1])
        trainer.fit()
    assert len(seen) == 8
    assert len(set(seen)) == 8


@pytest.mark.parametrize("average", [{"name": "swa", "start": 1}, {"name": "ema"}])
def test_batch_norms_of_an_average(data, average):
    """A mean of weights gets statistics of its own, and they last through a resume."""
    held = {"model": {"name": "test_training:normed"}, "average": None, "awp": None, "epochs": 2}
    chosen = given(data, **held).model_copy(update={"average": config.AverageConfig(**average)})
    trainer = build.trainer(chosen, device="cpu")
    trainer.fit()
    mine, theirs = (network[1].running_var for network in (trainer.average.module, trainer.bare))
    assert torch.isfinite(mine).all()
    assert torch.equal(mine, theirs) == (average["name"] == "ema")


def normed(classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, classes))


ROW = {"clean": 0.9, "robust": 0.5, "fgsm": 0.6, "zero_grad": 0.0, "train_robust": 0.5}


@pytest.mark.parametrize(
    ("rows", "ringing"),
    [
        ([{}], None),
        ([{}, {"robust": 0.55, "train_robust": 0.6}], None),
        ([{}, {"clean": 0.5}], None),
        ([{}, {"clean": 0.4}], "collapse"),
        ([{}, {"clean": 0.1}, {"clean": 0.1}], "collapse"),
        ([{}, {"robust": 0.2, "train_robust": 0.4}], "catastrophic overfitting"),
        ([{"robust": 0.53}, {"robust": 0.49, "train_robust": 0.7}], "robust overfitting"),
        ([{"robust": 0.53}, {"robust": 0.49, "train_robust": 0.4}], None),  # it is worse at everything
        ([{"fgsm": 0.45}], "one step beats many"),
        ([{"zero_grad": 0.3}], "zero gradients"),
    ],
)
def test_alarms(rows, ringing):
    history = [ROW | {"epoch": i + 1} | row for i, row in enumerate(rows)]
    assert list(alarms([*history, {"epoch": 9}])) == ([] if ringing is None else [ringing])  # and one without validation


def test_an_alarm_rings_once(data, tmp_path):
    trainer = build.trainer(given(data, awp=None), tmp_path, device="cpu")
    found = iter([0.9, 0.1, 0.05])
    trainer.validation = lambda model: ROW | {"robust": next(found), "fgsm": 1.0}
    trainer.average = None
    with pytest.warns(TrainingAlarm) as told:
        trainer.fit()
    assert len([w for w in told if issubclass(w.category, TrainingAlarm)]) == 1
    assert "catastrophic overfitting" in json.loads((tmp_path / "alarms.json").read_text())


def test_the_best_is_the_best_by_validation(data, tmp_path):
    trainer = build.trainer(given(data, average=None), tmp_path, device="cpu")
    found, kept = iter([0.3, 0.6, 0.5]), []
    trainer.validation = lambda model: kept.append(weights(trainer)) or ROW | {"robust": next(found)}
    trainer.fit()
    assert trainer.best == {"robust": 0.6, "epoch": 2}
    assert same(torch.load(tmp_path / "best.pt", weights_only=True)["state_dict"], kept[1])


def test_the_progress_shown_counts_model_passes(data):
    trainer = trained(data, epochs=1)
    row = trainer.history[0]
    assert row["images_per_second"] > 0
    assert 0 < row["efficiency"] < 1.5


# ------------------------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "tradez"}}, "did you mean .trades"),
        ({"method": {"bta": 3}}, "did you mean .beta"),
        ({"model": {"name": "wide-resnt"}}, "wide-resnet"),
        ({"schedule": {"name": "cosin"}}, "cosine"),
        ({"data": {"augment": ["crp"]}}, "crop"),
        ({"validation": {"samples": 100}}, "fewer than the 100"),
        ({"method": {"name": "free", "beta": 1}, "awp": None}, "method.beta"),
        ({"method": {"name": "free"}}, "awp: free has one backward"),
        ({"method": {"name": "standard", "beta": None}, "attack": {"ramp": {"name": "constant"}}}, "attacks nothing"),
        ({"attack": {"ramp": {"name": "constant", "warmpu": 3}}}, "warmpu"),
        ({"parallel": "fsdp"}, "parallel: .*'ddp' or 'fsdp2'; got 'fsdp'"),
        ({"parallel": "fsdp2", "compile": True}, "compile: "),
        ({"parallel": "fsdp2", "channels_last": True}, "channels_last: "),
        ({"parallel": "fsdp2", "attack": {"engine": "auto"}}, "attack.engine: "),
        ({"parallel": "fsdp2", "attack": {"twin": True}}, "attack.twin: "),
        ({"parallel": "fsdp2", "awp": {"sync": "local"}}, "awp.sync: "),
        ({"parallel": "fsdp2", "method": {"name": "ibp", "beta": None}}, "method.name: ibp"),
    ],
)
def test_what_is_wrong_is_named(data, changes, message):
    with pytest.raises(ValueError, match=message):
        build.trainer(given(data, **changes), device="cpu")


def test_one_loop_for_all(data):
    """descents yields with the gradients of the objective in place, AWP or not."""
    trainer = build.trainer(given(data, method={"name": "trades"}), device="cpu")
    batch = next(iter(trainer.batches.epoch(0)))
    model, awp = trainer.model, fastadv.AWP(trainer.model, 0.01)
    before = weights(trainer)
    for restore in ("before_step", "after_step"):
        awp = fastadv.AWP(model, 0.01, restore=restore)
        (out,) = descents(trainer.objective, model, batch.x, batch.y, torch.Tensor.backward, awp)
        assert out.loss.requires_grad
        assert same(weights(trainer), before)
        assert all(p.grad is not None for p in model.parameters())
