"""The CUDA kernels without a GPU: csrc/*.cu compiled by g++ under ASAN and UBSAN, their threads run as fibers.

tests/cuda_host/cuda_runtime.h says how, and what it can show and what it cannot. The shared test table and
tests/cuda_host/cases.py run in child processes, as the sanitizers must be loaded before Python: once on the CUDA kernels in
each order of their threads, once on the CPU kernels, which the sanitizers watch as well.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOST = ROOT / "tests" / "cuda_host"
CSRC = ROOT / "csrc"
GXX = shutil.which("g++")

pytestmark = [
    pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="fibers are x86-64 Linux code"),
    pytest.mark.skipif(GXX is None, reason="needs g++"),
]

FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -fopenmp "
    "-Dtarget_clones(...)= "  # one build for this machine is enough to look for faults in
).split()
SANITIZE = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined".split()
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:alloc_dealloc_mismatch=0:malloc_context_size=4:quarantine_size_mb=32",
    "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    "OMP_WAIT_POLICY": "passive",
}


def gxx(*arguments: str | Path) -> str:
    result = subprocess.run([str(GXX), *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# --------------------------------------------------------------------------------------------------------- the device itself


@pytest.fixture(scope="module")
def selftest(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("cuda_host") / "selftest"
    gxx(*FLAGS, *SANITIZE, f"-I{HOST}", "-x", "c++", HOST / "selftest.cu", "-o", program)
    return program


def run_case(program: Path, case: str, order: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **ENVIRONMENT, "CUDA_HOST_ORDER": order, "CUDA_HOST_DEVICE": "0"}
    return subprocess.run([program, case], env=environment, capture_output=True, text=True, timeout=60)


def numbers(program: Path, case: str, order: str) -> list[int]:
    result = run_case(program, case, order)
    assert result.returncode == 0, result.stderr
    return [int(word) for word in result.stdout.split()]


def test_a_missing_barrier_gives_other_results_in_the_other_order(selftest):
    expected = [*range(96, 0, -1), *range(192, 96, -1)]
    assert numbers(selftest, "barrier", "forward") == expected
    assert numbers(selftest, "barrier", "reverse") == expected
    forward, reverse = (numbers(selftest, "no barrier", order) for order in ("forward", "reverse"))
    assert forward != expected
    assert reverse != expected
    assert forward != reverse


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_a_warp_runs_ahead_of_others_that_still_read(selftest, order):
    expected = [(0 + 1 + 2) * 96] * 96
    assert numbers(selftest, "second barrier", order) == expected
    assert numbers(selftest, "no second barrier", order) != expected


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_shuffles_and_votes_are_cudas(selftest, order):
    sums = [sum(range(8 * group, 8 * group + 8)) + 8 * group for group in range(12)]
    assert numbers(selftest, "groups", order) == [sums[i // 8] for i in range(96)]
    votes = [32 + 1000] * 96
    for i in range(32):
        down = i + 2 if i % 16 < 14 else i
        votes[i] += 0b1111 + 10_000 + 100_000 * down + 70_000_000
    assert numbers(selftest, "votes", order) == votes


def test_launches_have_cudas_limits(selftest):
    result = run_case(selftest, "limits", "forward")
    assert result.stdout.splitlines() == [
        "1056 threads: invalid configuration argument",
        "the last error: invalid configuration argument",
        "and then: no error",
        "no block: invalid configuration argument",
        "65536 rows: invalid configuration argument",
        "48 KB and more: invalid argument",
        "asking for 1 MB: invalid argument",
        "asking for 64 KB: no error",
        "64 KB: no error",
        "a cluster: operation not supported",
    ]


def test_shared_memory_starts_as_nan_and_stacks_survive_switches(selftest):
    assert numbers(selftest, "uninitialised shared memory", "forward") == [1]
    assert numbers(selftest, "stack in bounds", "forward") == [4]


FAULTS = {
    "shared memory overrun": r"heap-buffer-overflow(.|\n)*WRITE of size 1",
    "overrun": r"heap-buffer-overflow(.|\n)*of size 16",
    "misaligned": "misaligned address .* for type 'const struct Float4', which requires 16 byte alignment",
    "stack overrun": "stack-buffer-overflow",
    "left before a barrier": "thread 40 on: __syncthreads .*\n.*deadlock: of 96 threads 40 have returned",
    "two barriers": r"at __syncthreads, .*selftest.cu:\d+, and thread .* waits at .*selftest.cu:\d+",
    "lane missing from mask": "is at __syncwarp, .* and not in mask 0000ffff",
    "left before a warp barrier": r"__syncwarp with mask ffffffff(.|\n)*deadlock: of 32 threads 1 have returned",
    "warp cut short": "deadlock: of 2 threads 0 have returned",
    "read outside mask": "reads lane 20, not in mask 0000ffff",
    "two calls": "__any_sync|__shfl_sync",
}


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_reported(selftest, case, order):
    result = run_case(selftest, case, order)
    assert result.returncode != 0
    assert re.search(FAULTS[case], result.stderr), result.stderr


# --------------------------------------------------------------------------------------------------------------- the kernels


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Path:
    """fastadv._C with the CUDA kernels, all of it under the sanitizers."""
    pybind11 = pytest.importorskip("pybind11", reason="a build dependency of fastadv: pip install pybind11")
    build = tmp_path_factory.mktemp("module")
    (build / "build_info.h").write_text(
        '#pragma once\n#define FASTADV_CXX "g++"\n#define FASTADV_NVCC "none"\n#define FASTADV_ARCHS "host"\n'
        '#define FASTADV_CUDA_NOTE "tests/cuda_host"\n#define FASTADV_WITH_CUDA\n'
    )
    include = [f"-I{path}" for path in (HOST, build, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])]

    def compiled(source: Path) -> Path:
        target = build / f"{source.name}.o"
        flags = [*FLAGS, *SANITIZE]
        if source.name == "bind.cpp":  # pybind11's templates would take longer than all the rest, and there is nothing to find
            flags = FLAGS
        elif source.suffix == ".cpp":  # which compile in half the time, and are as fast without fibers
            flags = [*flags, "-O0"]
        gxx(*flags, *include, "-x", "c++", "-c", source, "-o", target)
        return target

    sources = sorted([*CSRC.glob("*.cpp"), *CSRC.glob("*.cu")], key=lambda source: source.suffix != ".cu")  # the longest first
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    gxx("-shared", "-fsanitize=address,undefined", "-fopenmp", *objects, "-o", build / "_C.so")
    return build / "_C.so"


# The files of the shared table; of test_native.py, what a kernel computes and where it writes.
TABLE = ["test_steps.py", "test_losses.py", "test_weights.py", "test_native.py", "-k", "not test_native.py or outside or half"]
RUNS = {
    "cuda, forward": ("cuda", "forward", *TABLE, "cuda_host/cases.py"),
    "cuda, reverse": ("cuda", "reverse", *TABLE, "cuda_host/cases.py"),
    "cpu": ("cpu", "forward", "test_hyperplanes.py", *TABLE),
}


def run_pytest(module: Path, kernels: str, order: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "FASTADV_BACKEND"}
    environment |= ENVIRONMENT | {"CUDA_HOST_ORDER": order}
    environment["LD_PRELOAD"] = ":".join(gxx(f"-print-file-name={name}.so") for name in ("libasan", "libubsan", "libstdc++"))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # A sanitizer writes its report to file descriptor 2 before it aborts: pytest must not keep that for itself.
    command = [sys.executable, HOST / "run.py", kernels, module, "-x", "-p", "no:cacheprovider", "--capture=sys", *arguments]
    return subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True, timeout=1500)


@pytest.fixture(scope="module")
def runs(module) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """All of RUNS, started at once, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run_pytest, module, *arguments) for name, arguments in RUNS.items()}


@pytest.mark.parametrize("run", RUNS)
def test_kernels_compute_the_table_under_the_sanitizers(runs, run):
    result = runs[run].result()
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-12000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed, result.stdout
    assert int(passed[1]) > {"cuda, reverse": 250}.get(run, 400), result.stdout  # which has fewer cases
    assert "skipped" not in result.stdout, result.stdout
