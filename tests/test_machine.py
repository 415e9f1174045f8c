"""The allocator setting does what it says: memory that was freed is found again without page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from fastadv import machine

PROGRAM = """
import resource, sys, torch, fastadv
if sys.argv[1] == "tuned":
    assert fastadv.tune_allocator()
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[2:]))  # the kernel may take idle pages back, whatever glibc does
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_found_again_without_page_faults():
    assert faults("tuned") < 10 < faults("plain")


@pytest.mark.parametrize("error", [OSError, TypeError, AttributeError])
def test_another_c_library_has_nothing_to_set(monkeypatch, error):
    def none(name):
        raise error

    monkeypatch.setattr(machine.ctypes, "CDLL", none)
    assert machine.tune_allocator() is False


def test_names_of_this_machine():
    import torch

    assert machine.cpu_name() in machine.device_name(torch.device("cpu"))
