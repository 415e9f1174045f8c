"""The evaluation protocol: attacks one after the other, each on the samples that have survived so far.

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks", 2020
(AutoAttack). Nothing counts as adversarial on the word of the attack that made it: each image is judged by the model itself,
without autocast, and must lie in ball and box.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .._version import __version__
from ..attacks import APGD, APGDT, FAB, FABT, PGD, Attack, EoT, Square
from ..attacks.draws import numbers_of
from ..attacks.norms import norms
from ..engine import Model, attacking, unwrap
from ..machine import device_name, exact_multiplication
from ..processes import Group
from ..progress import progress_bar
from .alarms import Alarm, missed_by_gradients, probabilities, sanity_checks, square_beats_white_box
from .outcome import Evaluation, Row
from .probes import Probe, device_of, evenly_spaced
from .records import Record, Records, fingerprint, fingerprint_of

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "quick": ("apgd-ce", "apgd-t"),
}
RUNS = 20  # of a randomised model, over which version "rand" takes the mean
RANDOMISED, PROBABILITIES = "randomised model", "probabilities instead of logits"  # alarms about the model's answers
ALARM_SAMPLES = 256  # evenly spaced
SQUARES = 64  # of the samples that only Square has fooled, looked at again, evenly spaced
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
        "square": (Square, {"queries": 5000, "rescale": False}),
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
            bound; or a list of their names and of attack objects. (A PGD object draws by batch, from a generator of its own.)
        batch_size: samples attacked at once. Results do not depend on it.
        seed: of all attacks.
        resume: a folder. What has been found is kept there after each batch, and the same call goes on from there: that of the
            same settings, data and weights (or, of a model that is no nn.Module, of the same answers to four images).
        alarms: look for signs of a flawed evaluation too, on up to 256 samples, and 64 of those that Square alone has fooled.
        surrogate: another model, to transfer images from (for an alarm).
        keep_images: return all adversarial images.
        device: where to attack; default: that of the model.
        progress: a bar with robust accuracy and time left, on a terminal.
        engine, precision, twin: how attacks run the model, as in :class:`fastadv.PGD`. Verdicts are always the model's own,
            without autocast or TF32.

    Under torchrun, with torch.distributed initialised, the processes share the samples, and all return the same.

    Raises:
        ValueError: an argument, the data or the model's output is not as described, or ``resume`` holds something else.
    """
    eps = checks.number("eps", eps)
    checks.integer("batch_size", batch_size)
    checks.integer("seed", seed, 0)
    if surrogate is not None and not callable(surrogate):
        raise ValueError(f"surrogate must be callable on a batch; got {type(surrogate).__name__}")
    lo, hi = checks.bounds(bounds)
    x, y = gathered(data)
    checks.images(x, lo, hi)
    x = x.clamp(lo, hi)  # of what rounding put outside, so that verdicts on images made of it can be strict
    checks.labels(y, x)
    if y.is_floating_point():
        raise ValueError(f"y must be integer labels [{len(x)}]; got soft labels {list(y.shape)}")
    if not len(x):
        raise ValueError("data must hold at least one sample; got none")
    y = y.long()
    judge = unwrap(model)
    device = torch.device(device) if device is not None else device_of(judge, x)
    if version == "rand":
        judge = EoT(judge, RUNS)
    attacks = _attacks(judge, version, eps, norm, bounds, seed, engine=engine, precision=precision, twin=twin)
    few = x[:4].to(device) if version != "rand" else None  # whose answers would not be the same again
    told = {name: [repr(a), *([] if a.model is judge else [fingerprint_of(a.model, few)])] for name, a in attacks.items()}
    header = {
        "fastadv": __version__, "version": version if isinstance(version, str) else "custom", "attacks": told, "eps": eps,
        "norm": norm, "bounds": None if bounds is None else [lo, hi], "seed": seed, "data": fingerprint(x, y),
        "model": fingerprint_of(unwrap(model), few),
    }  # fmt: skip
    name = version if isinstance(version, str) else "custom"
    settings = {"eps": eps, "norm": norm, "version": name, "bounds": header["bounds"], "seed": seed, "samples": len(x)}
    settings |= {
        "attacks": {name: repr(attack) for name, attack in attacks.items()},
        "engine": engine,
        "precision": precision,
        "twin": bool(twin),
        "fastadv": __version__,
    }
    settings["device"] = device_name(device)

    protocol = _Protocol(
        judge, x, y, eps, norm, lo, hi, batch_size, device, Records(resume, header, keep_images), progress, Group()
    )
    with _exactly():
        protocol.run("clean", None)
        for attack_name, attack in attacks.items():
            protocol.run(attack_name, attack)
        found = protocol.evaluation(settings)
        if alarms:
            chosen = evenly_spaced(ALARM_SAMPLES, len(x))
            images, labels, standing = (t[chosen].to(device) for t in (x, y, protocol.robust))
            found.alarms = sanity_checks(
                judge, images, labels, eps, norm, bounds, seed, surrogate, batch_size=batch_size, standing=standing
            )
            if version == "rand":  # whose mean prediction is still random, and no set of logits
                found.alarms = [a for a in found.alarms if a.name not in (RANDOMISED, PROBABILITIES)]
                with attacking(unwrap(model)), torch.no_grad():
                    found.alarms.append(probabilities(unwrap(model)(images[:batch_size])))
            if (last := _square_after_all(attacks)) is not None:
                probe = Probe(judge, norm, bounds, seed, batch_size)
                found.alarms.append(_compared_with_gradients(*last, protocol, probe))
    return found


