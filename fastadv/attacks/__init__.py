"""Attacks, one file a family."""

from .apgd import APGD, APGDT, apgd, apgdt
from .base import Attack, AttackInfo
from .pgd import PGD, NaNGradientWarning, fgsm, pgd
from .square import Square, square

__all__ = [
    "APGD",
    "APGDT",
    "PGD",
    "Attack",
    "AttackInfo",
    "NaNGradientWarning",
    "Square",
    "apgd",
    "apgdt",
    "fgsm",
    "pgd",
    "square",
]
