"""Attacks, one file a family."""

from .base import Attack, AttackInfo
from .decision import Boundary, HopSkipJump, boundary, hopskipjump
from .noise import RandomNoise, randomnoise
from .pgd import PGD, NaNGradientWarning, fgsm, pgd
from .spsa import SPSA, spsa
from .square import Square, square

__all__ = [
    "PGD", "SPSA", "Attack", "AttackInfo", "Boundary", "HopSkipJump", "NaNGradientWarning", "RandomNoise", "Square", "boundary",
    "fgsm", "hopskipjump", "pgd", "randomnoise", "spsa", "square",
]  # fmt: skip
