"""Robustness that is proven: by randomised smoothing for any network, by interval bounds for small ones."""

from .protocol import Certification, certify
from .smoothing import ABSTAIN, Certificates, Smooth

__all__ = ["ABSTAIN", "Certificates", "Certification", "Smooth", "certify"]
