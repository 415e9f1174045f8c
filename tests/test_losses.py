"""The loss family: every backend against the reference, and the reference against autograd on the plain formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from table import BACKENDS, CLASSES, LONG_ROW, ROUNDING, logits_and_labels, name, need_backend
from torch import Tensor

import fastadv
from fastadv import ops
from fastadv.reference import loss as reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LABEL_LOSSES = ("ce", "log_odds", "margin", "dlr", "dlr_targeted")
DIVERGENCES = ("kl", "se")


def arguments(op: str, rows: int, classes: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, ...]:
    z, y = logits_and_labels(rows, classes, dtype, scale)
    if op in DIVERGENCES:
        return z, logits_and_labels(rows + 1, classes, dtype, scale)[0][:rows].clone()
    return (z, y, (y + 1) % classes) if op == "dlr_targeted" else (z, y)


def run(op: str, backend: str, *args: Tensor) -> tuple[Tensor, Tensor]:
    need_backend(op, backend)
    with fastadv.use_backend(backend):
        return getattr(ops, op)(*args)


def plain_formula(op: str, z: Tensor, *rest: Tensor) -> Tensor:
    """Each loss written down again, differentiable: what the closed-form gradients must agree with."""
    if op in DIVERGENCES:
        p, q = z.softmax(1), rest[0].softmax(1)
        return (p * (p.log() - q.log())).sum(1) if op == "kl" else (q - p).square().sum(1)
    y = rest[0]
    own = z.gather(1, y[:, None]).squeeze(1)
    others = z.masked_fill(F.one_hot(y, z.shape[1]).bool(), -math.inf)
    ranked = z.sort(1, descending=True).values
    if op == "ce":
        return F.cross_entropy(z, y, reduction="none")
    if op == "log_odds":
        p = z.softmax(1).gather(1, y[:, None]).squeeze(1)
        return torch.log((1 - p) / p)
    rise = others.amax(1) - own if op != "dlr_targeted" else z.gather(1, rest[1][:, None]).squeeze(1) - own
    if op == "dlr" and z.shape[1] >= 3:
        return rise / (ranked[:, 0] - ranked[:, 2] + 1e-12)
    if op == "dlr_targeted" and z.shape[1] >= 4:
        return rise / (ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2 + 1e-12)
    return rise


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("op", [*LABEL_LOSSES, *DIVERGENCES])
def test_reference_is_the_formula_and_its_derivative(op, classes):
    args = [a.clone().requires_grad_(a.is_floating_point()) for a in arguments(op, 40, classes, torch.float64, scale=1.0)]
    value = plain_formula(op, *args)
    inputs = [a for a in args if a.requires_grad]
    expected = torch.autograd.grad(value.sum(), inputs)
    loss, *grads = getattr(reference, op)(*(a.detach() for a in args))
    torch.testing.assert_close(loss, value.detach(), rtol=1e-9, atol=1e-12)
    for grad, by_autograd in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, by_autograd, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 0, 70], ids=["one", "odd", "empty", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [*LABEL_LOSSES, *DIVERGENCES])
def test_every_backend_computes_the_reference_in_float64(op, backend, dtype, rows):
    slow = backend == "triton" and (rows == 70 or dtype.itemsize == 2)  # in the interpreter
    for classes in (10, 100) if slow else (*CLASSES, LONG_ROW):
        args = arguments(op, rows, classes, dtype)
        loss, grad = run(op, backend, *args)
        value, *_, dlogits = getattr(reference, op)(*(a.double() if a.is_floating_point() else a for a in args))
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert grad.dtype == dtype
        scale = max(1.0, float(dlogits.abs().max())) if rows else 1.0  # dlr's gradients grow near ties
        rounding = ROUNDING[loss.dtype]
        torch.testing.assert_close(loss.double(), value, rtol=2 * rounding, atol=4 * rounding, msg=in_class(classes))
        rounding = ROUNDING[dtype]
        torch.testing.assert_close(grad.double(), dlogits, rtol=rounding, atol=rounding * scale, msg=in_class(classes))


def in_class(classes: int) -> Callable[[str], str]:
    return lambda message: f"at {classes} classes: {message}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [10, LONG_ROW])
def test_soft_labels(backend, classes):
    z, _ = logits_and_labels(9, classes, torch.float64)
    soft = (10 * torch.rand(9, classes, dtype=torch.float64)).softmax(1)
    z.requires_grad_()
    value = F.cross_entropy(z, soft, reduction="none")
    (expected,) = torch.autograd.grad(value.sum(), z)
    loss, grad = run("ce", backend, z.detach(), soft)
    torch.testing.assert_close(loss, value.detach())
    torch.testing.assert_close(grad, expected)
    hard = soft.argmax(1)
    one_hot = F.one_hot(hard, classes).double()
    for a, b in zip(run("ce", backend, z.detach(), one_hot), run("ce", backend, z.detach(), hard), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=name)
def test_integer_labels_of_any_width(backend, dtype):
    z, y = logits_and_labels(9, 10, torch.float32)
    for op in ("ce", "log_odds", "margin", "dlr"):
        assert torch.equal(run(op, backend, z, y.to(dtype))[1], run(op, backend, z, y)[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["margin", "dlr", "dlr_targeted"])
def test_ties_go_to_the_first_class(op, backend):
    z = torch.zeros(1, 6)
    y, target = torch.tensor([2]), torch.tensor([4])
    args = (z, y, target) if op == "dlr_targeted" else (z, y)
    expected = getattr(reference, op)(*args)
    if op == "margin":
        assert expected[1].tolist() == [[1, 0, -1, 0, 0, 0]]
    loss, grad = run(op, backend, *args)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grad, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_are_found_across_a_long_row(backend):
    """Ties between chunks, the best in the last one, classes of logit -inf."""
    z = torch.full((3, LONG_ROW), -math.inf)
    z[0, [5, 8500, 8600]] = torch.tensor([1.0, 1.0, 2.0])
    z[1, [8999, 8400, 8300, 3]] = torch.tensor([4.0, 4.0, 4.0, 4.0])
    z[2] = torch.arange(LONG_ROW).float().fmod(4500)  # 4499 at 4499 and 8999
    y, target = torch.tensor([8600, 3, 8998]), torch.tensor([5, 8999, 0])
    for op, args in (("margin", (z, y)), ("dlr", (z, y)), ("dlr_targeted", (z[1:], y[1:], target[1:]))):
        for got, want in zip(run(op, backend, *args), getattr(reference, op)(*args), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["ce", "log_odds", *DIVERGENCES])
def test_a_long_row_may_begin_with_impossible_classes(op, backend):
    """A running maximum that is -inf after the first chunk."""
    z, other = arguments(op, 2, LONG_ROW, torch.float64)
    z[:, :5000] = -math.inf
    args = (z, other) if op in DIVERGENCES else (z, other % 3000 + 6000)
    value, *_, dlogits = getattr(reference, op)(*args)
    loss, grad = run(op, backend, *args)
    torch.testing.assert_close(loss, value)
    torch.testing.assert_close(grad, dlogits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [5, 10, 300, LONG_ROW])
@pytest.mark.parametrize("op", [*LABEL_LOSSES, *DIVERGENCES])
def test_a_nan_logit_makes_the_loss_of_its_row_nan(op, classes, backend):
    """Whatever class it is of: a broken model is seen, and no comparison with NaN hides it."""
    args = arguments(op, 5, classes, torch.float32)
    expected = run(op, backend, *args)
    for i in range(2 if op in DIVERGENCES else 1):
        for k in range(3 if classes < LONG_ROW else 1):  # of some rows the label's
            broken = [a.clone() for a in args]
            broken[i][[1, 3], [k, classes - 1 - k]] = math.nan
            loss, dlogits = run(op, backend, *broken)
            assert loss.isnan().tolist() == [False, True, False, True, False]
            assert torch.equal(dlogits[::2], expected[1][::2])


@pytest.mark.parametrize("op", LABEL_LOSSES)
@pytest.mark.parametrize("classes", [5, 10, LONG_ROW])
def test_a_label_out_of_range_makes_its_row_nan_where_it_cannot_be_refused(op, classes):
    """CPU kernels refuse it; a kernel on a GPU cannot say so without stopping the stream."""
    args = arguments(op, 4, classes, torch.float32)
    expected = run(op, "triton", *args)
    for bad in (-1, classes, 2**40, -(2**40)) if classes < LONG_ROW else (classes,):
        for i in range(1, len(args)):
            wrong = [a.clone() for a in args]
            wrong[i][2] = bad
            for got, want in zip(run(op, "triton", *wrong), expected, strict=True):
                assert got[2].isnan().all()
                assert torch.equal(got[[0, 1, 3]], want[[0, 1, 3]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [2, 10, 1000, LONG_ROW])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("op", DIVERGENCES)
def test_divergences_have_both_gradients(op, dtype, classes, backend):
    z, w = (a.requires_grad_() for a in arguments(op, 3, classes, dtype))
    need_backend(op, backend)
    with fastadv.use_backend(backend):
        loss = getattr(ops, op)(z, w)[0]
        loss.sum().backward()
    value, d_ref, d_logits = getattr(reference, op)(z.detach().double(), w.detach().double())
    torch.testing.assert_close(loss.double(), value, rtol=2 * ROUNDING[loss.dtype], atol=4 * ROUNDING[loss.dtype])
    for got, want in ((z.grad, d_ref), (w.grad, d_logits)):
        torch.testing.assert_close(got.double(), want, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_odds_is_cross_entropys_direction_and_does_not_saturate(backend):
    z, y = logits_and_labels(50, 10, torch.float64, scale=1.0)
    _, ce = run("ce", backend, z, y)
    loss, odds = run("log_odds", backend, z, y)
    torch.testing.assert_close(F.normalize(odds), F.normalize(ce))
    torch.testing.assert_close(F.softplus(loss), run("ce", backend, z, y)[0])
    confident = torch.zeros(1, 10)
    confident[0, 3], confident[0, 5] = 1000.0, 1.0
    label = torch.tensor([3])
    assert run("ce", backend, confident, label)[1].abs().max() == 0  # what freezes other attacks
    assert run("log_odds", backend, confident, label)[1][0, 3] == -1
    assert run("log_odds", backend, confident, label)[0] < -900


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", DIVERGENCES)
def test_divergences_survive_underflowing_probabilities(op, backend):
    """torch's kl_div has NaN gradients here (TRADES issue 30)."""
    z = torch.tensor([[200.0, 0.0, -200.0], [0.0, -math.inf, 3.0]], requires_grad=True)
    other = torch.tensor([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]], requires_grad=True)
    need_backend(op, backend)
    with fastadv.use_backend(backend):
        loss, grad = getattr(ops, op)(z, other)
        loss.sum().backward()
    for t in (loss, grad, z.grad, other.grad):
        assert t.isfinite().all()


