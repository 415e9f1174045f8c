// The loss family: per-sample values and closed-form gradients with respect to the logits, rows of [rows, classes].
#pragma once

#include "dtype.h"

namespace fastadv {

struct LossArgs {
  void* loss;              // [rows] of the arithmetic type
  void* grad;              // [rows, classes] of dtype: d loss[i] / d logits[i]
  void* grad_ref;          // [rows, classes] of dtype or null: d loss[i] / d logits_ref[i]
  const void* logits;      // [rows, classes] of dtype
  const void* logits_ref;  // [rows, classes] of dtype; kl and se only
  const int64_t* labels;   // [rows] or null
  const void* soft;        // [rows, classes] of the arithmetic type or null: soft labels, ce only
  const int64_t* targets;  // [rows]; dlr_targeted only
  int64_t rows, classes;
  DType dtype;
};

// Cross-entropy, hard or soft labels.
void ce_cpu(const LossArgs& args, int threads);
// log((1 - p_y) / p_y), the attack form of cross-entropy: increasing in it, and its gradient never saturates.
void log_odds_cpu(const LossArgs& args, int threads);
// max over k != y of z_k, minus z_y (Carlini and Wagner).
void margin_cpu(const LossArgs& args, int threads);
// Difference of logits ratio (Croce and Hein); the margin below 3 classes.
void dlr_cpu(const LossArgs& args, int threads);
// Its targeted form; z_target - z_y below 4 classes.
void dlr_targeted_cpu(const LossArgs& args, int threads);
// KL(softmax(logits_ref) || softmax(logits)).
void kl_cpu(const LossArgs& args, int threads);
// Squared distance between the two softmaxes.
void se_cpu(const LossArgs& args, int threads);

// The same on a GPU. There a label outside [0, classes) turns its row's loss and gradient into NaN: nobody waits to refuse it.
void ce_cuda(const LossArgs& args, void* stream);
void log_odds_cuda(const LossArgs& args, void* stream);
void margin_cuda(const LossArgs& args, void* stream);
void dlr_cuda(const LossArgs& args, void* stream);
void dlr_targeted_cuda(const LossArgs& args, void* stream);
void kl_cuda(const LossArgs& args, void* stream);
void se_cuda(const LossArgs& args, void* stream);

}  // namespace fastadv
