"""Perturbations that survive being printed and photographed: within a mask, over random views of the scene.

A view is an ordinary layer that draws anew in each call, ``nn.Sequential(Affine(), Light(), model)`` is a randomised model, and
``EoT`` of it can be attacked by anything. :class:`RP2` adds the mask, and views whose random numbers belong to the samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..engine import Loop, Losses, Model, input_gradient
from ..reference.step import Scalar
from .base import Attack, Batch
from .draws import Draws
from .losses import AttackLoss
from .pgd import STEPS

Uniform: TypeAlias = Callable[..., Tensor]  # uniform(*shape): fresh numbers in [0, 1), [N, *shape]
View: TypeAlias = Callable[[Tensor, Uniform], Tensor]

# ----------------------------------------------------------------------------------------------------------------- views


class RandomView(nn.Module):
    """Base of the views: ``seen(x, uniform)`` makes one of x by random numbers; a call without ``uniform`` draws globally."""

    def forward(self, x: Tensor, uniform: Uniform | None = None) -> Tensor:
        return self.seen(x, uniform or (lambda *shape: torch.rand(len(x), *shape, device=x.device)))

    def seen(self, x: Tensor, uniform: Uniform) -> Tensor:
        raise NotImplementedError


class Affine(RandomView):
    """Rotates, scales and shifts each image [N, C, H, W] by itself, with bilinear interpolation; edges are drawn out.

    Args:
        degrees: of rotation, uniform in [-degrees, degrees].
        scale: (least, most) of the magnification.
        shift: as a fraction of width and of height, uniform in [-shift, shift].

    Raises:
        ValueError: an argument or x is not as described.
    """

    def __init__(self, degrees: float = 15.0, scale: tuple[float, float] = (0.9, 1.1), shift: float = 0.1) -> None:
        super().__init__()
        self.degrees, self.shift = checks.number("degrees", degrees), checks.number("shift", shift)
        if not isinstance(scale, Sequence) or len(scale) != 2 or not 0 < scale[0] <= scale[1] < math.inf:
            raise ValueError(f"scale must be (least, most) with 0 < least <= most; got {scale!r}")
        self.scale = scale

    def seen(self, x: Tensor, uniform: Uniform) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x must be images [N, C, H, W]; got {list(x.shape)}")
        turn, size, right, down = uniform(4).to(x.dtype).unbind(1)
        angle = math.radians(self.degrees) * (2 * turn - 1)
        least, most = self.scale
        zoom = least + (most - least) * size
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        aspect = x.shape[2] / x.shape[3]  # torch measures in half widths and half heights
        # Where to look for each pixel; the whole image is two units wide and high.
        where = torch.stack(
            [cos, -sin * aspect, 2 * self.shift * (2 * right - 1), sin / aspect, cos, 2 * self.shift * (2 * down - 1)], 1
        )
        grid = F.affine_grid(where.view(-1, 2, 3), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    def extra_repr(self) -> str:
        return f"degrees={self.degrees}, scale={self.scale}, shift={self.shift}"


class Light(RandomView):
    """Brightness and contrast of each image by itself: ``(x - mean) * c + mean + b``, not clipped.

    Args:
        brightness: b is uniform in [-brightness, brightness], in units of x.
        contrast: c is uniform in [1 - contrast, 1 + contrast].
    """

    def __init__(self, brightness: float = 0.2, contrast: float = 0.2) -> None:
        super().__init__()
        self.brightness, self.contrast = checks.number("brightness", brightness), checks.number("contrast", contrast)

    def seen(self, x: Tensor, uniform: Uniform) -> Tensor:
        b, c = (2 * uniform(2, *[1] * (x.dim() - 1)).to(x.dtype) - 1).unbind(1)
        mean = x.mean(tuple(range(1, x.dim())), keepdim=True)
        return (x - mean) * (1 + self.contrast * c) + mean + self.brightness * b

    def extra_repr(self) -> str:
        return f"brightness={self.brightness}, contrast={self.contrast}"


class Noise(RandomView):
    """Gaussian noise, of standard deviation ``std`` in units of x, in every element; not clipped."""

    def __init__(self, std: float = 0.05) -> None:
        super().__init__()
        self.std = checks.number("std", std)

    def seen(self, x: Tensor, uniform: Uniform) -> Tensor:
        u, v = uniform(2, *x.shape[1:]).unbind(1)
        normal = (-2 * (u + 2.0**-25).log()).sqrt() * (2 * math.pi * v).cos()  # Box and Muller
        return x + self.std * normal.to(x.dtype)

    def extra_repr(self) -> str:
        return f"std={self.std}"


# ---------------------------------------------------------------------------------------------------------------- attack


class RP2(Attack):
    """Robust physical perturbations: within ``mask``, by gradients that are means over random views of the images.

        mask = torch.zeros(1, 32, 32); mask[:, 8:16, 8:24] = 1
        attack = fastadv.RP2(model, mask, [Affine(), Light(), Noise()])

    Eykholt et al., "Robust Physical-World Attacks on Deep Learning Visual Classification", 2018. There Adam minimises a loss
    with the perturbation's length and its non-printability as penalties; here projected gradient steps keep it within a radius,
    or within ``bounds`` alone, there is no score of printability, and what rises is the mean of the log-odds against y: views
    that are fooled already would have the largest gradients of a cross-entropy.

    Args:
        model: any callable that maps a batch [N, ...] to logits [N, C]. Left exactly as found.
        mask: of zeros and ones, or bool; broadcasts to x, so [H, W], [C, H, W] or one for each sample.
        views: callables ``view(x, uniform) -> x``, applied in order, each to all images; ``uniform(*shape)`` gives
            fresh numbers in [0, 1), [N, *shape]. :mod:`fastadv.attacks.physical` has Affine, Light and Noise. None of them:
            masked PGD.
        eps: radius in units of x, float or per-sample [N]; None: whatever the bounds allow.
        alpha: step size in the same units; None: ``2.5 * eps / steps``, with the width of the bounds where eps is None.
        steps: >= 1.
        samples: views a step, >= 1. A step costs ``2 * samples`` forward passes, and the memory of one view.
        shared: one perturbation for the whole batch, as for several photographs of one object. The images then depend on each
            other, and eps is a float.
        norm: "linf" or "l2".
        targeted, bounds, seed, engine, precision, twin, memory: as :class:`Attack`.

    ``info`` judges the images as they are; how they fare in other views is seen by the model ``nn.Sequential(*views, model)``.

    Raises:
        ValueError: mask is not of zeros and ones or does not fit x, or alpha is None where there is nothing to measure it by;
            otherwise as :class:`Attack`.
    """

    NORMS: ClassVar[tuple[str, ...]] = ("linf", "l2")
    EPS_OPTIONAL: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        mask: Tensor,
        views: Sequence[View] = (),
        eps: Scalar | None = None,
        alpha: Scalar | None = None,
        steps: int = 100,
        samples: int = 4,
        shared: bool = False,
        norm: str = "linf",
        targeted: bool = False,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        twin: bool = False,
        memory: str = "normal",
    ) -> None:
        if not isinstance(mask, Tensor) or not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask must be a tensor of zeros and ones")
        if not isinstance(views, Sequence) or not all(map(callable, views)):
            raise ValueError(f"views must be a sequence of callables (x, uniform) -> x; got {views!r}")
        checks.one_of("norm", norm, self.NORMS)
        if alpha is not None:
            checks.non_negative("alpha", alpha)
        elif eps is None and (norm != "linf" or bounds is None):
            raise ValueError("alpha is needed where eps is None and norm is not 'linf', or there are no bounds")
        if shared and any(isinstance(size, Tensor) and size.dim() for size in (eps, alpha)):
            raise ValueError("eps and alpha must be numbers where the perturbation is shared; got one for each sample")
        self._mask, self.views, self.alpha, self.shared = mask, tuple(views), alpha, bool(shared)
        self.steps, self.samples = checks.integer("steps", steps), checks.integer("samples", samples)
        super().__init__(model, eps, norm, targeted, bounds, seed, engine, precision, twin, memory)

    def _attack(self, batch: Batch) -> Tensor:
        x = batch.x
        mask = self._mask_for(x)
        alpha: Scalar = self.alpha  # type: ignore[assignment]
        if alpha is None:
            alpha = 2.5 * (batch.hi - batch.lo if batch.eps is None else batch.eps) / self.steps
        checks.per_sample("alpha", alpha, x)
        loop = _Overlay(
            adv=x.clone(), centre=x, overlay=torch.zeros_like(x[:1] if self.shared else x), mask=mask, y=batch.y,
            alpha=-alpha if self.targeted else alpha, eps=math.inf if batch.eps is None else batch.eps,
            numbers=batch.draws.samples, clock=torch.zeros((), dtype=torch.int64, device=x.device),
            lo=batch.lo, hi=batch.hi, dtype=batch.dtype, norm=self.norm, loss=AttackLoss("ce", self.targeted),
            seed=self.seed, views=self.views, samples=self.samples,
        )  # fmt: skip
        loop.passes = batch.passes
        run = self._engine.run(loop, batch.model)
        for _ in range(self.steps):
            run.step()
        batch.forwards += self.steps * self.samples
        batch.queries += self.steps * self.samples
        return run.loop.adv.clone()  # a recorded step's own is written to again in the next call

    def _mask_for(self, x: Tensor) -> Tensor:
        mask = self._mask
        try:
            mask.expand_as(x)
            fits = mask.device == x.device
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"mask must broadcast to x, {checks.describe(x)}; got {checks.describe(mask)}")
        return mask.to(x.dtype).view(*[1] * (x.dim() - mask.dim()), *mask.shape)


@dataclass(kw_only=True)
class _Overlay(Loop):
    """A perturbation [N, ...], or [1, ...] for all, under the mask."""

    STATE: ClassVar[tuple[str, ...]] = (
        "adv", "centre", "overlay", "mask", "y", "alpha", "eps", "numbers", "clock",
    )  # fmt: skip
    SCRATCH: ClassVar[tuple[str, ...]] = ("losses",)
    SETTINGS: ClassVar[tuple[str, ...]] = ("lo", "hi", "dtype", "norm", "loss", "seed", "views", "samples")

    adv: Tensor
    centre: Tensor
    overlay: Tensor
    mask: Tensor
    y: Tensor
    alpha: Scalar
    eps: Scalar
    numbers: Tensor  # of the samples
    clock: Tensor  # views so far, counted on the device, where a recorded step counts on
    lo: float
    hi: float
    dtype: torch.dtype
    norm: str
    loss: AttackLoss
    seed: int
    views: tuple[View, ...]
    samples: int
    losses: Losses | None = None

    def step(self) -> None:
        total = torch.zeros_like(self.adv)
        for _ in range(self.samples):
            total += self._gradient_in_a_view()
            self.clock += 1
        with torch.no_grad():
            total *= self.mask
            if len(self.overlay) < len(total):
                total = total.sum(0, keepdim=True)
            width = self.hi - self.lo
            STEPS[self.norm](self.overlay, total, torch.zeros_like(total), self.alpha, self.eps, -width, width)
            torch.add(self.centre, self.overlay * self.mask, out=self.adv).clamp_(self.lo, self.hi)
            if len(self.overlay) == len(self.adv):  # what the box has cut off has not to be undone later
                torch.sub(self.adv, self.centre, out=self.overlay)

    def _gradient_in_a_view(self) -> Tensor:
        draws, streams = Draws(self.seed, self.numbers), itertools.count(1)

        def uniform(*shape: int) -> Tensor:
            return draws.of_stream(next(streams)).uniform(self.clock, *shape)

        with torch.enable_grad():
            image = self.adv.detach().requires_grad_()
            seen = image
            for view in self.views:
                seen = view(seen, uniform)
            inputs = seen.detach().to(self.dtype)
            _, self.losses, gradient = self.passes.gradient(inputs, self.loss, self.y, None, self.losses)
        return gradient if seen is image else input_gradient(seen, image, gradient.to(seen.dtype))
