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
from .gradients import (
    ClassInterpolations,
    InputGradients,
    LargeEpsExamples,
    class_interpolations,
    input_gradients,
    large_eps_examples,
)
from .landscape import WeightLandscape, WeightPlane, weight_landscape, weight_plane
from .runs import RobustnessTradeoff, RobustOverfitting, RunCurves, robust_overfitting, robustness_tradeoff
from .surface import LossSurface, loss_surface

__all__ = [
    "AccuracyAgainstEps", "CapacitySweep", "ClassInterpolations", "Finding", "InputGradients", "LargeEpsExamples",
    "LossSurface", "PGDConvergence", "RobustOverfitting", "RobustnessTradeoff", "RunCurves", "WeightLandscape", "WeightPlane",
    "accuracy_against_eps", "capacity_sweep", "class_interpolations", "input_gradients", "large_eps_examples", "loss_surface",
    "pgd_convergence", "robust_overfitting", "robustness_tradeoff", "weight_landscape", "weight_plane",
]  # fmt: skip
