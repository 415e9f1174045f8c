#!/usr/bin/env bash
# Everything that needs a GPU, offline. Parts, by name; all by default, which takes about half an hour:
#     OUT=/tmp/out bash benchmarks/gpu.sh [tests] [sanitize] [profile] [steps] [losses] [attacks] [training] [engine]
# Each part has a time limit, and a part that fails or is cut off does not stop the others. Five calls of less than nine
# minutes each, the build included: `tests`, `sanitize profile`, `steps attacks training`, `losses`, `engine`.
# $OUT gets log.txt (everything printed), profile.txt (ncu) and steps.json, losses.json, attacks.json, training.json and, of whole
# attacks and training steps by every engine, engine-*.json.
# Needs, installed: torch with CUDA, triton, nvcc, pybind11, ninja, pytest, tabulate; uses pytest-xdist, compute-sanitizer and
# ncu where they are.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${OUT:?the folder for results}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PATH="$PATH:/usr/local/cuda/bin"

limit() { timeout --signal=INT --kill-after=15 "$@"; } # an interrupted benchmark still prints its table

build() {
  local arch
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1) # one architecture: this GPU's
  FASTADV_CUDA=1 FASTADV_CUDA_ARCHS=${FASTADV_CUDA_ARCHS:-$arch} \
    limit 120 python3 -m pip install --no-build-isolation --no-deps -e . && python3 -m fastadv.info
}

tests() {
  local status=0 workers=()
  if python3 -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi # most of the time goes into Triton's compiler
  limit 300 python3 -m pytest -q --tb=short -m gpu tests/test_gpu.py -k 'not two_to_the_31' "${workers[@]}" || status=1
  limit 60 python3 -m pytest -q --tb=short -m gpu tests/test_gpu.py -k two_to_the_31 || status=1
  return "$status"
}

sanitize() {
  local status=0 tool
  command -v compute-sanitizer || { echo "compute-sanitizer is not here" && return 1; }
  for tool in memcheck racecheck; do
    # Without torch's caching allocator every tensor is an allocation of its own, and memcheck sees a step over its end.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limit 170 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
      --launch-timeout 120 python3 -m pytest -v --tb=short -m gpu tests/test_gpu.py -k small_run || status=1
  done
  return "$status"
}

profile() {
  command -v ncu || { echo "ncu is not here" && return 1; }
  limit 80 ncu --clock-control none --profile-from-start off --section SpeedOfLight --section MemoryWorkloadAnalysis \
    --section LaunchStats --section Occupancy python3 -m benchmarks.ncu >"$out/profile.txt" 2>&1
  local status=$?
  grep -E '^  [a-z].*\(|DRAM Throughput|Duration|Registers Per' "$out/profile.txt"
  return "$status"
}

benchmark() { # NAME SECONDS CASES...
  local name=$1 seconds=$2
  shift 2
  limit "$seconds" python3 -m benchmarks --device cuda --json "$out/$name.json" --only "$@"
}
steps() { benchmark steps 300 _step_; }
losses() { benchmark losses 400 'ce ' 'log_odds ' 'margin ' 'dlr ' 'kl ' 'se '; }
attacks() { benchmark attacks 60 pgd-10; }
training() { benchmark training 90 awp train; }

end_to_end() { # NAME SECONDS OPTIONS...
  local name=$1 seconds=$2
  shift 2
  limit $((seconds + 30)) python3 -m benchmarks.end_to_end --device cuda --json "$out/engine-$name.json" \
    --limit-seconds "$seconds" "$@"
}
engine() { # training and attacks at batch 128, for the goals, and then how it goes with the batch size; compiling takes longest
  local status=0
  end_to_end training 100 --models preact-resnet18 wrn-34-10 --batches 128 --what pgd-at trades awp \
    --engines eager graph --precisions fp32 bf16 || status=1
  end_to_end attacks 190 --models preact-resnet18 --batches 128 --what attack --precisions bf16 fp32 || status=1
  end_to_end batches 90 --models demo-cnn preact-resnet18 wrn-34-10 vit-s --what attack --engines eager graph || status=1
  return "$status"
}

main() {
  local parts=("$@") part status=0 summary=()
  [ $# -gt 0 ] || parts=(tests sanitize profile steps losses attacks training engine)
  for part in build "${parts[@]}"; do
    printf '\n=== %s (%d s)\n' "$part" "$SECONDS"
    if "$part"; then summary+=("$part: passed"); else
      summary+=("$part: FAILED")
      status=1
      if [ "$part" = build ]; then break; fi
    fi
  done
  printf '\n=== %d s\n' "$SECONDS"
  printf '%s\n' "${summary[@]}"
  return "$status"
}

for part in "$@"; do
  case $part in tests | sanitize | profile | steps | losses | attacks | training | engine) ;; *)
    echo "no part is called $part" >&2
    exit 2
    ;;
  esac
done
main "$@" 2>&1 | tee "$out/log.txt"
