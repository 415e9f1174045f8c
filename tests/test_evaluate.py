"""The evaluation protocol: what counts as broken, who is attacked by what, and that nothing is lost or depends on chance."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import batch, cnn, count_calls, digits, linear, one_thread, state, surroundings, trained_lenet  # noqa: F401
from torch import nn

import fastadv
from fastadv import evaluate
from fastadv.attacks import APGD, PGD, Attack, RandomNoise, Square
from fastadv.evaluation import protocol
from fastadv.machine import exact_multiplication, multiplication

EPS = 0.12


def held_out(n: int = 48):
    x, y = digits()
    return x[1200 : 1200 + n], y[1200 : 1200 + n]


def quick(net, **settings) -> list[Attack]:
    """Two attacks that leave something over, cheap enough for a test."""
    settings = {"eps": EPS} | settings
    return [APGD(net, steps=4, early_stop=True, **settings), Square(net, queries=40, **settings)]


def told(found) -> tuple:
    """All that does not depend on the clock."""
    rows = [(r.attack, r.tried, r.broken, r.rejected, r.robust_accuracy) for r in found.rows]
    return found.clean_accuracy, found.robust_accuracy, rows, found.broken_by, found.predicted.tolist(), found.distance.tolist()


def nearly(expected: tuple):
    """The same, distances up to the rounding that another batch size brings."""
    *exact, distances = expected

    class Nearly:
        def __eq__(self, other):
            return list(other[:-1]) == exact and other[-1] == pytest.approx(distances, abs=1e-6)

        def __repr__(self):
            return repr(expected)

    return Nearly()


class Says(Attack):
    """Returns what ``function(x)`` makes of the clean images, and says that all of it fools the model."""

    function = staticmethod(lambda x: x)

    def _attack(self, batch):
        self.seen = getattr(self, "seen", []) + batch.draws.samples.tolist()
        return self.function(batch.x)

    def __call__(self, *arguments, **options):
        adv = super().__call__(*arguments, **options)
        self.info = fastadv.AttackInfo(torch.ones(len(adv), dtype=torch.bool), queries=self.info.queries)
        return adv


# ---------------------------------------------------------------------------------------------------- what is counted


def test_accuracies_are_those_of_the_images():
    x, y = held_out()
    net = trained_lenet()
    found = evaluate(net, (x, y), EPS, version=quick(net), alarms=False, keep_images=True)
    right = net(x).argmax(1) == y
    stands = net(found.x_adv).argmax(1) == y
    assert found.clean_accuracy == int(right.sum()) / len(x)
    assert found.robust_accuracy == int((right & stands).sum()) / len(x)
    assert 0.1 < found.robust_accuracy < found.clean_accuracy - 0.1
    assert (found.x_adv - x).abs().amax() <= EPS + 1e-6
    assert [not name for name in found.broken_by] == (right & stands).tolist()
    assert [name == "clean" for name in found.broken_by] == (~right).tolist()
    assert torch.equal(found.predicted, net(found.x_adv).argmax(1))
    fooled = torch.tensor([name not in ("", "clean") for name in found.broken_by])
    assert torch.allclose(found.distance[fooled], (found.x_adv - x).abs().flatten(1).amax(1)[fooled])
    assert found.distance[stands & right].isinf().all()


def test_each_attack_meets_the_survivors_of_those_before():
    x, y = held_out()
    net = trained_lenet()
    found = evaluate(net, (x, y), EPS, version=quick(net), alarms=False)
    first, second = found.rows
    assert (first.attack, second.attack) == ("apgd", "square")
    assert first.tried == round(found.clean_accuracy * len(x))
    assert second.tried == first.tried - first.broken
    assert second.robust_accuracy == (second.tried - second.broken) / len(x) == found.robust_accuracy
    assert first.broken == found.broken_by.count("apgd") > 0


@pytest.mark.parametrize(
    ("function", "norm"),
    [
        (lambda x: x, "linf"),  # does not fool
        (lambda x: 1 - x, "linf"),  # fools, outside the ball
        (lambda x: x + 2.0, "linf"),  # outside the box
        (lambda x: x * torch.nan, "linf"),
        (lambda x: 1 - x, "l2"),
        (lambda x: 1 - x, "l1"),
    ],
)
def test_nothing_counts_on_the_word_of_an_attack(function, norm):
    x, y = held_out(20)
    net = trained_lenet()
    liar = Says(net, 0.3, norm=norm)
    liar.function = function
    found = evaluate(net, (x, y), 0.3, norm, version=[liar], alarms=False)
    assert found.robust_accuracy == found.clean_accuracy
    assert found.rows[0].rejected == found.rows[0].tried > 0


def test_an_answer_of_nan_is_wrong():
    """Its argmax would be class 0."""
    x, y = held_out(12)
    net = trained_lenet()

    def model(images):
        logits = net(images)
        return torch.where(images.flatten(1).amax(1, keepdim=True) > 0.99, torch.nan, logits)

    bright = x.flatten(1).amax(1) > 0.99
    found = evaluate(model, (x, torch.where(bright, 0, y)), EPS, version=[RandomNoise(model, 0.0, draws=1)], alarms=False)
    assert bright.any()
    assert [name == "clean" for name in found.broken_by] == (bright | (net(x).argmax(1) != y)).tolist()


def test_pixels_that_rounding_put_outside_count():
    x, y = held_out(12)
    x = (x + 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).clamp(-0.5, 0.5)).clamp(-5e-7, 1 + 5e-7)
    net = trained_lenet()
    found = evaluate(net, (x, y), 2.0, "l2", version=[Square(net, 2.0, queries=50, norm="l2")], alarms=False)
    assert (x < 0).any()
    assert found.rows[0].rejected == 0
    assert found.rows[0].broken > 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("eps", [1e-4, 0.3])
def test_images_on_the_sphere_are_inside(eps, norm):
    """Up to rounding, which for a small radius is more than a small part of it."""
    x, _ = batch(20)
    net = linear(2)
    y = 1 - net(x).argmax(1)
    y[:10] = 1 - y[:10]

    class Far(Says):
        def _attack(self, batch):
            d = torch.ones_like(batch.x)
            return batch.x + eps * d / fastadv.attacks.base.norms(d, norm).view(-1, 1, 1, 1)

    net[1].weight.data.zero_()
    net[1].bias.data.copy_(torch.tensor([0.0, 1.0]))  # says 1 whatever it sees
    y = torch.zeros(20, dtype=torch.int64)
    flips = linear(2)

    def fooled_by_any_change(images):
        clean = (images.view(20 if len(images) == 20 else len(images), -1)[:, None] - x.flatten(1)[None]).abs().sum(-1) == 0
        return torch.where(clean.any(1)[:, None], torch.tensor([1.0, 0.0]), flips(images) * 0 + torch.tensor([0.0, 1.0]))

    found = evaluate(fooled_by_any_change, (x, y), eps, norm, version=[Far(fooled_by_any_change, eps, norm, bounds=None)],
                     bounds=None, alarms=False)  # fmt: skip
    assert (found.clean_accuracy, found.robust_accuracy, found.rows[0].rejected) == (1.0, 0.0, 0)


def test_verdicts_are_in_full_precision():
    x, y = held_out()
    net = trained_lenet()
    seen = []
    hook = net.register_forward_hook(lambda m, i, logits: seen.append(logits.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        here = evaluate(net, (x, y), EPS, version=quick(net), alarms=False)
    hook.remove()
    assert set(seen) == {torch.float32}
    assert told(here) == told(evaluate(net, (x, y), EPS, version=quick(net), alarms=False))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_verdicts_are_not_in_tf32(precision):
    """Attacks multiply in what the user has chosen, which stands afterwards, through either interface of torch."""
    (x, y), net, asked = held_out(), trained_lenet(), []

    def watched(images):
        asked.append(multiplication())
        return net(images)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        chosen = multiplication()
        with exact_multiplication():
            exact = multiplication()
        evaluate(watched, (x, y), EPS, version=[RandomNoise(watched, EPS, draws=3)], alarms=False)
        with pytest.raises(ZeroDivisionError), exact_multiplication():
            raise ZeroDivisionError
        assert multiplication() == chosen != exact
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
    assert chosen in asked
    assert asked.count(exact) == 2  # for the clean images, and for the attacked ones
    assert asked[-1] == exact


# ------------------------------------------------------------------------------------- nothing depends on the batches


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("way", [{"twin": True}, {"precision": "bf16"}, {"engine": "auto"}], ids=str)
def test_however_attacks_run_the_model_verdicts_are_its_own(way):
    x, y = held_out()
    net = trained_lenet()
    version = ["apgd-ce", fastadv.FABT(net, EPS, targets=2, steps=5, **way), fastadv.Square(net, EPS, queries=20, **way)]
    found, plain = (evaluate(net, (x, y), EPS, version=version, alarms=False, keep_images=True, **o) for o in (way, {}))
    fooled = net(found.x_adv).argmax(1) != y
    assert fooled.tolist() == [bool(name) for name in found.broken_by]
    assert 0.05 < fooled.double().mean() < 0.95
    assert abs(found.robust_accuracy - plain.robust_accuracy) <= 2 / len(x)


@pytest.mark.parametrize("batch_size", [1, 7, 48, 1000])
def test_batch_sizes_do_not_matter(batch_size):
    x, y = held_out()
    net = trained_lenet()
    assert told(evaluate(net, (x, y), EPS, version=quick(net), alarms=False, batch_size=batch_size)) == nearly(
        told(evaluate(net, (x, y), EPS, version=quick(net), alarms=False))
    )


def test_order_does_not_matter():
    x, y = held_out()
    net = trained_lenet()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    here = evaluate(net, (x, y), EPS, version=quick(net), alarms=False)
    there = evaluate(net, (x[order], y[order]), EPS, version=quick(net), alarms=False)
    assert [here.broken_by[i] for i in order] == there.broken_by
    assert torch.allclose(here.distance[order], there.distance, atol=1e-6)
    other = evaluate(net, (x, y), EPS, version=quick(net, seed=1), alarms=False)
    assert not torch.equal(other.distance, here.distance)  # the seed does matter


def test_batches_as_from_a_loader():
    x, y = held_out()
    net = trained_lenet()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10)
    assert told(evaluate(net, loader, EPS, version=quick(net), alarms=False)) == told(
        evaluate(net, (x, y), EPS, version=quick(net), alarms=False)
    )


# -------------------------------------------------------------------------------------------- interrupted and resumed


def test_it_goes_on_where_it_was(tmp_path):
    x, y = held_out()
    net = trained_lenet()
    whole = evaluate(net, (x, y), EPS, version=quick(net), alarms=False)

    class Interrupted(Square):
        def __call__(self, x, y, samples):
            if Interrupted.left == 0:
                raise KeyboardInterrupt
            Interrupted.left -= 1
            return super().__call__(x, y, samples)

    Interrupted.left, Interrupted.__name__ = 2, "Square"
    options = {"alarms": False, "batch_size": 5, "resume": tmp_path / "here"}
    first, second = quick(net)
    with pytest.raises(KeyboardInterrupt):
        evaluate(net, (x, y), EPS, version=[first, Interrupted(net, EPS, queries=40)], **options)
    kept = {file: file.read_bytes() for file in (tmp_path / "here").glob("*.pt")}
    calls = count_calls(net)
    resumed = evaluate(net, (x, y), EPS, version=[first, second], **options)
    assert told(resumed) == nearly(told(whole))
    assert all(file.read_bytes() == content for file, content in kept.items())
    asked = sum(len(images) for images in calls)
    calls.clear()
    again = evaluate(net, (x, y), EPS, version=[first, second], **options)
    assert (told(again), calls) == (told(resumed), [])
    assert asked < sum(round(r.queries * r.tried) for r in whole.rows)
    net._forward_hooks.clear()


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_evaluate import EPS, held_out, quick, told
from models import lenet
from fastadv import evaluate
net = lenet().eval()
net.load_state_dict(torch.load({weights!r}))
found = evaluate(net, held_out(), EPS, version=quick(net), alarms=False, batch_size=2, resume={folder!r})
print(told(found))
"""


