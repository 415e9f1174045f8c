"""The l2 attack of Carlini and Wagner: distance and margin weighed against each other, the weight found by bisection."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks
from ..engine import Model
from ..reference.step import Scalar, spread
from .base import Batch, as_function
from .nearest import MinimumNorm, Nearest, begun, clean_logits
from .norms import norms
from .search import bucket

INSIDE = 1 - 1e-6  # what lies on a wall is brought so far inside, in half ranges, that atanh is finite
HIGHEST = 1e10  # of the weights that are tried
DECAYS = 0.9, 0.999  # of Adam's averages
LOOKS = 10  # at the progress of a descent


class CW(MinimumNorm):
    """Carlini and Wagner's l2 attack: ``x_adv = CW(model)(x, y)``.

    Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", 2017. By Adam, ``|d|^2 + c max(confidence -
    margin, 0)`` is minimised over w, where ``x + d = tanh(w)`` scaled to the box, for weights c that a bisection of each
    sample's own chooses. As in the original lengths are those of images in [0, 1], so ``initial_c`` suits any bounds. Other
    than there a sample ends a descent when its own loss has not fallen in a tenth of the steps, not when the batch's has
    not, and ``steps`` is 1000, not 10000.

    Args:
        model: any callable that maps a batch [N, ...] to logits [N, C]. Left exactly as found.
        eps: largest l2 length of a perturbation in units of x, float or [N]; None: any. Longer ones are cut short.
        steps: most steps of each descent, >= 1. Each is one forward and one input gradient.
        search_steps: descents, each with another c, >= 1.
        lr: of Adam, > 0, for w.
        confidence: by which the margin of logits shall exceed 0, >= 0.
        initial_c: the first weight, > 0; until one is large enough the next is ten times as large.
        abort_early: whether a sample ends a descent without progress.
        norm: "l2".
        targeted: y are classes to reach.
        bounds: (lo, hi) of every element.
        seed: nothing is drawn.
        engine, precision, twin, memory: as in :class:`fastadv.DDN`.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described; bounds are None or not finite.
    """

    NORMS = ("l2",)

    def __init__(
        self,
        model: Model,
        eps: Scalar | None = None,
        steps: int = 1000,
        search_steps: int = 9,
        lr: float = 0.01,
        confidence: float = 0.0,
        initial_c: float = 1e-3,
        abort_early: bool = True,
        norm: str = "l2",
        targeted: bool = False,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        super().__init__(model, eps, norm, targeted, bounds, seed, engine, precision, twin, memory)
        self.steps, self.search_steps = checks.integer("steps", steps), checks.integer("search_steps", search_steps)
        self.lr, self.initial_c = checks.number("lr", lr, positive=True), checks.number("initial_c", initial_c, positive=True)
        self.confidence, self.abort_early = checks.number("confidence", confidence), bool(abort_early)

    def _check_sizes(self) -> tuple[float, float]:
        lo, hi = super()._check_sizes()
        if not math.isfinite(hi - lo):
            raise ValueError(f"bounds must be finite for CW, whose variable is a tanh between them; got {self.bounds!r}")
        return lo, hi

    def _nearest(self, batch: Batch) -> tuple[Tensor, bool]:
        like, each = torch.zeros_like(batch.x), torch.zeros_like(batch.x.flatten(1)[:, 0])
        middle, half = (batch.lo + batch.hi) / 2, (batch.hi - batch.lo) / 2
        start = ((batch.x - middle) / half).clamp(-1, 1).mul_(INSIDE).atanh_()
        nobody = torch.zeros_like(batch.y, dtype=torch.bool)
        loop = _CW(
            **begun(batch, "margin"), start=start, w=like, mean=like.clone(), square=like.clone(), lowest=each,
            before=each.clone(), c=torch.full_like(each, self.initial_c), reached=nobody, moving=nobody.clone(),
            done=torch.zeros((), dtype=torch.float64, device=like.device), confidence=self.confidence, lr=self.lr,
        )  # fmt: skip
        # Who fools the model as it is needs no descent: its image is x.
        logits = clean_logits(batch)
        loop.keep(loop.inputs(), *loop.judged(logits, loop.loss(logits, loop.y, None)[0]))
        clean, exact = loop.fooled.clone(), True
        smallest, largest = torch.zeros_like(each), torch.full_like(each, HIGHEST)
        for _ in range(self.search_steps):
            loop.restart(~clean)
            exact = self._descend(loop, batch) and exact
            largest = torch.where(loop.reached, largest.minimum(loop.c), largest)
            smallest = torch.where(loop.reached, smallest, smallest.maximum(loop.c))
            loop.c = torch.where(largest < HIGHEST, (smallest + largest) / 2, (10 * loop.c).clamp(max=HIGHEST))
        batch.queries += loop.queries - 1
        return loop.image, exact

    @torch.enable_grad()
    def _descend(self, loop: _CW, batch: Batch) -> bool:
        """Minimises with the present weights; returns whether by the model's own passes."""
        run, rows, exact = self.engine.run(loop, batch.model), None, True
        for step in range(self.steps):
            if self.abort_early and step % math.ceil(self.steps / LOOKS) == 0:
                run.loop.look()
                moving = int(run.loop.moving.sum())
                if not moving:
                    break
                if (size := bucket(moving, len(loop.adv))) < len(run.loop.adv):
                    loop.update(run.loop, rows)
                    kept = (~run.loop.moving).byte().argsort(stable=True)[:size]
                    part, rows = run.loop.rows(kept), kept if rows is None else rows[kept]
                    part.passes = loop.passes
                    run = self.engine.run(part, batch.model, part=True)
            run.step()
            batch.forwards += 1
            exact = exact and run.exact
        loop.update(run.loop, rows)
        return exact


