"""What an installed fastadv is: typed, light to import, its parts under its own name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import fastadv


def test_the_package_is_typed_and_versioned():
    assert (Path(fastadv.__file__).parent / "py.typed").exists()
    assert importlib.metadata.version("fastadv") == fastadv.__version__


def test_torch_is_the_only_dependency():
    required = [r for r in importlib.metadata.requires("fastadv") or [] if "extra ==" not in r]
    assert required == ["torch>=2.6"]


def test_kernels_are_fastadvs_and_not_a_top_level_package():
    assert importlib.util.find_spec("fastadv.kernels") is not None
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd="/", capture_output=True, text=True)
    assert "ModuleNotFoundError" in done.stderr


def test_importing_fastadv_imports_nothing_heavy():
    """Beyond torch: Triton alone would take longer than everything else."""
    code = "import torch, sys; before = set(sys.modules); import fastadv; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    heavy = {"triton", "matplotlib", "numpy", "sklearn", "mlxtend", "tqdm", "torch._dynamo", "torch._inductor"}
    assert not heavy & set(loaded)
    assert len([name for name in loaded if not name.startswith("fastadv.")]) < 20, loaded
