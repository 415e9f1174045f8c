"""Attack steps in Triton. Names: i_ program index, o_ offsets, m_ mask, b_ block of values, p_ pointer.

linf  one pass: read adv, grad, x, write out, 16 bytes per fp32 element. A program handles BLOCK elements of one row; a row
      is the whole batch where alpha and eps are shared, else one sample.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadv.memory import alike, float64_per_sample
from fastadv.reference.step import Scalar

BLOCK = 1024
_MAX_GRID_ROWS = 65535


# Scalars are annotated fp64: Triton would pass a Python float as fp32, and fp64 images need all of it.
@triton.jit
def linf_step_kernel(
    p_out, p_adv, p_grad, p_x, p_alphas, p_radii,
    alpha: tl.float64, eps: tl.float64, lo: tl.float64, hi: tl.float64, row_size, first_row,
    ACC: tl.constexpr, ALPHAS: tl.constexpr, RADII: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(1).to(tl.int64) + first_row
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < row_size
    o += i_row * row_size
    if ALPHAS:
        alpha = tl.load(p_alphas + i_row)
    if RADII:
        eps = tl.load(p_radii + i_row)
    alpha, eps = tl.full((), alpha, ACC), tl.full((), eps, ACC)
    lo, hi = tl.full((), lo, ACC), tl.full((), hi, ACC)
    b_adv = tl.load(p_adv + o, mask=m).to(ACC)
    b_grad = tl.load(p_grad + o, mask=m).to(ACC)
    b_x = tl.load(p_x + o, mask=m).to(ACC)
    # Comparisons, so that a NaN gradient has sign 0 and a NaN value stays NaN, as in csrc/math.h.
    b = b_adv + alpha * ((b_grad > 0).to(ACC) - (b_grad < 0).to(ACC))
    b = tl.where(b < b_x - eps, b_x - eps, b)
    b = tl.where(b > b_x + eps, b_x + eps, b)
    b = tl.where(b < lo, lo, b)
    b = tl.where(b > hi, hi, b)
    tl.store(p_out + o, b.to(p_out.dtype.element_ty), mask=m)


def linf_step(out: Tensor, adv: Tensor, grad: Tensor, x: Tensor, alpha: Scalar, eps: Scalar, lo: float, hi: float) -> None:
    """Writes the linf step of ``adv`` into ``out``; arguments as :func:`fastadv.ops.linf_step_`."""
    target, adv, grad, x = alike(out, adv, grad, x)
    alpha, alphas = float64_per_sample(alpha, adv)
    eps, radii = float64_per_sample(eps, adv)
    rows = 1 if alphas is None and radii is None else adv.shape[0]
    if adv.numel():
        row_size = adv.numel() // rows
        with torch.cuda.device(adv.device) if adv.is_cuda else nullcontext():  # Triton launches on the current device
            for first_row in range(0, rows, _MAX_GRID_ROWS):
                grid = (triton.cdiv(row_size, BLOCK), min(rows - first_row, _MAX_GRID_ROWS))
                linf_step_kernel[grid](
                    target, adv, grad, x, alphas, radii, alpha, eps, lo, hi, row_size, first_row,
                    ACC=tl.float64 if adv.dtype == torch.float64 else tl.float32,
                    ALPHAS=alphas is not None, RADII=radii is not None, BLOCK=BLOCK, enable_fp_fusion=False,
                )  # fmt: skip
    if target is not out:
        out.copy_(target)
