"""Choice of backend: automatic ones fall back, asked-for ones fail exactly; and what ``fastadv info`` tells of it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

import fastadv
from fastadv import cli, info, native, ops

X = torch.rand(2, 5)


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


def test_cpu_tensors_take_the_cpp_kernels():
    for op in ops.ALL:
        assert ops.choice(op, "cpu") == ("cpp", "first choice")


def test_other_devices_take_the_reference():
    assert ops.choice("linf_step", "mps")[0] == "reference"


def test_without_the_extension_the_reference_serves(monkeypatch):
    expected = ops.linf_step(X, X, X, 0.1, 0.2)
    monkeypatch.setattr(native, "LOAD_ERROR", "no such file")
    ops._select_once.cache_clear()
    try:
        assert ops.choice("linf_step", "cpu") == ("reference", "no such file")
        assert torch.equal(ops.linf_step(X, X, X, 0.1, 0.2), expected)
        assert "native kernels" in info.build()
        with (
            pytest.raises(RuntimeError, match="'cpp' was asked for but cannot run ce on cpu: no such file"),
            fastadv.use_backend("cpp"),
        ):
            ops.ce(X, torch.tensor([0, 1]))
    finally:
        ops._select_once.cache_clear()


def test_an_asked_for_backend_is_used_and_restored():
    with fastadv.use_backend("reference"):
        assert ops.choice("ce", "cpu") == ("reference", "asked for by name")
        with fastadv.use_backend(None):
            assert ops.choice("ce", "cpu")[0] == "cpp"
    with pytest.raises(KeyError), fastadv.use_backend("reference"):
        raise KeyError
    assert ops.choice("ce", "cpu")[0] == "cpp"


def test_a_backend_that_cannot_is_an_exact_error():
    why = "'cuda' was asked for but cannot run linf_step on cpu: cuda kernels run on cuda tensors"
    with pytest.raises(RuntimeError, match=why), fastadv.use_backend("cuda"):
        ops.linf_step(X, X, X, 0.1, 0.2)


def test_an_op_without_a_triton_kernel_says_so():
    assert ops.implementation("foo_step", "cpu", "triton") == (None, "no Triton kernel for foo_step yet")


def test_every_op_has_a_triton_kernel():
    assert set(importlib.import_module("fastadv.kernels").OPS) == set(ops.ALL)


def test_unknown_backends_are_refused_at_once():
    with pytest.raises(ValueError, match="backend must be one of cuda, triton, cpp, reference; got 'gpu'"):
        fastadv.use_backend("gpu").__enter__()


def test_the_environment_variable_chooses():
    code = "import fastadv; print(fastadv.ops.choice('ce', 'cpu'))"
    assert python(code, FASTADV_BACKEND="reference").stdout.strip() == "('reference', 'asked for by name')"
    wrong = python(
        "import fastadv, torch; x = torch.rand(2, 3); fastadv.ops.linf_step_(x, x, x, .1, .1)", FASTADV_BACKEND="cdua"
    )
    assert "backend must be one of" in wrong.stderr


def test_triton_needs_a_gpu_or_its_interpreter():
    setup = "import fastadv, torch; x = torch.rand(2, 3)"
    code = f"{setup}\nwith fastadv.use_backend('triton'): fastadv.ops.linf_step(x, x, x, .1, .1)"
    assert "Triton runs on GPUs (on a CPU only under TRITON_INTERPRET=1)" in python(code, TRITON_INTERPRET="0").stderr
    assert python(code, TRITON_INTERPRET="1").returncode == 0


def test_the_cuda_half_is_honest_where_there_is_no_gpu():
    reason = native.missing("linf_step", "cuda")
    if torch.cuda.is_available():
        assert reason == ""
    elif native.BUILD_INFO["cuda_archs"]:
        assert reason == "torch sees no CUDA device"
    else:
        assert reason.startswith("fastadv._C was built without CUDA: ")


def test_info_names_versions_build_and_backends(capsys):
    assert cli.main(["info"]) == 0
    told = capsys.readouterr().out
    for word in (fastadv.__version__, torch.__version__, "C++ kernels", "CUDA kernels", "linf_step", "dlr_targeted", "cpp"):
        assert word in told
    module = subprocess.run([sys.executable, "-m", "fastadv.info"], capture_output=True, text=True)
    assert "linf_step" in module.stdout


def test_info_explains_a_backend_that_is_not_there():
    done = python("from fastadv.info import report; print(report())", FASTADV_BACKEND="cuda")
    assert "'cuda' was asked for but cannot run linf_step on cpu" in done.stdout


def test_the_command_line_refuses_nonsense(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fly"])
    assert "invalid choice" in capsys.readouterr().err
