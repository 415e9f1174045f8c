"""The training loop: a plain PyTorch one, that watches itself, loses nothing and does the same on any number of processes.

    trainer = fastadv.Trainer(model, objective, batches, optimizer, schedule, epochs=200, out="runs/trades")
    trainer.fit()                      # killed and called again, it goes on where it was

What a step is, in ten lines, is :func:`descents`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, processes
from ..attacks.draws import Draws
from ..engine import attacking, unwrap
from ..files import replacing
from ..objectives import FreeAT, Objective, Output
from ..processes import any_of, gathered, total
from ..progress import progress_bar
from ..shards import load, whole
from ..weights import AWP
from .averaging import SWA, Average
from .batches import Batch, Batches
from .checkpoint import Checkpoints, random_state, set_random_state
from .log import Log
from .schedules import Schedule
from .validation import Validation, alarms

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ATTACK = 1 << 40  # streams of draws: that of the attack in step k is this + k; augmentation's begin at 1 << 60
STATISTICS = 100  # batches that batch norms of a mean of weights are shown
SHOWN = 10  # steps between looks at the means, which wait for the device

Backward = Callable[[Tensor], None]


def descents(
    objective: Objective | FreeAT,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    backward: Backward,
    awp: AWP | None = None,
    weigh: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Iterator[Output]:
    """Each output of a batch with its gradients taken, for the optimiser to step by: one, or as many as Free AT replays.

    ``weigh`` is what happens to a loss before ``backward``, and before AWP ascends it: a scale for fp16, a share of the batch.

    for out in descents(objective, model, x, y, torch.Tensor.backward, awp):
        optimizer.step()
        optimizer.zero_grad()
    """
    if isinstance(objective, FreeAT):
        for out in objective(model, x, y):
            backward(weigh(out.loss))
            yield out
    elif awp is None:
        out = objective(model, x, y)
        backward(weigh(out.loss))
        yield out
    else:
        x_adv = objective.adversarial(model, x, y)
        with awp.perturb(lambda: weigh(objective.loss(model, x, y, x_adv))):
            out = objective.forward(model, x, y, x_adv)
            backward(weigh(out.loss))
            if awp.restore == "after_step":
                yield out
        objective.observe(out.logits, y)
        if awp.restore == "before_step":
            yield out


def attack_of(objective: Objective | FreeAT, model: nn.Module) -> Any:
    """What holds a method's eps and alpha: its PGD, which is made on ``model`` if need be; else itself (N-FGSM, Free AT)."""
    inner: Any = getattr(objective, "objective", objective)  # of Consistency
    if isinstance(inner, Objective) and inner.attack is None and inner.PAPER:
        inner.attack = inner.attack_on(model)
    return getattr(inner, "attack", None) or inner