@dataclass(kw_only=True)
class _CW(Nearest):
    STATE: ClassVar[tuple[str, ...]] = (
        *Nearest.STATE, "start", "w", "mean", "square", "reached", "moving", "lowest", "before", "c", "done",
    )  # fmt: skip
    SETTINGS: ClassVar[tuple[str, ...]] = (*Nearest.SETTINGS, "confidence", "lr")
    RESULTS: ClassVar[tuple[str, ...]] = (*Nearest.RESULTS, "reached")

    start: Tensor  # atanh of x
    w: Tensor  # how far the variable is from there
    mean: Tensor  # Adam's averages, of the gradient
    square: Tensor  # and of its square
    done: Tensor  # steps of this descent, on the device
    c: Tensor  # [N]
    reached: Tensor  # [N], whether some image of this descent had the confidence
    moving: Tensor  # [N], whether the descent goes on
    lowest: Tensor  # [N], loss of this descent
    before: Tensor  # [N], the same at the last look
    confidence: float
    lr: float

    def restart(self, moving: Tensor) -> None:
        """From x, for who is ``moving`` [N]."""
        for state in (self.w, self.mean, self.square, self.reached, self.done):
            state.zero_()
        self.moving.copy_(moving)
        self.lowest.fill_(math.inf)
        self.before.fill_(math.inf)
        self.place()

    def look(self) -> None:
        """Who has made no progress since the last look stops."""
        self.moving &= self.lowest <= 0.9999 * self.before
        self.before.copy_(self.lowest)

    def judged(self, logits: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        gain, fooled = super().judged(logits, loss)
        return gain, fooled & (gain >= self.confidence)

    def place(self) -> None:
        """The image of the variable."""
        torch.tanh(self.start + self.w, out=self.adv)
        self.adv.mul_((self.hi - self.lo) / 2).add_((self.lo + self.hi) / 2).clamp_(self.lo, self.hi)

    def step(self) -> None:
        inputs = self.inputs()
        logits, self.losses, gradient = self.passes.gradient(inputs, self.loss, self.y, None, self.losses)
        with torch.no_grad():
            gradient = self.passes.to_scale(gradient.to(self.w.dtype), self.losses[1])
            gain, fooled = self.judged(logits, self.losses[0])
            self.keep(inputs, gain, fooled)
            self.reached |= fooled & self.moving

            width = self.hi - self.lo
            d, half = (inputs.to(self.w.dtype) - self.centre) / width, width / 2
            missing = (self.confidence - gain).clamp(min=0)
            torch.minimum(self.lowest, norms(d, "l2").square() + self.c * missing, out=self.lowest)
            weight = torch.where(missing > 0, self.c if self.loss.targeted else -self.c, 0.0)
            pull = torch.where(spread(missing > 0, d), spread(weight, d) * gradient, 0.0)
            slope = (2 * d / width + pull).nan_to_num(0.0, 0.0, 0.0)
            slope *= half - (self.adv - (self.lo + self.hi) / 2).square() / half  # through the tanh

            self.done += 1
            self.mean.lerp_(slope, 1 - DECAYS[0])
            self.square.mul_(DECAYS[1]).addcmul_(slope, slope, value=1 - DECAYS[1])
            first, second = (1 - decay**self.done for decay in DECAYS)
            change = (self.lr / first).to(self.w.dtype) * self.mean / ((self.square / second).sqrt() + 1e-8)
            self.w -= torch.where(spread(self.moving, change), change, 0.0)
            self.place()


cw = as_function(CW)
