"""What only a GPU can show: native CUDA = Triton = reference, streams, graphs. Run with ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch
from table import ROUNDING, SHAPES, STEP_DTYPES, arrange, layouts, name, step_inputs

import fastadv
from fastadv import native, ops
from fastadv.reference import step as reference

pytestmark = pytest.mark.gpu


def backends() -> list[str]:
    return ["triton", *([] if native.missing("linf_step", "cuda") else ["cuda"])]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", STEP_DTYPES, ids=name)
@pytest.mark.parametrize("scalars", ["shared", "per_sample"])
def test_linf_step_is_bit_identical(dtypes, shape, scalars):
    for layout in layouts(SHAPES[shape]):
        adv, grad, x = (arrange(t, layout) for t in step_inputs(SHAPES[shape], *dtypes))
        alpha, eps = 0.02, 0.06
        if scalars == "per_sample":
            factor = torch.linspace(0, 1.5, len(adv), dtype=torch.float64)
            alpha, eps = alpha * factor, eps * factor
        expected = reference.linf_step(adv, grad, x, alpha, eps, 0.0, 1.0)
        for backend in backends():
            with fastadv.use_backend(backend):
                result = ops.linf_step(adv.cuda(), grad.cuda(), x.cuda(), alpha, eps, 0.0, 1.0)
            assert torch.equal(result.cpu(), expected), f"{backend}, {layout}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=name)
def test_linf_start_is_the_cpus(dtype, shape):
    for layout in layouts(SHAPES[shape]):
        x = arrange(step_inputs(SHAPES[shape], dtype, dtype)[2], layout)
        expected = ops.linf_start(x, 0.3, 0.0, 1.0, 99)
        result = ops.linf_start(x.cuda(), 0.3, 0.0, 1.0, 99).cpu()
        torch.testing.assert_close(result, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] / 10)


def test_linf_step_runs_on_the_current_stream_and_in_a_graph():
    adv, grad, x = (t.cuda() for t in step_inputs((8, 3, 32, 32), torch.float32, torch.float32))
    expected = ops.linf_step(adv, grad, x, 0.02, 0.06, 0.0, 1.0)
    for backend in backends():
        with fastadv.use_backend(backend):
            image, stream = adv.clone(), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                ops.linf_step_(image, grad, x, 0.02, 0.06, 0.0, 1.0)
            stream.synchronize()
            assert torch.equal(image, expected), backend
            image, graph = adv.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                ops.linf_step_(image, grad, x, 0.02, 0.06, 0.0, 1.0)
            image.copy_(adv)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(image, expected), backend


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "kl", "se"])
def test_attacks_run_and_stay_in_the_ball(norm, loss):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10)).cuda()
    x, y = torch.rand(16, 3, 8, 8, device="cuda"), torch.randint(10, (16,), device="cuda")
    eps = {"linf": 0.1, "l2": 1.0, "l1": 5.0}[norm]
    x_adv = fastadv.pgd(model, x, y, eps, norm=norm, loss=loss)
    order = {"linf": float("inf"), "l2": 2, "l1": 1}[norm]
    length = torch.linalg.vector_norm((x_adv - x).flatten(1).double(), order, dim=1)
    assert (length <= eps * (1 + 1e-5)).all()
    assert (length > 0).all()
