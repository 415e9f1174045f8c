"""``fastadv evaluate``: a checkpoint and a file of samples from the disk to a page."""

from __future__ import annotations

import importlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..processes import device as device_of
from ..processes import processes
from .curves import robustness_curves
from .outcome import Evaluation
from .protocol import evaluate

PREFIXES = ("module.", "model.", "_orig_mod.")  # of DataParallel, of models inside models, of torch.compile
STATES = ("state_dict", "model_state_dict", "model")  # where checkpoints keep the weights
# What a checkpoint may call: other code runs only if the user names it. No prefix would do: most modules lead to os.system.
OURS = ("fastadv.demo:build_network", "fastadv.models:build")
ROBUSTBENCH = "robustbench:"
NAMES = (("x_test", "y_test"), ("x", "y"))  # of images and labels in a file


def run(
    checkpoint: str,
    data: str,
    eps: float,
    model: str | None = None,
    norm: str = "linf",
    version: str | Sequence[str] = "standard",
    batch_size: int = 256,
    device: str | None = None,
    seed: int = 0,
    out: str | Path = "fastadv-evaluation",
    alarms: bool = True,
    engine: str = "eager",
    precision: str = "fp32",
    twin: bool = False,
    samples: int | None = None,
    command: str | None = None,
) -> Evaluation:
    """Evaluates a checkpoint, prints what comes out and writes it into a folder.

    Args:
        checkpoint, model: as :func:`load_model`. data: as :func:`load_data`.
        eps, norm, version, batch_size, seed, alarms, engine, precision, twin: as :func:`fastadv.evaluate`.
        device: default: a GPU where there is one.
        out: folder of the page; what has been found is kept in its subfolder "state", from which the same call goes on.
        samples: only the first so many.
        command: what the user typed, for the page.

    Under torchrun the processes share the samples, and the first one writes.

    Raises:
        ValueError, OSError: something is not as described; the message says what.
    """
    network, x, y = load(checkpoint, model, data, samples)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)  # an impossible one fails here and not after the attacks
    with processes() as rank:  # what goes between them are records, from the CPU
        chosen = device_of(device)
        network = network.to(chosen).eval()
        try_on(network, x[:1].to(chosen))
        found = evaluate(
            network, (x, y), eps, norm, version, batch_size=batch_size, seed=seed, resume=folder / "state", alarms=alarms,
            keep_images=True, device=chosen, engine=engine, precision=precision, twin=twin,
        )  # fmt: skip
        if rank == 0:
            found.curves = robustness_curves(network, x, y, eps, norm, seed=seed, batch_size=batch_size)
            if command is not None:
                found.settings["command"] = command
            page = found.write(folder)
            print(f"{found}\n\nReport: {page}")
    return found


def load(checkpoint: str, model: str | None, data: str, samples: int | None) -> tuple[nn.Module, Tensor, Tensor]:
    """The network and what to ask it about, images and labels, the first ``samples`` of them; not what it was trained on."""
    x, y = load_data(data)
    if samples is not None:
        x, y = x[: checks.integer("samples", samples)], y[:samples]
    network, split = load_model(checkpoint, model)
    check_split(data, split)
    return network, x, y


# ------------------------------------------------------------------------------------------------------------------ samples


def load_data(name: str) -> tuple[Tensor, Tensor]:
    """Images and labels.

    Args:
        name: "digits", the 1,000 test digits of ``fastadv demo``, or "digits:3", those of its seed 3; another data set that
            ``fastadv train`` knows, such as "cifar10", in the folder data or in "cifar10:FOLDER": its test images; or a file:
            .npz with arrays x_test and y_test (or x and y), .pt with a dict of these names or a pair (x, y). Images are in
            [0, 1], or uint8, which are divided by 255.
    """
    dataset, _, where = name.partition(":")
    if dataset == "digits":
        return _digits(name)
    from ..training.data import DATASETS, load

    if dataset in DATASETS:
        test = load(dataset, where or None).test
        return test.take(torch.arange(len(test))).float() / 255, test.y
    path = Path(name)
    if not path.is_file():
        known = ", ".join(["digits", *DATASETS])
        raise ValueError(f"--data must be one of {known}, or a .npz or .pt file; there is no file {name!r}")
    read = {".npz": _npz, ".pt": _pt, ".pth": _pt}.get(path.suffix)
    if read is None:
        raise ValueError(f"--data must be a .npz or a .pt file where it is a file; got {name!r}")
    x, y = read(path)
    if x.dtype == torch.uint8:
        x = x.float() / 255
    elif x.dtype == torch.float64:
        x = x.float()
    return x, y.long() if not y.is_floating_point() else y


def _digits(name: str) -> tuple[Tensor, Tensor]:
    from ..demo import load_digits

    try:
        digits = load_digits(_split_of(name))
    except ImportError as error:
        raise ValueError(f"--data digits needs {error.name}; install it with: pip install 'fastadv[demo]'") from None
    return digits.x_test, digits.y_test


def _split_of(name: str) -> int:
    """The seed in "digits" or "digits:SEED"."""
    seed = name.partition(":")[2] or "0"
    if not seed.isdecimal():
        raise ValueError(f"--data digits:SEED must name the integer that fastadv demo had as --seed; got {name!r}")
    return int(seed)


def check_split(data: str, seed: int | None) -> None:
    """Digits that a network was trained on say nothing about it."""
    if seed is not None and data.split(":")[0] == "digits" and _split_of(data) != seed:
        raise ValueError(
            f"the checkpoint was trained with seed {seed}, whose test digits are --data digits:{seed}; got {data!r}"
        )


def _npz(path: Path) -> tuple[Tensor, Tensor]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return _pair({name: torch.from_numpy(arrays[name]) for name in arrays.files if arrays[name].ndim}, path)
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, TypeError) as error:
        raise ValueError(f"{path} is not a .npz file of numbers: {error}") from None


