"""What torch sees of the ops: schemas, fake tensors, autograd, torch.compile, version counters."""

from __future__ import annotations

import pytest
import torch
from table import UPDATE_SCALARS, logits_and_labels, step_inputs, update_inputs
from torch.library import opcheck

from fastadv import ops

LABEL_LOSSES = ("ce", "log_odds", "margin", "dlr", "dlr_targeted")
DIVERGENCES = ("kl", "se")


def label_arguments(op: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    z, y = logits_and_labels(6, 5, dtype)
    z.requires_grad_()
    return (z, y, (y + 1) % 5) if op == "dlr_targeted" else (z, y)


def test_every_op_is_registered():
    steps = (f"{step}_" for step in (*ops.STEPS, *ops.UPDATES))
    for name in (*steps, *ops.STARTS, *ops.HYPERPLANES, *ops.LOSSES, "weight_sums", "perturb_"):
        assert hasattr(torch.ops.fastadv, name)
        assert hasattr(ops, name)


@pytest.mark.parametrize("op", ops.STEPS)
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per_sample"])
def test_opcheck_steps(op, per_sample):
    adv, grad, x = step_inputs((4, 3, 5, 5), torch.float32, torch.float32)
    extra = (0.1,) if op == "l1_step" else ()
    scalars = (torch.rand(4), torch.rand(4)) if per_sample else (None, None)
    opcheck(getattr(torch.ops.fastadv, f"{op}_").default, (adv, grad, x, 0.1, 0.2, 0.0, 1.0, *extra, *scalars))


@pytest.mark.parametrize("op", ops.UPDATES)
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per_sample"])
def test_opcheck_updates(op, per_sample):
    written, grad, x, flags = update_inputs(op, (4, 3, 5, 5), torch.float32, torch.bfloat16)
    scalars = [torch.rand(4) if per_sample else None] * 3
    opcheck(getattr(torch.ops.fastadv, f"{op}_").default, (*written, grad, x, *UPDATE_SCALARS, 0.0, 1.0, *flags, *scalars))


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per_sample"])
def test_opcheck_start(per_sample):
    numbers, radii = (torch.arange(4) + 2**40, torch.rand(4)) if per_sample else (None, None)
    opcheck(torch.ops.fastadv.linf_start.default, (torch.rand(4, 3, 5, 5), 0.1, 0.0, 1.0, -9, numbers, 7, radii))
    for x in (torch.rand(4, 3, 5, 5), torch.rand(4, 3, 5, 5).to(memory_format=torch.channels_last)):
        opcheck(torch.ops.fastadv.normal_start.default, (x, 0.1, -9, numbers, 7, 3, radii))


@pytest.mark.parametrize("op", LABEL_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_label_losses(op, dtype):
    opcheck(getattr(torch.ops.fastadv, op).default, label_arguments(op, dtype))


@pytest.mark.parametrize("op", DIVERGENCES)
@pytest.mark.parametrize("ref_grad", [False, True])
def test_opcheck_divergences(op, ref_grad):
    z, w = (logits_and_labels(n, 5, torch.float32)[0][:6] for n in (6, 7))
    opcheck(getattr(torch.ops.fastadv, op).default, (z.requires_grad_(ref_grad), w.requires_grad_(), ref_grad))


@pytest.mark.parametrize("op", LABEL_LOSSES)
def test_gradcheck_label_losses(op):
    z, *labels = label_arguments(op, torch.float64)
    assert torch.autograd.gradcheck(lambda z: getattr(ops, op)(z, *labels)[0], z)


@pytest.mark.parametrize("op", DIVERGENCES)
def test_gradcheck_divergences_in_both_arguments(op):
    z, w = (logits_and_labels(n, 5, torch.float64)[0][:6].requires_grad_() for n in (6, 7))
    assert torch.autograd.gradcheck(lambda z, w: getattr(ops, op)(z, w)[0], (z, w))


@pytest.mark.parametrize("op", [*LABEL_LOSSES, *DIVERGENCES])
def test_gradient_is_scaled_row_by_row_and_dlogits_is_constant(op):
    args = (
        label_arguments(op) if op in LABEL_LOSSES else (logits_and_labels(7, 5, torch.float32)[0][:6], label_arguments("ce")[0])
    )
    logits = args[0] if op in LABEL_LOSSES else args[1]
    loss, dlogits = getattr(ops, op)(*args)
    assert not dlogits.requires_grad
    weights = torch.arange(6.0)  # the loss is not the last op
    (weights * loss).sum().backward()
    torch.testing.assert_close(logits.grad, weights[:, None] * dlogits)


@pytest.mark.parametrize("op", [*LABEL_LOSSES, *DIVERGENCES])
def test_a_second_derivative_is_refused_rather_than_wrong(op):
    args = (
        label_arguments(op) if op in LABEL_LOSSES else (logits_and_labels(7, 5, torch.float32)[0][:6], label_arguments("ce")[0])
    )
    loss, _ = getattr(ops, op)(*args)
    with pytest.raises(RuntimeError, match=f"fastadv.ops.{op} has no second derivative"):
        torch.autograd.grad(loss.sum(), [a for a in args if a.requires_grad], create_graph=True)


def test_whole_step_compiles_without_graph_breaks():
    adv, grad, x = step_inputs((4, 3, 5, 5), torch.float32, torch.float32)
    z, y = logits_and_labels(4, 5, torch.float32)
    w = z.flip(0).clone().requires_grad_()

    def step(adv, grad, x, z, w):
        ops.linf_step_(adv, grad, x, 0.1, 0.2, 0.0, 1.0)
        moved = ops.l2_step(adv, grad, ops.linf_start(x, 0.1, 0.0, 1.0, 5), torch.ones(4), 0.2)
        loss, dlogits = ops.ce(z, y)
        return moved, loss.sum() + ops.kl(w, z)[0].sum(), dlogits

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf, image = z.clone().requires_grad_(), adv.clone()
        moved, loss, dlogits = function(image, grad, x, leaf, w)
        results.append((image, moved, loss.detach(), dlogits, *torch.autograd.grad(loss, (leaf, w))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=0, atol=0)


def test_other_seeds_and_steps_compile_nothing_anew():
    x, numbers, graphs = torch.rand(4, 3, 5, 5), torch.arange(4) + 2**40, []

    def start(x, numbers, seed, step):
        return ops.normal_start(ops.linf_start(x, 0.1, 0.0, 1.0, seed, numbers, step), 0.1, seed, numbers, step, 2) + 1

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(start, fullgraph=True, backend=backend)
    for seed, step in ((5, 2), (6, 3), (7, 2**32 - 1), (2**63 - 1, 4), (2**62, 5)):
        assert torch.equal(compiled(x, numbers, seed, step), start(x, numbers, seed, step))
    assert len(graphs) <= 2  # of constants, and of any
    for seed in (2**63, 2**64 - 1):
        assert torch.equal(compiled(x, numbers, seed, 6), start(x, numbers, seed, 6))


@pytest.mark.parametrize("op", ops.STEPS)
def test_in_place_steps_move_the_version_counter(op):
    """Without it, a backward that saved the image would silently use the moved one."""
    adv = torch.rand(2, 3)
    leaf = torch.rand(2, 3, requires_grad=True)
    product = (leaf * adv).sum()  # saves adv
    before = adv._version
    getattr(ops, f"{op}_")(adv, torch.ones(2, 3), torch.rand(2, 3), 0.1, 0.2)
    assert adv._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("op", ops.UPDATES)
def test_compiled_updates_are_the_eager_ones(op):
    written, grad, x, flags = update_inputs(op, (4, 3, 5, 5), torch.float32, torch.float32)
    alpha = torch.linspace(0.01, 0.02, 4)

    def update(*written):
        return getattr(ops, f"{op}_")(*written, grad, x, alpha, 0.7, 0.06, 0.0, 1.0, *flags) + 1

    results = []
    for function in (update, torch.compile(update, fullgraph=True, backend="aot_eager")):
        given = [t.clone() for t in written]
        results.append((function(*given), *given))
    assert all(map(torch.equal, *results))
    assert not torch.equal(results[0][1], written[0])


@pytest.mark.parametrize("op", ops.UPDATES)
def test_updates_move_the_version_counter_of_all_they_write(op):
    written, grad, x, flags = update_inputs(op, (4, 5), torch.float32, torch.float32)
    before = [t._version for t in (*written, grad, x)]
    getattr(ops, f"{op}_")(*written, grad, x, *UPDATE_SCALARS, 0.0, 1.0, *flags)
    moved = [t._version - v for t, v in zip((*written, grad, x), before, strict=True)]
    assert moved == [1] * len(written) + [0, 0]


def test_out_moves_the_version_counter():
    z, y = logits_and_labels(6, 5, torch.float32)
    out = ops.ce(z, y)
    versions = [t._version for t in out]
    ops.ce(z, y, out=out)
    assert [t._version for t in out] == [v + 1 for v in versions]
    image = torch.rand(2, 3)
    before = image._version
    ops.linf_step(torch.rand(2, 3), torch.rand(2, 3), torch.rand(2, 3), 0.1, 0.2, out=image)
    assert image._version == before + 1


def test_ops_work_in_inference_mode():
    with torch.inference_mode():
        adv, z = torch.rand(2, 3), torch.rand(2, 3)
        assert ops.linf_step_(adv, z, adv.clone(), 0.1, 0.2) is adv
        loss, _ = ops.ce(z, torch.tensor([0, 1]))
        assert loss.shape == (2,)


def test_fake_tensors_go_through_the_shape_functions():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        loss, dlogits = ops.kl(torch.rand(3, 5, dtype=torch.bfloat16), torch.rand(3, 5))
        moved = ops.l1_step(torch.rand(2, 7), torch.rand(2, 7), torch.rand(2, 7), 0.1, 0.2)
    assert (loss.shape, dlogits.dtype, moved.shape) == ((3,), torch.float32, (2, 7))
