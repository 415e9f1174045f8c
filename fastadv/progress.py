"""A progress bar for long work: tqdm's where it is installed, else none."""

from __future__ import annotations

from types import TracebackType
from typing import Any


def progress_bar(title: str, total: int, unit: str, shown: bool = True) -> Any:
    """A tqdm bar on standard error; silent where that is not a terminal, without tqdm, or unless ``shown``."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _Silent()
    return tqdm(total=total, desc=title, unit=unit, disable=None if shown else True, dynamic_ncols=True)


class _Silent:
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def update(self, n: int = 1) -> None:
        pass

    def set_postfix_str(self, text: str) -> None:
        pass
