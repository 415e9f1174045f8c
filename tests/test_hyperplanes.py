"""The shortest move onto a hyperplane inside the box: every backend against the reference, and that against what it must be."""

from __future__ import annotations

import math

import pytest
import torch
from models import SYNCS, Ops
from table import ROUNDING, SHAPES, STEP_DTYPES, arrange, layouts, name, need_backend
from torch import Tensor
from torch.library import opcheck

import fastadv
from fastadv import ops
from fastadv.reference import step as reference

BACKENDS = ("cpp", "reference")
NORMS = {"linf_hyperplane": math.inf, "l2_hyperplane": 2, "l1_hyperplane": 1}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, w_dtype: torch.dtype | None = None, repeats: int = 2):
    """x in [0, 1] with walls touched, w with zeros and ties, and gaps of which the box reaches about half."""
    g = torch.Generator().manual_seed(sum(shape) + 1)
    points = (repeats * shape[0], *shape[1:])
    x = (1.4 * torch.rand(points, generator=g) - 0.2).clamp(0, 1)
    w = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) > 0.1)
    w = torch.where(torch.rand(shape, generator=g) > 0.7, w.sign(), w)
    gap = 0.3 * math.prod(shape[1:]) * torch.randn(points[0], generator=g, dtype=torch.float64)
    return x.to(dtype), w.to(w_dtype or dtype), gap


def run(op: str, backend: str, *args: object, **kwargs: object) -> Tensor:
    need_backend(op, backend)
    with fastadv.use_backend(backend):
        return getattr(ops, op)(*args, **kwargs)


def lengths(d: Tensor, op: str) -> Tensor:
    return torch.linalg.vector_norm(d.double().flatten(1), NORMS[op], dim=1)


CASES = [
    pytest.param(op, backend, dtypes, shape, layout, id=f"{op}-{backend}-{name(dtypes)}-{shape}-{layout}")
    for op in NORMS
    for backend in BACKENDS
    for dtypes in STEP_DTYPES
    for shape in SHAPES
    for layout in layouts(SHAPES[shape])
    if layout == "contiguous" or dtypes in (STEP_DTYPES[0], STEP_DTYPES[4])
]


