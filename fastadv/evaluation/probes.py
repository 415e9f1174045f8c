"""What sanity checks ask of a model: answers, gradients, and what simple attacks find, each sample for itself.

A sample's result depends on the seed and its number and not on the batch: random numbers are :class:`Draws`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, ops
from ..attacks import PGD, fgsm
from ..attacks.draws import Draws
from ..attacks.norms import norms
from ..engine import Model, attacking
from ..reference.step import Scalar, arithmetic, of_samples, per_sample

NOISE, NEARBY, SHARES = 1 << 20, 2 << 20, 4 << 20  # streams of draws; those of the starts are 0, 1, ...
PHASES = ((1.0, 0.5), (0.25, 0.75), (0.0625, 1.0))  # of PGD: the length of a step in radii, and the share of steps by then


@dataclass(frozen=True)
class Path:
    """What PGD saw of a batch on its way.

    Attributes:
        losses: [iterates, N], ``log((1 - p_y) / p_y)``.
        fooled: [iterates, N], by the answers that the attack got.
        images: [N, ...], the best of each sample.
        success: [N], whether that one fools the model, as the attack believes.
        standing: [N], whether the model, asked once more, is right about it.
    """

    losses: Tensor
    fooled: Tensor
    images: Tensor
    success: Tensor
    standing: Tensor


class Recorder(nn.Module):
    """The model, keeping what it answers."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.answers: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        self.answers.append(arithmetic(logits.detach()))
        return logits


