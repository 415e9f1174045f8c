"""Attacks, one file a family."""

from .base import Attack, AttackInfo
from .carlini_wagner import CW, cw
from .deepfool import DeepFool, deepfool
from .minimum_norm import DDN, FMN, ddn, fmn
from .pgd import PGD, NaNGradientWarning, fgsm, pgd
from .sparse import PGD0, pgd0

__all__ = [
    "CW", "DDN", "FMN", "PGD", "PGD0", "Attack", "AttackInfo", "DeepFool", "NaNGradientWarning", "cw", "ddn", "deepfool",
    "fgsm", "fmn", "pgd", "pgd0",
]  # fmt: skip
