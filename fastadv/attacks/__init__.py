"""Attacks, one file a family."""

from .base import Attack, AttackInfo
from .pgd import PGD, NaNGradientWarning, fgsm, pgd

__all__ = ["PGD", "Attack", "AttackInfo", "NaNGradientWarning", "fgsm", "pgd"]
