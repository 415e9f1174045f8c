"""The documents are true: every Python block runs, links lead somewhere, the two commands are the real ones.

Pages with figures are run by the build of the site (docs/hooks/figures.py), which has checks of its own.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch

import fastadv
from benchmarks import readme

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def is_drawn(page: Path) -> bool:
    return re.search('^```python figure="', page.read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python") and not is_drawn(p)], ids=lambda p: p.name)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    """All blocks of a page are one program, as a reader pastes them."""
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks(page, "python")))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("error")
        runpy.run_path(str(program), run_name="__main__")


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "py")], ids=lambda p: p.name)
def test_blocks_of_other_libraries_are_python(page):
    """What ```py holds is shown and not run, for it needs packages that nobody has."""
    for block in blocks(page, "py"):
        ast.parse(block)


def test_the_example_of_pretraining_runs(capsys):
    from fastadv import demo

    digits = demo.load_digits()
    example = runpy.run_path(str(ROOT / "examples" / "pretraining.py"))["main"]
    few = demo.Digits(*(t[:100] for t in digits))
    example.__globals__.update(PRETRAINING=1, FINE_TUNING=1, load_digits=lambda: few)
    example()
    assert re.fullmatch(
        r"from scratch +clean [\d.]+% +PGD-20 [\d.]+%\nadversarially pre-trained clean [\d.]+% +PGD-20 [\d.]+%\n",
        capsys.readouterr().out,
    )


def test_every_objective_has_its_row():
    page = (ROOT / "docs" / "methods.md").read_text()
    for name in (*fastadv.objectives.__all__, "AWP", "RWP"):
        found = getattr(fastadv, name)
        if isinstance(found, type) and found not in (fastadv.Objective, fastadv.Output):
            home = found.__module__.removeprefix("fastadv.").replace(".", "/")
            assert f"../fastadv/{home}.py" in page, f"docs/methods.md does not link the file of {name}"
            assert name in page


def test_every_alarm_is_told_of():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    x, y = torch.rand(6, 1, 2, 2), torch.arange(6) % 3
    found = fastadv.evaluate(model, (x, y), eps=0.1, version=["square"], surrogate=model, progress=False)
    page = (ROOT / "docs" / "honest.md").read_text()
    square = fastadv.evaluation.alarms.square_beats_white_box(y > 0, y > 0, 0.0)  # of whom there were no attacks before
    for name in [alarm.name for alarm in (*found.alarms, square)]:
        assert f"`{name}`" in page, f"docs/honest.md says nothing of {name!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_has_the_two_commands():
    commands = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    assert 'pip install -c constraints.txt -e ".[demo]" && fastadv demo' in commands
    assert 'pip install -c constraints.txt -e ".[test]" && pytest -n auto --dist loadfile' in commands


def test_every_public_name_is_documented():
    for name in fastadv.__all__:
        if not name.startswith("_"):
            assert (getattr(fastadv, name).__doc__ or "").strip(), f"fastadv.{name} has no docstring"
    steps = (*fastadv.ops.STEPS, *(f"{step}_" for step in (*fastadv.ops.STEPS, *fastadv.ops.UPDATES)))
    for name in (*steps, *fastadv.ops.STARTS, *fastadv.ops.LOSSES, "weight_sums", "perturb_", "restore_"):
        assert getattr(fastadv.ops, name).__doc__


def test_the_changelog_knows_this_version():
    assert f"## {fastadv.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_speed_table_is_that_of_its_result_file():
    """The README's figures are rendered from a kept result, by the script that its marker names."""
    told = (ROOT / "README.md").read_text().partition(readme.START)[2].partition(readme.END)[0].strip()
    (path,) = set(re.findall(r"benchmarks/results/[\w.-]+\.json", told))
    assert told == readme.section(ROOT / path)


def test_the_check_of_the_site_sees_what_is_wrong(tmp_path):
    pages = {
        "index.html": '<h1 id="top">a</h1> <a href="#top">b</a> <a href="api/a.html#fastadv.PGD">c</a>'
        ' <a href="https://x.org">d</a>',
        "api/a.html": '<h2 id="fastadv.PGD">a</h2> <img src="data:image/png;base64,AA=="> <a href="../index.html">b</a>'
        " <code>pgd</code>",
        "bad.html": '<a href="gone.html">a</a> <a href="index.html#gone">b</a> <script src="https://cdn.org/x.js"></script>',
    }
    (tmp_path / "api").mkdir()
    for name, page in pages.items():
        (tmp_path / name).write_text(page)
    spec = importlib.util.spec_from_file_location("check", ROOT / "docs" / "hooks" / "check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    assert [problem.split(", ")[0] for problem in check.problems(tmp_path, ["PGD", "pgd", "AWP"])] == [
        "the API does not have AWP",
        "bad.html loads https://cdn.org/x.js from the network",
        "bad.html links to gone.html",
        "bad.html links to index.html#gone",
    ]
