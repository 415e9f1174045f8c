"""Attacks, one file a family."""

from .base import Attack, AttackInfo
from .feature import FeatureAttack
from .pgd import PGD, NaNGradientWarning, fgsm, pgd
from .physical import RP2
from .transfer import Transfer
from .wrappers import BPDA, EoT

__all__ = [
    "BPDA",
    "PGD",
    "RP2",
    "Attack",
    "AttackInfo",
    "EoT",
    "FeatureAttack",
    "NaNGradientWarning",
    "Transfer",
    "fgsm",
    "pgd",
]
