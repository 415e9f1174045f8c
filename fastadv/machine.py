"""What this machine is, and its memory allocator."""

from __future__ import annotations

import ctypes
import platform

import torch


def cpu_name() -> str:
    """The model of the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The model of the GPU, or of the processor with the number of threads that torch uses of it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"


# Options of glibc's mallopt and what they are set to: no allocation gets pages of its own, none go back to the system.
_MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 2**28)}


def tune_allocator() -> bool:
    """Has this process keep the memory that it frees, so that the next tensor on the CPU finds it without page faults.

    By default glibc hands tensors of some megabytes back to the system as soon as they die, and each step of an attack, or of
    any training loop on a CPU, then spends a good part of its time on getting fresh pages. Memory is not returned to the system
    any more, for the life of the process; call it once, before the first large tensor. ``fastadv demo`` does.

    Returns:
        Whether it was done: there is nothing to do where the C library is not glibc.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - raises where it is another library
    except (AttributeError, OSError, TypeError):
        return False
    return all(libc.mallopt(option, value) == 1 for option, value in _MALLOPT.values())
