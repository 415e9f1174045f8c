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

  FASTADV_FN double alpha_of(int64_t sample) const { return alphas ? alphas[sample] : alpha; }
  FASTADV_FN double eps_of(int64_t sample) const { return radii ? radii[sample] : eps; }
};

struct StartArgs {
  void* out;      // [samples, size] of dtype
  const void* x;  // [samples, size] of dtype
  int64_t samples, size;
  DType dtype;
  double eps, lo, hi;
  const double* radii;  // [samples] or null: replaces eps sample by sample
  uint64_t seed;
};

void linf_step_cpu(const StepArgs& args, int threads);
void l2_step_cpu(const StepArgs& args, int threads);
// Moves the `fraction` of each sample's coordinates with the largest gradient (at least one).
void l1_step_cpu(const StepArgs& args, double fraction, int threads);

// A uniform start in the linf ball: element e of sample i takes word e % 4 of the Philox counter (e / 4, i) under the seed.
void linf_start_cpu(const StartArgs& args, int threads);

void linf_step_cuda(const StepArgs& args, void* stream);
void linf_start_cuda(const StartArgs& args, void* stream);

}  // namespace fastadv
