"""The record of a run: a table of its epochs in summary.csv, alarms.json beside it, and TensorBoard where that is installed."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import replacing, write_text

TABLE, ALARMS, BOARD = "summary.csv", "alarms.json", "tensorboard"


class Log:
    """Written after each epoch, files whole or not at all; ``folder`` None writes nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._board: Any = None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, history: Sequence[dict[str, Any]], alarms: dict[str, str]) -> None:
        """The whole history: what an interrupted run had written beyond its last checkpoint goes."""
        if self.folder is None:
            return
        columns = list(dict.fromkeys(name for row in history for name in row))
        with replacing(self.folder / TABLE) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(history)
        write_text(self.folder / ALARMS, json.dumps(alarms, indent=1))
        self._show(history[-1])

    def _show(self, row: dict[str, Any]) -> None:
        assert self.folder is not None
        if self._board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._board = _NoBoard()
            else:
                self._board = SummaryWriter(str(self.folder / BOARD), purge_step=row["step"])
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("epoch", "step"):
                self._board.add_scalar(name, value, row["step"])
        self._board.flush()


class _NoBoard:
    def add_scalar(self, name: str, value: float, step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def read(folder: Path) -> tuple[list[dict[str, float]], dict[str, str]]:
    """The table and the alarms of a run; what is empty in the table is left out of its row."""
    with (folder / TABLE).open(newline="", encoding="utf-8") as file:
        rows = [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]
    return rows, json.loads((folder / ALARMS).read_text(encoding="utf-8"))
