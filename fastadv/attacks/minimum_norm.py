"""Minimum-norm attacks by a ball whose radius follows success: DDN (l2) and FMN (l0, l1, l2, linf).

Both walk along the gradient with steps that grow shorter, and after each bring the image back into a ball: a smaller one
where the image fools the model, a larger one where it does not. So the walk ends along the decision boundary, at its nearest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks
from ..engine import Model
from ..reference.step import Scalar, rows, spread
from .base import Batch, as_function
from .nearest import MinimumNorm, Nearest, begun, driven, farthest
from .norms import DUAL, largest, norms, project, unit


class DDN(MinimumNorm):
    """Decoupled direction and norm: ``x_adv = DDN(model)(x, y)``.

    Rony, Hafemann, Oliveira, Ben Ayed, Sabourin and Granger, "Decoupling Direction and Norm for Efficient Gradient-Based L2
    Adversarial Attacks and Defenses", 2019. Cross-entropy is climbed in its attack form, which cannot saturate. Other than
    in the paper images are not rounded to 256 levels, and with ``eps`` the radius does not grow beyond it.

    Args:
        model: any callable that maps a batch [N, ...] to logits [N, C]. Left exactly as found.
        eps: largest l2 length of a perturbation in units of x, float or [N]; None: any.
        steps: gradient steps, >= 1. Each is one forward and one input gradient; one more forward judges the last.
        gamma: in (0, 1), by which the radius shrinks or grows in a step.
        init_norm: the first radius, > 0, in units of hi - lo (of x where there are no bounds).
        norm: "l2".
        targeted: y are classes to reach.
        bounds: (lo, hi) of every element, or None for unbounded.
        seed: of the direction in which a sample without gradient goes.
        engine, precision, twin, memory: how the model is run, as in :class:`fastadv.PGD`. Images that fool the model only
            in another precision or on its twin are moved on, away from x, until they fool it too.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described.
    """

    NORMS = ("l2",)

    def __init__(
        self,
        model: Model,
        eps: Scalar | None = None,
        steps: int = 100,
        gamma: float = 0.05,
        init_norm: float = 1.0,
        norm: str = "l2",
        targeted: bool = False,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        super().__init__(model, eps, norm, targeted, bounds, seed, engine, precision, twin, memory)
        self.steps, self.gamma = checks.integer("steps", steps), _fraction("gamma", gamma)
        self.init_norm = checks.number("init_norm", init_norm, positive=True)

    def _nearest(self, batch: Batch) -> tuple[Tensor, bool]:
        limit = farthest(batch)
        loop = _DDN(
            **begun(batch, "ce"), steps=self.steps, limit=limit, radius=limit.clamp(max=self.init_norm * batch.span),
            spare=unit(batch.draws.normal(0, *batch.x.shape[1:], dtype=batch.x.dtype)),
            gamma=self.gamma, longest=self._sign * batch.span, shortest=self._sign * 0.01 * batch.span,
        )  # fmt: skip
        return driven(self, loop, batch, self.steps)


class FMN(MinimumNorm):
    """Fast minimum-norm attack: ``x_adv = FMN(model, norm="linf")(x, y)``.

    Pintor, Roli, Brendel and Biggio, "Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints", 2021. The
    walk starts at x. Other than in the paper l1 projections are onto ball and box together, l2 ones onto the sphere, and l0
    ones keep one element more than the radius; before the first success the radius grows by ``gamma`` at least, even where the
    model made linear has its boundary nearer, in front of which the walk could else stay; and with ``eps`` it does not grow
    beyond that.

    Args:
        model: any callable that maps a batch [N, ...] to logits [N, C]. Left exactly as found.
        eps: largest length of a perturbation in the norm, in units of x (l0: elements), float or [N]; None: any.
        steps: gradient steps, >= 1. Each is one forward and one input gradient; one more forward judges the last.
        alpha: l2 length of the first step, > 0, in units of hi - lo (of x where there are no bounds). Along a cosine it falls
            to a hundredth.
        gamma: in (0, 1), by which the radius shrinks or grows in the first step. Along a cosine it falls to
            ``gamma_final``, in (0, gamma].
        norm: "l0" (counting elements), "l1", "l2" or "linf".
        targeted, bounds, seed, engine, precision, twin, memory: as in :class:`fastadv.DDN`; nothing is drawn.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described.
    """

    NORMS = ("l0", "l1", "l2", "linf")

    def __init__(
        self,
        model: Model,
        eps: Scalar | None = None,
        steps: int = 100,
        alpha: float = 1.0,
        gamma: float = 0.05,
        gamma_final: float = 0.001,
        norm: str = "l2",
        targeted: bool = False,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        super().__init__(model, eps, norm, targeted, bounds, seed, engine, precision, twin, memory)
        self.steps, self.alpha = checks.integer("steps", steps), checks.number("alpha", alpha, positive=True)
        self.gamma, self.gamma_final = _fraction("gamma", gamma), _fraction("gamma_final", gamma_final)
        if not gamma_final <= gamma:
            raise ValueError(f"gamma_final must be at most gamma, {gamma}; got {gamma_final}")

    def _nearest(self, batch: Batch) -> tuple[Tensor, bool]:
        limit, alpha = farthest(batch), self._sign * self.alpha * batch.span
        loop = _FMN(
            **begun(batch, "margin"), steps=self.steps, limit=limit,
            radius=torch.full_like(limit, 1.0 if self.norm == "l0" else 0.0),
            gamma=self.gamma, gamma_final=self.gamma_final, longest=alpha, shortest=alpha / 100,
        )  # fmt: skip
        return driven(self, loop, batch, self.steps)


def _fraction(name: str, value: float) -> float:
    if not 0 < checks.number(name, value) < 1:
        raise ValueError(f"{name} must be in (0, 1); got {value!r}")
    return float(value)


@dataclass(kw_only=True)
class _Walk(Nearest):
    """Steps along the gradient, each ending in a ball of each sample's own radius."""

    STATE: ClassVar[tuple[str, ...]] = (*Nearest.STATE, "radius", "limit", "done")
    SETTINGS: ClassVar[tuple[str, ...]] = (*Nearest.SETTINGS, "steps", "gamma", "longest", "shortest")

    radius: Tensor  # [N]
    limit: Tensor  # [N], of the radius
    steps: int
    gamma: float
    longest: float  # l2 length of the first step; the steps fall towards ``shortest``; negative descends
    shortest: float
    done: Tensor = field(init=False)  # steps so far; on the device, where a recorded step counts them

    def __post_init__(self) -> None:
        super().__post_init__()
        self.done = torch.zeros((), dtype=torch.float64, device=self.adv.device)

    def step(self) -> None:
        inputs = self.inputs()
        logits, self.losses, gradient = self.passes.gradient(inputs, self.loss, self.y, None, self.losses)
        with torch.no_grad():
            gradient = self.passes.to_scale(gradient.to(self.centre.dtype), self.losses[1]).nan_to_num(0.0, 0.0, 0.0)
            gain, fooled = self.judged(logits, self.losses[0])
            self.keep(inputs, gain, fooled)
            cosine = (1 + (self.done * (math.pi / self.steps)).cos()) / 2
            self.done += 1
            self.move(gradient, gain, fooled, cosine)
            self.adv.clamp_(self.lo, self.hi)

    def move(self, gradient: Tensor, gain: Tensor, fooled: Tensor, cosine: Tensor) -> None:
        """Sets ``radius`` and ``adv``, which is clamped afterwards; ``cosine`` falls from 1 to 0."""
        raise NotImplementedError

    def stride(self, cosine: Tensor) -> Tensor:
        return self.shortest + (self.longest - self.shortest) * cosine


