"""``python -m benchmarks.readme FILE``: writes the README's speed table from a result file; no number is typed by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- table: made by `python -m benchmarks.readme`, do not edit -->", "<!-- end of table -->"


def main() -> int:
    path = Path(sys.argv[1]).resolve()
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{START}\n{section(path)}\n{END}{after}")
    return 0


def section(path: Path) -> str:
    """The table of a result file, with where and how it was measured."""
    result = json.loads(path.read_text())
    env = result["environment"]
    rows = [row for case in result["cases"] if (row := _row(case)) is not None]
    return "\n".join(
        [
            f"{env['device']}, {env['threads']} thread, torch {env['torch']}, fastadv at commit {env['commit'][:10]}"
            f"{' with local changes' if env['dirty'] else ''}, {env['date'][:10]}. Medians of interleaved rounds in one "
            "process; the others' figures are their time over fastadv's: below 1, fastadv loses.",
            "",
            "| case | fastadv | the others, times as long |",
            "|---|---|---|",
            *rows,
            "",
            f"All figures, quartiles and versions: [{path.name}]({path.relative_to(ROOT).as_posix()}).",
        ]
    )


def _row(case: dict[str, Any]) -> str | None:
    times = {c["name"]: c for c in case["contenders"] if "wall" in c}
    ours = times.pop("fastadv", None)
    if ours is None:
        return None
    others = ", ".join(f"{name} **{c['over fastadv']:.2f}**" for name, c in times.items() if "over fastadv" in c)
    milliseconds = 1e3 * ours["wall"]["median"]
    return f"| {case['case']} | {milliseconds:.3g} ms | {others} |"


if __name__ == "__main__":
    sys.exit(main())
