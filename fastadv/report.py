"""One self-contained HTML page of text, tables and matplotlib figures, and the same as Markdown.

No scripts, nothing loaded from anywhere, light and dark, phone and desktop. Figures become inline SVG; what matplotlib
draws in black (its default for text and axes) and on no background takes the page's own colours.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --soft: #59636e; --line: #d1d9e0; --note: #fff3cd }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --paper: #14171b; --soft: #9aa4af; --line: #343b43; --note: #4a3c10 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 66rem; color: var(--ink); background: var(--paper);
       font: 1rem/1.55 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2 }
h2 { margin: 2.2rem 0 0.6rem; font-size: 1.3rem; line-height: 1.3 }
p { margin: 0.6rem 0; max-width: 46rem }
.subtitle, figcaption { color: var(--soft) }
.note { padding: 0.6rem 0.9rem; border-radius: 0.4rem; background: var(--note) }
.headline { display: flex; flex-wrap: wrap; gap: 0.8rem 3rem; margin: 1.6rem 0 1rem }
.headline p { margin: 0; display: flex; flex-direction: column }
.headline b { font-size: 2.6rem; line-height: 1.15; font-variant-numeric: tabular-nums }
.headline small { color: var(--soft) }
ul { margin: 0.6rem 0; padding-left: 1.2rem; max-width: 46rem }
li { margin: 0.25rem 0 }
pre { margin: 0.6rem 0; padding: 0.6rem 0.9rem; border: 1px solid var(--line); border-radius: 0.4rem; white-space: pre-wrap }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 0.35rem 0.9rem 0.35rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th:last-child, td:last-child { padding-right: 0 }
th.number, td.number { text-align: right; white-space: nowrap }
figure { display: inline-block; vertical-align: top; margin: 0.9rem 1.5rem 0.9rem 0; max-width: 100% }
figure.table { display: block; max-width: 100% }
.scroll { overflow-x: auto }
figure svg { display: block; width: 100%; height: auto; fill: currentColor }
figcaption { margin-top: 0.4rem; max-width: 46rem; font-size: 0.9rem }
"""

NUMBER = re.compile(r"[-+]?[\d.,]+( to [\d.,]+)? ?(%|us|ms|s|min|h|x)?")  # columns of such cells are set flush right


