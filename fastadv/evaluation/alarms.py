"""Sanity checks of an evaluation: signs that an attack failed where the model only seems to be robust.

    for alarm in sanity_checks(model, x, y, eps=8 / 255):
        print(alarm)

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks", 2020
(AutoAttack's five checks); Athalye, Carlini and Wagner, "Obfuscated gradients give a false sense of security", 2018; Carlini
et al., "On evaluating adversarial robustness", 2019; Pintor et al., "Indicators of attack failure", 2022; Zimmermann et al.,
"Increasing confidence in adversarial robustness evaluations", 2022.

A check of results, such as :func:`beats_white_box`, takes what any attacks have found: masks [N] of the samples that stand,
classified correctly under attack. :func:`sanity_checks` runs attacks of its own to have such results.
"""

from __future__ import annotations

import itertools
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..attacks import NaNGradientWarning
from ..engine import Model, attacking, unwrap
from ..reference.step import Scalar, of_samples
from .planted import planted_adversarials
from .probes import Probe, evenly_spaced

AUTOATTACK = "Croce and Hein, 2020"
OBFUSCATED = "Athalye et al., 2018"
EVALUATING = "Carlini et al., 2019"
INDICATORS = "Pintor et al., 2022"
ACTIVE = "Zimmermann et al., 2022"

TOLERANCE = 0.005  # of accuracy: what an attack may find by luck where a better one does not
MANY = 0.1  # of the samples, or of a loss: where an indicator of Pintor et al. counts as high

STEPS, RESTARTS = 100, 2  # of PGD
AGAIN = 50  # steps of PGD from each of many starts: twice as many starts find more than twice as many steps
REPEATS = 5  # of the same question, as AutoAttack asks it
NOISE_DRAWS = 100
NEIGHBOURS, NEIGHBOURHOOD = 100, 8 / 255  # of "unstable predictions": images, and their linf distance, in widths of the box
WINDOW, IMPROVEMENT = 10, 0.05  # of "incomplete optimisation": last steps, and of the whole rise
PLANTED, PLANTED_FOUND = 20, 0.95

CHECKLIST: tuple[str, ...] = (
    "State the threat model: what the attacker knows, may change and wants, and why this norm and eps describe it.",
    "Attack the defence that was built: an adaptive attack that aims at its mechanism, with a loss that is consistent with it.",
    "Find the weakest part (detector, randomisation, preprocessing, ensemble vote) and attack it alone and with the rest.",
    "Replace what has no useful gradient by a differentiable stand-in in the backward pass (BPDA), and attack again.",
    "Average gradients over the model's random choices (EOT) until more draws find nothing more.",
    "See that no search without autograd (evolution, lookups, purification by sampling) happens at inference; no alarm can.",
    "Start a transfer attack from the closest undefended model that there is, trained on the same data.",
    "Report clean accuracy, the whole test set, all attack settings, and accuracy of every attack per sample at its worst.",
    "Make sure that training, and the choice of the checkpoint, saw no test image.",
    "Publish code and weights, so that others can attack them.",
)
"""What no program sees: printed with every evaluation, for people to answer."""


@dataclass(frozen=True)
class Alarm:
    """One sanity check.

    Attributes:
        name: of what is wrong if it rings.
        rings: whether it does.
        numbers: what that was decided by; accuracies and fractions of samples are in [0, 1].
        advice: one sentence: what to do where it rings.
        source: the paper that asks for this check.
    """

    name: str
    rings: bool
    numbers: dict[str, float]
    advice: str
    source: str

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.numbers.items())
        return f"{'RINGS ' if self.rings else 'silent'}  {self.name}: {numbers}" + (f". {self.advice}" if self.rings else "")


# ------------------------------------------------------------------------------------ AutoAttack's checks of the model


