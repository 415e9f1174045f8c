"""Attacks, one file a family."""

from .apgd import APGD, APGDT, apgd, apgdt
from .base import Attack, AttackInfo
from .pgd import PGD, NaNGradientWarning, fgsm, pgd

__all__ = ["APGD", "APGDT", "PGD", "Attack", "AttackInfo", "NaNGradientWarning", "apgd", "apgdt", "fgsm", "pgd"]
