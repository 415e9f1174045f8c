"""Per-sample losses with their gradients in Triton: one kernel reads the logits once and writes loss and dlogits.

softmax  ce (hard and soft labels) and log_odds        reads z (and soft labels), writes dlogits: 8 (12) bytes per fp32 logit
ranks    margin, dlr, dlr_targeted                     likewise 8 bytes
kl, se   with the gradient of the reference on demand  reads both, writes one or two gradients: 12 or 16 bytes

A program holds a tile [ROWS, BLOCK]: several short rows (one row of 10 classes would leave most threads idle), or one long
one. BLOCK covers a row of up to 16 KiB, and then all loops over chunks have one trip: the compiler drops them, finds that
every pass loads the same tile, and keeps it in registers, which is why only the last pass stores anything. Longer rows are
streamed chunk by chunk: once for an online softmax (or the ranks), then once or twice for what builds on it. The number of
classes is a compile-time constant: rows of 1000 are then known to be aligned to 16 bytes, and a model has one head.

A label outside [0, C) cannot be reported from a kernel without stopping the stream: such a row becomes NaN, loss and
gradient, and nothing outside of it is read or written. Names as in step.py; every per-row value is [ROWS, 1].
"""

from __future__ import annotations

from functools import partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastadv.memory import device_of

from .common import arithmetic, on_chip, warps

# ----------------------------------------------------------------------------------------------------------- rows and tiles


@triton.jit
def program_rows(rows, ROWS: tl.constexpr):
    """The rows of this program, 64-bit. Surplus ones repeat the last row and write the same values again: no masks for rows."""
    return tl.minimum(tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], rows - 1)


