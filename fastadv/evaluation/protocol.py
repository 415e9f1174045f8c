"""The evaluation protocol: attacks one after the other, each on the samples that have survived so far.

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks", 2020
(AutoAttack). Nothing counts as adversarial on the word of the attack that made it: each image is judged by the model itself,
in full precision, and must lie in ball and box.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from .._version import __version__
from ..attacks import APGD, APGDT, FAB, FABT, PGD, Attack, EoT, Square
from ..attacks.base import norms
from ..engine import Model, attacking, unwrap
from ..machine import device_name
from ..progress import progress_bar
from .alarms import sanity_checks, square_beats_white_box
from .outcome import Evaluation, Row
from .records import Record, Records, fingerprint, weights_of

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "quick": ("apgd-ce", "apgd-t"),
}
RUNS = 20  # of a randomised model, over which version "rand" takes the mean
WHITE_BOX = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t")
ALARM_SAMPLES = 256  # evenly spaced
SLACK, ROUNDING = 1e-5, 2.0**-23  # of eps, and of each element: what rounding may add to a length


def standard_attacks(version: str, norm: str) -> dict[str, tuple[Callable[..., Attack], dict[str, Any]]]:
    """Each attack by its name in AutoAttack: its class, and the settings that ``version`` gives it."""
    plus, l1, quick = version == "plus", norm == "l1", version == "quick"
    restarts, steps = 5 if plus or (l1 and version == "standard") else 1, 50 if quick else 100
    return {
        "apgd-ce": (APGD, {"loss": "ce", "restarts": restarts, "steps": steps, "early_stop": True}),
        "apgd-dlr": (APGD, {"loss": "dlr", "restarts": restarts, "steps": steps, "early_stop": True}),
        "apgd-t": (APGDT, {"targets": 3 if quick else 5 if l1 and not plus else 9, "steps": steps, "early_stop": True}),
        "fab": (FAB, {"restarts": restarts, "early_stop": True}),
        "fab-t": (FABT, {"targets": 9, "early_stop": True}),
        "square": (Square, {"queries": 5000}),
    }


def evaluate(
    model: Model,
    data: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
    eps: float,
    norm: str = "linf",
    version: str | Sequence[str | Attack | PGD] = "standard",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    batch_size: int = 256,
    seed: int = 0,
    resume: str | Path | None = None,
    alarms: bool = True,
    surrogate: Model | None = None,
    keep_images: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
    engine: str = "eager",
    precision: str = "fp32",
    twin: bool = False,
) -> Evaluation:
    """Robust accuracy by a sequence of attacks: ``print(fastadv.evaluate(model, (x, y), eps=8/255))``.

    Args:
        model: maps a batch [N, ...] to logits [N, C]; left as found. Evaluated in eval mode.
        data: ``(x, y)``, images in the bounds and integer labels, or batches of them, which are gathered first.
        eps: radius in units of x.
        norm: "linf", "l2" or "l1".
        version: "standard": APGD-CE, APGD-T, FAB-T and Square as AutoAttack publishes them; "plus", "rand" (for randomised
            models: attacks and verdicts on the mean prediction of 20 runs); "quick": fewer steps of the first two, an upper
            bound; or a list of their names and of attack objects.
        batch_size: samples attacked at once. Results do not depend on it.
        seed: of all attacks.
        resume: a folder. What has been found is kept there after each batch, and the same call goes on from there.
        alarms: look for signs of a flawed evaluation too, on up to 256 samples.
        surrogate: another model, to transfer images from (for an alarm).
        keep_images: return all adversarial images.
        device: where to attack; default: that of the model.
        progress: a bar with robust accuracy and time left, on a terminal.
        engine, precision, twin: how attacks run the model, as in :class:`fastadv.PGD`. Verdicts are always the model's own.

    Under torchrun, with torch.distributed initialised, the processes share the samples, and all return the same.

    Raises:
        ValueError: an argument, the data or the model's output is not as described, or ``resume`` holds something else.
    """
    checks.number("eps", eps)
    checks.integer("batch_size", batch_size)
    lo, hi = checks.bounds(bounds)
    x, y = gathered(data)
    checks.images(x, lo, hi)
    checks.labels(y, x)
    if y.is_floating_point():
        raise ValueError(f"y must be integer labels [{len(x)}]; got soft labels {list(y.shape)}")
    if not len(x):
        raise ValueError("data must hold at least one sample; got none")
    y = y.long()
    judge = unwrap(model)
    device = torch.device(device) if device is not None else _device_of(judge, x)
    if version == "rand":
        judge = EoT(judge, RUNS)
    attacks = _attacks(judge, version, eps, norm, bounds, seed, engine=engine, precision=precision, twin=twin)
    header = {
        "fastadv": __version__, "eps": eps, "norm": norm, "attacks": {name: repr(a) for name, a in attacks.items()},
        "bounds": None if bounds is None else list(bounds), "seed": seed, "data": fingerprint(x, y), "model": weights_of(judge),
    }  # fmt: skip
    name = version if isinstance(version, str) else "custom"
    settings = {"eps": eps, "norm": norm, "version": name, "bounds": header["bounds"], "seed": seed, "samples": len(x)}
    settings |= {"attacks": header["attacks"], "engine": engine, "precision": precision, "fastadv": __version__}
    settings["device"] = device_name(device)

    protocol = _Protocol(judge, x, y, eps, norm, lo, hi, batch_size, device, Records(resume, header), progress)
    if _distributed():
        dist.barrier()  # all have read what is on record before one adds to it
    with _exactly():
        protocol.run("clean", None)
        for attack_name, attack in attacks.items():
            protocol.run(attack_name, attack)
        found = protocol.evaluation(settings, keep_images)
        if alarms:
            few = torch.arange(n := min(len(x), ALARM_SAMPLES)) * len(x) // n
            images, labels = x[few].to(device), y[few].to(device)
            found.alarms = sanity_checks(judge, images, labels, eps, norm, bounds, seed, surrogate, batch_size=batch_size)
            if "square" in attacks and any(a in attacks for a in WHITE_BOX):
                before, after = protocol.around("square")
                found.alarms.append(square_beats_white_box(before, after))
    return found


def gathered(data: Any) -> tuple[Tensor, Tensor]:
    """``(x, y)`` of a pair or of batches."""
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
        return data[0].detach(), data[1].detach()
    if not isinstance(data, Iterable) or isinstance(data, (Tensor, Mapping)):
        raise ValueError(f"data must be a pair of tensors (x, y) or an iterable of such batches; got {type(data).__name__}")
    batches = []
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not all(isinstance(t, Tensor) for t in batch[:2]):
            raise ValueError(f"data must give batches (x, y) of tensors; got {type(batch).__name__}")
        batches.append((batch[0].detach().cpu(), batch[1].detach().cpu()))
    if not batches:
        raise ValueError("data must hold at least one batch; got none")
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def numbers_of(x: Tensor) -> Tensor:
    """A number [N] for each image, by its content: what it draws then depends on nothing but itself and the seed."""
    digests = [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest() for image in x.detach().cpu().double()]
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests], dtype=torch.int64)


def _attacks(
    model: Model, version: str | Sequence[str | Attack | PGD], eps: float, norm: str, bounds: Any, seed: int, **execution: Any
) -> dict[str, Attack | PGD]:
    """The attacks of a version, by name."""
    checks.one_of("norm", norm, Attack.NORMS)
    if isinstance(version, str):
        checks.one_of("version", version, VERSIONS)
    chosen = VERSIONS[version] if isinstance(version, str) else tuple(version)
    if not chosen:
        raise ValueError("version must be a name or a list of at least one attack; got none")
    known = standard_attacks(version if isinstance(version, str) else "standard", norm)
    attacks: dict[str, Attack | PGD] = {}
    attack: Attack | PGD
    for number, one in enumerate(chosen):
        if isinstance(one, str):
            checks.one_of("version", one, known)
            build, settings = known[one]
            attack, name = (
                build(model, eps, norm=norm, bounds=bounds, seed=(seed + number) % 2**63, **settings, **execution),
                one,
            )
        elif isinstance(one, (Attack, PGD)):
            attack, name = one, type(one).__name__.lower()
        else:
            raise ValueError(f"version must list names of attacks or fastadv.Attack objects; got {type(one).__name__}")
        while name in attacks:
            name += "'"
        attacks[name] = attack
    return attacks


@dataclass
class _Protocol:
    model: Model
    x: Tensor
    y: Tensor
    eps: float
    norm: str
    lo: float
    hi: float
    batch_size: int
    device: torch.device
    records: Records
    progress: bool
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        samples = len(self.y)
        self.robust = torch.ones(samples, dtype=torch.bool)
        self.broken_by, self.predicted = [""] * samples, torch.full((samples,), -1)
        self.distance = torch.full((samples,), math.inf)
        self.x_adv = self.x.clone()
        self.numbers = numbers_of(self.x)
        self.accuracy: dict[str, tuple[Tensor, Tensor]] = {}  # robust samples before and after each attack

    def run(self, name: str, attack: Attack | PGD | None) -> None:
        """One attack on all that stand, but for those that are on record; None: the clean images themselves."""
        before = self.robust.clone()
        todo = (before & ~self.records.done(name, len(before))).nonzero()[:, 0]
        rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
        mine = todo[rank::world]
        with progress_bar(f"{name} ({self._share(self.robust):.1%} robust)", len(mine), "sample", self.progress) as bar:
            broken = 0
            for samples in torch.split(mine, self.batch_size) if len(mine) else ():
                record = self._attacked(attack, samples)
                self.records.add(name, record)
                broken += int(record.fooled.sum())
                bar.set_postfix_str(f"{broken} broken")
                bar.update(len(samples))
        self._take_over(name, before)

    def _attacked(self, attack: Attack | PGD | None, samples: Tensor) -> Record:
        """What the attack does to these samples, judged; without an attack, what the model says of the clean images."""
        start = time.perf_counter()
        x, y = self.x[samples].to(self.device), self.y[samples].to(self.device)
        adv, claimed, queries = x, torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y)
        if attack is not None:
            numbers = self.numbers[samples].to(self.device)
            adv = attack(x, y, samples=numbers) if isinstance(attack, Attack) else attack(x, y)
            assert attack.info is not None
            claimed = claimed if attack.info.success is None else attack.info.success
            queries = queries if attack.info.queries is None else attack.info.queries
        with attacking(self.model), torch.no_grad():
            logits = self.model(adv)
        checks.logits(logits, x, y)
        predicted, distance = logits.argmax(1), norms(adv.double() - x.double(), self.norm)
        fooled = predicted != y
        if attack is not None:
            rounding = norms(ROUNDING * adv.double(), self.norm)
            inside = ((adv >= self.lo) & (adv <= self.hi)).flatten(1).all(1)
            fooled &= inside & (distance <= self.eps * (1 + SLACK) + rounding)
        return Record(
            samples=samples, claimed=claimed.cpu(), fooled=fooled.cpu(), predicted=predicted.cpu(), distance=distance.cpu(),
            queries=queries.cpu(), images=adv[fooled].cpu() if attack is not None else adv[:0].cpu(),
            seconds=time.perf_counter() - start,
        )  # fmt: skip

    def _take_over(self, name: str, before: Tensor) -> None:
        """Brings what is on record about an attack into the picture, from all processes."""
        records = [*self.records.of(name)]
        if _distributed():
            everyone: list[list[Record]] = [[]] * dist.get_world_size()
            dist.all_gather_object(everyone, records)
            # What was on record before this run, every process has read.
            records = list({int(r.samples[0]): r for some in everyone for r in some}.values())
        tried = broken = rejected = 0
        queries = seconds = 0.0
        for record in records:
            tried, broken = tried + len(record.samples), broken + int(record.fooled.sum())
            rejected += int((record.claimed & ~record.fooled).sum())
            queries, seconds = queries + float(record.queries.sum()), seconds + record.seconds
            chosen = record.samples[record.fooled]
            self.robust[chosen] = False
            self.predicted[record.samples] = record.predicted if name == "clean" else self.predicted[record.samples]
            self.predicted[chosen] = record.predicted[record.fooled]
            for sample in chosen.tolist():
                self.broken_by[sample] = name
            if name == "clean":
                self.distance[chosen] = 0.0
            else:
                self.distance[chosen] = record.distance[record.fooled].float()
                self.x_adv[chosen] = record.images.to(self.x_adv)
        self.accuracy[name] = before, self.robust.clone()
        if name != "clean":
            self.rows.append(Row(name, tried, broken, rejected, self._share(self.robust), queries / max(tried, 1), seconds))

    def around(self, name: str) -> tuple[Tensor, Tensor]:
        """Which samples stood before and after an attack, bool [N]."""
        return self.accuracy[name]

    def _share(self, flags: Tensor) -> float:
        return int(flags.sum()) / len(flags)

    def evaluation(self, settings: dict[str, Any], keep_images: bool) -> Evaluation:
        x, x_adv = (self.x.cpu(), self.x_adv.cpu()) if keep_images else (None, None)
        return Evaluation(
            self._share(self.accuracy["clean"][1]), self._share(self.robust), self.rows, self.broken_by, self.y.cpu(),
            self.predicted, self.distance, settings, x=x, x_adv=x_adv,
        )  # fmt: skip


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device_of(model: Model, x: Tensor) -> torch.device:
    return next((p.device for p in model.parameters()), x.device) if isinstance(model, nn.Module) else x.device


@contextlib.contextmanager
def _exactly() -> Any:
    """No autocast around: verdicts are in full precision."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
