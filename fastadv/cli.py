"""The command line: ``fastadv demo``, ``train``, ``report``, ``evaluate``, ``certify``, ``analyze`` and ``info``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch

from .engine import ENGINES, PRECISIONS
from .machine import tune_allocator
from .methods import METHODS
from .processes import rank


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastadv", description="Attack and adversarially train PyTorch models, fast.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a robust network on 5,000 real digits and report what attacks do to it")
    demo.add_argument("--out", default="fastadv-demo", help="folder of the report (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of data split, initialisation and attacks (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a few batches only: does everything run?")
    demo.add_argument("--method", default="pgd-at", choices=METHODS, metavar="NAME", help=f"how to train: {', '.join(METHODS)}")
    demo.add_argument("--awp", type=float, default=0.0, metavar="GAMMA", help="perturb the weights too, by this much (0.005)")
    _add_train(commands.add_parser("train", help="train a model adversarially, by a config file or a recipe"))
    folder = commands.add_parser("report", help="a page of what became of a training run")
    folder.add_argument("folder", metavar="RUN_DIR", help="of fastadv train")
    folder.add_argument("--samples", type=int, default=1000, metavar="N", help="test images to attack (default: %(default)s)")
    folder.add_argument("--device", help="(default: a GPU where there is one)")
    _add_evaluate(commands.add_parser("evaluate", help="how robust a checkpoint is, by the attacks that publications use"))
    _add_certify(commands.add_parser("certify", help="how far a checkpoint's answers certainly hold, by randomised smoothing"))
    _add_analyze(commands.add_parser("analyze", help="figures of papers, of checkpoints or runs; without a name: which"))
    commands.add_parser("info", help="what was built, and which backend runs each op and why")
    chosen = parser.parse_args(arguments)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where the user's own model.py is, as ``python -m`` has it

    if chosen.command == "demo":
        from .demo import run

        tune_allocator()
        return run(chosen.out, chosen.quick, chosen.seed, chosen.method, chosen.awp)
    if chosen.command == "train":
        return _train(chosen)
    if chosen.command == "report":
        return _report(chosen)
    if chosen.command == "evaluate":
        return _evaluate(chosen, sys.argv[1:] if arguments is None else arguments)
    if chosen.command == "certify":
        return _certify(chosen)
    if chosen.command == "analyze":
        return _analyze(chosen, sys.argv[1:] if arguments is None else arguments)
    from .info import report

    print(report())
    return 0


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-c", "--config", required=True, metavar="CONFIG", help="a YAML file, or the name of a recipe")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="instead of the file's: schedule.lr=0.2")
    add(
        "--out", metavar="DIR", help="of weights, checkpoints and log, and to go on from (default: runs/ and the config's name)"
    )
    add(
        "--resume",
        default="auto",
        choices=["auto", "never"],
        help="go on with the run in DIR, or refuse (default: %(default)s)",
    )
    add("--device", help="(default: a GPU where there is one; under torchrun each process its own)")
    add("--minutes", type=float, default=10.0, metavar="N", help="between checkpoints within an epoch (default: %(default)s)")
    add("--cost", action="store_true", help="only say what the run costs, in floating-point operations")


def _add_network(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a file of weights, or robustbench:NAME/DATASET/THREAT")
    add(
        "--data", required=True, metavar="FILE", help="digits (those of the demo), cifar10:FOLDER and so on, a .npz or .pt file"
    )
    add("--model", metavar="MODULE:FUNCTION", help="what builds the network, where the checkpoint does not say")
    add("--samples", type=int, metavar="N", help="the first so many only")
    add("--device", help="(default: a GPU where there is one)")


def _add_certify(parser: argparse.ArgumentParser) -> None:
    _add_network(parser)
    add = parser.add_argument
    add("--sigma", required=True, type=_number, help="of the noise, in units of x: 0.25")
    add("--n", type=int, default=10_000, metavar="N", help="votes on each image (default: %(default)s; papers: 100000)")
    add("--n0", type=int, default=100, metavar="N", help="votes that choose the class (default: %(default)s)")
    add("--alpha", type=float, default=0.001, help="how often a certificate may be wrong (default: %(default)s)")
    add("--radius", type=_number, help="ask for this l2 radius alone, which takes fewer votes")
    add("--batch-size", type=int, default=256, metavar="N", help="noisy images at once (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--precision", default="fp32", choices=PRECISIONS, help="in which votes are cast (default: %(default)s)")
    add("--twin", action="store_true", help="votes by a copy with batch norms folded and, on a CPU, convolutions fused")
    add("--out", default="fastadv-certification", metavar="DIR", help="of the page, and to go on from (default: %(default)s)")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_network(parser)
    add = parser.add_argument
    add("--eps", required=True, type=_number, help="radius in units of x: 0.3, 8/255")
    add("--norm", default="linf", choices=["linf", "l2", "l1"], help="(default: %(default)s)")
    versions = "standard, plus, rand, quick, or attacks by name: apgd-ce,square (default: %(default)s)"
    add("--version", default="standard", metavar="NAME", help=versions)
    add("--batch-size", type=int, default=256, metavar="N", help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of the attacks (default: %(default)s)")
    add("--out", default="fastadv-evaluation", metavar="DIR", help="of the page, and to go on from (default: %(default)s)")
    add("--no-alarms", dest="alarms", action="store_false", help="do not look for signs of a flawed evaluation")
    add("--engine", default="eager", choices=ENGINES, help="how attacks run the model (default: %(default)s)")
    add("--precision", default="fp32", choices=PRECISIONS, help="of attacks; verdicts are in fp32 (default: %(default)s)")
    add("--twin", action="store_true", help="attack a copy with batch norms folded and faster convolutions")


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="of the analysis; without one they are listed")
    add("paths", nargs="*", metavar="PATH", help="checkpoints, as those of evaluate, or folders of train")
    add("--data", metavar="FILE", help="images, as those of evaluate (default: digits, those of the demo)")
    add("--model", metavar="MODULE:FUNCTION", help="what builds the networks, where the checkpoints do not say")
    add("--eps", type=_number, help="radius in units of x: 0.3, 8/255")
    add("--norm", choices=["linf", "l2", "l1"], help="(default: the analysis's own)")
    add("--samples", type=int, metavar="N", help="so many images, evenly spaced (default: the analysis's own)")
    add("--seed", type=int, help="of all that is random (default: 0)")
    add("--device", help="(default: a GPU where there is one)")
    add("--out", default="fastadv-analysis", metavar="DIR", help="of the page, the figure and the data (default: %(default)s)")


def _number(text: str) -> float:
    """8/255 is what papers write."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"must be a number or a fraction such as 8/255; got {text!r}") from None


