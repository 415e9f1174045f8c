"""``python -m benchmarks.agreement CHECKPOINT``: is each attack as strong as the same one of the libraries on PyPI?

Sample by sample, on those of the demo's test digits that the network gets right: same attack, same budget, and one judge for
all, who clamps every image to the box, accepts what lies in the ball and asks the network once more. An attack that looks for
the nearest image has fooled where that is inside the ball. fastadv may leave at most half a point more standing than a peer.
Two random starts, too, fool others: how likely chance does that is told beside it and excuses nothing, and ``--seeds`` runs
attacks that draw numbers several times on either side. Nothing is timed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fastadv
from fastadv import demo
from fastadv.attacks.norms import norms
from fastadv.evaluation.command import load_model
from fastadv.evaluation.probes import evenly_spaced

from . import peers, report, run
from .timing import UnavailableError

RADII = {"linf": 0.3, "l2": 2.0, "l1": 10.0, "l0": 15.0}
ROOM = 0.005  # of accuracy: how much more than a peer's may stand under an attack of ours
ROUNDING = 1e-5  # of a radius
BATCH = 250

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """An attack of ours and the peers' own.

    Attributes:
        ours: what fastadv builds of a network. peers: by library, ``(model, x, y) -> x_adv``. Both draw from torch's generator
            or, where they have a seed of their own, that generator's.
        every: of how many samples one is attacked; attacks that ask for labels only take long.
        draws: whether another seed changes anything that is worth another run.
    """

    norm: str
    ours: Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]
    peers: Mapping[str, Attack]
    every: int = 1
    draws: bool = False


def torchattacks(name: str, **settings: Any) -> Attack:
    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with peers.importing():
            import torchattacks
        attack = getattr(torchattacks, name)(model, **settings)
        if hasattr(attack, "seed"):
            attack.seed = torch.initial_seed()
        return attack(x, y)

    return attack


def foolbox(name: str, eps: float | None = None, **settings: Any) -> Attack:
    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with peers.importing():
            import foolbox
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        return getattr(foolbox.attacks, name)(**settings)(wrapped, x, y, epsilons=eps)[1]

    return attack


def adv_lib(name: str, *given: Any, **settings: Any) -> Attack:
    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with peers.importing(), peers.stand_ins("torchvision", "torchvision.models", "visdom"):
            import adv_lib.attacks
        return getattr(adv_lib.attacks, name)(model, x, y, *given, **settings)

    return attack


def pyautoattack(part: str, norm: str, **settings: Any) -> Attack:
    """An attack of the standard version, but with these settings."""

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        attack = peers.pyautoattack(model, norm, RADII[norm], torch.initial_seed())[part]
        for name, value in settings.items():
            setattr(attack, name, value)
        adv: Tensor = attack.perturb(x, y)
        return adv

    return attack


def pairs() -> Iterator[tuple[str, Pair]]:
    """Attacks that both sides have, with as many steps or queries on either."""
    inf, eps = math.inf, RADII["linf"]
    step, l2_step = 2.5 * eps / 40, 2.5 * RADII["l2"] / 40
    yield "FGSM", Pair("linf", lambda net: lambda x, y: fastadv.fgsm(net, x, y, eps), {
        "torchattacks": torchattacks("FGSM", eps=eps),
        "foolbox": foolbox("LinfFastGradientAttack", eps),
    })  # fmt: skip
    yield "PGD-40", Pair("linf", lambda net: fastadv.PGD(net, eps, step, 40), {
        "torchattacks": torchattacks("PGD", eps=eps, alpha=step, steps=40),
        "foolbox": foolbox("LinfPGD", eps, abs_stepsize=step, steps=40),
    }, draws=True)  # fmt: skip
    yield "PGD-40, the best image", Pair("linf", lambda net: fastadv.PGD(net, eps, step, 40, keep_best=True), {
        "adv-lib": adv_lib("pgd_linf", eps, steps=40, absolute_step_size=step),
    }, draws=True)  # fmt: skip
    yield "PGD-40, l2", Pair("l2", lambda net: fastadv.PGD(net, RADII["l2"], l2_step, 40, "l2"), {
        "torchattacks": torchattacks("PGDL2", eps=RADII["l2"], alpha=l2_step, steps=40),
        "foolbox": foolbox("L2PGD", RADII["l2"], abs_stepsize=l2_step, steps=40),
    }, draws=True)  # fmt: skip
    # That of foolbox adds up gradients as they are, where the paper divides each by its l1 length.
    yield "MI-FGSM", Pair("linf", lambda net: fastadv.MIFGSM(net, eps, eps / 10, 10), {
        "torchattacks": torchattacks("MIFGSM", eps=eps, alpha=eps / 10, steps=10),
        "foolbox": foolbox("LinfMomentumIterativeFastGradientMethod", eps, abs_stepsize=eps / 10, steps=10),
    })  # fmt: skip
    for norm in ("linf", "l2", "l1"):
        yield from _of_autoattack(norm)
    yield "SPSA", Pair("linf", lambda net: fastadv.SPSA(net, eps, steps=10, lr=0.05), {
        "torchattacks": torchattacks("SPSA", eps=eps, lr=0.05, nb_iter=10, nb_sample=128, max_batch_size=128),
    }, every=5)  # fmt: skip
    yield "DeepFool, linf", Pair("linf", lambda net: fastadv.DeepFool(net, norm="linf"), {
        "foolbox": foolbox("LinfDeepFoolAttack", steps=50), "adv-lib": adv_lib("df", steps=50, norm=inf),
    })  # fmt: skip
    yield "DeepFool, l2", Pair("l2", lambda net: fastadv.DeepFool(net), {
        "torchattacks": torchattacks("DeepFool", steps=50),
        "foolbox": foolbox("L2DeepFoolAttack", steps=50), "adv-lib": adv_lib("df", steps=50, norm=2),
    })  # fmt: skip
    yield "CW", Pair("l2", lambda net: fastadv.CW(net, steps=200, search_steps=6), {
        "foolbox": foolbox("L2CarliniWagnerAttack", steps=200, binary_search_steps=6),
        "adv-lib": adv_lib("carlini_wagner_l2", max_iterations=200, binary_search_steps=6),
    }, every=5)  # fmt: skip
    yield "DDN", Pair("l2", lambda net: fastadv.DDN(net), {
        "foolbox": foolbox("DDNAttack", steps=100), "adv-lib": adv_lib("ddn", steps=100, levels=None),
    })  # fmt: skip
    for norm, theirs, order in (("linf", "LInf", inf), ("l2", "L2", 2), ("l1", "L1", 1), ("l0", "L0", 0)):
        yield f"FMN, {norm}", Pair(norm, lambda net, n=norm: fastadv.FMN(net, norm=n), {
            "foolbox": foolbox(f"{theirs}FMNAttack", steps=100), "adv-lib": adv_lib("fmn", order, steps=100),
        })  # fmt: skip
    yield "Boundary", Pair("l2", lambda net: fastadv.Boundary(net, steps=2000), {
        "foolbox": foolbox("BoundaryAttack", steps=2000),
    }, every=10)  # fmt: skip
    for norm in ("linf", "l2"):
        yield f"HopSkipJump, {norm}", Pair(norm, lambda net, n=norm: fastadv.HopSkipJump(net, steps=15, norm=n), {
            "foolbox": foolbox("HopSkipJumpAttack", steps=15, constraint=norm),
        }, every=10)  # fmt: skip


def _of_autoattack(norm: str) -> Iterator[tuple[str, Pair]]:
    """Its parts. torchattacks lacks most of the l1 ones, and its FAB fails there."""
    eps, order = RADII[norm], {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    large = {"use_large_reps": norm == "l1"}  # larger balls first, as ours there

    def pair(ours: Callable[..., Any], others: dict[str, Attack], every: int = 1, draws: bool = True) -> Pair:
        peers = {library: attack for library, attack in others.items() if (library, norm) != ("torchattacks", "l1")}
        return Pair(norm, lambda net: ours(net, eps, norm=norm, seed=torch.initial_seed()), peers, every, draws)

    def of_torchattacks(name: str, **settings: Any) -> Attack:
        return torchattacks(name, norm=norm.capitalize(), eps=eps, **settings)

    for loss in ("ce", "dlr"):
        yield f"APGD-{loss.upper()}, {norm}", pair(partial(fastadv.APGD, loss=loss), {
            "torchattacks": of_torchattacks("APGD", steps=100, loss=loss),
            "adv-lib": adv_lib("apgd", eps, order, n_iter=100, loss_function=loss, **large),
            "pyautoattack": pyautoattack("apgd-ce", norm, loss=loss, n_restarts=1),
        })  # fmt: skip
    yield f"APGD-T, {norm}", pair(fastadv.APGDT, {
        "torchattacks": of_torchattacks("APGDT", steps=100),
        "adv-lib": adv_lib("apgd_targeted", eps, order, num_targets=9, **large),
        "pyautoattack": pyautoattack("apgd-t", norm, n_target_classes=9),
    })  # fmt: skip
    yield f"FAB, {norm}", pair(fastadv.FAB, {
        "torchattacks": of_torchattacks("FAB", steps=100), "adv-lib": adv_lib("fab", order, ε=eps),
        "pyautoattack": pyautoattack("fab-t", norm, targeted=False),
    }, every=2, draws=False)  # fmt: skip
    yield f"FAB-T, {norm}", pair(fastadv.FABT, {
        "torchattacks": of_torchattacks("FAB", steps=100, multi_targeted=True),
        "adv-lib": adv_lib("fab", order, ε=eps, targeted_restarts=True),
        "pyautoattack": pyautoattack("fab-t", norm),
    }, every=2, draws=False)  # fmt: skip
    yield f"Square, {norm}", pair(partial(fastadv.Square, queries=1000), {
        "torchattacks": of_torchattacks("Square", n_queries=1000),
        "pyautoattack": pyautoattack("square", norm, n_queries=1000, rescale_schedule=True),
    }, every=2)  # fmt: skip


def fooled(model: nn.Module, attack: Attack, x: Tensor, y: Tensor, norm: str, seeds: int) -> Tensor:
    """[seeds, N], whether the attack's images, judged by the network itself, fool it inside ball and box."""
    found = []
    for seed in range(seeds):
        for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            torch.manual_seed(seed)
            adv = attack(model, images.clone(), labels.clone()).detach().clamp(0, 1)
            with torch.no_grad():
                wrong = model(adv).argmax(1) != labels
            found.append(wrong & (norms(adv.double() - images.double(), norm) <= RADII[norm] * (1 + ROUNDING)))
    return torch.cat(found).view(seeds, len(x))


