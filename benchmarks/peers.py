"""PGD of the libraries on PyPI, each called as its own documentation shows, and the reference's AutoAttack.

Every PGD takes ``(model, x, y, eps, alpha, steps)`` and returns the attack as a function of nothing; what a user would
build once and keep (wrapped models, attack objects, numpy copies of the data) is built outside of it. All run linf with a
random start on images in [0, 1]. A peer that cannot be imported raises UnavailableError.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from .timing import UnavailableError

Attack = Callable[[], Any]

DISTRIBUTIONS = ("torchattacks", "foolbox", "adversarial-robustness-toolbox", "adv-lib", "pyautoattack")


def versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@contextlib.contextmanager
def importing() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UnavailableError(f"not installed: {error}") from error


@contextlib.contextmanager
def stand_ins(*names: str) -> Iterator[None]:
    """Empty modules in place of those of ``names`` that do not import here; gone again afterwards.

    adv-lib imports torchvision and visdom at its top, the first for a perceptual distance and the second for plots. PGD uses
    neither, so an empty module lets its real code run where they are missing (a CPU build of torch has no torchvision on PyPI).
    """
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:  # absent, or built for another torch
            missing.append(name)
    for name in missing:
        parent, _, child = name.rpartition(".")
        sys.modules[name] = ModuleType(name)
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def torchattacks(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Attack:
    with importing():
        import torchattacks
    attack = torchattacks.PGD(model, eps=eps, alpha=alpha, steps=steps, random_start=True)
    return lambda: attack(x, y)


def foolbox(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Attack:
    with importing():
        import foolbox
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=steps, random_start=True)
    return lambda: attack(wrapped, x, y, epsilons=eps)[1]


def art(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Attack:
    with importing():
        from art.attacks.evasion import ProjectedGradientDescent
        from art.estimators.classification import PyTorchClassifier
    classifier = PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="gpu" if x.is_cuda else "cpu",
    )
    attack = ProjectedGradientDescent(
        classifier, eps=eps, eps_step=alpha, max_iter=steps, num_random_init=1, batch_size=len(x), verbose=False
    )
    images, labels = x.cpu().numpy(), y.cpu().numpy()
    return lambda: attack.generate(images, labels)


def adv_lib(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Attack:
    with importing(), stand_ins("torchvision", "torchvision.models", "visdom"):
        from adv_lib.attacks import pgd_linf
    return lambda: pgd_linf(model, x, y, eps, steps=steps, absolute_step_size=alpha, random_init=True)


PEERS = {"torchattacks": torchattacks, "foolbox": foolbox, "ART": art, "adv-lib": adv_lib}


def pyautoattack(model: nn.Module, norm: str, eps: float, seed: int) -> dict[str, Any]:
    """The attacks of fra31/auto-attack by name, as its standard version sets them: ``attack.perturb(x, y)``."""
    with importing():
        from pyautoattack import AutoAttack
    whole = AutoAttack(model, norm=norm.capitalize(), eps=eps, version="standard", device="cpu", seed=seed)
    whole.apgd.loss, whole.fab.targeted = "ce", True
    parts = {"apgd-ce": whole.apgd, "apgd-t": whole.apgd_targeted, "fab-t": whole.fab, "square": whole.square}
    for part in parts.values():
        part.seed = seed
    return parts