def test_killed_it_loses_a_batch_at_most(tmp_path):
    """SIGKILL, at whatever it is doing once a few records are there; twice."""
    folder = tmp_path / "records"
    torch.save(trained_lenet().state_dict(), weights := tmp_path / "lenet.pt")  # to train it takes longer than to attack it
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder), weights=str(weights))
    for least in (3, 27):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
        while len(list(folder.glob("*.pt"))) < least and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
    survived = {file: file.read_bytes() for file in folder.glob("*.pt")}
    assert len(survived) >= 27
    x, y = held_out()
    net = trained_lenet()
    options = {"version": quick(net), "alarms": False, "batch_size": 2}
    resumed = evaluate(net, (x, y), EPS, resume=folder, **options)
    assert all(file.read_bytes() == content for file, content in survived.items())
    assert told(resumed) == told(evaluate(net, (x, y), EPS, **options))
    assert not list(folder.glob(".*"))[2:]  # what a killed process leaves are at most its two unfinished files


@pytest.mark.parametrize("what", ["eps", "seed", "attacks", "model", "data"])
def test_another_evaluation_is_not_mixed_in(tmp_path, what):
    x, y = held_out(8)
    net, other = trained_lenet(), linear(10, 64)
    evaluate(net, (x, y), EPS, version=quick(net), alarms=False, resume=tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    changed = {
        "eps": lambda: evaluate(net, (x, y), 0.2, version=quick(net), alarms=False, resume=tmp_path),
        "seed": lambda: evaluate(net, (x, y), EPS, version=quick(net), alarms=False, resume=tmp_path, seed=1),
        "attacks": lambda: evaluate(net, (x, y), EPS, version=quick(net)[:1], alarms=False, resume=tmp_path),
        "model": lambda: evaluate(other, (x, y), EPS, version=quick(net), alarms=False, resume=tmp_path),
        "data": lambda: evaluate(net, (x, (y + 1) % 10), EPS, version=quick(net), alarms=False, resume=tmp_path),
    }
    with pytest.raises(ValueError, match=f"holds another evaluation \\(.*{what}: "):
        changed[what]()
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_functions_and_versions_are_told_apart(tmp_path):
    """By name alone a callable is the same before and after its training, and "rand" runs the attacks of a list."""
    x, y = held_out(8)
    net, shift = trained_lenet(), [0.0]

    def model(images):
        return net(images + shift[0])

    evaluate(model, (x, y), EPS, version=["apgd-ce"], alarms=False, resume=tmp_path / "a")
    evaluate(model, (x, y), EPS, version=["apgd-ce"], alarms=False, resume=tmp_path / "a")
    shift[0] = 0.1
    with pytest.raises(ValueError, match="model: "):
        evaluate(model, (x, y), EPS, version=["apgd-ce"], alarms=False, resume=tmp_path / "a")
    evaluate(net, (x, y), EPS, version="rand", alarms=False, resume=tmp_path / "b")
    with pytest.raises(ValueError, match="version: "):
        evaluate(net, (x, y), EPS, version=["apgd-ce", "apgd-dlr"], alarms=False, resume=tmp_path / "b")
    steps = PGD(net, EPS, steps=2), PGD(net, EPS, steps=2, keep_best=True)
    evaluate(net, (x, y), EPS, version=steps[:1], alarms=False, resume=tmp_path / "c")
    with pytest.raises(ValueError, match=r"attacks: .*keep_best=True"):
        evaluate(net, (x, y), EPS, version=steps[1:], alarms=False, resume=tmp_path / "c")


def test_images_are_on_disk_and_in_memory_only_if_asked_for(tmp_path):
    x, y = held_out(8)
    net = trained_lenet()
    without = evaluate(net, (x, y), EPS, version=quick(net), alarms=False, resume=tmp_path)
    with_images = evaluate(net, (x, y), EPS, version=quick(net), alarms=False, resume=tmp_path, keep_images=True)
    assert without.x_adv is None
    assert told(with_images) == told(without)
    assert torch.equal(net(with_images.x_adv).argmax(1) != y, torch.tensor([bool(name) for name in with_images.broken_by]))


def test_a_damaged_record_is_named(tmp_path):
    x, y = held_out(8)
    net = trained_lenet()
    evaluate(net, (x, y), EPS, version=quick(net), alarms=False, resume=tmp_path)
    record = min(tmp_path.glob("*.pt"))
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{record.name} is no record of an evaluation, remove it and go on"):
        evaluate(net, (x, y), EPS, version=quick(net), alarms=False, resume=tmp_path)
    record.unlink()
    evaluate(net, (x, y), EPS, version=quick(net), alarms=False, resume=tmp_path)


def test_the_header_says_what_is_evaluated(tmp_path):
    x, y = held_out(8)
    net = trained_lenet()
    evaluate(net, (x, y), EPS, version=quick(net), alarms=False, resume=tmp_path)
    header = json.loads((tmp_path / "evaluation.json").read_text())
    assert header["eps"] == EPS
    assert "APGD(eps=0.12, steps=4" in header["attacks"]["apgd"][0]


# ---------------------------------------------------------------------------------------------------- several processes


def of_two(rank: int, port: int, net: nn.Module, folder: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    calls = count_calls(net)
    for resume in (None, folder):
        found = evaluate(net, held_out(), EPS, version=quick(net), alarms=False, batch_size=6, resume=resume, progress=False)
        results[rank, resume] = told(found), sum(map(len, calls))
        calls.clear()
    dist.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path):
    """Also where they keep what they find."""
    x, y = held_out()
    net = trained_lenet()
    calls = count_calls(net)
    alone = told(evaluate(net, (x, y), EPS, version=quick(net), alarms=False))
    net._forward_hooks.clear()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(of_two, (port, net, folder := str(tmp_path / "records"), results), nprocs=2)
        found = dict(results)
    for resume in (None, folder):
        (first, asked), (second, asked_too) = found[0, resume], found[1, resume]
        assert first == second == nearly(alone)
        assert max(asked, asked_too) < 0.75 * sum(map(len, calls))  # each did a part


# ------------------------------------------------------------------------------------------------ versions and classes


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes(classes):
    """The reference crashes below ten, or below four."""
    margin = 0.02 if classes == 2 else 0.01
    x, net = batch(6, classes)[0].clamp(margin, 1 - margin), linear(classes)
    y = net(x).argmax(1)
    found = evaluate(net, (x, y), margin, alarms=False)
    assert [row.attack for row in found.rows] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    w = net[1].weight
    z = net(x)
    gap = z.gather(1, y[:, None]) - z
    reach = margin * torch.stack([(w - w[label]).abs().sum(1) for label in y])  # what a linf move can do to a linear margin
    beatable = ((reach > gap) & (torch.arange(classes) != y[:, None])).any(1)
    assert [bool(name) for name in found.broken_by] == beatable.tolist()
    assert 0 < beatable.sum() < 6


def test_the_published_settings():
    from fastadv.evaluation.protocol import _attacks

    net = linear()
    once, five = {"restarts": 1}, {"restarts": 5}
    full, targets = {"steps": 100}, {"targets": 9, "restarts": 1}
    square, l1 = {"queries": 5000}, {"multi_eps": True}
    published = {
        ("standard", "linf"): {
            "apgd-ce": {"loss": "ce"} | full | once, "apgd-t": targets | full, "fab-t": targets | full, "square": square,
        },
        ("standard", "l1"): {"apgd-ce": five | l1, "apgd-t": once | l1 | {"targets": 5}, "fab-t": targets, "square": square},
        ("plus", "l2"): {
            "apgd-ce": five, "apgd-dlr": {"loss": "dlr"} | five, "fab": five, "square": square, "apgd-t": targets,
            "fab-t": targets,
        },
        ("rand", "linf"): {"apgd-ce": full | once, "apgd-dlr": {"loss": "dlr"} | once},
    }  # fmt: skip
    for (version, norm), expected in published.items():
        attacks = _attacks(net, version, 0.1, norm, (0, 1), 0)
        assert list(attacks) == list(expected)
        for name, settings in expected.items():
            assert {key: getattr(attacks[name], key) for key in settings} == settings
            assert (attacks[name].eps, attacks[name].norm) == (0.1, norm)


def test_rand_judges_the_mean_of_a_randomised_model():
    x, y = held_out(12)
    net = trained_lenet()

    def randomised(images):
        return net(images) + 8 * torch.randn(len(images), 10)

    torch.manual_seed(0)
    found = evaluate(randomised, (x, y), 0.05, version="rand", alarms=False)
    once = (randomised(x).argmax(1) == y).float().mean()
    assert found.clean_accuracy > once + 0.1
    assert [row.attack for row in found.rows] == ["apgd-ce", "apgd-dlr"]


def test_pgd_among_the_attacks():
    x, y = held_out()
    net = trained_lenet()
    found = evaluate(net, (x, y), EPS, version=["apgd-ce", PGD(net, EPS, steps=5), PGD(net, EPS, steps=5)], alarms=False)
    assert [row.attack for row in found.rows] == ["apgd-ce", "pgd", "pgd'"]
    assert found.rows[1].tried == found.rows[0].tried - found.rows[0].broken


# -------------------------------------------------------------------------------------------------------------- alarms


def alarms_of(found) -> dict:
    return {alarm.name: alarm for alarm in found.alarms}


def test_square_is_compared_with_all_gradients_before_it(monkeypatch):
    monkeypatch.setattr(protocol, "sanity_checks", lambda *_, **__: [])  # the other alarms
    x, y = held_out(16)
    net = trained_lenet()
    after, before = quick(net), quick(net)[::-1]
    name = "Square beats white-box"
    compared = alarms_of(evaluate(net, (x, y), EPS, version=after))[name]
    assert not compared.rings
    assert name not in alarms_of(evaluate(net, (x, y), EPS, version=before))
    masked = Rounded(net)
    assert alarms_of(evaluate(masked, (x, y), EPS, version=quick(masked)))[name].rings


def test_a_randomised_model_is_trusted_under_rand(monkeypatch, quick_alarms):
    monkeypatch.setattr(protocol, "RUNS", 3)  # whose mean is as random as that of 20
    x, y = held_out(8)
    net = trained_lenet()

    def randomised(images):
        return net(images) + 0.1 * torch.randn(len(images), 10)

    torch.manual_seed(0)
    names = {"randomised model"}
    assert names <= {alarm.name for alarm in evaluate(randomised, (x, y), EPS, version=["apgd-ce"]).alarms if alarm.rings}
    found = evaluate(randomised, (x, y), EPS, version="rand")
    assert not names & set(alarms_of(found))
    assert not alarms_of(found)["probabilities instead of logits"].rings


class Rounded(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((8 * x).round() / 8)


# ----------------------------------------------------------------------------------------------------------- contracts


def test_the_model_and_the_surroundings_are_left_as_found():
    x, y = batch(8)
    net = cnn().train()
    before, around = state(net), surroundings()
    evaluate(net, (x, y), 0.05, version=quick(net, eps=0.05))
    assert state(net) == before
    assert surroundings() == around


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": -1}, "eps must be a finite number >= 0; got -1"),
        ({"eps": None}, "eps must be a finite number"),
        ({"norm": "l7"}, "norm must be one of"),
        ({"version": "best"}, "version must be one of 'standard', 'plus', 'rand', 'quick'; got 'best'"),
        ({"version": ["apgd"]}, "version must be one of 'apgd-ce'"),
        ({"version": []}, "version must be a name or a list of at least one attack"),
        ({"version": [print]}, "version must list names of attacks or fastadv.Attack objects"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"surrogate": "net"}, "surrogate must be callable"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"bounds": (0, 0.5)}, "x must lie in bounds"),
        ({"data": torch.rand(3, 4)}, "data must be a pair"),
        ({"data": []}, "data must hold at least one batch"),
        ({"data": [torch.rand(3)]}, r"data must give batches \(x, y\)"),
        ({"data": (torch.rand(0, 3), torch.zeros(0, dtype=torch.int64))}, "at least one sample"),
        ({"data": (torch.rand(2, 3), torch.rand(2, 5))}, "y must be integer labels"),
        ({"data": (torch.rand(2, 3, 8, 8), torch.tensor([0, 10]))}, r"y must be labels in \[0, 10\)"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    x, y = batch(4)
    with pytest.raises(ValueError, match=message):
        evaluate(linear(), **{"data": (x, y), "eps": 0.1, "alarms": False, "resume": tmp_path / "new"} | arguments)
