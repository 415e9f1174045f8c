"""Curves to look at: accuracy against eps, and how an attack converges.

Accuracy that stays above chance however large eps is, or that still falls with the last step, says that an attack failed or
was stopped too soon (Carlini et al., "On evaluating adversarial robustness", 2019). The attack is PGD, to be cheap; the
accuracy to publish is that of :func:`fastadv.evaluate`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..attacks import NaNGradientWarning
from ..engine import Model, unwrap
from .probes import PHASES, Probe, device_of, some

MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # of eps
STEPS = 20  # of PGD at each
LONG = 50  # steps of the run that is watched step by step


@dataclass(frozen=True)
class Curves:
    """What :func:`robustness_curves` measured. Accuracies are in [0, 1].

    Attributes:
        samples: how many were attacked.
        chance: the share of their commonest class, which a model that sees nothing can reach.
        eps: radii, from 0 to four times the one asked for, or less: the last one is the first with accuracy of chance or less.
        accuracy: at these, under all attacks of radii up to there.
        accuracy_by_step: after 0 (the random start), 1, 2, ... steps of PGD at the radius asked for.
        loss_by_step: mean cross-entropy there.
    """

    samples: int
    chance: float
    eps: list[float]
    accuracy: list[float]
    accuracy_by_step: list[float]
    loss_by_step: list[float]


def robustness_curves(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    seed: int = 0,
    samples: int = 256,
    batch_size: int = 256,
) -> Curves:
    """Attacks some samples by PGD with growing eps and, at eps itself, looks on at each step.

    Costs at most 457 F, forward passes of these samples: 44 F a radius for those that stand until there, 104 F for the steps.

    Args:
        model: maps a batch [N, ...] to logits [N, C]; attacked in eval mode and left as found.
        x, y: clean images [N, ...] in the bounds, integer labels [N]; what is needed of them moves to the model's device.
        eps: radius in units of x. norm: "linf", "l2" or "l1". bounds: (lo, hi) of every element, or None.
        seed: of the random starts.
        samples: how many of x are attacked, evenly spaced.
        batch_size: how many at once; results do not depend on it.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described.
    """
    checks.number("eps", eps)
    checks.one_of("norm", norm, ("linf", "l2", "l1"))
    model = unwrap(model)
    x, y, chosen = (t.to(device_of(model, x)) for t in some(x, y, samples, bounds))
    probe = Probe(model, norm, bounds, checks.integer("seed", seed, 0), checks.integer("batch_size", batch_size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NaNGradientWarning)  # there is an alarm for them
        logits = probe.logits(x)
        checks.logits(logits, x, y)
        right = logits.argmax(1) == y
        chance = float(y.bincount().max()) / len(chosen)
        radii, accuracies = _against_eps(probe, x, y, eps, chosen, right, chance)
        path = probe.pgd(x, y, eps, chosen, LONG)
    repeated = {round(until * LONG) + number for number, (_, until) in enumerate(PHASES[:-1], start=1)}  # where a phase begins
    steps = [step for step in range(len(path.losses)) if step not in repeated]
    standing = right & ~path.fooled.cummax(0).values[steps]
    losses = F.softplus(path.losses[steps].double()).mean(1)
    return Curves(len(chosen), chance, radii, accuracies, standing.double().mean(1).tolist(), losses.tolist())


def _against_eps(
    probe: Probe, x: Tensor, y: Tensor, eps: float, numbers: Tensor, standing: Tensor, chance: float
) -> tuple[list[float], list[float]]:
    """Radii and accuracies. An image that fools the model in a ball lies in all larger ones, so only who stands is attacked."""
    radii, accuracies = [0.0], [float(standing.double().mean())]
    for multiple in MULTIPLES if eps else ():
        if accuracies[-1] <= chance:
            break
        radii.append(multiple * eps)
        left = standing.nonzero()[:, 0]
        standing = standing.clone()
        standing[left] = probe.pgd(x[left], y[left], radii[-1], numbers[left], STEPS).standing
        accuracies.append(float(standing.double().mean()))
    return radii, accuracies
