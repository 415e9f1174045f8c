"""Attacks, one file a family."""

from .base import Attack, AttackInfo
from .fab import FAB, FABT, fab, fabt
from .pgd import PGD, NaNGradientWarning, fgsm, pgd

__all__ = ["FAB", "FABT", "PGD", "Attack", "AttackInfo", "NaNGradientWarning", "fab", "fabt", "fgsm", "pgd"]
