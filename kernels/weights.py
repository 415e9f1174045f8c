"""Adversarial weight perturbation in Triton: all tensors of a model in two launches for each pair of storage types.

sums      8 bytes per fp32 element of weights that are their own origins, 12 with the backup or with other origins
perturb   12 bytes, 16 with other origins; every program first adds its tensor's partial sums up, in one order, hence all alike

A table in device memory holds the addresses of the tensors; a program finds its own by the number of its first program.
Pointers from a table have no known alignment: a hint after the cast says what the launcher found, and chunks that are full are
moved without a mask, or else loads would be scalar. Names as in step.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadv.memory import Row, copy_back, device_of, rows_alike

from .common import arithmetic
from .step import l2_coefficients, l2_move, l2_products

Tensors = Sequence[Tensor]

# The columns of a table: addresses, elements, programs, the number of the first one, the row of the sums.
W, G, ORIGIN, SIZE, PROGRAMS, FIRST, ROW, COLUMNS = (tl.constexpr(i) for i in range(8))


@triton.jit
def pointer(p_cell, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    return tl.multiple_of(tl.load(p_cell).to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def find(p_table, tensors, WEIGHT: tl.constexpr, GRAD: tl.constexpr, ALIGNMENT: tl.constexpr):
    """This program's tensor: its three pointers, its size, its programs and which of them this is, its row of the sums."""
    i, first, behind = tl.program_id(0), 0, tensors
    while behind - first > 1:
        middle = (first + behind) // 2
        mine = tl.load(p_table + middle * COLUMNS + FIRST) <= i
        first, behind = tl.where(mine, middle, first), tl.where(mine, behind, middle)
    p_row = p_table + first * COLUMNS
    p_w, p_g = pointer(p_row + W, WEIGHT, ALIGNMENT), pointer(p_row + G, GRAD, ALIGNMENT)
    p_origin = pointer(p_row + ORIGIN, WEIGHT, ALIGNMENT)
    size, programs, i_part = tl.load(p_row + SIZE), tl.load(p_row + PROGRAMS), i - tl.load(p_row + FIRST)
    return p_w, p_g, p_origin, size, programs, i_part, tl.load(p_row + ROW)


@triton.jit
def load(p, o, size, full):
    b = tl.load(p + o) if full else tl.load(p + o, mask=o < size, other=0.0)
    return b


@triton.jit
def store(p, o, size, full, b):
    if full:
        tl.store(p + o, b)
    else:
        tl.store(p + o, b, mask=o < size)


@triton.jit(do_not_specialize=["tensors", "slices"])
def weight_sums_kernel(
    p_sums, p_table, tensors, slices,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, ALIGNMENT: tl.constexpr, AT_ORIGIN: tl.constexpr, RECORD: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLICES: tl.constexpr,
):  # fmt: skip
    """sums[row, i_part]: |o|^2, <d,d>, <d,g>, <g,g> over every PROGRAMS-th chunk of a tensor; the last also fills up zeros."""
    p_w, p_g, p_origin, size, programs, i_part, row = find(p_table, tensors, WEIGHT, GRAD, ALIGNMENT)
    b_oo, b_gg = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    b_dd, b_dg = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(i_part * BLOCK, size, programs * BLOCK):
        o, full = start + tl.arange(0, BLOCK), start + BLOCK <= size
        b_w, b_g = load(p_w, o, size, full), load(p_g, o, size, full).to(ACC)
        if RECORD:
            store(p_origin, o, size, full, b_w)
        if AT_ORIGIN:  # d = 0
            b_o, b_g = b_w.to(tl.float64), b_g.to(tl.float64)
            b_gg += b_g * b_g
        else:
            b_o = load(p_origin, o, size, full).to(ACC)
            b_1, b_2, b_3 = l2_products(b_w.to(ACC), b_g, b_o)
            b_dd, b_dg, b_gg = b_dd + b_1, b_dg + b_2, b_gg + b_3
            b_o = b_o.to(tl.float64)
        b_oo += b_o * b_o
    p_sums += row * slices * 4
    tl.store(p_sums + i_part * 4, tl.sum(b_oo, 0))
    tl.store(p_sums + i_part * 4 + 1, tl.sum(b_dd, 0))
    tl.store(p_sums + i_part * 4 + 2, tl.sum(b_dg, 0))
    tl.store(p_sums + i_part * 4 + 3, tl.sum(b_gg, 0))
    if i_part == programs - 1:
        o = tl.arange(0, BLOCK_SLICES * 4)
        tl.store(p_sums + o, tl.zeros([BLOCK_SLICES * 4], tl.float64), mask=(o >= programs * 4) & (o < slices * 4))


