"""The weights family: every backend against the reference in float64, over models of tensors of all kinds."""

from __future__ import annotations

import math

import pytest
import torch
from table import BACKENDS, ROUNDING, STEP_DTYPES, arrange, layouts, name, need_backend
from torch import Tensor
from torch.library import opcheck

import fastadv
from fastadv import ops
from fastadv.reference import weights as reference

# Whole vectors, remainders, several chunks of a thread, a scalar, an empty one, more tensors than one launch has a table for.
SHAPES = [(8, 3, 3, 3), (5, 7), (131, 257), (1,), (0, 4), (2, 3, 4, 5, 6), ()]


def model(dtype: torch.dtype, grad_dtype: torch.dtype, layout: str = "contiguous", shapes=SHAPES, gap: float = 0.01):
    """weights a little away from origins, gradients; every tensor in ``layout`` where it has it."""
    generator = torch.Generator().manual_seed(7)
    weights, grads, origins = [], [], []
    for shape in shapes:
        origin = torch.randn(shape, generator=generator)
        weight = origin + gap * torch.randn(shape, generator=generator)
        own = layout if layout in layouts(shape) else "contiguous"
        for tensors, t in ((weights, weight.to(dtype)), (origins, origin.to(dtype))):
            tensors.append(arrange(t, own))
        grads.append(torch.randn(shape, generator=generator).to(grad_dtype))
    return weights, grads, origins


def exact(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def cases(*among: str) -> list:
    """Triton's interpreter is slow: all layouts in fp32, the other types in one."""
    return [
        pytest.param(backend, dtypes, layout, id=f"{backend}-{name(dtypes)}-{layout}")
        for backend in BACKENDS
        for dtypes in STEP_DTYPES
        for layout in among
        if backend != "triton" or dtypes == STEP_DTYPES[0] or layout == "contiguous"
    ]


@pytest.mark.parametrize(("backend", "dtypes", "layout"), cases("contiguous", "channels_last", "channels_last_3d", "strided"))
def test_every_backend_computes_the_reference_in_float64(backend, dtypes, layout):
    for op in ops.WEIGHTS:
        need_backend(op, backend)
    weights, grads, origins = model(*dtypes, layout)
    expected = reference.weight_sums(exact(weights), exact(grads), exact(origins))
    with fastadv.use_backend(backend):
        sums = ops.weight_sums(weights, grads, origins)
        torch.testing.assert_close(sums.sum(1), expected, rtol=1e-6, atol=1e-12)
        for gamma, alpha in ((0.05, 0.03), (0.02, 0.1), (0.02, -0.03)):  # inside the ball, to its sphere, descending
            moved = [w.clone() for w in weights]
            ops.perturb_(moved, grads, origins, sums, gamma, alpha)
            wanted = reference.perturb(exact(weights), exact(grads), exact(origins), expected, gamma, alpha)
            for got, want in zip(moved, wanted, strict=True):
                rounding = ROUNDING[dtypes[0]]
                torch.testing.assert_close(got.double(), want, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("backend", "dtypes", "layout"), cases("contiguous", "channels_last", "strided"))
def test_recording_and_the_papers_step(backend, dtypes, layout):
    """Weights are their own origins; the backup is theirs bit for bit, in its own layout, and so is what is restored."""
    for op in ops.WEIGHTS:
        need_backend(op, backend)
    weights, grads, origins = model(*dtypes, layout)
    before = [w.clone() for w in weights]
    with fastadv.use_backend(backend):
        sums = ops.weight_sums(weights, grads, origins, record=True)
        assert all(torch.equal(o, w) for o, w in zip(origins, before, strict=True))
        assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True)), "the first pass moves nothing"
        expected = reference.weight_sums(exact(before), exact(grads), exact(before))
        torch.testing.assert_close(sums.sum(1), expected, rtol=1e-6, atol=1e-12)
        ops.perturb_(weights, grads, weights, sums, gamma=0.01)
        for w, b, g in zip(weights, exact(before), exact(grads), strict=True):
            wanted = b + 0.01 * b.norm() / g.norm() * g
            torch.testing.assert_close(w.double(), wanted, rtol=ROUNDING[dtypes[0]], atol=ROUNDING[dtypes[0]])
        ops.restore_(weights, origins)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_tensors_than_a_table_holds(backend):
    shapes = [(n % 7 + 1, n % 5 + 1) for n in range(180)]
    weights, grads, _ = model(torch.float32, torch.float32, shapes=shapes)
    with fastadv.use_backend(backend):
        moved = [w.clone() for w in weights]
        ops.perturb_(moved, grads, moved, ops.weight_sums(weights, grads, weights), 0.01)
    for w, m, g in zip(weights, moved, grads, strict=True):
        torch.testing.assert_close(m, w + 0.01 * w.norm() / g.norm() * g)