@dataclass(kw_only=True)
class _DDN(_Walk):
    STATE: ClassVar[tuple[str, ...]] = (*_Walk.STATE, "spare")

    spare: Tensor  # directions for where there is no gradient

    def move(self, gradient: Tensor, gain: Tensor, fooled: Tensor, cosine: Tensor) -> None:
        flat = gradient.flatten(1).abs().amax(1) == 0
        direction = torch.where(spread(flat, gradient), self.spare, unit(gradient))
        d = unit(self.adv - self.centre + self.stride(cosine) * direction)
        torch.minimum(torch.where(fooled, 1 - self.gamma, 1 + self.gamma) * self.radius, self.limit, out=self.radius)
        torch.add(self.centre, d * spread(self.radius, d), out=self.adv)


@dataclass(kw_only=True)
class _FMN(_Walk):
    SETTINGS: ClassVar[tuple[str, ...]] = (*_Walk.SETTINGS, "gamma_final")

    gamma_final: float

    def move(self, gradient: Tensor, gain: Tensor, fooled: Tensor, cosine: Tensor) -> None:
        gamma = self.gamma_final + (self.gamma - self.gamma_final) * cosine
        nearest = torch.where(self.fooled, -self.score, self.limit)
        smaller, larger = self.radius * (1 - gamma), self.radius * (1 + gamma)
        if self.norm == "l0":
            smaller = torch.minimum(self.radius - 1, smaller.floor()).clamp_(min=0)
            larger = torch.maximum(self.radius + 1, larger.floor())
        else:  # before the first success the ball also reaches to where the boundary would be if the model were linear
            length, slope = norms(self.adv - self.centre, self.norm), norms(gradient, DUAL[self.norm]).clamp_(min=1e-12)
            larger = torch.where(self.fooled, larger, torch.maximum(larger, length + gain.abs() / slope))
        radius = torch.where(fooled, torch.minimum(smaller, nearest), larger)
        torch.minimum(radius.to(self.radius.dtype), self.limit, out=self.radius)
        torch.add(self.centre, self.within(self.adv - self.centre + self.stride(cosine) * unit(gradient)), out=self.adv)

    def within(self, d: Tensor) -> Tensor:
        """Perturbations brought into the ball, and the box if that is at hand: images are clamped afterwards."""
        if self.norm == "l2":  # what is shorter is stretched: on the sphere, as DDN, the walk ends nearer than inside the ball
            return unit(d) * spread(self.radius, d)
        if self.norm == "l0":  # by what the step asks for: an element at a wall of the box is worth as much as any other
            kept = torch.minimum(self.radius + 1, self.limit)  # one more, to see what is just outside: walks end nearer
            return d * largest(rows(d.abs()), kept.view(-1, 1)).view_as(d)
        return project(d, self.radius, self.norm, self.lo - self.centre, self.hi - self.centre)


ddn = as_function(DDN)
fmn = as_function(FMN)
