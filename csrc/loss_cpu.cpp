// CPU loops of the loss family.
//
// Each row is copied once into an aligned scratch row of the arithmetic type, padded to whole vectors with -inf (whose exp
// is 0, so padding changes no sum): every reduction below runs on full vectors, at 10 classes as at 10,000, and logits are
// read from memory once and their gradient written once.
#include "loss.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"

namespace fastadv {
namespace {

constexpr int64_t kLanes = 16;  // floats in the widest vector, 64 bytes

inline int64_t padded(int64_t classes) { return (classes + kLanes - 1) / kLanes * kLanes; }

template <class T>
FASTADV_FN T* aligned(T* row) {
#if defined(__GNUC__)
  return static_cast<T*>(__builtin_assume_aligned(row, 64));
#else
  return row;
#endif
}

// Loads a row into scratch `z` of padded(classes) elements; -inf for the padding and, if it is a class, for `skip`. Whole
// vectors are read even past the row's end, as long as they lie in the batch (`readable` elements from `row` on): a scalar
// tail would cost twice the rest at 10 classes, because a vector load right after narrow stores stalls.
template <class S, class T>
FASTADV_FN void load_row(const S* row, int64_t classes, int64_t readable, T* z, int64_t skip = -1) {
  const T nothing = -std::numeric_limits<T>::infinity();
  const int32_t n = int32_t(padded(classes)), end = int32_t(classes);
  int32_t hole = int32_t(skip);
#if defined(__GNUC__)
  asm("" : "+r"(hole));  // unknown to gcc, which would split the loop at `end` where there is no hole: scalar tails again
#endif
  z = aligned(z);
  if (n <= readable) {
#pragma omp simd
    for (int32_t k = 0; k < n; ++k) {
      const T v = load(row[k]);
      z[k] = (k < end) & (k != hole) ? v : nothing;
    }
  } else {
    for (int32_t k = 0; k < n; ++k) z[k] = (k < end) & (k != hole) ? load(row[k < end ? k : 0]) : nothing;
  }
}

template <class T>
struct Softmax {
  T max, sum;
};

// z <- z - max(z), e <- exp(z); returns the max and sum(e).
template <class T>
FASTADV_FN Softmax<T> softmax_row(T* z, T* e, int64_t classes) {
  z = aligned(z);
  e = aligned(e);
  const int64_t n = padded(classes);
  T top = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t k = 0; k < n; ++k) top = top < z[k] ? z[k] : top;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) {
    z[k] -= top;
    e[k] = exp_(z[k]);
    sum += e[k];
  }
  return {top, sum};
}

// The first index of the largest value of a padded row; NaN ranks with +inf. Two vector passes beat one scalar one from a few
// classes on.
template <class T>
FASTADV_FN int64_t argmax(T* z, int64_t classes) {
  z = aligned(z);
  const int32_t n = int32_t(padded(classes));
  const T infinity = std::numeric_limits<T>::infinity();
  T top = -infinity;
#pragma omp simd reduction(max : top)
  for (int32_t k = 0; k < n; ++k) {
    const T v = z[k] == z[k] ? z[k] : infinity;
    top = top < v ? v : top;
  }
  int32_t index = n;
#pragma omp simd reduction(min : index)
  for (int32_t k = 0; k < n; ++k) {
    const T v = z[k] == z[k] ? z[k] : infinity;
    index = v == top && k < index ? k : index;
  }
  return index;
}

// The indices of the largest values, largest first; of equals the first one leads, as in a stable sort. Spoils z.
template <class T, int kCount>
FASTADV_FN void take_largest(T* z, int64_t classes, int64_t (&index)[kCount]) {
  for (int64_t& i : index) {
    i = argmax(z, classes);
    z[i] = -std::numeric_limits<T>::infinity();
  }
}

// The scratch rows and typed views that every row loop needs.
template <class S>
struct Rows {
  using T = arithmetic_t<S>;
  const LossArgs& args;
  std::vector<T> scratch;
  T *z, *e, *z_ref, *e_ref;