class Report:
    """Collects the parts of a page in order, then writes it: ``Report("Title").text("...").write("report.html")``.

    All text is plain text and is escaped.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self._figures = 0
        self._parts: list[tuple[str, str]] = []  # each as HTML and as Markdown
        self._add(f"<h1>{html.escape(title)}</h1>", f"# {_marked(title)}")
        if subtitle:
            self._add(f'<p class="subtitle">{html.escape(subtitle)}</p>', _marked(subtitle))

    def heading(self, text: str) -> Report:
        return self._add(f"<h2>{html.escape(text)}</h2>", f"## {_marked(text)}")

    def text(self, text: str) -> Report:
        """A paragraph."""
        return self._add(f"<p>{html.escape(text)}</p>", _marked(text))

    def note(self, text: str) -> Report:
        """A paragraph that must not be missed."""
        return self._add(f'<p class="note" role="note">{html.escape(text)}</p>', f"> **{_marked(text)}**")

    def headline(self, numbers: Sequence[tuple[str, str, str]]) -> Report:
        """Large numbers side by side: of each its name, itself, and a word on it."""
        cells = [tuple(map(html.escape, number)) for number in numbers]
        shown = "".join(f"<p>{name} <b>{value}</b> <small>{word}</small></p>" for name, value, word in cells)
        lines = [f"- {_marked(name)}: **{_marked(value)}** {_marked(word)}".rstrip() for name, value, word in numbers]
        return self._add(f'<div class="headline">{shown}</div>', "\n".join(lines))

    def list(self, items: Sequence[str]) -> Report:
        shown = "".join(f"<li>{html.escape(item)}</li>" for item in items)
        return self._add(f"<ul>{shown}</ul>", "\n".join(f"- {_marked(item)}" for item in items))

    def code(self, text: str) -> Report:
        return self._add(f"<pre><code>{html.escape(text)}</code></pre>", f"```\n{text}\n```")

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> Report:
        """A table with its caption below; cells are shown by ``str``, columns of numbers flush right. Headers may be []."""
        cells = [[str(cell) for cell in row] for row in rows]
        numeric = [all(map(NUMBER.fullmatch, column)) for column in zip(*cells, strict=True)] or [False] * len(headers)
        head = f"<thead>{_row('th', headers, numeric)}</thead>\n" if headers else ""
        body = "\n".join(_row("td", row, numeric) for row in cells)
        rule = ["---:" if number else "---" for number in numeric]
        lines = [f"| {' | '.join(row)} |" for row in [[*map(_marked, headers or [""] * len(numeric))], rule]]
        lines += [f"| {' | '.join(map(_marked, row))} |" for row in cells]
        return self._add(
            f'<figure class="table"><div class="scroll"><table>\n{head}<tbody>\n{body}\n</tbody></table></div>'
            f"{_caption(caption)}</figure>",
            "\n".join(lines) + (f"\n\n{_marked(caption)}" if caption else ""),
        )

    def figure(self, fig: Figure, caption: str, alt: str) -> Report:
        """A matplotlib figure; ``alt`` says in words what it shows. Narrow neighbours stand side by side on a wide page."""
        self._figures += 1
        svg = inline_svg(fig, alt, prefix=f"figure{self._figures}-")
        width = fig.get_figwidth() * 96  # CSS pixels to the inch
        return self._add(f'<figure style="width: {width:.0f}px">{svg}{_caption(caption)}</figure>', _marked(f"{alt} {caption}"))

    def html(self) -> str:
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
            + "\n".join(page for page, _ in self._parts)
            + "\n</body>\n</html>\n"
        )

    def markdown(self) -> str:
        """The same for a terminal or an issue; figures in the words of their ``alt``."""
        return "\n\n".join(text for _, text in self._parts) + "\n"

    def write(self, path: str | Path) -> Path:
        """Writes the page in one piece: whoever looks sees the old file or the new one, never a part."""
        page = self.html()
        write_text(path, page)
        return Path(path)

    def _add(self, page: str, markdown: str) -> Report:
        self._parts.append((page, markdown))
        return self


def new_figure(width: float, height: float) -> Figure:
    """In inches. Made directly and not by pyplot, which would choose a backend for the whole process."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def chart(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """To be drawn in, and then :func:`finished`."""
    figure = new_figure(4.8, 3.4)
    axis = figure.subplots()
    axis.set(xlabel=x_label, ylabel=y_label)
    return figure, axis


def finished(figure: Figure, axis: Axes, percent: bool) -> Figure:
    """Scale, grid and legend, once all lines are drawn."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis.set_ylim(*((-0.03, 1.03) if percent else (0, None)))
    if percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    if axis.get_xlabel() == "epoch":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)
    return figure


def _marked(text: str) -> str:
    """Plain text in Markdown."""
    return re.sub(r"([\\`*<|])", r"\\\1", text)


def _row(tag: str, cells: Sequence[str], numeric: Sequence[bool]) -> str:
    css = [' class="number"' if number else "" for number in numeric]
    return f"<tr>{''.join(f'<{tag}{c}>{html.escape(cell)}</{tag}>' for cell, c in zip(cells, css, strict=True))}</tr>"


def _caption(text: str) -> str:
    return f"<figcaption>{html.escape(text)}</figcaption>" if text else ""


def inline_svg(fig: Figure, alt: str, prefix: str) -> str:
    """The figure as an <svg> element fit to stand among others inside an HTML page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "fastadv"}):  # same look, same bytes everywhere
        fig.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # no XML declaration inside HTML
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids are per page in HTML, and matplotlib gives every figure the same ones.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = svg.replace("#000000", "currentColor")
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    start = f'<svg viewBox="{box[1]}" role="img" aria-label="{html.escape(alt)}">'
    return start + svg[svg.index(">") + 1 :].strip()
