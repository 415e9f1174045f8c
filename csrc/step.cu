// CUDA kernels of the step family.
//
//   linf  one pass: read adv, grad, x, write out, 16 bytes per fp32 element, the least any step can move. Pure streaming:
//         each thread moves 16 bytes per load, the three loads of an element group are independent and so in flight at
//         once, and the grid strides over a row. A row is the whole batch where the scalars are shared, else one sample.
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
struct alignas(sizeof(S) * kCount) Pack {
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

bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <class S, class G, int kPack>
void launch_linf(const StepArgs& args, int64_t rows, int64_t row_size, cudaStream_t stream) {
  const int64_t packs = row_size / kPack;
  const int64_t blocks = (packs + kThreads - 1) / kThreads;
  const dim3 grid(unsigned(blocks < kBlocksPerRow ? blocks : kBlocksPerRow), unsigned(rows < kMaxGridRows ? rows : kMaxGridRows));
  linf_step_kernel<S, G, kPack><<<grid, kThreads, 0, stream>>>(args, rows, packs);
}

template <class S, class G>
void linf_step_typed(const StepArgs& args, cudaStream_t stream) {
  const bool one_step_for_all = !args.alphas && !args.radii;
  const int64_t rows = one_step_for_all ? 1 : args.samples;
  const int64_t row_size = one_step_for_all ? args.samples * args.size : args.size;
  if (rows == 0 || row_size == 0) return;
  constexpr int kPack = 16 / sizeof(S);
  const bool vectorised = row_size % kPack == 0 && aligned(args.out, 16) && aligned(args.adv, 16) && aligned(args.x, 16) &&
                          aligned(args.grad, sizeof(G) * kPack);
  if (vectorised)
    launch_linf<S, G, kPack>(args, rows, row_size, stream);
  else
    launch_linf<S, G, 1>(args, rows, row_size, stream);
}

}  // namespace

void linf_step_cuda(const StepArgs& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const DType s = args.dtype, g = args.grad_dtype;
  if (s == DType::f32 && g == DType::f32) linf_step_typed<float, float>(args, stream);
  else if (s == DType::f32 && g == DType::bf16) linf_step_typed<float, bf16>(args, stream);
  else if (s == DType::f32 && g == DType::f16) linf_step_typed<float, f16>(args, stream);
  else if (s == DType::f64 && g == DType::f64) linf_step_typed<double, double>(args, stream);
  else if (s == DType::bf16 && g == DType::bf16) linf_step_typed<bf16, bf16>(args, stream);
  else if (s == DType::f16 && g == DType::f16) linf_step_typed<f16, f16>(args, stream);
  else throw std::invalid_argument("step: unsupported pair of storage types");
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    throw std::runtime_error(std::string("linf_step: ") + cudaGetErrorString(error));
}

}  // namespace fastadv
