"""The step family: every backend against the reference, and the reference against what a projection is."""

from __future__ import annotations

import math

import pytest
import torch
from table import (
    BACKENDS,
    ROUNDING,
    SHAPES,
    STEP_BACKENDS,
    STEP_DTYPES,
    UPDATE_BACKENDS,
    arrange,
    check_update,
    layouts,
    name,
    need_backend,
    sample_numbers,
    step_inputs,
    update_inputs,
)
from torch import Tensor

import fastadv
from fastadv import ops
from fastadv.reference import step as reference


def worth_testing(backend: str, dtypes: tuple[torch.dtype, torch.dtype], shape: str, layout: str, scalars: str) -> bool:
    """All shapes and layouts in fp32, and of the C++ kernels in all types. Other types of the reference, which is PyTorch,
    contiguous; of Triton, whose interpreter is slow, on one shape of each kind, and in fp32 each layout with one kind of
    scalars only: a kernel sees no layout."""
    if backend == "cpp":
        return True
    if backend == "reference":
        return dtypes == STEP_DTYPES[0] or layout == "contiguous"
    if dtypes == STEP_DTYPES[0] and shape != "chunks":
        return (layout == "contiguous") == (scalars == "per_sample")
    samples = {("row", "shared"), ("odd", "per_sample")}
    if dtypes in STEP_DTYPES[:2]:
        samples.add(("chunks", "shared" if dtypes == STEP_DTYPES[0] else "per_sample"))
    return layout == "contiguous" and (shape, scalars) in samples


CASES = [
    pytest.param(op, backend, dtypes, shape, layout, scalars, id=f"{op}-{backend}-{name(dtypes)}-{shape}-{layout}-{scalars}")
    for op, backends in STEP_BACKENDS.items()
    for backend in backends
    for dtypes in STEP_DTYPES
    for shape in SHAPES
    for layout in layouts(SHAPES[shape])
    for scalars in ("shared", "per_sample")
    if worth_testing(backend, dtypes, shape, layout, scalars)
    if (op, backend, dtypes[0], shape) != ("l1_step", "triton", torch.float64, "chunks")  # which takes a quarter of a minute
]

SIZES = {"linf_step": (0.02, 0.06), "l2_step": (0.5, 1.0), "l1_step": (2.0, 3.0)}  # alpha, eps


def run(op: str, backend: str, *args: object, **kwargs: object) -> Tensor:
    need_backend(op.removesuffix("_"), backend)
    with fastadv.use_backend(backend):
        return getattr(ops, op)(*args, **kwargs)


