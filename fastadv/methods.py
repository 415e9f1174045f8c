"""The training methods by name, as ``fastadv demo --method NAME`` trains them on digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from . import objectives as o
from .attacks import PGD
from .functional import label_error, mmc_distance, transport_cost

Attack = Callable[..., PGD]


@dataclass(frozen=True)
class Method:
    """How a method is trained.

    Attributes:
        objective: from ``attack(**settings)``, which makes a PGD of 10 steps on the network, to the objective.
        alpha: step size relative to eps; None: that of PGD.
        lr: highest learning rate.
        clip: largest norm of the gradient that a step is taken with.
        head: the network's last layer, from 100 features to 10 logits, where the method has its own.
        views: augmentations of each image in a batch.
        labelled: the fraction of training labels it is given; the others are -1.
    """

    objective: Callable[[Attack], o.Objective | o.FreeAT]
    alpha: float | None = None
    lr: float = 0.1
    clip: float = math.inf
    head: Callable[[], nn.Module] | None = None
    views: int = 1
    labelled: float = 1.0


KL = {"loss": "kl", "init": "normal"}  # TRADES' attack

METHODS = {
    # Typical norms are 1 to 2. A single one of 8 has ended in all digits called the same, and hung on the order of rounding.
    # At 0.1 networks may mask gradients: as robust to PGD, but of 1,000 digits Square took up to 50 that gradients left.
    "pgd-at": Method(lambda attack: o.PGDAT(attack(twin=True)), lr=0.05, clip=2.0),
    "half-half": Method(lambda attack: o.HalfHalf(attack())),
    "fgsm-rs": Method(lambda attack: o.FGSMRS(attack(steps=1)), alpha=1.25),
    # The paper's noise of 2 eps is too much at 0.3.
    "n-fgsm": Method(lambda attack: o.NFGSM(eps=0.0, noise=1.0, bn="eval", generator=attack().generator)),
    "free": Method(lambda attack: o.FreeAT(eps=0.0, replays=4), alpha=1.0, lr=0.02),  # four steps on each batch
    "alp": Method(lambda attack: o.ALP(attack())),
    "trades": Method(lambda attack: o.TRADES(attack(**KL), beta=1.0)),  # the paper's beta for digits
    "dm": Method(lambda attack: o.DM(attack(loss="kl", bn="batch"))),
    "mart": Method(lambda attack: o.MART(attack(init="normal")), lr=0.03),
    "score": Method(lambda attack: o.SCORE(attack(loss="se", bn="batch"))),
    "score-pgd-at": Method(lambda attack: o.SCOREPGDAT(attack(loss=label_error))),
    "pgd-he": Method(
        lambda attack: o.PGDAT(attack(), o.HypersphereMargin(10.0, 0.2)),
        head=partial(o.HypersphereHead, 100, 10, scale=10.0),
    ),
    "trades-he": Method(
        lambda attack: o.TRADES(attack(**KL), 1.0, o.HypersphereMargin(15.0, 0.2)),
        head=partial(o.HypersphereHead, 100, 10, scale=15.0),
    ),
    "alp-he": Method(
        lambda attack: o.ALP(attack(), 0.5 / 20**2, o.HypersphereMargin(20.0, 0.3), together=False),
        head=partial(o.HypersphereHead, 100, 10, scale=20.0),
    ),
    "feature-scatter": Method(lambda attack: o.FeatureScatter(attack(steps=1, loss=transport_cost)), alpha=1.0),
    "rst": Method(lambda attack: o.RST(attack(**KL), beta=1.0), labelled=0.5),
    "rst-stability": Method(lambda attack: o.RSTStability(generator=attack().generator)),
    "mmc": Method(
        lambda attack: o.MMC(10, attack(loss=mmc_distance, targeted=True), generator=attack().generator),
        head=partial(o.MMCHead, 100, 10, 32, norm=3.0),
    ),
    "gkl": Method(lambda attack: o.GKL(10, attack(steps=5, **KL)), alpha=0.5),
    # Its bounds grow with the demo's eps, over the first half.
    "ibp": Method(lambda attack: o.IBP(eps=0.0, warmup=0, ramp=600)),
    "consistency": Method(lambda attack: o.Consistency(o.PGDAT(attack())), views=2),
}