def compared(name: str, pair: Pair, model: nn.Module, x: Tensor, y: Tensor, seeds: int) -> Iterator[dict[str, Any]]:
    """A row for each peer: how many stand, on average over seeds, and whom one side fools more often than the other."""
    x, y, seeds = x[:: pair.every], y[:: pair.every], seeds if pair.draws else 1

    def ours(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return pair.ours(model)(images, labels)

    mine = fooled(model, ours, x, y, pair.norm, seeds)
    for library, attack in pair.peers.items():
        row: dict[str, Any] = {"attack": name, "library": library, "samples": len(x), "seeds": seeds}
        row |= _standing("fastadv", mine)
        try:
            theirs = fooled(model, attack, x, y, pair.norm, seeds)
        except UnavailableError as reason:
            yield row | {"absent": str(reason)}
            continue
        except Exception as error:  # of one peer; the next one is asked all the same
            yield row | {"failed": f"{type(error).__name__}: {error}"[:200]}
            continue
        more = mine.sum(0) - theirs.sum(0)
        row |= _standing("peer", theirs)
        yield row | {f"more often {who}": int((by > 0).sum()) for who, by in (("fastadv", more), ("peer", -more))}


def _standing(who: str, fooled: Tensor) -> dict[str, Any]:
    """How many samples stand on average, and with which seed how many."""
    by_seed = (~fooled).sum(1)
    return {who: by_seed.double().mean().item(), f"{who} by seed": by_seed.tolist()}


def holds(row: Mapping[str, Any]) -> bool:
    """Whether ours left at most half a point more standing; of fewer than 200 samples, one more."""
    return "absent" in row or ("peer" in row and row["fastadv"] - row["peer"] <= max(1, ROOM * row["samples"]))


def chance(row: Mapping[str, Any]) -> float:
    """How likely attacks of equal strength differ by so much: a sign test of the samples that one of them fools more often."""
    differ = row["more often fastadv"] + row["more often peer"]
    return sum(math.comb(differ, k) for k in range(row["more often peer"], differ + 1)) / 2**differ


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for row in rows:
        told = [row["attack"], row["library"], row["samples"], row["seeds"], f"{row['fastadv'] / row['samples']:.1%}"]
        if "peer" in row:
            told += [f"{row['peer'] / row['samples']:.1%}", row["more often fastadv"], row["more often peer"]]
            told += [f"{chance(row):.2f}", "" if holds(row) else "WEAKER"]
        else:
            told.append(row.get("absent", row.get("failed", ""))[:60])
        cells.append(told)
    heads = (
        "attack", "library", "digits", "seeds", "standing: fastadv", "peer", "fooled more often: fastadv", "peer", "chance", "",
    )  # fmt: skip
    return tabulate(cells, heads, tablefmt="github", disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="of fastadv demo")
    parser.add_argument("--samples", type=int, default=1000, help="test digits, evenly spaced (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each attack that draws (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="attacks whose names begin so")
    parser.add_argument("--split", type=int, default=0, help="seed of the data's split, as the network's (default: 0)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after each attack")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    model = load_model(str(given.checkpoint))[0].eval()
    digits = demo.load_digits(given.split)
    chosen = evenly_spaced(given.samples, len(digits.x_test))
    x, y = digits.x_test[chosen], digits.y_test[chosen]
    with torch.no_grad():
        right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    environment = report.environment(torch.device("cpu"), given.threads)
    content: dict[str, Any] = {"environment": environment, "radii": RADII, "rows": []}
    for name, pair in pairs():
        if given.only is None or name.startswith(tuple(given.only)):
            print(name, file=sys.stderr, flush=True)
            content["rows"] += compared(name, pair, model, x, y, given.seeds)
            run.save(content, given.json)
    print(table(content["rows"]))
    return 0 if all(map(holds, content["rows"])) else 1


if __name__ == "__main__":
    sys.exit(main())
