"""What the shared table leaves out because only CUDA kernels have it: block shapes, on and off chip, vectors and tails.

Run by tests/test_cuda_host.py in a child process, where "cpp" kernels are the CUDA kernels (tests/cuda_host/plugin.py).
Tensors are exactly as large as they must be, so that ASAN's red zone begins at the element behind the last one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from table import ROUNDING, STEP_DTYPES, check_update, logits_and_labels, name, sample_numbers, step_inputs
from torch import Tensor

import fastadv
from fastadv import native, ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = {"a100": "0", "small": "1", "h100": "2"}  # cuda_host::devices
# In elements, of up to four tensors: all aligned, all not, each alone not, and by parts of 16 bytes that suit some types.
OFFSETS = ((0,) * 4, (1,) * 4, (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2, 4, 8, 2), (4, 8, 2, 4), (8,) * 4)
SIZES = {"linf_step": (0.02, 0.06), "l2_step": (0.5, 1.0), "l1_step": (2.0, 3.0)}  # alpha, eps


@pytest.fixture(autouse=True)
def _native_kernels():
    with fastadv.use_backend("cpp"):
        yield


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> str:
    monkeypatch.setenv("CUDA_HOST_DEVICE", DEVICES[request.param])
    return request.param


def at_offset(t: Tensor, offset: int) -> Tensor:
    """A copy of t, `offset` elements behind an aligned address, at the very end of its storage."""
    copy = torch.empty(offset + t.numel(), dtype=t.dtype)[offset:].view(t.shape)
    assert copy.data_ptr() % 16 == offset * t.element_size() % 16
    return copy.copy_(t)


def check_step(op: str, adv: Tensor, grad: Tensor, x: Tensor, **kwargs: object) -> None:
    alpha, eps = SIZES[op]
    result = getattr(ops, op)(adv, grad, x, alpha, eps, 0.0, 1.0, **kwargs)
    if op == "linf_step":
        assert torch.equal(result, reference.step.linf_step(adv, grad, x, alpha, eps, 0.0, 1.0))
    else:
        expected = getattr(reference.step, op)(adv.double(), grad.double(), x.double(), alpha, eps, 0.0, 1.0, **kwargs)
        rounding = ROUNDING[adv.dtype]
        torch.testing.assert_close(result.double(), expected, rtol=rounding, atol=rounding)


# ------------------------------------------------------------------------------------------------------------------ steps

# Beside a vector's edges: 84 fp32 elements, the last that fit on chip of the small device; 13,824 the same for the A100, 19,284
# for the H100; 2048 vectors are one chunk of off-chip sums.
L2_SIZES = (1, 3, 4, 8, 17, 80, 84, 85, 88, 511, 512, 513, 2049, 4100, 8192, 8193, 13_824, 13_825, 19_284, 19_285)


@pytest.mark.parametrize("size", L2_SIZES)
@pytest.mark.parametrize("dtypes", [STEP_DTYPES[0], STEP_DTYPES[1], (torch.float32, torch.bfloat16)], ids=name)
def test_l2_on_and_off_chip(device, dtypes, size):
    check_step("l2_step", *step_inputs((3, size), *dtypes))


@pytest.mark.parametrize("size", [40, 86, 96])
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-30, 1.0, 1e30, 1e37, math.inf, math.nan])
def test_l2_of_every_kind_of_gradient(device, scale, size):
    adv, grad, x = step_inputs((4, size), torch.float32, torch.float32)
    grad[1] *= scale
    grad[2, size // 2] = scale
    alpha, eps = torch.tensor([0.5, 0.5, 0.5, 0.0]), torch.tensor([1.0, 0.3, 1.0, 0.0])
    result = ops.l2_step(adv, grad, x, alpha, eps, 0.0, 1.0)
    expected = reference.step.l2_step(adv, grad, x, alpha, eps, 0.0, 1.0)
    torch.testing.assert_close(result, expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(result[3], x[3])


# A block of one warp, of two, of some, of as many as there can be, and one that turns its loops twice.
@pytest.mark.parametrize("size", [1, 2, 31, 128, 129, 1000, 4096, 5001])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_l1_in_blocks_of_every_size(dtype, size):
    check_step("l1_step", *step_inputs((2, size), dtype, dtype))
    check_step("l1_step", *step_inputs((2, size), dtype, dtype), fraction=1.0)


def test_l1_with_ties_walls_and_no_gradient():
    adv, grad, x = step_inputs((5, 300), torch.float32, torch.float32)
    grad[0] = 0
    grad[1] = 1
    grad[2, ::3] = math.nan
    adv[3], x[3] = 1, 1
    grad[4] *= 1e-40
    check_step("l1_step", adv, grad, x)


def check_alignments(op: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    alpha, eps = SIZES[op]
    alphas = torch.linspace(0.5, 1.0, 3) * alpha
    for size in (1, 3, 8, 37, 64):
        adv, grad, x = step_inputs((3, size), *dtypes)
        expected = getattr(ops, op)(adv, grad, x, alphas, eps, 0.0, 1.0)
        for *offsets, of_out in OFFSETS:
            placed = [at_offset(t, offset) for t, offset in zip((adv, grad, x), offsets, strict=True)]
            check_step(op, *placed)
            result = getattr(ops, op)(*placed, alphas, eps, 0.0, 1.0, out=at_offset(adv, of_out))
            rounding = 0 if op == "linf_step" else ROUNDING[adv.dtype]
            torch.testing.assert_close(result, expected, rtol=rounding, atol=rounding)
            assert torch.equal(getattr(ops, f"{op}_")(*placed, alphas, eps, 0.0, 1.0), result)


@pytest.mark.parametrize("dtypes", STEP_DTYPES, ids=name)
@pytest.mark.parametrize("op", ["linf_step", "l1_step"])
def test_steps_at_every_alignment(op, dtypes):
    check_alignments(op, dtypes)


@pytest.mark.parametrize("dtypes", STEP_DTYPES, ids=name)
def test_l2_steps_at_every_alignment(device, dtypes):
    check_alignments("l2_step", dtypes)


# Elements that no vector divides; one item a thread in the second pass and several; one chunk of sums, two, all of them.
@pytest.mark.parametrize("size", [1, 3, 8, 37, 64, 8192, 8193, 16_400, 2**19 + 5])
@pytest.mark.parametrize("dtypes", [STEP_DTYPES[0], STEP_DTYPES[1], (torch.float32, torch.bfloat16)], ids=name)
@pytest.mark.parametrize("op", ops.UPDATES)
def test_updates_of_samples_of_every_size(op, dtypes, size):
    check_update(op, dtypes, (2 if size > 1000 else 7, size), "per_sample")


@pytest.mark.parametrize("dtypes", STEP_DTYPES, ids=name)
@pytest.mark.parametrize("op", ops.UPDATES)
def test_updates_at_every_alignment(op, dtypes):
    for size in (1, 8, 37, 64):
        for offsets in OFFSETS:
            turn = itertools.cycle(offsets)
            check_update(op, dtypes, (3, size), place=lambda t, turn=turn: at_offset(t, next(turn)))


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8, 37, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_start_at_every_alignment(dtype, size):
    x = step_inputs((3, size), dtype, dtype)[2]
    for more in ((), (sample_numbers(3), 2**32 - 1)):
        arguments = (0.3, 0.0, 1.0, 5, *more)
        expected = ops.linf_start(x, *arguments)
        wide = reference.step.linf_start(x.double(), *arguments)
        torch.testing.assert_close(expected.double(), wide, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
        for of_x, of_out, of_numbers, _ in OFFSETS:
            arguments = (0.3, 0.0, 1.0, 5, *(at_offset(t, of_numbers) for t in more[:1]), *more[1:])
            assert torch.equal(ops.linf_start(at_offset(x, of_x), *arguments, out=at_offset(x, of_out)), expected)


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8, 37, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_noise_at_every_alignment(dtype, size):
    x, copies = step_inputs((3, size), dtype, dtype)[2], 3
    room = torch.empty(3 * copies, size, dtype=dtype)
    expected = ops.normal_start(x, 0.3, 5, sample_numbers(3), 2**32 - 2, copies)
    wide = reference.step.normal_start(x.double(), 0.3, 5, sample_numbers(3), 2**32 - 2, copies)
    torch.testing.assert_close(expected.double(), wide, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    for of_x, of_out, of_numbers, _ in OFFSETS:
        numbers, out = at_offset(sample_numbers(3), of_numbers), at_offset(room, of_out)
        assert torch.equal(ops.normal_start(at_offset(x, of_x), 0.3, 5, numbers, 2**32 - 2, copies, out=out), expected)


def test_more_samples_than_a_grid_has_rows():
    samples = 65_537
    adv, grad, x = step_inputs((samples, 2), torch.float32, torch.float32)
    eps = torch.linspace(0, 0.2, samples, dtype=torch.float64)
    assert torch.equal(ops.linf_step(adv, grad, x, 0.1, eps), reference.step.linf_step(adv, grad, x, 0.1, eps))
    for more in ((), (sample_numbers(samples),)):
        started = ops.linf_start(x, eps, 0.0, 1.0, 3, *more)
        torch.testing.assert_close(started, reference.step.linf_start(x, eps, 0.0, 1.0, 3, *more), rtol=1e-6, atol=1e-6)
    x, eps = x[: samples // 2 + 1], eps[: samples // 2 + 1]
    noisy = ops.normal_start(x, eps, 3, copies=2)
    torch.testing.assert_close(noisy, reference.step.normal_start(x, eps, 3, copies=2), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- weights


def weight_tensors(sizes: Sequence[int], dtypes: tuple[torch.dtype, torch.dtype], offsets: Sequence[int] = (0, 0, 0)):
    """weights, grads and origins, each at its offset."""
    lists: tuple[list[Tensor], ...] = ([], [], [])
    for size in sizes:
        w, g, o = step_inputs((1, size), *dtypes)
        for tensors, t, offset in zip(lists, (w[0], g[0], o[0]), offsets, strict=True):
            tensors.append(at_offset(t, offset))
    return lists


def check_weights(weights: list[Tensor], grads: list[Tensor], origins: list[Tensor], slices: int) -> None:
    """Sums in that many slices, with a backup and without, and the step from them."""
    wide = [[t.double() for t in tensors] for tensors in (weights, grads, origins)]
    for record, own in ((False, False), (False, True), (True, False)):
        backup = [o.clone() for o in origins]
        sums = torch.full((len(weights), slices, 4), math.nan, dtype=torch.float64)
        native.weight_sums(sums, weights, grads, weights if own else backup, record)
        expected = reference.weights.weight_sums(wide[0], wide[1], wide[0] if own or record else wide[2])
        torch.testing.assert_close(sums.sum(1), expected, rtol=1e-12, atol=1e-300)
        assert all(torch.equal(b, w if record else o) for b, w, o in zip(backup, weights, origins, strict=True))
        moved = [at_offset(w, w.storage_offset()) for w in weights]
        native.perturb(moved, grads, moved if own or record else origins, sums, 0.02, 0.03)
        around = wide[0] if own or record else wide[2]
        for m, want in zip(moved, reference.weights.perturb(wide[0], wide[1], around, expected, 0.02, 0.03), strict=True):
            torch.testing.assert_close(m.double(), want, rtol=ROUNDING[m.dtype], atol=ROUNDING[m.dtype])


# 8192 elements are a block's, so two, three and five blocks, beside blocks that stride because there are no more slices.
@pytest.mark.parametrize("slices", [1, 2, 3, 7, 300])
@pytest.mark.parametrize("dtypes", [STEP_DTYPES[0], STEP_DTYPES[1], (torch.float32, torch.bfloat16)], ids=name)
def test_weights_in_slices(dtypes, slices):
    check_weights(*weight_tensors((8191, 1, 0, 8192, 8193, 33_000, 4, 5), dtypes), slices)


@pytest.mark.parametrize("dtypes", STEP_DTYPES, ids=name)
def test_weights_at_every_alignment(dtypes):
    for offsets in {o[:3] for o in OFFSETS}:
        check_weights(*weight_tensors((1, 3, 8, 37, 64, 1027), dtypes, offsets), 2)


@pytest.mark.parametrize("count", [1, 2, 87, 88, 89, 176, 177, 200])
def test_weights_in_tables(count):
    sizes = [(17 * i) % 23 for i in range(count)]
    sizes[-1] = 8200
    check_weights(*weight_tensors(sizes, (torch.float32, torch.float32)), 3)


def test_the_backup_of_weights_is_theirs_bit_for_bit():
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        weights = [bits.view(dtype)]
        backup = [torch.empty_like(weights[0])]
        native.weight_sums(torch.empty(1, 2, 4, dtype=torch.float64), weights, weights, backup, True)
        assert torch.equal(backup[0].view(torch.int16), bits)


# ----------------------------------------------------------------------------------------------------------------- losses

LOSSES = (*ops.LOSSES, "soft ce")
# Four lanes a row, up to a warp a row, a block a row of one warp more each 256 classes, and rows that are streamed.
CLASSES = (2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 256, 257, 511, 512, 1000, 2047)
MANY_CLASSES = (2048, 4095, 4096, 4097, 10_000)


def run_loss(op: str, z: Tensor, rest: tuple[Tensor, ...], offsets: tuple[int, ...] = OFFSETS[0]) -> tuple[Tensor, ...]:
    """loss, the gradients that exist (of the reference's logits first) and of the logits, all at offsets."""
    of_logits, of_grad, of_ref, of_grad_ref = offsets
    loss = at_offset(torch.full((len(z),), 7.0, dtype=torch.promote_types(z.dtype, torch.float32)), of_ref)
    grad, grad_ref = (at_offset(torch.full_like(z, 7.0), offset) for offset in (of_grad, of_grad_ref))
    z, rest = at_offset(z, of_logits), tuple(at_offset(t, of_ref) for t in rest)
    function = getattr(native, op.removeprefix("soft "))
    if op in ("kl", "se"):
        function(loss, grad, z, logits_ref=rest[0], grad_ref=grad_ref)
        return loss, grad_ref, grad
    function(loss, grad, z, y=rest[0], target=rest[1] if len(rest) > 1 else None)
    return loss, grad


def loss_inputs(op: str, rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    z, y = logits_and_labels(rows, classes, dtype)
    if op in ("kl", "se"):
        return z, (logits_and_labels(rows + 1, classes, dtype)[0][:rows],)
    if op == "soft ce":
        soft = logits_and_labels(rows + 2, classes, torch.promote_types(dtype, torch.float32))[0][:rows].softmax(1)
        soft[:, classes // 2] = 0
        return z, (soft,)
    return z, (y, (y + 1) % classes) if op == "dlr_targeted" else (y,)


def check_loss(op: str, rows: int, classes: int, dtype: torch.dtype, offsets: tuple[int, ...] = OFFSETS[0]) -> None:
    z, rest = loss_inputs(op, rows, classes, dtype)
    result = run_loss(op, z, rest, offsets)
    wide = [z.double(), *(t.double() if t.is_floating_point() else t for t in rest)]
    if op in ("kl", "se"):
        wide.reverse()
    expected = getattr(reference.loss, op.removeprefix("soft "))(*wide)
    # A sum of n terms rounds like the square root of n at best; rows in the table have up to 1000.
    more = max(1.0, math.sqrt(classes / 1000))
    for got, want in zip(result, expected, strict=True):
        want = want.to(got.dtype).double()  # dlr's gradients at a tie are infinite in fp16
        rounding = ROUNDING[got.dtype] * more
        scale = max(1.0, float(want.abs().max()))
        message = f"{op}, {classes} classes, offsets {offsets}"
        torch.testing.assert_close(
            got.double(), want, rtol=2 * rounding, atol=2 * rounding * scale, msg=lambda m, where=message: f"{where}: {m}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("op", LOSSES)
def test_losses_at_every_number_of_classes(op, dtype):
    for classes in CLASSES:
        check_loss(op, 5, classes, dtype)


@pytest.mark.parametrize("classes", MANY_CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("op", LOSSES)
def test_losses_of_long_rows(op, dtype, classes):
    check_loss(op, 2, classes, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("op", LOSSES)
def test_losses_at_every_alignment(op, dtype):
    for classes in (8, 10, 24, 128, 136, 300):
        for offsets in OFFSETS:
            check_loss(op, 3, classes, dtype, offsets)


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 65])
@pytest.mark.parametrize("op", LOSSES)
def test_losses_with_blocks_partly_full(op, rows):
    for classes in (10, 40, 130):
        check_loss(op, rows, classes, torch.float32)


@pytest.mark.parametrize("label", [-1, -(2**63), 0, 2**31, 2**40, 2**63 - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name)
@pytest.mark.parametrize("op", ["ce", "log_odds", "margin", "dlr", "dlr_targeted"])
def test_a_label_that_is_no_class_makes_its_row_nan(op, dtype, label):
    for classes in (2, 4, 10, 32, 100, 300, 8200):
        z, rest = loss_inputs(op, 6, classes, dtype)
        good = run_loss(op, z, rest)
        for which in range(len(rest)):
            wrong = [t.clone() for t in rest]
            wrong[which][2] = label or classes  # 0 stands for the first number that is too large
            bad = run_loss(op, z, tuple(wrong))
            others = torch.arange(6) != 2
            for g, b in zip(good, bad, strict=True):
                assert b[2].isnan().all()
                assert torch.equal(g[others], b[others])


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("op", LOSSES)
def test_special_logits_stay_in_their_row(op, special):
    for classes in (5, 16, 40, 200, 8200):
        z, rest = loss_inputs(op, 6, classes, torch.float32)
        good = run_loss(op, z, rest)
        z[2, classes // 2] = special
        z[4] = special
        others = torch.tensor([0, 1, 3, 5])
        for g, b in zip(good, run_loss(op, z, rest), strict=True):
            assert torch.equal(g[others], b[others])


@pytest.mark.parametrize("op", ["margin", "dlr", "dlr_targeted"])
def test_ties_go_to_the_first_class_in_rows_of_every_length(op):
    for classes in (6, 20, 130, 1000, 8200):
        z, y = torch.zeros(3, classes), torch.tensor([0, 2, classes - 1])
        rest = (y, (y + 3) % classes) if op == "dlr_targeted" else (y,)
        for got, want in zip(run_loss(op, z, rest), getattr(reference.loss, op)(z, *rest), strict=True):
            torch.testing.assert_close(got, want)
