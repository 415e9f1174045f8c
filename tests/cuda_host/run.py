"""pytest with other kernels under the test files: ``python run.py cuda|cpu path/to/_C.so [pytest arguments]``.

``fastadv._C`` is the given module, compiled under the sanitizers. After "cuda" its CUDA kernels take the place of its CPU
kernels: what tests call "cpp" runs csrc/*.cu on tests/cuda_host/cuda_runtime.h. After "cpu" it is csrc/*_cpu.cpp.

tests/test_cuda_host.py starts it, as the sanitizers' libraries must be loaded before Python.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch  # before the module, so that they share one libgomp

# How torch knows the ops. Its compiler takes seconds, and says nothing about a kernel.
ABOUT_TORCH = {"test_compiled", "test_torch_sees_the_op"}
# A GPU does not report a label outside [0, C): its row becomes NaN (tests/cuda_host/cases.py).
ONLY_CPU_REFUSES = {"label too large", "negative label", "target too large"}


def load_module(path: str) -> None:
    """Makes it what ``import fastadv._C`` finds. Not in a plugin: pytest imports fastadv first, for its warnings."""
    spec = importlib.util.spec_from_file_location("fastadv._C", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["fastadv._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fastadv._C"])


def route_cpu_tensors_to_cuda_kernels() -> None:
    from fastadv import native

    def launch(name: str, on: torch.Tensor, *arguments: float) -> None:
        getattr(native._C, f"{name}_cuda")(*arguments, 0)

    native._on_gpu = lambda t: True
    native._launch = launch


def shorten_the_table(cuda: bool) -> None:
    """To native kernels: to collect what is then left out would take as long as the tests."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import table

    table.BACKENDS = ("cpp",)
    for backends in (table.STEP_BACKENDS, table.UPDATE_BACKENDS):
        backends.update(dict.fromkeys(backends, table.BACKENDS))
    if not cuda:  # under the sanitizers no loop is vectorised: a sum has one accumulator in place of sixteen, and rounds more
        table.ROUNDING[torch.float32] *= 32


@functools.cache
def is_about_triton(test: Callable[..., object]) -> bool:
    return '"triton"' in inspect.getsource(test)


class OnlyNativeKernels:
    """Leaves out tests of other backends, and what says nothing about a kernel or takes too long under the sanitizers."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def runs(self, item: pytest.Item) -> bool:
        if not isinstance(item, pytest.Function) or item.originalname in ABOUT_TORCH:
            return False
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        native = parameters["backend"] == "cpp" if "backend" in parameters else not is_about_triton(item.function)
        refused = self.cuda and parameters.get("case") in ONLY_CPU_REFUSES
        return native and not refused and not cut_for_threads(item)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        native = [item for item in items if self.runs(item)]
        # A fifth of the cases in one order of threads and fewer, others, in the other, neighbours that differ in one axis: what
        # lacks a barrier or reads too far does so in most of them.
        kept = native[1::15] if os.environ["CUDA_HOST_ORDER"] == "reverse" else native[::5]
        config.hook.pytest_deselected(items=list({*items}.difference(kept)))
        items[:] = kept


def cut_for_threads(item: pytest.Function) -> bool:
    """Whether the input is large for the sake of the CPU's threads: of those one dtype and layout are enough."""
    words = set(item.nodeid.partition("[")[2].rstrip("]").replace("/", "-").split("-"))
    return "chunks" in words and bool(words & {"float64", "bfloat16", "float16", "strided", "channels_last"})


def main(kernels: str, module: str, *arguments: str) -> int:
    load_module(module)
    shorten_the_table(kernels == "cuda")
    if kernels == "cuda":
        route_cpu_tensors_to_cuda_kernels()
    return pytest.main([*arguments], plugins=[OnlyNativeKernels(kernels == "cuda")])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
