"""What a training run is: a YAML file, every key of it checked before any work.

    config = load("recipes/cifar10_trades.yaml", ["schedule.lr=0.05", "epochs=10"])

Numbers may be fractions, as papers write them: ``eps: 8/255``. A key that does not exist is an error that names the nearest one
that does; what a model, method, schedule or data set takes beyond the keys below is its own affair, and checked by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .. import checks

RECIPES = next((path for up in (1, 2) if (path := Path(__file__).parents[up] / "recipes").is_dir()), Path("recipes"))


def _number(value: Any) -> Any:
    """YAML reads 8/255 and 5e-4 as text."""
    if isinstance(value, str):
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            return value
    return value


Number = Annotated[float, BeforeValidator(_number)]
Amount = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Keys that are known, and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Open(BaseModel):
    """Known keys, and ``arguments``: the others, for what ``name`` names to check."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        return {key: _number(value) for key, value in (self.model_extra or {}).items()}


class About(Section):
    """Where a recipe comes from and what it should reach. Nothing here changes the run."""

    paper: str
    code: str | None = None
    published: dict[str, Number] = {}  # percent, by evaluation: clean, pgd-20, autoattack
    pflop: Number | None = None  # of the whole run: `fastadv train -c RECIPE --cost` computes it
    notes: str | None = None


class ModelConfig(Open):
    """A network by name (:func:`fastadv.models.build`). mean, std: of a normalisation inside it."""

    mean: Number | list[Number] | None = None
    std: Number | list[Number] | None = None


