"""Randomised smoothing: a classifier that is certainly right within an l2 ball, with a probability that one chooses.

    smooth = fastadv.certify.Smooth(model, sigma=0.25)
    certificates = smooth.certify(x, n=100_000)  # .labels, .radius

Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019: where the model gives a class
to x + z, z ~ N(0, sigma^2), with a probability of at least p > 1/2, the smoothed classifier, which answers the likeliest class,
gives it to all x' with ``|x' - x|_2 < sigma Phi^-1(p)``. p is a lower bound from votes under noise, which is wrong once in
1/alpha at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from .. import checks, ops
from ..attacks import EoT
from ..attacks.draws import Draws, numbers_of
from ..engine import Engine, Model, attacking, unwrap
from ..reference.step import dense_layout

ABSTAIN = -1
"""In place of a class, where the votes are too close."""
SELECTION, ESTIMATION, PREDICTION = (1 << 50) + 1, (1 << 50) + 2, (1 << 50) + 3  # streams of draws
ROUNDS, ROUND = 20, 256  # voting pauses to see for whom it is decided: so often at most, after a multiple of so many votes


@dataclass
class Certificates:
    """What :meth:`Smooth.certify` says of images [N].

    Attributes:
        labels: int64 [N], the class, or ABSTAIN (-1).
        radius: float64 [N], of the l2 ball, in units of x, on which the smoothed classifier answers ``labels``; 0 where it
            abstains. Each is right with a probability of at least 1 - alpha.
        votes: int64 [N], for the chosen class (abstained or not).
        runs: int64 [N], noisy images that were voted on, those of the selection not counted: n, or fewer where that decided.
    """

    labels: Tensor
    radius: Tensor
    votes: Tensor
    runs: Tensor

    def right(self, y: Tensor, radius: float = 0.0) -> Tensor:
        """bool [N]: whether the answer is certainly y, within l2 distance ``radius`` of x."""
        return (self.labels == y.to(self.labels)) & (self.radius >= radius)

    @classmethod
    def joined(cls, parts: list[Certificates]) -> Certificates:
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


class Smooth:
    """The smoothed classifier of a model: the class that it gives most often to ``x + N(0, sigma^2)``. Noise is not clamped.

    Args:
        model: maps a batch [N, ...] to logits [N, C]; run in eval mode without gradients, and left as found. Best
            trained on noise of this sigma (``fastadv.RSTStability(sigma=..., bounds=None)``, or images with noise in any
            training). A compiled one is run as it is.
        sigma: of the noise, in units of x.
        seed: of all noise, in [0, 2^63). Votes depend on it, on an image's values and on its memory format (contiguous or
            channels_last), and on nothing else: not on batches or their order.
        batch_size: noisy images at once.
        precision, twin: how votes are cast, as attacks run (:class:`fastadv.PGD`): "bf16" is faster on a GPU, and the
            certificate then is of the network in bf16; a twin has batch norms folded and, on a CPU, convolutions fused, and
            gives the votes of the model but for ties of the last bit.

    ``stats`` says which precision and twin the last call had.

    Raises:
        ValueError: an argument is not as described.
    """

    def __init__(
        self, model: Model, sigma: float, seed: int = 0, batch_size: int = 256, precision: str = "fp32", twin: bool = False
    ) -> None:
        if not callable(model):
            raise ValueError(f"model must be callable on a batch; got {type(model).__name__}")
        self.model, self.sigma = unwrap(model), checks.number("sigma", sigma, positive=True)
        self.seed, self.batch_size = checks.integer("seed", seed, 0), checks.integer("batch_size", batch_size)
        if self.seed >= 2**63:
            raise ValueError(f"seed must be less than 2^63; got {seed}")
        self._engine = Engine(precision=precision, twin=twin)
        self.stats = self._engine.stats

    def predict(self, x: Tensor, n: int = 1000, alpha: float = 0.001) -> Tensor:
        """int64 [N]: the likeliest class, or ABSTAIN where n votes cannot tell the first two apart.

        An answer is wrong with a probability of at most ``alpha`` (a two-sided binomial test of the two classes' votes). Who is
        decided whatever the remaining votes say casts no more.

        Raises:
            ValueError: x is no batch of finite images, or n or alpha is not as described.
        """
        n, alpha = self._checked(x, n, alpha)

        def decided(votes: Tensor, left: int, _: Tensor) -> Tensor:
            first, second = votes.topk(2).values.unbind(1)
            return tells_apart(first, second + left, alpha) | ~tells_apart(first + left, second, alpha)

        with self._asking(x) as model:
            votes, runs = self._vote(model, x, n, PREDICTION, decided)
        first, second = votes.topk(2).values.unbind(1)
        return torch.where(tells_apart(first, second + (n - runs), alpha), votes.argmax(1), ABSTAIN)

    def certify(
        self, x: Tensor, n0: int = 100, n: int = 100_000, alpha: float = 0.001, radius: float | None = None
    ) -> Certificates:
        """A class for each image and how far it certainly holds.

        n0 noisy images choose the class, n others bound its probability from below (Clopper and Pearson). Who will abstain
        whatever the remaining votes say casts no more.

        Args:
            x: images [N, ...].
            alpha: how often a certificate may be wrong.
            radius: ask only whether this radius is certified; then voting ends where that is decided, often long before n.
                ``Certificates.radius >= radius`` is what all votes would have said; nothing else is: labels and radii come of
                the votes that were cast, so that some abstain who need not, and radii are lower bounds.

        Raises:
            ValueError: x is no batch of finite images, or a number is not as described: a radius that n votes cannot show.
        """
        n, alpha = self._checked(x, n, alpha)
        least = enough = least_votes(n, alpha, 0.0)
        if radius is not None:
            enough = least_votes(n, alpha, checks.number("radius", radius) / self.sigma)
            if enough > n:
                most = self.sigma * float(distance(lower_bound(torch.tensor(n), n, alpha)))
                raise ValueError(f"radius must be one that n = {n} votes can show, at most {most:.4g}; got {radius}")
        n0 = checks.integer("n0", n0)

        def of_chosen(votes: Tensor, who: Tensor) -> Tensor:
            return votes.gather(1, chosen[who, None])[:, 0]

        def decided(votes: Tensor, left: int, who: Tensor) -> Tensor:
            so_far = of_chosen(votes, who)
            return (so_far + left < enough) | ((so_far >= enough) & (radius is not None))

        with self._asking(x) as model:
            chosen = self._vote(model, x, n0, SELECTION)[0].argmax(1)
            votes, runs = self._vote(model, x, n, ESTIMATION, decided)
        count = of_chosen(votes, torch.arange(len(x)))
        return Certificates(
            labels=torch.where(count >= least, chosen, ABSTAIN),
            radius=self.sigma * distance(torch.where(count >= least, lower_bound(count, n, alpha), 0.5)),
            votes=count,
            runs=runs,
        )

    def expectation(self, samples: int = 20) -> EoT:
        """The smoothed network for an attack: ``log mean softmax(model(x + noise))`` over so many draws a forward pass.

        Its noise is from torch's global generator, another one each time (Salman et al., "Provably robust deep learning via
        adversarially trained smoothed classifiers", 2019): ``fastadv.PGD(smooth.expectation(), eps=0.5, norm="l2")``.
        """
        return EoT(_Noisy(self.model, self.sigma), samples)

    def _checked(self, x: Tensor, n: int, alpha: float) -> tuple[int, float]:
        try:
            import scipy.stats  # noqa: F401 - before any vote is cast
        except ImportError as error:
            raise ValueError(f"what votes say is worked out by scipy ({error}): pip install 'fastadv[certify]'") from None
        checks.images(x, -math.inf, math.inf)
        checks.same_device("model", self.model, x)
        if not 0 < checks.number("alpha", alpha) < 1:
            raise ValueError(f"alpha must be a probability in (0, 1); got {alpha}")
        return checks.integer("n", n), float(alpha)

    @contextmanager
    def _asking(self, x: Tensor) -> Iterator[Model]:
        """The model as votes on images like x are cast: in eval mode, without gradients, in the engine's way."""
        with attacking(self.model), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            yield self._engine.passes(self.model, x, "eval", gradients=False).logits if len(x) else self.model

    def _vote(
        self, model: Model, x: Tensor, n: int, stream: int, decided: Callable[[Tensor, int, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Votes [N, C] under n draws of noise, and how many were cast for each image [N], on the CPU. Inside :meth:`_asking`.

        ``decided(votes [M, C], left, who [M])`` says after each round for whom the ``left`` others change nothing.
        """
        numbers = numbers_of(x).to(x.device)
        who, runs = torch.arange(len(x)), torch.zeros(len(x), dtype=torch.int64)
        votes = torch.zeros(len(x), 2, dtype=torch.int64)
        size = ROUND * math.ceil(n / ROUNDS / ROUND)
        for first in range(0, n if len(x) else 0, size):
            count = min(size, n - first)
            rows = who.to(x.device)
            cast = self._count(model, x[rows], numbers[rows], stream, first, count).cpu()
            if first == 0:
                votes = torch.zeros(len(x), cast.shape[1], dtype=torch.int64)
            votes[who] += cast
            runs[who] += count
            if decided is not None:
                who = who[~decided(votes[who], n - first - count, who)]
            if not len(who):
                break
        return votes, runs

    def _count(self, model: Model, x: Tensor, numbers: Tensor, stream: int, first: int, count: int) -> Tensor:
        """Votes [N, C] of draws first, first + 1, ... of each image, where the images are: nothing waits for a device."""
        together = max(1, self.batch_size // count)  # images
        copies = min(count, self.batch_size)
        room = torch.empty_like(x[:1].expand(together * copies, *x.shape[1:]), memory_format=dense_layout(x))
        key, parts = Draws(self.seed, numbers, stream).key, []
        for images, of in zip(torch.split(x, together), torch.split(numbers, together), strict=True):
            answers = []
            for step in range(first, first + count, copies):
                number = min(copies, first + count - step)
                noisy = ops.normal_start(images, self.sigma, key, of, step, number, out=room[: len(images) * number])
                logits = model(noisy)
                checks.logits(logits, noisy, None)
                nothing = logits.shape[1]  # NaN is no class
                answers.append(logits.argmax(1).masked_fill(logits.isnan().any(1), nothing).view(len(images), number))
            answer = torch.cat(answers, 1)
            votes = answer.new_zeros(len(images), nothing + 1).scatter_add_(1, answer, torch.ones_like(answer))
            parts.append(votes[:, :nothing])
        return torch.cat(parts)


class _Noisy(nn.Module):
    def __init__(self, model: Model, sigma: float) -> None:
        super().__init__()
        self.model, self.sigma = model, sigma
        self.training = getattr(model, "training", False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x + self.sigma * torch.randn_like(x))
        return logits


# ---------------------------------------------------------------------------------------------------------- what votes say


def lower_bound(votes: Tensor, n: int, alpha: float) -> Tensor:
    """float64, like votes: the probability of a class that got so many of n votes is at least this, but for one in 1/alpha.

    One-sided, of Clopper and Pearson: the p for which so many votes or more have the probability ``alpha``.
    """
    from scipy.stats import beta

    k = votes.double()
    bound = torch.as_tensor(beta.ppf(alpha, k.clamp(min=1), n - k.clamp(min=1) + 1))
    return torch.where(k > 0, bound, 0.0)


def least_votes(n: int, alpha: float, distance: float) -> int:
    """The fewest of n votes whose :func:`lower_bound` is at least ``Phi(distance)``; n + 1 if n do not suffice."""
    from scipy.stats import norm

    lo, hi, p = 0, n + 1, norm.cdf(distance)
    while lo < hi:  # the bound grows with the votes
        middle = (lo + hi) // 2
        lo, hi = (lo, middle) if float(lower_bound(torch.tensor(middle), n, alpha)) >= p else (middle + 1, hi)
    return lo


def distance(p: Tensor) -> Tensor:
    """``Phi^-1(p)``: how many sigma away a class of probability p is still the likeliest."""
    found: Tensor = torch.special.ndtri(p.double())
    return found


def tells_apart(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """bool: so many votes for one class and fewer for another are no chance, by the two-sided binomial test at 1/2."""
    from scipy.stats import binom

    p = 2 * torch.as_tensor(binom.sf(first - 1, first + second, 0.5))
    return (first > second) & (p <= alpha)
