"""What this machine is, what float32 is multiplied in, and the memory allocator."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator
from typing import Any

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


def multiplication() -> tuple[Any, ...]:
    """What float32 is multiplied in: itself, TF32 or bfloat16, in matrix products and convolutions."""
    if _NEWER:
        return tuple(place.fp32_precision for place in _places())
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@contextlib.contextmanager
def exact_multiplication() -> Iterator[None]:
    """float32 is multiplied in float32, and afterwards as before: on a GPU torch takes TF32 for convolutions by default."""
    before = multiplication()
    try:
        _multiply_in(*(["ieee"] * len(before) if _NEWER else ["highest", False]))
        yield
    finally:
        _multiply_in(*before)


def _multiply_in(*settings: Any) -> None:
    if _NEWER:
        for place, setting in zip(_places(), settings, strict=True):
            place.fp32_precision = setting
    else:
        torch.set_float32_matmul_precision(settings[0])
        torch.backends.cudnn.allow_tf32 = settings[1]


# Of torch's two interfaces to it. The older one, all there is before 2.9, raises once the newer has been used.
_NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def _places() -> tuple[Any, ...]:
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn  # type: ignore[attr-defined]


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
