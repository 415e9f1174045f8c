"""Defences that change what a model is asked, to be evaluated as they deserve: with the attack that each of them calls for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .attacks import BPDA
from .engine import Model, attacking, unwrap
from .reference.step import arithmetic

WEIGHTS = ("uniform", "entropy")
SEARCHES = ("auto", "torch", "faiss")
TOGETHER = 1 << 24  # distances at once


class NearestNeighbors(nn.Module):
    """Answers for the k nearest images of a database in place of the image itself: their mean prediction, as ``log p`` [N, C].

        defence = fastadv.NearestNeighbors(net, net[:-1], database_x)
        attack = fastadv.PGD(defence.attackable(), eps=8/255)  # and not fastadv.PGD(defence), which has no gradient to follow

    An adversarial image is thought to lie off the manifold of natural ones, and is projected back onto it. Which images are
    nearest does not change with small steps, so the gradient is zero: attacks that follow it find nothing and report robustness
    that is not there. :meth:`attackable` gives them one to follow.

    Dubey, van der Maaten, Yalniz, Li and Mahajan, "Defense Against Adversarial Images using Web-Scale Nearest-Neighbor Search",
    2019.

    Args:
        model: maps a batch [N, ...] to logits [N, C]. Asked once, for its predictions on the database, in eval mode.
        features: maps a batch to features [N, ...] in which distances are Euclidean: a part of the model, as ``net[:-1]``. The
            model and features are left as found.
        database_x: natural images [D, ...]. Kept are their features and predictions.
        k: neighbours, 50 as in the paper.
        weights: of neighbours in the mean: "uniform", or "entropy", ``log C - H(p)``: of whom the model is sure, those count
            for more (CBW-E).
        search: exact, by "torch" or by "faiss" (IndexFlatL2, on the CPU); "auto": faiss where it is installed and the
            database on the CPU.
        batch_size: database images at once.

    Raises:
        ValueError: an argument is not as described, or faiss is asked for and missing.
    """

    database: Tensor  # [D, F]
    votes: Tensor  # [D, C], log of weight times prediction

    def __init__(
        self,
        model: Model,
        features: Callable[[Tensor], Tensor],
        database_x: Tensor,
        k: int = 50,
        weights: str = "uniform",
        search: str = "auto",
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        for name, value in (("model", model), ("features", features)):
            if not callable(value):
                raise ValueError(f"{name} must be callable on a batch; got {type(value).__name__}")
        checks.images(database_x, -math.inf, math.inf)
        if checks.integer("k", k) > len(database_x):
            raise ValueError(f"k must be at most the database's {len(database_x)} images; got {k}")
        checks.one_of("weights", weights, WEIGHTS)
        checks.one_of("search", search, SEARCHES)
        checks.integer("batch_size", batch_size)
        checks.same_device("model", model, database_x)
        self.features, self.k, self.weights = features, k, weights
        self.training = getattr(features, "training", False)  # by which an attack tells what the caller has frozen
        found, predicted = [], []
        with attacking(unwrap(model)), attacking(features), torch.no_grad():
            for x in torch.split(database_x, batch_size):
                found.append(self._features(x))
                logits = model(x)
                checks.logits(logits, x, None)
                predicted.append(arithmetic(logits).log_softmax(1))
        self.register_buffer("database", torch.cat(found))
        self.register_buffer("votes", _weighted(torch.cat(predicted), weights))
        self._index = _index(self.database, search)
        self.search = "torch" if self._index is None else "faiss"
        self.register_load_state_dict_post_hook(_index_anew)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        found = self._features(x)
        answers = self.votes[self._nearest(found.detach())].logsumexp(1).log_softmax(1)
        return answers + 0 * found.sum(1, keepdim=True)  # the gradient that there is: zero

    def soft(self, x: Tensor) -> Tensor:
        """A differentiable likeness of the answers, ``log p`` [N, C]: all images vote, by ``exp(-d^2 / T)``.

        T is the mean squared distance of the k nearest, so it suits any features.
        """
        apart = self._distances(self._features(x))
        scale = apart.detach().topk(self.k, largest=False).values.mean(1, keepdim=True)
        tiny = torch.finfo(apart.dtype).tiny
        return ((-apart / scale.clamp(min=tiny)).softmax(1) @ self.votes.exp()).clamp(min=tiny).log().log_softmax(1)

    def attackable(self) -> BPDA:
        """The same answers with the gradient of :meth:`soft`: what to attack in place of the defence.

        Of a defence that draws by chance besides, say its database, attack :class:`fastadv.EoT` of this.
        """
        return BPDA(self, self.soft)

    def _features(self, x: Tensor) -> Tensor:
        return arithmetic(self.features(x)).flatten(1)

    def _distances(self, found: Tensor) -> Tensor:
        """Squared, [N, D]."""
        lengths = found.square().sum(1, keepdim=True) + self.database.square().sum(1)
        return (lengths - 2 * found @ self.database.T).clamp(min=0)

    def _nearest(self, found: Tensor) -> Tensor:
        """int64 [N, k], the numbers of the nearest database images."""
        if self._index is not None:
            numbers = self._index.search(found.float().cpu().numpy(), self.k)[1]
            return torch.from_numpy(numbers).to(found.device)
        rows = max(1, TOGETHER // len(self.database))
        return torch.cat([self._distances(part).topk(self.k, largest=False).indices for part in torch.split(found, rows)])

    def extra_repr(self) -> str:
        return f"images={len(self.database)}, k={self.k}, weights={self.weights!r}, search={self.search!r}"


def _weighted(log_p: Tensor, weights: str) -> Tensor:
    """``log (w p)`` [D, C] of predictions ``log p``."""
    if weights == "uniform":
        return log_p
    sureness = math.log(log_p.shape[1]) + (log_p.exp() * log_p).sum(1, keepdim=True)
    return log_p + sureness.clamp(min=torch.finfo(log_p.dtype).eps).log()  # of neighbours that all know nothing, the mean


def _index_anew(defence: NearestNeighbors, _: object) -> None:
    """Of the database that has been loaded."""
    defence._index = _index(defence.database, defence.search)


def _index(database: Tensor, search: str) -> Any:
    """faiss's, or None where torch searches."""
    if search == "torch" or (search == "auto" and database.device.type != "cpu"):
        return None
    try:
        import faiss
    except ImportError as error:
        if search == "faiss":
            raise ValueError(f"search='faiss' needs the package faiss ({error}): pip install faiss-cpu") from None
        return None
    index = faiss.IndexFlatL2(database.shape[1])
    index.add(database.float().cpu().numpy())
    return index
