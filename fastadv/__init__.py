"""fastadv: the fastest way to attack and adversarially train a PyTorch model.

    x_adv = fastadv.pgd(model, x, y, eps=8/255)

Attacks are in ``fastadv.attacks``, how they add up to a robust accuracy in ``fastadv.evaluation``, training methods in
``fastadv.objectives`` and their losses in ``fastadv.functional``, the figures of papers in ``fastadv.analysis``, the fused ops
that all stand on in ``fastadv.ops``, and what each op must compute in ``fastadv.reference``.
"""

from . import analysis, attacks, certify, evaluation, functional, models, objectives, ops, reference, training
from ._version import __version__
from .attacks import *  # noqa: F403 - the attacks
from .defenses import NearestNeighbors
from .evaluation import Evaluation, evaluate
from .machine import tune_allocator
from .normalize import Normalize
from .objectives import *  # noqa: F403 - the training methods
from .ops import use_backend
from .profiling import Profile, profile
from .training import Trainer
from .weights import AWP, RWP

__all__ = [
    "AWP",
    "RWP",
    "Evaluation",
    "NearestNeighbors",
    "Normalize",
    "Profile",
    "Trainer",
    "__version__",
    "analysis",
    "attacks",
    "certify",
    "evaluate",
    "evaluation",
    "functional",
    "models",
    "objectives",
    "ops",
    "profile",
    "reference",
    "training",
    "tune_allocator",
    "use_backend",
]
__all__ += attacks.__all__ + objectives.__all__
