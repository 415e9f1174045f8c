"""Attack steps in Triton. Names: i_ program index, o_ offsets, m_ mask, b_ block of values, p_ pointer.

linf   one pass: read adv, grad, x, write out, 16 bytes per fp32 element, the least any step can move. A program handles BLOCK
       elements of one row; a row is the whole batch where alpha and eps are shared, else one sample.
apgd   one pass: read adv, old, grad, x, write adv, old, 24 bytes; what is remembered goes out on the way.
momentum  28 bytes: partial sums of the gradient, then the move, as l2 where a sample is large.
start  one pass: read x, write out, 8 bytes. The random words are computed: one Philox counter serves four neighbours.
l2     a sample of up to 32 KiB stays in one program's registers between its three sums and the move they fix: 16 bytes. A
       larger one takes two kernels, 28 bytes: partial sums, then the move, whose programs each add the partial sums up again
       (in one order, hence all alike): cheaper than a third launch, and no atomics.
l1     one program a sample. Both numbers that the step needs, the threshold on |grad| and the projection's shrink, are roots
       of a count and of a length that fall monotonically; each pass of a search reads the sample, from cache if it fits.

Offsets are 64-bit. Scalars are annotated fp64: Triton would pass a Python float as fp32, and fp64 images need all of it.
Fused multiply-add is off in every launch: a result does not depend on what the compiler fuses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadv.memory import alike, copy_back, device_of, float64_per_sample
from fastadv.reference.step import Scalar

from .common import arithmetic, on_chip, warps

# ------------------------------------------------------------------------------------------------ what all steps are made of


@triton.jit
def place(row_size, BLOCK: tl.constexpr):
    """Which row, and which block of it, this program handles; 64-bit."""
    blocks = tl.cdiv(row_size, BLOCK)
    i = tl.program_id(0)
    return (i // blocks).to(tl.int64), (i % blocks).to(tl.int64)


@triton.jit
def scalar(value, p_values, i_sample, DTYPE: tl.constexpr):
    """The sample's own value where there is one a sample, else the shared one."""
    if p_values is not None:
        value = tl.load(p_values + i_sample)
    return tl.full((), value, DTYPE)


@triton.jit
def load(p, o, m, ACC: tl.constexpr):
    return tl.load(p + o, mask=m, other=0.0).to(ACC)


# Comparisons, not min and max: a NaN value stays NaN, and a NaN gradient has sign 0, as in csrc/math.h.
@triton.jit
def clamp(b, lo, hi):
    b = tl.where(b < lo, lo, b)
    return tl.where(b > hi, hi, b)


@triton.jit
def sign(b, ACC: tl.constexpr):
    return (b > 0).to(ACC) - (b < 0).to(ACC)


# --------------------------------------------------------------------------------------------------------------------- linf


@triton.jit
def linf_project(b, b_x, eps, lo, hi):
    return clamp(clamp(b, b_x - eps, b_x + eps), lo, hi)


@triton.jit
def linf_move(b_adv, b_grad, b_x, alpha, eps, lo, hi, ACC: tl.constexpr):
    return linf_project(b_adv + alpha * sign(b_grad, ACC), b_x, eps, lo, hi)


