"""Triton kernels, imported as ``fastadv.kernels``: the path on GPUs without nvcc and on other vendors' GPUs.

``OPS`` maps the name of an op to the function that fastadv.ops calls.
"""

from . import loss, step, weights

OPS = {
    "linf_step": step.linf_step,
    "linf_start": step.linf_start,
    "normal_start": step.normal_start,
    "l2_step": step.l2_step,
    "l1_step": step.l1_step,
    "apgd_step": step.apgd_step,
    "momentum_step": step.momentum_step,
    "weight_sums": weights.weight_sums,
    "perturb": weights.perturb,
    "ce": loss.ce,
    "log_odds": loss.log_odds,
    "margin": loss.margin,
    "dlr": loss.dlr,
    "dlr_targeted": loss.dlr_targeted,
    "kl": loss.kl,
    "se": loss.se,
}
