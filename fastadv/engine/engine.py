"""How an attack is executed: eagerly, compiled, or recorded and replayed; in which precision, and on which copy of the model.

The first call with inputs of some kind is eager whatever was asked for, so that a shape that never comes back costs no
compilation. From the second on the plan for it is kept, for the eight kinds of inputs that come most often.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks, ops
from ..machine import device_name, multiplication
from ..shards import sharded
from . import choices, graphs
from .guest import Model, keeping_buffers
from .loop import L, Loop
from .passes import DTYPES, PRECISIONS, CompiledPasses, Passes, dtype_for
from .twin import Twin, TwinError

ENGINES = ("auto", "eager", "compile", "graph")
MEMORIES = ("normal", "signs")
KEPT = 8  # plans of one attack, each with its compiled code or recorded step
REMADE = 3  # calls in a row that may make the twin anew
MARGIN = 0.97  # another plan is chosen over the eager one if it takes at most so much of its time

logger = logging.getLogger("fastadv")


class Plan(NamedTuple):
    """How steps run: on compiled passes or not, replayed from a recording or not, and the images' memory layout."""

    compiled: bool = False
    replayed: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        body = "compile" if self.compiled else "graph" if self.replayed else "eager"
        return body + ", replayed" * (self.compiled and self.replayed) + ", channels_last" * self.channels_last


@dataclass
class Stats:
    """What an engine has done so far.

    Attributes:
        precision: what the model computed in during the last call: "fp32" is its own.
        twin: whether the last call attacked a frozen twin: "none", "used", or why it could not be made.
        steps: gradient steps run, by plan.
        recorded: CUDA graphs recorded; ``moved`` of them because the weights had moved to other addresses.
        choices: what "auto" chose, by kind of inputs: milliseconds a step of each plan, fastest first.
        failed: plans that could not be run, with the reason.
    """

    precision: str = "fp32"
    twin: str = "none"
    steps: dict[str, int] = field(default_factory=dict)
    recorded: int = 0
    moved: int = 0
    choices: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class Run(Generic[L]):
    """A loop set up for execution: what to step, how, and whether that gives the plain model's own bits."""

    loop: L
    step: Callable[[], None]
    exact: bool


@dataclass
class _Kept:
    """A plan in use for one kind of inputs, with what it took to set up."""

    plan: Plan
    compiled: CompiledPasses | None = None
    fixed: Any = None  # the loop that was recorded
    replay: Callable[[], None] | None = None
    addresses: tuple[int, ...] = ()
    uses: int = 0  # of these inputs, all told


