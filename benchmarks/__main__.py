"""``python -m benchmarks``: everything is measured in one process and printed as one table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from . import attacks, ops, report, run, timing, training, weights


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: does it run, not how fast is it")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there, after each case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--clock", choices=timing.CLOCKS, default="wall", help="which one medians and ratios are of")
    arguments = parser.parse_args()

    quick, device = arguments.quick, arguments.device
    cases = ops.cases(quick, device) + weights.cases(quick, device) + attacks.cases(quick) + training.cases(quick)
    if arguments.only:
        cases = [case for case in cases if any(part in case.name for part in arguments.only)]
    if arguments.list or not cases:
        print("\n".join(case.name for case in cases) or "no case has such a name")
        return 0 if cases else 2

    torch.set_num_threads(arguments.threads)
    environment = report.environment(device, arguments.threads)
    content: dict[str, Any] = {"environment": environment, "quick": quick, "clock": arguments.clock}
    finished = run.run(cases, content, timing.plan_for(device, quick), device, arguments.clock, arguments.json)
    records = content["cases"]
    print("\n".join(f"{name}: {value}" for name, value in environment.items()), end="\n\n")
    print(report.table(records, arguments.clock))
    print("\nmedian and quartiles by", arguments.clock, "clock; '/ x' is the time over that of x: above 1 is slower than x.")
    print("'of copy': counted bytes a second over those of the copy, in the same rounds; in brackets by the gpu clock.")
    failed = [c for case in records for c in case["contenders"] if c["name"] == "fastadv" and "absent" in c]
    missed = [text for text, met in report.verdicts(records) if not met]
    print(f"goals missed: {len(missed)}", *missed, sep="\n  ")
    return 1 if failed or not finished else 0


if __name__ == "__main__":
    sys.exit(main())
