"""Attacks, one file a family."""

from .apgd import APGD, APGDT, apgd, apgdt
from .base import Attack, AttackInfo
from .feature import FeatureAttack
from .pgd import PGD, NaNGradientWarning, fgsm, pgd
from .physical import RP2
from .square import Square, square
from .transfer import Transfer
from .wrappers import BPDA, EoT

__all__ = [
    "APGD",
    "APGDT",
    "BPDA",
    "PGD",
    "RP2",
    "Attack",
    "AttackInfo",
    "EoT",
    "FeatureAttack",
    "NaNGradientWarning",
    "Square",
    "Transfer",
    "apgd",
    "apgdt",
    "fgsm",
    "pgd",
    "square",
]