  explicit Rows(const LossArgs& args) : args(args), scratch(4 * padded(args.classes) + kLanes) {
    z = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
    e = z + padded(args.classes);
    z_ref = e + padded(args.classes);
    e_ref = z_ref + padded(args.classes);
  }
  // Row i of the logits, or of the reference's, into a scratch row.
  FASTADV_FN void load_logits(int64_t i, T* to, int64_t skip = -1) const { load_from(args.logits, i, to, skip); }
  FASTADV_FN void load_logits_ref(int64_t i, T* to) const { load_from(args.logits_ref, i, to, -1); }
  FASTADV_FN void load_from(const void* batch, int64_t i, T* to, int64_t skip) const {
    load_row(static_cast<const S*>(batch) + i * args.classes, args.classes, (args.rows - i) * args.classes, to, skip);
  }
  T logit(int64_t i, int64_t k) const { return load(static_cast<const S*>(args.logits)[i * args.classes + k]); }
  S* grad(int64_t i) const { return static_cast<S*>(args.grad) + i * args.classes; }
  S* grad_ref(int64_t i) const { return args.grad_ref ? static_cast<S*>(args.grad_ref) + i * args.classes : nullptr; }
  T& loss(int64_t i) const { return static_cast<T*>(args.loss)[i]; }
  const T* soft(int64_t i) const { return static_cast<const T*>(args.soft) + i * args.classes; }
};

template <class S>
FASTADV_MULTIVERSION void ce_rows(Rows<S>& rows, int64_t begin, int64_t end) {
  using T = arithmetic_t<S>;
  const int64_t classes = rows.args.classes;
  T *z = rows.z, *e = rows.e;
  for (int64_t i = begin; i < end; ++i) {
    rows.load_logits(i, z);
    const Softmax<T> softmax = softmax_row(z, e, classes);
    const T log_sum = log_(softmax.sum), inverse = T(1) / softmax.sum;
    S* grad = rows.grad(i);
    if (rows.args.labels) {
      const int64_t y = rows.args.labels[i];
      const T label = rows.logit(i, y) - softmax.max;
      rows.loss(i) = log_sum - label;
      const CrossEntropy<T> formula{inverse, T(1)};
#pragma omp simd
      for (int64_t k = 0; k < classes; ++k) store(grad[k], formula(e[k], T(0)));
      store(grad[y], formula(exp_(label), T(1)));  // computed again: reading e[y] back would wait for its vector store
    } else {
      const T* t = rows.soft(i);
      T mass = 0, dot = 0;
#pragma omp simd reduction(+ : mass, dot)
      for (int64_t k = 0; k < classes; ++k) {
        mass += t[k];
        dot += t[k] == T(0) ? T(0) : t[k] * z[k];
      }
      rows.loss(i) = log_sum * mass - dot;
      const CrossEntropy<T> formula{inverse, mass};
#pragma omp simd
      for (int64_t k = 0; k < classes; ++k) store(grad[k], formula(e[k], t[k]));
    }
  }
}

// log_odds = log(sum_{k != y} exp z_k) - z_y, gradient softmax(z without y) - 1_y: cross-entropy's softmax over the others.
template <class S>
FASTADV_MULTIVERSION void log_odds_rows(Rows<S>& rows, int64_t begin, int64_t end) {
  using T = arithmetic_t<S>;
  const int64_t classes = rows.args.classes;
  T *z = rows.z, *e = rows.e;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t y = rows.args.labels[i];
    rows.load_logits(i, z, y);
    const T label_logit = rows.logit(i, y);
    const Softmax<T> others = softmax_row(z, e, classes);
    rows.loss(i) = log_(others.sum) + (others.max - label_logit);
    const CrossEntropy<T> formula{T(1) / others.sum, T(1)};
    S* grad = rows.grad(i);
#pragma omp simd
    for (int64_t k = 0; k < classes; ++k) store(grad[k], formula(e[k], T(0)));
    store(grad[y], formula(T(0), T(1)));
  }
}

