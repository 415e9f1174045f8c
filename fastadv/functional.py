"""The losses of all objectives as pure functions of logits, for those who own their training loop.

    loss = fastadv.functional.trades_loss(model(x), model(x_adv), y, beta=6.0)

Scalars, differentiable in every logits argument, in any floating dtype. Each lives with its objective.
"""

from .objectives.consistency import consistency_loss
from .objectives.feature_scatter import transport_cost
from .objectives.gkl import gkl_loss, weighted_mse
from .objectives.hypersphere import hypersphere_loss
from .objectives.ibp import ibp_loss
from .objectives.labels import cross_entropy, smooth_labels
from .objectives.mart import mart_loss
from .objectives.mmc import mmc_centres, mmc_distance, mmc_loss
from .objectives.pairing import alp_loss
from .objectives.rst import rst_loss
from .objectives.score import clip_of, label_error, score_loss
from .objectives.trades import trades_loss

__all__ = [
    "alp_loss",
    "clip_of",
    "consistency_loss",
    "cross_entropy",
    "gkl_loss",
    "hypersphere_loss",
    "ibp_loss",
    "label_error",
    "mart_loss",
    "mmc_centres",
    "mmc_distance",
    "mmc_loss",
    "rst_loss",
    "score_loss",
    "smooth_labels",
    "trades_loss",
    "transport_cost",
    "weighted_mse",
]
