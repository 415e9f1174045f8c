"""What only a GPU can show: CUDA = Triton = reference, on any stream, in graphs, at any size and alignment. ``pytest -m gpu``.

Expected values come from the reference on the CPU. ``-k small_run`` calls each kernel once or twice, for compute-sanitizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch
from models import batch, cnn, linear
from table import (
    CLASSES,
    ROUNDING,
    SHAPES,
    STEP_DTYPES,
    UPDATE_SCALARS,
    arrange,
    check_update,
    layouts,
    logits_and_labels,
    name,
    sample_numbers,
    step_inputs,
    update_inputs,
)
from torch import Tensor

import fastadv
from fastadv import native, ops, reference

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

BACKENDS = ("cuda", "triton")
LABEL_LOSSES = ("ce", "log_odds", "margin", "dlr", "dlr_targeted")
DIVERGENCES = ("kl", "se")
EVERY_OP = (*ops.STEPS, *ops.UPDATES, *ops.STARTS, *ops.LOSSES, "ce soft", "awp")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Beyond what the CPU table has: more samples than a grid has rows; a sample on chip that needs more shared memory than CUDA
# gives unasked (with what the kernel declares itself); one that fills a cluster's shared memory; one that
# fits no chip, of a size no vector divides.
LARGE_SHAPES = {"many": (70_001, 3), "asked": (2, 4096), "imagenet": (3, 3, 224, 224), "huge": (2, 1_000_003)}
LARGE_DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
# At and behind the ends of what a warp and a block hold in registers; longer than any block of Triton's.
LARGE_CLASSES = (256, 257, 1023, 4096, 4097, 21_841, 70_001)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every op of the test runs on this backend or fails; only a build without nvcc may lack "cuda"."""
    if request.param == "cuda" and not native.BUILD_INFO.get("cuda_archs"):
        pytest.skip(native.missing("linf_step", "cuda"))
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        pytest.fail("an earlier test broke this process's GPU: look at the first failure", pytrace=False)
    with fastadv.use_backend(request.param):
        yield request.param


# ------------------------------------------------------------------------------------------- equal to the reference


def on_gpu(t: Tensor, layout: str) -> Tensor:
    with torch.device("cuda"):
        return arrange(t.cuda(), layout)


