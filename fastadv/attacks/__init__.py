"""Attacks, one file a family."""

from .apgd import APGD, APGDT, apgd, apgdt
from .base import Attack, AttackInfo
from .carlini_wagner import CW, cw
from .decision import Boundary, HopSkipJump, boundary, hopskipjump
from .deepfool import DeepFool, deepfool
from .fab import FAB, FABT, fab, fabt
from .feature import FeatureAttack
from .minimum_norm import DDN, FMN, ddn, fmn
from .momentum import MIFGSM, mifgsm
from .noise import RandomNoise, randomnoise
from .pgd import PGD, NaNGradientWarning, fgsm, pgd
from .physical import RP2
from .sparse import PGD0, pgd0
from .spsa import SPSA, spsa
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
    "MIFGSM",
    "PGD",
    "PGD0",
    "RP2",
    "SPSA",
    "Attack",
    "AttackInfo",
    "Boundary",
    "DeepFool",
    "EoT",
    "FeatureAttack",
    "HopSkipJump",
    "NaNGradientWarning",
    "RandomNoise",
    "Square",
    "Transfer",
    "apgd",
    "apgdt",
    "boundary",
    "cw",
    "ddn",
    "deepfool",
    "fab",
    "fabt",
    "fgsm",
    "fmn",
    "hopskipjump",
    "mifgsm",
    "pgd",
    "pgd0",
    "randomnoise",
    "spsa",
    "square",
]