@pytest.mark.parametrize("op", [*LABEL_LOSSES, *DIVERGENCES])
@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_written_and_other_layouts_are_read(op, backend):
    args = arguments(op, 7, 10, torch.float32)
    expected = run(op, backend, *args)
    out = (torch.full((7,), 9.0), torch.full((7, 10), 9.0))
    strided = [a.t().contiguous().t() if a.dim() == 2 else a.repeat_interleave(2)[::2] for a in args]
    with fastadv.use_backend(backend):
        result = getattr(ops, op)(*strided, out=out)
    for got, want, given in zip(result, expected, out, strict=True):
        assert got is given
        assert torch.equal(got, want)


def test_mixed_precision_divergence_is_computed_in_the_wider_type():
    z, w = arguments("kl", 5, 10, torch.float32)
    expected = run("kl", "cpp", z.bfloat16().float(), w)
    for got, want in zip(run("kl", "cpp", z.bfloat16(), w), expected, strict=True):
        assert torch.equal(got, want)


Z, Y = torch.rand(3, 5), torch.tensor([0, 1, 2])
BAD = {
    "logits of one class": (lambda: ops.ce(Z[:, :1], Y), ValueError, r"\[N, C\] with C >= 2"),
    "flat logits": (lambda: ops.ce(Z[0], Y), ValueError, r"\[N, C\]"),
    "integer logits": (lambda: ops.ce(Z.long(), Y), ValueError, "floating"),
    "too few labels": (lambda: ops.ce(Z, Y[:2]), ValueError, r"integer labels \[3\] or soft labels \[3, 5\]"),
    "boolean labels": (lambda: ops.ce(Z, Y.bool()), ValueError, "integer labels"),
    "float labels": (lambda: ops.ce(Z, Y.float()), ValueError, "soft labels"),
    "soft labels where none are": (lambda: ops.margin(Z, Z), ValueError, r"margin: y must be integer labels \[3\]; got"),
    "labels elsewhere": (lambda: ops.ce(Z, Y.to("meta")), ValueError, "y must be on cpu"),
    "target shape": (lambda: ops.dlr_targeted(Z, Y, Y[:1]), ValueError, "target must be integer labels"),
    "label too large": (lambda: ops.ce(Z, Y + 3), IndexError, r"y\[2\] = 5 is outside \[0, 5\)"),
    "negative label": (lambda: ops.log_odds(Z, Y - 1), IndexError, r"y\[0\] = -1"),
    "target too large": (lambda: ops.dlr_targeted(Z, Y, Y + 4), IndexError, r"target\[1\] = 5"),
    "divergence shapes": (lambda: ops.kl(Z, Z[:2]), ValueError, "one shape and device"),
    "out shape": (lambda: ops.ce(Z, Y, out=(torch.empty(3), torch.empty(3, 4))), ValueError, "out dlogits must be"),
    "out with gradient": (lambda: ops.ce(Z.clone().requires_grad_(), Y, out=(Z[0], Z)), ValueError, "out= takes no part"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