@triton.jit(do_not_specialize=["tensors", "slices"])
def perturb_kernel(
    p_sums, p_table, tensors, slices, gamma: tl.float64, alpha: tl.float64,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, ALIGNMENT: tl.constexpr, AT_ORIGIN: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLICES: tl.constexpr,
):  # fmt: skip
    p_w, p_g, p_origin, size, programs, i_part, row = find(p_table, tensors, WEIGHT, GRAD, ALIGNMENT)
    o_slice = tl.arange(0, BLOCK_SLICES)
    m_slice = o_slice < slices
    p_sums += (row * slices + o_slice) * 4
    oo, dd = tl.sum(tl.load(p_sums, mask=m_slice, other=0.0), 0), tl.sum(tl.load(p_sums + 1, mask=m_slice, other=0.0), 0)
    dg, gg = tl.sum(tl.load(p_sums + 2, mask=m_slice, other=0.0), 0), tl.sum(tl.load(p_sums + 3, mask=m_slice, other=0.0), 0)
    length = tl.sqrt(oo)
    keep, move, unit = l2_coefficients(dd, dg, gg, alpha * length, gamma * length, ACC)
    for start in range(i_part * BLOCK, size, programs * BLOCK):
        o, full = start + tl.arange(0, BLOCK), start + BLOCK <= size
        b_w, b_g = load(p_w, o, size, full).to(ACC), load(p_g, o, size, full).to(ACC)
        b_o = b_w if AT_ORIGIN else load(p_origin, o, size, full).to(ACC)
        b = l2_move(b_w, b_g, b_o, keep, move, unit, float("-inf"), float("inf"))
        store(p_w, o, size, full, b.to(WEIGHT))


# ----------------------------------------------------------------------------------------------------------------- launches

BLOCK = 2048
CHUNKS = 4  # of a program, where a tensor is not too large for its slices


def _tables(rows: list[Row], most_programs: int, record: bool) -> Iterator[tuple[Tensor, int, int, dict[str, Any]]]:
    """Table, tensors, programs and constants of each launch: one for all tensors that these constants fit."""
    launches: dict[tuple[Any, ...], list[int]] = {}
    for i, row in enumerate(rows):
        w, g, origin = row
        aligned = all(t.data_ptr() % 16 == 0 for t in row)
        launches.setdefault((w.dtype, g.dtype, aligned, record or w.data_ptr() == origin.data_ptr()), []).append(i)
    for (dtype, grad_dtype, aligned, at_origin), members in launches.items():
        cells, first = [], 0
        for i in members:
            programs = max(1, min(triton.cdiv(rows[i][0].numel(), BLOCK * CHUNKS), most_programs))
            cells += [*(t.data_ptr() for t in rows[i]), rows[i][0].numel(), programs, first, i]
            first += programs
        # The numbers travel as arguments of kernels: a copy from the host would wait, or be gone when a graph is replayed.
        table = torch.zeros(len(cells), dtype=torch.int64, device=rows[0][0].device)
        torch._foreach_add_(list(table.unbind()), cells)
        yield table, len(members), first, {
            "WEIGHT": _TYPES[dtype], "GRAD": _TYPES[grad_dtype], "ALIGNMENT": 16 if aligned else 1, "AT_ORIGIN": at_origin,
            "ACC": arithmetic(rows[members[0]][0]), "BLOCK": BLOCK, "num_warps": 8, "enable_fp_fusion": False,
        }  # fmt: skip


_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def weight_sums(sums: Tensor, weights: Tensors, grads: Tensors, origins: Tensors, record: bool) -> None:
    """Writes ``sums`` [K, slices, 4], and ``origins`` where recorded; otherwise as :func:`fastadv.ops.weight_sums`."""
    rows = rows_alike(weights, grads, origins)
    slices = sums.shape[1]
    with device_of(sums):
        for table, tensors, programs, constants in _tables(rows, slices, record):
            weight_sums_kernel[(programs,)](
                sums, table, tensors, slices, **constants, RECORD=record, BLOCK_SLICES=triton.next_power_of_2(slices)
            )
    if record:
        copy_back(origins, (o for _, _, o in rows))


def perturb(weights: Tensors, grads: Tensors, origins: Tensors, sums: Tensor, gamma: float, alpha: float) -> None:
    """Moves ``weights``; arguments as :func:`fastadv.ops.perturb_`."""
    rows = rows_alike(weights, grads, origins)
    slices = sums.shape[1]
    with device_of(sums):
        for table, tensors, programs, constants in _tables(rows, 2**31, record=False):
            perturb_kernel[(programs,)](
                sums, table, tensors, slices, gamma, alpha, **constants, BLOCK_SLICES=triton.next_power_of_2(slices)
            )
    copy_back(weights, (w for w, _, _ in rows))
