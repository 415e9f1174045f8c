// CUDA kernels of the step family.
//
//   linf  one pass: read adv, grad, x, write out, 16 bytes per fp32 element, the least any step can move. Pure streaming:
//         each thread moves 16 bytes per load, the three loads of an element group are independent and so in flight at
//         once, and the grid strides over a row. A row is the whole batch where the scalars are shared, else one sample.
//   start one pass: read x, write out; a thread draws the four words of one counter and uses them on four neighbours.
//
// l2 and l1 run on the GPU through the reference until their kernels are written.
#include <stdexcept>
#include <string>

#include <cuda_runtime.h>

#include "step.h"

namespace fastadv {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerRow = 4096;  // enough to fill any GPU; larger rows are strided
constexpr int kMaxGridRows = 65535;

template <class S, int kCount>
struct alignas(sizeof(S) * kCount > 16 ? 16 : sizeof(S) * kCount) Pack {
  S v[kCount];
};

template <class S, class G, int kPack>
__global__ void __launch_bounds__(kThreads) linf_step_kernel(StepArgs args, int64_t rows, int64_t packs_per_row) {
  using T = arithmetic_t<S>;
  const auto* adv = static_cast<const Pack<S, kPack>*>(args.adv);
  const auto* grad = static_cast<const Pack<G, kPack>*>(args.grad);
  const auto* x = static_cast<const Pack<S, kPack>*>(args.x);
  auto* out = static_cast<Pack<S, kPack>*>(args.out);
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const LinfStep<T> step{T(args.alpha_of(row)), T(args.eps_of(row)), T(args.lo), T(args.hi)};
    const int64_t base = row * packs_per_row;
    for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < packs_per_row; i += int64_t(gridDim.x) * kThreads) {
      const auto a = adv[base + i];
      const auto g = grad[base + i];
      const auto c = x[base + i];
      Pack<S, kPack> o;
#pragma unroll
      for (int k = 0; k < kPack; ++k) store(o.v[k], step(load(a.v[k]), load(g.v[k]), load(c.v[k])));
      out[base + i] = o;
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) linf_start_kernel(StartArgs args) {
  using T = arithmetic_t<S>;
  for (int64_t sample = blockIdx.y; sample < args.samples; sample += gridDim.y) {
    const LinfStart<T> f{T(args.radii ? args.radii[sample] : args.eps), T(args.lo), T(args.hi)};
    const S* x = static_cast<const S*>(args.x) + sample * args.size;
    S* out = static_cast<S*>(args.out) + sample * args.size;
    const int64_t counters = (args.size + 3) / 4;
    for (int64_t c = blockIdx.x * int64_t(kThreads) + threadIdx.x; c < counters; c += int64_t(gridDim.x) * kThreads) {
      const Words w = philox(args.seed, uint32_t(c), uint32_t(c >> 32), uint32_t(sample), uint32_t(sample >> 32));
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (4 * c + k < args.size) store(out[4 * c + k], f(w.word[k], load(x[4 * c + k])));
    }
  }
}

dim3 grid_for(int64_t rows, int64_t items_per_row) {
  const int64_t blocks = (items_per_row + kThreads - 1) / kThreads;
  return dim3(unsigned(blocks < kBlocksPerRow ? blocks : kBlocksPerRow), unsigned(rows < kMaxGridRows ? rows : kMaxGridRows));
}

void check_launch(const char* name) {
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <class S, class G, int kPack>
void launch_linf(const StepArgs& args, int64_t rows, int64_t row_size, cudaStream_t stream) {
  const int64_t packs = row_size / kPack;
  linf_step_kernel<S, G, kPack><<<grid_for(rows, packs), kThreads, 0, stream>>>(args, rows, packs);
}

template <class S, class G>
void linf_step_typed(const StepArgs& args, cudaStream_t stream) {
  const bool one_step_for_all = !args.alphas && !args.radii;
  const int64_t rows = one_step_for_all ? 1 : args.samples;
  const int64_t row_size = one_step_for_all ? args.samples * args.size : args.size;
  if (rows == 0 || row_size == 0) return;
  constexpr int kPack = 16 / sizeof(S);
  const bool vectorised = row_size % kPack == 0 && aligned(args.out, 16) && aligned(args.adv, 16) && aligned(args.x, 16) &&
                          aligned(args.grad, alignof(Pack<G, kPack>));
  if (vectorised)
    launch_linf<S, G, kPack>(args, rows, row_size, stream);
  else
    launch_linf<S, G, 1>(args, rows, row_size, stream);
}

}  // namespace

void linf_step_cuda(const StepArgs& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  dispatch(args.dtype, args.grad_dtype, [&](auto s, auto g) { linf_step_typed<decltype(s), decltype(g)>(args, stream); });
  check_launch("linf_step");
}

void linf_start_cuda(const StartArgs& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (args.samples == 0 || args.size == 0) return;
  const dim3 grid = grid_for(args.samples, (args.size + 3) / 4);
  dispatch(args.dtype, [&](auto s) { linf_start_kernel<decltype(s)><<<grid, kThreads, 0, stream>>>(args); });
  check_launch("linf_start");
}

}  // namespace fastadv
