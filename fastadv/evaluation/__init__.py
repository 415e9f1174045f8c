"""How robust a model is, and whether the answer can be believed."""

from .alarms import CHECKLIST, Alarm, sanity_checks
from .curves import Curves, robustness_curves
from .outcome import Evaluation, Row
from .protocol import evaluate

__all__ = ["CHECKLIST", "Alarm", "Curves", "Evaluation", "Row", "evaluate", "robustness_curves", "sanity_checks"]
