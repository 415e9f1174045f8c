"""What was measured, for people (one table) and for programs (JSON)."""

from __future__ import annotations

import datetime
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fastadv
from fastadv import info, machine

from . import peers
from .timing import CLOCKS, Case, Ratio, Result

ROOT = Path(__file__).resolve().parent.parent
HEADERS = (
    "case", "contender", "median", "quartiles", "cpu", "gpu",
    "images/s", "/ baseline", "/ fastadv", "/ floor", "goal", "GB/s", "of copy", "what came out",
)  # fmt: skip


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """Where and with what: enough to tell whether two results may be compared."""
    cpu = f"{machine.cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"
    backed = (*fastadv.ops.STEPS, *fastadv.ops.WEIGHTS, *fastadv.ops.LOSSES)
    dirty = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cpu": cpu,
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "triton": info.version("triton"),
        "fastadv": fastadv.__version__,
        "fastadv build": fastadv.native.BUILD_INFO or fastadv.native.LOAD_ERROR,
        "fastadv backend": {op: fastadv.ops.choice(op, device.type)[0] for op in backed},
        "peers": peers.versions(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(dirty) if dirty is not None else None,
        **(_gpu(device) if device.type == "cuda" else {}),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "cuda": torch.version.cuda,
        "cudnn": f"{torch.backends.cudnn.version()}, allow_tf32={torch.backends.cudnn.allow_tf32}, "
        f"benchmark={torch.backends.cudnn.benchmark}",
        "multiprocessors": properties.multi_processor_count,
        "L2": properties.L2_cache_size,
        "memory": properties.total_memory,
    }


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def record(case: Case, results: dict[str, Result], clock: str) -> dict[str, Any]:
    """One case as JSON. Times are seconds a unit; ratios are times over the other's, so above 1 is slower than it."""
    return {
        "case": case.name,
        "baseline": case.baseline,
        **case.tags,
        "contenders": [_contender(case, name, results, clock) for name in case.contenders],
        "ratios": [_ratio(ratio, results, clock) for ratio in case.ratios],
    }


def _ratio(goal: Ratio, results: dict[str, Result], clock: str) -> dict[str, Any]:
    one = results.get(goal.of, MISSING)
    over = goal.over or one.floor
    seen = _over(one, results.get(over, MISSING), clock)
    met = None if seen is None else seen <= (goal.at_most or math.inf) and seen >= (goal.at_least or 0)
    return {"of": goal.of, "over": over, "at most": goal.at_most, "at least": goal.at_least, "seen": seen, "met": met}


MISSING = Result(absent="not in this case")


def _contender(case: Case, name: str, results: dict[str, Result], clock: str) -> dict[str, Any]:
    result = results[name]
    if result.samples is None:
        return {"name": name, "absent": result.absent}
    row: dict[str, Any] = {"name": name, "yardstick": result.yardstick, "rounds": len(result.samples.wall)}
    for c in CLOCKS:
        if getattr(result.samples, c):
            row[c] = dict(zip(("q1", "median", "q3"), result.samples.quartiles(c), strict=True))
    if clock not in row:
        return {"name": name, "absent": f"no time by the {clock} clock"}
    if case.images is not None:
        row["images/s"] = case.images / row[clock]["median"]
    if result.floor:
        row["floor"] = result.floor
    for label, other in (("baseline", case.baseline), ("fastadv", "fastadv"), ("floor", result.floor)):
        if (ratio := _over(result, results.get(other, MISSING), clock)) is not None:
            row[f"over {label}"] = ratio
    if name in case.goals and "over fastadv" in row:
        row["goal"] = {"over fastadv": case.goals[name], "met": row["over fastadv"] >= case.goals[name]}
    if name in case.at_most:
        row["goal"] = {"at most": case.at_most[name], "met": row[clock]["median"] <= case.at_most[name]}
    moved = case.bytes_of.get(name, case.bytes)
    if moved is not None:
        row["GB/s"] = moved / row[clock]["median"] / 1e9
        if "copy" in results and case.bytes is not None:
            share = moved / case.bytes_of.get("copy", case.bytes)
            ratios = {c: _over(results["copy"], result, c) for c in ("wall", "gpu")}
            row["of copy"] = {c: share * ratio for c, ratio in ratios.items() if ratio is not None}
    return row | {"facts": result.facts}


def _over(result: Result, other: Result, clock: str) -> float | None:
    """How many times longer than the other this took, where the clock timed both."""
    if result.samples is None or other.samples is None:
        return None
    both = getattr(result.samples, clock) and getattr(other.samples, clock)
    return result.samples.over(other.samples, clock) if both else None


def table(records: list[dict[str, Any]], clock: str) -> str:
    rows = [
        _row(case["case"] if i == 0 else "", contender, clock)
        for case in records
        for i, contender in enumerate(case["contenders"])
    ]
    used = [i for i in range(len(HEADERS)) if any(row[i] for row in rows)]
    cells = [[row[i] for i in used] for row in rows]
    return tabulate(cells, [HEADERS[i] for i in used], tablefmt="simple", disable_numparse=True)


def _row(case: str, c: dict[str, Any], clock: str) -> list[str]:
    if "absent" in c:
        return [case, c["name"], "-", *[""] * (len(HEADERS) - 4), c["absent"]]
    ratio = c.get("over fastadv")
    beaten = ratio is not None and ratio < 1 and not c["yardstick"] and not c["name"].startswith("fastadv")
    share = c.get("of copy", {})
    return [
        case,
        c["name"],
        _time(c[clock]["median"]),
        f"{_time(c[clock]['q1'])} .. {_time(c[clock]['q3'])}",
        _time(c["cpu"]["median"]),
        _time(c["gpu"]["median"]) if "gpu" in c else "",
        _number(c["images/s"]) if "images/s" in c else "",
        f"{c['over baseline']:.2f}" if "over baseline" in c else "",
        "" if ratio is None else f"{ratio:.2f}" + (" FASTADV LOSES" if beaten else ""),
        f"{c['over floor']:.3f} ({c['floor']})" if "over floor" in c else "",
        _goal(c["goal"]) if "goal" in c else "",
        f"{c['GB/s']:.1f}" if "GB/s" in c else "",
        (f"{share['wall']:.0%}" if share else "") + (f" ({share['gpu']:.0%})" if "gpu" in share else ""),
        ", ".join(f"{name} {_number(value)}" for name, value in c["facts"].items()),
    ]


def verdicts(records: list[dict[str, Any]]) -> list[tuple[str, bool | None]]:
    """Every goal in words and whether it was met; None: it was not measured."""
    found: list[tuple[str, bool | None]] = []
    for case in records:
        for c in case["contenders"]:
            if "goal" in c:
                found.append((f"{case['case']} against {c['name']}: {_goal(c['goal'])}", c["goal"]["met"]))
        for r in case["ratios"]:
            wanted = f"at most {r['at most']:.2f}" if r["at most"] is not None else f"at least {r['at least']:.2f}"
            seen = "not measured" if r["seen"] is None else f"{r['seen']:.3f}, {'met' if r['met'] else 'MISSED'}"
            found.append((f"{case['case']}: time of {r['of']} over {r['over'] or 'its floor'}, {wanted}: {seen}", r["met"]))
    return found


def _goal(goal: dict[str, Any]) -> str:
    wanted = f"<= {_time(goal['at most'])}" if "at most" in goal else f">= {goal['over fastadv']:.2f}"
    return f"{wanted} {'met' if goal['met'] else 'MISSED'}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 100 else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e6:.2f} us"