@dataclass(frozen=True)
class Probe:
    """Asks a model: in this norm and box, with these random numbers, so many samples at once.

    Methods take images x [N, ...], labels y [N], a radius eps (float or [N]) and the samples' numbers [N], int64.
    """

    model: Model
    norm: str = "linf"
    bounds: tuple[float, float] | None = (0.0, 1.0)
    seed: int = 0
    batch_size: int = 256

    def logits(self, x: Tensor) -> Tensor:
        """[N, C], fp32 or wider."""
        answers = []
        with attacking(self.model), torch.no_grad():
            for (part,) in self._parts(x):
                answers.append(self.model(part))
                checks.logits(answers[-1], part, None)
        return arithmetic(torch.cat(answers)) if answers else x.new_zeros(0, 2)

    def right(self, x: Tensor, y: Tensor) -> Tensor:
        """[N], whether the model predicts y."""
        return self.logits(x).argmax(1) == y

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """[N], ``log((1 - p_y) / p_y)``: cross-entropy as our attacks see it."""
        return ops.log_odds(self.logits(x), y)[0]

    def gradient(self, x: Tensor, y: Tensor) -> Tensor | None:
        """That of the losses, [N, ...]; None where there is no way from the logits to x."""
        found = [x[:0]]
        with attacking(self.model):
            for part, labels in self._parts(x, y):
                inputs = part.clone().requires_grad_()
                logits = self.model(inputs)
                if not logits.requires_grad:
                    return None
                cotangent = ops.log_odds(logits.detach(), labels)[1]
                (gradient,) = torch.autograd.grad(logits, inputs, cotangent, allow_unused=True)
                if gradient is None:
                    return None
                found.append(gradient)
        return torch.cat(found)

    def pgd(self, x: Tensor, y: Tensor, eps: Scalar, samples: Tensor, steps: int, start: int = 0) -> Path:
        """PGD from each sample's ``start``-th random start, in phases of ever shorter steps, each from the last one's best.

        A path has ``steps`` iterates and the last of each phase.
        """
        nothing = torch.zeros(steps + len(PHASES), 0, device=x.device)
        paths = [Path(nothing, nothing.bool(), x[:0], nothing[0].bool(), nothing[0].bool())]
        for part in self._parts(x, y, eps, samples, steps, start):
            paths.append(self._pgd(*part))
        joined = {name: torch.cat([vars(p)[name] for p in paths], 1) for name in ("losses", "fooled")}
        return Path(**joined, **{name: torch.cat([vars(p)[name] for p in paths]) for name in ("images", "success", "standing")})

    def _pgd(self, x: Tensor, y: Tensor, eps: Scalar, samples: Tensor, steps: int, start: int) -> Path:
        recorder = Recorder(self.model)
        images = x + inside(Draws(self.seed, samples, start), 0, x, eps, self.norm)
        done = 0.0
        for size, until in PHASES:
            attack = PGD(
                recorder, eps, size * eps, round(until * steps) - round(done * steps), self.norm,
                init=images, bounds=self.bounds, keep_best=True,
            )  # fmt: skip
            images, done = attack(x, y), until
        losses = torch.stack([ops.log_odds(logits, y)[0] for logits in recorder.answers])
        fooled = torch.stack([logits.argmax(1) != y for logits in recorder.answers])
        assert attack.info is not None
        return Path(losses, fooled, images, attack.info.success, self.right(images, y))  # type: ignore[arg-type]  # keep_best

    def attacked(self, x: Tensor, y: Tensor, eps: Scalar, samples: Tensor, steps: int) -> Tensor:
        """Images [N, ...] after PGD with steps of 2.5 eps / steps, from each sample's random start."""
        images = [x[:0]]
        for part, labels, radius, numbers in self._parts(x, y, eps, samples):
            draws = Draws(self.seed, numbers)
            images.append(
                PGD(self.model, radius, steps=steps, norm=self.norm, bounds=self.bounds, generator=draws)(part, labels)
            )
        return torch.cat(images)

    def fgsm(self, x: Tensor, y: Tensor, eps: Scalar) -> Tensor:
        """Images [N, ...] after one step."""
        images = [x[:0]]
        for part, labels, radius in self._parts(x, y, eps):
            images.append(fgsm(self.model, part, labels, radius, norm=self.norm, bounds=self.bounds))
        return torch.cat(images)

    def fooled_by_noise(self, x: Tensor, y: Tensor, eps: Scalar, samples: Tensor, draws: int) -> Tensor:
        """[N], whether one of so many images on the surface of the ball does."""
        lo, hi = checks.bounds(self.bounds)
        noise, fooled = Draws(self.seed, samples, NOISE), torch.zeros_like(y, dtype=torch.bool)
        for step in range(draws):
            fooled |= ~self.right((x + surface(noise, step, x, eps, self.norm)).clamp(lo, hi), y)
        return fooled

    def change_nearby(self, x: Tensor, y: Tensor, samples: Tensor, radius: float, draws: int) -> Tensor:
        """[N], the mean relative change of the loss among neighbours within the linf radius, clipped at 1.

        Relative to 1 where the loss is smaller than that: it crosses zero at the decision boundary.
        """
        lo, hi = checks.bounds(self.bounds)
        noise, here = Draws(self.seed, samples, NEARBY), self.losses(x, y)
        change = torch.zeros_like(here)
        for step in range(draws):
            neighbours = (x + inside(noise, step, x, radius, "linf")).clamp(lo, hi)
            change += (self.losses(neighbours, y) - here).abs() / draws
        return (change / here.abs().clamp(min=1.0)).nan_to_num(nan=1.0).clamp(max=1.0)

    def _parts(self, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Batches of the tensors' rows; what has no rows is given to each."""
        for start in range(0, len(values[0]), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield tuple(of_samples(v, part) for v in values)


def device_of(model: Model, x: Tensor) -> torch.device:
    """Where the model is; where x is, if it has no parameters."""
    return next((p.device for p in model.parameters()), x.device) if isinstance(model, nn.Module) else x.device


def evenly_spaced(number: int, of: int) -> Tensor:
    """Numbers [min(number, of)] of so many of the samples."""
    number = min(number, of)
    return torch.arange(number) * of // max(number, 1)


def some(x: Tensor, y: Tensor, samples: int, bounds: tuple[float, float] | None) -> tuple[Tensor, Tensor, Tensor]:
    """So many of the images, evenly spaced, with their labels and numbers.

    Raises:
        ValueError: x is no images inside the bounds, y no integer labels of them, there is none, or samples is below 1.
    """
    checks.labelled(x, y, *checks.bounds(bounds))
    chosen = evenly_spaced(checks.integer("samples", samples), len(x)).to(x.device)
    return x.detach()[chosen], y.detach()[chosen].long(), chosen


def surface(draws: Draws, step: int, x: Tensor, eps: Scalar, norm: str) -> Tensor:
    """Perturbations like x of length eps: corners of the linf ball, uniform on those of l2 and l1."""
    draw = {"linf": draws.signs, "l2": draws.normal, "l1": draws.laplace}[norm]
    direction = draw(step, *x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32))
    length = per_sample(norms(direction, norm), direction)
    return (direction / length * per_sample(eps, direction)).to(x.dtype)


def inside(draws: Draws, step: int, x: Tensor, eps: Scalar, norm: str) -> Tensor:
    """Perturbations inside the ball: uniform in that of linf, else of uniform direction and length."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if norm == "linf":
        return ((2 * draws.uniform(step, *x.shape[1:], dtype=dtype) - 1) * per_sample(eps, x, dtype)).to(x.dtype)
    share = draws.of_stream(draws.stream + SHARES).uniform(step, *[1] * (x.dim() - 1), dtype=dtype)
    return surface(draws, step, x, eps, norm) * share.to(x.dtype)