def randomised(answers: list[Tensor], y: Tensor) -> Alarm:
    """Whether the model answers the same question differently: ``answers`` are logits [N, C] of several runs on one batch.

    Rings if logits of unit length differ by more than 1e-4, or accuracies differ.
    """
    unit = [logits / (torch.linalg.vector_norm(logits, dim=1, keepdim=True) + 1e-10) for logits in answers]
    pairs = [(a, b) for i, a in enumerate(unit) for b in unit[i + 1 :]]
    largest = max((_largest(torch.linalg.vector_norm(a - b, dim=1)) for a, b in pairs), default=0.0)
    accuracies = [_fraction(logits.argmax(1) == y) for logits in answers]
    return Alarm(
        "randomised model",
        largest > 1e-4 or min(accuracies) < max(accuracies),
        {"largest difference of unit logits": largest, "least accuracy": min(accuracies), "most": max(accuracies)},
        'Evaluate with version="rand", whose gradients average over the randomness (EOT), or remove the randomness.',
        AUTOATTACK,
    )


def probabilities(logits: Tensor) -> Alarm:
    """Whether outputs [N, C] look like probabilities: all in [0, 1], rows summing to 1, up to 1e-5."""
    lowest, highest = (float(v) for v in logits.aminmax()) if logits.numel() else (-math.inf, math.inf)
    off = _largest((logits.double().sum(1) - 1).abs())
    rings = lowest > -1e-5 and highest < 1 + 1e-5 and off < 1e-5
    return Alarm(
        "probabilities instead of logits",
        rings,
        {"lowest": lowest, "highest": highest, "largest distance of a sum from 1": off} if logits.numel() else {},
        "Let the model return what it feeds to its softmax: the gradients of probabilities vanish where it is confident.",
        AUTOATTACK,
    )


def zero_gradients(gradient: Tensor) -> Alarm:
    """Whether any input gradient [N, ...] is zero everywhere.

    That of ``log((1 - p_y) / p_y)``, the attacks' loss, which has cross-entropy's direction. Cross-entropy's own gradient is
    zero in fp32 wherever the model is confident; that misleads an attack that uses it, but says nothing against the model.
    """
    zero = (gradient == 0).flatten(1).all(1)
    return Alarm(
        "zero gradients",
        bool(zero.any()),
        {"fraction of samples": _fraction(zero)},
        "Replace what has no gradient (rounding, saturation, argmax) by a smooth stand-in in the backward pass (BPDA).",
        AUTOATTACK,
    )


def square_beats_white_box(standing_before: Tensor, standing_after: Tensor, missed: float) -> Alarm:
    """Whether Square, which sees no gradient, took more than half a point that gradients would not have taken.

    AutoAttack warns where it took 0.2 points of those [N] that stood after all white-box attacks. But these start once in
    its standard version, and where gradients are right, more starts find the same: ``missed`` is the share of what Square took
    that they do not find (:func:`missed_by_gradients`). Half a point of what is left may be luck, as in all comparisons here.
    """
    left = round(missed * int((standing_before & ~standing_after).sum()))
    return Alarm(
        "Square beats white-box",
        _too_many(left, len(standing_before)),
        _drop(standing_before, standing_after) | {"of that missed by gradients at the same cost": missed},
        "Run Square longer and with restarts, and an adaptive attack: gradients should find what can be found without them.",
        AUTOATTACK,
    )