def sizes(op: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """alpha and eps that move every element a little, whatever the size of a sample."""
    larger = max(1.0, math.prod(shape[1:]) / 192)
    alpha, eps, scale = {"linf_step": (0.02, 0.06, 1.0), "l2_step": (0.5, 1.0, larger**0.5), "l1_step": (2.0, 3.0, larger)}[op]
    return alpha * scale, eps * scale


def check_step(op: str, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...], scalars: str, layout: str) -> None:
    adv, grad, x = step_inputs(shape, *dtypes)
    alpha, eps = sizes(op, shape)
    if scalars == "per_sample":
        factor = torch.linspace(0, 1.5, len(adv), dtype=torch.float64)
        alpha, eps = alpha * factor, (eps * factor).cuda()  # read on the GPU, wherever they are
    given = [on_gpu(t, layout) for t in (adv, grad, x)]
    result = getattr(ops, op)(*given, alpha, eps, 0.0, 1.0)

    assert result.dtype == adv.dtype
    assert result.shape == adv.shape
    if layout != "strided":
        assert result.stride() == given[0].stride()
    if op == "linf_step":
        expected = reference.step.linf_step(adv, grad, x, alpha, eps, 0.0, 1.0)
        assert torch.equal(result.cpu(), expected), layout
    else:
        wide = (t.double() for t in (adv, grad, x))
        expected = getattr(reference.step, op)(*wide, alpha, eps, 0.0, 1.0)
        rounding = ROUNDING[adv.dtype]
        torch.testing.assert_close(result.double().cpu(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("scalars", ["shared", "per_sample"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", STEP_DTYPES, ids=name)
@pytest.mark.parametrize("op", ops.STEPS)
def test_steps(backend, op, dtypes, shape, scalars):
    for layout in layouts(SHAPES[shape]):
        check_step(op, dtypes, SHAPES[shape], scalars, layout)


@pytest.mark.parametrize("scalars", ["shared", "per_sample"])
@pytest.mark.parametrize("shape", LARGE_SHAPES)
@pytest.mark.parametrize("dtypes", LARGE_DTYPES, ids=name)
@pytest.mark.parametrize("op", ops.STEPS)
def test_large_steps(backend, op, dtypes, shape, scalars):
    check_step(op, dtypes, LARGE_SHAPES[shape], scalars, "contiguous")


@pytest.mark.parametrize("scalars", ["shared", "per_sample"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", STEP_DTYPES, ids=name)
@pytest.mark.parametrize("op", ops.UPDATES)
def test_updates(backend, op, dtypes, shape, scalars):
    for layout in layouts(SHAPES[shape]):
        check_update(op, dtypes, SHAPES[shape], scalars, partial(on_gpu, layout=layout))


@pytest.mark.parametrize("scalars", ["shared", "per_sample"])
@pytest.mark.parametrize("shape", LARGE_SHAPES)
@pytest.mark.parametrize("dtypes", LARGE_DTYPES, ids=name)
@pytest.mark.parametrize("op", ops.UPDATES)
def test_large_updates(backend, op, dtypes, shape, scalars):
    check_update(op, dtypes, LARGE_SHAPES[shape], scalars, Tensor.cuda)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 1e37], ids=["subnormal", "tiny", "huge", "largest"])
def test_l2_direction_survives_gradients_whose_squares_do_not(backend, scale):
    _, grad, x = (t.cuda() for t in step_inputs((4, 100), torch.float32, torch.float32))
    expected = ops.l2_step(x, grad, x, 0.5, 1.0)
    torch.testing.assert_close(ops.l2_step(x, grad * scale, x, 0.5, 1.0), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("op", ops.STEPS)
def test_nan_infinite_and_zero_gradients(backend, op):
    x = torch.rand(5, 50, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    grad = torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    grad[1], grad[2], grad[3, 7], grad[4, 9] = 0, math.nan, math.nan, math.inf
    expected = getattr(reference.step, op)(x, grad, x, 0.1, 0.2)
    result = getattr(ops, op)(x.cuda(), grad.cuda(), x.cuda(), 0.1, 0.2).cpu()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def check_start(op: str, dtype: torch.dtype, shape: tuple[int, ...], scalars: str, layout: str) -> None:
    x, seed = step_inputs(shape, dtype, dtype)[2], 2**64 - 12345
    eps, numbers, step = 0.3, None, 0
    if scalars == "per_sample":
        eps, numbers, step = torch.linspace(0, 0.5, len(x), dtype=torch.float64), sample_numbers(len(x)), 2**32 - 3
    on_device = None if numbers is None else on_gpu(numbers, "strided")
    before, more = ((eps, 0.0, 1.0, seed), (step,)) if op == "linf_start" else ((eps, seed), (step, 3))
    result = getattr(ops, op)(on_gpu(x, layout), *before, on_device, *more)
    expected = getattr(reference.step, op)(arrange(x.double(), layout), *before, numbers, *more)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double().cpu(), expected, rtol=ROUNDING[dtype] / 2, atol=ROUNDING[dtype] / 5)


@pytest.mark.parametrize("scalars", ["shared", "per_sample"])
@pytest.mark.parametrize("shape", SHAPES | LARGE_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("op", ops.STARTS)
def test_starts(backend, op, dtype, shape, scalars):
    shape = (SHAPES | LARGE_SHAPES)[shape]
    for layout in layouts(shape):
        check_start(op, dtype, shape, scalars, layout)


def loss_inputs(op: str, rows: int, classes: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """The arguments of a loss, on the CPU; "ce soft" is ce with soft labels."""
    z, y = logits_and_labels(rows + seed, classes, dtype)
    z, y = z[seed:].clone(), y[seed:].clone()
    if op in DIVERGENCES:
        return [z, logits_and_labels(rows + seed + 1, classes, dtype)[0][seed + 1 :].clone()]
    if op == "ce soft":
        return [z, logits_and_labels(rows + seed + 1, classes, torch.float32)[0][seed + 1 :].softmax(1)]
    return [z, y, (y + 1) % classes] if op == "dlr_targeted" else [z, y]


def wide(args: list[Tensor]) -> list[Tensor]:
    return [a.double() if a.is_floating_point() else a for a in args]


def check_loss(op: str, dtype: torch.dtype, rows: int, classes: int) -> None:
    args = loss_inputs(op, rows, classes, dtype)
    loss, grad = getattr(ops, op.split()[0])(*(a.cuda() for a in args))
    value, *_, dlogits = getattr(reference.loss, op.split()[0])(*wide(args))
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert grad.dtype == dtype
    scale = max(1.0, float(dlogits.abs().max())) if rows else 1.0  # dlr's gradients grow near ties

    def at(message: str) -> str:
        return f"at {classes} classes: {message}"

    rounding = ROUNDING[loss.dtype] * (4 if classes > 10_000 else 1)  # sums of so many terms round more
    torch.testing.assert_close(loss.double().cpu(), value, rtol=2 * rounding, atol=4 * rounding, msg=at)
    rounding = ROUNDING[dtype]
    torch.testing.assert_close(grad.double().cpu(), dlogits, rtol=rounding, atol=rounding * scale, msg=at)


@pytest.mark.parametrize("rows", [1, 7, 0, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("op", [*ops.LOSSES, "ce soft"])
def test_losses(backend, op, dtype, rows):
    for classes in CLASSES:
        check_loss(op, dtype, rows, classes)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("op", [*ops.LOSSES, "ce soft"])
def test_long_rows_and_many_rows(backend, op, dtype):
    for classes in LARGE_CLASSES:
        check_loss(op, dtype, 5, classes)
    check_loss(op, dtype, 70_001, 3)


@pytest.mark.parametrize("op", ops.LOSSES)
def test_losses_of_other_layouts_and_label_types_and_into_out(backend, op):
    args = [a.cuda() for a in loss_inputs(op, 7, 10, torch.float32)]
    expected = getattr(ops, op)(*args)
    out = (torch.full((7,), 9.0, device="cuda"), torch.full((7, 10), 9.0, device="cuda"))
    strided = [a.t().contiguous().t() if a.dim() == 2 else a.repeat_interleave(2)[::2] for a in args]
    narrow = [a if a.is_floating_point() else a.to(torch.uint8) for a in args]
    for given in (strided, narrow):
        result = getattr(ops, op)(*given, out=out)
        assert all(got is o and torch.equal(got, want) for got, o, want in zip(result, out, expected, strict=True))


@pytest.mark.parametrize("op", ["margin", "dlr", "dlr_targeted"])
def test_ties_go_to_the_first_class(backend, op):
    for classes in (6, 40, 300, 9000):
        args = [torch.zeros(1, classes), torch.tensor([2])] + [torch.tensor([4])] * (op == "dlr_targeted")
        expected = getattr(reference.loss, op)(*args)
        for got, want in zip(getattr(ops, op)(*(a.cuda() for a in args)), expected, strict=True):
            torch.testing.assert_close(got.cpu(), want)


@pytest.mark.parametrize("op", DIVERGENCES)
def test_divergences_survive_underflow_and_have_both_gradients(backend, op):
    z = torch.tensor([[200.0, 0.0, -200.0], [0.0, -math.inf, 3.0], [0.3, 0.1, 0.2]]).cuda().requires_grad_()
    other = torch.tensor([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0], [0.0, 1.0, 0.5]]).cuda().requires_grad_()
    loss, _ = getattr(ops, op)(z, other)
    weight = torch.tensor([1.0, -2.0, 3.0], device="cuda")
    loss.backward(weight)
    expected = getattr(reference.loss, op)(z.detach().cpu().double(), other.detach().cpu().double())
    for got, want in zip((z.grad, other.grad), expected[1:], strict=True):
        torch.testing.assert_close(got.cpu().double(), weight.cpu()[:, None] * want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", LABEL_LOSSES)
def test_labels_out_of_range_give_nan_rows_and_no_error(backend, op):
    """Refusing them, as on the CPU, would mean waiting for the GPU at every call."""
    for classes in (10, 100, 1000, 9000):
        args = [a.cuda() for a in loss_inputs(op, 8, classes, torch.float32)]
        expected = getattr(ops, op)(*args)
        args[-1][[1, 3, 4, 6]] = torch.tensor([-1, classes, 2**40, -(2**62)], device="cuda")
        loss, grad = getattr(ops, op)(*args)
        torch.cuda.synchronize()
        bad = torch.tensor([False, True, False, True, True, False, True, False], device="cuda")
        assert torch.equal(loss.isnan(), bad)
        assert torch.equal(grad.isnan(), bad[:, None].expand_as(grad))
        assert torch.equal(loss[~bad], expected[0][~bad])
        assert torch.equal(grad[~bad], expected[1][~bad])


# Layers of a ResNet and what else there is: a bias, a scalar, nothing, a tensor of more blocks than slices; more than a table.
WEIGHT_SHAPES = [
    (64, 3, 3, 3),
    (128, 64, 3, 3),
    (10, 512),
    (10,),
    (),
    (0, 3),
    (1500, 1501),
    *[(n % 9 + 1, 5) for n in range(90)],
]


def draw_weights(
    dtypes: tuple[torch.dtype, torch.dtype], seed: int = 0, shapes: Sequence[tuple[int, ...]] = WEIGHT_SHAPES
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """weights, grads and origins, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    weights, grads, origins = [], [], []
    for shape in shapes:
        origin, noise, grad = torch.randn(3, *shape, generator=generator)
        weights.append((origin + 0.01 * noise).to(dtypes[0]))
        grads.append(grad.to(dtypes[1]))
        origins.append(origin.to(dtypes[0]))
    return weights, grads, origins


def to_gpu(*lists: list[Tensor]) -> list[list[Tensor]]:
    return [[t.cuda() for t in tensors] for tensors in lists]


def check_weights(dtypes: tuple[torch.dtype, torch.dtype], layout: str = "contiguous", record: bool = False) -> None:
    weights, grads, origins = draw_weights(dtypes)
    around = weights if record else origins
    sums = reference.weights.weight_sums(*(wide(tensors) for tensors in (weights, grads, around)))
    expected = reference.weights.perturb(*(wide(tensors) for tensors in (weights, grads, around)), sums, 0.02, 0.03)
    w, g, o = (
        [on_gpu(t, layout if layout in layouts(t.shape) else "contiguous") for t in ts] for ts in (weights, grads, origins)
    )
    found = ops.weight_sums(w, g, o, record=record)
    torch.testing.assert_close(found.sum(1).cpu(), sums, rtol=1e-6, atol=1e-12)
    ops.perturb_(w, g, w if record else o, found, 0.02, 0.03)
    for got, want, backup, before in zip(w, expected, o, around, strict=True):
        torch.testing.assert_close(got.double().cpu(), want, rtol=ROUNDING[dtypes[0]], atol=ROUNDING[dtypes[0]])
        assert torch.equal(backup.cpu(), before)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtypes", STEP_DTYPES, ids=name)
def test_weights(backend, dtypes, layout, record):
    check_weights(dtypes, layout, record)


def test_weights_of_all_storage_types_at_once(backend):
    parts = [draw_weights(dtypes, shapes=[(5, 7), (40_000,)]) for dtypes in STEP_DTYPES]
    weights, grads, origins = ([t for part in parts for t in part[i]] for i in range(3))
    sums = reference.weights.weight_sums(wide(weights), wide(grads), wide(origins))
    expected = reference.weights.perturb(wide(weights), wide(grads), wide(origins), sums, 0.05, 0.03)
    w, g, o = to_gpu(weights, grads, origins)
    ops.perturb_(w, g, o, ops.weight_sums(w, g, o), 0.05, 0.03)
    for got, want in zip(w, expected, strict=True):
        torch.testing.assert_close(got.double().cpu(), want, rtol=ROUNDING[got.dtype], atol=ROUNDING[got.dtype])


# --------------------------------------------------------------------------------- streams, graphs, memory, waiting


def draw(op: str, seed: int, huge: bool = False) -> list[Tensor]:
    """Everything an op reads, on the GPU, per-sample sizes in two dtypes included."""
    if op == "awp":
        shapes = [(2000, 2001)] if huge else WEIGHT_SHAPES
        return [t.cuda() for row in zip(*draw_weights((torch.float32, torch.bfloat16), seed, shapes), strict=True) for t in row]
    if op in ops.LOSSES or op == "ce soft":
        rows, classes = (5, 21_841) if huge else (70, 1000)
        return [a.cuda() for a in loss_inputs(op, rows, classes, torch.float32, seed)]
    shape = LARGE_SHAPES["huge"] if huge else (9, 3, 65, 67)
    if op in ops.UPDATES:
        written, grad, x, flags = update_inputs(op, shape, torch.float32, torch.bfloat16)
        scalars = torch.tensor(UPDATE_SCALARS, dtype=torch.float64)[:, None] * torch.linspace(0.9, 1.1 + seed, len(x))
        grad, flags = grad.roll(seed, -1), [flag.roll(seed) for flag in flags]
        return [t.cuda() for t in (*written, grad, x, *scalars, *flags)]
    generator = torch.Generator().manual_seed(seed)
    x, noise, grad = torch.rand(shape, generator=generator), *torch.randn(2, *shape, generator=generator)
    alpha, eps = sizes("linf_step" if op in ops.STARTS else op, shape)
    factor = 0.5 + torch.rand(2, shape[0], dtype=torch.float64, generator=generator)
    scalars = [(alpha * factor[0]), (eps * factor[1]).float()]
    if op in ops.STARTS:
        return [t.cuda() for t in (x, scalars[1], sample_numbers(len(x)) + seed)]
    return [t.cuda() for t in (x + 0.1 * noise, grad, x, *scalars)]


def call(op: str, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    if op == "awp":  # one step with a backup, one more about it
        weights, grads, origins = (list(inputs[i::3]) for i in range(3))
        weights, backup = [w.clone() for w in weights], [torch.empty_like(o) for o in origins]
        ops.perturb_(weights, grads, weights, ops.weight_sums(weights, grads, backup, record=True), 0.02)
        ops.perturb_(weights, grads, origins, ops.weight_sums(weights, grads, origins), 0.02, 0.01)
        return (*weights, *backup)
    if op in ops.STEPS:
        return (getattr(ops, op)(*inputs, 0.0, 1.0),)
    if op in ops.UPDATES:
        count = 5 if op == "apgd_step" else 2
        written = [t.clone() for t in inputs[:count]]
        getattr(ops, f"{op}_")(*written, *inputs[count : count + 5], 0.0, 1.0, *inputs[count + 5 :])
        return tuple(written)
    if op == "linf_start":
        x, eps, numbers = inputs
        return (ops.linf_start(x, eps, 0.0, 1.0, 99, numbers, 3),)
    if op == "normal_start":
        x, std, numbers = inputs
        return (ops.normal_start(x, std, 99, numbers, 3, 2),)
    return getattr(ops, op.split()[0])(*inputs)


def same(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def set_to(inputs: list[Tensor], values: list[Tensor]) -> None:
    for t, value in zip(inputs, values, strict=True):
        t.copy_(value)


@pytest.mark.parametrize("op", EVERY_OP)
def test_ops_run_on_the_current_stream(backend, op):
    inputs, late = draw(op, 1), draw(op, 0)
    expected = call(op, late)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # on any other stream the op would read what stands there before the copy
        set_to(inputs, late)
        result = call(op, inputs)
    stream.synchronize()
    assert same(result, expected)


@pytest.mark.parametrize("op", EVERY_OP)
def test_replays_equal_eager_calls_and_take_no_memory(backend, op):
    """All inputs change between replays, alpha and eps too."""
    inputs, graph = draw(op, 0), torch.cuda.CUDAGraph()
    expected = [call(op, draw(op, seed)) for seed in range(3)]
    with torch.cuda.graph(graph):
        result = call(op, inputs)
    for seed in (1, 2, 0):
        set_to(inputs, draw(op, seed))
        graph.replay()
        assert same(result, expected[seed])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(100):
        graph.replay()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert same(result, expected[0])


@pytest.mark.parametrize("op", ops.STEPS)
def test_a_captured_step_replayed_is_an_attack(backend, op):
    """One step in place, alpha and eps 0-dim on the device: five replays are five steps, and alpha may fall on the way."""
    adv, grad, x, *_ = draw(op, 0)
    alpha, eps = (torch.tensor(v, device="cuda") for v in sizes(op, adv.shape))
    step_, eager, graph = getattr(ops, f"{op}_"), adv.clone(), torch.cuda.CUDAGraph()
    step_(adv.clone(), grad, x, alpha, eps, 0.0, 1.0)
    with torch.cuda.graph(graph):
        step_(adv, grad, x, alpha, eps, 0.0, 1.0)
    for i in range(5):
        grad.copy_(draw(op, i)[1])
        alpha.mul_(0.8)
        step_(eager, grad, x, float(alpha), eps, 0.0, 1.0)
        graph.replay()
        torch.testing.assert_close(adv, eager, rtol=0, atol=0 if op == "linf_step" else 1e-6)
    assert not torch.equal(adv, draw(op, 0)[0])


@pytest.mark.parametrize("op", EVERY_OP)
def test_eager_calls_keep_no_memory(backend, op):
    inputs = draw(op, 0)
    call(op, inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(100):
        call(op, inputs)
    assert torch.cuda.memory_allocated() == before


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Inside, whatever waits for the GPU raises."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", EVERY_OP)
def test_no_op_waits_for_the_gpu(backend, no_waiting, op):
    inputs = draw(op, 0)
    call(op, inputs)  # the first call may load and compile
    torch.cuda.set_sync_debug_mode("error")
    call(op, inputs)
    if op in ops.STEPS:
        adv, grad, x, *_ = inputs
        getattr(ops, f"{op}_")(adv, grad, x, 0.1, 0.2, 0.0, 1.0)


@pytest.mark.parametrize("op", [*ops.LOSSES, "ce soft"])
def test_no_backward_waits_for_the_gpu(backend, no_waiting, op):
    inputs = [t.requires_grad_(t.is_floating_point() and op != "ce soft") for t in draw(op, 0)]
    inputs[0].requires_grad_()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        call(op, inputs)[0].sum().backward()
    assert inputs[0].grad is not None


@pytest.mark.parametrize("huge", [False, True], ids=["usual", "huge"])
@pytest.mark.parametrize("op", EVERY_OP)
def test_results_are_the_same_bits_in_every_run(backend, op, huge):
    inputs = draw(op, 0, huge)
    first = call(op, inputs)
    for _ in range(5):
        assert same(call(op, inputs), first)


def test_compiled_code_runs_the_kernels():
    adv, grad, x, *_ = draw("linf_step", 0)
    logits, y = draw("ce", 0)

    def attack(adv: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, dlogits = ops.ce(logits, y)
        return ops.linf_step_(adv, 2 * grad, x, 0.02, 0.06, 0.0, 1.0), loss, dlogits

    expected = attack(adv.clone(), logits)
    assert same(torch.compile(attack, fullgraph=True)(adv.clone(), logits), expected)


# -------------------------------------------------------------------------------------------- alignment and size

POISON = 42.0
OFFSETS = (0, 1, 2, 3, 4, 5, 7, 8, 12, 16)


def surrounded(t: Tensor, offset: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A copy of t inside a poisoned buffer, `offset` elements from an aligned address; and the poison on both sides."""
    buffer = torch.full((t.numel() + 64,), POISON, dtype=t.dtype, device="cuda")
    inside = buffer[offset : offset + t.numel()].view(t.shape)
    inside.copy_(t)
    return inside, (buffer[:offset], buffer[offset + t.numel() :])


def is_poison(*sides: Tensor) -> bool:
    return all(bool((side == POISON).all()) for side in sides)


@pytest.mark.parametrize("size", [37, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("op", ops.STEPS)
def test_steps_write_nothing_outside_at_any_alignment(backend, op, dtype, size):
    adv, grad, x = step_inputs((3, size), dtype, dtype)
    expected = getattr(ops, op)(adv.cuda(), grad.cuda(), x.cuda(), 0.1, 0.2, 0.0, 1.0)
    for i, offset in enumerate(OFFSETS):
        inside, around = surrounded(adv, offset)
        misaligned_grad, _ = surrounded(grad, OFFSETS[(3 * i) % len(OFFSETS)])
        misaligned_x, _ = surrounded(x, OFFSETS[(7 * i) % len(OFFSETS)])
        getattr(ops, f"{op}_")(inside, misaligned_grad, misaligned_x, 0.1, 0.2, 0.0, 1.0)
        rounding = 0 if op == "linf_step" else ROUNDING[dtype]
        torch.testing.assert_close(inside, expected, rtol=rounding, atol=rounding)
        assert is_poison(*around)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_weights_write_nothing_outside_at_any_alignment(backend, dtype):
    for size in (1, 37, 48, 70_001):
        weights, grads, origins = draw_weights((dtype, dtype), shapes=[(size,)])
        given = to_gpu(weights, grads, origins)
        ops.perturb_(*given, ops.weight_sums(*given), 0.02, 0.03)
        for i, offset in enumerate(OFFSETS):
            inside, around = surrounded(weights[0], offset)
            misaligned_grad, _ = surrounded(grads[0], OFFSETS[(3 * i) % len(OFFSETS)])
            origin, _ = surrounded(origins[0], OFFSETS[(7 * i) % len(OFFSETS)])
            backup, around_backup = surrounded(origins[0], OFFSETS[(7 * i) % len(OFFSETS)])
            ops.weight_sums([inside], [misaligned_grad], [backup], record=True)
            assert torch.equal(backup, inside)
            ops.perturb_(
                [inside], [misaligned_grad], [origin], ops.weight_sums([inside], [misaligned_grad], [origin]), 0.02, 0.03
            )
            torch.testing.assert_close(inside, given[0][0], rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
            assert is_poison(*around, *around_backup)


@pytest.mark.parametrize("classes", [2, 10, 33, 100, 1000, 9000])
@pytest.mark.parametrize("op", ops.LOSSES)
def test_losses_write_nothing_outside_at_any_alignment(backend, op, classes):
    args = [a.cuda() for a in loss_inputs(op, 5, classes, torch.float32)]
    expected = getattr(ops, op)(*args)
    for offset in OFFSETS:
        given = [surrounded(a, offset)[0] if a.is_floating_point() else a for a in args]
        loss, around_loss = surrounded(torch.zeros(5), offset)
        grad, around_grad = surrounded(torch.zeros(5, classes), offset)
        getattr(ops, op)(*given, out=(loss, grad))
        rounding = ROUNDING[torch.float32]
        torch.testing.assert_close(loss, expected[0], rtol=2 * rounding, atol=4 * rounding)
        torch.testing.assert_close(grad, expected[1], rtol=rounding, atol=rounding * max(1.0, float(expected[1].abs().max())))
        assert is_poison(*around_loss, *around_grad)


@pytest.mark.parametrize("op", EVERY_OP)
def test_small_run(backend, op):
    """Each kernel on little data in tensors of exactly their size: what compute-sanitizer watches."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        if op == "awp":
            for record in (False, True):
                check_weights((dtype, dtype), record=record)
            continue
        if op in ops.LOSSES or op == "ce soft":
            for classes in (10, 100, 1000, 9000):
                check_loss(op, dtype, 5, classes)
            continue
        for shape in ((5, 3, 7, 9), (4, 3, 8, 8), (2, 3, 129, 131), (1, 200_000), (1, 200_003)):
            for scalars in ("shared", "per_sample"):
                if op in ops.UPDATES:
                    check_update(op, (dtype, dtype), shape, scalars, Tensor.cuda)
                elif op in ops.STARTS:
                    check_start(op, dtype, shape, scalars, "contiguous")
                else:
                    check_step(op, (dtype, dtype), shape, scalars, "contiguous")
    torch.cuda.synchronize()


def need_memory(gigabytes: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


SIZE = 2**31 + 9


def test_linf_step_of_more_than_two_to_the_31_elements(backend):
    need_memory(24)
    x = torch.rand(3, SIZE // 3, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(x)
    adv = x.clone()
    ops.linf_step_(adv, grad, x, 0.02, 0.06, 0.0, 1.0)
    for moved, g, c in zip(*(t.view(-1).split(2**27) for t in (adv, grad, x)), strict=True):
        assert torch.equal(moved, reference.step.linf_step(c, g, c, 0.02, 0.06, 0.0, 1.0))
    alpha = torch.tensor([0.01, 0.02, 0.03], device="cuda")
    ops.linf_step_(adv.copy_(x), grad, x, alpha, 2 * alpha, 0.0, 1.0)
    for i in range(3):
        for moved, g, c in zip(*(t[i].split(2**27) for t in (adv, grad, x)), strict=True):
            size = float(alpha[i])
            assert torch.equal(moved, reference.step.linf_step(c, g, c, size, 2 * size, 0.0, 1.0)), i


def test_l2_step_of_more_than_two_to_the_31_elements(backend):
    need_memory(10)
    adv = torch.full((1, SIZE), -0.5, dtype=torch.bfloat16, device="cuda")
    ops.l2_step_(adv, adv, adv, 0.25 * math.sqrt(SIZE), math.inf)
    assert all(bool((part == -0.75).all()) for part in adv[0].split(2**28))


def test_weights_of_more_than_two_to_the_31_elements(backend):
    need_memory(20)
    w = torch.full((SIZE,), -0.5, dtype=torch.bfloat16, device="cuda")
    backup = torch.empty_like(w)
    sums = ops.weight_sums([w], [w], [backup], record=True)
    assert sums.sum(1)[0].tolist() == [SIZE / 4, 0.0, 0.0, SIZE / 4]
    ops.perturb_([w], [backup], [w], sums, 0.5)
    assert all(bool((part == -0.75).all()) for part in w.split(2**28))
    assert all(bool((part == -0.5).all()) for part in backup.split(2**28))


def test_linf_start_of_more_than_two_to_the_31_elements(backend):
    need_memory(12)
    x = torch.full((2, SIZE // 2), 0.5, dtype=torch.bfloat16, device="cuda")
    started = ops.linf_start(x, 0.25, 0.0, 1.0, 7)
    for sample in (0, 1):
        for first in (0, SIZE // 4, SIZE // 2 - 64):
            e = torch.arange(first, first + 64)
            words = reference.step.philox(7, e // 4 & 0xFFFFFFFF, e // 4 >> 32, torch.full_like(e, sample), torch.zeros_like(e))
            word = torch.stack(words, 1).gather(1, (e % 4)[:, None])[:, 0]
            expected = 0.5 + 0.25 * ((word >> 8) - 2**23).float() * 2.0**-23
            got = started[sample, first : first + 64].float().cpu()
            torch.testing.assert_close(got, expected, rtol=ROUNDING[torch.bfloat16] / 2, atol=0)


def test_ce_of_more_than_two_to_the_31_logits(backend):
    need_memory(16)
    classes = 16_400
    rows = SIZE // classes + 1
    logits = torch.randn(rows, classes, dtype=torch.bfloat16, device="cuda")
    y = torch.randint(classes, (rows,), device="cuda")
    loss, grad = ops.ce(logits, y)
    for some in (slice(0, 5), slice(rows // 2, rows // 2 + 5), slice(rows - 5, rows)):
        value, dlogits = reference.loss.ce(logits[some].double(), y[some])
        torch.testing.assert_close(loss[some].double(), value, rtol=4e-6, atol=8e-6)
        torch.testing.assert_close(grad[some].double(), dlogits, rtol=1.6e-2, atol=1.6e-2 / classes)


# ------------------------------------------------------------------------------------------------------------ attacks


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "kl", "se"])
def test_attacks_run_and_stay_in_the_ball(backend, norm, loss):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10)).cuda()
    x, y = torch.rand(16, 3, 8, 8, device="cuda"), torch.randint(10, (16,), device="cuda")
    eps = {"linf": 0.1, "l2": 1.0, "l1": 5.0}[norm]
    x_adv = fastadv.pgd(model, x, y, eps, norm=norm, loss=loss)
    order = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    length = torch.linalg.vector_norm((x_adv - x).flatten(1).double(), order, dim=1)
    assert (length <= eps * (1 + 1e-5)).all()
    assert (length > 0).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


# ------------------------------------------------------------------------------------------------------------- the engine


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def attacked() -> tuple[torch.nn.Module, Tensor, Tensor]:
    x, y = batch(16)
    return cnn(dropout=0.0).cuda(), x.cuda(), y.cuda()


EXECUTIONS = [
    {},
    {"norm": "l2", "eps": 0.5},
    {"norm": "l1", "eps": 5.0},
    {"keep_best": True, "restarts": 2},
    {"early_stop": True},
    {"loss": "kl", "init": "normal"},
    {"loss": "dlr", "targeted": True},
    {"bn": "batch"},
    {"bn": "train"},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"memory": "signs"},
    {"twin": True},
    {"twin": True, "precision": "bf16"},
]


@pytest.mark.parametrize("options", EXECUTIONS, ids=str)
def test_replays_are_the_eager_attack_bit_for_bit(deterministic, options):
    """Also after the weights have changed in place; running statistics too."""
    (ours, x, y), (theirs, _, _) = attacked(), attacked()
    options = {"eps": 0.03, "steps": 4, **options}
    attacks = [
        fastadv.PGD(net, **options, engine=way, generator=torch.Generator("cuda").manual_seed(0))
        for net, way in ((ours, "graph"), (theirs, "eager"))
    ]
    for call in range(4):
        images = [attack(x.roll(call, 0), y) for attack in attacks]
        assert torch.equal(*images), call
        assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
        for net in (ours, theirs):
            for p in net.parameters():
                p.grad = torch.full_like(p, 0.1)
            torch.optim.SGD(net.parameters(), 0.1, fused=True).step()
            net.zero_grad()
    stats = attacks[0].stats
    assert stats.recorded >= 1
    assert stats.moved == 0
    assert stats.steps["graph, channels_last" if options.get("twin") else "graph"] > 0


def test_weights_that_move_are_recorded_again(deterministic):
    net, x, y = attacked()
    attack = fastadv.PGD(net, 0.03, init="zero", engine="graph")
    attack(x, y), attack(x, y)
    net[0].weight = torch.nn.Parameter(-net[0].weight.detach())
    assert torch.equal(attack(x, y), fastadv.pgd(net, x, y, 0.03, init="zero"))
    assert (attack.stats.recorded, attack.stats.moved) == (2, 1)


def test_recordings_share_memory_and_replays_take_none():
    """Of several attacks of one process, replayed in turns."""
    net, x, y = attacked()
    attacks = [fastadv.PGD(net, 0.03, norm=norm, init="zero", engine="graph") for norm in ("linf", "l2")]
    expected = [fastadv.PGD(net, 0.03, norm=norm, init="zero")(x, y) for norm in ("linf", "l2")]
    for attack in attacks * 2:
        attack(x, y)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(100):
        for attack, adv in zip(attacks, expected, strict=True):
            torch.testing.assert_close(attack(x, y), adv)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_thousands_of_calls_of_changing_sizes_leak_nothing():
    net = linear(features=4).cuda()
    x, y = torch.rand(40, 4, device="cuda"), torch.randint(10, (40,), device="cuda")
    attack = fastadv.PGD(net, 0.03, steps=1, init="zero", engine="graph")
    g = torch.Generator().manual_seed(0)
    reserved = []
    for i, n in enumerate((40 * torch.rand(10_000, generator=g) ** 3).int().add_(1).tolist()):
        attack(x[:n], y[:n])
        if i in (2999, 9999):
            torch.cuda.synchronize()
            reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] - reserved[0] <= 8 * 2**20
    assert attack.stats.recorded < 200


def test_a_step_that_waits_cannot_be_recorded_and_the_gpu_goes_on():
    net, x, y = attacked()

    def waits(logits: Tensor, y: Tensor | None) -> Tensor:
        return logits.sum(1) * float(logits.detach().sum())

    attack = fastadv.PGD(net, 0.03, loss=waits, engine="graph")
    attack(x, y)
    with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph"):
        attack(x, y)
    assert torch.isfinite(fastadv.pgd(net, x, y, 0.03)).all()


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"twin": True}, {"keep_best": True}], ids=str)
def test_compiled_attacks_are_replayed_and_the_same(options):
    net, x, y = attacked()
    attack = fastadv.PGD(net, 0.03, init="zero", engine="compile", **options)
    expected = fastadv.PGD(net, 0.03, init="zero", **options)(x, y)
    for _ in range(3):
        adv = attack(x, y)
    moves = [(images - x).flatten() for images in (adv, expected)]
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > (0.9 if "precision" in options else 0.999)
    assert any("compile, replayed" in plan for plan in attack.stats.steps)


def test_auto_measures_graphs_and_compilation(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTADV_CACHE", str(tmp_path))
    net, x, y = attacked()
    attack = fastadv.PGD(net, 0.03, init="zero", engine="auto")
    for _ in range(3):
        adv = attack(x, y)
    (times,) = attack.stats.choices.values()
    assert {"eager", "graph", "compile, replayed, channels_last"} <= times.keys()
    assert not attack.stats.failed
    torch.testing.assert_close(adv, fastadv.pgd(net, x, y, 0.03, init="zero"), atol=1e-4, rtol=0)
