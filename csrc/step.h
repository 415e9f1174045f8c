// The step family: one attack step with its projection, for a batch of [samples, size] elements.
#pragma once

#include "dtype.h"

namespace fastadv {

struct StepArgs {
  void* out;         // [samples, size] of dtype; may be adv itself
  const void* adv;   // [samples, size] of dtype
  const void* grad;  // [samples, size] of grad_dtype: dtype itself, a half format beside fp32, or fp32 beside a half format
  const void* x;     // [samples, size] of dtype
  int64_t samples, size;
  DType dtype, grad_dtype;
  double alpha, eps, lo, hi;
  const double* alphas;  // [samples] or null: replaces alpha sample by sample
  const double* radii;   // [samples] or null: replaces eps sample by sample
  double fraction;       // l1 only: of each sample's coordinates, those with the largest gradient, at least one, are moved
  L2Sums* workspace;     // l2 on CUDA only: what l2_workspace_cuda asks for

  FASTADV_FN double alpha_of(int64_t sample) const { return alphas ? alphas[sample] : alpha; }
  FASTADV_FN double eps_of(int64_t sample) const { return radii ? radii[sample] : eps; }
};

// Scalars of a step with momentum.
struct MomentumScalars {
  double alpha, momentum, eps, lo, hi;
  const double* alphas;  // [samples] or null: replaces alpha sample by sample; and so the others
  const double* momenta;
  const double* radii;

  template <class T>
  FASTADV_FN LinfStep<T> linf_of(int64_t sample) const {
    return {T(alphas ? alphas[sample] : alpha), T(radii ? radii[sample] : eps), T(lo), T(hi)};
  }
  FASTADV_FN double momentum_of(int64_t sample) const { return momenta ? momenta[sample] : momentum; }
};

struct ApgdArgs {
  void *adv, *old, *best;  // [samples, size] of dtype, as are image and x
  void* best_grad;         // [samples, size] of grad_dtype, as is grad
  void* image;
  const void *grad, *x;
  int64_t samples, size;
  DType dtype, grad_dtype;  // as in StepArgs
  MomentumScalars scalars;
  const bool* better;  // [samples]: adv and grad become best and best_grad
  const bool* taken;   // [samples]: adv becomes image

  template <class T>
  FASTADV_FN ApgdStep<T> step_of(int64_t sample) const {
    const double momentum = scalars.momentum_of(sample);
    return {scalars.linf_of<T>(sample), T(momentum), T(1.0 - momentum)};
  }
};

struct MomentumArgs {
  void *adv, *velocity;  // [samples, size] of dtype, as is x
  const void *grad, *x;
  int64_t samples, size;
  DType dtype, grad_dtype;  // as in StepArgs
  MomentumScalars scalars;
  double* sums;  // on CUDA only: [samples, kSumChunks] to work in
};

struct StartArgs {
  void* out;      // [samples * copies, size] of dtype: those of a sample one after the other
  const void* x;  // [samples, size] of dtype
  int64_t samples, copies, size;
  DType dtype;
  double eps, lo, hi;   // of a normal start eps is the standard deviation, and there is no box
  const double* radii;  // [samples] or null: replaces eps sample by sample
  uint64_t seed;
  const int64_t* numbers;  // [samples] or null: replaces a sample's place in the batch
  uint32_t step;           // of the first copy; each next one draws in the next step

  FASTADV_FN int64_t rows() const { return samples * copies; }  // of out
  FASTADV_FN double eps_of(int64_t sample) const { return radii ? radii[sample] : eps; }
  FASTADV_FN uint64_t number_of(int64_t sample) const { return uint64_t(numbers ? numbers[sample] : sample); }
};

void linf_step_cpu(const StepArgs& args, int threads);
void l2_step_cpu(const StepArgs& args, int threads);
void l1_step_cpu(const StepArgs& args, int threads);
void apgd_step_cpu(const ApgdArgs& args, int threads);
void momentum_step_cpu(const MomentumArgs& args, int threads);

// A uniform start in the linf ball: element e of a sample takes word e % 4 of the Philox counter (e / 4, its number) under the
// seed; to the second of the counter's four words, which is 0 but in samples of 2^34 elements, the step is added modulo 2^32.
void linf_start_cpu(const StartArgs& args, int threads);
void normal_start_cpu(const StartArgs& args, int threads);  // Gaussian noise by the same words

// The shortest d with <w, d> = gap and lo <= x + d <= hi, in one norm; point i takes plane i % planes.
struct HyperplaneArgs {
  void* out;           // [points, size] of dtype: d
  const void* x;       // [points, size] of dtype
  const void* w;       // [planes, size] of w_dtype
  const double* gaps;  // [points]
  int64_t points, planes, size;
  DType dtype, w_dtype;
  double lo, hi;
};

void linf_hyperplane_cpu(const HyperplaneArgs& args, int threads);
void l2_hyperplane_cpu(const HyperplaneArgs& args, int threads);
void l1_hyperplane_cpu(const HyperplaneArgs& args, int threads);

void linf_step_cuda(const StepArgs& args, void* stream);
void l2_step_cuda(const StepArgs& args, void* stream);
void l1_step_cuda(const StepArgs& args, void* stream);
void apgd_step_cuda(const ApgdArgs& args, void* stream);
void momentum_step_cuda(const MomentumArgs& args, void* stream);
void linf_start_cuda(const StartArgs& args, void* stream);
void normal_start_cuda(const StartArgs& args, void* stream);

// Bytes that l2_step_cuda needs in args.workspace on the current device: none where samples fit on chip.
int64_t l2_workspace_cuda(int64_t samples, int64_t size, DType dtype);

}  // namespace fastadv