class Trainer:
    """Trains a model adversarially, from the first step to the last or from wherever an earlier call was stopped.

    Args:
        model: on its device; where there are several processes, wrapped in DistributedDataParallel or sharded
            (:func:`fastadv.shards.shard`).
        objective: the method, its attack on the bare model.
        batches: what it sees (:class:`fastadv.training.batches.Batches`).
        optimizer, schedule: the learning rate is set before each step, on all parameter groups.
        epochs: how often the batches are gone through.
        out: folder of checkpoints, the log and the weights; None keeps nothing.
        awp: weight perturbation, or None.
        average: a running average of the weights, validated and saved beside the model, or None.
        validation: after each ``validate_every`` epochs; its "robust" accuracy chooses best.pt.
        ramp: factor of the attack's eps and alpha, by epochs done.
        precision: "fp32", "bf16" or "fp16", of the model under autocast, attacks included.
        clip: the largest norm of the gradient, or None.
        seed: of the random numbers of attacks, which belong to (seed, step, sample), and, with the rank, of torch's global
            generator, from which a model may draw.
        max_steps: ends the run early.
        minutes: between checkpoints within an epoch; there is always one at its end.
        saved: what best.pt and last.pt hold besides "state_dict", so that ``fastadv evaluate`` can build the model.
        passes: forwards' worth of work per image, for the efficiency shown: how near to bare model passes a step is.

    ``history`` holds a row for each epoch, as summary.csv does. Ctrl-C and SIGTERM end a run after the step it is in, with a
    checkpoint.

    Raises:
        ValueError: an argument is not as described.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | FreeAT,
        batches: Batches,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        epochs: int,
        out: str | Path | None = None,
        *,
        awp: AWP | None = None,
        average: Average | None = None,
        validation: Validation | None = None,
        validate_every: int = 1,
        ramp: Callable[[float], float] | None = None,
        precision: str = "fp32",
        clip: float | None = None,
        seed: int = 0,
        max_steps: int | None = None,
        minutes: float = 10.0,
        saved: dict[str, Any] | None = None,
        passes: float | None = None,
    ) -> None:
        checks.one_of("precision", precision, PRECISIONS)
        self.model, self.objective, self.batches, self.optimizer, self.schedule = model, objective, batches, optimizer, schedule
        self.epochs, self.validate_every = checks.integer("epochs", epochs), checks.integer("validate_every", validate_every)
        self.out = None if out is None else Path(out)
        self.awp, self.average, self.validation, self.ramp = awp, average, validation, ramp
        self.precision, self.clip, self.seed, self.minutes = precision, clip, seed, checks.number("minutes", minutes)
        self.max_steps, self.saved, self.passes = max_steps, saved or {}, passes
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.bare: nn.Module = unwrap(model)  # type: ignore[assignment]  # without DistributedDataParallel
        attack = attack_of(objective, self.bare)
        self._radius = (attack, getattr(attack, "eps", 0.0), getattr(attack, "alpha", None))
        self.epoch = self.step = self.batch = 0  # done so far; batch: of the epoch
        self.sums = torch.zeros(2, 3, dtype=torch.float64, device=self.device)  # of this epoch, and what they are divided by
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, float] = {}
        self.ringing: dict[str, str] = {}
        self._images, self._started, self._saved_at = 0, 0.0, 0.0  # of this epoch, and times

    # ------------------------------------------------------------------------------------------------------------- the loop

    def fit(self, resume: str = "auto") -> list[dict[str, Any]]:
        """Trains to the end and returns ``history``.

        Args:
            resume: "auto": from the newest checkpoint in ``out`` that can be read, else from the start. "never": from the
                start, in a folder without a run.

        Raises:
            ValueError: for "never", ``out`` holds a run; for "auto", none of its checkpoints can be read.
            KeyboardInterrupt, SystemExit: the run was stopped by Ctrl-C or SIGTERM; a checkpoint was written.
        """
        checks.one_of("resume", resume, ("auto", "never"))
        torch.manual_seed(self.seed + processes.rank())  # for what a model draws itself, such as dropout
        self._resume(resume)
        with _Signals() as told, Log(self.out if processes.rank() == 0 else None) as log, self._bar() as bar:
            self._saved_at = time.monotonic()
            while self.epoch < self.epochs and not self._ended():
                self._started, self._images = time.monotonic(), 0
                self.model.train()
                for batch in self.batches.epoch(self.epoch, self.batch):
                    self._train(batch)
                    bar.update()
                    self._pause(told, bar)
                    if self._ended():
                        self._checkpoint()  # within the epoch, where a longer run goes on
                        break
                self._end_epoch(log, bar)
        return self.history

    def _train(self, batch: Batch) -> None:
        """One batch: attack, loss, gradients, a step."""
        t = self.epoch + self.batch / len(self.batches)
        self.schedule.set(self.optimizer, t)
        self._set_radius(t)
        self.objective.draw_from(Draws(self.seed, batch.samples, ATTACK + self.step))
        share = processes.world() * len(batch.x) / batch.size  # so that the mean over ranks is that over the whole batch

        def weigh(loss: Tensor) -> Tensor:
            return self.scaler.scale(loss if share == 1 else loss * share)

        def backward(loss: Tensor) -> None:
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]

        with self._autocast():
            for out in descents(self.objective, self.model, batch.x, batch.y, backward, self.awp, weigh):
                self._update()
                last = out  # of Free AT's replays
        self._count(last, len(batch.x))
        self.step, self.batch, self._images = self.step + 1, self.batch + 1, self._images + batch.size
        if self.average is not None:
            self.average.update(self.step)

    def _update(self) -> None:
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        torch.clear_autocast_cache()  # of weights cast before they moved, which Free AT's next replay would use

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32")

    def _set_radius(self, t: float) -> None:
        if self.ramp is not None:
            attack, eps, alpha = self._radius
            factor = self.ramp(t)
            attack.eps = eps * factor
            if alpha is not None:
                attack.alpha = alpha * factor

    def _ended(self) -> bool:
        return self.max_steps is not None and self.step >= self.max_steps

    def _end_epoch(self, log: Log, bar: Any) -> None:
        seconds, lr = time.monotonic() - self._started, self.optimizer.param_groups[0]["lr"]
        row: dict[str, Any] = {"epoch": self.epoch + 1, "step": self.step, "lr": lr, **self._means(), **self._speed(seconds)}
        self.objective.end_epoch()
        for network in self._networks():
            _agree_on_statistics(network)
        whole = self.batch == len(self.batches)
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums.zero_()
        if self.validation is not None and (
            self.epoch % self.validate_every == 0 or self.epoch == self.epochs or self._ended()
        ):
            row |= self._validate(row["epoch"], whole)
        self.history.append(row)
        self._listen()
        bar.set_postfix_str(_shown(row))
        log.write(self.history, self.ringing)
        self._write("last", self.bare)
        if not self._ended():
            self._checkpoint()

    # ------------------------------------------------------------------------------------------------------ what it watches

    def _count(self, out: Output, n: int) -> None:
        unknown = self.sums.new_full((), math.nan)
        values = [out.loss.detach(), *(out.metrics.get(name, unknown) for name in ("accuracy", "robust_accuracy"))]
        seen = torch.stack([value.double() for value in values])
        known = seen.isfinite()
        known[0] = True  # a loss that is not finite is seen
        self.sums += n * torch.stack([torch.where(known, seen, 0.0), known.double()])

    def _means(self) -> dict[str, float | None]:
        """Of this epoch so far, over all processes; None: the method has no such number."""
        sums, counts = total(self.sums.clone()).tolist()
        means = [a / n if n else None for a, n in zip(sums, counts, strict=True)]
        return dict(zip(("loss", "train_clean", "train_robust"), means, strict=True))

    def _speed(self, seconds: float) -> dict[str, float]:
        rate = self._images / max(seconds, 1e-9)
        shown = {"seconds": seconds, "images_per_second": rate}
        if self.passes is not None:
            shown["efficiency"] = self.passes * self._forward_seconds * rate
        return shown

    @functools.cached_property
    def _forward_seconds(self) -> float:
        """What a bare forward pass takes, per image of all processes: the measure of everything else."""
        model, batch, randoms = self.bare, next(iter(self.batches.epoch(self.epoch))), random_state()
        seconds = []
        with attacking(model, "eval"), torch.no_grad(), self._autocast():
            for _ in range(4):
                self._wait()
                start = time.perf_counter()
                model(batch.x)
                self._wait()
                seconds.append(time.perf_counter() - start)
        set_random_state(randoms)
        return min(seconds) / batch.size

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _validate(self, epoch: int, whole: bool) -> dict[str, Any]:
        """Accuracies of the model and of its average; the best of each after a ``whole`` epoch is kept."""
        assert self.validation is not None
        if isinstance(self.average, SWA):  # whose batch statistics are the last model's
            seen = itertools.islice(self.batches.epoch(epoch - 1), STATISTICS)
            self.average.update_bn(batch.x for batch in seen)
            _agree_on_statistics(self.average.module)
        candidates = {"": self.bare} | ({} if self.average is None else {"average_": self.average.module})
        row: dict[str, Any] = {}
        for prefix, model in candidates.items():
            found = {prefix + name: value for name, value in self.validation(model).items()}
            row |= found
            if whole and found[prefix + "robust"] > self.best.get(prefix + "robust", -1.0):
                self.best |= {prefix + "robust": found[prefix + "robust"], prefix + "epoch": epoch}
                self._write("best-average" if prefix else "best", model)
        return row

    def _listen(self) -> None:
        """Says once what is wrong."""
        for name, sentence in alarms(self.history).items():
            if name not in self.ringing:
                self.ringing[name] = sentence
                if processes.rank() == 0:
                    warnings.warn(f"{name}: {sentence}", TrainingAlarm, stacklevel=4)

    def _bar(self) -> Any:
        steps = self.epochs * len(self.batches)
        shown = processes.rank() == 0
        bar = progress_bar("training", steps if self.max_steps is None else min(steps, self.max_steps), "batch", shown)
        bar.update(self.step)
        return bar

    # ---------------------------------------------------------------------------------------------------- what it does not lose

    def _pause(self, told: _Signals, bar: Any) -> None:
        """Between steps: shows how it goes, keeps it now and then, and ends where that was asked for."""
        if self.step % SHOWN == 0:
            bar.set_postfix_str(_shown(self._means() | self._speed(time.monotonic() - self._started)))
        due = self.out is not None and time.monotonic() - self._saved_at > 60 * self.minutes
        if any_of(due or told.signal is not None):
            self._checkpoint()
            if any_of(told.signal is not None):
                told.leave()

    def _checkpoint(self) -> None:
        if self.out is None:
            return
        state = self.state_dict() | {"processes": gathered(self._own_state())}
        if processes.rank() == 0:
            Checkpoints(self.out / "checkpoints").save(self.step, state)
        any_of(False)  # nobody goes on, or ends, before it is written
        self._saved_at = time.monotonic()

    def _own_state(self) -> dict[str, Any]:
        """What the rest of the run depends on and each process has of its own: batch statistics among it."""
        buffers = [[buffer.cpu() for buffer in network.buffers()] for network in self._networks()]
        return {"random": random_state(), "sums": self.sums.cpu(), "buffers": buffers, "objective": self.objective.state_dict()}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        set_random_state(state["random"])
        self.sums.copy_(state["sums"])
        for network, held in zip(self._networks(), state["buffers"], strict=True):
            for buffer, value in zip(network.buffers(), held, strict=True):
                buffer.copy_(value)
        self.objective.load_state_dict(state["objective"])

    def _networks(self) -> list[nn.Module]:
        return [self.bare] if self.average is None else [self.bare, self.average.module]

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on and that all processes share. Of sharded weights, all must ask for it, and
        the first one gets them."""
        held = {name: getattr(self, name) for name in ("epoch", "step", "batch", "history", "best", "ringing")}
        parts = {name: whole(part.state_dict()) for name, part in self._parts().items()}
        return held | parts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken."""
        for name, part in self._parts().items():
            load(part, state[name])
        for name in ("epoch", "step", "batch", "history", "best", "ringing"):
            setattr(self, name, state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.bare, "optimizer": self.optimizer, "scaler": self.scaler, "objective": self.objective,
            "awp": self.awp, "average": self.average,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}

    def _resume(self, resume: str) -> None:
        if self.out is None:
            return
        checkpoints = Checkpoints(self.out / "checkpoints")
        if processes.rank() == 0:
            for unfinished in self.out.rglob(".*.pt.*.tmp"):  # what was being written when the run was killed
                unfinished.unlink(missing_ok=True)
        if resume == "never":
            if checkpoints.paths():
                raise ValueError(f"out={str(self.out)!r} holds a run already; name another folder, or resume it with 'auto'")
            return
        state = checkpoints.newest()
        if len(set(gathered(None if state is None else state["step"]))) > 1:
            raise ValueError(f"the processes found different checkpoints: out={str(self.out)!r} must be one folder for all")
        if state is None:
            return
        self.load_state_dict(state)
        own = state["processes"]
        if len(own) == processes.world():
            self._load_own_state(own[processes.rank()])
        else:
            if processes.rank() == 0:
                self.sums.copy_(sum(each["sums"] for each in own))
            warnings.warn(
                f"the run had {len(own)} processes: what its model draws itself, as dropout, starts anew", stacklevel=3
            )

    def _write(self, name: str, model: nn.Module) -> None:
        """Weights for others: ``fastadv evaluate`` and ``load_state_dict``."""
        if self.out is None:
            return
        held = whole(model.state_dict())
        if processes.rank() == 0:
            state = {key: value.detach().cpu() for key, value in held.items()}
            with replacing(self.out / f"{name}.pt") as temporary:
                torch.save(self.saved | {"state_dict": state, "epoch": self.epoch}, temporary)


class TrainingAlarm(UserWarning):
    """A training goes wrong in a known way (:func:`fastadv.training.validation.alarms`)."""


class _Signals:
    """Notes Ctrl-C and SIGTERM, so that the step at hand can be finished; a second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def leave(self) -> None:
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.signal or signal.SIGTERM))  # as a shell reports it; another process may have been told


def _agree_on_statistics(model: nn.Module) -> None:
    """Averages the running statistics of batch norms over processes, each of which saw its own part of the batches."""
    if processes.world() > 1:
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2].startswith("running") and buffer.is_floating_point():
                total(buffer).div_(processes.world())


def _shown(row: dict[str, Any]) -> str:
    """An epoch, or what there is of it, in a line."""
    names = {"loss": "loss {:.3f}", "train_clean": "clean {:.1%}", "train_robust": "robust {:.1%}"}
    names |= {"clean": "val clean {:.1%}", "robust": "val robust {:.1%}", "average_robust": "averaged {:.1%}"}
    names |= {"images_per_second": "{:.0f} images/s", "efficiency": "{:.0%} of the model's speed"}
    return ", ".join(text.format(row[name]) for name, text in names.items() if row.get(name) is not None)
