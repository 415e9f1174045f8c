"""What was built, with which compilers, and what runs on this machine and why: ``fastadv info``."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import native, ops
from ._version import __version__
from .engine import choices
from .machine import device_name


def environment() -> dict[str, str]:
    """Versions and hardware, as benchmarks and reports print them."""
    return {
        "fastadv": __version__,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{device_name(torch.device('cpu'))}, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def build() -> dict[str, str]:
    """How the native extension was built."""
    if native.LOAD_ERROR is not None:
        return {"native kernels": f"none: {native.LOAD_ERROR}"}
    info = native.BUILD_INFO
    cuda = f"{info['nvcc']}, {info['cuda_archs']} with PTX" if info["cuda_archs"] else f"none: {info['cuda_note']}"
    return {"C++ kernels": info["cxx"] + (", OpenMP" if info["openmp"] else ", one thread"), "CUDA kernels": cuda}


def backends() -> list[tuple[str, str, str, str]]:
    """(device, op, backend, why) for every op on the CPU and, where there is one, the GPU."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [(device, op, *_choice(op, device)) for device in devices for op in ops.ALL]


def _choice(op: str, device: str) -> tuple[str, str]:
    try:
        return ops.choice(op, device)
    except (RuntimeError, ValueError) as error:  # FASTADV_BACKEND asks for what is not there: say so, do not fail
        return "none", str(error)


def report() -> str:
    """The whole story as text."""
    facts = {**environment(), **build()}
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    lines += ["", f"{'device':<8}{'op':<14}{'backend':<11}why"]
    lines += [f"{device:<8}{op:<14}{backend:<11}{why}" for device, op, backend, why in backends()]
    known = choices.known()
    if known:
        lines += ["", f"chosen by engine='auto', in {choices.file()}: milliseconds a step, fastest first"]
        for choice in known.values():
            times = ", ".join(f"{plan} {ms:.3g}" for plan, ms in choice["milliseconds"].items())
            lines.append(f"{choice['model']} on {choice['inputs']}, {choice['device']}: {choice['plan']} ({times})")
    return "\n".join(lines)


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