def _resumable(chosen: argparse.Namespace, work: Callable[[], object]) -> int:
    """Runs a command that keeps in ``out`` what it has found, and says what went wrong."""
    try:
        work()
    except torch.OutOfMemoryError as error:
        hint = "The same command with a smaller --batch-size goes on from here."
        print(f"fastadv {chosen.command}: {error}\n{hint}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"fastadv {chosen.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted. What was found is in {chosen.out}: the same command goes on from there.", file=sys.stderr)
        return 130
    return 0


def _evaluate(chosen: argparse.Namespace, typed: Sequence[str]) -> int:
    from .evaluation.command import run
    from .evaluation.protocol import VERSIONS

    version = chosen.version if chosen.version in VERSIONS else chosen.version.split(",")
    settings = vars(chosen) | {"version": version, "command": shlex.join(["fastadv", *typed])}
    tune_allocator()
    return _resumable(chosen, lambda: run(**settings))


def _certify(chosen: argparse.Namespace) -> int:
    from .certify.command import run

    settings = {name: value for name, value in vars(chosen).items() if name != "command"}
    tune_allocator()
    return _resumable(chosen, lambda: run(**settings))


def _analyze(chosen: argparse.Namespace, typed: Sequence[str]) -> int:
    from .analysis.command import listing, run

    if chosen.name is None:
        print(f"fastadv analyze NAME [PATH ...]\n\n{listing()}")
        return 0
    tune_allocator()
    try:
        run(**vars(chosen) | {"command": shlex.join(["fastadv", *typed])})
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"fastadv analyze: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    return 0


def _train(chosen: argparse.Namespace) -> int:
    try:
        from .training import command, config
    except ImportError as error:
        print(f"fastadv train needs {error.name}: pip install 'fastadv[train]'", file=sys.stderr)
        return 2
    tune_allocator()
    try:
        if chosen.cost:
            print(command.cost(config.load(chosen.config, chosen.set)))
            return 0
        folder = command.run(chosen.config, chosen.set, chosen.out, chosen.resume, chosen.device, chosen.minutes)
    except (ValueError, OSError) as error:
        print(f"fastadv train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    if rank() == 0:
        print(f"Weights: {folder / 'best.pt'}\nA page of the run: fastadv report {folder}")
    return 0


def _report(chosen: argparse.Namespace) -> int:
    try:
        from .training import page
    except ImportError as error:
        print(f"fastadv report needs {error.name}: pip install 'fastadv[train]'", file=sys.stderr)
        return 2
    try:
        print(f"Report: {page.write(chosen.folder, chosen.samples, chosen.device)}")
    except (ValueError, OSError) as error:
        print(f"fastadv report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
