"""From a config to what it names: model, data, method, optimiser and the trainer that holds them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import checks, models, objectives, processes, shards
from ..attacks import PGD
from ..objectives import Consistency, FreeAT, HypersphereMargin, LabelSmoothing, Objective
from ..weights import AWP
from .augment import compose, mixing
from .averaging import EMA, SWA, Average
from .batches import Batches
from .config import AverageConfig, Config, MethodConfig
from .cost import passes
from .data import Dataset, Images, load, load_extra, split
from .names import called, known
from .schedules import Curve, Schedule, param_groups
from .trainer import Trainer, attack_of
from .validation import Validation

OBJECTIVES: dict[str, type[Objective] | type[FreeAT]] = {
    "standard": objectives.Standard,
    "pgd-at": objectives.PGDAT,
    "trades": objectives.TRADES,
    "dm": objectives.DM,
    "mart": objectives.MART,
    "score": objectives.SCORE,
    "score-pgd-at": objectives.SCOREPGDAT,
    "alp": objectives.ALP,
    "half-half": objectives.HalfHalf,
    "fgsm-rs": objectives.FGSMRS,
    "n-fgsm": objectives.NFGSM,
    "free": objectives.FreeAT,
    "feature-scatter": objectives.FeatureScatter,
    "rst": objectives.RST,
    "rst-stability": objectives.RSTStability,
    "mmc": objectives.MMC,
    "gkl": objectives.GKL,
    "ibp": objectives.IBP,
}

# Running statistics are averaged after each epoch instead; the name is another since torch 2.12 or so.
_names = inspect.signature(DistributedDataParallel).parameters
NO_BROADCAST: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in _names else "broadcast_buffers": False}


def trainer(config: Config, out: str | Path | None = None, device: str | None = None, minutes: float = 10.0) -> Trainer:
    """All that a config asks for, checked, built and put together; nothing is trained yet.

    Raises:
        ValueError: a name or an argument does not exist, or data are missing; it says which and what there is.
    """
    place = processes.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)  # whose generator is saved
    data = load(config.data.name, config.data.root, **config.data.arguments)
    arguments = _network(config, data.classes)
    model = models.build(**arguments).to(place)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = build_objective(config, model, data.classes)
    attack = attack_of(objective, model)
    training, watched = _split(config, data)
    batches = Batches(
        training,
        config.batch_size,
        augment=compose(config.data.augment) if config.data.augment else None,
        mix=None if config.data.mix is None else mixing(config.data.mix, data.classes),
        seed=config.seed,
        device=place,
        extra=None if config.data.extra is None else load_extra(config.data.extra, data.classes),
        unsup_fraction=config.data.unsup_fraction,
        rank=processes.rank(),
        world=processes.world(),
        views=2 if config.method.consistency else 1,
    )
    average = _average(config.average, model, len(batches))
    wrapped = _parallel(config, model, average)
    optimizer = build_optimizer(config, model)
    plan = config.schedule
    schedule = called("schedule", Schedule, plan.name, config.epochs, plan.lr, **plan.arguments)
    awp = None
    if config.awp is not None:
        changes = config.awp.model_dump() | {"warmup": config.awp.warmup * len(batches)}
        awp = AWP(wrapped, **changes)
    chosen = config.validation
    validation = Validation(watched, **yardstick(config, attack), batch_size=chosen.batch_size, seed=config.seed, device=place)
    return Trainer(
        wrapped,
        objective,
        batches,
        optimizer,
        schedule,
        config.epochs,
        out,
        awp=awp,
        average=average,
        validation=validation,
        validate_every=chosen.every,
        ramp=_ramp(config, attack),
        precision=config.precision,
        clip=config.optimizer.clip,
        seed=config.seed,
        max_steps=config.max_steps,
        minutes=minutes,
        saved={"model": "fastadv.models:build", "arguments": arguments, "seed": config.data.arguments.get("seed", 0)},
        passes=passes(config),
    )


def _network(config: Config, classes: int) -> dict[str, Any]:
    """The arguments of :func:`fastadv.models.build`."""
    model = config.model
    given = {"mean": model.mean, "std": model.std}
    return {"name": model.name, "classes": classes, "seed": config.seed, **given, **model.arguments}


def build_objective(config: Config, model: nn.Module, classes: int) -> Objective | FreeAT:
    """The method on ``model``: its paper's attack with the config's changes, and its own arguments."""
    method, kind = config.method, known("method.name", config.method.name, OBJECTIVES)
    attack = {k: v for k, v in config.attack.model_dump(exclude={"ramp"}).items() if v is not None}
    takes = inspect.signature(kind).parameters
    arguments = dict(method.arguments)
    for name in arguments:
        if name not in takes or name in ("attack", "label_loss"):
            names = [*(set(takes) - {"attack", "label_loss", "generator"}), *MethodConfig.model_fields]
            raise ValueError(f"method.{name}: {_unknown(name, names)}")
    if "classes" in takes:
        arguments["classes"] = classes
    if method.label_smoothing is not None and "label_smoothing" in takes:
        arguments["label_smoothing"] = method.label_smoothing
    elif (loss := _label_loss(method)) is not None:
        if "label_loss" not in takes:
            raise ValueError(f"method: {method.name} has no term that label_smoothing or margin could change")
        arguments["label_loss"] = loss
    if "attack" in takes and issubclass(kind, Objective) and kind.PAPER:
        if attack.keys() & {"eps", "steps"}:  # another radius or number of steps than the paper's has another alpha
            attack = {"alpha": None} | attack
        arguments["attack"] = PGD(model, **kind.PAPER | attack)
    else:  # it makes its images itself
        for name, value in attack.items():
            if name not in takes:
                raise ValueError(f"attack.{name}: {method.name} has no such setting; {_unknown(name, takes)}")
            arguments[name] = value
    objective = kind(**arguments)
    if method.consistency:
        if isinstance(objective, FreeAT):
            raise ValueError("method.consistency: free has no loss to add it to")
        return Consistency(objective, method.consistency)
    return objective


def _label_loss(method: MethodConfig) -> Callable[..., Any] | None:
    if method.margin is not None and method.scale is not None:
        return HypersphereMargin(method.scale, method.margin)
    return None if method.label_smoothing is None else LabelSmoothing(method.label_smoothing, method.over)


def _parallel(config: Config, model: nn.Module, average: Average | None) -> nn.Module:
    """The model for the training step: compiled if asked for, shared by the processes where there are several."""
    if config.parallel == "fsdp2" and processes.world() > 1:
        for network in [model] if average is None else [model, average.module]:
            shards.shard(network)
        return model
    wrapped: nn.Module = torch.compile(model) if config.compile else model  # type: ignore[assignment]
    return DistributedDataParallel(wrapped, **NO_BROADCAST) if processes.world() > 1 else wrapped


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    chosen = config.optimizer
    groups = param_groups(model, chosen.weight_decay, chosen.decay_norms, chosen.decay_biases)
    fused, lr = next(model.parameters()).device.type == "cuda", config.schedule.lr
    if chosen.name == "adamw":
        return torch.optim.AdamW(groups, lr, chosen.betas, fused=fused)
    fused = fused and not shards.sharded(model)  # for which torch has a fused AdamW, and no fused SGD
    return torch.optim.SGD(groups, lr, chosen.momentum, nesterov=chosen.nesterov, fused=fused)


def _ramp(config: Config, attack: Any) -> Callable[[float], float] | None:
    """Of eps and alpha: their part of the full size."""
    chosen = config.attack.ramp
    if chosen is None:
        return None
    curve: Curve = called("attack.ramp", Curve, chosen.name, config.epochs, 1.0, **chosen.arguments)
    return curve.at


def _average(chosen: AverageConfig | None, model: nn.Module, steps: int) -> Average | None:
    """With ``steps`` to an epoch."""
    if chosen is None:
        return None
    start = round(chosen.start * steps)
    if chosen.name == "swa":
        return SWA(model, max(start, 1), max(round(chosen.every * steps), 1))
    return EMA(model, chosen.decay, start + 1, chosen.ramp, chosen.buffers)


def _split(config: Config, data: Dataset) -> tuple[Images, Images]:
    """What is trained on, and what is watched."""
    chosen = config.validation
    if chosen.select == "test":
        warnings.warn("best.pt is chosen by the test set, so its accuracy there is too good: report it as such", stacklevel=3)
        return data.train, data.test
    if chosen.samples >= len(data.train):
        raise ValueError(f"validation.samples must be fewer than the {len(data.train)} of {data.name}; got {chosen.samples}")
    return split(data.train, chosen.samples, config.seed)


def yardstick(config: Config, attack: Any) -> dict[str, Any]:
    """What PGD measures a run by, as its arguments; ``attack``: what :func:`fastadv.training.trainer.attack_of` gives."""
    chosen = config.validation
    radius = next((eps for eps in (chosen.eps, config.attack.eps) if eps is not None), getattr(attack, "eps", 8 / 255))
    return {
        "eps": float(radius),
        "steps": chosen.steps,
        "norm": getattr(attack, "norm", "linf"),
        "loss": chosen.loss,
        "bounds": getattr(attack, "bounds", None) or (0.0, 1.0),
    }


def _unknown(name: str, known: Collection[str]) -> str:
    return f"there is no {name!r}{checks.nearest(name, known)} (known: {', '.join(sorted(known))})"
