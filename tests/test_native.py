"""Properties of the compiled extension itself: memory, threads, vectorisation, elementary functions, conversions."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from table import UPDATE_SCALARS, step_inputs, update_inputs
from torch import Tensor

from fastadv import native, ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def test_the_extension_was_built():
    assert native.LOAD_ERROR is None


POISON = 42.0


def surrounded(t: Tensor, offset: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A copy of t inside a poisoned buffer, `offset` elements from an aligned address; and the poison on both sides."""
    buffer = torch.full((t.numel() + 64,), POISON, dtype=t.dtype)
    inside = buffer[offset : offset + t.numel()].view(t.shape)
    inside.copy_(t)
    return inside, (buffer[:offset], buffer[offset + t.numel() :])


def is_poison(*sides: Tensor) -> bool:
    return all(bool((side == POISON).all()) for side in sides)


@pytest.mark.parametrize("offset", range(17))
@pytest.mark.parametrize("op", ops.STEPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_write_nothing_outside_at_any_alignment(op, dtype, offset):
    adv, grad, x = step_inputs((3, 37), dtype, dtype)
    expected = getattr(ops, op)(adv, grad, x, 0.1, 0.2, 0.0, 1.0)
    inside, around = surrounded(adv, offset)
    misaligned_grad, _ = surrounded(grad, (offset * 3) % 17)
    misaligned_x, _ = surrounded(x, (offset * 5) % 17)
    getattr(ops, f"{op}_")(inside, misaligned_grad, misaligned_x, 0.1, 0.2, 0.0, 1.0)
    assert torch.equal(inside, expected)
    assert is_poison(*around)


@pytest.mark.parametrize("offset", range(17))
@pytest.mark.parametrize("op", ops.UPDATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_updates_write_nothing_outside_at_any_alignment(op, dtype, offset):
    written, grad, x, flags = update_inputs(op, (3, 37), dtype, dtype)
    inside, around = zip(*(surrounded(t, (i + 1) * offset % 17) for i, t in enumerate(written)), strict=True)
    getattr(ops, f"{op}_")(*written, grad, x, *UPDATE_SCALARS, 0.0, 1.0, *flags)
    misaligned = (surrounded(t, offset * i % 17)[0] for i, t in ((3, grad), (5, x)))
    getattr(ops, f"{op}_")(*inside, *misaligned, *UPDATE_SCALARS, 0.0, 1.0, *flags)
    assert all(map(torch.equal, inside, written))
    assert all(is_poison(*sides) for sides in around)


@pytest.mark.parametrize("offset", range(17))
@pytest.mark.parametrize("classes", [2, 10, 33])
@pytest.mark.parametrize("op", ["ce", "log_odds", "margin", "dlr", "kl", "se"])
def test_losses_write_nothing_outside_at_any_alignment(op, classes, offset):
    z = torch.randn(5, classes, generator=torch.Generator().manual_seed(0))
    other = z.flip(0).contiguous() if op in ("kl", "se") else torch.arange(5) % classes
    arguments = (lambda logits: (other, logits)) if op in ("kl", "se") else (lambda logits: (logits, other))
    expected = getattr(ops, op)(*arguments(z))
    logits, _ = surrounded(z, offset)
    loss, around_loss = surrounded(torch.zeros(5), offset)
    grad, around_grad = surrounded(torch.zeros(5, classes), offset)
    getattr(ops, op)(*arguments(logits), out=(loss, grad))
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])
    assert is_poison(*around_loss, *around_grad)


