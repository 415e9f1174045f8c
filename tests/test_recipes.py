"""Every recipe: valid, priced, listed, and two steps of it on stand-in files in the real formats."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fastadv.training import build, config, cost

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CHANGES = ["max_steps=2", "batch_size=4", "validation.samples=4", "validation.steps=1", "validation.batch_size=4"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """CIFAR-10 and the extra images of papers, as they come, but few."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        held = {b"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), b"labels": random.integers(0, 10, 4).tolist()}
        (folder / name).write_bytes(pickle.dumps(held))
    images, labels = random.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), random.integers(0, 10, 8)
    for name in ("1m.npz", "cifar10_ddpm.npz"):
        np.savez(root / name, image=images, label=labels)
    (root / "ti_500K_pseudo_labeled.pickle").write_bytes(pickle.dumps({"data": images, "extrapolated_targets": labels}))
    return root


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::fastadv.training.TrainingAlarm")
def test_it_runs_two_steps(recipe, files, tmp_path):
    chosen = config.load(recipe)
    changes = [f"data.root={files}", *CHANGES]
    if chosen.data.extra:
        changes.append(f"data.extra={files / Path(chosen.data.extra).name}")
    if chosen.model.name == "wide-resnet":
        changes += ["model.depth=10", "model.widen=1"]
    if chosen.awp:
        changes.append("awp.warmup=0")
    if chosen.attack.steps:
        changes.append("attack.steps=2")
    trainer = build.trainer(config.load(recipe, changes), tmp_path, device="cpu")
    history = trainer.fit()
    assert trainer.step == 2
    assert torch.isfinite(torch.tensor(history[-1]["loss"]))
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert (tmp_path / "last.pt").is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_says_what_it_costs_and_whence_it_comes(recipe):
    chosen = config.load(recipe)
    assert chosen.about is not None
    assert chosen.about.pflop == pytest.approx(cost.petaflops(chosen, cost.passes(chosen)), rel=0.01)
    text, page = recipe.read_text(), (ROOT / "docs" / "training.md").read_text()
    assert f"fastadv train -c recipes/{recipe.name}" in text
    assert f"-m fastadv.train -c recipes/{recipe.name}" in text
    (row,) = [line for line in page.splitlines() if line.startswith(f"| [{recipe.stem}](../recipes/{recipe.name})")]
    assert f"| {chosen.about.pflop:g} |" in row


def test_a_recipe_is_found_by_its_name():
    assert config.find("mnist5k_trades_awp") == ROOT / "recipes" / "mnist5k_trades_awp.yaml"
    with pytest.raises(ValueError, match=r"did you mean .cifar10_trades"):
        config.find("cifar_trades")
    with pytest.raises(ValueError, match=r"there is no file .elsewhere/cifar10_trades\.yaml"):
        config.find("elsewhere/cifar10_trades.yaml")  # which is not the one that was meant


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.weigth_decay=1", "optimizer.weigth_decay: there is no such key; did you mean .weight_decay"),
        ("epoch=3", "did you mean .epochs"),
        ("attack.norm=l3", "attack.norm.*'linf', 'l2' or 'l1'"),
        ("epochs=0", "epochs.*greater than or equal to 1"),
        ("awp.gama=1", "awp.gamma: is missing\nawp.gama: there is no such key; did you mean .gamma"),
        ("validation.samples=0", "at least 1 to select by validation"),
        ("data.unsup_fraction=.5", "belong together"),
        ("optimizer.betas=[0.9,0.99]", "sgd has no betas"),
        ("average={name: swa, decay: 0.9}", "swa has no decay"),
        ("method.margin=0.2", "margin and scale belong together"),
        ("model.classes=5", "as many as the data have"),
        ("attack.eps=-1", "attack.eps"),
        ("attack.eps=8/0", "attack.eps"),
        ("schedule", "must be key=value"),
        ("epochs.x=1", "epochs is .* and has no keys"),
    ],
)
def test_what_is_wrong_with_a_config_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        config.load(ROOT / "recipes" / "cifar10_trades.yaml", [change])


def test_a_config_survives_its_file(tmp_path):
    for recipe in RECIPES:
        chosen = config.load(recipe, ["attack.eps=7/255", "schedule.lr=5e-4"])
        (tmp_path / "config.yaml").write_text(config.dump(chosen))
        assert config.load(tmp_path / "config.yaml") == chosen
        assert chosen.attack.eps == 7 / 255
