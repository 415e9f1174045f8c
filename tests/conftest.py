"""Triton kernels run in every test session: on a GPU where there is one, else under Triton's interpreter."""

import atexit
import gc
import os
import shutil
import tempfile

import pytest
import torch
import torch.distributed

# Triton reads this when a kernel is declared, so it is set before anything imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What engine="auto" measures under tests is nothing for the user's own file.
os.environ["FASTADV_CACHE"] = tempfile.mkdtemp(prefix="fastadv-tests-")

from ways import no_codegen, own_choices, quick_alarms, recorder, way  # noqa: F401 - fixtures, which import fastadv

atexit.register(shutil.rmtree, os.environ["FASTADV_CACHE"], ignore_errors=True)

# Several processes of several threads each would wait for one another, tens of times over.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def process_group():
    """Of one rank. A DDP wrapper that outlived it would join gloo's threads, which may wait for the GIL that it holds."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()
    torch.distributed.destroy_process_group()


def pytest_configure(config: pytest.Config) -> None:
    """xdist would begin with the files of many tests, and end with one process on a few that take minutes each."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "test_cuda_host" not in item.nodeid)  # the longest file first
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
