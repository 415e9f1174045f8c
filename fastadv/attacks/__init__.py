"""Attacks, one file a family."""

from .base import Attack, AttackInfo
from .pgd import PGD, NaNGradientWarning, fgsm, pgd
from .square import Square, square

__all__ = ["PGD", "Attack", "AttackInfo", "NaNGradientWarning", "Square", "fgsm", "pgd", "square"]