def _square_after_all(attacks: Mapping[str, Attack | PGD]) -> tuple[str, Square] | None:
    """The Square attack that met who had survived every attack with gradients, and its name, if there is one."""
    white_box = [name for name, attack in attacks.items() if isinstance(attack, PGD) or attack.GRADIENTS]
    square = [(name, attack) for name, attack in attacks.items() if isinstance(attack, Square)]
    order = list(attacks)
    return square[-1] if white_box and square and order.index(square[-1][0]) > order.index(white_box[-1]) else None


def _compared_with_gradients(name: str, square: Square, protocol: _Protocol, probe: Probe) -> Alarm:
    before, after = protocol.around[name]
    taken = (before & ~after).nonzero()[:, 0]
    some = taken[evenly_spaced(SQUARES, len(taken))]
    x, y, numbers = (t[some].to(protocol.device) for t in (protocol.x, protocol.y, protocol.numbers))
    return square_beats_white_box(before, after, missed_by_gradients(probe, x, y, protocol.eps, numbers, square.queries))


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
                build(model, eps, norm=norm, bounds=bounds, seed=seed + number, **settings, **execution),
                one,
            )
        elif isinstance(one, (Attack, PGD)):
            attack, name = one, type(one).__name__.lower()
            if name == "clean":
                raise ValueError("version may hold no attack of a class named Clean, under which clean images are on record")
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
    processes: Group
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        samples = len(self.y)
        self.robust = torch.ones(samples, dtype=torch.bool)
        self.broken_by, self.predicted = [""] * samples, torch.full((samples,), -1)
        self.distance = torch.full((samples,), math.inf)
        self.x_adv = self.x.clone() if self.records.images else None
        self.numbers = numbers_of(self.x)
        self.around: dict[str, tuple[Tensor, Tensor]] = {}  # who stood before and after each attack, [N]

    def run(self, name: str, attack: Attack | PGD | None) -> None:
        """One attack on all that stand, but for those that are on record; None: the clean images themselves."""
        before = self.robust.clone()
        # Who has been tried on any process: a folder may be of one machine, or slow to show what another has written.
        done = torch.stack(self.processes.gathered(self.records.done(name, len(before)))).any(0)
        mine = (before & ~done).nonzero()[self.processes.rank :: self.processes.number, 0]
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
        with attacking(self.model), torch.no_grad(), exact_multiplication():
            logits = self.model(adv)
        checks.logits(logits, x, y)
        predicted = logits.argmax(1).masked_fill(logits.isnan().any(1), -1)  # NaN is no class
        distance = norms(adv.double() - x.double(), self.norm)
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
        """Brings what is on record about an attack into the picture, from all processes, each sample once."""
        seen = torch.zeros_like(before)
        tried = broken = rejected = 0
        queries = seconds = 0.0
        for record in (record for some in self.processes.gathered([*self.records.of(name)]) for record in some):
            new = before[record.samples] & ~seen[record.samples]
            if not new.any():
                continue
            seen[record.samples] = True
            chosen, fooled = record.samples[new], new & record.fooled
            tried, broken = tried + len(chosen), broken + int(fooled.sum())
            rejected += int((new & record.claimed & ~record.fooled).sum())
            queries, seconds = queries + float(record.queries[new].sum()), seconds + record.seconds
            if name == "clean":
                self.predicted[chosen] = record.predicted[new]
            beaten = record.samples[fooled]
            self.robust[beaten] = False
            self.predicted[beaten] = record.predicted[fooled]
            self.distance[beaten] = 0.0 if name == "clean" else record.distance[fooled].float()
            if self.x_adv is not None and name != "clean":
                self.x_adv[beaten] = record.images[new[record.fooled]].to(self.x_adv)
            for sample in beaten.tolist():
                self.broken_by[sample] = name
        if not torch.equal(seen, before):
            raise RuntimeError(f"{int((seen ^ before).sum())} of {int(before.sum())} samples were not attacked by {name}")
        self.around[name] = before, self.robust.clone()
        if name != "clean":
            self.rows.append(Row(name, tried, broken, rejected, self._share(self.robust), queries / max(tried, 1), seconds))

    def _share(self, flags: Tensor) -> float:
        return int(flags.sum()) / len(flags)

    def evaluation(self, settings: dict[str, Any]) -> Evaluation:
        x, x_adv = (None, None) if self.x_adv is None else (self.x.cpu(), self.x_adv.cpu())
        return Evaluation(
            self._share(self.around["clean"][1]), self._share(self.robust), self.rows, self.broken_by, self.y.cpu(),
            self.predicted, self.distance, settings, x=x, x_adv=x_adv,
        )  # fmt: skip


@contextlib.contextmanager
def _exactly() -> Any:
    """No autocast around: attacks are as they are set, and verdicts in the model's own types."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
