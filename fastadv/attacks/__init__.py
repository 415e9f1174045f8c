"""Attacks, one file a family."""

from .apgd import APGD, APGDT, apgd, apgdt
from .base import Attack, AttackInfo
from .carlini_wagner import CW, cw
from .deepfool import DeepFool, deepfool
from .fab import FAB, FABT, fab, fabt
from .feature import FeatureAttack
from .minimum_norm import DDN, FMN, ddn, fmn
from .pgd import PGD, NaNGradientWarning, fgsm, pgd
from .physical import RP2
from .sparse import PGD0, pgd0
from .square import Square, square
from .transfer import Transfer
from .wrappers import BPDA, EoT

__all__ = [
    "APGD",
    "APGDT",
    "BPDA",
    "CW",
    "DDN",
    "FAB",
    "FABT",
    "FMN",
    "PGD",
    "PGD0",
    "RP2",
    "Attack",
    "AttackInfo",
    "DeepFool",
    "EoT",
    "FeatureAttack",
    "NaNGradientWarning",
    "Square",
    "Transfer",
    "apgd",
    "apgdt",
    "cw",
    "ddn",
    "deepfool",
    "fab",
    "fabt",
    "fgsm",
    "fmn",
    "pgd",
    "pgd0",
    "square",
]
