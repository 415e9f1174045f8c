"""Triton kernels compiled ahead of time for GPUs that are not here: loads are 16 bytes wide, nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
TYPES = [("fp32", "fp32"), ("fp32", "bf16"), ("fp64", "fp64")]  # of image and gradient

COMPILE = """
import json, sys
import triton.language as tl, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastadv.kernels.step import BLOCK, linf_step_kernel as kernel

targets, types = json.loads(sys.argv[1])
assembly = {}
for name, target in targets.items():
    for image, gradient in types:
        signature = dict.fromkeys(kernel.arg_names, "constexpr")
        signature |= dict.fromkeys(("p_out", "p_adv", "p_x"), f"*{image}") | {"p_grad": f"*{gradient}"}
        signature |= dict.fromkeys(("alpha", "eps", "lo", "hi"), "fp64") | {"row_size": "i64", "first_row": "i32"}
        constants = {"p_alphas": None, "p_radii": None, "ALPHAS": False, "RADII": False, "BLOCK": BLOCK}
        constants["ACC"] = tl.float64 if image == "fp64" else tl.float32
        # What the launcher finds on torch's memory: pointers and row sizes divisible by 16.
        divisible = [i for i, arg in enumerate(kernel.arg_names) if signature[arg].startswith("*") or arg == "row_size"]
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in divisible}),
            target=GPUTarget(*target), options={"enable_fp_fusion": False},
        )
        assembly[f"{name} {image} {gradient}"] = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
print(json.dumps(assembly))
"""


@pytest.fixture(scope="module")
def assembly() -> dict[str, str]:
    # In a process of its own: this one may have declared the kernels for the interpreter.
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps([TARGETS, TYPES])],
        env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("image", "gradient"), TYPES)
def test_linf_step_compiles_to_wide_loads(assembly, target, image, gradient):
    code = assembly[f"{target} {image} {gradient}"]
    if target.startswith("sm"):
        load, store, spill = "ld.global.v", "st.global.v", "ld.local"
    else:
        load, store, spill = "global_load_dwordx", "global_store_dwordx", "scratch_load"
    assert code.count(load) >= 3, "adv, grad and x are not read by vector loads"
    assert store in code
    assert spill not in code
