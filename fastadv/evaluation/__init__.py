"""How robust a model is, and whether the answer can be believed."""

from .alarms import CHECKLIST, Alarm, sanity_checks

__all__ = ["CHECKLIST", "Alarm", "sanity_checks"]
