"""The command line: ``fastadv demo`` and ``fastadv info``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .machine import tune_allocator
from .methods import METHODS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastadv", description="Attack and adversarially train PyTorch models, fast.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a robust network on 5,000 real digits and report what attacks do to it")
    demo.add_argument("--out", default="fastadv-demo", help="folder of the report (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of data split, initialisation and attacks (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a few batches only: does everything run?")
    demo.add_argument("--method", default="pgd-at", choices=METHODS, metavar="NAME", help=f"how to train: {', '.join(METHODS)}")
    demo.add_argument("--awp", type=float, default=0.0, metavar="GAMMA", help="perturb the weights too, by this much (0.005)")
    commands.add_parser("info", help="what was built, and which backend runs each op and why")
    chosen = parser.parse_args(arguments)

    if chosen.command == "demo":
        from .demo import run

        tune_allocator()
        return run(chosen.out, chosen.quick, chosen.seed, chosen.method, chosen.awp)
    from .info import report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
