"""An active test of an attack: an adversarial image is planted, and the attack is asked to find it.

Zimmermann, Brendel, Tramer and Carlini, "Increasing confidence in adversarial robustness evaluations", 2022 (the binarisation
test). Around a clean image, images are drawn inside the ball and one on its surface. On the model's features a linear readout
is fitted that says 1 of that one and 0 of the others. So an adversarial image is known to be in the ball, seen through all
that the defence does to inputs and gradients; an attack that does not find one fails for its own reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..attacks.draws import Draws
from ..engine import Model
from ..reference.step import Scalar, arithmetic, of_samples
from .probes import Probe, inside, surface

PlantedAttack = Callable[[Model, Tensor, Tensor, Scalar, Tensor], Tensor]  # (model, x, y, eps, samples) -> images

INNER = 200  # images inside the ball, the clean one among them
CANDIDATES = 10  # images on its surface, of which that is planted which is easiest to tell from the inner ones
STARTS = 8  # copies of a sample that are attacked
GAP = 0.05  # between those inside and the surface, in radii
CLOSENESS = 0.9  # the decision boundary's, to the planted image: 0 at the inner ones, 1 at the planted one
RIDGE = 1.0  # of the readout, in mean variances of a feature: less, and it reads what varies at the planted image alone
PLANT = 1 << 19  # the stream of draws


class Features(nn.Module):
    """What the model feeds to the last of its linear layers, [N, D]; the logits where it has none or feeds it no vectors."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        fed: list[Tensor] = []
        layers = [m for m in self.modules() if isinstance(m, nn.Linear)]
        hooks = [m.register_forward_pre_hook(lambda _, inputs: fed.extend(inputs[:1])) for m in layers]
        try:
            logits: Tensor = self.model(x)
        finally:
            for hook in hooks:
                hook.remove()
        usable = fed and fed[-1].dim() == 2 and len(fed[-1]) == len(x) and fed[-1].shape[1] > 1
        return fed[-1] if usable else logits


class Readout(nn.Module):
    """A model of two classes, 1 where ``features @ weight`` is above the threshold."""

    def __init__(self, features: Features, weight: Tensor, threshold: Tensor) -> None:
        super().__init__()
        self.features, self.weight, self.threshold = features, weight, threshold

    def forward(self, x: Tensor) -> Tensor:
        score = arithmetic(self.features(x)) @ self.weight - self.threshold
        return torch.stack([-score, score], 1)


def planted_adversarials(
    probe: Probe, x: Tensor, eps: Scalar, samples: Tensor, attack: PlantedAttack, draws: int
) -> tuple[Tensor, Tensor]:
    """Of each sample for which an image can be planted, whether the attack, and ``draws`` random images, fool the readout.

    A sample has a readout of its own, so a batch is copies of one sample, from which the attack may start differently. Where
    the features of all images in the ball are the same, too few to tell one from the others, or without a gradient, nothing
    can be planted.

    Args:
        probe: whose model, norm, box and random numbers.
        x: clean images [N, ...]; eps: radius, float or [N]; samples: numbers of the samples [N].
        attack: ``attack(model, x, y, eps, samples)`` returns images, for a model of two classes and y = 0; ``samples`` are
            numbers by which the copies may draw.

    Returns:
        Two masks [P], P <= N.
    """
    nothing = torch.zeros(0, dtype=torch.bool, device=x.device)
    found, by_noise = [nothing], [nothing]
    for n in range(len(x)):
        this = slice(n, n + 1)
        image, sample, radius, y = x[this], samples[this], of_samples(eps, this), torch.zeros_like(samples[:1])
        readout = plant(probe, image, radius, sample)
        if readout is None:
            continue
        asked = replace(probe, model=readout)
        images, labels, radii = several(image, y, radius, n=STARTS)
        found.append((~asked.right(attack(readout, images, labels, radii, numbers(sample, STARTS)), labels)).any()[None])
        images, labels, radii = several(image, y, radius, n=draws)
        noise = asked.fooled_by_noise(images, labels, radii, numbers(sample, draws), 1)
        by_noise.append(noise.any()[None])
    return torch.cat(found), torch.cat(by_noise)


def plant(probe: Probe, x: Tensor, eps: Scalar, sample: Tensor) -> Readout | None:
    """The readout for one image x [1, ...]; None where none tells an image on the surface from those inside."""
    lo, hi = checks.bounds(probe.bounds)
    features = Features(probe.model)
    ask = replace(probe, model=features)
    if ask.gradient(x, torch.zeros_like(sample)) is None:  # computed outside autograd, beside a way that has a gradient
        return None
    inner, outer = (Draws(probe.seed, numbers(sample, n), PLANT) for n in (INNER - 1, CANDIDATES))
    some, radii = several(x, eps, n=INNER - 1)
    within = some + (1 - GAP) * inside(inner, 0, some, radii, probe.norm)
    some, radii = several(x, eps, n=CANDIDATES)
    on = (some + surface(outer, 1, some, radii, probe.norm)).clamp(lo, hi)
    ours = ask.logits(torch.cat([x, within.clamp(lo, hi)])).double()
    theirs = ask.logits(on).double()

    # Fisher's discriminant of one image against the others: (covariance + ridge)^-1 (its features - their mean), solved in
    # the space of the samples, which may be smaller than that of the features.
    mean = ours.mean(0)
    spread = ours - mean
    gram = spread @ spread.T
    ridge = RIDGE * gram.trace() / ours.shape[1]
    if not float(ridge) > 0:
        return None
    away = (theirs - mean).T  # [D, candidates]
    weights = away - spread.T @ torch.linalg.solve(gram + ridge * torch.eye(INNER).to(gram), spread @ away)
    inside_scores = ours @ weights  # [INNER, candidates]
    scores = (theirs.T * weights).sum(0)
    highest, lowest = inside_scores.amax(0), inside_scores.amin(0)
    gaps = (scores - highest) / (scores - lowest)
    best = int(gaps.nan_to_num(nan=-1.0).argmax())
    scale = scores[best] - lowest[best]
    threshold = highest[best] + CLOSENESS * (scores[best] - highest[best])
    dtype = torch.promote_types(x.dtype, torch.float32)
    readout = Readout(features, (weights[:, best] / scale).to(dtype), (threshold / scale).to(dtype))
    says = replace(probe, model=readout).logits(torch.cat([x, on[best : best + 1]])).argmax(1).tolist()
    return readout if says == [0, 1] else None


def several(*one: Any, n: int) -> list[Any]:
    """n copies of the rows [1, ...]; a number is one for all."""
    return [v.expand(n, *v.shape[1:]) if isinstance(v, Tensor) and v.dim() else v for v in one]


def numbers(sample: Tensor, n: int) -> Tensor:
    """Numbers for n images of one sample [1], by which they draw."""
    return sample * n + torch.arange(n, device=sample.device)