def _pt(path: Path) -> tuple[Tensor, Tensor]:
    held = _load(path)
    if isinstance(held, Mapping):
        return _pair(held, path)
    if isinstance(held, (tuple, list)) and len(held) == 2 and all(isinstance(t, Tensor) for t in held):
        return held[0], held[1]
    raise ValueError(f"{path} must hold a pair of tensors (x, y) or a dict of them; it holds {type(held).__name__}")


def _pair(held: Mapping[str, Any], path: Path) -> tuple[Tensor, Tensor]:
    for x, y in NAMES:
        if isinstance(held.get(x), Tensor) and isinstance(held.get(y), Tensor):
            return held[x], held[y]
    raise ValueError(f"{path} must hold x and y (or x_test and y_test); it holds {', '.join(map(str, held)) or 'nothing'}")


# -------------------------------------------------------------------------------------------------------------------- model


def load_model(checkpoint: str, factory: str | None = None) -> tuple[nn.Module, int | None]:
    """A network with its weights, and the seed that its checkpoint says its training data were split by, or None.

    Args:
        checkpoint: a file of a state_dict, plain or under "state_dict", "model_state_dict" or "model", with or without the
            prefixes "module.", "model." and "_orig_mod."; nothing in it is executed. Or robustbench:NAME/DATASET/THREAT,
            which the package robustbench loads.
        factory: "module:function", which builds the network. Without it the checkpoint must name one of fastadv's:
            ``{"model": "fastadv.models:build", "arguments": {"name": ...}, "state_dict": ...}``. A name there of other code
            ("mine:network", "timm:NAME") has to be given here as well, and is then called with the checkpoint's arguments.
    """
    if checkpoint.startswith(ROBUSTBENCH):
        if factory is not None:
            raise ValueError(f"--model has no meaning with {checkpoint!r}, which robustbench builds itself")
        return _from_robustbench(checkpoint.removeprefix(ROBUSTBENCH)), None
    if not Path(checkpoint).is_file():
        raise ValueError(f"there is no checkpoint {checkpoint!r}")
    held = _load(Path(checkpoint))
    if not isinstance(held, Mapping):
        raise ValueError(f"{checkpoint} must hold a state_dict; it holds {type(held).__name__}")
    factory, arguments = _builder(checkpoint, held, factory)
    network = _built(factory, arguments)
    state = next((held[key] for key in STATES if isinstance(held.get(key), Mapping)), held)
    try:
        network.load_state_dict(_renamed(state, network))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint} does not fit {factory}: {error}") from None
    seed = held.get("seed")
    return network, seed if isinstance(seed, int) else None


def _builder(checkpoint: str, held: Mapping[str, Any], factory: str | None) -> tuple[str, Mapping[str, Any]]:
    """What builds the network, and its arguments: the checkpoint's word, if it runs no code that the user has not named."""
    named, arguments = held.get("model"), held.get("arguments", {})
    if not isinstance(named, str):
        if factory is None:
            raise ValueError(f"{checkpoint} does not say what network its weights are of: give --model module:function")
        return factory, {}
    code: str | None = named
    if named in OURS:
        name = arguments.get("name") if isinstance(arguments, Mapping) else None
        code = name if isinstance(name, str) and ":" in name else None  # which fastadv.models would import
    if factory is None:
        if code is not None:
            raise ValueError(f"{checkpoint} asks for {code!r}, which is code; if you trust it, give --model {code}")
        return named, arguments
    return (named, arguments) if named in OURS and factory == code else (factory, {})


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a file of tensors (torch.load with weights_only=True): {reason}") from None


def _renamed(state: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """The weights without what wrappers put before all of their names, unless the network's own begin with it."""
    wanted, renamed = network.state_dict().keys(), dict(state)
    while renamed.keys() != wanted:
        prefix = next((p for p in PREFIXES if renamed and all(str(name).startswith(p) for name in renamed)), None)
        if prefix is None:
            break
        renamed = {name.removeprefix(prefix): value for name, value in renamed.items()}
    return renamed


def _built(factory: str, arguments: Mapping[str, Any]) -> nn.Module:
    module, _, function = factory.partition(":")
    if not module or not function:
        raise ValueError(f"--model must be module:function, as in fastadv.demo:small_cnn; got {factory!r}")
    try:
        build: Any = importlib.import_module(module)
        for name in function.split("."):
            build = getattr(build, name)
        network = build(**arguments)
    except Exception as error:
        raise ValueError(f"{factory} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{factory} must return a torch.nn.Module; got {type(network).__name__}")
    return network


def _from_robustbench(name: str) -> nn.Module:
    parts = name.split("/")
    if len(parts) != 3 or not all(parts):
        raise ValueError(
            f"a model of RobustBench is robustbench:NAME/DATASET/THREAT, as in Standard/cifar10/Linf; got {name!r}"
        )
    try:
        from robustbench.utils import load_model as load
    except ImportError as error:
        how = "pip install git+https://github.com/RobustBench/robustbench"
        raise ValueError(f"robustbench:{name} needs the package robustbench ({error}): {how}") from None
    try:
        network: nn.Module = load(model_name=parts[0], dataset=parts[1], threat_model=parts[2])
    except (KeyError, ValueError) as error:
        raise ValueError(f"robustbench has no model {name}: {error}") from None
    return network


def try_on(network: nn.Module, sample: Tensor) -> None:
    """One sample through the network, before hours of work."""
    try:
        with torch.no_grad():
            network(sample)
    except Exception as error:
        given = checks.describe(sample)
        raise ValueError(f"the network cannot be asked about these images, {given}: {type(error).__name__}: {error}") from error
