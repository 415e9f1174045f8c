"""fastadv: the fastest way to attack and adversarially train a PyTorch model.

    x_adv = fastadv.pgd(model, x, y, eps=8/255)

Attacks are in ``fastadv.attacks``, training methods in ``fastadv.objectives`` and their losses in ``fastadv.functional``, the
fused ops they stand on in ``fastadv.ops``, and what each op must compute in ``fastadv.reference``.
"""

from . import attacks, functional, objectives, ops, reference
from ._version import __version__
from .attacks import (
    PGD,
    SPSA,
    AttackInfo,
    Boundary,
    HopSkipJump,
    NaNGradientWarning,
    RandomNoise,
    Square,
    boundary,
    fgsm,
    hopskipjump,
    pgd,
    randomnoise,
    spsa,
    square,
)  # fmt: skip
from .machine import tune_allocator
from .normalize import Normalize
from .objectives import *  # noqa: F403 - the training methods
from .ops import use_backend
from .profiling import Profile, profile
from .weights import AWP, RWP

__all__ = [
    "AWP",
    "PGD",
    "RWP",
    "SPSA",
    "AttackInfo",
    "Boundary",
    "HopSkipJump",
    "NaNGradientWarning",
    "Normalize",
    "Profile",
    "RandomNoise",
    "Square",
    "__version__",
    "attacks",
    "boundary",
    "fgsm",
    "functional",
    "hopskipjump",
    "objectives",
    "ops",
    "pgd",
    "profile",
    "randomnoise",
    "reference",
    "spsa",
    "square",
    "tune_allocator",
    "use_backend",
]
__all__ += objectives.__all__
