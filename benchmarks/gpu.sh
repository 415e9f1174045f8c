#!/usr/bin/env bash
# Everything that needs a GPU, in one call and offline: build, `pytest -m gpu`, benchmarks; results under $OUT.
#     OUT=/tmp/out bash benchmarks/gpu.sh
# Needs torch with CUDA, nvcc, pybind11, ninja, pytest and tabulate already installed. A failing part does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:?the folder for results}
status=0

FASTADV_CUDA=1 pip install -q --no-build-isolation --no-deps -e . 2>&1 | tee "$out/build.log" || exit 1
fastadv info | tee "$out/info.txt"
python -m pytest -q -m gpu tests/test_gpu.py 2>&1 | tee "$out/tests.log" || status=1
python -m benchmarks --device cuda --json "$out/cuda.json" 2>&1 | tee "$out/benchmarks.log" || status=1
exit $status