class DataConfig(Open):
    """A data set by name (:func:`fastadv.training.data.load`), and how its images are changed.

    augment: of each image, in order: "crop", "flip", {cutout: 14}. mix: "mixup" or "cutmix", of pairs.
    extra: a file of further images, of which each batch takes the ``unsup_fraction``.
    """

    root: str | None = None
    augment: list[str | dict[str, Any]] = []
    mix: str | dict[str, Any] | None = None
    extra: str | None = None
    unsup_fraction: Annotated[Number, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _together(self) -> DataConfig:
        if (self.extra is None) != (self.unsup_fraction == 0):
            raise ValueError("extra and unsup_fraction belong together: images, and their share of each batch")
        return self


class MethodConfig(Open):
    """A training method by name (:data:`fastadv.training.build.OBJECTIVES`).

    label_smoothing, over: cross-entropy against smoothed labels (:class:`fastadv.objectives.LabelSmoothing`). margin, scale:
    that of hypersphere embedding. consistency: the weight of agreement between two augmentations of each image.
    """

    label_smoothing: Amount | None = None
    over: Literal["all", "others"] = "all"
    margin: Amount | None = None
    scale: Amount | None = None
    consistency: Amount = 0.0

    @model_validator(mode="after")
    def _together(self) -> MethodConfig:
        if (self.margin is None) != (self.scale is None) or (self.margin is not None and self.label_smoothing is not None):
            raise ValueError("margin and scale belong together, those of hypersphere embedding, and without label_smoothing")
        return self


class AttackConfig(Section):
    """The inner attack: :class:`fastadv.PGD`'s arguments, each None: the method's own. ramp: of eps and alpha, over epochs."""

    eps: Amount | None = None
    alpha: Amount | None = None
    steps: Count | None = None
    norm: Literal["linf", "l2", "l1"] | None = None
    loss: Literal["ce", "margin", "dlr", "kl", "se"] | None = None
    init: Literal["uniform", "normal", "zero"] | None = None
    bn: Literal["eval", "batch", "train"] | None = None
    bounds: tuple[Number, Number] | None = None
    engine: Literal["auto", "eager", "compile", "graph"] | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    twin: bool | None = None
    memory: Literal["normal", "signs"] | None = None
    ramp: Open | None = None


class AWPConfig(Section):
    """Adversarial weight perturbation (:class:`fastadv.AWP`), from epoch ``warmup`` on."""

    gamma: Amount
    warmup: Annotated[int, Field(ge=0)] = 0
    steps: Count = 1
    sync: Literal["auto", "global", "local"] = "auto"
    restore: Literal["before_step", "after_step"] = "before_step"


class OptimizerConfig(Section):
    """SGD (momentum, nesterov) or AdamW (betas).

    decay_norms, decay_biases: whether weight decay acts on these, too. clip: of the gradient's norm.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    momentum: Amount = 0.9
    nesterov: bool = False
    betas: tuple[Number, Number] = (0.9, 0.999)
    weight_decay: Amount = 5e-4
    decay_norms: bool = True
    decay_biases: bool = True
    clip: Amount | None = None

    @model_validator(mode="after")
    def _of_its_kind(self) -> OptimizerConfig:
        foreign = {"sgd": {"betas"}, "adamw": {"momentum", "nesterov"}}[self.name] & self.model_fields_set
        if foreign:
            raise ValueError(f"{self.name} has no {' and no '.join(sorted(foreign))}")
        return self


class ScheduleConfig(Open):
    """The learning rate over epochs (:class:`fastadv.training.schedules.Schedule`)."""

    lr: Amount


class AverageConfig(Section):
    """A running average of the weights, watched and kept beside them (:mod:`fastadv.training.averaging`).

    ema: ``decay`` a step from epoch ``start`` on, the model itself before; ``ramp`` lets it grow to that; ``buffers`` "copy" or
    "average". swa: the mean of the models at epoch ``start`` and after ``every`` so many more.
    """

    name: Literal["ema", "swa"] = "ema"
    decay: Annotated[Number, Field(ge=0, lt=1)] = 0.995
    start: Amount = 0.0
    ramp: bool = True
    buffers: Literal["copy", "average"] = "copy"
    every: Amount = 1.0

    @model_validator(mode="after")
    def _of_its_kind(self) -> AverageConfig:
        foreign = {"ema": {"every"}, "swa": {"decay", "ramp", "buffers"}}[self.name] & self.model_fields_set
        if foreign:
            raise ValueError(f"{self.name} has no {' and no '.join(sorted(foreign))}")
        return self


class ValidationConfig(Section):
    """What watches the training and chooses "best": clean accuracy, and that under PGD, after every so many epochs.

    Attributes:
        samples: held out of the training set, the same whatever the number of processes.
        every: epochs.
        steps, eps, loss: of PGD; eps None: that of the attack, else of the method's paper.
        select: "test" chooses by the test set, as much of the field's code does, and is warned about.
    """

    samples: Annotated[int, Field(ge=0)] = 1000
    every: Count = 1
    steps: Count = 10
    eps: Amount | None = None
    loss: Literal["ce", "margin", "dlr"] = "ce"
    batch_size: Count = 500
    select: Literal["validation", "test"] = "validation"

    @model_validator(mode="after")
    def _has_samples(self) -> ValidationConfig:
        if self.select == "validation" and not self.samples:
            raise ValueError("samples must be at least 1 to select by validation; say select: test to choose by the test set")
        return self

    @property
    def held_out(self) -> int:
        """Images that are not trained on."""
        return self.samples if self.select == "validation" else 0


class Config(Section):
    """A training run.

    parallel: what several processes do with the weights: "ddp", each has all (DistributedDataParallel); "fsdp2", each keeps its
    shard of them, of their average and of the optimizer's state, for models that are too large otherwise
    (:mod:`fastadv.shards`). They train the same, up to rounding. One process has all either way.
    """

    about: About | None = None
    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    attack: AttackConfig = AttackConfig()
    awp: AWPConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    average: AverageConfig | None = None
    validation: ValidationConfig = ValidationConfig()
    epochs: Count
    batch_size: Count = 128  # over all processes
    max_steps: Count | None = None  # ends the run early: does everything run?
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    parallel: Literal["ddp", "fsdp2"] = "ddp"

    @model_validator(mode="after")
    def _has_what_it_changes(self) -> Config:
        if self.method.name == "free" and self.awp is not None:
            raise ValueError("awp: free has one backward for weights and images, and no weights to perturb between")
        if self.attack.ramp is not None and self.method.name in ("standard", "rst-stability"):
            raise ValueError(f"attack.ramp: {self.method.name} attacks nothing")
        if "classes" in self.model.arguments:
            raise ValueError("model.classes: there are as many as the data have")
        return self

    @model_validator(mode="after")
    def _can_be_sharded(self) -> Config:
        refused = {
            "compile: torch.compile and fsdp2 do not go together here": self.compile,
            "channels_last: fsdp2 shards weights that are contiguous": self.channels_last,
            "attack.engine: with fsdp2 it must be eager, as weights come and go": self.attack.engine not in (None, "eager"),
            "attack.twin: with fsdp2 no process has the weights to copy": bool(self.attack.twin),
            "awp.sync: the shards of fsdp2 belong to one perturbation, which is global": self.awp and self.awp.sync == "local",
            "method.name: ibp reads weights where fsdp2 has only shards": self.method.name == "ibp",
        }
        if self.parallel == "fsdp2" and (told := next((why for why, found in refused.items() if found), None)):
            raise ValueError(told)
        return self


def load(path: str | Path, changes: Sequence[str] = ()) -> Config:
    """A config from a YAML file or the name of an installed recipe, with ``changes`` such as "schedule.lr=0.2".

    Raises:
        ValueError: the file is not YAML, a change is not key=value, or a key or value is not as :class:`Config` has it.
    """
    file = find(path)
    try:
        held = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{file} must hold keys and values; got {type(held).__name__}")
    for change in changes:
        _change(held, change)
    return check(held)


def find(path: str | Path) -> Path:
    """The file, or the recipe of that name."""
    file = Path(path)
    if file.is_file():
        return file
    recipe = (RECIPES / file.name).with_suffix(".yaml")
    if recipe.is_file() and file.parent in (Path(), Path("recipes")):  # else a folder was meant, and mistyped
        return recipe
    known = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
    raise ValueError(f"there is no file {str(path)!r}, and no recipe of that name{_among(file.stem, known)}")


def _change(held: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set must be key=value, as in schedule.lr=0.2; got {change!r}")
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = held.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ValueError(f"--set {change}: {section} is {inner!r} and has no keys")
        held = inner
    try:
        held[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {change}: {text!r} is not YAML: {error}") from None


def check(held: Mapping[str, Any]) -> Config:
    """A config from what a YAML file held.

    Raises:
        ValueError: naming each key that is wrong, what it was and what it should be.
    """
    try:
        return Config.model_validate(held)
    except ValidationError as error:
        raise ValueError("\n".join(map(_told, error.errors()))) from None


def _told(error: Any) -> str:
    """One of pydantic's errors, in a line."""
    place = [str(key) for key in error["loc"]]
    key = ".".join(place)
    if error["type"] == "extra_forbidden":
        return f"{key}: there is no such key{_among(place[-1], _keys(place[:-1]))}"
    if error["type"] == "missing":
        return f"{key}: is missing"
    told = error["msg"].removeprefix("Value error, ")
    return f"{key}: {told}; got {error['input']!r}" if key else told


def _keys(place: Sequence[str]) -> list[str]:
    """The keys of the section at this place."""
    section: Any = Config
    for name in place:
        annotation = section.model_fields[name].annotation
        section = next(
            (t for t in [annotation, *getattr(annotation, "__args__", ())] if isinstance(t, type) and issubclass(t, BaseModel)),
            None,
        )
        if section is None:
            return []
    return list(section.model_fields)


def _among(name: str, known: Sequence[str]) -> str:
    """How an error goes on: with the names that there are."""
    return checks.nearest(name, known) + (f" (known: {', '.join(known)})" if known else "")


def dump(config: Config) -> str:
    """As YAML, without what was left at its default."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False)
