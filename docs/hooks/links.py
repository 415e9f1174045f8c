"""What a page links to outside docs/ becomes a part of the site.

The pages are read on GitHub, too, so they link to files of the repository by relative paths. In the site such a file lies below
source/: Markdown is rendered, and what is linked there follows; code is shown; the rest is copied as it is.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)\s#]+)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".h": "cpp"}
SHOWN = "---\ntitle: {path}\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n# {path}\n\n````` {language}\n{text}\n`````\n"

pages: dict[str, str] = {}  # where each lies in the site, by its path in the repository


def on_files(files: Any, config: Any) -> None:
    pages.clear()
    pages.update({f"docs/{page.src_uri}": page.src_uri for page in files.documentation_pages()})
    waiting = list(pages)
    while waiting:
        home = waiting.pop()
        for target in LINK.findall((ROOT / home).read_text(encoding="utf-8")):
            path = repository_path(home, target)
            if path in pages or path.startswith(("docs/", "..")) or not (ROOT / path).is_file():
                continue
            files.append(_outside(path, config))
            pages[path] = _uri(path)
            if path.endswith(".md"):
                waiting.append(path)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    home = next(path for path, uri in pages.items() if uri == here)

    def in_site(link: re.Match[str]) -> str:
        uri = pages.get(repository_path(home, link[1]))
        return link[1] if uri is None else posixpath.relpath(uri, posixpath.dirname(here))

    return LINK.sub(in_site, markdown) if home.endswith(".md") else markdown


def repository_path(home: str, target: str) -> str:
    """What a link means on a page of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(home), target))


def _uri(path: str) -> str:
    return f"source/{path}.md" if Path(path).suffix in LANGUAGES else f"source/{path}"


def _outside(path: str, config: Any) -> Any:
    from mkdocs.structure.files import File

    if language := LANGUAGES.get(Path(path).suffix):
        text = (ROOT / path).read_text(encoding="utf-8").rstrip()
        return File.generated(config, _uri(path), content=SHOWN.format(path=path, language=language, text=text))
    return File.generated(config, _uri(path), abs_src_path=str(ROOT / path))
