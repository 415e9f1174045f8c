"""Auto-PGD: PGD with momentum whose step size follows from the progress it makes, so that it has none to be tuned.

    z       = project(x_k + alpha * direction(grad loss))
    x_{k+1} = project(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))

At checkpoints, which come ever closer, a sample whose loss has risen too rarely or not at all goes back to its best image and
halves its alpha.

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks", 2020;
in the l1 ball, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..engine import Losses, Model, Passes
from ..reference.step import Scalar, per_sample, spread
from .base import Attack, Batch, as_function
from .losses import LABEL_LOSSES, AttackLoss, Towards
from .norms import norms
from .pgd import STEPS
from .search import Search, better, drive

MOMENTUM = 0.75  # the share of the step; the rest is of the one before. The first is a step alone
RHO = 0.75  # of the steps since the last checkpoint must raise the loss
FIRST_CHECK, CLOSER, LEAST = (
    0.22,
    0.03,
    0.06,
)  # of all steps: the first interval, how much shorter each next one is, the shortest
L1_CHECK = 0.04  # the interval in the l1 ball
L1_STAGES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))  # multiples of eps, and shares of the steps
L1_SHARE = 0.2  # of the elements that a first l1 step moves, in a single stage
L1_SPARSER, L1_SPARSER_STILL = 1.5, 0.95  # then so much fewer than have changed; back to the best if these are so much fewer
L1_SLOWER, L1_SLOWEST = 1.5, 10.0  # what divides alpha, and eps over the smallest alpha


class APGD(Attack):
    """A reusable APGD attack: ``x_adv = APGD(model, eps=8/255)(x, y)``.

    Args:
        model: as :class:`Attack`, like all that is not listed here.
        eps: radius in units of x, float or per-sample [N].
        steps: gradient steps, >= 1. ``steps`` + 1 forward passes and ``steps`` input gradients a restart.
        loss: "ce" (in its attack form, which cannot saturate), "dlr" or "margin".
        restarts: independent starts; those that have not fooled the model go on.
        norm: "linf", "l2" or "l1".
        early_stop: a sample stops with its first fooling image and leaves the batch: the same success for less. Else the
            image of the highest loss that fools the model is looked for to the end.
        multi_eps: in the l1 ball, 30% of the steps in one of 3 eps, 30% of 2 eps, and only then eps: what AutoAttack runs.

    Returns the best image of each sample: a fooling one before any other, then the highest loss.

    Differs from the authors' code in that the first step counts as a rise of the loss if it is one, as in the paper; and in
    that the first l1 steps move two thirds of the elements. There the code counts those that the start has changed, and with
    them the rounding errors that its projection leaves in the others; without these l1 attacks would be weaker.
    """

    def __init__(
        self,
        model: Model,
        eps: Scalar,
        steps: int = 100,
        loss: str = "ce",
        restarts: int = 1,
        norm: str = "linf",
        targeted: bool = False,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        early_stop: bool = False,
        multi_eps: bool = True,
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        checks.one_of("loss", loss, LABEL_LOSSES)
        if loss == "dlr" and targeted:
            raise ValueError("loss='dlr' has no targeted form that needs y alone; use 'ce' or 'margin', or APGDT")
        self.steps, self.loss, self.restarts = checks.integer("steps", steps), loss, checks.integer("restarts", restarts)
        self.early_stop, self.multi_eps = early_stop, multi_eps
        super().__init__(model, eps, norm, targeted, bounds, seed, engine, precision, twin, memory)

    def _attack(self, batch: Batch) -> Tensor:
        image, fooled = batch.x.clone(), torch.zeros_like(batch.y, dtype=torch.bool)
        score = torch.full_like(fooled, -math.inf, dtype=image.dtype)
        for number, (loss, reference) in enumerate(self._runs(batch)):
            going = (~fooled).nonzero()[:, 0] if self.early_stop else torch.arange(len(fooled), device=fooled.device)
            if not len(going):
                break
            part = batch.rows(going, stream=number)
            found = self._run(part, loss, None if reference is None else reference[going])
            batch.count(part, going)
            improves = better(found.score, found.fooled, score[going], fooled[going])
            chosen = going[improves]
            image[chosen], score[chosen], fooled[chosen] = (t[improves] for t in (found.image, found.score, found.fooled))
        return image

    def _runs(self, batch: Batch) -> Iterator[tuple[AttackLoss | Towards, Tensor | None]]:
        """The loss of each run, with its reference."""
        for _ in range(self.restarts):
            yield AttackLoss(self.loss, self.targeted), None

    def _run(self, batch: Batch, loss: AttackLoss | Towards, reference: Tensor | None) -> _Ascent:
        """One run from a random start."""
        assert batch.eps is not None
        if self.norm != "l1":
            return self._ascend(batch, loss, reference, _start(batch), batch.eps, self.steps, self.early_stop)
        adv = batch.x + batch.draws.normal(0, *batch.x.shape[1:], dtype=batch.x.dtype)
        for stage, (factor, steps) in enumerate(stages := _stages(self.steps) if self.multi_eps else [(1.0, self.steps)]):
            eps, last = factor * batch.eps, stage == len(stages) - 1
            adv = ops.l1_step(adv, adv, batch.x, 0.0, eps, batch.lo, batch.hi)  # a step of length 0 is the projection
            share = None if stage else 1 / L1_SPARSER if self.multi_eps else L1_SHARE  # the noise had changed all elements
            loop = self._ascend(batch, loss, reference, adv, eps, steps, self.early_stop and last, share)
            adv = loop.highest
        return loop

    def _ascend(
        self, batch: Batch, loss: AttackLoss | Towards, reference: Tensor | None, start: Tensor, eps: Scalar, steps: int,
        early_stop: bool, share: float | None = None,
    ) -> _Ascent:  # fmt: skip
        loop = _Ascent(
            adv=start, centre=batch.x, y=batch.y, reference=reference, label=batch.y, eps=eps, lo=batch.lo, hi=batch.hi,
            dtype=batch.dtype, norm=self.norm, loss=loss, early_stop=early_stop,
        )  # fmt: skip
        loop.passes = batch.passes
        forwards = loop.begin(batch.model, share)
        more, _ = drive(self._engine, loop, batch.model, steps - 1, early_stop, early_stop, _checkpoints(self.norm, steps))
        batch.forwards += forwards + more
        batch.queries += 1 + loop.asked
        return loop


class APGDT(APGD):
    """APGD towards several classes, one after the other, by the targeted DLR loss; any other class counts.

    Args:
        model, eps, ...: as :class:`APGD`.
        targets: the classes with the highest clean logits, apart from the label, that are tried; at most C - 1 of them.
    """

    def __init__(
        self,
        model: Model,
        eps: Scalar,
        steps: int = 100,
        targets: int = 9,
        restarts: int = 1,
        norm: str = "linf",
        bounds: tuple[float, float] | None = (0.0, 1.0),
        early_stop: bool = False,
        multi_eps: bool = True,
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        self.targets = checks.integer("targets", targets)
        super().__init__(
            model,
            eps,
            steps,
            "dlr",
            restarts,
            norm,
            False,
            bounds,
            early_stop,
            multi_eps,
            seed,
            engine,
            precision,
            twin,
            memory,
        )

    def _runs(self, batch: Batch) -> Iterator[tuple[AttackLoss | Towards, Tensor | None]]:
        for target in targets_of(batch, self.targets):
            for _ in range(self.restarts):
                yield Towards(), target


def targets_of(batch: Batch, targets: int) -> list[Tensor]:
    """The classes [N] with the highest clean logits, apart from the label: highest first."""
    others = batch.logits(batch.x).scatter(1, batch.y[:, None], -math.inf)
    return list(others.sort(dim=1, descending=True, stable=True).indices[:, : min(targets, others.shape[1] - 1)].unbind(1))


def _start(batch: Batch) -> Tensor:
    """A random start on the sphere, clamped to the box."""
    assert batch.eps is not None
    draw = batch.draws.uniform if batch.norm == "linf" else batch.draws.normal
    noise = draw(0, *batch.x.shape[1:], dtype=batch.x.dtype)
    if batch.norm == "linf":
        noise = noise.mul_(2).sub_(1)
    length = per_sample(norms(noise, batch.norm), noise)
    start = batch.x + noise.div_(length).mul_(per_sample(batch.eps, noise))
    return STEPS[batch.norm](start, start, batch.x, 0.0, batch.eps, batch.lo, batch.hi)


def _stages(steps: int) -> list[tuple[float, int]]:
    """The multiples of eps, and the steps, of the l1 attack's stages."""
    first = [(factor, math.ceil(share * steps)) for factor, share in L1_STAGES[:-1]]
    left = steps - sum(n for _, n in first)
    return [*first, (1.0, left)] if left > 0 else [(1.0, steps)]