@triton.jit
def linf_step_kernel(
    p_out, p_adv, p_grad, p_x, p_alphas, p_radii,
    alpha: tl.float64, eps: tl.float64, lo: tl.float64, hi: tl.float64, row_size, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row, i_block = place(row_size, BLOCK)
    alpha, eps = scalar(alpha, p_alphas, i_row, ACC), scalar(eps, p_radii, i_row, ACC)
    lo, hi = tl.full((), lo, ACC), tl.full((), hi, ACC)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < row_size
    o += i_row * row_size
    b_adv, b_grad, b_x = load(p_adv, o, m, ACC), load(p_grad, o, m, ACC), load(p_x, o, m, ACC)
    b = linf_move(b_adv, b_grad, b_x, alpha, eps, lo, hi, ACC)
    tl.store(p_out + o, b.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def random_words(seed, step, i_sample, p_numbers, i_block, BLOCK: tl.constexpr):
    o_counter = i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    o_number = tl.zeros([BLOCK // 4], tl.int64) + scalar(i_sample, p_numbers, i_sample, tl.int64)
    b_0, b_1, b_2, b_3 = tl.philox(
        seed,
        o_counter.to(tl.uint32),
        ((o_counter >> 32) + step).to(tl.uint32),
        o_number.to(tl.uint32),
        (o_number >> 32).to(tl.uint32),
    )
    return tl.interleave(tl.interleave(b_0, b_2), tl.interleave(b_1, b_3))  # 0 1 2 3 of each counter in turn


# Seed and step differ from call to call: specialising on their values would compile the kernel again.
@triton.jit(do_not_specialize=["seed", "step"])
def linf_start_kernel(
    p_out, p_x, p_radii, p_numbers, eps: tl.float64, lo: tl.float64, hi: tl.float64, seed: tl.int64, step: tl.int64, size,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_sample, i_block = place(size, BLOCK)
    eps = scalar(eps, p_radii, i_sample, ACC)
    lo, hi = tl.full((), lo, ACC), tl.full((), hi, ACC)
    b_word = random_words(seed, step, i_sample, p_numbers, i_block, BLOCK)
    b_u = ((b_word >> 8).to(tl.int32) - 8388608).to(ACC) * (1.0 / 8388608)  # [-1, 1) in steps of 2^-23
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    o += i_sample * size
    tl.store(p_out + o, clamp(load(p_x, o, m, ACC) + eps * b_u, lo, hi).to(p_out.dtype.element_ty), mask=m)


@triton.jit
def normal(b_word, ACC: tl.constexpr):
    # As normal() in csrc/math.h.
    b_q = ((b_word >> 1).to(tl.int32).to(ACC) + 0.5) * (1.0 / 4294967296.0)
    b_w = -tl.log(4 * b_q * (1 - b_q))
    b_near, b_far = b_w - 3, tl.sqrt(tl.where(b_w > 0, b_w, 0.0)) - 3.5
    b_p = tl.full(b_q.shape, 4.76244099e-07, ACC)
    b_p = b_p * b_near - 2.78265038e-06
    b_p = b_p * b_near - 1.69058753e-05
    b_p = b_p * b_near + 0.00027713409
    b_p = b_p * b_near - 0.00118519707
    b_p = b_p * b_near - 0.00811687838
    b_p = b_p * b_near + 0.34171873
    b_p = b_p * b_near + 2.29603561
    b_r = tl.full(b_q.shape, -0.000270750392, ACC)
    b_r = b_r * b_far + 0.000782027805
    b_r = b_r * b_far - 0.00102686316
    b_r = b_r * b_far + 0.00144144364
    b_r = b_r * b_far - 0.00289236312
    b_r = b_r * b_far + 0.00465632908
    b_r = b_r * b_far + 1.42463229
    b_r = b_r * b_far + 4.71708838
    b_z = (1 - 2 * b_q) * tl.where(b_w < 6, b_p, b_r)
    return tl.where((b_word & 1) != 0, -b_z, b_z)


@triton.jit(do_not_specialize=["seed", "step"])
def normal_start_kernel(
    p_out, p_x, p_stds, p_numbers, std: tl.float64, seed: tl.int64, step: tl.int64, copies, size,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row, i_block = place(size, BLOCK)
    i_sample = i_row // copies
    std = scalar(std, p_stds, i_sample, ACC)
    b_z = normal(random_words(seed, step + i_row % copies, i_sample, p_numbers, i_block, BLOCK), ACC)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_x = load(p_x, i_sample * size + o, m, ACC)
    tl.store(p_out + i_row * size + o, (b_x + std * b_z).to(p_out.dtype.element_ty), mask=m)


# ----------------------------------------------------------------------------------------------------------------- momentum


@triton.jit
def apgd_step_kernel(
    p_adv, p_old, p_best, p_best_grad, p_image, p_grad, p_x, p_better, p_taken, p_alphas, p_momenta, p_radii,
    alpha: tl.float64, momentum: tl.float64, eps: tl.float64, lo: tl.float64, hi: tl.float64, size,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_sample, i_block = place(size, BLOCK)
    alpha, eps = scalar(alpha, p_alphas, i_sample, ACC), scalar(eps, p_radii, i_sample, ACC)
    momentum = scalar(momentum, p_momenta, i_sample, tl.float64)
    momentum, inertia = momentum.to(ACC), (1.0 - momentum).to(ACC)
    lo, hi = tl.full((), lo, ACC), tl.full((), hi, ACC)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    o += i_sample * size
    b_as_kept, b_grad = tl.load(p_adv + o, mask=m, other=0.0), tl.load(p_grad + o, mask=m, other=0.0)
    b_adv, b_old, b_x = b_as_kept.to(ACC), load(p_old, o, m, ACC), load(p_x, o, m, ACC)
    if tl.load(p_better + i_sample) != 0:
        tl.store(p_best + o, b_as_kept, mask=m)
        tl.store(p_best_grad + o, b_grad, mask=m)
    if tl.load(p_taken + i_sample) != 0:
        tl.store(p_image + o, b_as_kept, mask=m)
    b_z = linf_move(b_adv, b_grad.to(ACC), b_x, alpha, eps, lo, hi, ACC)
    b = linf_project(b_adv + momentum * (b_z - b_adv) + inertia * (b_adv - b_old), b_x, eps, lo, hi)
    tl.store(p_old + o, b_as_kept, mask=m)
    tl.store(p_adv + o, b.to(p_adv.dtype.element_ty), mask=m)


@triton.jit
def momentum_sums_kernel(p_sums, p_grad, size, span, PARTS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """sums[i_sample, i_part]: |grad|_1 of `span` elements of a sample, a multiple of BLOCK."""
    i_sample, i_part = (tl.program_id(0) // PARTS).to(tl.int64), (tl.program_id(0) % PARTS).to(tl.int64)
    left = size - i_part * span  # elements of the sample from here on
    p_grad += i_sample * size + i_part * span
    b_sum = tl.zeros([BLOCK], tl.float64)
    for start in range(0, span, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_sum += tl.abs(load(p_grad, o, o < left, ACC)).to(tl.float64)
    tl.store(p_sums + i_sample * PARTS + i_part, tl.sum(b_sum, 0))


@triton.jit
def momentum_apply_kernel(
    p_adv, p_velocity, p_grad, p_x, p_alphas, p_decays, p_radii,
    alpha: tl.float64, decay: tl.float64, eps: tl.float64, lo: tl.float64, hi: tl.float64, p_sums, size,
    PARTS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    i_sample, i_block = place(size, BLOCK)
    alpha, eps = scalar(alpha, p_alphas, i_sample, ACC), scalar(eps, p_radii, i_sample, ACC)
    decay = scalar(decay, p_decays, i_sample, ACC)
    lo, hi = tl.full((), lo, ACC), tl.full((), hi, ACC)
    o_part = tl.arange(0, BLOCK_PARTS)
    sum = tl.sum(tl.load(p_sums + i_sample * PARTS + o_part, mask=o_part < PARTS, other=0.0), 0)
    adds = (sum > 0) & (sum < float("inf"))  # a zero or NaN gradient does not
    sum = tl.where(adds, sum, 1.0)
    unit = tl.where(sum < 2.0**-64, 2.0**64, tl.where(sum > 2.0**64, 2.0**-64, 1.0))
    share, unit = (1.0 / (sum * unit)).to(ACC), unit.to(ACC)  # see csrc/math.h
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    o += i_sample * size
    b_added = tl.where(adds, share * (load(p_grad, o, m, ACC) * unit), 0.0)  # 0 * NaN would be NaN
    b_velocity = (decay * load(p_velocity, o, m, ACC) + b_added).to(p_velocity.dtype.element_ty)
    tl.store(p_velocity + o, b_velocity, mask=m)
    b = linf_move(load(p_adv, o, m, ACC), b_velocity.to(ACC), load(p_x, o, m, ACC), alpha, eps, lo, hi, ACC)
    tl.store(p_adv + o, b.to(p_adv.dtype.element_ty), mask=m)


# ----------------------------------------------------------------------------------------------------------------------- l2
# d = adv - x. |d + a g/|g||^2 = <d,d> + 2a <d,g>/|g| + a^2, so three sums over a sample fix the step and its projection.


@triton.jit
def l2_products(b_adv, b_grad, b_x):
    """d d, d g, g g in fp64, where the squares of tiny gradients do not underflow and those of huge ones do not overflow."""
    b_d, b_g = b_adv.to(tl.float64) - b_x.to(tl.float64), b_grad.to(tl.float64)
    return b_d * b_d, b_d * b_g, b_g * b_g


@triton.jit
def l2_coefficients(dd, dg, gg, alpha, eps, ACC: tl.constexpr):
    """The factors of d and of g * unit; unit is the power of two that keeps the latter a normal number. See csrc/math.h."""
    g_norm = tl.sqrt(gg)
    moves = (g_norm > 0) & (g_norm < float("inf"))  # a zero or NaN gradient moves nothing
    g_norm = tl.where(moves, g_norm, 1.0)
    alpha = tl.where(moves, alpha, 0.0)
    square = dd + 2 * alpha * tl.where(moves, dg / g_norm, 0.0) + alpha * alpha
    norm = tl.sqrt(tl.where(square < 0, 0.0, square))
    shrink = tl.where(norm > eps, eps / norm, 1.0)
    unit = tl.where(g_norm < 2.0**-64, 2.0**64, tl.where(g_norm > 2.0**64, 2.0**-64, 1.0))
    return shrink.to(ACC), (shrink * alpha / (g_norm * unit)).to(ACC), unit.to(ACC)


@triton.jit
def l2_move(b_adv, b_grad, b_x, keep, move, unit, lo, hi):
    b_moved = tl.where(move == 0, 0.0, move * (b_grad * unit))  # 0 * NaN would be NaN
    return clamp(b_x + (keep * (b_adv - b_x) + b_moved), lo, hi)


@triton.jit
def l2_step_kernel(
    p_out, p_adv, p_grad, p_x, p_alphas, p_radii,
    alpha: tl.float64, eps: tl.float64, lo: tl.float64, hi: tl.float64, size, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_sample = tl.program_id(0).to(tl.int64)
    alpha, eps = scalar(alpha, p_alphas, i_sample, tl.float64), scalar(eps, p_radii, i_sample, tl.float64)
    lo, hi = tl.full((), lo, ACC), tl.full((), hi, ACC)
    o = tl.arange(0, BLOCK)
    m = o < size
    o = i_sample * size + o
    b_adv, b_grad, b_x = load(p_adv, o, m, ACC), load(p_grad, o, m, ACC), load(p_x, o, m, ACC)
    b_dd, b_dg, b_gg = l2_products(b_adv, b_grad, b_x)
    keep, move, unit = l2_coefficients(tl.sum(b_dd, 0), tl.sum(b_dg, 0), tl.sum(b_gg, 0), alpha, eps, ACC)
    b = l2_move(b_adv, b_grad, b_x, keep, move, unit, lo, hi)
    tl.store(p_out + o, b.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def l2_sums_kernel(p_sums, p_adv, p_grad, p_x, size, span, PARTS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """sums[i_sample, :, i_part]: the three sums over `span` elements of a sample, a multiple of BLOCK."""
    i_sample, i_part = (tl.program_id(0) // PARTS).to(tl.int64), (tl.program_id(0) % PARTS).to(tl.int64)
    first = i_sample * size + i_part * span
    left = size - i_part * span  # elements of the sample from here on
    p_adv, p_grad, p_x = p_adv + first, p_grad + first, p_x + first
    b_dd, b_dg, b_gg = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, span, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o < left
        b_1, b_2, b_3 = l2_products(load(p_adv, o, m, ACC), load(p_grad, o, m, ACC), load(p_x, o, m, ACC))
        b_dd, b_dg, b_gg = b_dd + b_1, b_dg + b_2, b_gg + b_3
    p_sums += i_sample * 3 * PARTS + i_part
    tl.store(p_sums, tl.sum(b_dd, 0))
    tl.store(p_sums + PARTS, tl.sum(b_dg, 0))
    tl.store(p_sums + 2 * PARTS, tl.sum(b_gg, 0))


@triton.jit
def l2_apply_kernel(
    p_out, p_adv, p_grad, p_x, p_alphas, p_radii,
    alpha: tl.float64, eps: tl.float64, lo: tl.float64, hi: tl.float64, p_sums, size,
    PARTS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    i_sample, i_block = place(size, BLOCK)
    alpha, eps = scalar(alpha, p_alphas, i_sample, tl.float64), scalar(eps, p_radii, i_sample, tl.float64)
    lo, hi = tl.full((), lo, ACC), tl.full((), hi, ACC)
    o_part = tl.arange(0, BLOCK_PARTS)
    m_part = o_part < PARTS
    p_sums += i_sample * 3 * PARTS
    dd = tl.sum(tl.load(p_sums + o_part, mask=m_part, other=0.0), 0)
    dg = tl.sum(tl.load(p_sums + PARTS + o_part, mask=m_part, other=0.0), 0)
    gg = tl.sum(tl.load(p_sums + 2 * PARTS + o_part, mask=m_part, other=0.0), 0)
    keep, move, unit = l2_coefficients(dd, dg, gg, alpha, eps, ACC)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    o += i_sample * size
    b = l2_move(load(p_adv, o, m, ACC), load(p_grad, o, m, ACC), load(p_x, o, m, ACC), keep, move, unit, lo, hi)
    tl.store(p_out + o, b.to(p_out.dtype.element_ty), mask=m)


# ----------------------------------------------------------------------------------------------------------------------- l1


@triton.jit
def l1_pull(b_adv, b_grad, descends, lo, hi, BITS: tl.constexpr):
    """|grad|, and 0 where the step would run into the wall that adv touches, as integers, which for floats >= 0 order alike."""
    b_ahead = tl.where(descends, -b_grad, b_grad)
    b_free = ((b_ahead > 0) & (b_adv < hi)) | ((b_ahead < 0) & (b_adv > lo))  # a NaN is neither
    return tl.where(b_free, tl.abs(b_grad), 0.0).to(BITS, bitcast=True)


@triton.jit
def l1_count(p_adv, p_grad, size, threshold, descends, lo, hi, ACC: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """How many elements of the sample pull at least that much."""
    b_count = tl.zeros([BLOCK], tl.int64)
    for start in range(0, size, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o < size
        b_pull = l1_pull(load(p_adv, o, m, ACC), load(p_grad, o, m, ACC), descends, lo, hi, BITS)
        b_count += (b_pull >= threshold).to(tl.int64)
    return tl.sum(b_count, 0)


@triton.jit
def l1_moved(b_adv, b_grad, b_x, threshold, step, descends, lo, hi, ACC: tl.constexpr, BITS: tl.constexpr):
    """u: the distance from x after the step, before the projection."""
    b_moves = l1_pull(b_adv, b_grad, descends, lo, hi, BITS) >= threshold
    return (b_adv - b_x) + tl.where(b_moves, step * sign(b_grad, ACC), 0.0)


@triton.jit
def l1_lengths(b_u, b_x, shrink, lo, hi):
    """|d| of the projection d = sign(u) clamp(|u| - shrink, 0, room), and room, the distance to the wall ahead."""
    b_room = tl.where(b_u < 0, b_x - lo, hi - b_x)
    b_length = tl.abs(b_u) - shrink
    return clamp(b_length, tl.zeros_like(b_length), b_room), b_room


@triton.jit
def l1_length(
    p_adv, p_grad, p_x, size, threshold, step, descends, shrink, lo, hi,
    ACC: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """|d|_1 for a shrink, and how many elements still slide with it."""
    b_total, b_sliding = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int64)
    for start in range(0, size, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o < size
        b_adv, b_grad, b_x = load(p_adv, o, m, ACC), load(p_grad, o, m, ACC), load(p_x, o, m, ACC)
        b_u = l1_moved(b_adv, b_grad, b_x, threshold, step, descends, lo, hi, ACC, BITS)
        b_length, b_room = l1_lengths(b_u, b_x, shrink, lo, hi)
        b_total += tl.where(m, b_length, 0.0).to(tl.float64)
        b_sliding += (m & (b_length > 0) & (b_length < b_room)).to(tl.int64)
    return tl.sum(b_total, 0), tl.sum(b_sliding, 0)


@triton.jit(do_not_specialize=["moved"])
def l1_step_kernel(
    p_out, p_adv, p_grad, p_x, p_alphas, p_radii,
    alpha: tl.float64, eps: tl.float64, lo: tl.float64, hi: tl.float64, size, moved: tl.int64,
    ACC: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_sample = tl.program_id(0).to(tl.int64)
    alpha, eps = scalar(alpha, p_alphas, i_sample, tl.float64), scalar(eps, p_radii, i_sample, tl.float64)
    lo, hi = tl.full((), lo, ACC), tl.full((), hi, ACC)
    p_out, p_adv = p_out + i_sample * size, p_adv + i_sample * size
    p_grad, p_x = p_grad + i_sample * size, p_x + i_sample * size
    size = tl.full((), size, tl.int64)  # loops count in 64 bits
    descends = alpha < 0

    # 1. Survey: how many elements can move, the largest pull, the farthest that any is from x.
    b_movers, b_top, b_far = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], BITS), tl.zeros([BLOCK], ACC)
    for start in range(0, size, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o < size
        b_adv, b_x = load(p_adv, o, m, ACC), load(p_x, o, m, ACC)
        b_pull = l1_pull(b_adv, load(p_grad, o, m, ACC), descends, lo, hi, BITS)
        b_movers += (b_pull > 0).to(tl.int64)
        b_top = tl.maximum(b_top, b_pull)
        b_far = tl.maximum(b_far, tl.abs(b_adv - b_x))

    # 2. Threshold, by bisection on the bits: at least `moved` elements pull >= low, fewer pull >= high. Done at the first low
    #    that exactly `moved` reach, or when no number is between, and ties move too. No pull at all never qualifies.
    movers = tl.sum(b_movers, 0)
    low, high = tl.full((), 1, BITS), tl.max(b_top, 0) + 1
    while (movers > moved) & (high - low > 1):
        middle = low + (high - low) // 2
        count = l1_count(p_adv, p_grad, size, middle, descends, lo, hi, ACC, BITS, BLOCK)
        enough = count >= moved
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        movers = tl.where(enough, count, movers)
    step = (alpha / tl.maximum(movers, 1).to(tl.float64)).to(ACC)

    # 3. Shrink: |d|_1 falls piecewise linearly from more than eps at `near` to at most eps at `far`. Newton's step is exact on
    #    the last piece; where it leaves the bracket, halve it. Where it rounds back to where it started, the next number above
    #    is tried (from near) or the search is over (from far). The limit has never been met; far is in the ball at any time.
    at, near = tl.full((), 0.0, ACC), tl.full((), 0.0, ACC)
    far = tl.max(b_far, 0) + tl.abs(step)
    total, sliding = l1_length(p_adv, p_grad, p_x, size, low, step, descends, at, lo, hi, ACC, BITS, BLOCK)
    outside = total > eps
    searching, passes = outside, 0
    while searching:
        newton = (at.to(tl.float64) + (total - eps) / tl.maximum(sliding, 1).to(tl.float64)).to(ACC)
        settled = (at == far) & (newton == far)
        newton = tl.where(newton == near, (near.to(BITS, bitcast=True) + 1).to(ACC, bitcast=True), newton)
        use_newton = (sliding > 0) & (newton > near) & (newton < far)
        at = tl.where(use_newton, newton, near + (far - near) / 2)
        searching = (at > near) & (at < far) & ~settled & (passes < 128)
        if searching:
            total, sliding = l1_length(p_adv, p_grad, p_x, size, low, step, descends, at, lo, hi, ACC, BITS, BLOCK)
            near, far = tl.where(total > eps, at, near), tl.where(total > eps, far, at)
        passes += 1
    shrink = tl.where(outside, far, tl.zeros_like(far))

    # 4. Write.
    for start in range(0, size, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o < size
        b_adv, b_grad, b_x = load(p_adv, o, m, ACC), load(p_grad, o, m, ACC), load(p_x, o, m, ACC)
        b_u = l1_moved(b_adv, b_grad, b_x, low, step, descends, lo, hi, ACC, BITS)
        b_length, _ = l1_lengths(b_u, b_x, shrink, lo, hi)
        tl.store(p_out + o, clamp(b_x + sign(b_u, ACC) * b_length, lo, hi).to(p_out.dtype.element_ty), mask=m)


# ----------------------------------------------------------------------------------------------------------------- launches

STREAM_BLOCK = 1024  # linf, apgd, start: 8 elements a thread, two 16-byte loads of each fp32 tensor in flight
L2_ON_CHIP_KIB = 32  # of each of adv, grad and x; twice that spills registers
SUM_BLOCK, SUM_PARTS = (
    2048,
    256,
)  # of a large sample, up to 256 parts: few enough to be added up again by every program
L1_BLOCK_KIB = 16


def _step(
    launch: Callable[..., None], out: Tensor, adv: Tensor, grad: Tensor, x: Tensor, alpha: Scalar, eps: Scalar, *rest: float
) -> None:
    """What every step needs around its launch; arguments as in fastadv.ops, the result into ``out``."""
    target, adv, grad, x = alike(out, adv, grad, x)
    alpha, alphas = float64_per_sample(alpha, adv)
    eps, radii = float64_per_sample(eps, adv)
    lo, hi, *extra = rest
    if adv.numel():
        with device_of(adv):
            launch(target, adv, grad, x, alphas, radii, alpha, eps, lo, hi, *extra)
    if target is not out:
        out.copy_(target)


def sum_parts(size: int) -> tuple[int, int]:
    """In how many parts a sample is summed, and how many elements a part has."""
    span = triton.cdiv(triton.cdiv(size, SUM_BLOCK), SUM_PARTS) * SUM_BLOCK
    return triton.cdiv(size, span), span


def _launch_linf(target: Tensor, adv: Tensor, grad: Tensor, x: Tensor, alphas: Any, radii: Any, *scalars: float) -> None:
    row_size = adv.numel() if alphas is None and radii is None else adv.numel() // adv.shape[0]
    linf_step_kernel[(adv.numel() // row_size * triton.cdiv(row_size, STREAM_BLOCK),)](
        target, adv, grad, x, alphas, radii, *scalars, row_size,
        ACC=arithmetic(adv), BLOCK=STREAM_BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _launch_l2(target: Tensor, adv: Tensor, grad: Tensor, x: Tensor, *scalars: Any) -> None:
    samples, size, acc = adv.shape[0], adv.numel() // adv.shape[0], arithmetic(adv)
    if size <= on_chip(adv, L2_ON_CHIP_KIB):
        block = max(128, triton.next_power_of_2(size))
        l2_step_kernel[(samples,)](
            target, adv, grad, x, *scalars, size, ACC=acc, BLOCK=block, num_warps=warps(block, 16), enable_fp_fusion=False,
        )  # fmt: skip
        return
    parts, span = sum_parts(size)
    sums = torch.empty(samples, 3, parts, dtype=torch.float64, device=adv.device)
    l2_sums_kernel[(samples * parts,)](
        sums, adv, grad, x, size, span, PARTS=parts, ACC=acc, BLOCK=SUM_BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    l2_apply_kernel[(samples * triton.cdiv(size, SUM_BLOCK),)](
        target, adv, grad, x, *scalars, sums, size, PARTS=parts,
        ACC=acc, BLOCK=SUM_BLOCK, BLOCK_PARTS=triton.next_power_of_2(parts), num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def _launch_l1(target: Tensor, adv: Tensor, grad: Tensor, x: Tensor, *scalars_and_fraction: Any) -> None:
    *scalars, fraction = scalars_and_fraction
    size = adv.numel() // adv.shape[0]
    moved = min(size, max(1, int(fraction * size)))
    block = min(on_chip(adv, L1_BLOCK_KIB), max(128, triton.next_power_of_2(size)))
    l1_step_kernel[(adv.shape[0],)](
        target, adv, grad, x, *scalars, size, moved,
        ACC=arithmetic(adv), BITS=tl.int64 if adv.dtype == torch.float64 else tl.int32,
        BLOCK=block, num_warps=warps(block, 8), enable_fp_fusion=False,
    )  # fmt: skip


linf_step = partial(_step, _launch_linf)
l2_step = partial(_step, _launch_l2)
l1_step = partial(_step, _launch_l1)


def apgd_step(
    adv: Tensor, old: Tensor, best: Tensor, best_grad: Tensor, image: Tensor, grad: Tensor, x: Tensor,
    alpha: Scalar, momentum: Scalar, eps: Scalar, lo: float, hi: float, better: Tensor, taken: Tensor,
) -> None:  # fmt: skip
    """Auto-PGD's move, in place; arguments as :func:`fastadv.ops.apgd_step_`."""
    _, *memory = alike(adv, adv, old, best, best_grad, image, grad, x)
    values, tensors = zip(*(float64_per_sample(value, adv) for value in (alpha, momentum, eps)), strict=True)
    flags = (flag.contiguous().view(torch.uint8) for flag in (better, taken))
    if adv.numel():
        size = adv.numel() // len(adv)
        with device_of(adv):
            apgd_step_kernel[(len(adv) * triton.cdiv(size, STREAM_BLOCK),)](
                *memory, *flags, *tensors, *values, lo, hi, size,
                ACC=arithmetic(adv), BLOCK=STREAM_BLOCK, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    copy_back((adv, old, best, best_grad, image), memory[:5])


def momentum_step(
    adv: Tensor, velocity: Tensor, grad: Tensor, x: Tensor, alpha: Scalar, decay: Scalar, eps: Scalar, lo: float, hi: float
) -> None:
    """MI-FGSM's step, in place; arguments as :func:`fastadv.ops.momentum_step_`."""
    _, *memory = alike(adv, adv, velocity, grad, x)
    values, tensors = zip(*(float64_per_sample(value, adv) for value in (alpha, decay, eps)), strict=True)
    if adv.numel():
        samples, size = len(adv), adv.numel() // len(adv)
        parts, span = sum_parts(size)
        sums = torch.empty(samples, parts, dtype=torch.float64, device=adv.device)
        with device_of(adv):
            momentum_sums_kernel[(samples * parts,)](
                sums, memory[2], size, span,
                PARTS=parts, ACC=arithmetic(adv), BLOCK=SUM_BLOCK, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
            momentum_apply_kernel[(samples * triton.cdiv(size, SUM_BLOCK),)](
                *memory, *tensors, *values, lo, hi, sums, size, PARTS=parts,
                ACC=arithmetic(adv), BLOCK=SUM_BLOCK, BLOCK_PARTS=triton.next_power_of_2(parts), num_warps=8,
                enable_fp_fusion=False,
            )  # fmt: skip
    copy_back((adv, velocity), memory[:2])


def linf_start(out: Tensor, x: Tensor, eps: Scalar, lo: float, hi: float, seed: int, samples: Tensor | None, step: int) -> None:
    """Writes a random start into ``out``; arguments as :func:`fastadv.ops.linf_start`."""
    _start(linf_start_kernel, out, x, eps, samples, (lo, hi, seed, step))


def normal_start(out: Tensor, x: Tensor, std: Scalar, seed: int, samples: Tensor | None, step: int, copies: int) -> None:
    """Writes noisy copies into ``out``; arguments as :func:`fastadv.ops.normal_start`."""
    _start(normal_start_kernel, out, x, std, samples, (seed, step, copies))


def _start(kernel: Any, out: Tensor, x: Tensor, size_of_noise: Scalar, samples: Tensor | None, more: tuple[Any, ...]) -> None:
    target, x = alike(out, x)
    value, values = float64_per_sample(size_of_noise, x)
    if out.numel():
        size = x.numel() // x.shape[0]
        with device_of(x):
            kernel[(out.shape[0] * triton.cdiv(size, STREAM_BLOCK),)](
                target, x, values, None if samples is None else samples.contiguous(), value, *more, size,
                ACC=arithmetic(x), BLOCK=STREAM_BLOCK, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    if target is not out:
        out.copy_(target)
