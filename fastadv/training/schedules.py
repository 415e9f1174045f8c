"""What changes as training goes on, the learning rate above all: values as functions of time, and of nothing else.

    schedule = Schedule("piecewise", epochs=200, lr=0.1, milestones=(100, 150))
    schedule.set(optimizer, t)                                            # before each step
    eps = Curve("constant", epochs=200, value=8 / 255, warmup=10).at(t)   # grows over the first 10 epochs

Time t is the epochs done, a float in [0, epochs]: 12.5 is half way through the 13th. Papers that count epochs from 1 call
"epoch 75" what begins at t = 74. Since nothing is remembered, there is nothing to checkpoint.
"""

from __future__ import annotations

import bisect
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks

# ------------------------------------------------------------------------------------------------------------- the shapes


def piecewise(t: float, epochs: float, milestones: Sequence[float] | None = None, factor: float = 0.1) -> float:
    """Times ``factor`` at each milestone, in epochs, which may be beyond the end: default 1/2 and 3/4 of the run."""
    return factor ** bisect.bisect_right((epochs / 2, 3 * epochs / 4) if milestones is None else milestones, t)


def cyclic(t: float, epochs: float, rise: float = 0.5) -> float:
    """0 to 1 in the first part of the run, ``rise`` of it, and back, on straight lines: torch's CyclicLR."""
    return min(_part(t, 0, rise * epochs), 1 - _part(t, rise * epochs, epochs))


def cosine(t: float, epochs: float, warmup: float = 0.0, final: float = 0.0) -> float:
    """Half a cosine from the end of the warm-up down to ``final``, a part of the largest value."""
    return final + (1 - final) * _half_cosine(1 - _part(t, warmup, epochs))


def cosinew(t: float, epochs: float, rise: float = 0.025, start: float = 0.04, final: float = 4e-6, held: float = 0.0) -> float:
    """Half a cosine up from ``start``, and for the rest of the run another down to ``final``: torch's OneCycleLR.

    Its step at the peak and its last one are the ones before those times: by ``held``, how long a step takes.
    """
    peak, end = rise * epochs - held, epochs - held
    if t <= peak:
        return start + (1 - start) * _half_cosine(_part(t, 0, peak))
    return final + (1 - final) * _half_cosine(1 - _part(t, peak, end))


def _part(t: float, start: float, end: float) -> float:
    """How much of [start, end] is over, from 0 to 1."""
    return min(max((t - start) / (end - start), 0.0), 1.0) if end > start else float(t >= start)


def _half_cosine(part: float) -> float:
    """From 0 to 1 as ``part`` does."""
    return (1 - math.cos(math.pi * part)) / 2


SHAPES: dict[str, Callable[..., float]] = {  # by name: (t, epochs, arguments of its own) -> part of the largest value
    "constant": lambda t, epochs: 1.0,
    "piecewise": piecewise,  # (100, 150) of 200: Rice, AWP; (74, 89, 99): TRADES, MART
    "cosine": cosine,  # RST, GKL; with a warm-up DeepMind
    "cosinew": cosinew,  # DM-Improves-AT
    "cyclic": cyclic,  # Fast AT
    # Rice et al., "Overfitting in adversarially robust deep learning", 2020, compare:
    "superconverge": lambda t, epochs: cyclic(t, epochs, rise=0.4),
    "linear": lambda t, epochs: 1 - 0.9 * _part(t, epochs / 3, 2 * epochs / 3) - 0.09 * _part(t, 2 * epochs / 3, epochs),
    "onedrop": lambda t, epochs, milestones=None, factor=0.1: piecewise(t, epochs, milestones or (epochs / 2,), factor),
    "multipledecay": lambda t, epochs: 1 - math.floor(10 * t / epochs) / 10,
}
CYCLES = ("cosinew", "cyclic", "superconverge")  # rise by themselves, and momentum may fall meanwhile

# --------------------------------------------------------------------------------------------------- values and schedules


class Curve:
    """A value as a function of time.

    Args:
        name: one of ``SHAPES``.
        epochs: how long training takes.
        value: the largest, which the shape is a part of.
        per: "iteration": another value at every step. "epoch": for a whole epoch what it is when that begins. Default as the
            shape's paper: "epoch" for "cosinew", else "iteration".
        warmup: epochs in which the value grows from 0 to its largest, on a straight line, instead of following the shape. Per
            epoch it is what it will be when that ends: so GKL's eps is "constant" with ``per="epoch", warmup=epochs``.
        arguments: the shape's own.

    Raises:
        ValueError: an argument is unknown or not as described.
    """

    def __init__(
        self, name: str, epochs: float, value: float, per: str | None = None, warmup: float = 0.0, **arguments: Any
    ) -> None:
        per = per or ("epoch" if name == "cosinew" else "iteration")
        checks.one_of("name", name, SHAPES)
        checks.one_of("per", per, ("iteration", "epoch"))
        self.shape, self.held = SHAPES[name], float(per == "epoch")
        self.epochs, self.value = checks.number("epochs", epochs, positive=True), checks.number("value", value)
        self.warmup = checks.number("warmup", warmup)
        if self.warmup > (0 if name in CYCLES else self.epochs):
            expected = f"0 for {name!r}, which rises by itself" if name in CYCLES else f"at most epochs = {epochs!r}"
            raise ValueError(f"warmup must be {expected}; got {warmup!r}")
        takes = list(inspect.signature(self.shape).parameters)[2:]
        ours = {key: getattr(self, key) for key in ("warmup", "held") if key in takes}
        own = [key for key in takes if key not in ours]
        for key in arguments:
            if not own:
                raise ValueError(f"{name!r} takes no arguments of its own; got {key!r}")
            checks.one_of(f"an argument of {name!r}", key, own)
        self.arguments = ours | {key: _checked(key, given) for key, given in arguments.items() if given is not None}

    def at(self, t: float) -> float:
        """The value when t epochs are done."""
        if not 0 <= t <= self.epochs:
            raise ValueError(f"t must be the epochs done, from 0 to {self.epochs:g}; got {t!r}")
        now = math.floor(t) if self.held else t
        if now < self.warmup:
            return self.value * min((now + self.held) / self.warmup, 1.0)
        return self.value * self.shape(now, self.epochs, **self.arguments)