def _checkpoints(norm: str, steps: int) -> Callable[[_Ascent, int], None]:
    """What is to be done after each step: at a checkpoint, to look back at the steps since the one before."""
    shrinks = norm != "l1"
    interval = max(int((FIRST_CHECK if shrinks else L1_CHECK) * steps), 1)
    due: dict[int, int] = {}  # the number of steps looked back at, by step
    at = interval
    while at < steps:
        due[at - 1] = interval
        if shrinks:
            interval = max(interval - max(int(CLOSER * steps), 1), max(int(LEAST * steps), 1))
        at += interval

    def after(loop: _Ascent, step: int) -> None:
        if step in due:
            loop.check(due[step])

    return after


@dataclass(kw_only=True)
class _Ascent(Search):
    """APGD's steps on one batch. Each moves the images and then asks the model about them, so that the one to come knows.

    Attributes:
        highest, highest_gradient, highest_score: where the score was highest so far, fooling or not.
        gradient: at the images.
        better, taken: whether the images are these, and the best ones (:class:`Search`), of which the next move takes note.
        rises: of the score, since the last checkpoint. ``halved``: whether alpha was, there.
        momentum: the share [N] of the next step, the rest is of the one before.
        share: of a sample's elements that an l1 step moves; ``changed``: how many were, at the last checkpoint.
    """

    STATE: ClassVar[tuple[str, ...]] = (
        "adv", "centre", "y", "reference", "label", "eps", "image", "score", "fooled", "old", "alpha", "gradient", "highest",
        "highest_gradient", "highest_score", "better", "taken", "last", "rises", "checked", "halved", "share", "changed",
        "momentum",
    )  # fmt: skip
    SCRATCH: ClassVar[tuple[str, ...]] = ("losses",)
    SETTINGS: ClassVar[tuple[str, ...]] = ("lo", "hi", "dtype", "norm", "loss", "early_stop")
    RESULTS: ClassVar[tuple[str, ...]] = (*Search.RESULTS, "highest")  # where the next stage in the l1 ball starts

    early_stop: bool
    losses: Losses | None = None

    def begin(self, model: Model, share: float | None) -> int:
        """Asks about the start; returns the forward passes that it took. ``share``: of l1 steps; None: by what has changed."""
        self.compare()
        self.image = self.centre.clone()
        self.old, self.highest, elements = self.adv.clone(), self.adv.clone(), self.adv[0].numel()
        self.gradient, self.highest_gradient = torch.empty_like(self.adv), torch.empty_like(self.adv)
        self.highest_score, self.last, self.rises, self.halved = (self.score.clone() for _ in range(4))
        self.better, self.taken = torch.zeros_like(self.fooled), torch.zeros_like(self.fooled)
        self.changed = norms(self.adv - self.centre, "l0")
        self.share = self.changed / elements / L1_SPARSER if share is None else torch.full_like(self.changed, share)
        if share is not None:
            self.changed.fill_(elements)
        size = (1.0 if self.norm == "l1" else 2.0) * self._radius().expand(len(self.adv))
        self.alpha = -size if self.loss.targeted else size
        self.momentum = torch.ones_like(size)
        self._ask()
        self.rises.zero_()
        self.halved, self.checked = torch.ones_like(self.fooled), self.last.clone()
        nothing = torch.zeros_like(self.fooled)
        return 1 + (0 if self.passes.are_of(model) or not self.early_stop else self.confirm(nothing, Passes(model)))

    def step(self) -> None:
        with torch.no_grad():
            self._move()
            self._ask()

    def evaluate(self) -> None:
        with torch.no_grad():
            self._move()
            logits = self.passes.logits(self.inputs())
            self.losses = self.loss(logits, self.y, self.reference, self.losses)
            self._take_note(logits)
            self._note()

    def _ask(self) -> None:
        """The model about the images: losses and gradient."""
        with torch.enable_grad():
            logits, self.losses, gradient = self.passes.gradient(self.inputs(), self.loss, self.y, self.reference, self.losses)
        self.gradient.copy_(gradient)
        self._take_note(logits)

    def _take_note(self, logits: Tensor) -> None:
        assert self.losses is not None
        score, fooled = self.judged(logits, self.losses[0])
        torch.gt(score, self.highest_score, out=self.better)
        torch.where(self.better, score, self.highest_score, out=self.highest_score)
        self.taken.copy_(self.best(score, fooled, self.early_stop))
        torch.where(self.taken, score, self.score, out=self.score)
        self.fooled.logical_or_(fooled)
        self.rises.add_(score > self.last)
        self.last.copy_(score)

    def _move(self) -> None:
        if self.norm == "linf":
            ops.apgd_step_(
                self.adv, self.old, self.highest, self.highest_gradient, self.image, self.gradient, self.centre,
                self.alpha, self.momentum, self.eps, self.lo, self.hi, self.better, self.taken,
            )  # fmt: skip
            self.momentum.fill_(MOMENTUM)
            return
        self._note()
        ball = self.centre, self.alpha, self.eps, self.lo, self.hi
        if self.norm == "l1":
            self._sparse_step()
        else:
            share = spread(self.momentum.to(self.adv.dtype), self.adv)
            moved = ops.l2_step(self.adv, self.gradient, *ball).sub_(self.adv).mul_(share)
            moved.add_(self.adv).add_((self.adv - self.old).mul_(1 - share))
            self.momentum.fill_(MOMENTUM)
            self.old.copy_(self.adv)
            self.adv.copy_(ops.l2_step_(moved, moved, self.centre, 0.0, *ball[2:]))

    def _sparse_step(self) -> None:
        """An l1 step of the ``share`` of elements with the largest gradient, then the projection."""
        pull = self.gradient.abs().nan_to_num_(0.0).flatten(1)
        elements = pull.shape[1]
        at = ((1 - self.share) * elements).long().clamp_(0, elements - 1)
        least = pull.sort(1).values.gather(1, at[:, None])
        direction = torch.where(pull >= least, self.gradient.flatten(1).nan_to_num(0.0).sign(), 0.0)
        direction /= direction.abs().sum(1, keepdim=True).clamp_(min=1e-10)
        self.adv.add_(direction.view_as(self.adv) * per_sample(self.alpha, self.adv))
        ops.l1_step_(self.adv, self.adv, self.centre, 0.0, self.eps, self.lo, self.hi)

    def _note(self) -> None:
        """Keeps the images that are the best ones."""
        better, taken = spread(self.better, self.adv), spread(self.taken, self.adv)
        torch.where(better, self.adv, self.highest, out=self.highest)
        torch.where(better, self.gradient, self.highest_gradient, out=self.highest_gradient)
        torch.where(taken, self.adv, self.image, out=self.image)
        self.better.zero_()
        self.taken.zero_()

    def check(self, steps: int) -> None:
        """A checkpoint: who has not got far in the last ``steps`` goes back to where its score was highest."""
        with torch.no_grad():
            self._note()
            if self.norm == "l1":
                changed, most = norms(self.highest - self.centre, "l0"), self._radius()
                back = changed / self.changed < L1_SPARSER_STILL
                self.share.copy_(changed / self.adv[0].numel() / L1_SPARSER)
                size = torch.where(back, most, self.alpha.abs() / L1_SLOWER).clamp(most / L1_SLOWEST, most)
                self.alpha.copy_(size.copysign(self.alpha))
                self.changed.copy_(changed)
            else:
                stuck = ~self.halved & (self.checked >= self.highest_score)
                back = (self.rises <= RHO * steps) | stuck
                self.alpha.div_(1.0 + back)
                self.halved.copy_(back)
                self.checked.copy_(self.highest_score)
                self.rises.zero_()
            these = spread(back, self.adv)
            torch.where(these, self.highest, self.adv, out=self.adv)
            torch.where(these, self.highest_gradient, self.gradient, out=self.gradient)

    def _radius(self) -> Tensor:
        return torch.as_tensor(self.eps, dtype=torch.float64, device=self.adv.device)

    def confirm(self, stopped: Tensor, passes: Passes) -> int:
        with torch.no_grad():  # the images may have been asked for gradients
            self._note()
        return super().confirm(stopped, passes)

    def update(self, other: Search, rows: Tensor | None) -> None:
        assert isinstance(other, _Ascent)
        with torch.no_grad():
            other._note()
        super().update(other, rows)


apgd = as_function(APGD)
apgdt = as_function(APGDT)
