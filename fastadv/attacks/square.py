"""Square attack: random search by square patches.

Andriushchenko, Croce, Flammarion and Hein, "Square Attack: a query-efficient black-box adversarial attack via random search",
2020; its l1 form as in AutoAttack (Croce and Hein, "Mind the box: l1-APGD for sparse adversarial attacks", 2021).

A query tries another colour in one window of the image and keeps it where that raises the loss. So a query costs a forward
pass and the writing of a window; numbers are drawn, and places in memory computed, for many queries at once.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..engine import Model
from ..reference.step import Scalar, per_sample, spread
from .base import Attack, Batch, as_function
from .norms import norms
from .queries import Walk, growing, walk

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries: after these the windows' area halves
PREPARED = 2**20  # elements of windows prepared together, at most
INSIDE = 1 - 1e-6  # of the l2 and l1 radius is used: sums over the image are rounded


class Square(Attack):
    """Square attack: black-box, by ``queries`` forward passes of each sample, until one fools the model.

    The algorithm is that of the paper and of AutoAttack, but each sample has windows, signs and orientations of its own; the
    reference draws one window for the whole batch. In linf windows also reach the last row and column, as the paper says. The
    authors' code never goes there, and in l2 and l1 neither does this, for that counts: of 300 digits under l1, 300
    queries left 82% standing with windows everywhere, and 78% without.

    The last two dimensions of x are height and width, and what comes before are channels; x [N, D] is a line of D pixels.
    Where a square is higher or wider than the image, a rectangle of its area takes its place.

    Args:
        model: any callable that maps a batch [N, ...] to logits [N, C]; needs no gradient. Left exactly as found.
        eps: radius in units of x, float or per-sample [N].
        queries: proposals for each sample, >= 1, besides the clean image and the start.
        p_init: share of the image that the first windows cover, in (0, 1]. It halves after 10, 50, 200, 500, 1000, 2000, 4000,
            6000 and 8000 queries.
        rescale: that schedule is stretched from 10,000 to ``queries``, as in the paper. AutoAttack leaves it as it is.
        norm, targeted, bounds, seed, engine, precision, twin, memory: as in :class:`fastadv.attacks.Attack`. The loss is the
            margin, and the cross-entropy of the target where targeted.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described.
    """

    GRADIENTS: ClassVar[bool] = False

    def __init__(
        self,
        model: Model,
        eps: Scalar,
        queries: int = 5000,
        p_init: float = 0.8,
        rescale: bool = True,
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
        self.queries = checks.integer("queries", queries)
        if checks.number("p_init", p_init, positive=True) > 1:
            raise ValueError(f"p_init must be in (0, 1]; got {p_init!r}")
        self.p_init, self.rescale = p_init, bool(rescale)

    def _attack(self, batch: Batch) -> Tensor:
        kind = {"linf": _Linf, "l2": _L2, "l1": _L1}[self.norm]
        whole: _Windows = kind.over(batch)

        def trials(part: _Windows, chunk: range) -> Iterator[None]:
            return part.begin() if chunk.start < 0 else part.search(chunk, self._share(chunk.start))

        walk(self._engine, batch, whole, (range(-2, 0), *self._chunks()), trials)
        return whole.adv

    def _chunks(self) -> Iterator[range]:
        """The queries by windows of one size."""
        for chunk in growing(self.queries):
            start = chunk.start
            for query in chunk[1:]:
                if self._share(query) != self._share(start):
                    yield range(start, query)
                    start = query
            yield range(start, chunk.stop)

    def _share(self, query: int) -> float:
        """Of the image, that the windows of this query cover."""
        return self.p_init * 0.5 ** bisect_left(HALVINGS, query * 10000 // self.queries if self.rescale else query)


class _Windows(Walk):
    """A trial is a window of another colour, which is taken back where it is no better."""

    ODD: ClassVar[bool] = True  # whether windows have odd sides of 3 pixels or more, which have a middle
    EDGES: ClassVar[bool] = False  # whether windows reach the last row and column

    def begin(self) -> Iterator[None]:
        """Looks at the clean image, and then at the first one of the search."""
        yield
        self.judged()
        self.score.fill_(-math.inf)
        self.adv.copy_(torch.where(spread(self.standing, self.adv), self.started(), self.adv))
        yield
        self.judged()

    def started(self) -> Tensor:
        raise NotImplementedError

    def search(self, chunk: range, share: float) -> Iterator[None]:
        """Tries windows that cover this share of the image."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        *channels, width = self.adv.shape[1:]
        height = channels.pop() if channels else 1
        return math.prod(channels), height, width

    def window(self, share: float) -> tuple[int, int]:
        """Height and width of a square that covers this share of the image, or of a rectangle where it does not fit in."""
        _, height, width = self.shape
        area = share * height * width
        side = max(3, round(math.sqrt(area))) | 1 if self.ODD else max(1, round(math.sqrt(area)))
        h, w = min(side, height), min(side, width)
        if h < side:
            w = min(width, max(w, round(area / h)))
        elif w < side:
            h = min(height, max(h, round(area / w)))
        return h, w

    def draw(self, step: int, *shape: int) -> Tensor:
        """Uniform numbers [N, *shape], in fp64: a product with a size is below that size."""
        return self.drawing().uniform(step, *shape, dtype=torch.float64)

    def pieces(self, chunk: range, numbers: int, elements: int) -> Iterator[Tensor]:
        """What the queries of the chunk draw, [Q, N, numbers], so many together as may write ``elements`` each."""
        drawn = self.draw(chunk.start + 1, len(chunk), numbers).transpose(0, 1).contiguous()
        return iter(torch.split(drawn, max(1, PREPARED // (elements * len(self.adv)))))

    def corner(self, u: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Uniform places [Q, N] of windows inside the image, from two numbers each."""
        _, height, width = self.shape
        down, across = (max(1, size + self.EDGES) for size in (height - h, width - w))
        return (u[..., 0] * down).long(), (u[..., 1] * across).long()

    def places(self, top: Tensor, left: Tensor, h: int, w: int) -> Tensor:
        """Where the elements of windows lie in memory, [Q, N, C h w]."""
        one = self.adv[0]
        within = torch.arange(one.numel(), device=one.device).as_strided(one.shape, one.stride()).reshape(self.shape)
        first = torch.arange(len(self.adv), device=one.device) * self.adv.stride(0)
        return (first + within[0][top, left])[..., None] + within[:, :h, :w].flatten()


def _flat(t: Tensor) -> Tensor:
    """The memory of a dense tensor."""
    return t.as_strided((t.numel(),), (1,))


class _Linf(_Windows):
    """Each channel of a window goes to one of the two ends of the ball."""

    ODD: ClassVar[bool] = False
    EDGES: ClassVar[bool] = True

    def started(self) -> Tensor:
        """Vertical stripes."""
        channels, height, width = self.shape
        stripes = self.signs(self.draw(0, channels, 1, width)).expand(-1, -1, height, -1).reshape(self.adv.shape)
        return (self.x + per_sample(self.eps, self.x) * stripes).clamp(self.lo, self.hi)

    def search(self, chunk: range, share: float) -> Iterator[None]:
        n, channels, (h, w) = len(self.adv), self.shape[0], self.window(share)
        adv, x = _flat(self.adv), _flat(self.x)
        for u in self.pieces(chunk, 2 + channels, channels * h * w):
            places = self.places(*self.corner(u, h, w), h, w)
            steps = self.signs(u[..., 2:, None]) * self.eps[:, None, None].to(x.dtype)
            values = (x.take(places).view(len(u), n, channels, -1) + steps).clamp_(self.lo, self.hi).view(len(u), n, -1)
            for where, value in zip(places.view(len(u), -1).unbind(), values.unbind(), strict=True):
                before = adv.index_select(0, where).view(n, -1)
                adv.index_copy_(0, where, value.view(-1))
                if self.selective:  # once windows are small, many are tried in the colour that they have
                    self.asked = (value != before).any(1) & self.standing
                yield
                better = self.judged()
                adv.index_copy_(0, where, torch.where(better[:, None], value, before).view(-1))

    def signs(self, u: Tensor) -> Tensor:
        return torch.where(u < 0.5, -1.0, 1.0).to(self.x.dtype)


class _L2(_Windows):
    """A window takes over what another one had of the radius, and what nobody uses, and gets a bump of its own."""

    STEEPNESS: ClassVar[float] = 2.0  # of the bumps

    def started(self) -> Tensor:
        """Bumps on a grid of five by five, or a little more, tiles."""
        channels, height, width = self.shape
        h, w = max(1, height // 5), max(1, width // 5)
        down, across = height // h, width // w
        u = self.draw(0, channels + 1, down, across)
        turned, signs = (u[:, 0] < 0.5).long(), torch.where(u[:, 1:] < 0.5, -1.0, 1.0).to(self.x.dtype)
        tiles = self.bumps(h, w)[turned][:, None] * signs[..., None, None]  # [N, C, down, across, h, w]
        delta = self.x.new_zeros(len(self.x), *self.shape)
        top, left = (height - h * down) // 2, (width - w * across) // 2
        delta[:, :, top : top + h * down, left : left + w * across] = tiles.transpose(3, 4).flatten(4, 5).flatten(2, 3)
        return self.fitted(delta.reshape(self.x.shape))

    def fitted(self, delta: Tensor) -> Tensor:
        """The first image of the search: of length eps, then clamped to the box."""
        scale = (INSIDE * self.eps).to(delta.dtype) / norms(delta, "l2")
        return (self.x + delta * spread(scale, delta)).clamp(self.lo, self.hi)

    def search(self, chunk: range, share: float) -> Iterator[None]:
        adv, used = _flat(self.adv), self.mass((self.adv - self.x).reshape(len(self.x), 1, -1))
        for where, clean, apart, bump in self.windows(chunk, share):
            before = adv.index_select(0, where.view(-1)).view(clean.shape)
            patch, taken = self.patch(before - clean, apart, bump, used)
            image = (clean[0] + patch).clamp_(self.lo, self.hi)
            self.write(where, clean, image)
            yield
            better = self.judged()[:, None, None]
            after = adv.index_select(0, where.view(-1)).view(clean.shape)
            adv.index_copy_(0, where.view(-1), torch.where(better, after, before).view(-1))
            used = torch.where(better, used - taken + self.mass(image - clean[0]).sum(1, True), used)

    def windows(self, chunk: range, share: float) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For each query its two windows, the one that is filled first: places [2, N, C, h w] and clean elements there, which
        of the second's elements the first does not hold, [N, 1, h w], and a bump [N, C, h w]."""
        channels, (h, w) = self.shape[0], self.window(share)
        x, bumps = _flat(self.x), self.bumps(h, w).flatten(1)
        for u in self.pieces(chunk, 5 + channels, 2 * channels * h * w):
            corners = self.corner(u, h, w), self.corner(u[..., 2:], h, w)
            places = torch.stack([self.places(*corner, h, w) for corner in corners], 1).view(
                len(u), 2, len(self.x), channels, -1
            )
            apart = _outside(*corners, h, w).to(x.dtype)
            signs = torch.where(u[..., 5:, None] < 0.5, -1.0, 1.0).to(x.dtype)
            own = bumps[(u[..., 4] < 0.5).long()][:, :, None] * signs
            yield from zip(places.unbind(), x.take(places).unbind(), apart.unbind(), own.unbind(), strict=True)

    def patch(self, delta: Tensor, apart: Tensor, bump: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        """What fills the first window: what was there and the bump, each of length 1, at the length that both windows had and
        a channel's share of what is unused; and how much [N, 1, 1] both windows had."""
        channels = self.shape[0]
        first, second = self.mass(delta[0]), self.mass(delta[1] * apart)
        had = first + second  # [N, C, 1]
        free = (self.radius - used).clamp_(min=0)
        patch = bump + delta[0] / (self.length(first) + 1e-12)
        patch *= self.budget(free / channels + had) / (self.length(self.mass(patch)) + 1e-12)
        return patch, had.sum(1, True)

    def write(self, where: Tensor, clean: Tensor, image: Tensor) -> None:
        """The second window becomes clean, the first one, which may overlap it, ``image``."""
        adv = _flat(self.adv)
        adv.index_copy_(0, where[1].view(-1), clean[1].view(-1))
        adv.index_copy_(0, where[0].view(-1), image.view(-1))

    # Lengths are kept as squares, whose sum over the image's parts is that of the image.

    @property
    def radius(self) -> Tensor:
        return (INSIDE * self.eps).square().to(self.x.dtype)[:, None, None]

    def mass(self, t: Tensor) -> Tensor:
        return t.square().sum(-1, keepdim=True)

    def length(self, mass: Tensor) -> Tensor:
        return mass.sqrt()

    def budget(self, mass: Tensor) -> Tensor:
        return mass.sqrt()

    def bumps(self, h: int, w: int) -> Tensor:
        """Two pyramids side by side, one up and one down, of length 1 together: one above and beside the other, [2, h, w]."""
        return torch.stack([self._bump(h, w), self._bump(w, h).T])

    def _bump(self, h: int, w: int) -> Tensor:
        halves = [self._pyramid(rows, w) for rows in (h // 2, h - h // 2)]
        bump = torch.cat([halves[0], -halves[1]])
        return bump / self.length(self.mass(bump.flatten()))

    def _pyramid(self, h: int, w: int) -> Tensor:
        """Squares one on the other, of sides 1, 3, 5, ... and heights 1, 1/4, 1/9, ...; of length 1."""
        if not h:
            return self.x.new_zeros(h, w)
        heights = torch.arange(1, max(h, w) // 2 + 2, device=self.x.device, dtype=self.x.dtype) ** -self.STEEPNESS
        above = heights.flip(0).cumsum(0).flip(0)
        rows, columns = ((torch.arange(size, device=self.x.device) - size // 2).abs() for size in (h, w))
        pyramid = above[torch.maximum(rows[:, None], columns)]
        return pyramid / self.length(self.mass(pyramid.flatten()))


class _L1(_L2):
    """The same with lengths as they are; the image is then projected onto ball and box together."""

    STEEPNESS: ClassVar[float] = 4.0

    def fitted(self, delta: Tensor) -> Tensor:
        return self.projected(self.x + delta)

    def projected(self, adv: Tensor) -> Tensor:
        """In place; a step of length 0 is the projection."""
        return ops.l1_step_(adv, adv, self.x, 0.0, INSIDE * self.eps, self.lo, self.hi)

    def search(self, chunk: range, share: float) -> Iterator[None]:
        best = self.adv.clone()
        for where, clean, apart, bump in self.windows(chunk, share):
            used = self.mass((best - self.x).reshape(len(best), 1, -1))
            delta = _flat(self.adv).index_select(0, where.view(-1)).view(clean.shape) - clean
            self.write(where, clean, clean[0] + self.patch(delta, apart, bump, used)[0])
            self.projected(self.adv)
            yield
            better = spread(self.judged(), best)
            torch.where(better, self.adv, best, out=best)
            self.adv.copy_(best)

    @property
    def radius(self) -> Tensor:
        return (INSIDE * self.eps).to(self.x.dtype)[:, None, None]

    def mass(self, t: Tensor) -> Tensor:
        return t.abs().sum(-1, keepdim=True)

    def length(self, mass: Tensor) -> Tensor:
        return mass

    def budget(self, mass: Tensor) -> Tensor:
        return self.shape[0] * mass


def _outside(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], h: int, w: int) -> Tensor:
    """Which elements of second windows lie outside the first ones, [Q, N, 1, h w], by the windows' corners [Q, N]."""
    down, across = (
        (b - a)[..., None] + torch.arange(size, device=a.device) for a, b, size in zip(first, second, (h, w), strict=True)
    )
    inside = ((down >= 0) & (down < h))[..., :, None] & ((across >= 0) & (across < w))[..., None, :]
    return ~inside.flatten(2)[:, :, None]


square = as_function(Square)