class Schedule:
    """Learning rate and momentum as functions of time.

    Args:
        name, epochs, arguments (per and warmup too): as of :class:`Curve`.
        lr: the largest learning rate.
        momentum: constant; or (low, high): from high to low while the learning rate rises, and back; or None, which leaves
            the optimizer's alone. Default None, but (0.85, 0.95) for "cosinew", as torch's OneCycleLR. Fast AT: (0.8, 0.9).

    Raises:
        ValueError: an argument is unknown or not as described.
    """

    def __init__(
        self, name: str, epochs: float, lr: float, momentum: float | tuple[float, float] | None = None, **arguments: Any
    ) -> None:
        self.lr = Curve(name, epochs, checks.number("lr", lr), **arguments)
        momentum = (0.85, 0.95) if momentum is None and name == "cosinew" else momentum
        ends = tuple(momentum) if isinstance(momentum, Sequence) else () if momentum is None else (momentum, momentum)
        if any(checks.number("momentum", end) >= 1 for end in ends) or len(ends) not in (0, 2) or ends != tuple(sorted(ends)):
            raise ValueError(f"momentum must be a number in [0, 1), a pair (low, high) of them or None; got {momentum!r}")
        if len(set(ends)) == 2 and name not in CYCLES:
            raise ValueError(f"momentum must be one number for {name!r}, which never rises; got {momentum!r}")
        self.momentum = ends
        from_nothing = {"start": 0.0, "final": 0.0} if name == "cosinew" else {}
        self._height = Curve(name, epochs, 1.0, **(arguments | from_nothing))

    def at(self, t: float) -> tuple[float, float | None]:
        """(learning rate, momentum) when t epochs are done."""
        if not self.momentum:
            return self.lr.at(t), None
        low, high = self.momentum
        return self.lr.at(t), high - (high - low) * self._height.at(t)

    def set(self, optimizer: Optimizer, t: float) -> None:
        """Gives all parameter groups their values. A group's ``lr_scale`` multiplies its learning rate, which is changed in
        place where it is a tensor. Adam's momentum is the first of its betas; an optimizer without any is a ValueError."""
        lr, momentum = self.at(t)
        for i, group in enumerate(optimizer.param_groups):
            own, old = lr * group.get("lr_scale", 1.0), group["lr"]
            shared = any(old is other["lr"] for other in optimizer.param_groups[:i])  # as torch makes them
            group["lr"] = own if not isinstance(old, Tensor) else old.new_full((), own) if shared else old.fill_(own)
            if momentum is not None and "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif momentum is not None and "momentum" in group:
                group["momentum"] = momentum
            elif momentum is not None:
                raise ValueError(f"momentum must be None for {type(optimizer).__name__}, which has none; got {momentum!r}")


def param_groups(
    model: nn.Module, weight_decay: float, decay_norms: bool = True, decay_biases: bool = True
) -> list[dict[str, Any]]:
    """The parameters as optimizers take them, each once however often it is tied: those that decay, and those that do not.

    Args:
        decay_norms: False spares the scales and shifts of normalisation layers, as DM-Improves-AT and DeepMind do.
        decay_biases: False spares what is called a bias (Rice's ``--l2``), and a ViT's "pos_embed" and "cls_token".
    """
    decay = checks.number("weight_decay", weight_decay)
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # and what else is called so
    spared: set[int] = set()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            norm = isinstance(module, norms) or ("norm" in type(module).__name__.lower() and p.dim() < 2)
            bias = name.endswith("bias") or name in ("pos_embed", "cls_token")
            spared |= {id(p)} if (norm and not decay_norms) or (bias and not decay_biases) else set()
    decaying, rest = ([p for p in model.parameters() if (id(p) in spared) == off] for off in (False, True))
    return [{"params": ps, "weight_decay": wd} for ps, wd in ((decaying, decay), (rest, 0.0)) if ps]


# ------------------------------------------------------------------------------------------------------------- the checks


def _checked(name: str, value: Any) -> float | tuple[float, ...]:
    """An argument of a shape."""
    if name == "milestones":
        points = tuple(checks.number(name, v) for v in value) if isinstance(value, Sequence) else ()
        if not points or list(points) != sorted(points):
            raise ValueError(f"milestones must be rising numbers of epochs; got {value!r}")
        return points
    part = checks.number(name, value)
    if name in ("rise", "start", "final") and part > 1:
        raise ValueError(f"{name} must be a part of the whole, from 0 to 1; got {value!r}")
    return part
