"""Builds fastadv._C: torch-free C++ and, where nvcc is found, CUDA, through ninja.

Everything that is not the native extension stands in pyproject.toml. Environment:

FASTADV_CUDA        auto (default: use nvcc if found, fall back to CPU with a warning), 0 (never), 1 (required)
FASTADV_CUDA_ARCHS  compute capabilities, e.g. "80;90"; default: 80, 90 and the newest that nvcc knows. Each comes with its
                    PTX, so every GPU from the oldest one on works.
CXX, CUDA_HOME      compilers to use instead of those on PATH
CXXFLAGS            options for the C++ compiler, after ours

Without a C++ compiler and Python's headers the package installs as pure Python: every op then runs through its PyTorch
reference.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
# No trap or errno semantics, so loops with comparisons vectorise; no -ffast-math, whose NaN and sign rules differ.
CXX_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra".split()
NVCC_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden --expt-relaxed-constexpr".split()


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def find_cxx() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)


def can_compile() -> bool:
    return find_cxx() is not None and Path(sysconfig.get_paths()["include"], "Python.h").exists()


def find_nvcc() -> str | None:
    cuda_home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc", path=f"{cuda_home}/bin") if cuda_home else shutil.which("nvcc")
    return path or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_home(nvcc: str) -> Path:
    """The toolkit's root, also when the nvcc on PATH is a wrapper script."""
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"#\$ TOP=(.+)", dryrun.stderr)
    return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parent.parent


def cuda_archs(nvcc: str) -> list[str]:
    if chosen := os.environ.get("FASTADV_CUDA_ARCHS"):
        return [arch.strip().replace(".", "") for arch in re.split(r"[;, ]+", chosen.strip())]
    known = {int(code) for code in re.findall(r"compute_(\d+)\b", output(nvcc, "--list-gpu-arch"))}
    return [str(arch) for arch in sorted({80, 90, max(known)} & known)]


def ninja_path(path: Path | str) -> str:
    return re.sub(r"([ :$])", r"$\1", str(path))


class NinjaBuild(build_ext):
    """Compiles the sources of the one extension in parallel and links them."""

    def build_extension(self, ext: Extension) -> None:
        wish = os.environ.get("FASTADV_CUDA", "auto")
        if wish not in ("auto", "0", "1"):
            sys.exit(f"fastadv: FASTADV_CUDA={wish!r}; expected auto, 0 or 1")
        nvcc = None if wish == "0" else find_nvcc()
        if wish == "1" and nvcc is None:
            sys.exit("fastadv: FASTADV_CUDA=1 but no nvcc found; put it on PATH or set CUDA_HOME")
        if nvcc is None:
            self.compile(ext, None, "not asked for (FASTADV_CUDA=0)" if wish == "0" else "no nvcc found at build time")
            return
        try:
            self.compile(ext, nvcc, "built")
        except (subprocess.CalledProcessError, OSError, StopIteration, ValueError):  # also an incomplete toolkit
            if wish == "1":
                raise
            print("\n*** fastadv: nvcc was found but failed (above). Building the CPU half only. ***\n", file=sys.stderr)
            self.compile(ext, None, f"{nvcc} failed at build time")

    def compile(self, ext: Extension, nvcc: str | None, cuda_note: str) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve() / ("cuda" if nvcc else "cpu")
        build.mkdir(parents=True, exist_ok=True)
        cxx = find_cxx() or sys.exit("fastadv: the C++ compiler has gone")
        archs = cuda_archs(nvcc) if nvcc else []

        (build / "build_info.h").write_text(
            "#pragma once\n"
            f'#define FASTADV_CXX "{output(cxx, "--version").splitlines()[0]}"\n'
            f'#define FASTADV_NVCC "{output(nvcc, "--version").splitlines()[-1] if nvcc else ""}"\n'
            f'#define FASTADV_ARCHS "{" ".join(f"sm_{arch}" for arch in archs)}"\n'
            f'#define FASTADV_CUDA_NOTE "{cuda_note}"\n' + ("#define FASTADV_WITH_CUDA\n" if nvcc else "")
        )
        include = [shlex.quote(f"-I{path}") for path in (build, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])]
        openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]  # Apple's clang ships without it
        link = ["-shared", *openmp]
        if platform.system() == "Darwin":
            link = ["-bundle", "-undefined", "dynamic_lookup"]
        if nvcc:
            gencode = [f"-gencode=arch=compute_{arch},code=[compute_{arch},sm_{arch}]" for arch in archs]
            library = next(iter(cuda_home(nvcc).glob("**/libcudart_static.a")))
            link += [
                shlex.quote(str(library)),
                "-ldl",
                "-lrt",
                "-lpthread",
            ]  # static: the module imports where there is no CUDA

        lines = [
            f"cxx = {shlex.quote(cxx)}",
            f"flags = {' '.join([*CXX_FLAGS, *openmp, *include, os.environ.get('CXXFLAGS', '')])}",
            f"link = {' '.join(link)}",
            "rule cxx\n  command = $cxx $flags -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $cxx $in $link -o $out",
        ]
        if nvcc:
            lines += [
                f"nvcc = {shlex.quote(nvcc)}",
                f"nvcc_flags = {' '.join([*NVCC_FLAGS, '--threads', '0', *gencode, *include])}",
                "rule nvcc\n  command = $nvcc $nvcc_flags -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            ]
        objects = []
        # What takes longest first: ninja starts jobs in this order.
        for source in (sorted(CSRC.glob("*.cu")) if nvcc else []) + sorted(CSRC.glob("*.cpp")):
            objects.append(f"{source.name}.o")
            lines.append(f"build {source.name}.o: {'nvcc' if source.suffix == '.cu' else 'cxx'} {ninja_path(source)}")
        lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}")
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run(["ninja", "-C", str(build)], check=True)


if not can_compile():
    print("\n*** fastadv: no C++ compiler or no Python.h; installing without native kernels. ***\n", file=sys.stderr)

setup(
    packages=[*find_packages(include=["fastadv", "fastadv.*"]), "fastadv.kernels", "fastadv.recipes"],
    package_dir={"fastadv.kernels": "kernels", "fastadv.recipes": "recipes"},
    package_data={"fastadv": ["py.typed"], "fastadv.recipes": ["*.yaml"]},
    ext_modules=[Extension("fastadv._C", sources=[])] if can_compile() else [],
    cmdclass={"build_ext": NinjaBuild},
    zip_safe=False,
)