// The losses whose gradient is a few spikes: rows of zeros with up to four entries.
template <class S>
struct Spikes {
  using T = arithmetic_t<S>;
  T* dense;
  FASTADV_FN Spikes(T* scratch, int64_t classes) : dense(scratch) { std::fill(dense, dense + classes, T(0)); }
  FASTADV_FN void add(int64_t k, T v) { dense[k] += v; }
  FASTADV_FN void write(S* grad, int64_t classes) const {
#pragma omp simd
    for (int64_t k = 0; k < classes; ++k) store(grad[k], dense[k]);
  }
};

template <class S>
FASTADV_MULTIVERSION void margin_rows(Rows<S>& rows, int64_t begin, int64_t end) {
  const int64_t classes = rows.args.classes;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t y = rows.args.labels[i];
    rows.load_logits(i, rows.z, y);
    const int64_t j = argmax(rows.z, classes);
    rows.loss(i) = rows.z[j] - rows.logit(i, y);
    Spikes<S> spikes(rows.e, classes);
    spikes.add(j, 1);
    spikes.add(y, -1);
    spikes.write(rows.grad(i), classes);
  }
}

// dlr: rise to the best other class, spread z_(1) - z_(3). dlr_targeted: rise to the target, spread z_(1) - (z_(3)+z_(4))/2.
// With fewer classes than ranks the ratio's denominator does not exist; the rise alone is the loss.
template <bool kTargeted, class S>
FASTADV_MULTIVERSION void dlr_rows(Rows<S>& rows, int64_t begin, int64_t end) {
  using T = arithmetic_t<S>;
  const int64_t classes = rows.args.classes;
  constexpr int kRanks = kTargeted ? 4 : 3;
  T *z = rows.z, *ranked = rows.z_ref;
  for (int64_t i = begin; i < end; ++i) {
    rows.load_logits(i, z);
    std::copy(z, z + padded(classes), ranked);
    int64_t rank[kRanks];
    take_largest(ranked, classes, rank);
    const int64_t y = rows.args.labels[i];
    const int64_t j = kTargeted ? rows.args.targets[i] : rank[0] != y ? rank[0] : rank[1];
    Spikes<S> spikes(rows.e, classes);
    if (classes < kRanks) {
      rows.loss(i) = z[j] - z[y];
      spikes.add(j, 1);
      spikes.add(y, -1);
    } else {
      const int64_t third = rank[2], last = rank[kRanks - 1];
      const LogitsRatio<T> ratio(z[j] - z[y], z[rank[0]] - (z[third] + z[last]) / T(2));
      rows.loss(i) = ratio.value();
      spikes.add(j, ratio.grad_rise());
      spikes.add(y, -ratio.grad_rise());
      spikes.add(rank[0], ratio.grad_spread());
      spikes.add(third, -ratio.grad_spread() / T(2));
      spikes.add(last, -ratio.grad_spread() / T(2));
    }
    spikes.write(rows.grad(i), classes);
  }
}

template <class S>
FASTADV_MULTIVERSION void kl_rows(Rows<S>& rows, int64_t begin, int64_t end) {
  using T = arithmetic_t<S>;
  const int64_t classes = rows.args.classes, n = padded(classes);
  T *zq = rows.z, *eq = rows.e, *zp = rows.z_ref, *ep = rows.e_ref;
  for (int64_t i = begin; i < end; ++i) {
    rows.load_logits(i, zq);
    rows.load_logits_ref(i, zp);
    const Softmax<T> q = softmax_row(zq, eq, classes), p = softmax_row(zp, ep, classes);
    const KullbackLeibler<T> formula{T(1) / p.sum, T(1) / q.sum, log_(p.sum) - log_(q.sum)};
    T kl = 0;
#pragma omp simd reduction(+ : kl)
    for (int64_t k = 0; k < n; ++k) kl += formula.term(ep[k], zp[k], zq[k]);
    rows.loss(i) = kl;
    S* grad = rows.grad(i);
#pragma omp simd
    for (int64_t k = 0; k < classes; ++k) store(grad[k], formula.grad_q(ep[k], eq[k]));
    if (S* grad_ref = rows.grad_ref(i)) {
#pragma omp simd
      for (int64_t k = 0; k < classes; ++k) store(grad_ref[k], formula.grad_p(ep[k], zp[k], zq[k], kl));
    }
  }
}

