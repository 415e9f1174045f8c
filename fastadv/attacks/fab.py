"""The fast adaptive boundary attack: the nearest adversarial image, by projections onto linearised decision boundaries.

    x_{k+1} = (1 - a) (x_k + eta d(x_k)) + a (x + eta d(x)),    d(z): from z onto the plane, inside the box

The plane is where the logits of two classes, linearised at x_k, are equal; a leans the point towards the clean image x. An
adversarial x_{k+1} is a candidate, and the search goes on from a point between it and x.

Croce and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..engine import Loop, Loss, Losses, Model, Passes
from ..reference.step import Scalar, per_sample, spread
from .base import Attack, Batch, as_function
from .norms import DUAL, norms, rounded
from .pgd import STEPS
from .search import bucket

HYPERPLANES = {"linf": ops.linf_hyperplane, "l2": ops.l2_hyperplane, "l1": ops.l1_hyperplane}
START = {"linf": 0.3, "l2": 1.0, "l1": 5.0}  # how far from x restarts begin at most, without eps, per unit of the box
FAR = 1e15  # the end of an unbounded box: squares of lengths up to it are fp32 numbers


class FAB(Attack):
    """FAB: looks for the nearest image that the model gets wrong, at the boundary that is nearest, whatever its class.

    A step linearises the boundaries to all other classes: one forward and C - 1 input gradients, and one forward that judges
    the new point. :class:`FABT` takes one class at a time, as AutoAttack does for it scales with many classes.

    Args:
        model, norm, bounds, seed, engine, precision, twin, memory: as in :class:`Attack`. The images are judged by the model
            itself, whatever the gradients come from.
        eps: radius, float or [N]. None: the nearest image found, however far.
        steps: from each start, >= 1.
        restarts: starts, >= 1. The first is x itself; the others are random, at half of the smaller of eps and the distance
            of the nearest image so far.
        early_stop: a sample stops with the first image within eps, and the others go on in smaller batches. The same samples
            are fooled, not by the nearest image. Waits for the device at each step.
        alpha_max: how much a step leans to x at most, in [0, 1].
        eta: steps overshoot the plane by this factor, >= 1.
        beta: from an adversarial image the search goes on at this fraction of its way from x, in [0, 1].
        targeted: y are classes to reach (not in the paper: the boundary is that between y and its strongest rival).

    The defaults are AutoAttack's. A clean image that the model gets wrong is its own nearest one. A sample for which there is
    none within eps gets the nearest image, or the last, drawn into the ball.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described; nothing has been changed then.
    """

    EPS_OPTIONAL: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        eps: Scalar | None = None,
        steps: int = 100,
        restarts: int = 1,
        early_stop: bool = False,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        norm: str = "linf",
        targeted: bool = False,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        super().__init__(model, eps, norm, targeted, bounds, seed, engine, precision, twin, memory)
        checks.integer("steps", steps)
        checks.integer("restarts", restarts)
        for name, value, least, most in (("alpha_max", alpha_max, 0, 1), ("eta", eta, 1, math.inf), ("beta", beta, 0, 1)):
            if not least <= checks.number(name, value) <= most:
                raise ValueError(f"{name} must be in [{least}, {most}]; got {value!r}")
        self.steps, self.restarts, self.early_stop = steps, restarts, early_stop
        self.alpha_max, self.eta, self.beta = alpha_max, eta, beta

    def _attack(self, batch: Batch) -> Tensor:
        judge = Passes(batch.model)
        logits = batch.logits(batch.x)
        exact = batch.passes.are_of(batch.model)
        if not exact:
            logits = judge.logits(batch.inputs(batch.x))
            batch.forwards, batch.queries = batch.forwards + 1, batch.queries + 1
        done = batch.fooled(logits)
        loop = _Approach(
            adv=batch.x, centre=batch.x, y=batch.y, other=None, eps=batch.eps, image=batch.x.clone(),
            distance=torch.where(done, 0.0, math.inf).to(batch.x.dtype), done=done, known=None,
            lo=max(batch.lo, -FAR), hi=min(batch.hi, FAR), norm=self.norm, targeted=self.targeted, dtype=batch.dtype,
            alpha_max=self.alpha_max, eta=self.eta, beta=self.beta, early_stop=self.early_stop and batch.eps is not None,
        )  # fmt: skip
        loop.passes, loop.judge = batch.passes, judge
        for number, loop.other in enumerate(self._others(batch, logits)):
            for restart in range(self.restarts):
                loop.adv = self._start(batch, loop, number * self.restarts + restart) if restart else batch.x.clone()
                loop.known = None if exact else torch.full_like(logits, math.nan) if restart else logits.clone()
                self._approach(batch, loop)

        image = torch.where(spread(loop.distance.isfinite(), batch.x), loop.image, loop.adv)
        if batch.eps is None:
            return image
        within = spread(_within(loop.distance, batch.eps), batch.x)
        drawn_in = STEPS[self.norm](image.clone(), image, batch.x, 0.0, batch.eps, batch.lo, batch.hi)
        return torch.where(within, image, drawn_in)

    def _others(self, batch: Batch, logits: Tensor) -> list[Tensor | None]:
        """The classes [N] whose boundaries with y are approached one after the other. None: that of whichever is nearest."""
        return [None]

    def _start(self, batch: Batch, loop: _Approach, number: int) -> Tensor:
        """A random point half as far from x as it may be."""
        shape, dtype = batch.x.shape[1:], batch.x.dtype
        if self.norm == "linf":
            noise = batch.draws.uniform(number, *shape, dtype=dtype) * 2 - 1
        else:
            noise = batch.draws.normal(number, *shape, dtype=dtype)
        eps = START[self.norm] * batch.span if batch.eps is None else batch.eps
        radius = torch.minimum(loop.distance, torch.as_tensor(per_sample(eps, loop.distance)).to(loop.distance))
        return (batch.x + spread(0.5 * radius / norms(noise, self.norm), noise) * noise).clamp(batch.lo, batch.hi)

    def _approach(self, batch: Batch, entire: _Approach) -> None:
        """All steps from ``entire.adv``. Who is done leaves the batch, at sizes that return."""
        loop, rows = entire, torch.arange(len(batch.y), device=batch.y.device)
        run = None
        for _ in range(self.steps):
            if run is None or loop.early_stop:
                standing = int((~loop.done).sum())
                if not standing:
                    break
                size = bucket(standing, len(batch.y))
                if run is None or size < len(rows):
                    entire.update(loop, rows)
                    kept = loop.done.byte().argsort(stable=True)[:size]
                    part, rows = loop.rows(kept), rows[kept]
                    part.passes = entire.passes
                    run = self._engine.run(part, batch.model, part=size < len(batch.y))
                    loop = run.loop
            run.step()
            batch.forwards += 2
            batch.queries[rows] += 2
        entire.update(loop, rows)


class FABT(FAB):
    """FAB-T, the targeted form of FAB that AutoAttack runs: one class after the other, each with its own boundary.

    A step is one forward with one input gradient, and one forward that judges the new point, whatever the number of classes.
    Any wrong class counts as success.

    Args:
        targets: classes, >= 1: those with the highest clean logits besides y, C - 1 at most.
        others: as in :class:`FAB`; ``steps`` and ``restarts`` are for each class.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described; nothing has been changed then.
    """

    def __init__(
        self,
        model: Model,
        eps: Scalar | None = None,
        targets: int = 9,
        steps: int = 100,
        restarts: int = 1,
        early_stop: bool = False,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        norm: str = "linf",
        bounds: tuple[float, float] | None = (0.0, 1.0),
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        super().__init__(
            model, eps, steps, restarts, early_stop, alpha_max, eta, beta, norm, False, bounds, seed, engine, precision, twin,
            memory,
        )  # fmt: skip
        checks.integer("targets", targets)
        self.targets = targets

    def _others(self, batch: Batch, logits: Tensor) -> list[Tensor | None]:
        rivals = logits.scatter(1, batch.y[:, None], -math.inf)
        return [*rivals.topk(min(self.targets, logits.shape[1] - 1)).indices.unbind(1)]


fab = as_function(FAB)
fabt = as_function(FABT)


@dataclass
class _Approach(Loop):
    """One batch on its way to a boundary, and the nearest adversarial image of each sample."""

    STATE: ClassVar[tuple[str, ...]] = ("adv", "centre", "y", "other", "eps", "image", "distance", "done", "known")
    SCRATCH: ClassVar[tuple[str, ...]] = ("losses", "gradient")
    SETTINGS: ClassVar[tuple[str, ...]] = (
        "lo", "hi", "norm", "targeted", "dtype", "alpha_max", "eta", "beta", "early_stop",
    )  # fmt: skip
    RESULTS: ClassVar[tuple[str, ...]] = ("adv", "image", "distance", "done", "known")

    adv: Tensor
    centre: Tensor
    y: Tensor
    other: Tensor | None  # the class beyond the boundary; None: whichever is nearest
    eps: Scalar | None
    image: Tensor
    distance: Tensor  # of the image, inf where there is none
    done: Tensor  # who keeps the image it has
    known: Tensor | None  # the model's own logits, NaN where adv is not where it was asked; None: the passes' are its own
    lo: float
    hi: float
    norm: str
    targeted: bool
    dtype: torch.dtype  # of the images that the model is given
    alpha_max: float
    eta: float
    beta: float
    early_stop: bool
    losses: Losses | None = None
    gradient: Tensor | None = None

    judge: Passes = field(init=False)  # the model itself

    def step(self) -> None:
        self.gradient = None  # frees its memory, which the next one then takes without new page faults
        rise, self.gradient = self.boundary(self.inputs())
        with torch.no_grad():
            self.move(rise, self.gradient)
            inputs = self.inputs()
            logits = self.judge.logits(inputs)
            reached = logits.argmax(1) == self.y
            fooled = reached if self.targeted else ~reached
            if self.known is not None:
                self.known.copy_(logits.masked_fill(fooled[:, None], math.nan))  # those go elsewhere
            self.keep_nearest(inputs, fooled)
            self.adv.lerp_(self.centre, spread(fooled * (1 - self.beta), self.adv).to(self.adv.dtype))

    def boundary(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The difference of logits [N] that is 0 on the boundary, and its gradient."""
        if self.other is None and not self.targeted:
            return self.nearest_boundary(inputs)
        loss: Loss = _rivalry if self.targeted else _difference
        with torch.enable_grad():
            logits, self.losses, gradient = self.passes.gradient(inputs, loss, self.y, self.other)
        if self.known is not None:
            return self.scaled(*loss(self.own(logits), self.y, self.other)), gradient
        return self.scaled(*self.losses), gradient

    def nearest_boundary(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """That of the class whose linearised boundary is nearest. No more than two gradients are held at a time."""
        with torch.enable_grad():
            logits, pullback = self.passes.pullback(inputs)
        logits = self.own(logits)
        rise, gradient = torch.zeros_like(logits[:, 0]), torch.zeros_like(inputs)
        nearest = torch.full_like(rise, math.inf)
        for class_after in range(1, logits.shape[1]):
            losses = _difference(logits, self.y, (self.y + class_after) % logits.shape[1])
            candidate, height = pullback(losses[1]), self.scaled(*losses)
            distance = height.abs() / norms(candidate, DUAL[self.norm])
            nearer = distance < nearest
            nearest, rise = torch.where(nearer, distance, nearest), torch.where(nearer, height, rise)
            torch.where(spread(nearer, gradient), candidate, gradient, out=gradient)
        return rise, gradient

    def own(self, logits: Tensor) -> Tensor:
        """The model's own logits, where they are known: by those of a twin or in low precision, a point just short of the
        model's boundary may seem to lie beyond it, and would stay there."""
        return logits if self.known is None else torch.where(self.known.isnan(), logits, self.known.to(logits.dtype))

    def scaled(self, rise: Tensor, dlogits: Tensor) -> Tensor:
        """``rise`` in the scale that passes give its gradient in fp16; the largest element of these ``dlogits`` is 1."""
        return rise * self.passes.cotangent(dlogits).abs().amax(1)

    def move(self, rise: Tensor, gradient: Tensor) -> None:
        """Over the plane on which the linearised difference is 0."""
        back = (gradient * (self.adv - self.centre)).sum(tuple(range(1, self.adv.dim())))
        points, gaps = torch.cat([self.adv, self.centre]), torch.cat([-rise, back - rise])
        moves = HYPERPLANES[self.norm](points, gradient, gaps, self.lo, self.hi)
        ours, cleans = norms(moves, self.norm).clamp(min=1e-8).chunk(2)
        alpha = (ours / (ours + cleans)).clamp(max=self.alpha_max)
        points.add_(moves, alpha=self.eta)
        moved, leant = points.chunk(2)
        torch.lerp(moved, leant, spread(alpha, moved), out=self.adv).clamp_(self.lo, self.hi)

    def keep_nearest(self, inputs: Tensor, fooled: Tensor) -> None:
        distance = norms(inputs.to(self.adv.dtype) - self.centre, self.norm)
        nearer = fooled & ~self.done & (distance < self.distance)
        torch.where(spread(nearer, self.image), inputs.to(self.image.dtype), self.image, out=self.image)
        torch.where(nearer, distance, self.distance, out=self.distance)
        if self.early_stop:
            assert self.eps is not None
            self.done.logical_or_(_within(self.distance, self.eps))

    def inputs(self) -> Tensor:
        """The images as the model gets them, in no ball."""
        return rounded(self.adv, self.centre, self.dtype)

    def update(self, other: _Approach, rows: Tensor) -> None:
        """Takes over what has become of these samples in a loop that was made of this one."""
        if other is not self:
            for name in self.RESULTS:
                if (found := getattr(other, name)) is not None:
                    getattr(self, name)[rows] = found.detach()


def _difference(logits: Tensor, y: Tensor, other: Tensor, out: Losses | None = None) -> Losses:
    """``z_other - z_y`` and its gradient."""
    other, y = other[:, None], y[:, None]
    rise = logits.gather(1, other) - logits.gather(1, y)
    return rise[:, 0], torch.zeros_like(logits).scatter(1, other, 1.0).scatter(1, y, -1.0)


def _rivalry(logits: Tensor, y: Tensor, other: Tensor | None, out: Losses | None = None) -> Losses:
    """``max_{k != y} z_k - z_y`` and its gradient."""
    return ops.margin(logits, y, out=out)


def _within(distance: Tensor, eps: Scalar) -> Tensor:
    """In float64, so that no eps is rounded up."""
    inside: Tensor = distance.double() <= per_sample(eps, distance, torch.float64)
    return inside
