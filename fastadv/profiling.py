"""Where an attack's time goes: the model's forward, its backward, everything else.

The engine marks the stretches of an attack's work that are the model's (:func:`fastadv.engine.passes.mark`); whoever listens
to these marks can say what the rest costs.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .attacks import PGD
from .engine import passes
from .files import write_text

WARM_UP = 2  # calls: the engine has its plan from the second with inputs of some kind on
CALLS = 5  # odd, for the median

REST = "everything else"
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Profile:
    """Where the time of one call of an attack goes; what :func:`profile` returns. ``print`` shows the table.

    Attributes:
        of: what was measured, in words.
        seconds: of one call, by row of the table; the rows share out the whole call.
        steps: gradient steps of one call.
        trace: a Chrome trace, as JSON (:meth:`save_trace`).
    """

    of: str
    seconds: dict[str, float]
    steps: int
    trace: str = field(repr=False)

    @property
    def total(self) -> float:
        """Seconds of one call."""
        return sum(self.seconds.values())

    @property
    def overhead(self) -> float | None:
        """Share of the time that is not the model's, 0 to 1; None where steps are replayed and cannot be taken apart.

        Of a compiled attack the loss counts as the model's, into whose kernels it was compiled.
        """
        return None if "replayed step" in self.seconds else self.seconds[REST] / self.total

    @property
    def table(self) -> str:
        """The rows with their milliseconds of a call, share, and milliseconds by step."""
        eager = "model backward" in self.seconds  # else the loss and the step may be in other rows
        names = {REST: f"{REST} (loss, step, checks)"} if eager else {}
        width = max(len(names.get(row, row)) for row in self.seconds)
        lines = [self.of, f"{'':{width}} {'ms/call':>10} {'share':>7} {'ms/step':>10}"]
        for row, seconds in (*self.seconds.items(), ("total", self.total)):
            figures = f"{1e3 * seconds:10.3f} {seconds / self.total:7.1%} {1e3 * seconds / self.steps:10.4f}"
            lines.append(f"{names.get(row, row):{width}} {figures}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table

    def save_trace(self, path: str | Path) -> Path:
        """Writes the trace of one call, for chrome://tracing or https://ui.perfetto.dev; folders are made.

        It shows every operator and kernel under the rows of the table, and is slower than the table for that.
        """
        write_text(path, self.trace)
        return Path(path)


def profile(attack: PGD, x: Tensor, y: Tensor | None = None) -> Profile:
    """A table and a Chrome trace of where an attack's time goes: ``print(fastadv.profile(attack, x, y))``.

    The rows are "model forward", "model backward" and "everything else": start, loss, step, checks. A compiled attack has
    one row for the first two and the loss, "model forward and backward, compiled". A CUDA graph is a single thing to the host,
    which cannot look inside, so where steps are replayed there is one row for all of a step, "replayed step". What such an
    attack does beside its steps, the forward pass that ends ``keep_best`` for one, has the eager rows.

    Calls the attack eight times: twice until its engine has settled, five times for the table, which has each row's median,
    and once under torch's profiler, which slows small models too much to be trusted with the table, for the trace. Times
    are of the wall clock on a CPU. On a GPU they are of its stream, unsynchronised: a wait for a host that does not keep up
    counts for the row that it falls into. Random generators, ``attack.info``, ``attack.stats`` (and running statistics under
    bn "train") are as after eight calls.

    Args:
        attack: a :class:`fastadv.PGD`.
        x: as the attack takes it, at least one image.
        y: likewise.

    Raises:
        ValueError: attack is something else, x is empty, or either is not as the attack takes it.
        RuntimeError: another profile, or torch's profiler, is being taken.
    """
    if not isinstance(attack, PGD):
        raise ValueError(f"attack must be a fastadv.PGD; got {type(attack).__name__}")
    if isinstance(x, Tensor) and not x.numel():
        raise ValueError(f"x must hold an image, or there is nothing to profile; got shape {list(x.shape)}")
    if torch._C._autograd._profiler_enabled():
        raise RuntimeError("fastadv.profile cannot run under torch.profiler, which would be in its times")
    if not _one_at_a_time.acquire(blocking=False):
        raise RuntimeError("fastadv.profile is already running, here or in another thread: one at a time")
    try:
        for _ in range(WARM_UP):
            attack(x, y)
        times, steps = [], []
        for _ in range(CALLS):
            before = Counter(attack.stats.steps)
            watch = _Stopwatch(x.device)
            with _listening(watch):
                attack(x, y)
            times.append(watch.seconds())
            steps.append(Counter(attack.stats.steps) - before)
        trace = _trace(attack, x, y)
    finally:
        _one_at_a_time.release()

    rows = [*dict.fromkeys(row for seconds in times for row in seconds if row != REST), REST]
    median = {row: sorted(seconds.get(row, 0.0) for seconds in times)[CALLS // 2] for row in rows}
    number = sorted(run.total() for run in steps)[CALLS // 2]
    how = " and ".join(dict.fromkeys(plan for run in steps for plan in run))
    inputs = f"{'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')} on {x.device}"
    of = f"{type(attack).__name__} of {number} steps on {inputs}: {how}, {attack.stats.precision}"
    return Profile(of, median, number, trace)


class _Stopwatch:
    """A listener to the engine's marks: each moment of a call belongs to one stretch, the innermost."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.thread = device, threading.get_ident()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.changes: list[tuple[str, Any]] = []  # from when on what was done
        self._change(REST)

    @contextlib.contextmanager
    def __call__(self, stretch: str) -> Iterator[None]:
        if threading.get_ident() != self.thread:  # somebody else's attack
            yield
            return
        before, _ = self.changes[-1]
        self._change(stretch)
        try:
            yield
        finally:
            self._change(before)

    def _change(self, stretch: str) -> None:
        if self.device.type != "cuda":
            self.changes.append((stretch, time.perf_counter()))
        elif not torch.cuda.is_current_stream_capturing():  # what is being recorded does not run
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            self.changes.append((stretch, event))

    def seconds(self) -> dict[str, float]:
        """By stretch, from the beginning until now."""
        self._change(REST)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = defaultdict(float)
        for (stretch, start), (_, end) in itertools.pairwise(self.changes):
            found[stretch] += start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
        return dict(found)


@contextlib.contextmanager
def _listening(listener: Any) -> Iterator[None]:
    passes.listener = listener
    try:
        yield
    finally:
        passes.listener = None


def _trace(attack: PGD, x: Tensor, y: Tensor | None) -> str:
    """A Chrome trace of one call, with a range "total" around those of the marks."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if x.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    mark = torch.profiler.record_function
    with torch.profiler.profile(activities=activities) as recorded, _listening(mark), mark("total"):
        attack(x, y)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        return file.read_text(encoding="utf-8")
