"""What the papers on adversarial robustness show in figures, as functions: each returns a finding, which says what came out
and draws it.

    found = fastadv.analysis.weight_landscape({"PGD-AT": first, "AWP": second}, x, y, eps=0.3)
    print(found)
    found.figure().savefig("landscape.svg")

From the shell: ``fastadv analyze landscape first.pt second.pt --data digits --eps 0.3``.
"""

from .finding import Finding
from .gaussian import GaussianFeatures, gaussian_features
from .linear import (
    Decomposition,
    LinearTradeoff,
    SplineTradeoff,
    decompose,
    linear_tradeoff,
    minimum_norm,
    robust_self_training,
    spline_tradeoff,
)
from .score import GradientAlignment, RobustErrors, ScoreToy, gradient_alignment, robust_errors, score_toy

__all__ = [
    "Decomposition",
    "Finding",
    "GaussianFeatures",
    "GradientAlignment",
    "LinearTradeoff",
    "RobustErrors",
    "ScoreToy",
    "SplineTradeoff",
    "decompose",
    "gaussian_features",
    "gradient_alignment",
    "linear_tradeoff",
    "minimum_norm",
    "robust_errors",
    "robust_self_training",
    "score_toy",
    "spline_tradeoff",
]
