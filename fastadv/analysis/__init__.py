"""What the papers on adversarial robustness show in figures, as functions: each returns a finding, which says what came out
and draws it.

    found = fastadv.analysis.weight_landscape({"PGD-AT": first, "AWP": second}, x, y, eps=0.3)
    print(found)
    found.figure().savefig("landscape.svg")

From the shell: ``fastadv analyze weight-landscape first.pt second.pt --data digits --eps 0.3``.
"""

from .capacity import CapacitySweep, capacity_sweep
from .convergence import AccuracyAgainstEps, PGDConvergence, accuracy_against_eps, pgd_convergence
from .finding import Finding
from .gaussian import GaussianFeatures, gaussian_features
from .gradients import (
    ClassInterpolations,
    InputGradients,
    LargeEpsExamples,
    class_interpolations,
    input_gradients,
    large_eps_examples,
)
from .landscape import WeightLandscape, WeightPlane, weight_landscape, weight_plane
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
from .runs import RobustnessTradeoff, RobustOverfitting, RunCurves, robust_overfitting, robustness_tradeoff
from .score import GradientAlignment, RobustErrors, ScoreToy, gradient_alignment, robust_errors, score_toy
from .surface import LossSurface, loss_surface

__all__ = [
    "AccuracyAgainstEps",
    "CapacitySweep",
    "ClassInterpolations",
    "Decomposition",
    "Finding",
    "GaussianFeatures",
    "GradientAlignment",
    "InputGradients",
    "LargeEpsExamples",
    "LinearTradeoff",
    "LossSurface",
    "PGDConvergence",
    "RobustErrors",
    "RobustOverfitting",
    "RobustnessTradeoff",
    "RunCurves",
    "ScoreToy",
    "SplineTradeoff",
    "WeightLandscape",
    "WeightPlane",
    "accuracy_against_eps",
    "capacity_sweep",
    "class_interpolations",
    "decompose",
    "gaussian_features",
    "gradient_alignment",
    "input_gradients",
    "large_eps_examples",
    "linear_tradeoff",
    "loss_surface",
    "minimum_norm",
    "pgd_convergence",
    "robust_errors",
    "robust_overfitting",
    "robust_self_training",
    "robustness_tradeoff",
    "score_toy",
    "spline_tradeoff",
    "weight_landscape",
    "weight_plane",
]
