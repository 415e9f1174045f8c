"""Attacks, one file a family."""

from .base import Attack, AttackInfo
from .momentum import MIFGSM, mifgsm
from .pgd import PGD, NaNGradientWarning, fgsm, pgd

__all__ = ["MIFGSM", "PGD", "Attack", "AttackInfo", "NaNGradientWarning", "fgsm", "mifgsm", "pgd"]
