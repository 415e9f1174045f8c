"""Whether the site hangs together: links and anchors lead somewhere, nothing comes from the network, and the API has every
public name. Warns, which ends a strict build."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

log = logging.getLogger("mkdocs.hooks.check")


def on_post_build(config: Any, **_: Any) -> None:
    import fastadv

    parts = (fastadv.analysis, fastadv.certify, fastadv.evaluation, fastadv.objectives)
    for problem in problems(Path(config.site_dir), {*fastadv.__all__}.union(*(part.__all__ for part in parts))):
        log.warning(problem)


def problems(site: Path, names: Iterable[str] = ()) -> Iterator[str]:
    """One line for each link that leads nowhere, each thing from the network, and each name that the API does not have."""
    pages = {path: _read(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}  # which has a server
    api = {name for path, page in pages.items() if path.parent == site / "api" for name in page.anchors | page.codes}
    for name in sorted({*names} - {name.rpartition(".")[2] for name in api}):
        yield f"the API does not have {name}"
    for path, page in pages.items():
        where = path.relative_to(site).as_posix()
        for url in page.loaded:
            if urlsplit(url).netloc:
                yield f"{where} loads {url} from the network"
        for url in page.links + page.loaded:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                yield f"{where} links to {url}, which is no file"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{where} links to {url}, which is no anchor there"


class _Page(HTMLParser):
    """What a page links to, loads, offers as anchors, and sets as code."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.codes: set[str] = set()

    def handle_data(self, data: str) -> None:
        if self.lasttag == "code":
            self.codes.add(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(given["href"])
        elif "src" in given and not given["src"].startswith("data:"):
            self.loaded.append(given["src"])


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page