def missed_by_gradients(probe: Probe, x: Tensor, y: Tensor, eps: Scalar, numbers: Tensor, queries: int) -> float:
    """The share of samples that stand under PGD, from as many random starts as cost no more than the queries.

    A gradient costs two. Those asked for are the probed model's own: one that lets none through misses all.
    """
    if probe.gradient(x, y) is None:
        return 1.0
    standing = torch.ones_like(y, dtype=torch.bool)
    batch = Batch(x, y, eps, numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NaNGradientWarning)
        for start in range(1, 1 + max(1, queries // (2 * AGAIN))):  # 0 may be where a white-box attack has been
            standing = _among(standing, probe.pgd(*batch.rows(standing), AGAIN, start).standing)
    return _fraction(standing)


def optimises_at_inference(model: Model, x: Tensor) -> Alarm:
    """Whether the model differentiates when it is asked: test-time adaptation, purification by gradients.

    Notices torch.autograd in the calling thread, by whatever name it is called, while the model answers x, with its
    weights frozen: else torch.compile would differentiate the model that it compiles.
    """
    model, asking = unwrap(model), threading.get_ident()
    noticed: list[None] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == asking:
            noticed.append(None)
        return run_backward(*args, **kwargs)

    with attacking(model), _PATCHING:
        run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]  # where all ways to differentiate meet
        torch.autograd._engine_run_backward = spy  # type: ignore[attr-defined]
        try:
            model(x)
        except RuntimeError:  # a model that adapts its weights cannot, for they are frozen here
            if not noticed:
                raise
        finally:
            torch.autograd._engine_run_backward = run_backward  # type: ignore[attr-defined]
    return Alarm(
        "optimisation at inference",
        bool(noticed),
        {"backward passes in one answer": float(len(noticed))},
        "Attack through the optimisation, or a model without it: a gradient that ignores it is not the model's.",
        AUTOATTACK,
    )


_PATCHING = threading.Lock()  # two that patch at once would each restore what the other put there


# -------------------------------------------------------------------------------------------- comparisons of attacks


def single_step_beats_iterative(single: Tensor, iterative: Tensor) -> Alarm:
    """Whether fewer samples stand [N] under one step than under many."""
    return Alarm(
        "single-step beats iterative",
        _too_many(int(iterative.sum()) - int(single.sum()), len(single)),
        {
            "accuracy, single-step": _fraction(single),
            "accuracy, iterative": _fraction(iterative),
            "fraction fooled by single-step only": _fraction(iterative & ~single),
        },
        "Decrease the step size and look at the loss along the way: the gradients point nowhere (gradient masking).",
        OBFUSCATED,
    )


def still_gains(what: str, standing_before: Tensor, standing_after: Tensor) -> Alarm:
    """Whether twice as many of ``what``, steps or restarts, took more than half a point of those [N] that stood before."""
    return Alarm(
        f"more {what} still gain",
        _too_many(int((standing_before & ~standing_after).sum()), len(standing_before)),
        _drop(standing_before, standing_after),
        f"Double the {what} until accuracy no longer falls, and report that accuracy.",
        EVALUATING,
    )


def beats_white_box(what: str, standing: Tensor, fooled: Tensor) -> Alarm:
    """Whether ``what``, an attack without the model's gradients, fools [N] samples that stand [N] under white-box attacks."""
    found = standing & fooled
    return Alarm(
        f"{what} beats white-box",
        _too_many(int(found.sum()), len(found)),
        {"accuracy, white-box": _fraction(standing), f"fraction fooled by {what} only": _fraction(found)},
        f"Repair the white-box attack, for its gradients mislead, and count what {what} found as fooled.",
        EVALUATING,
    )


def not_monotone(standing: Mapping[str, Tensor]) -> Alarm:
    """Whether more samples stand [N] anywhere than in a smaller ball; ``standing`` by radius, from the smallest up."""
    masks = list(standing.values())
    return Alarm(
        "accuracy not monotone in eps",
        any(_too_many(int(b.sum()) - int(a.sum()), len(a)) for a, b in itertools.pairwise(masks)),
        {f"accuracy at {radius}": _fraction(mask) for radius, mask in standing.items()},
        "Find out why the attack is weaker in a ball that holds the smaller one: more steps, other step sizes, another loss.",
        EVALUATING,
    )


def above_chance(standing: Tensor, y: Tensor) -> Alarm:
    """Whether more samples stand [N] in a ball that holds one and the same image for all than any one class y [N] has.

    The middle of the box is at most half of its length away from any image, and has one class.
    """
    commonest = int(y.bincount().max()) if len(y) else 0
    return Alarm(
        "accuracy does not reach chance",
        _too_many(int(standing.sum()) - commonest, len(y)),
        {"accuracy in half the box": _fraction(standing), "chance": commonest / max(len(y), 1)},
        "Repair the attack: no model is right about an image that all samples share more often than its commonest class.",
        EVALUATING,
    )


def loss_does_not_rise(losses: Tensor) -> Alarm:
    """Whether many samples' losses [steps, N] end no higher than they began."""
    flat = ~(losses[-1] > losses[0])
    return Alarm(
        "loss does not rise",
        _fraction(flat) > MANY,
        {"fraction of samples": _fraction(flat)},
        "Check the sign and the size of the gradients: an ascent that does not rise follows no gradient of this model.",
        EVALUATING,
    )


def _drop(before: Tensor, after: Tensor) -> dict[str, float]:
    """Of a second attack on top of a first one."""
    numbers = {"accuracy before": _fraction(before), "accuracy after": _fraction(before & after)}
    return numbers | {"drop": _fraction(before & ~after)}


def _too_many(samples: int, of: int) -> bool:
    """More than half a point of accuracy, and more than one sample: one is luck, however few there are."""
    return samples > max(TOLERANCE * of, 1)


# ------------------------------------------------------------------------------------------ indicators of attack failure


def unavailable_gradients(gradient: Tensor | None) -> Alarm:
    """Whether there is no gradient (None), or any sample's [N, ...] holds a NaN or is zero everywhere."""
    if gradient is None:
        unusable = torch.ones(1, dtype=torch.bool)
    else:
        rows = gradient.flatten(1)
        unusable = (rows == 0).all(1) | rows.isnan().any(1)
    return Alarm(
        "unavailable gradients",
        bool(unusable.any()),
        {"fraction of samples": _fraction(unusable)},
        "Let gradients pass from the logits to the input, through a differentiable stand-in where there are none (BPDA).",
        INDICATORS,
    )


def unstable_predictions(change: Tensor) -> Alarm:
    """Whether the loss changes much between neighbours: ``change`` [N] in [0, 1] as :meth:`Probe.change_nearby` measures it."""
    mean = float(change.double().mean()) if len(change) else 0.0
    return Alarm(
        "unstable predictions",
        mean > MANY,
        {"mean relative change of the loss": mean},
        "Smooth the loss over neighbours or over the model's randomness (EOT): a gradient at one point says little here.",
        INDICATORS,
    )


def silent_success(seen: Tensor, standing: Tensor) -> Alarm:
    """Whether samples stand [N] that were fooled on the way [N]."""
    silent = seen & standing
    return Alarm(
        "silent success",
        _too_many(int(silent.sum()), len(silent)),
        {"fraction of samples": _fraction(silent)},
        "Return the best image of the whole path (keep_best=True); of a randomised model, ask about it more than once.",
        INDICATORS,
    )


def incomplete_optimisation(losses: Tensor) -> Alarm:
    """Whether many samples' losses [steps, N] were still rising.

    Per sample the best loss so far, scaled to [0, 1]; it counts if the last ten steps rise by more than 0.05. Give it the
    samples that stand: the others have been optimised enough.
    """
    best = losses.nan_to_num(nan=-math.inf).cummax(0).values.double()
    span = (best[-1] - best[0]).clamp(min=1e-300)
    last = best[-min(WINDOW, len(best)) :]
    rising = (last[-1] - last[0]) / span > IMPROVEMENT
    return Alarm(
        "incomplete optimisation",
        _fraction(rising) > MANY,
        {"fraction of standing samples": _fraction(rising)},
        "Take more steps, or larger ones: the loss had not converged.",
        INDICATORS,
    )


def transfer_failure(fooled_source: Tensor, standing: Tensor) -> Alarm:
    """Whether images that fool [N] what was attacked (the model compiled, in half precision, a twin, a stand-in) leave
    the model itself standing [N]."""
    lost = fooled_source & standing
    return Alarm(
        "transfer failure",
        _too_many(int(lost.sum()), len(lost)),
        {"fraction of samples": _fraction(lost)},
        "Attack the model itself, in its own precision; of a randomised model, average over the randomness (EOT).",
        INDICATORS,
    )


def unconstrained_failure(standing: Tensor) -> Alarm:
    """Whether samples stand [N] under an attack that may make any image of the box out of theirs."""
    return Alarm(
        "unconstrained failure",
        _too_many(int(standing.sum()), len(standing)),
        {"accuracy in the whole box": _fraction(standing)},
        "Repair the attack: without a constraint it must succeed always.",
        INDICATORS,
    )


def planted_adversarial_missed(found: Tensor, found_by_noise: Tensor) -> Alarm:
    """Whether the attack found [P] too few of the adversarial images that were planted (:mod:`fastadv.evaluation.planted`).

    ``found_by_noise`` [P] tells how hard they are to find.
    """
    rate = _fraction(found) if len(found) else 1.0
    return Alarm(
        "planted adversarial missed",
        rate < PLANTED_FOUND,
        {"planted": float(len(found)), "fraction found": rate, "fraction found by noise": _fraction(found_by_noise)},
        "Adapt the attack to the model until it finds what is known to be there; before, its failures mean nothing.",
        ACTIVE,
    )


# --------------------------------------------------------------------------------------------------------- all of them


def sanity_checks(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: Scalar,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    seed: int = 0,
    surrogate: Model | None = None,
    standing: Tensor | None = None,
    samples: int = 256,
    batch_size: int = 256,
    progress: Callable[[str], None] | None = None,
) -> list[Alarm]:
    """All checks but Square's, by attacks of their own: PGD of 100 steps and 2 restarts, noise, and transfer.

    It costs up to 1,150 forwards (an input gradient is one more) for each sample that is classified correctly, 1,300 more for
    one that stands under attack, and 40,000 for the planted images.

    Args:
        model: any callable that maps a batch [N, ...] to logits [N, C]. Left exactly as found.
        x, y: clean images [N, ...] inside the bounds, integer labels [N].
        eps: radius, float or per-sample [N]. norm: "linf", "l2" or "l1". bounds: (lo, hi) of every element, or None, with
            which there is no whole box to attack in.
        seed: of all random numbers.
        surrogate: a model, undefended or an average of the weights, whose adversarial images might fool this one.
        standing: bool [N], who stands under all attacks of the evaluation: it is then its attacks that more steps, more
            restarts, noise and transfer are compared with. Default: those of PGD.
        samples: how many of x are looked at, evenly spaced.
        batch_size: how many at once; results do not depend on it.
        progress: called with the name of each stage before it.

    Returns:
        The alarms. Where no gradient reaches x only those that need none; "unavailable gradients" then rings.

    Raises:
        ValueError: an argument, x, y or the model's output is not as described.
    """
    checks.one_of("norm", norm, ("linf", "l2", "l1"))
    checks.images(x, *checks.bounds(bounds))
    checks.labels(y, x)
    if y.is_floating_point():
        raise ValueError(f"y must be integer labels [{len(x)}]; got soft labels {list(y.shape)}")
    checks.non_negative("eps", eps)
    checks.per_sample("eps", eps, x)
    checks.same_device("model", model, x)
    if standing is not None and (standing.shape != y.shape or standing.dtype != torch.bool or standing.device != x.device):
        raise ValueError(f"standing must be bool [{len(x)}] on {x.device}; got {checks.describe(standing)}")
    chosen = evenly_spaced(checks.integer("samples", samples), len(x)).to(x.device)
    probe = Probe(unwrap(model), norm, bounds, checks.integer("seed", seed, 0), checks.integer("batch_size", batch_size))
    batch = Batch(x.detach()[chosen], y.long()[chosen], of_samples(eps, chosen), chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NaNGradientWarning)  # there is an alarm for them
        verdict = None if standing is None else standing[chosen]
        return list(_all(probe, batch, surrogate, verdict, progress or (lambda stage: None)))


class Batch(NamedTuple):
    """Samples to look at: as the methods of :class:`Probe` take them."""

    x: Tensor
    y: Tensor
    eps: Scalar
    numbers: Tensor

    def rows(self, mask: Tensor) -> Batch:
        return Batch(self.x[mask], self.y[mask], of_samples(self.eps, mask), self.numbers[mask])

    def within(self, eps: Scalar) -> Batch:
        return self._replace(eps=eps)


def _all(
    probe: Probe, batch: Batch, surrogate: Model | None, verdict: Tensor | None, progress: Callable[[str], None]
) -> Iterator[Alarm]:
    progress("the model")
    answers = [probe.logits(batch.x) for _ in range(REPEATS)]
    if len(batch.x):
        checks.logits(answers[0], batch.x, batch.y)
    yield randomised(answers, batch.y)
    yield probabilities(answers[0])
    yield optimises_at_inference(probe.model, batch.x[:8])

    right = answers[0].argmax(1) == batch.y  # the others are lost without an attack
    clean = batch.rows(right)

    progress("gradients")
    gradient = probe.gradient(clean.x, clean.y)
    yield unavailable_gradients(gradient)
    width = _length_of_box(replace(probe, norm="linf"), batch.x)
    radius = NEIGHBOURHOOD * (width if math.isfinite(width) else 1.0)
    yield unstable_predictions(probe.change_nearby(clean.x, clean.y, clean.numbers, radius, NEIGHBOURS))
    if gradient is None:
        return
    yield zero_gradients(gradient)

    progress("PGD")
    path = probe.pgd(*clean, STEPS)
    standing = _among(right, path.standing)
    yield loss_does_not_rise(path.losses)
    yield incomplete_optimisation(path.losses[:, path.standing])
    yield silent_success(path.fooled.any(0), path.standing)
    yield transfer_failure(path.success, path.standing)
    one_step = _among(right, probe.right(probe.fgsm(clean.x, clean.y, clean.eps), clean.y))
    yield single_step_beats_iterative(one_step, standing)

    progress("more steps, more restarts")
    if verdict is not None:
        standing = right & verdict
    else:
        for start in range(1, RESTARTS):
            standing = _among(standing, probe.pgd(*batch.rows(standing), STEPS, start).standing)
    longer = _among(standing, probe.pgd(*batch.rows(standing), 2 * STEPS).standing)
    yield still_gains("steps", standing, longer)
    again = standing
    for start in range(RESTARTS, 2 * RESTARTS):
        again = _among(again, probe.pgd(*batch.rows(again), STEPS, start).standing)
    yield still_gains("restarts", standing, again)
    standing = longer & again

    progress("attacks without gradients")
    left = batch.rows(standing)
    yield beats_white_box("random noise", standing, _among(standing, probe.fooled_by_noise(*left, NOISE_DRAWS)))
    if surrogate is not None:
        images = replace(probe, model=unwrap(surrogate)).pgd(*left, STEPS).images
        yield beats_white_box("transfer", standing, _among(standing, ~probe.right(images, left.y)))

    progress("larger and smaller balls")
    box = _length_of_box(probe, batch.x)
    by_radius = {"eps 0": right}
    for times in (0.5, 1.0, 2.0):
        ball = clean.within(_at_most(times * clean.eps, box))
        found = path if times == 1 else probe.pgd(*ball, STEPS)
        by_radius[f"{times:g} eps"] = _among(right, found.standing)
    if math.isfinite(box):
        half, whole = (_among(right, probe.pgd(*clean.within(radius), STEPS).standing) for radius in (box / 2, box))
        by_radius["the whole box"] = whole
        yield above_chance(half, batch.y)
        yield unconstrained_failure(whole)
    yield not_monotone(by_radius)

    progress("planted adversarial images")
    few = clean.rows(torch.arange(len(clean.x), device=right.device) < PLANTED)

    def attack(model: Model, x: Tensor, y: Tensor, eps: Scalar, numbers: Tensor) -> Tensor:
        return replace(probe, model=model).pgd(x, y, eps, numbers, STEPS).images

    yield planted_adversarial_missed(*planted_adversarials(probe, few.x, few.eps, few.numbers, attack, NOISE_DRAWS))


def _fraction(mask: Tensor) -> float:
    """Of none it is 0."""
    return float(mask.double().mean()) if mask.numel() else 0.0


def _largest(values: Tensor) -> float:
    return float(values.amax()) if values.numel() else 0.0


def _among(chosen: Tensor, of_chosen: Tensor) -> Tensor:
    """[N] from what is known of the chosen; the others are not."""
    mask = torch.zeros_like(chosen)
    mask[chosen] = of_chosen
    return mask


def _at_most(eps: Scalar, most: float) -> Scalar:
    return eps.clamp(max=most) if isinstance(eps, Tensor) else min(eps, most)


def _length_of_box(probe: Probe, x: Tensor) -> float:
    """The greatest distance of two images in the box, in the norm."""
    lo, hi = checks.bounds(probe.bounds)
    elements = x[0].numel() if len(x) else 1
    return (hi - lo) * {"linf": 1.0, "l2": math.sqrt(elements), "l1": float(elements)}[probe.norm]
