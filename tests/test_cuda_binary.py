"""The CUDA machine code of the installed extension, read without a GPU: 16-byte loads where kernels stream, and no spills."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastadv import native

pytestmark = pytest.mark.skipif(
    not native.BUILD_INFO.get("cuda_archs"), reason=f"no CUDA kernels in this build: {native.BUILD_INFO.get('cuda_note')}"
)

REGISTERS = 65536  # of a multiprocessor, on every architecture so far

LOSSES = ("9LabelLoss", "13SoftLabelLoss", "9RatioLoss", "6KlLoss", "6SeLoss")
# Kernels that move 16 bytes at once, by storage of the image, and those of losses that hold a row in registers.
STREAMING = [
    f"{kernel}_kernelI{storage}E"
    for kernel in ("linf_step", "apgd_step", "momentum_sums", "momentum_apply", "l2_on_chip", "l2_sums", "l2_apply")
    for storage in ("f", "d", "NS_4bf16E", "NS_3f16E")
]
STREAMING += [
    "start_kernelIfNS_9LinfStartE",
    "start_kernelIfNS_11NormalStartE",
    "weight_sums_kernelE",
    "perturb_kernelE",
    *(f"loss_kernelIfLi8ENS0_{loss}EE" for loss in LOSSES),
]


def cuobjdump(*arguments: str) -> str:
    triton = pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments, native._C.__file__], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def sass() -> dict[tuple[str, str], str]:
    """Machine code by (architecture, mangled kernel name)."""
    code, arch = {}, ""
    for part in re.split(r"(?=^\s*Function : |^arch = )", cuobjdump("--dump-sass"), flags=re.MULTILINE):
        if found := re.match(r"arch = (sm_\w+)", part):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\S+)", part):
            code[arch, found[1]] = part
    return code


@pytest.fixture(scope="module")
def usage() -> dict[str, list[dict[str, int]]]:
    """Registers, stack, local and shared memory of each kernel, one entry an architecture."""
    found: dict[str, list[dict[str, int]]] = {}
    for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(.*)", cuobjdump("--dump-resource-usage")):
        found.setdefault(name, []).append({k: int(v) for k, v in re.findall(r"(\w+(?:\[\d\])?):(\d+)", numbers)})
    return found


def kernels(names: Iterator[str]) -> set[str]:
    pattern = r"(linf_step|start|apgd_step|momentum_(?:sums|apply)|l2_[a-z_]+|l1_step|weight_sums|perturb|loss)_kernel[IE]"
    return {match[1] for name in names if (match := re.search(pattern, name))}


def test_every_kernel_is_there_for_every_architecture(sass, usage):
    expected = {"linf_step", "start", "apgd_step", "momentum_sums", "momentum_apply", "l2_on_chip", "l2_sums", "l2_apply"}
    expected |= {"l1_step", "weight_sums", "perturb", "loss"}
    for arch in native.BUILD_INFO["cuda_archs"].split():
        assert kernels(name for a, name in sass if a == arch) == expected, arch
    for loss in LOSSES:
        assert sum(loss in name for name in usage) == 3, loss  # in registers, streamed, and in fp64


def test_nothing_spills(sass):
    for (arch, name), code in sass.items():
        spills = re.findall(r"\b(?:LDL|STL)\b", code)
        assert not spills, f"{name} on {arch} uses local memory {len(spills)} times"


def test_registers_allow_the_blocks_that_are_launched(usage):
    for name, entries in usage.items():
        threads = 512 if re.search("loss|l2_on_chip|l1_step", name) else 256
        for entry in entries:
            assert entry["REG"] * threads <= REGISTERS, f"{name}: {entry}"
            assert entry["LOCAL"] == 0, f"{name}: {entry}"
            # What l2_launch leaves for it: some architectures count the kilobyte that CUDA keeps for itself.
            assert "on_chip" not in name or entry["SHARED"] <= 2048, f"{name}: {entry}"


@pytest.mark.parametrize("kernel", STREAMING)
def test_streams_move_16_bytes_at_once(sass, kernel):
    found = {arch: code for (arch, name), code in sass.items() if kernel in name}
    assert set(found) == set(native.BUILD_INFO["cuda_archs"].split())
    for arch, code in found.items():
        assert "LDG.E.128" in code or "LDG.E.ENL2.128" in code, arch
        if "l2_sums" not in kernel and "momentum_sums" not in kernel:
            assert "STG.E.128" in code, arch
