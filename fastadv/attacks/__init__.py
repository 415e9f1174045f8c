"""Attacks, one file a family."""

from .pgd import PGD, AttackInfo, NaNGradientWarning, fgsm, pgd

__all__ = ["PGD", "AttackInfo", "NaNGradientWarning", "fgsm", "pgd"]