@pytest.mark.parametrize("op", ops.STEPS)
def test_results_do_not_depend_on_the_number_of_threads(op):
    inputs = step_inputs((7, 3, 129, 131), torch.float32, torch.float32)
    z = torch.randn(3000, 100, generator=torch.Generator().manual_seed(0))
    y = torch.arange(3000) % 100
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append((getattr(ops, op)(*inputs, 0.5, 1.0, 0.0, 1.0), *ops.ce(z, y)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("op", ops.UPDATES)
def test_updates_do_not_depend_on_the_number_of_threads(op):
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 8):
            written, grad, x, flags = update_inputs(op, (7, 3, 129, 131), torch.float32, torch.float32)
            torch.set_num_threads(n)
            getattr(ops, f"{op}_")(*written, grad, x, *UPDATE_SCALARS, 0.0, 1.0, *flags)
            results.append(written)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/self/maps")
def test_the_process_has_a_single_openmp_runtime():
    """Two would each start their own threads on the same cores: 30 times slower here when it happened."""
    code = (
        "import torch, fastadv; x = torch.rand(1, 1 << 20); torch.exp(x); fastadv.ops.linf_step_(x, x, x, .1, .1);"
        "print({line.split()[-1] for line in open('/proc/self/maps') if any(n in line for n in ('gomp', 'libiomp', 'libomp'))})"
    )
    loaded = eval(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert len(loaded) == 1, loaded


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="the list of expected vectors is for x86-64"
)
def test_the_streaming_loops_are_vectorised():
    """A loop that silently stays scalar is slower than torch. Looks for packed instructions in each version's code."""
    objdump = shutil.which("objdump")
    assert objdump, "binutils is needed: every C++ toolchain has it"
    listing = subprocess.run(
        [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", native._C.__file__],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    functions: dict[str, str] = {}
    for block in listing.split("\n\n"):  # a function's title, then its code; "+0x" titles continue one
        title = re.sub(r"(\+0x\w+)?>:$", "", block.split("\n", 1)[0])
        functions[title.split(" ", 1)[-1]] = functions.get(title.split(" ", 1)[-1], "") + block
    loops = {  # what the title holds: its instructions
        ("apply<float, float,", "LinfStep<float>"): "vaddps|vsubps",
        ("apply<float, float,", "L2Step<float>"): "vmulps|vfm",
        ("l2_sums<float, float>",): "vmulpd|vfm",
        ("apgd_move<float, float,",): "vaddps|vsubps",
        ("apgd_move<float, fastadv::bf16,",): "vaddps|vsubps",
        ("sum_of_sizes<float>",): "vaddpd",
        ("momentum_move<float, float,",): "vmulps",
        ("apply<float, fastadv::bf16,", "LinfStep<float>"): "vaddps|vsubps",
        ("hyperplane_reach<float, true>",): "vmulpd|vfm",
        ("hyperplane_reach<float, false>",): "vmulpd|vfm",
        ("hyperplane_total<float>",): "vminps|vblendv|vmovaps.*%k|vcmp",
        ("start<float, ", "LinfStart<float>"): "vpmuludq|vpmullq",
        ("start<float, ", "NormalStart<float>"): "vsqrtps",
        ("ce_rows<float>",): "vmulps|vfm",
        ("log_odds_rows<float>",): "vmulps|vfm",
        ("kl_rows<float>",): "vmulps|vfm",
        ("se_rows<fastadv::bf16>",): "vmulps|vfm",
    }
    for words, packed in loops.items():
        for version, register in (("arch_x86_64_v3", "%ymm"), ("arch_x86_64_v4", "%zmm")):
            bodies = [b for title, b in functions.items() if version in title and all(word in title for word in words)]
            assert bodies, f"no {version} build of {words}"
            for body in bodies:
                assert re.search(rf"({packed}).*{register}", body), f"{words} is not vectorised for {version}"


@pytest.mark.parametrize(
    ("function", "points"),
    [
        ("exp", torch.cat([torch.linspace(-87.3, 0, 20001), torch.tensor([-1e-30, -0.0])])),
        ("log", torch.cat([torch.logspace(-37, 38, 20001), torch.linspace(0.5, 2, 20001)])),
    ],
)
def test_elementary_functions_are_as_exact_as_float(function, points):
    points = points.float()
    ours = torch.tensor([getattr(native._C, function)(float(p)) for p in points], dtype=torch.float64)
    exact = getattr(torch, function)(points.double())
    error = (ours - exact).abs() / exact.abs().clamp(min=1e-3 if function == "log" else 0)
    assert error.max() < 2e-7


def test_elementary_functions_at_their_ends():
    assert native._C.exp(-math.inf) == 0
    assert native._C.exp(-88.0) == 0
    assert native._C.exp(0.0) == 1
    assert math.isnan(native._C.exp(math.nan))
    assert native._C.log(1.0) == 0
    assert math.isnan(native._C.log(math.nan))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_conversions_are_torchs_bit_for_bit(dtype):
    """A step of length 0 in an unbounded ball only loads and stores: every bit pattern but -0 must come back."""
    patterns = torch.arange(-(2**15) + 1, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    nothing = torch.zeros_like(patterns)
    result = ops.linf_step(patterns, nothing, nothing, 0.0, math.inf)
    nan = patterns.isnan()
    assert torch.equal(result.isnan(), nan)
    assert torch.equal(result[~nan].view(torch.int16), patterns[~nan].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_half_is_torchs(dtype):
    """0 + alpha sign(1) is any float, rounded once, on the store: normals, subnormals, ties, overflow."""
    ties = [
        65519.0,
        65520.0,
        1e9,
        6.1e-5,
        2.0**-24,
        2.0**-25,
        1.0 + 2.0**-11,
        1.0 + 3 * 2.0**-11,
        1.0 + 2.0**-8,
        1.0 + 3 * 2.0**-8,
    ]
    zero, one = torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    for alpha in [*ties, *torch.logspace(-9, 5, 3000).tolist()]:
        for signed in (alpha, -alpha):
            assert ops.linf_step(zero, one, zero, signed, math.inf).item() == torch.tensor(signed).to(dtype).item()


def test_building_needs_no_torch():
    root = Path(__file__).parent.parent
    assert "import torch" not in (root / "setup.py").read_text()
    for source in (path.read_text() for path in (root / "csrc").iterdir()):
        assert "#include <torch" not in source
        assert "#include <ATen" not in source


def free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


@pytest.mark.skipif(free_memory() < 9 * 2**30, reason="needs 9 GB of free memory")
@pytest.mark.parametrize("op", ["linf_step_", "l2_step_"])
def test_more_than_two_to_the_31_elements(op):
    size = 2**31 + 9
    adv = torch.full((1, size), -0.5, dtype=torch.bfloat16)
    getattr(ops, op)(adv, adv, adv, 0.25 * (math.sqrt(size) if op == "l2_step_" else 1), math.inf)
    assert adv[0, [0, 2**31 - 1, 2**31, -1]].tolist() == [-0.75] * 4
