// The weights family: adversarial weight perturbation of all tensors of a model together.
//
//   weight_sums   |o|^2, <d,d>, <d,g>, <g,g> of each tensor, d = w - o: 8 bytes per fp32 element where w is its own origin;
//                 with `record`, origin <- w in the same pass (4 more), which is what makes restoring bit-exact.
//   perturb       w <- o + shrink (d + alpha |o| g/|g|), onto the ball of gamma |o|: 12 bytes (16 with another origin).
//
// Two passes because a tensor's step needs its norms; the first modifies no weight, so an interruption between them is safe.
#pragma once

#include "dtype.h"

namespace fastadv {

struct Weight {
  void* w;         // [size] of dtype
  const void* g;   // [size] of grad_dtype: dtype itself, a half format beside fp32, or fp32 beside a half format
  void* origin;    // [size] of dtype; may be w itself
  int64_t size;
  DType dtype, grad_dtype;
};

struct WeightsArgs {
  const Weight* tensors;  // in the memory of the host
  int64_t count;
  WeightSums* sums;  // [count, slices], to be added up over slices; all are written
  int64_t slices;
  bool record;          // weight_sums only: d = 0, and origin is written
  double gamma, alpha;  // perturb only
};

void weight_sums_cpu(const WeightsArgs& args, int threads);
void perturb_cpu(const WeightsArgs& args, int threads);

void weight_sums_cuda(const WeightsArgs& args, void* stream);
void perturb_cuda(const WeightsArgs& args, void* stream);

}  // namespace fastadv