template <class S>
FASTADV_MULTIVERSION void se_rows(Rows<S>& rows, int64_t begin, int64_t end) {
  using T = arithmetic_t<S>;
  const int64_t classes = rows.args.classes, n = padded(classes);
  T *eq = rows.e, *ep = rows.e_ref;
  for (int64_t i = begin; i < end; ++i) {
    rows.load_logits(i, rows.z);
    rows.load_logits_ref(i, rows.z_ref);
    const Softmax<T> q = softmax_row(rows.z, eq, classes), p = softmax_row(rows.z_ref, ep, classes);
    const SquaredError<T> formula{T(1) / p.sum, T(1) / q.sum};
    T total = 0, q_gap = 0, p_gap = 0;
#pragma omp simd reduction(+ : total, q_gap, p_gap)
    for (int64_t k = 0; k < n; ++k) {
      const T gap = formula.gap(ep[k], eq[k]);
      total += gap * gap;
      q_gap += formula.q(eq[k]) * gap;
      p_gap += formula.p(ep[k]) * gap;
    }
    rows.loss(i) = total;
    S* grad = rows.grad(i);
#pragma omp simd
    for (int64_t k = 0; k < classes; ++k) store(grad[k], formula.grad_q(ep[k], eq[k], q_gap));
    if (S* grad_ref = rows.grad_ref(i)) {
#pragma omp simd
      for (int64_t k = 0; k < classes; ++k) store(grad_ref[k], formula.grad_p(ep[k], eq[k], p_gap));
    }
  }
}

// A label outside [0, classes) would read and write out of bounds: refused before anything is written.
void check_labels(const int64_t* labels, const LossArgs& args, const char* name) {
  for (int64_t i = 0; labels && i < args.rows; ++i)
    if (labels[i] < 0 || labels[i] >= args.classes)
      throw std::out_of_range(std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(labels[i]) +
                              " is outside [0, " + std::to_string(args.classes) + ")");
}

// Runs row_loop(Rows<S>, begin, end) over all rows, each thread with its own scratch.
template <class Loop>
void run(const LossArgs& args, int threads, const Loop& row_loop) {
  check_labels(args.labels, args, "y");
  check_labels(args.targets, args, "target");
  dispatch(args.dtype, [&](auto s) {
    parallel_chunks(args.rows, rows_per_chunk(args.classes), threads, [&](int64_t begin, int64_t end) {
      Rows<decltype(s)> rows(args);
      row_loop(rows, begin, end);
    });
  });
}

}  // namespace

void ce_cpu(const LossArgs& args, int threads) {
  run(args, threads, [](auto& rows, int64_t begin, int64_t end) { ce_rows(rows, begin, end); });
}

void log_odds_cpu(const LossArgs& args, int threads) {
  run(args, threads, [](auto& rows, int64_t begin, int64_t end) { log_odds_rows(rows, begin, end); });
}

void margin_cpu(const LossArgs& args, int threads) {
  run(args, threads, [](auto& rows, int64_t begin, int64_t end) { margin_rows(rows, begin, end); });
}

void dlr_cpu(const LossArgs& args, int threads) {
  run(args, threads, [](auto& rows, int64_t begin, int64_t end) { dlr_rows<false>(rows, begin, end); });
}

void dlr_targeted_cpu(const LossArgs& args, int threads) {
  run(args, threads, [](auto& rows, int64_t begin, int64_t end) { dlr_rows<true>(rows, begin, end); });
}

void kl_cpu(const LossArgs& args, int threads) {
  run(args, threads, [](auto& rows, int64_t begin, int64_t end) { kl_rows(rows, begin, end); });
}

void se_cpu(const LossArgs& args, int threads) {
  run(args, threads, [](auto& rows, int64_t begin, int64_t end) { se_rows(rows, begin, end); });
}

}  // namespace fastadv
