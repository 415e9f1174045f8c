"""Robustness that is proven: by randomised smoothing for any network, by interval bounds for small ones."""

from .intervals import Verification, certify_intervals
from .protocol import Certification, certify
from .smoothing import ABSTAIN, Certificates, Smooth

__all__ = ["ABSTAIN", "Certificates", "Certification", "Smooth", "Verification", "certify", "certify_intervals"]