@pytest.mark.parametrize("backend", BACKENDS)
def test_storage_types_may_differ_within_a_model(backend):
    parts = [model(*dtypes, shapes=[(5, 7), (33,)]) for dtypes in STEP_DTYPES]
    weights, grads, origins = ([t for part in parts for t in part[i]] for i in range(3))
    sums = reference.weight_sums(exact(weights), exact(grads), exact(origins))
    expected = reference.perturb(exact(weights), exact(grads), exact(origins), sums, 0.05, 0.03)
    with fastadv.use_backend(backend):
        ops.perturb_(weights, grads, origins, ops.weight_sums(weights, grads, origins), 0.05, 0.03)
    for got, want in zip(weights, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=ROUNDING[got.dtype], atol=ROUNDING[got.dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_or_broken_gradient_moves_its_tensor_alone_nowhere(backend):
    weights = [torch.randn(9, 5) for _ in range(5)]
    grads = [torch.zeros(9, 5), torch.randn(9, 5), *(torch.randn(9, 5) for _ in range(3))]
    grads[2][3, 3], grads[3][0, 0], grads[4][1, 1] = math.nan, math.inf, -math.inf
    moved = [w.clone() for w in weights]
    with fastadv.use_backend(backend):
        ops.perturb_(moved, grads, moved, ops.weight_sums(weights, grads, weights), 0.1)
    assert [torch.equal(w, m) for w, m in zip(weights, moved, strict=True)] == [True, False, True, True, True]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e30])
def test_tiny_and_huge_gradients_have_a_direction(backend, scale):
    """Squares of these underflow or overflow in fp32."""
    w, direction = torch.randn(40, 30), torch.randn(40, 30)
    moved = [w.clone()]
    with fastadv.use_backend(backend):
        ops.perturb_(moved, [direction * scale], moved, ops.weight_sums([w], [direction * scale], [w]), 0.1)
    torch.testing.assert_close(moved[0], w + 0.1 * w.norm() / direction.norm() * direction, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_that_is_not_aligned_to_vectors(backend):
    flat = torch.randn(3, 1024)
    w, g, o = flat[0, 1:1000], flat[1, 3:1002], flat[2, 2:1001]
    o.copy_(w)
    around = flat.clone()
    with fastadv.use_backend(backend):
        ops.perturb_([w], [g], [o], ops.weight_sums([w], [g], [o]), 0.1)
    torch.testing.assert_close(w, o + 0.1 * o.norm() / g.norm() * g)
    w.copy_(around[0, 1:1000])
    assert torch.equal(flat, around), "nothing else was written"


def test_sums_do_not_depend_on_the_number_of_threads():
    weights, grads, origins = model(torch.float32, torch.float32, shapes=[(70_001,), (300, 300), (5,)])
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ops.weight_sums(weights, grads, origins))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_sums_of_shards_add_up():
    weights, grads, origins = model(torch.float64, torch.float64, shapes=[(10, 6)])
    whole = ops.weight_sums(weights, grads, origins).sum(1)
    shards = [ops.weight_sums([weights[0][r]], [grads[0][r]], [origins[0][r]]).sum(1) for r in (slice(0, 3), slice(3, 10))]
    torch.testing.assert_close(shards[0] + shards[1], whole)


def test_no_tensors_are_a_model_too():
    ops.perturb_([], [], [], ops.weight_sums([], [], []), 0.1)
    ops.restore_([], [])


def test_versions_are_counted():
    w, g, o = torch.randn(3, 3), torch.randn(3, 3), torch.empty(3, 3)
    before = w._version, o._version
    sums = ops.weight_sums([w], [g], [o], record=True)
    assert (w._version, o._version) == (before[0], before[1] + 1)
    ops.perturb_([w], [g], [o], sums, 0.1)
    assert w._version == before[0] + 1


def test_opcheck():
    weights, grads, origins = model(torch.float32, torch.float32, shapes=[(4, 3), (5,)])
    for record in (False, True):
        opcheck(torch.ops.fastadv.weight_sums.default, (weights, grads, origins, record))
    sums = ops.weight_sums(weights, grads, origins)
    opcheck(torch.ops.fastadv.perturb_.default, (weights, grads, origins, sums, 0.1, 0.05))


def test_compiled():
    weights, grads, origins = model(torch.float32, torch.float32, shapes=[(4, 3), (5,)])

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(weights: list[Tensor]) -> None:
        ops.perturb_(weights, grads, origins, ops.weight_sums(weights, grads, origins), 0.1)

    compiled, eager = [w.clone() for w in weights], [w.clone() for w in weights]
    step(compiled)
    ops.perturb_(eager, grads, origins, ops.weight_sums(eager, grads, origins), 0.1)
    assert all(torch.equal(c, e) for c, e in zip(compiled, eager, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["grads"].pop(), r"weights, grads and origins must be as many; got 2, 1, 2"),
        (lambda a: a["grads"].reverse(), r"number 0 is \[2, 3\] torch.float32 on cpu, \[4\]"),
        (lambda a: a.update(origins=[t.double() for t in a["origins"]]), r"number 0 is .*float64"),
        (lambda a: a.update(sums=torch.zeros(3, 1, 4)), r"sums must be \[2, slices, 4\] from weight_sums; got \[3, 1, 4\]"),
        (lambda a: a.update(gamma=-1.0), r"gamma must be finite and >= 0, and alpha finite; got -1.0, -1.0"),
        (lambda a: a.update(alpha=math.nan), r"got 0.1, nan"),
    ],
)
def test_bad_input_moves_nothing(change, message):
    tensors = [torch.randn(2, 3), torch.randn(4)]
    arguments = {"weights": tensors, "grads": [t.clone() for t in tensors], "origins": [t.clone() for t in tensors]}
    arguments |= {"sums": ops.weight_sums(*arguments.values()), "gamma": 0.1}
    before = [t.clone() for t in tensors]
    change(arguments)
    with pytest.raises(ValueError, match=message):
        ops.perturb_(**arguments)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
