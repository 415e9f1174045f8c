"""The axes of the test table: every op runs over backend x dtype x shape x layout, against the reference in float64."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastadv import ops, reference

# Native kernels and Triton against the reference. "cpp" must exist where tests run; a missing one is a failure, not a skip.
BACKENDS = ("cpp", "triton", "reference")
STEP_BACKENDS = {"linf_step": BACKENDS, "l2_step": BACKENDS, "l1_step": BACKENDS}
UPDATE_BACKENDS = {"apgd_step": BACKENDS, "momentum_step": BACKENDS}

# (dtype of adv and x, dtype of grad)
STEP_DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),  # a model run in bf16 on an fp32 image: read by the kernel as it is
    (torch.float32, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float32),  # converted once
    (torch.bfloat16, torch.float16),
]

SHAPES = {
    "one": (1, 1),  # a single element
    "row": (3, 5),  # shorter than any vector
    "image": (4, 3, 8, 8),  # whole vectors
    "odd": (5, 3, 7, 9),  # vectors with a remainder in every sample
    "volume": (2, 3, 4, 5, 6),  # five dimensions
    "chunks": (2, 3, 129, 131),  # more than one thread's chunk, cut inside a sample
    "empty": (0, 3, 4, 4),  # no samples
    "hollow": (3, 0),  # samples without elements
}

# Losses: 2..4 classes meet the minima of DLR, 10 and 16 fill a vector partly and exactly, 1000 takes several.
CLASSES = (2, 3, 4, 5, 10, 16, 17, 100, 1000)
LONG_ROW = 9000  # more classes than a Triton program holds: 3 chunks of 4096 in fp32, 5 of 2048 in fp64

# How far a result may be from float64 arithmetic on the same (rounded) inputs, in units of the result's own precision.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def spare_the_interpreter() -> None:
    """Triton's interpreter patches triton.language anew, for 2 ms, whenever a kernel calls a helper: here once a module."""
    from triton import language
    from triton.runtime import interpreter

    patched = set()

    def call(function: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        module = function.fn.__globals__
        # A launch patches triton.language itself; Triton's own helpers see another module, triton.language.core.
        if module["__name__"] not in patched and language not in module.values():
            interpreter._patch_lang(function.fn)
        patched.add(module["__name__"])
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if os.environ.get("TRITON_INTERPRET") == "1":
    spare_the_interpreter()


def name(value: object) -> str | None:
    """A readable test id."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple) and all(isinstance(v, torch.dtype) for v in value):
        return "/".join(str(v).removeprefix("torch.") for v in value)
    return None


def layouts(shape: tuple[int, ...]) -> list[str]:
    return ["contiguous", "strided", *{4: ["channels_last"], 5: ["channels_last_3d"]}.get(len(shape), [])]


def arrange(t: Tensor, layout: str) -> Tensor:
    """``t`` with the same values in another memory layout."""
    if layout == "strided":  # every other element of a larger tensor
        wide = torch.empty(*t.shape, 2, dtype=t.dtype)
        wide[..., 0] = t
        return wide[..., 0]
    return t.clone(memory_format=getattr(torch, "contiguous_format" if layout == "contiguous" else layout))


def step_inputs(shape: tuple[int, ...], dtype: torch.dtype, grad_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """adv, grad, x: x in [0, 1], adv partly outside ball and box, a gradient with zeros and both signs."""
    generator = torch.Generator().manual_seed(sum(shape) + 1)
    x = torch.rand(shape, generator=generator)
    adv = x + 0.1 * torch.randn(shape, generator=generator)
    grad = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.1)
    return adv.to(dtype), grad.to(grad_dtype), x.to(dtype)


def sample_numbers(count: int) -> Tensor:
    """[count] in falling order, all but the last beyond 32 bits; a view of a larger tensor."""
    return arrange(torch.arange(count).flip(0) * 0x123456789ABC, "strided")


def update_inputs(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, grad_dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """What a step with momentum writes (adv first), grad, x, and the flags of the samples, in every combination."""
    adv, grad, x = step_inputs(shape, dtype, grad_dtype)
    generator = torch.Generator().manual_seed(sum(shape) + 2)
    others = [torch.randn(shape, generator=generator) for _ in range(4)]
    number = torch.arange(len(x))
    if op == "momentum_step":
        return [adv, (others[0] / max(1, x[:1].numel())).to(dtype)], grad, x, []
    old, best, image = ((x.float() + 0.1 * noise).to(dtype) for noise in others[:3])
    return [adv, old, best, others[3].to(grad_dtype), image], grad, x, [number % 2 == 0, number % 3 == 0]


UPDATE_SCALARS = (0.02, 0.7, 0.06)  # alpha, momentum or decay, eps


def check_update(
    op: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, ...],
    scalars: str = "shared",
    place: Callable[[Tensor], Tensor] = lambda t: t,
    truncates: bool = False,
) -> None:
    """One step, on tensors as ``place`` puts them, against the reference on the CPU; ``truncates``: a store of bf16 does so."""
    written, grad, x, flags = update_inputs(op, shape, *dtypes)
    values: list[float | Tensor] = [*UPDATE_SCALARS]
    if scalars == "per_sample":
        values = [v * torch.linspace(0, 1.4, len(x), dtype=torch.float64) for v in values]
    *results, grad_, x_ = map(place, (*(t.clone() for t in written), grad, x))
    layouts = [t.stride() for t in results]
    moved = getattr(ops, f"{op}_")(*results, grad_, x_, *values, 0.0, 1.0, *(flag.to(x_.device) for flag in flags))
    assert moved is results[0]
    assert [t.stride() for t in results] == layouts
    assert torch.equal(grad_.cpu(), grad), "grad was modified"
    assert torch.equal(x_.cpu(), x), "x was modified"

    expected = getattr(reference.step, op)(*written, grad, x, *values, 0.0, 1.0, *flags)
    results = [t.cpu() for t in results]
    one_place = 2**-7 if truncates and dtypes[0] == torch.bfloat16 else 0
    if op == "momentum_step":
        velocity, scale = results[1].double(), max(1, x[:1].numel())
        # In units of its mean size; how many terms are summed in which order rounds, but not more.
        rounding = max(ROUNDING[dtypes[0]], one_place)
        torch.testing.assert_close(scale * velocity, scale * expected[1].double(), rtol=rounding, atol=rounding)
        # A velocity of almost nothing may round to either side of 0: the step is along the one that is kept.
        expected = (reference.step.linf_step(written[0], results[1], x, values[0], values[2], 0.0, 1.0), results[1])
    torch.testing.assert_close(results[0], expected[0], rtol=one_place, atol=0)
    assert all(map(torch.equal, results[1:], expected[1:]))


def logits_and_labels(rows: int, classes: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * classes)
    z = scale * torch.randn(rows, classes, generator=generator)
    return z.to(dtype), torch.randint(classes, (rows,), generator=generator)


def need_backend(op: str, backend: str) -> None:
    """A backend that tests ask for must be there: on Linux every install has all three."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here and cannot interpret; test_gpu.py runs it")
    found, why = ops.implementation(op, "cpu", backend)
    if found is None:
        pytest.fail(f"{backend} cannot run {op} here: {why}")
