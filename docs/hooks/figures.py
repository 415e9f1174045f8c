"""Figures that the build draws.

On a page with a block ```python figure="What it shows" all blocks of Python run in order, as one program. Such a block ends
with an expression, a figure of matplotlib or a finding of fastadv.analysis, which is shown below it, in the page's colours; a
finding says below that what came out.

The programs run in a folder where ``fastadv demo`` has been, or so it seems: its two networks come from a shorter training.
What was drawn is kept, in .cache/docs, until the page, fastadv or the benchmarks change.
"""

from __future__ import annotations

import ast
import hashlib
import html
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "docs"
BLOCK = re.compile(r'^```python(?: figure="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
EPOCHS = {"standard": 3, "robust": 5}  # of training: half a minute on one core

log = logging.getLogger("mkdocs.hooks.figures")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str | None:
    if not any(alt for alt, _ in BLOCK.findall(markdown)):
        return None
    page.meta["figures"] = _drawn(page.file.name, markdown)
    number = iter(range(len(page.meta["figures"])))

    def with_place(block: re.Match[str]) -> str:
        shown = f"```python\n{block[2]}```"
        return shown if block[1] is None else f'{shown}\n\n<div data-figure="{next(number)}"></div>'

    return BLOCK.sub(with_place, markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    for number, figure in enumerate(page.meta.get("figures", [])):
        content = content.replace(f'<div data-figure="{number}"></div>', figure)
    return content


def _drawn(name: str, markdown: str) -> list[str]:
    """The figures of a page as HTML, from the cache where nothing has changed since."""
    digest = hashlib.sha256(markdown.encode())
    read = [
        Path(__file__),
        *ROOT.glob("fastadv/**/*.py"),
        *ROOT.glob("benchmarks/plots.py"),
        *ROOT.glob("benchmarks/results/*"),
    ]
    for path in sorted(read):
        digest.update(path.read_bytes())
    kept = CACHE / f"{name}-{digest.hexdigest()[:16]}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    CACHE.mkdir(parents=True, exist_ok=True)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    start = time.perf_counter()
    with _inside(CACHE):
        if "fastadv-demo/" in markdown:
            _demo(Path("fastadv-demo"))
        shutil.rmtree("runs", ignore_errors=True)  # of an earlier build, which would be gone on with
        figures = _run(name, markdown)
    log.info("%s: %d figures in %.0f s", name, len(figures), time.perf_counter() - start)
    for old in CACHE.glob(f"{name}-*.json"):
        old.unlink()
    kept.write_text(json.dumps(figures), encoding="utf-8")
    return figures


def _run(name: str, markdown: str) -> list[str]:
    names: dict[str, Any] = {"__name__": "__main__"}
    figures: list[str] = []
    for alt, code in BLOCK.findall(markdown):
        start = time.perf_counter()
        value = _value(code, names)
        if alt:
            figures.append(_shown(value, alt, f"figure{len(figures)}-"))
            log.info("%s: figure %d in %.1f s", name, len(figures), time.perf_counter() - start)
    return figures


def _value(code: str, names: dict[str, Any]) -> Any:
    """Runs a block; what its last line is worth, if that is an expression."""
    program = ast.parse(code)
    last = program.body.pop() if isinstance(program.body[-1], ast.Expr) else None
    exec(compile(program, "<block>", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "<block>", "eval"), names)


def _shown(value: Any, alt: str, prefix: str) -> str:
    from matplotlib.figure import Figure

    from fastadv.report import inline_svg

    figure, caption = (value, alt) if isinstance(value, Figure) else (value.figure(), str(value))
    width = 96 * figure.get_figwidth()  # CSS pixels to the inch
    return (
        f'<figure class="drawn" style="max-width: {width:.0f}px">{inline_svg(figure, alt, prefix)}'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _demo(folder: Path) -> None:
    """The networks that ``fastadv demo`` leaves. They are kept: who wants others deletes the folder."""
    from fastadv import demo

    if (folder / "robust.pt").exists():
        return
    folder.mkdir(exist_ok=True)
    start = time.perf_counter()
    digits = demo.load_digits()
    for name, train in (("standard", demo.train_standard), ("robust", demo.train_robust)):
        model = demo.build_network()
        train(model, digits, EPOCHS[name], 0, [])
        demo.save(model, folder / f"{name}.pt", "pgd-at", 0)
    log.info("trained the demo's networks in %.0f s", time.perf_counter() - start)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
