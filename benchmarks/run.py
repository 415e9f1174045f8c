"""Measures cases one after the other. Whatever ends that, the file and the table hold what was finished."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import report, timing

Record = dict[str, Any]


def run(
    cases: Sequence[timing.Case],
    content: dict[str, Any],
    plan: timing.Plan,
    device: torch.device,
    clock: str,
    path: Path | None = None,
    seconds: float | None = None,
    complete: Callable[[Record], None] = lambda record: None,
) -> bool:
    """Adds to ``content["cases"]`` and, after each case, writes ``content`` to ``path``; whether all cases were finished.

    ``complete`` may add to a record. An interrupt, the end of ``seconds`` or a broken device is no error but the end.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the caller has it ignored: gpu.sh stops us so
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    content["cases"], at = [], ""
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds or 0)  # 0: never
        for i, case in enumerate(cases, 1):
            at = f"[{i}/{len(cases)}] {case.name}"
            print(at, file=sys.stderr, flush=True)
            record = report.record(case, _results(case, plan, device), clock)
            complete(record)
            content["cases"].append(record)
            save(content, path)
    except (KeyboardInterrupt, RuntimeError) as reason:  # on a GPU one contender's bad access ends all that follows
        content["stopped"] = f"{reason!r} in {at}"
        save(content, path)
        print(f"stopped, and the table holds what was finished: {content['stopped']}", file=sys.stderr)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "stopped" not in content


def _results(case: timing.Case, plan: timing.Plan, device: torch.device) -> dict[str, timing.Result]:
    try:
        return timing.measure(case, plan, device)
    except torch.OutOfMemoryError:  # of one contender alone it is that one's; the other cases may fit
        return dict.fromkeys(case.contenders, timing.Result(absent="the contenders together do not fit the device's memory"))


def save(content: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
