"""fastadv: the fastest way to attack and adversarially train a PyTorch model.

    x_adv = fastadv.pgd(model, x, y, eps=8/255)

Attacks are in ``fastadv.attacks``, training methods in ``fastadv.objectives`` and their losses in ``fastadv.functional``, the
fused ops they stand on in ``fastadv.ops``, and what each op must compute in ``fastadv.reference``.
"""

from . import attacks, functional, objectives, ops, reference
from ._version import __version__
from .attacks import MIFGSM, PGD, AttackInfo, NaNGradientWarning, fgsm, mifgsm, pgd
from .machine import tune_allocator
from .normalize import Normalize
from .objectives import *  # noqa: F403 - the training methods
from .ops import use_backend
from .profiling import Profile, profile
from .weights import AWP, RWP

__all__ = [
    "AWP",
    "MIFGSM",
    "PGD",
    "RWP",
    "AttackInfo",
    "NaNGradientWarning",
    "Normalize",
    "Profile",
    "__version__",
    "attacks",
    "fgsm",
    "functional",
    "mifgsm",
    "objectives",
    "ops",
    "pgd",
    "profile",
    "reference",
    "tune_allocator",
    "use_backend",
]
__all__ += objectives.__all__
