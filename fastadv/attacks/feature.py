"""Attacks on what a model thinks of an image on the way, in place of what it says in the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import checks
from ..engine import Losses, Passes, unwrap
from ..reference.step import Scalar
from .base import Attack, Batch
from .pgd import STEPS, _Ascent
from .search import drive


class FeatureAttack(Attack):
    """Moves the representation at a layer away from that of x, or towards that of a guide image, by projected gradient steps.

    Away: Naseer et al., "Task-generalizable Adversarial Attack based on Perceptual Metric", 2018. Towards: Sabour et al.,
    "Adversarial Manipulation of Deep Representations", 2016; by L-BFGS there, within linf 10/255. Here both are steps on
    ``|f(x_adv) - f(target)|_2^2``. Neither looks at labels or logits, so what they find transfers; y only decides what counts
    as success.

    Args:
        model: an nn.Module that maps a batch [N, ...] to logits [N, C]. Left exactly as found.
        eps: radius in units of x, float or per-sample [N].
        layer: name of a submodule, as in ``model.named_modules()``; its output in its first call is the representation. The
            model runs no farther, so a step costs what lies before the layer.
        guide: images like x, or a single one [1, ...] for all, to look like. None: move away from x.
        alpha: step size in the units of eps, float or [N]; None: ``2.5 * eps / steps``.
        steps: gradient steps, >= 1. One more forward pass for the representation of x or guide.
        norm: "linf", "l2" or "l1".
        targeted: y are classes to reach, such as those of the guides; needs them.
        bounds, seed, engine, precision, memory: as :class:`Attack`. The start is x towards a guide; away from x it is one
            step of length alpha in a random direction, for on x the gradient is zero. There is no ``twin``: it has no layers
            to name.

    Raises:
        ValueError: there is no such layer, the model does not come by it, it gives no tensor, or guide is not like x; otherwise
            as :class:`Attack`.
    """

    NORMS: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    def __init__(
        self,
        model: nn.Module,
        eps: Scalar,
        layer: str,
        guide: Tensor | None = None,
        alpha: Scalar | None = None,
        steps: int = 20,
        norm: str = "linf",
        targeted: bool = False,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        seed: int = 0,
        engine: str = "eager",
        precision: str = "fp32",
        memory: str = "normal",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module, whose layers have names; got {type(model).__name__}")
        names = [name for name, _ in unwrap(model).named_modules() if name]  # type: ignore[attr-defined]
        if layer not in names:
            raise ValueError(f"layer must be a submodule's name, of {', '.join(map(repr, names))}; got {layer!r}")
        if guide is not None and not (isinstance(guide, Tensor) and guide.is_floating_point()):
            raise ValueError(f"guide must be a floating tensor of images or None; got {type(guide).__name__}")
        if targeted and guide is None:
            raise ValueError("targeted needs a guide: away from x no class is looked for")
        if alpha is not None:
            checks.non_negative("alpha", alpha)
        self.layer, self._guide, self.alpha, self.steps = layer, guide, alpha, checks.integer("steps", steps)
        super().__init__(model, eps, norm, targeted, bounds, seed, engine, precision, memory=memory)
        self._representation = _Representation(unwrap(model), layer)

    def _attack(self, batch: Batch) -> Tensor:
        x, eps, alpha = batch.x, batch.eps, self.alpha
        assert eps is not None
        alpha = 2.5 * eps / self.steps if alpha is None else alpha
        checks.per_sample("alpha", alpha, x)
        passes = Passes(self._representation, batch.passes.dtype, batch.passes.signs)
        start, goal = x.clone(), x
        if self._guide is None:
            noise = batch.draws.normal(0, *x.shape[1:], dtype=x.dtype)
            STEPS[self.norm](start, noise, x, alpha, eps, batch.lo, batch.hi)
        else:
            goal, alpha = self._guide_like(x), -alpha
        with self._representation.listening():
            reference = passes.logits(goal.to(batch.dtype))
            loop = _Ascent(
                adv=start, centre=x, y=None, reference=reference.expand(len(x), -1), label=None, eps=eps, alpha=alpha,
                lo=batch.lo, hi=batch.hi, dtype=batch.dtype, norm=self.norm, tracking=False, early_stop=False,
                loss=_distance,  # type: ignore[arg-type]  # of representations, not of logits
            )  # fmt: skip
            loop.passes = passes
            forwards, _ = drive(self._engine, loop, self._representation, self.steps)
        batch.forwards += forwards + 1
        batch.queries += forwards + 1
        return loop.adv

    def _guide_like(self, x: Tensor) -> Tensor:
        guide = self._guide
        assert guide is not None
        if guide.shape not in (x.shape, (1, *x.shape[1:])) or guide.device != x.device:
            raise ValueError(f"guide must be like x, {checks.describe(x)}, or one such image; got {checks.describe(guide)}")
        if not bool(guide.isfinite().all()):
            raise ValueError("guide must be finite; it holds NaN or inf")
        return guide.detach()


def _distance(features: Tensor, y: None, reference: Tensor, out: Losses | None = None) -> Losses:
    d = features - reference
    return d.square().sum(1), 2 * d


class _Enough(BaseException):
    """The representation is known; no ``except Exception`` of the model's may stop this."""


class _Representation(nn.Module):
    """A model as far as a layer: [N, ...] to what the layer gives first, [N, D]. Only while :meth:`listening`."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name
        self.heard: Tensor | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        hook = self.model.get_submodule(self.name).register_forward_hook(self._hear)
        try:
            yield
        finally:
            hook.remove()
            self.heard = None

    def _hear(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2:
            got = checks.describe(output) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer {self.name!r} must give a floating tensor [N, ...]; got {got}")
        if torch.compiler.is_compiling():  # where what is not needed is not computed, and nobody may leave
            if self.heard is None:
                self.heard = output.flatten(1).clone()  # before a layer that works in place gets it
            return
        self.heard = output.flatten(1)
        raise _Enough

    def forward(self, x: Tensor) -> Tensor:
        self.heard = None
        with contextlib.suppress(_Enough):
            self.model(x)
        features, self.heard = self.heard, None
        if features is None:
            raise ValueError(f"layer {self.name!r} is not called by model(x)")
        if len(features) != len(x):
            raise ValueError(f"layer {self.name!r} must give a row for each of {len(x)} images; got {len(features)}")
        return features
