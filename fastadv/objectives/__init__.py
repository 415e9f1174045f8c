"""Training methods, one file each: the loss as a pure function of logits, and the objective that attacks and evaluates it."""

from .base import Objective, Output
from .consistency import Consistency
from .fast import FGSMRS, NFGSM, CatastrophicOverfitting
from .feature_scatter import FeatureScatter
from .free import FreeAT
from .gkl import GKL
from .hypersphere import HypersphereHead, HypersphereMargin
from .ibp import IBP
from .labels import LabelSmoothing
from .mart import MART
from .mmc import MMC, MMCHead
from .pairing import ALP, HalfHalf
from .pgd_at import PGDAT
from .rst import RST, RSTStability
from .score import SCORE, SCOREPGDAT
from .standard import Standard
from .trades import DM, TRADES

__all__ = [
    "ALP",
    "DM",
    "FGSMRS",
    "GKL",
    "IBP",
    "MART",
    "MMC",
    "NFGSM",
    "PGDAT",
    "RST",
    "SCORE",
    "SCOREPGDAT",
    "TRADES",
    "CatastrophicOverfitting",
    "Consistency",
    "FeatureScatter",
    "FreeAT",
    "HalfHalf",
    "HypersphereHead",
    "HypersphereMargin",
    "LabelSmoothing",
    "MMCHead",
    "Objective",
    "Output",
    "RSTStability",
    "Standard",
]