@pytest.mark.parametrize(("op", "backend", "dtypes", "shape", "layout"), CASES)
def test_every_backend_computes_the_reference(op, backend, dtypes, shape, layout):
    x, w, gap = inputs(SHAPES[shape], *dtypes)
    x, w = arrange(x, layout), arrange(w, layout)
    result = run(op, backend, x, w, gap, 0.0, 1.0)
    assert result.dtype == x.dtype
    assert result.shape == x.shape
    if layout != "strided":
        assert result.stride() == x.stride()
    expected = getattr(reference, op)(x.double(), w.double(), gap, 0.0, 1.0)
    torch.testing.assert_close(result.double(), expected, rtol=ROUNDING[x.dtype], atol=10 * ROUNDING[x.dtype])


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-math.inf, 1.0), (-math.inf, math.inf)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", NORMS)
def test_the_plane_is_reached_by_the_shortest_way(op, backend, bounds):
    """The best bound that duality gives, max over t of t gap - max over the box of <t w, d> - |d|, is attained."""
    x, w, gap = inputs((50, 30))
    d = run(op, backend, x, w, gap, *bounds)
    assert (x + d >= bounds[0] - 1e-12).all()
    assert (x + d <= bounds[1] + 1e-12).all()
    w = torch.cat([w, w])
    low, high = bounds[0] - x, bounds[1] - x
    farthest = torch.where(w == 0, 0.0, torch.where((w > 0) == (gap > 0)[:, None], high, low))
    reachable = (w * farthest).sum(1).abs() >= gap.abs()
    assert reachable.sum() > 20
    product = (w * d).sum(1)
    torch.testing.assert_close(product[reachable], gap[reachable], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(d[~reachable], farthest[~reachable], rtol=0, atol=0)

    # No other feasible move is shorter: move between pairs of elements along the plane, in both directions.
    generator = torch.Generator().manual_seed(5)
    for _ in range(300):
        i, j = torch.randint(30, (2, len(x)), generator=generator)
        rows = torch.arange(len(x))
        step = 1e-3 * torch.randn(len(x), generator=generator, dtype=torch.float64)
        other = d.clone()
        other[rows, i] += step * w[rows, j]
        other[rows, j] -= step * w[rows, i]
        feasible = reachable & (i != j) & ((other >= low) & (other <= high)).all(1)
        assert (lengths(other, op) >= lengths(d, op) - 1e-12)[feasible].all()


@pytest.mark.parametrize("op", NORMS)
def test_known_moves(op):
    x, w = torch.tensor([[0.5, 0.5, 0.9]]), torch.tensor([[1.0, -2.0, 2.0]])
    expected = {
        "linf_hyperplane": [0.2, -0.2, 0.1],  # 0.2 + 0.4 + 0.2, the last one at its wall
        "l2_hyperplane": [0.12, -0.24, 0.1],
        "l1_hyperplane": [0.0, -0.8 * 0.4, 0.8 * 0.1],  # 0.4 onto the plane or 0.1 to the wall: 0.8 of either way
    }[op]
    for backend in BACKENDS:
        d = run(op, backend, x, w, torch.tensor([0.8]), 0.0, 1.0)
        torch.testing.assert_close(d, torch.tensor([expected]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_rows(op, backend, dtype):
    nan, inf = math.nan, math.inf
    cases = [  # x, w, gap, expected in [0, 1]; None: whatever, but finite
        ([0.5, 0.5], [0.0, 0.0], 1.0, [0.0, 0.0]),  # no plane
        ([0.5, 0.5], [1.0, 2.0], 0.0, [0.0, 0.0]),  # on the plane
        ([1.0, 0.0], [1.0, -2.0], 1.0, [0.0, 0.0]),  # no room
        ([0.5, 0.25], [1.0, -2.0], 9.0, [0.5, -0.25]),  # out of reach: the corner
        ([0.5, 0.25], [1.0, -2.0], -9.0, [-0.5, 0.75]),
        ([0.5, 0.25], [1.0, -2.0], 1.0, [0.5, -0.25]),  # the corner itself
        ([0.5, 0.5], [nan, 1.0], 0.25, [0.0, 0.25]),
        ([0.5, 0.5], [inf, 1.0], 0.25, [0.0, 0.25]),
        ([0.5, 0.5], [-inf, nan], 0.25, [0.0, 0.0]),
        ([0.5, 0.5], [1.0, 1.0], nan, [0.0, 0.0]),
        ([0.5, 0.5], [1.0, 1.0], inf, [0.0, 0.0]),
        ([0.5, 0.5], [0.0, -1e-38], 1e-38, [0.0, -0.5]),
        ([0.5, 0.5], [1e-42, 0.0], 1e-3, [0.5, 0.0]),  # subnormal
        ([0.5, 0.5], [1e-20, 3e38], 1e38, None),
        ([0.5, 0.5], [1e-30, 1e-30], 1.0, [0.5, 0.5]),
    ]
    x, w = (torch.tensor([case[k] for case in cases], dtype=dtype) for k in (0, 1))
    gap = torch.tensor([case[2] for case in cases], dtype=torch.float64)
    d = run(op, backend, x, w, gap, 0.0, 1.0)
    assert d.isfinite().all()
    for case, got in zip(cases, d, strict=True):
        if case[3] is not None:
            torch.testing.assert_close(got, torch.tensor(case[3], dtype=dtype), msg=lambda m, c=case: f"{c}: {m}")
    assert not run(op, backend, x, w, gap).isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", NORMS)
def test_points_share_planes_in_turn(op, backend):
    x, w, gap = inputs((4, 3, 5), repeats=3)
    expected = run(op, backend, x, w.repeat(3, 1, 1), gap, 0.0, 1.0)
    out = torch.full_like(x, 7.0)
    assert run(op, backend, x, w, gap, 0.0, 1.0, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("op", NORMS)
def test_results_do_not_depend_on_the_number_of_threads(op):
    x, w, gap = inputs((7, 3, 129, 131), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 3, 8):
            torch.set_num_threads(n)
            results.append(getattr(ops, op)(x, w, gap, 0.0, 1.0))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("op", NORMS)
def test_many_different_rooms_are_worked_off(op):
    """Rooms over twelve decades: each of Newton's steps meets new walls."""
    room = torch.logspace(-12, 0, 500, dtype=torch.float64)[None]
    w = torch.linspace(0.5, 2, 500, dtype=torch.float64)[None]
    capacity = (room * w).sum()
    for part in (1e-9, 0.01, 0.5, 0.999):
        d = run(op, "cpp", 1 - room, w, (part * capacity)[None], 0.0, 1.0)
        torch.testing.assert_close((d * w).sum(), part * capacity, rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", NORMS)
def test_torch_sees_the_op(op):
    x, w, gap = inputs((3, 4, 5), torch.float32)
    opcheck(getattr(torch.ops.fastadv, op).default, (x, w, gap, 0.0, 1.0))
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w, gap, 0.0, 1.0), getattr(ops, op)(x, w, gap, 0.0, 1.0))
    out = torch.empty_like(x)
    before = out._version
    getattr(ops, op)(x, w, gap, out=out)
    assert out._version == before + 1


@pytest.mark.parametrize("op", NORMS)
def test_the_reference_does_not_wait_for_the_device(op):
    x, w, gap = inputs((3, 4, 5), torch.float32)
    with Ops() as seen:
        run(op, "reference", x, w, gap, 0.0, 1.0)
    assert not SYNCS & set(seen.names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(4, 3), torch.rand(3, 3), torch.rand(4)), r"multiple of N; got \[4, 3\], \[3, 3\], \[4\]"),
        ((torch.rand(4, 3), torch.rand(4, 2), torch.rand(4)), "must agree"),
        ((torch.rand(4, 3), torch.rand(4, 3), torch.rand(4, 1)), "must agree"),
        ((torch.rand(4, 3), torch.rand(0, 3), torch.rand(4)), "must agree"),
        ((torch.rand(4, 3), torch.ones(4, 3, dtype=torch.long), torch.rand(4)), "must be floating; got .*int64"),
    ],
)
@pytest.mark.parametrize("op", NORMS)
def test_bad_input(op, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*arguments)
    with pytest.raises(ValueError, match="out must be like x"):
        getattr(ops, op)(torch.rand(4, 3), torch.rand(4, 3), torch.rand(4), out=torch.rand(4, 2))
