"""Attacks that see only the predicted class: they start from an image that fools the model, however far, and come closer.

Brendel, Rauber and Bethge, "Decision-Based Adversarial Attacks: Reliable Attacks Against Black-Box Machine Learning Models",
2018 (Boundary); Chen, Jordan and Wainwright, "HopSkipJumpAttack: A Query-Efficient Decision-Based Attack", 2020.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks
from ..engine import Model
from ..reference.step import Scalar, spread
from .base import Attack, Batch, as_function
from .norms import norms
from .pgd import STEPS
from .queries import TOGETHER, ask

TRIES = 100  # images of noise, to start from one that fools the model
STARTS, DIRECTIONS = 1, 2  # streams of random numbers
GROUP = 8  # directions drawn together: what a sample draws must not depend on how many go into a forward pass
LOOK = 10  # steps of the boundary attack between two looks at how it goes
SHORTEST = 30  # times that HopSkipJump halves a step which leads back over the boundary


class Decision(Attack):
    """What the two share: the start, the way to the boundary, and the answer.

    Subclasses take :attr:`start` and say in :meth:`_approach` how to come closer.
    """

    GRADIENTS: ClassVar[bool] = False
    EPS_OPTIONAL: ClassVar[bool] = True
    NORMS: ClassVar[tuple[str, ...]] = ("l2",)

    start: Tensor | None

    def _attack(self, batch: Batch) -> Tensor:
        x = batch.x
        fooled = _fools(self, batch, x)
        adv, found = self._started(batch, fooled)
        who = (found & ~fooled).nonzero()[:, 0]  # a clean image that fools the model is its own answer
        if len(who):
            part = batch.rows(who)
            adv[who] = self._approach(part, adv[who])
            batch.count(part, who)
        if self.eps is not None:
            inside = norms(adv - x, self.norm) <= _radius(batch)
            clipped = STEPS[self.norm](adv.clone(), adv, x, 0.0, self.eps, batch.lo, batch.hi)  # of length 0: the projection
            adv = torch.where(spread(inside, x), adv, clipped)
        return adv

    def _approach(self, batch: Batch, adv: Tensor) -> Tensor:
        """Closer images that fool the model than ``adv``, which do. Where eps is given, inside the ball is close enough."""
        raise NotImplementedError

    def _started(self, batch: Batch, fooled: Tensor) -> tuple[Tensor, Tensor]:
        """Images that fool the model, and where there is one; x itself elsewhere."""
        x, adv, found = batch.x, batch.x.clone(), fooled.clone()
        if self.start is not None:
            if self.start.shape != x.shape or self.start.device != x.device:
                raise ValueError(f"start must be like x, {checks.describe(x)}; got {checks.describe(self.start)}")
            given = self.start.to(x.dtype).clamp(batch.lo, batch.hi)
            found |= _fools(self, batch, given)
            return torch.where(spread(found & ~fooled, x), given, x), found
        draws = batch.draws.of_stream(STARTS)
        for attempt in range(TRIES):
            who = (~found).nonzero()[:, 0]
            if not len(who):
                break
            part = batch.rows(who)
            noise = draws.rows(who).uniform(attempt, *x.shape[1:], dtype=x.dtype)
            if math.isfinite(batch.hi - batch.lo):
                images = (batch.lo + (batch.hi - batch.lo) * noise).clamp_(batch.lo, batch.hi)
            else:  # farther and farther away
                images = (part.x + 1.1**attempt * (2 * noise - 1)).clamp_(batch.lo, batch.hi)
            good = _fools(self, part, images)
            batch.count(part, who)
            adv[who], found[who] = torch.where(spread(good, x), images, part.x), good
        return adv, found

    def _check_sizes(self) -> tuple[float, float]:
        if self.start is not None and not isinstance(self.start, Tensor):
            raise ValueError(f"start must be a tensor like x or None; got {type(self.start).__name__}")
        return super()._check_sizes()


def _fools(attack: Attack, batch: Batch, images: Tensor, each: int = 1) -> Tensor:
    """Whether images [N * each, ...], those of a sample in a row, fool the model."""
    batch.queries += each
    if images.dtype != batch.dtype:
        images = batch.rows(torch.arange(len(batch.x), device=images.device).repeat_interleave(each)).inputs(images)
    found = torch.cat([ask(attack.engine, batch, some, ragged=True).argmax(1) for some in torch.split(images, TOGETHER)])
    reached = found == batch.y.repeat_interleave(each)
    return reached if batch.targeted else ~reached


def _radius(batch: Batch) -> Scalar:
    """Of what counts as inside the ball: of l2 a little less, for sums are rounded."""
    assert batch.eps is not None
    radius = torch.as_tensor(batch.eps, dtype=batch.x.dtype, device=batch.x.device)
    return radius if batch.norm == "linf" else radius * (1 - 1e-6)


def _to_boundary(attack: Attack, batch: Batch, adv: Tensor, threshold: float) -> Tensor:
    """Between the clean images and ``adv``, which fool the model, by halving: the nearest known to fool it.

    In l2 on the straight line; in linf the perturbation is clipped. To a share ``threshold`` of the distance.
    """
    x, far = batch.x, norms(adv - batch.x, batch.norm)
    digits = 52 if x.dtype == torch.float64 else 23
    low, high = torch.zeros_like(far), torch.ones_like(far)

    def between(share: Tensor) -> Tensor:
        if batch.norm == "l2":
            return torch.lerp(x, adv, spread(share, x))
        room = spread(share * far, x)
        return adv.clamp(x - room, x + room)

    for _ in range(min(digits, math.ceil(math.log2(1 / threshold)))):
        middle = (low + high) / 2
        good = _fools(attack, batch, between(middle))
        low, high = torch.where(good, low, middle), torch.where(good, middle, high)
    return torch.where(spread(high == 1, x), adv, between(high))  # at the far end rounding might cross over


class HopSkipJump(Decision):
    """HopSkipJump: along the boundary by gradient directions that are estimated from predicted classes alone.

    An iteration takes about ``queries sqrt(t)`` queries for the direction, halves its step until the image fools the model, and
    returns to the boundary by halving: with the defaults 35,000 queries of each sample.

    Args:
        model: any callable that maps a batch [N, ...] to logits [N, C]; only their argmax is looked at.
        eps: None: as near as may be. A radius in units of x, float or [N]: a sample stops inside it.
        steps: iterations, >= 1.
        queries: directions in the first iteration, and ``max_queries`` at most in a later one.
        gamma: the boundary is found to ``gamma / D^1.5`` (l2) or ``gamma / D^2`` (linf) of the distance, and directions are as
            long as ``gamma / D`` of it, D being the number of elements.
        norm: "l2" or "linf".
        start: images like x that fool the model, to come nearer from. None: of up to 100 images of uniform noise the first one
            that does. Where there is none, the clean image is returned and ``info.success`` is False.
        targeted, bounds, seed, engine, precision, twin, memory: as in :class:`fastadv.attacks.Attack`. The boundary is that of
            the model in that precision; asked again in its own, images on it may not fool it.

    Differs from the reference: the nearest image seen is returned and not the last; a step that fools nobody after
    30 halvings is not made; each sample has its own directions.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described.
    """

    NORMS: ClassVar[tuple[str, ...]] = ("l2", "linf")

    def __init__(
        self,
        model: Model,
        eps: Scalar | None = None,
        steps: int = 64,
        queries: int = 100,
        max_queries: int = 10000,
        gamma: float = 1.0,
        start: Tensor | None = None,
        norm: str = "l2",
        targeted: bool = False,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        self.start = start
        super().__init__(model, eps, norm, targeted, bounds, seed, engine, precision, twin, memory)
        self.steps, self.queries = checks.integer("steps", steps), checks.integer("queries", queries)
        self.max_queries = checks.integer("max_queries", max_queries)
        self.gamma = checks.number("gamma", gamma, positive=True)

    def _approach(self, batch: Batch, adv: Tensor) -> Tensor:
        elements = adv[0].numel()
        threshold = min(0.5, self.gamma / elements ** (1.5 if self.norm == "l2" else 2))
        adv = _to_boundary(self, batch, adv, threshold)
        best = adv.clone()
        for step in range(self.steps):
            distance = norms(adv - batch.x, self.norm)
            who = torch.arange(len(adv), device=adv.device)
            if batch.eps is not None:
                who = (norms(best - batch.x, self.norm) > _radius(batch)).nonzero()[:, 0]
                if not len(who):
                    break
            part, here, far = batch.rows(who), adv[who], distance[who]
            reach = 0.1 * batch.span * torch.ones_like(far) if step == 0 else self.gamma / elements * far
            directions = min(int(self.queries * math.sqrt(step + 1)), self.max_queries)
            direction = self._direction(part, here, reach, step, directions)
            there = self._hop(part, here, direction, far / math.sqrt(step + 1))
            there = _to_boundary(self, part, there, threshold)
            adv[who] = there
            nearer = norms(there - part.x, self.norm) < norms(best[who] - part.x, self.norm)
            best[who] = torch.where(spread(nearer, adv), there, best[who])
            batch.count(part, who)
        return best

    def _direction(self, batch: Batch, adv: Tensor, reach: Tensor, step: int, directions: int) -> Tensor:
        """Of the boundary's normal, to where the model is fooled: mean of directions, plus those that do, minus those that
        do not, less the mean answer."""
        n, shape, draws = len(adv), adv.shape[1:], batch.draws.of_stream(DIRECTIONS)
        reach = spread(reach, adv)
        summed, signed, answers = (
            torch.zeros_like(adv),
            torch.zeros_like(adv),
            torch.zeros(n, dtype=adv.dtype, device=adv.device),
        )
        groups = -(-self.max_queries // GROUP)  # of an iteration
        for first in range(0, directions, GROUP):
            number = step * groups + first // GROUP
            if self.norm == "l2":
                rays = draws.normal(number, GROUP, *shape, dtype=adv.dtype)
            else:
                rays = draws.uniform(number, GROUP, *shape, dtype=adv.dtype) * 2 - 1
            rays = rays[:, : directions - first]
            rays = rays / (rays.flatten(2).norm(dim=2).view(n, -1, *[1] * len(shape)) + 1e-12)
            images = (adv[:, None] + reach[:, None] * rays).clamp_(batch.lo, batch.hi)
            rays = (images - adv[:, None]) / reach[:, None].clamp(min=1e-30)  # as far as the box let them
            answer = _fools(self, batch, images.flatten(0, 1), rays.shape[1]).view(n, -1).to(adv.dtype) * 2 - 1
            summed += rays.sum(1)
            signed += torch.einsum("nk,nk...->n...", answer, rays)
            answers += answer.sum(1)
        mean = answers / directions
        normal = signed - spread(torch.where(mean.abs() == 1, 0.0, mean), adv) * summed
        if self.norm == "linf":
            return normal.sign()
        return normal / (spread(norms(normal, "l2"), adv) + 1e-30)

    def _hop(self, batch: Batch, adv: Tensor, direction: Tensor, length: Tensor) -> Tensor:
        """As far along the direction, of lengths halved again and again, as the image fools the model; else where it was."""
        there, left = adv.clone(), torch.arange(len(adv), device=adv.device)
        for _ in range(SHORTEST):
            part = batch.rows(left)
            images = (adv[left] + spread(length, adv) * direction[left]).clamp_(batch.lo, batch.hi)
            good = _fools(self, part, images)
            batch.count(part, left)
            there[left] = torch.where(spread(good, adv), images, there[left])
            left, length = left[~good], length[~good] / 2
            if not len(left):
                break
        return there


class Boundary(Decision):
    """Boundary attack: a random walk along the boundary, each step first round the clean image and then towards it.

    Both lengths adapt to how often their steps succeed, for each sample, as in Foolbox, by the paper's authors: the
    spherical step alone is looked at every ten steps.

    Args:
        model: any callable that maps a batch [N, ...] to logits [N, C]; only their argmax is looked at.
        eps: None: as near as may be. An l2 radius, float or [N]: a sample stops inside it.
        steps: at most, >= 1; 1.1 queries each.
        spherical_step, source_step: first lengths of the two, as shares of the distance.
        adaptation: factor by which they grow or shrink, > 1.
        convergence: a sample whose source step is smaller has converged and stops.
        start: as in :class:`HopSkipJump`.
        norm: "l2".
        targeted, bounds, seed, engine, precision, twin, memory: as in :class:`fastadv.attacks.Attack`. The boundary is that of
            the model in that precision; asked again in its own, images on it may not fool it.

    Differs from Foolbox: each sample has its own random directions; the start is first moved to the boundary by halving.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described.
    """

    def __init__(
        self,
        model: Model,
        eps: Scalar | None = None,
        steps: int = 25000,
        spherical_step: float = 0.01,
        source_step: float = 0.01,
        adaptation: float = 1.5,
        convergence: float = 1e-7,
        start: Tensor | None = None,
        norm: str = "l2",
        targeted: bool = False,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        self.start = start
        super().__init__(model, eps, norm, targeted, bounds, seed, engine, precision, twin, memory)
        self.steps = checks.integer("steps", steps)
        self.spherical_step = checks.number("spherical_step", spherical_step, positive=True)
        self.source_step = checks.number("source_step", source_step, positive=True)
        if checks.number("adaptation", adaptation) <= 1:
            raise ValueError(f"adaptation must be a finite number > 1; got {adaptation!r}")
        self.adaptation, self.convergence = adaptation, checks.number("convergence", convergence)

    def _approach(self, batch: Batch, adv: Tensor) -> Tensor:
        adv = _to_boundary(self, batch, adv, 1e-3)
        n, device = len(adv), adv.device
        spherical = torch.full((n,), self.spherical_step, dtype=adv.dtype, device=device)
        source = torch.full((n,), self.source_step, dtype=adv.dtype, device=device)
        around, nearer = _Rate(n, 100, device), _Rate(n, 30, device)
        for first in range(0, self.steps, LOOK):
            left = source >= self.convergence
            if batch.eps is not None:
                left &= norms(adv - batch.x, "l2") > _radius(batch)
            who = left.nonzero()[:, 0]
            if not len(who):
                break
            part, here = batch.rows(who), adv[who]
            for step in range(first, min(first + LOOK, self.steps)):
                sphere, candidate = self._proposed(part, here, spherical[who], source[who], step)
                good = _fools(self, part, candidate)
                # Nearer by construction, but for rounding and the box.
                closer = norms(candidate - part.x, "l2") < norms(here - part.x, "l2")
                here = torch.where(spread(good & closer, here), candidate, here)
            adv[who] = here
            around.add(who, _fools(self, part, sphere))
            nearer.add(who, good)
            batch.count(part, who)

            factor = around.factor(who, 0.2, 0.5, self.adaptation)
            spherical[who] *= factor
            source[who] *= factor * nearer.factor(who, 0.1, 0.25, self.adaptation)
        return adv

    def _proposed(self, batch: Batch, adv: Tensor, spherical: Tensor, source: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """A step on the sphere around the clean images, and from there one towards them."""
        x, inwards = batch.x, batch.x - adv
        distance = norms(inwards, "l2").clamp(min=1e-30)
        eta = batch.draws.of_stream(DIRECTIONS).normal(step, *x.shape[1:], dtype=x.dtype)
        unit = inwards / spread(distance, x)
        eta = eta - spread((eta * unit).flatten(1).sum(1), x) * unit
        eta = eta * spread(spherical * distance / norms(eta, "l2").clamp(min=1e-30), x)
        sphere = (x + (eta - inwards) / spread((spherical.square() + 1).sqrt(), x)).clamp_(batch.lo, batch.hi)
        inwards = x - sphere
        off = norms(inwards, "l2").clamp(min=1e-30)  # the distance, but for rounding and the box
        length = (source * distance + off - distance).clamp(min=0) / off
        return sphere, (sphere + spread(length, x) * inwards).clamp_(batch.lo, batch.hi)


class _Rate:
    """How often something has succeeded of late, for each sample."""

    def __init__(self, samples: int, length: int, device: torch.device) -> None:
        self.hits = torch.zeros(samples, length, dtype=torch.bool, device=device)
        self.count = torch.zeros(samples, dtype=torch.int64, device=device)

    def add(self, who: Tensor, hit: Tensor) -> None:
        self.hits[who, self.count[who] % self.hits.shape[1]] = hit
        self.count[who] += 1

    def factor(self, who: Tensor, least: float, most: float, adaptation: float) -> Tensor:
        """By which to change a length whose rate, once known, is below ``least`` or above ``most``; it is then forgotten."""
        known, rate = self.count[who] >= self.hits.shape[1], self.hits[who].double().mean(1)
        up, down = known & (rate > most), known & (rate < least)
        self.count[who] = self.count[who].masked_fill(up | down, 0)
        one = torch.ones_like(rate, dtype=torch.float32)
        return torch.where(up, adaptation * one, torch.where(down, one / adaptation, one))


hopskipjump = as_function(HopSkipJump)
boundary = as_function(Boundary)