class Engine:
    """The execution of one attack. Arguments as in :class:`fastadv.PGD`."""

    def __init__(
        self, engine: str = "eager", precision: str = "fp32", twin: bool = False, memory: str = "normal", bn: str = "eval"
    ) -> None:
        checks.one_of("engine", engine, ENGINES)
        checks.one_of("precision", precision, PRECISIONS)
        checks.one_of("memory", memory, MEMORIES)
        self.engine, self.precision, self.twin, self.memory = engine, precision, bool(twin), memory
        self._run_under(bn)
        self.stats = Stats()
        self._forget()

    def _run_under(self, bn: str) -> None:
        if self.twin and bn != "eval":
            raise ValueError(f"twin=True needs bn='eval', whose statistics do not depend on the batch; got bn={bn!r}")
        if self.engine == "compile" and bn == "train":
            raise ValueError("engine='compile' cannot update running statistics: use bn='eval' or 'batch', or engine='eager'")
        if self.engine == "compile" and self.memory == "signs":
            raise ValueError("engine='compile' chooses what to save itself: use memory='normal', or engine='eager'")
        self.bn = bn

    def __repr__(self) -> str:
        shown = ("engine", "precision", "twin", "memory")
        return f"Engine({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles of an attack set up their own
        kept = ("engine", "precision", "twin", "memory", "bn")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _forget(self) -> None:
        self._model: Callable[[], Model | None] = lambda: None
        self._twin: Twin | None = None
        self._twin_failed, self._remade = "", 0
        self._classes = 0  # that the model answered with
        self._seen: dict[Hashable, int] = {}
        self._kept: dict[Hashable, _Kept] = {}

    # -------------------------------------------------------------------------------------------------- the model's side

    def passes(
        self, model: Model, x: Tensor, bn: str, check: Callable[[Tensor], None] | None = None, gradients: bool = True
    ) -> Passes:
        """Eager passes on the model or its twin, in this engine's precision, for one call. Inside :func:`attacking`.

        Without ``gradients`` only forward passes may be asked for, which a twin does faster.

        Raises ValueError if a plan asked for by name cannot be had on x's device, of such a model or under ``bn``.
        """
        self._run_under(bn)
        if self.engine == "graph" and not (graphs.available(x.device) and isinstance(model, nn.Module)):
            got = f"{type(model).__name__} on {x.device}"
            raise ValueError(f"engine='graph' needs an nn.Module on a CUDA device, whose weights it can watch; got {got}")
        if self.engine != "eager" and sharded(model):
            raise ValueError(f"engine must be 'eager' for a model of FSDP2, whose weights come and go; got {self.engine!r}")
        if self._model() is not model:
            self._forget()
            self._model = weakref.ref(model) if isinstance(model, nn.Module) else lambda: model
        dtype = dtype_for(self.precision, x.device)
        self.stats.precision = next((name for name, cast in DTYPES.items() if cast == dtype), "fp32")

        def checked(logits: Tensor) -> None:
            if check is not None:
                check(logits)
            self._classes = logits.shape[1]

        program = self._twin_of(model, x, dtype) if self.twin else model
        if self._twin is not None and not gradients and self.engine in ("eager", "auto"):
            program = self._twin.forward(x)
        return Passes(program, dtype, self.memory == "signs", self.bn != "eval", checked)

    def _twin_of(self, model: Model, x: Tensor, dtype: torch.dtype | None) -> Model:
        """The model's twin with its present weights; the model itself, with one line in the log, where there can be none."""
        if self._twin_failed or not isinstance(model, nn.Module):
            return model
        try:
            if self._twin is not None and self._twin.fits(model):
                self._twin.refresh()
                self._remade = 0
            else:
                self._remade += 1
                if self._remade > REMADE:
                    raise TwinError("model: something in it other than its weights changes from call to call")
                self._twin = Twin(model, dtype)
                self._twin.check(x)
        except TwinError as reason:
            self._twin, self._twin_failed = None, str(reason)
            self.stats.twin = f"none: {reason}"
            logger.warning("twin=True: %s itself is attacked, it can have no twin: %s", type(model).__name__, reason)
            return model
        self.stats.twin = "used"
        return self._twin.module

    # ---------------------------------------------------------------------------------------------------- the loop's side

    def run(self, loop: L, model: Model, part: bool = False) -> Run[L]:
        """Sets the loop up by the plan for its kind of inputs. ``loop.passes`` is from :meth:`passes`.

        A ``part`` of a batch may have any of a dozen sizes: it is recorded, but not worth to be compiled or measured.
        """
        twinned = loop.passes.model is not model
        images = loop.adv.dim() == 4 and loop.adv.stride(1) != 1  # of one channel too, whose strides decide for what follows
        plan, kept = Plan(channels_last=twinned and images), None
        if self.engine == "graph" or (self.engine != "eager" and not part):
            key = (loop.signature(), self._surroundings(model, loop.adv.device))
            kept = self._kept.get(key)
            if kept is None and self._worth_keeping(key):
                kept = self._kept[key] = self._new(loop, model, images, twinned)
                kept.uses = self._seen[key]
            if kept is not None:
                kept.uses += 1
                plan = kept.plan
        own = loop.passes.are_of(model)
        loop, step = self._realised(kept or _Kept(plan), loop)
        exact = own and not plan.compiled and not plan.channels_last

        name = str(plan)

        def counted() -> None:
            step()
            self.stats.steps[name] = self.stats.steps.get(name, 0) + 1

        return Run(loop, counted, exact)

    def _worth_keeping(self, key: Hashable) -> bool:
        """Whether these inputs have been seen before, and twice as often as some whose plan would make room."""
        seen = self._seen.pop(key, 0)
        self._seen[key] = seen + 1
        if len(self._seen) > 1000:  # shapes without end
            del self._seen[next(iter(self._seen))]
        if seen == 0:
            return False
        if len(self._kept) >= KEPT:
            rarest = min(self._kept, key=lambda k: self._kept[k].uses)
            if 2 * self._kept[rarest].uses > seen:
                return False
            del self._kept[rarest]
        return True

    def _new(self, loop: Loop, model: Model, images: bool, twinned: bool) -> _Kept:
        """The plan for inputs like the loop's, by name or by measurement."""
        replay = graphs.available(loop.adv.device) and isinstance(model, nn.Module)
        if self.engine == "graph":
            return _Kept(Plan(replayed=True, channels_last=twinned and images))
        if isinstance(loop.passes.model, torch.jit.ScriptModule):  # a twin for forward passes, compiled already
            return _Kept(Plan(channels_last=images))
        if self.engine == "compile":
            return _Kept(Plan(compiled=True, replayed=replay, channels_last=images))
        layouts = (images,) if twinned or not images else (False, True)
        plans = [Plan(False, replayed, layout) for replayed in ((False, True) if replay else (False,)) for layout in layouts]
        if self.bn != "train" and self.memory == "normal":
            plans.append(Plan(True, replay, images))
        return self._choose(loop, model, plans)

    def _choose(self, loop: Loop, model: Model, plans: list[Plan]) -> _Kept:
        """The fastest plan, from the file of choices or by measuring each on this loop."""
        device = device_name(loop.adv.device)
        key = choices.fingerprint(model, device, loop.signature(), str(self), str(loop.passes.dtype), self.bn)
        remembered = choices.known().get(key) if key is not None else None
        shown = f"{'x'.join(map(str, loop.adv.shape))} {str(loop.adv.dtype).removeprefix('torch.')}"
        kept = next((_Kept(plan) for plan in plans if remembered is not None and str(plan) == remembered["plan"]), None)
        if kept is not None and kept.plan != plans[0] and self._tried(kept, loop, model) is None:
            kept = None  # what ran elsewhere may not run here
        if remembered is not None and kept is not None:
            milliseconds = remembered["milliseconds"]
        else:
            logger.warning("engine='auto': measuring %d ways to run this attack on %s, once", len(plans), shown)
            kept, milliseconds = self._measured(loop, model, plans)
            if key is not None:
                choices.remember(
                    key,
                    choices.Choice(
                        plan=str(kept.plan),
                        milliseconds=milliseconds,
                        model=type(model).__name__,
                        inputs=shown,
                        device=device,
                    ),
                )
        self.stats.choices[shown] = milliseconds
        return kept

    def _measured(self, loop: Loop, model: Model, plans: list[Plan]) -> tuple[_Kept, dict[str, float]]:
        """Times one step by each plan, in turns, on copies of the loop; the model and the generators are left alone."""
        device, kept = loop.adv.device, {plan: _Kept(plan) for plan in plans}
        steps = {plan: step for plan in plans if (step := self._tried(kept[plan], loop, model, must=plan == plans[0]))}
        times: dict[Plan, list[float]] = {plan: [] for plan in steps}
        with self._undisturbed(model, device):
            once = _seconds(steps[plans[0]], device)
            repeat, rounds = max(1, int(0.02 / once)), 3 if once > 0.3 else 7
            for plan in list(times) * rounds:
                try:
                    if plan in times:
                        times[plan].append(_seconds(steps[plan], device, repeat) / repeat)
                except Exception as error:  # torch.compile gives up on a model that it has to compile again and again
                    if plan == plans[0]:
                        raise
                    self._failed(plan, error)
                    del times[plan]
        least = {plan: min(seconds) for plan, seconds in times.items()}
        fastest = min(least, key=lambda plan: least[plan])
        chosen = fastest if least[fastest] <= MARGIN * least[plans[0]] else plans[0]
        return kept[chosen], {str(plan): round(1e3 * least[plan], 4) for plan in sorted(least, key=lambda p: least[p])}

    def _tried(self, kept: _Kept, loop: Loop, model: Model, must: bool = False) -> Callable[[], None] | None:
        """A step by the plan, run twice on a copy of the loop; None where that fails, for whatever reason, and may."""
        try:
            with self._undisturbed(model, loop.adv.device):
                _, step = self._realised(kept, loop.mapped(lambda t: t.detach().clone()))
                step(), step()
        except Exception as error:
            if must:
                raise
            self._failed(kept.plan, error)
            return None
        return step

    def _failed(self, plan: Plan, error: Exception) -> None:
        self.stats.failed[str(plan)] = f"{type(error).__name__}: {error}".splitlines()[0]

    @contextlib.contextmanager
    def _undisturbed(self, model: Model, device: torch.device) -> Iterator[None]:
        """Steps inside draw from copies of the generators, and leave running statistics as they were."""
        with contextlib.ExitStack() as restore:
            restore.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            if self.bn == "train":
                restore.enter_context(keeping_buffers(model))
            yield

    def _realised(self, kept: _Kept, loop: L) -> tuple[L, Callable[[], None]]:
        """The loop laid out, on the passes and behind the recording that the plan wants, each made where there is none."""
        plan = kept.plan
        if (plan.compiled or plan.replayed) and loop.passes.check is not None:  # which waits for the device, so not in the step
            if self._classes:
                loop.passes.check(torch.empty(len(loop.adv), self._classes, device="meta"))
            loop.passes.check = None
        if plan.channels_last:
            loop = loop.channels_last()
        if plan.compiled:
            if kept.compiled is None or kept.compiled.model is not loop.passes.model:
                kept.compiled = CompiledPasses(loop.passes)
            loop = copy.copy(loop)
            loop.passes = kept.compiled
        if not plan.replayed:
            return loop, loop.step
        addresses = _addresses(loop.passes.model)
        if kept.fixed is None or kept.replay is None or kept.addresses != addresses:
            device = loop.adv.device
            with self._undisturbed(loop.passes.model, device):
                # Compiles, and loads, tunes and allocates what kernels in this layout, with sizes in tensors, do at their first
                # launch, none of which can be recorded.
                loop.fixed(device).step()
            fixed = loop.fixed(device)
            try:
                kept.replay = graphs.record(fixed.step, device)
            except RuntimeError as error:
                message = f"a step of this attack cannot be recorded as a CUDA graph, use engine='eager': {error}"
                raise RuntimeError(message) from error
            self.stats.moved += kept.fixed is not None
            self.stats.recorded += 1
            kept.fixed, kept.addresses = fixed, addresses
        kept.fixed.load(loop)
        return kept.fixed, kept.replay

    def _surroundings(self, model: Model, device: torch.device) -> Hashable:
        """What besides the loop decides what its step computes."""
        modes = tuple(m.training for m in model.modules()) if self.bn != "eval" and isinstance(model, nn.Module) else ()
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        return modes, autocast, multiplication(), ops.asked_for(), graphs.stream(device)


def _addresses(model: Model) -> tuple[int, ...]:
    """Where the weights and buffers lie. Updates in place leave them there; ``.to()`` and assignment do not."""
    assert isinstance(model, nn.Module)
    return tuple(t.data_ptr() for group in (model.parameters(), model.buffers()) for t in group)


def _seconds(step: Callable[[], None], device: torch.device, repeat: int = 1) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
