"""Triton kernels compiled ahead of time for GPUs that are not here: streams load 16 bytes at a time, nothing spills.

What is compiled is what the ops launch on tensors without memory. Run as a script, this file compiles all of it and prints
what the tests look at as JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "i64": torch.int64, "u8": torch.uint8}

# op, types of image and gradient, or of logits, and what else; then the size of a sample or the number of classes. Besides
# ordinary sizes, the largest that a program takes at once, where registers are scarcest, and ones that it must stream.
STEPS = [
    ("linf_step", "fp32 fp32", 3072), ("linf_step", "fp32 bf16 per_sample", 3072), ("linf_step", "fp64 fp64", 3072),
    ("linf_start", "fp32 fp32", 3072), ("linf_start", "bf16 bf16", 3072),
    ("normal_start", "fp32 fp32", 3072), ("normal_start", "bf16 bf16", 3072),
    ("l2_step", "fp32 fp32", 8192), ("l2_step", "fp32 bf16 per_sample", 3072), ("l2_step", "fp64 fp64", 4096),
    ("l2_step", "fp32 fp32", 150528),
    ("l1_step", "fp32 fp32", 3072), ("l1_step", "fp64 fp64", 150528),
    ("apgd_step", "fp32 fp32", 3072), ("apgd_step", "fp32 bf16 per_sample", 3072), ("apgd_step", "fp64 fp64", 3072),
    ("momentum_step", "fp32 fp32", 3072), ("momentum_step", "fp32 bf16 per_sample", 150528),
    ("momentum_step", "fp64 fp64", 3072),
    # The launcher makes a size of 1 a constant and one past 2^31 a 64-bit argument: other programs again.
    *(
        (op, "fp32 fp32 per_sample", size)
        for op in ("linf_step", "linf_start", "normal_start", "l2_step", "l1_step", "apgd_step", "momentum_step")
        for size in (1, 3 << 31)
    ),
]  # fmt: skip
LOSSES = [
    ("ce", "fp32", 1000), ("ce", "fp32", 21841), ("ce", "fp32 soft", 4096), ("log_odds", "bf16", 10),
    ("margin", "bf16", 10), ("dlr", "fp64", 21841), ("dlr_targeted", "fp32", 4096), ("dlr_targeted", "fp32", 2),
    ("kl", "fp32 both", 4096), ("kl", "fp32 both", 21841), ("kl", "bf16", 1000),
    ("se", "fp32 both", 4095), ("se", "fp64", 2048),
]  # fmt: skip
# Of weights that are their own origins, with a backup, or about others; in memory that is aligned or not.
WEIGHTS = [
    ("weight_sums", "fp32 fp32 own", 100_000), ("weight_sums", "fp32 bf16 record", 100_000),
    ("weight_sums", "fp32 fp32 other", 100_000), ("weight_sums", "fp64 fp64 other", 100_000),
    ("perturb", "fp32 fp32 own", 100_000), ("perturb", "bf16 fp32 own", 100_000), ("perturb", "fp64 fp64 other", 100_000),
    ("weight_sums", "bf16 bf16 record", 4095), ("perturb", "fp32 fp32 other", 4095),
]  # fmt: skip
CASES = [*STEPS, *LOSSES, *WEIGHTS]
UNALIGNED = (1, 2, 10, 4095, 21841)  # sizes of which rows do not begin at multiples of 16 bytes


def key(target: str, op: str, types: str, size: int) -> str:
    return f"{target} {op} {types} {size}"


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[dict[str, Any]]]:
    # In a process of its own: this one may have declared the kernels for the interpreter.
    done = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("op", "types", "size"), CASES, ids=["-".join(key("", *case).split()) for case in CASES])
def test_kernels_do_not_spill_and_read_whole_vectors(compiled, target, op, types, size):
    kernels = compiled[key(target, op, types, size)]
    assert len(kernels) == (2 if op == "momentum_step" or (op == "l2_step" and size > 8192) else 1)
    for kernel in kernels:
        assert kernel["stack"] == 0, f"{kernel['name']}: registers spill to memory"
        if size not in UNALIGNED:
            assert kernel["vector_loads"] >= kernel["inputs"], f"{kernel['name']}: not every input is read by vectors"
            assert kernel["vector_stores"] >= 1 or "_sums" in kernel["name"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_row_that_fits_is_loaded_once(compiled, target):
    """The passes of a loss share what they load only as long as the compiler finds that they load the same."""
    (kernel,) = compiled[key(target, "kl", "fp32 both", 4096)]
    threads = 16 * TARGETS[target][2]
    assert kernel["vector_loads"] == 2 * 4096 // 4 // threads  # two rows, four logits a load


# ------------------------------------------------------------------------------------------------------------- the script


def call(op: str, types: str, size: int) -> None:
    """Runs the Triton op on tensors without memory."""
    from fastadv.kernels import OPS

    def empty(kind: str, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPES[kind], device="meta")

    dtype, *rest = types.split()
    if op in ("weight_sums", "perturb"):  # their launchers look at addresses
        w, g, o = (torch.empty(size + 1, dtype=DTYPES[kind])[size % 2 :] for kind in (dtype, rest[0], dtype))
        o, sums = w if "own" in rest else o, torch.empty(1, 256, 4, dtype=torch.float64)
        if op == "perturb":
            OPS[op]([w], [g], [o], sums, 0.01, 0.01)
        else:
            OPS[op](sums, [w], [g], [o], "record" in rest)
        return
    t = empty(dtype, 16, size)
    eps = empty("fp64", 16) if "per_sample" in rest else 0.1
    if op == "apgd_step":
        flag, grad = torch.empty(16, dtype=torch.bool, device="meta"), empty(rest[0], 16, size)
        OPS[op](t, t, t, grad, t, grad, t, eps, eps, eps, 0.0, 1.0, flag, flag)
    elif op == "momentum_step":
        OPS[op](t, t, empty(rest[0], 16, size), t, eps, eps, eps, 0.0, 1.0)
    elif op == "linf_start":
        numbers = empty("i64", 16) if "per_sample" in rest else None
        OPS[op](t, t, eps, 0.0, 1.0, 12345, numbers, 1)
    elif op == "normal_start":
        numbers = empty("i64", 16) if "per_sample" in rest else None
        OPS[op](empty(dtype, 48, size), t, eps, 12345, numbers, 1, 3)
    elif op.endswith("step"):
        OPS[op](t, t, empty(rest[0], 16, size), t, eps, eps, 0.0, 1.0, *[0.02] * (op == "l1_step"))
    else:
        loss = empty("fp64" if dtype == "fp64" else "fp32", 16)
        label = t if "soft" in rest else empty("i64", 16)
        if op in ("kl", "se"):
            OPS[op](loss, t, t, logits_ref=t, grad_ref=t if "both" in rest else None)
        else:
            OPS[op](loss, t, t, y=label, **({"target": label} if op == "dlr_targeted" else {}))


def launches() -> Iterator[tuple[tuple[str, str, int], Any, list[Any], dict[str, Any]]]:
    """(case, kernel, arguments, constants and options) of every launch."""
    from triton.runtime import JITFunction

    recorded: list[Any] = []
    JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: recorded.append((kernel, list(args), kwargs))
    for case in CASES:
        call(*case)
        while recorded:
            yield (case, *recorded.pop(0))


def type_of(parameter: Any, argument: Any) -> str:
    """The type that the launcher finds an argument to have."""
    if argument is None or (isinstance(argument, int) and argument == 1 and not parameter.do_not_specialize):
        return "constexpr"
    if isinstance(argument, torch.Tensor):
        return "*" + next(kind for kind, dtype in DTYPES.items() if dtype == argument.dtype)
    return parameter.annotation_type or ("i32" if argument < 2**31 else "i64")


def compile_everything() -> dict[str, list[dict[str, Any]]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    results: dict[str, list[dict[str, Any]]] = {}
    for case, kernel, arguments, keywords in launches():
        constants = {name: keywords.pop(name) for name in kernel.arg_names if name in keywords}
        signature = dict.fromkeys(kernel.arg_names, "constexpr")
        for parameter, argument in zip(kernel.params, arguments, strict=False):
            signature[parameter.name] = type_of(parameter, argument)
            if signature[parameter.name] == "constexpr":
                constants[parameter.name] = argument
        # What the launcher looks at: pointers, which torch aligns, and integers.
        aligned = [
            i for i, (p, a) in enumerate(zip(kernel.params, arguments, strict=False))
            if isinstance(a, torch.Tensor) or (isinstance(a, int) and a % 16 == 0 and not p.do_not_specialize)
        ]  # fmt: skip
        inputs = ("p_adv", "p_old", "p_velocity", "p_grad", "p_x") if case in STEPS else ("p_z", "p_z_ref")
        inputs = sum(name in inputs for name in signature) if case not in WEIGHTS else 3 if "other" in case[1] else 2
        for name, target in TARGETS.items():
            done = triton.compile(
                ASTSource(kernel, signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}),
                target=GPUTarget(*target),
                options=keywords,
            )
            found = read_ptx(done) if name.startswith("sm") else read_amdgcn(done)
            found |= {"name": kernel.__name__, "inputs": inputs}
            results.setdefault(key(name, *case), []).append(found)
    return results


def read_ptx(compiled: Any) -> dict[str, Any]:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    stack = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage.stdout))
    loads = re.findall(r"ld\.global(?:\.\w+)*\.v[24]\.b(?:32|64)", compiled.asm["ptx"])
    return {"stack": stack, "vector_loads": len(loads), "vector_stores": compiled.asm["ptx"].count("st.global.v")}


def read_amdgcn(compiled: Any) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]
    stack = sum(int(n) for n in re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size): +(\d+)", code))
    loads = re.findall(r"(?:global|buffer)_load_dwordx[24]", code)
    stores = re.findall(r"(?:global|buffer)_store_dwordx[24]", code)
    return {"stack": stack, "vector_loads": len(loads), "vector_stores": len(stores)}


if __name__ == "__main__":
    print(json.dumps(compile_everything()))