@pytest.mark.parametrize(("op", "backend", "dtypes", "shape", "layout", "scalars"), CASES)
def test_every_backend_computes_the_reference(op, backend, dtypes, shape, layout, scalars):
    adv, grad, x = (arrange(t, layout) for t in step_inputs(SHAPES[shape], *dtypes))
    alpha, eps = SIZES[op]
    if scalars == "per_sample":
        factor = torch.linspace(0, 1.5, len(adv), dtype=torch.float64)
        alpha, eps = alpha * factor, eps * factor
    before = adv.clone()

    result = run(op, backend, adv, grad, x, alpha, eps, 0.0, 1.0)

    assert result.dtype == adv.dtype
    assert result.shape == adv.shape
    assert torch.equal(adv, before), "adv was modified"
    if layout != "strided":
        assert result.stride() == adv.stride()
    if op == "linf_step":
        expected = reference.linf_step(adv, grad, x, alpha, eps, 0.0, 1.0)
        if backend == "triton" and adv.dtype == torch.bfloat16:
            # Triton's interpreter truncates when it stores bf16 (a GPU rounds): one last place.
            torch.testing.assert_close(result, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(result, expected)
    else:
        wide = (t.double() for t in (adv, grad, x))
        expected = getattr(reference, op)(*wide, alpha, eps, 0.0, 1.0)
        rounding = ROUNDING[adv.dtype]
        if op == "l1_step" and backend == "reference":
            rounding *= 4  # its running sums over a sorted sample round more than the kernel's, which are in double
        torch.testing.assert_close(result.double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("op", STEP_BACKENDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_and_out_agree_with_a_new_tensor(op, backend):
    adv, grad, x = step_inputs((4, 3, 8, 8), torch.float32, torch.float32)
    alpha, eps = SIZES[op]
    expected = run(op, backend, adv, grad, x, alpha, eps, 0.0, 1.0)

    out = torch.full_like(adv, 7.0).to(memory_format=torch.channels_last)  # another layout than adv's
    assert run(op, backend, adv, grad, x, alpha, eps, 0.0, 1.0, out=out) is out
    assert torch.equal(out, expected)
    moved = adv.clone()
    assert run(op + "_", backend, moved, grad, x, alpha, eps, 0.0, 1.0) is moved
    assert torch.equal(moved, expected)


@pytest.mark.parametrize(("op", "backend"), [(op, b) for op, backends in STEP_BACKENDS.items() for b in backends])
def test_result_is_in_ball_and_box(op, backend):
    adv, grad, x = step_inputs((16, 3, 8, 8), torch.float64, torch.float64)
    alpha, eps = SIZES[op]
    result = run(op, backend, adv, grad, x, alpha, eps, 0.0, 1.0)
    order = {"linf_step": math.inf, "l2_step": 2, "l1_step": 1}[op]
    length = torch.linalg.vector_norm((result - x).flatten(1), order, dim=1)
    assert (length <= eps * (1 + 1e-9)).all()
    assert length.max() > 0.9 * eps, "the ball is not used"
    assert result.min() >= 0
    assert result.max() <= 1


@pytest.mark.parametrize(("op", "backend"), [(op, b) for op, backends in STEP_BACKENDS.items() for b in backends])
def test_nan_and_zero_gradients_move_nothing(op, backend):
    x = torch.rand(4, 50, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    grad = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    grad[1] = 0
    grad[2] = math.nan
    grad[3, 7] = math.nan
    result = run(op, backend, x, grad, x, 0.1, 0.2)
    moved = result != x
    assert moved[0].any()
    assert not moved[1].any()
    assert not moved[2].any()
    assert not moved[3, 7]
    assert not result.isnan().any()


@pytest.mark.parametrize("backend", STEP_BACKENDS["l2_step"])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 1e37], ids=["subnormal", "tiny", "huge", "largest"])
def test_l2_direction_survives_gradients_whose_squares_do_not(backend, scale):
    _, grad, x = step_inputs((4, 100), torch.float32, torch.float32)
    expected = run("l2_step", backend, x, grad, x, 0.5, 1.0)
    result = run("l2_step", backend, x, grad * scale, x, 0.5, 1.0)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", STEP_BACKENDS["l2_step"])
def test_an_infinite_l2_gradient_moves_nothing(backend):
    x = torch.rand(2, 10)
    grad = torch.ones(2, 10)
    grad[0, 3] = math.inf
    moved = (run("l2_step", backend, x, grad, x, 0.1, 1.0) != x).any(1)
    assert moved.tolist() == [False, True]


def test_l2_sums_of_a_large_sample_in_few_parts(monkeypatch):
    """A sample of more than SUM_PARTS blocks gives each program of the Triton kernel several of them, the last ones fewer."""
    kernels = pytest.importorskip("fastadv.kernels")
    monkeypatch.setattr(kernels.step, "SUM_PARTS", 3)
    adv, grad, x = step_inputs((2, 9 * kernels.step.SUM_BLOCK + 77), torch.float32, torch.float32)
    expected = reference.l2_step(adv.double(), grad.double(), x.double(), 0.5, 1.0, 0.0, 1.0)
    result = run("l2_step", "triton", adv, grad, x, 0.5, 1.0, 0.0, 1.0)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=ROUNDING[torch.float32])


@pytest.mark.parametrize("backend", STEP_BACKENDS["l1_step"])
def test_l1_ties_move_together_and_descent_is_ascent_of_the_negative(backend):
    _, grad, x = step_inputs((3, 40), torch.float64, torch.float64)
    moved = run("l1_step", backend, x, grad.sign(), x, 0.3, 10.0, -9.0, 9.0, 0.1) - x
    torch.testing.assert_close(moved, 0.3 * grad.sign() / grad.sign().abs().sum(1, keepdim=True))
    ascent = run("l1_step", backend, x, -grad, x, 0.3, 10.0, 0.2, 0.8, 0.1)
    assert torch.equal(run("l1_step", backend, x, grad, x, -0.3, 10.0, 0.2, 0.8, 0.1), ascent)


@pytest.mark.parametrize("backend", STEP_BACKENDS["l1_step"])
@pytest.mark.parametrize("fraction", [1e-9, 0.1, 1.0])
def test_l1_step_moves_the_largest_gradients_equally(backend, fraction):
    grad = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.full_like(grad, 0.5)
    moved = run("l1_step", backend, x, grad, x, 0.3, 10.0, 0.0, 1.0, fraction) - x
    count = max(1, int(fraction * 40))
    largest = torch.zeros_like(grad, dtype=torch.bool).scatter_(1, grad.abs().topk(count).indices, True)
    torch.testing.assert_close(moved, torch.where(largest, grad.sign() * 0.3 / count, torch.zeros_like(grad)))


@pytest.mark.parametrize("backend", STEP_BACKENDS["l1_step"])
def test_l1_projection_is_the_nearest_point(backend):
    """Against projected gradient's fixed point: no feasible point found by dense bisection on the multiplier is nearer."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(64, 30, dtype=torch.float64, generator=generator)
    adv = x + torch.randn(64, 30, dtype=torch.float64, generator=generator)
    eps = 2.0
    result = run("l1_step", backend, adv, torch.zeros_like(x), x, 0.0, eps, 0.0, 1.0)
    u, room = adv - x, torch.where(adv < x, x, 1 - x)
    low, high = torch.zeros(64, 1, dtype=torch.float64), u.abs().amax(1, keepdim=True)
    for _ in range(100):
        shrink = (low + high) / 2
        outside = torch.minimum((u.abs() - shrink).clamp(min=0), room).sum(1, keepdim=True) > eps
        low, high = torch.where(outside, shrink, low), torch.where(outside, high, shrink)
    nearest = x + u.sign() * torch.minimum((u.abs() - high).clamp(min=0), room)
    torch.testing.assert_close(result, nearest, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", STEP_BACKENDS)
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_zero_radius_gives_x_back(op, backend):
    adv, grad, x = step_inputs((4, 3, 8, 8), torch.float32, torch.float32)
    assert torch.equal(run(op, backend, adv, grad, x, 0.1, 0.0, 0.0, 1.0), x)


# ------------------------------------------------------------------------------------------------------------ momentum

UPDATE_CASES = [
    pytest.param(op, backend, dtypes, shape, layout, scalars, id=f"{op}-{backend}-{name(dtypes)}-{shape}-{layout}-{scalars}")
    for op, backends in UPDATE_BACKENDS.items()
    for backend in backends
    for dtypes in STEP_DTYPES
    for shape in SHAPES
    for layout in layouts(SHAPES[shape])
    for scalars in ("shared", "per_sample")
    if worth_testing(backend, dtypes, shape, layout, scalars)
]


@pytest.mark.parametrize(("op", "backend", "dtypes", "shape", "layout", "scalars"), UPDATE_CASES)
def test_every_backend_updates_as_the_reference(op, backend, dtypes, shape, layout, scalars):
    need_backend(op, backend)
    with fastadv.use_backend(backend):
        check_update(op, dtypes, SHAPES[shape], scalars, lambda t: arrange(t, layout), truncates=backend == "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_apgd_step_remembers_before_it_moves(backend):
    """By hand: the momentum of Croce and Hein's equation (5) from two points of a line, and who remembers what."""
    adv, old, best, best_grad, image = (torch.full((4, 1), v) for v in (0.5, 0.25, 7.0, 8.0, 9.0))
    grad = torch.tensor([[1.0], [-2.0], [math.nan], [3.0]])
    better, taken = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    x, eps = torch.full((4, 1), 0.375), torch.tensor([1.0, 1.0, 1.0, 0.1875])
    args = (grad, x, 0.125, 0.75, eps, 0.0, 1.0, better, taken)
    assert run("apgd_step_", backend, adv, old, best, best_grad, image, *args) is adv
    # 0.75 * 0.125 of the step, one way or the other or not at all, and 0.25 * 0.25 of the last move; the ball ends at 0.5625.
    assert adv[:, 0].tolist() == [0.65625, 0.46875, 0.5625, 0.5625]
    assert old[:, 0].tolist() == [0.5] * 4
    assert best[:, 0].tolist() == [0.5, 0.5, 7, 7]
    assert best_grad[:, 0].tolist() == [1, -2, 8, 8]
    assert image[:, 0].tolist() == [0.5, 9, 0.5, 9]


@pytest.mark.parametrize("backend", BACKENDS)
def test_apgd_step_is_in_the_ball_to_the_last_bit(backend):
    """Where a linf step would be: what is far outside lands on the same wall."""
    (adv, *state), grad, x, flags = update_inputs("apgd_step", (16, 50), torch.float32, torch.float32)
    eps = 8 / 255
    walls = [ops.linf_step(x, s * torch.ones_like(x), x, 1.0, eps, 0.0, 1.0) for s in (-1, 1)]
    run("apgd_step_", backend, adv, *state, grad, x, 0.1, 0.75, eps, 0.0, 1.0, *flags)
    assert (adv >= walls[0]).all()
    assert (adv <= walls[1]).all()
    assert ((adv == walls[0]) | (adv == walls[1])).double().mean() > 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", [1e-40, 1e-30, 1.0, 1e30, 1e36], ids=["subnormal", "tiny", "usual", "huge", "largest"])
def test_velocity_has_the_size_of_a_direction(backend, unit):
    grad = torch.tensor([[1.0, -2.0, 1.0], [0.0, 0.0, 0.0], [1.0, math.nan, 2.0], [1.0, -math.inf, 2.0]]) * unit
    x, velocity = torch.full((4, 3), 0.5), torch.full((4, 3), 0.25)
    adv = x.clone()
    run("momentum_step_", backend, adv, velocity, grad, x, 0.125, 0.5, 1.0)
    expected = torch.full((4, 3), 0.125)
    expected[0] += torch.tensor([0.25, -0.5, 0.25])
    torch.testing.assert_close(velocity, expected, rtol=1e-4 if unit == 1e-40 else 1e-6, atol=0)
    assert adv[0].tolist() == [0.625, 0.375, 0.625]
    assert (adv[1:] == 0.625).all()  # on as before


BAD_UPDATES = {
    "old": (1, lambda t: t.double(), "old must be like adv"),
    "best gradient": (3, lambda t: t.double(), "best_grad must be like grad"),
    "image": (4, lambda t: t[:1], "image must be like adv"),
    "x": (6, lambda t: t[:, :2], "one shape"),
    "momentum": (8, lambda t: torch.ones(3), r"momentum must be a float or have shape \[2\]"),
    "eps": (9, lambda t: -0.1, "eps must be >= 0"),
    "better": (12, lambda t: t.float(), r"better must be bool \[2\]"),
    "taken": (13, lambda t: t[:1], r"taken must be bool \[2\]"),
    "requires grad": (2, lambda t: t.requires_grad_(), "requires grad"),
}


@pytest.mark.parametrize("case", BAD_UPDATES)
def test_bad_updates_are_refused_untouched(case):
    tensors = [torch.rand(2, 3) for _ in range(7)]
    before = [t.clone() for t in tensors]
    arguments = [*tensors, 0.1, 0.7, 0.2, 0.0, 1.0, torch.tensor([True, True]), torch.tensor([True, True])]
    which, worse, message = BAD_UPDATES[case]
    arguments[which] = worse(arguments[which])
    with pytest.raises(ValueError, match=message):
        ops.apgd_step_(*arguments)
    assert all(map(torch.equal, tensors, before))


def test_a_bad_velocity_or_decay_is_refused():
    x = torch.rand(2, 3)
    with pytest.raises(ValueError, match="velocity must be like adv"):
        ops.momentum_step_(x, x.half(), x, x, 0.1, 1.0, 0.2)
    with pytest.raises(ValueError, match=r"decay must be a float or have shape \[2\]"):
        ops.momentum_step_(x, x.clone(), x, x, 0.1, torch.ones(5), 0.2)


# --------------------------------------------------------------------------------------------------------------- start

START_CASES = [
    pytest.param(backend, dtype, shape, layout, scalars, id=f"{backend}-{name(dtype)}-{shape}-{layout}-{scalars}")
    for backend in BACKENDS
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for shape in SHAPES
    for layout in layouts(SHAPES[shape])
    for scalars in ("shared", "per_sample")
    if worth_testing(backend, (dtype, dtype), shape, layout, scalars)
]


@pytest.mark.parametrize(("backend", "dtype", "shape", "layout", "scalars"), START_CASES)
def test_every_backend_starts_as_the_reference(backend, dtype, shape, layout, scalars):
    x = arrange(step_inputs(SHAPES[shape], dtype, dtype)[2], layout)
    eps, more = 0.3, []
    if scalars == "per_sample":
        eps, more = torch.linspace(0, 0.5, len(x), dtype=torch.float64), [sample_numbers(len(x)), 2**32 - 3]
    result = run("linf_start", backend, x, eps, 0.0, 1.0, 2**64 - 12345, *more)
    expected = reference.linf_start(x.double(), eps, 0.0, 1.0, 2**64 - 12345, *more)
    assert result.dtype == dtype
    if layout != "strided":
        assert result.stride() == x.stride()
    torch.testing.assert_close(result.double(), expected, rtol=ROUNDING[dtype] / 2, atol=ROUNDING[dtype] / 10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_a_sample_draws_is_of_seed_step_and_number(backend, layout):
    """Bit for bit, with radii whose products are exact: word by word from the counters, and in any batch."""
    x, numbers = arrange(torch.full((5, 3, 4, 3), 0.5), layout), sample_numbers(5)
    eps, step = 2.0 ** -torch.arange(1, 6), 2**32 - 2

    def start(rows, *more, eps=eps):
        return run("linf_start", backend, x[rows], eps[rows], 0.0, 1.0, 2**64 - 7, *more)

    whole = start(slice(None), numbers, step)
    assert whole.stride() == x.stride()
    e, number = torch.arange(36).expand(5, -1), numbers[:, None].expand(-1, 36)
    words = reference.philox(2**64 - 7, e // 4, torch.full_like(e, step), number & 0xFFFFFFFF, number >> 32)
    word = torch.stack(words, -1).gather(-1, (e % 4)[..., None])[..., 0]
    in_memory = whole if layout == "contiguous" else whole.movedim(1, -1)
    assert torch.equal(in_memory.flatten(1), 0.5 + eps[:, None] * ((word >> 8) - 2**23) / 2**23)

    some = torch.tensor([4, 0, 3])
    assert torch.equal(start(some, numbers[some], step), whole[some])
    assert torch.equal(start(slice(1, 2), numbers[1:2], step), whole[1:2])
    plain = start(slice(None))
    assert torch.equal(start(slice(None), torch.arange(5), 0), plain)
    for other in (start(slice(None), numbers, step + 1), start(slice(None), torch.arange(5), 1), plain):
        assert not (other == whole).flatten(1).any(1).all()
    place = x.clone(memory_format=torch.preserve_format)
    assert run("linf_start", backend, place, eps, 0.0, 1.0, 2**64 - 7, numbers, step, out=place) is place
    assert torch.equal(place, whole)


def test_philox_known_answers():
    """The vectors that Salmon et al. publish with Random123."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, words in [
        ((0,) * 4, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]:
        assert tuple(int(w) for w in reference.philox(key, *(torch.tensor(c) for c in counter))) == words


@pytest.mark.parametrize("backend", BACKENDS)
def test_start_is_uniform_independent_and_keyed_by_sample(backend):
    x = torch.full((8 if backend == "triton" else 40, 5003), 0.5, dtype=torch.float64)
    u = (run("linf_start", backend, x, 0.25, 0.0, 1.0, 7) - 0.5) / 0.25
    assert u.min() >= -1
    assert u.max() < 1
    moments = torch.stack([u.mean(), u.square().mean() - 1 / 3, (u[:, 1:] * u[:, :-1]).mean(), (u[1:] * u[:-1]).mean()])
    assert (moments.abs() < 5 / math.sqrt(u.numel())).all(), moments  # five standard errors and more
    alone = run("linf_start", backend, x[:3], 0.25, 0.0, 1.0, 7)
    assert torch.equal((alone - 0.5) / 0.25, u[:3]), "a sample's draw depends on the samples beside it"
    other = (run("linf_start", backend, x, 0.25, 0.0, 1.0, 8) - 0.5) / 0.25
    assert (u * other).mean().abs() < 5 / math.sqrt(u.numel())


def test_starts_do_not_depend_on_the_number_of_threads():
    x, threads = torch.rand(3, 3, 129, 131), torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(torch.cat([ops.linf_start(x, 0.1, 0.0, 1.0, 3), ops.normal_start(x, 0.1, 3, copies=2)]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


NOISE_CASES = [case for case in START_CASES if case.values[3] == "contiguous" or case.values[4] == "per_sample"]


@pytest.mark.parametrize(("backend", "dtype", "shape", "layout", "scalars"), NOISE_CASES)
def test_every_backend_makes_the_noise_of_the_reference(backend, dtype, shape, layout, scalars):
    x = arrange(step_inputs(SHAPES[shape], dtype, dtype)[2], layout)
    std, more = 0.3, []
    if scalars == "per_sample":
        std, more = torch.linspace(0, 0.5, len(x), dtype=torch.float64), [sample_numbers(len(x)), 2**32 - 2, 3]
    result = run("normal_start", backend, x, std, 2**64 - 12345, *more)
    expected = reference.normal_start(x.double(), std, 2**64 - 12345, *more)
    assert result.dtype == dtype
    assert result.shape == expected.shape
    if layout != "strided" and not more:
        assert result.stride() == x.stride()
    # Where q is about 1/2, fp32 rounds 1 - 2q to a multiple of 2^-24.
    torch.testing.assert_close(result.double(), expected, rtol=ROUNDING[dtype] / 2, atol=ROUNDING[dtype] / 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_normal(backend):
    """The distribution function, at its steps, within 5 standard errors; and nothing moves with anything."""
    x = torch.zeros(4, 5003, dtype=torch.float64) if backend == "triton" else torch.zeros(100, 5003, dtype=torch.float64)
    z, n = run("normal_start", backend, x, 1.0, 7), x.numel()
    for at in (-4.0, -2.5, -1.0, -0.1, 0.0, 0.5, 1.7, 2.4, 3.0):
        p = 0.5 * math.erfc(-at / math.sqrt(2))
        assert abs(float((z < at).double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / n) + 1 / n, at
    pairs = [(z[:, 1:] * z[:, :-1]).mean(), (z[1:] * z[:-1]).mean(), (z * run("normal_start", backend, x, 1.0, 8)).mean()]
    assert max(map(abs, pairs)) < 5 / math.sqrt(n)


def test_noise_is_the_inverse_of_the_normal_distribution(monkeypatch):
    """Of q, into the far tail, as torch knows it; and the sign is that of the lowest bit."""
    words = torch.cat([torch.arange(0, 4000), torch.arange(0, 2**32, 2**20 + 7), 2**32 - 1 - torch.arange(4000)])
    monkeypatch.setattr(reference, "random_words", lambda x, *_: words[None])
    z = reference.normal_start(torch.zeros(1, len(words), dtype=torch.float64), 1.0)[0]
    q = ((words >> 1).double() + 0.5) / 2**32
    exact = -torch.special.ndtri(q) * (1 - 2 * (words & 1))
    torch.testing.assert_close(z, exact, rtol=4e-7, atol=0)
    assert 6.33 < z.max() < 6.34


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_is_a_step_of_its_own(backend):
    x, numbers, step = torch.rand(3, 3, 4, 3), sample_numbers(3), 2**32 - 2
    std = torch.tensor([0.1, 0.0, 2.0])
    copies = run("normal_start", backend, x, std, 5, numbers, step, 4)
    assert copies.shape == (12, 3, 4, 3)
    for k in range(4):
        alone = run("normal_start", backend, x, std, 5, numbers, (step + k) % 2**32)
        assert torch.equal(copies[k::4], alone)
    assert torch.equal(copies[4:8], x[1:2].expand(4, -1, -1, -1))  # of std 0
    place = torch.empty_like(copies)
    assert run("normal_start", backend, x, std, 5, numbers, step, 4, out=place) is place
    assert torch.equal(place, copies)
    run("normal_start", backend, x, std, 5, numbers, step, out=x)
    assert torch.equal(x, copies[::4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(2, 3), -0.1), "std must be >= 0; got -0.1"),
        ((torch.rand(2, 3), torch.ones(3)), r"std must be a float or have shape \[2\]"),
        ((torch.rand(2, 3).long(), 0.1), "floating dtype"),
        ((torch.rand(2, 3), 0.1, -1), r"seed must be in \[0, 2\^64\)"),
        ((torch.rand(2, 3), 0.1, 0, torch.arange(3)), r"samples must be int64 \[2\]"),
        ((torch.rand(2, 3), 0.1, 0, None, 2**32), r"step must be in \[0, 2\^32\)"),
        ((torch.rand(2, 3), 0.1, 0, None, 0, 0), "copies must be an integer >= 1; got 0"),
        ((torch.rand(2, 3), 0.1, 0, None, 0, 2.0), "copies must be an integer >= 1; got 2.0"),
    ],
)
def test_bad_noise_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.normal_start(*arguments)


def test_the_place_of_copies_must_fit():
    with pytest.raises(ValueError, match=r"out must be torch.float32 \[4, 3\] on cpu; got \[2, 3\]"):
        ops.normal_start(torch.rand(2, 3), 0.1, copies=2, out=torch.empty(2, 3))


BALL = (torch.rand(2, 3), 0.1, 0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(2, 3), -0.1), "eps must be >= 0"),
        ((torch.rand(2, 3).long(), 0.1), "floating dtype"),
        ((torch.rand(2, 3), torch.ones(3)), r"eps must be a float or have shape \[2\]"),
        ((*BALL, -1), r"seed must be in \[0, 2\^64\); got -1"),
        ((*BALL, 2**64), r"seed must be in \[0, 2\^64\); got 18446744073709551616"),
        ((*BALL, 0, torch.arange(3)), r"samples must be int64 \[2\] on cpu; got \[3\] torch.int64"),
        (
            (*BALL, 0, torch.arange(2).int()),
            r"samples must be int64 \[2\] on cpu; got \[2\] torch.int32",
        ),
        (
            (*BALL, 0, torch.arange(2, device="meta")),
            r"samples must be int64 \[2\] on cpu; got .* on meta",
        ),
        ((*BALL, 0, None, -1), r"step must be in \[0, 2\^32\); got -1"),
        ((*BALL, 0, None, 2**32), r"step must be in \[0, 2\^32\); got 4294967296"),
    ],
)
def test_bad_starts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.linf_start(*arguments)


BAD = {
    "shapes": (lambda a, g, x: (a, g[:1], x, 0.1, 0.1), "one shape"),
    "scalar adv": (lambda a, g, x: (a[0, 0], g[0, 0], x[0, 0], 0.1, 0.1), "one shape"),
    "dtypes": (lambda a, g, x: (a, g, x.double(), 0.1, 0.1), "one floating dtype"),
    "integers": (lambda a, g, x: (a.long(), g, x.long(), 0.1, 0.1), "floating dtype"),
    "devices": (lambda a, g, x: (a, g.to("meta"), x, 0.1, 0.1), "one device"),
    "negative eps": (lambda a, g, x: (a, g, x, 0.1, -0.1), "eps must be >= 0; got -0.1"),
    "alpha per sample": (lambda a, g, x: (a, g, x, torch.ones(9), 0.1), r"alpha must be a float or have shape \[2\]"),
    "adv requires grad": (lambda a, g, x: (a.requires_grad_(), g, x, 0.1, 0.1), "adv requires grad"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("op", STEP_BACKENDS)
def test_bad_arguments_are_refused_untouched(op, case):
    adv, grad, x = (torch.rand(2, 3) for _ in range(3))
    before = adv.clone()
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        getattr(ops, f"{op}_")(*arguments(adv, grad, x))
    assert torch.equal(adv.detach(), before)


@pytest.mark.parametrize("fraction", [0.0, 1.5, math.nan])
def test_l1_fraction_must_be_one(fraction):
    x = torch.rand(2, 3)
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
        ops.l1_step_(x, x, x, 0.1, 0.2, fraction=fraction)


def test_out_is_no_part_of_autograd_and_may_be_x():
    adv, grad, x = step_inputs((4, 5), torch.float32, torch.float32)
    expected = ops.linf_step(adv, grad, x, 0.1, 0.2)
    assert torch.equal(ops.linf_step(adv.clone().requires_grad_(), grad, x, 0.1, 0.2, out=x), expected)
    assert not x.requires_grad


def test_out_must_fit():
    adv, grad, x = (torch.rand(2, 3) for _ in range(3))
    with pytest.raises(ValueError, match="out must be like adv"):
        ops.linf_step(adv, grad, x, 0.1, 0.1, out=torch.empty(3, 2))