@triton.jit
def load_chunk(p_row, i_chunk, fill, CLASSES: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Class indices [1, BLOCK] of a chunk, and its values [ROWS, BLOCK] with `fill` past the row's end."""
    o = i_chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
    return o, tl.load(p_row + o, mask=o < CLASSES, other=fill).to(ACC)


@triton.jit
def store_chunk(p_row, o, b, CLASSES: tl.constexpr):
    tl.store(p_row + o, b.to(p_row.dtype.element_ty), mask=o < CLASSES)


@triton.jit
def load_class(p_labels, i_row, CLASSES: tl.constexpr):
    """Each row's label, and whether it is a class; one that is not becomes 0."""
    y = tl.load(p_labels + i_row).to(tl.int64)
    valid = (y >= 0) & (y < CLASSES)
    return tl.where(valid, y, 0).to(tl.int32), valid


@triton.jit
def sum_row(b):
    return tl.sum(b, 1, keep_dims=True)


@triton.jit
def online_softmax(top, total, b_z):
    """The largest logit, and the sum of exp(z - top), with one more chunk of the row taken in."""
    above = tl.maximum(top, tl.max(b_z, 1, keep_dims=True))
    base = tl.where(above == float("-inf"), 0.0, above)  # nothing but -inf so far, and -inf - -inf is NaN
    return above, total * tl.exp(top - base) + sum_row(tl.exp(b_z - base))


@triton.jit
def softmax_row(p_row, skip, CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """top and total of whole rows of logits; the class `skip` (-1: none) takes no part."""
    top, total = tl.full([ROWS, 1], float("-inf"), ACC), tl.zeros([ROWS, 1], ACC)
    for i_chunk in range(tl.cdiv(CLASSES, BLOCK)):
        o, b_z = load_chunk(p_row, i_chunk, float("-inf"), CLASSES, BLOCK, ACC)
        top, total = online_softmax(top, total, tl.where(o == skip, float("-inf"), b_z))
    return top, total


# ---------------------------------------------------------------------------------------------------------------- softmax
# z: logits; e = exp(z - top); p = e / total.


@triton.jit(do_not_specialize=["rows"])
def label_kernel(
    p_loss, p_grad, p_z, p_labels, rows,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, ODDS: tl.constexpr,
):  # fmt: skip
    """Cross-entropy log(total) - (z_y - top), gradient p - 1_y; log_odds (ODDS) takes the softmax over the others."""
    i_row = program_rows(rows, ROWS)
    p_z, p_grad = p_z + i_row * CLASSES, p_grad + i_row * CLASSES
    y, valid = load_class(p_labels, i_row, CLASSES)
    skip = y if ODDS else -1
    top, total = softmax_row(p_z, skip, CLASSES, ROWS, BLOCK, ACC)
    z_y = tl.where(valid, tl.load(p_z + y).to(ACC), float("nan"))
    scale = tl.where(valid, 1.0 / total, float("nan"))
    for i_chunk in range(tl.cdiv(CLASSES, BLOCK)):
        o, b_z = load_chunk(p_z, i_chunk, float("-inf"), CLASSES, BLOCK, ACC)
        b_e = tl.exp(tl.where(o == skip, float("-inf"), b_z) - top)
        store_chunk(p_grad, o, b_e * scale - (o == y).to(ACC), CLASSES)
    tl.store(p_loss + i_row, tl.log(total) + (top - z_y))


@triton.jit(do_not_specialize=["rows"])
def soft_label_kernel(
    p_loss, p_grad, p_z, p_targets, rows,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Cross-entropy with targets t of mass sum(t): log(total) mass - <t, z - top>, gradient p mass - t."""
    i_row = program_rows(rows, ROWS)
    p_z, p_grad, p_targets = p_z + i_row * CLASSES, p_grad + i_row * CLASSES, p_targets + i_row * CLASSES
    top, total = softmax_row(p_z, -1, CLASSES, ROWS, BLOCK, ACC)
    mass, dot = tl.zeros([ROWS, 1], ACC), tl.zeros([ROWS, 1], ACC)
    for i_chunk in range(tl.cdiv(CLASSES, BLOCK)):
        o, b_t = load_chunk(p_targets, i_chunk, 0.0, CLASSES, BLOCK, ACC)
        o, b_z = load_chunk(p_z, i_chunk, float("-inf"), CLASSES, BLOCK, ACC)
        mass += sum_row(b_t)
        dot += sum_row(tl.where(b_t == 0, 0.0, b_t * (b_z - top)))  # a class without weight may have logit -inf
    scale = mass / total
    for i_chunk in range(tl.cdiv(CLASSES, BLOCK)):
        o, b_t = load_chunk(p_targets, i_chunk, 0.0, CLASSES, BLOCK, ACC)
        o, b_z = load_chunk(p_z, i_chunk, float("-inf"), CLASSES, BLOCK, ACC)
        store_chunk(p_grad, o, tl.exp(b_z - top) * scale - b_t, CLASSES)
    tl.store(p_loss + i_row, tl.log(total) * mass - dot)


# ------------------------------------------------------------------------------------------------------------------ ranks


@triton.jit
def insert(v, k, v_rank, k_rank):
    """Of two (logit, class) the one that ranks first, then the other: the larger logit, of equals the first class."""
    first = (v > v_rank) | ((v == v_rank) & (k < k_rank))
    return tl.where(first, v, v_rank), tl.where(first, k, k_rank), tl.where(first, v_rank, v), tl.where(first, k_rank, k)


@triton.jit
def largest(p_row, RANKS: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The classes of the four largest logits, of which RANKS <= C are wanted and exist; in order, of equals the first class.

    Each chunk gives up its own largest one by one; each sinks in the sorted list to where it belongs. NaN ranks with +inf.
    """
    v_0, k_0 = tl.full([ROWS, 1], float("-inf"), ACC), tl.full([ROWS, 1], CLASSES, tl.int32)
    v_1, k_1, v_2, k_2, v_3, k_3 = v_0, k_0, v_0, k_0, v_0, k_0
    for i_chunk in range(tl.cdiv(CLASSES, BLOCK)):
        o, b_z = load_chunk(p_row, i_chunk, float("-inf"), CLASSES, BLOCK, ACC)
        b_z = tl.where(b_z == b_z, b_z, float("inf"))
        m = (o < CLASSES) & (b_z == b_z)  # what is still there; the second term broadcasts
        for _ in tl.static_range(RANKS):
            v = tl.max(tl.where(m, b_z, float("-inf")), 1, keep_dims=True)
            k = tl.min(tl.where(m & (b_z == v), o, CLASSES), 1, keep_dims=True)
            m = m & (o != k)
            v_0, k_0, v, k = insert(v, k, v_0, k_0)
            v_1, k_1, v, k = insert(v, k, v_1, k_1)
            v_2, k_2, v, k = insert(v, k, v_2, k_2)
            v_3, k_3, v, k = insert(v, k, v_3, k_3)
    return k_0, k_1, k_2, k_3


@triton.jit(do_not_specialize=["rows"])
def ratio_kernel(
    p_loss, p_grad, p_z, p_labels, p_targets, rows,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """rise = z_rival - z_y, the rival being the target, or the largest other class; from 3 RANKS on over the spread
    z_(1) - (z_(3) + z_(RANKS))/2 + 1e-12. The gradient is up to five spikes.
    """
    i_row = program_rows(rows, ROWS)
    p_z, p_grad = p_z + i_row * CLASSES, p_grad + i_row * CLASSES
    y, valid = load_class(p_labels, i_row, CLASSES)
    first, second, third, last = largest(p_z, RANKS, CLASSES, ROWS, BLOCK, ACC)
    if RANKS == 3:
        last = third
    if p_targets is not None:
        rival, valid_target = load_class(p_targets, i_row, CLASSES)
        valid = valid & valid_target
    else:
        rival = tl.where(first == y, second, first)
    loss = tl.load(p_z + rival).to(ACC) - tl.load(p_z + y).to(ACC)
    up, down = tl.full([ROWS, 1], 1.0, ACC), tl.zeros([ROWS, 1], ACC)  # d loss / d rise, d loss / d spread
    if RANKS >= 3:
        z_third, z_last = tl.load(p_z + third).to(ACC), tl.load(p_z + last).to(ACC)
        spread = tl.load(p_z + first).to(ACC) - (z_third + z_last) / 2 + 1e-12
        loss, up = loss / spread, 1.0 / spread
        down = -loss / spread
    tl.store(p_loss + i_row, tl.where(valid, loss, float("nan")))
    up = tl.where(valid, up, float("nan"))
    for i_chunk in range(tl.cdiv(CLASSES, BLOCK)):
        o = i_chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
        b = up * ((o == rival).to(ACC) - (o == y).to(ACC))
        if RANKS >= 3:
            b += down * ((o == first).to(ACC) - ((o == third).to(ACC) + (o == last).to(ACC)) / 2)
        store_chunk(p_grad, o, b, CLASSES)


# ------------------------------------------------------------------------------------------------------------ divergences
# p: softmax of the reference's logits, q: of the logits.


@triton.jit
def softmax_rows(p_z, p_z_ref, CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    top_q, total_q = softmax_row(p_z, -1, CLASSES, ROWS, BLOCK, ACC)
    top_p, total_p = softmax_row(p_z_ref, -1, CLASSES, ROWS, BLOCK, ACC)
    return top_q, total_q, top_p, total_p


@triton.jit
def load_pair(
    p_z, p_z_ref, top_q, total_q, top_p, total_p, i_chunk, CLASSES: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Class indices of a chunk, its q and p, and the logits less their largest that these come from."""
    o, b_z = load_chunk(p_z, i_chunk, float("-inf"), CLASSES, BLOCK, ACC)
    o, b_z_ref = load_chunk(p_z_ref, i_chunk, float("-inf"), CLASSES, BLOCK, ACC)
    b_z, b_z_ref = b_z - top_q, b_z_ref - top_p
    return o, tl.exp(b_z) / total_q, tl.exp(b_z_ref) / total_p, b_z, b_z_ref


@triton.jit(do_not_specialize=["rows"])
def kl_kernel(
    p_loss, p_grad, p_grad_ref, p_z, p_z_ref, rows,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """KL = <p, log p - log q>, gradients q - p and, where wanted, p ((log p - log q) - KL). Where p is 0 the terms are 0."""
    i_row = program_rows(rows, ROWS)
    p_z, p_z_ref, p_grad = p_z + i_row * CLASSES, p_z_ref + i_row * CLASSES, p_grad + i_row * CLASSES
    top_q, total_q, top_p, total_p = softmax_rows(p_z, p_z_ref, CLASSES, ROWS, BLOCK, ACC)
    log_sums = tl.log(total_p) - tl.log(total_q)
    kl = tl.zeros([ROWS, 1], ACC)
    for i_chunk in range(tl.cdiv(CLASSES, BLOCK)):
        o, b_q, b_p, b_z, b_z_ref = load_pair(p_z, p_z_ref, top_q, total_q, top_p, total_p, i_chunk, CLASSES, BLOCK, ACC)
        kl += sum_row(tl.where(b_p == 0, 0.0, b_p * (b_z_ref - b_z - log_sums)))
        if p_grad_ref is None:
            store_chunk(p_grad, o, b_q - b_p, CLASSES)
    if p_grad_ref is not None:
        p_grad_ref += i_row * CLASSES
        for i_chunk in range(tl.cdiv(CLASSES, BLOCK)):
            o, b_q, b_p, b_z, b_z_ref = load_pair(p_z, p_z_ref, top_q, total_q, top_p, total_p, i_chunk, CLASSES, BLOCK, ACC)
            store_chunk(p_grad, o, b_q - b_p, CLASSES)
            store_chunk(p_grad_ref, o, tl.where(b_p == 0, 0.0, b_p * (b_z_ref - b_z - log_sums - kl)), CLASSES)
    tl.store(p_loss + i_row, kl)


@triton.jit(do_not_specialize=["rows"])
def se_kernel(
    p_loss, p_grad, p_grad_ref, p_z, p_z_ref, rows,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """|a|^2 with a = q - p, gradients 2q (a - <q,a>) and, where wanted, -2p (a - <p,a>)."""
    i_row = program_rows(rows, ROWS)
    p_z, p_z_ref, p_grad = p_z + i_row * CLASSES, p_z_ref + i_row * CLASSES, p_grad + i_row * CLASSES
    top_q, total_q, top_p, total_p = softmax_rows(p_z, p_z_ref, CLASSES, ROWS, BLOCK, ACC)
    square, q_gap, p_gap = tl.zeros([ROWS, 1], ACC), tl.zeros([ROWS, 1], ACC), tl.zeros([ROWS, 1], ACC)
    for i_chunk in range(tl.cdiv(CLASSES, BLOCK)):
        _, b_q, b_p, _, _ = load_pair(p_z, p_z_ref, top_q, total_q, top_p, total_p, i_chunk, CLASSES, BLOCK, ACC)
        b_gap = b_q - b_p
        square, q_gap, p_gap = square + sum_row(b_gap * b_gap), q_gap + sum_row(b_q * b_gap), p_gap + sum_row(b_p * b_gap)
    for i_chunk in range(tl.cdiv(CLASSES, BLOCK)):
        o, b_q, b_p, _, _ = load_pair(p_z, p_z_ref, top_q, total_q, top_p, total_p, i_chunk, CLASSES, BLOCK, ACC)
        b_gap = b_q - b_p
        store_chunk(p_grad, o, 2 * b_q * (b_gap - q_gap), CLASSES)
        if p_grad_ref is not None:
            store_chunk(p_grad_ref + i_row * CLASSES, o, -2 * b_p * (b_gap - p_gap), CLASSES)
    tl.store(p_loss + i_row, square)


# --------------------------------------------------------------------------------------------------------------- launches

ROW_KIB = 16  # the longest row that stays on chip; with twice that kl spills registers
TILE = 512  # elements of a tile of short rows


def tile(logits: Tensor) -> dict[str, Any]:
    """The compile-time constants and the number of warps for such logits."""
    classes = logits.shape[1]
    block = min(triton.next_power_of_2(classes), on_chip(logits, ROW_KIB))
    rows = max(1, TILE // block)
    return {
        "CLASSES": classes, "BLOCK": block, "ROWS": rows, "ACC": arithmetic(logits),
        "num_warps": warps(rows * block, 8), "enable_fp_fusion": False,
    }  # fmt: skip


def _launch(kernel: Any, loss: Tensor, logits: Tensor, *pointers: Tensor | None, **constants: Any) -> None:
    rows, constants = logits.shape[0], {**tile(logits), **constants}
    if rows:
        with device_of(logits):
            kernel[(triton.cdiv(rows, constants["ROWS"]),)](loss, *pointers, rows, **constants)


def ce(loss: Tensor, grad: Tensor, logits: Tensor, *, y: Tensor) -> None:
    if y.is_floating_point():
        _launch(soft_label_kernel, loss, logits, grad, logits.contiguous(), y.contiguous())
    else:
        _launch(label_kernel, loss, logits, grad, logits.contiguous(), y.contiguous(), ODDS=False)


def log_odds(loss: Tensor, grad: Tensor, logits: Tensor, *, y: Tensor) -> None:
    _launch(label_kernel, loss, logits, grad, logits.contiguous(), y.contiguous(), ODDS=True)


def margin(loss: Tensor, grad: Tensor, logits: Tensor, *, y: Tensor) -> None:
    _launch(ratio_kernel, loss, logits, grad, logits.contiguous(), y.contiguous(), None, RANKS=2)


def dlr(loss: Tensor, grad: Tensor, logits: Tensor, *, y: Tensor) -> None:
    ranks = 3 if logits.shape[1] >= 3 else 2  # the margin
    _launch(ratio_kernel, loss, logits, grad, logits.contiguous(), y.contiguous(), None, RANKS=ranks)


def dlr_targeted(loss: Tensor, grad: Tensor, logits: Tensor, *, y: Tensor, target: Tensor) -> None:
    ranks = 4 if logits.shape[1] >= 4 else 0  # the rise alone
    _launch(ratio_kernel, loss, logits, grad, logits.contiguous(), y.contiguous(), target.contiguous(), RANKS=ranks)


def _divergence(
    kernel: Any, loss: Tensor, grad: Tensor, logits: Tensor, *, logits_ref: Tensor, grad_ref: Tensor | None
) -> None:
    _launch(kernel, loss, logits, grad, grad_ref, logits.contiguous(), logits_ref.contiguous())


kl = partial(_divergence, kl_kernel)
se = partial(_divergence, se_kernel)
