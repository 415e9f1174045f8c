// CUDA kernels of the loss family: read the logits once, write their gradient once, 8 bytes per fp32 logit.
//
// A row belongs to a few threads of a warp, to a warp or to a block, by its length (csrc/launch.h): at 10 classes a warp
// handles eight rows, from 257 on a block handles one. They hold the row in registers, eight logits each, through all its sums.
// A row too long for that (and fp64, which serves exact work and not speed) is streamed: read once for an online softmax and
// once more, from L2 where that is large enough, for the gradient.
//
// Each loss is written once, over a Row that is either. Threads see a row as slots: slot s of a thread holds class index(s);
// slots behind the row's end hold -inf, whose exp is 0, so sums need no masks. What a kernel computes in is a template
// parameter; what lies in memory (Memory in cuda.h) and what tells losses of one kind apart is not: code is built once a kind.
#include <limits>

#include "cuda.h"
#include "loss.h"

namespace fastadv {
namespace {

template <class T>
struct Softmax {
  T max, sum;
};

template <class T>
__device__ T minus_infinity() {
  return -T(HUGE_VAL);
}

// ------------------------------------------------------------------------------------------------------------ the rows

// A row in registers, kSlots logits a thread, in vectors of neighbours. The class `skip` reads as -inf.
template <class T, int kSlots>
struct Row {
  Group group;
  int32_t classes;
  bool vectorised;  // memory is aligned for vectors, and rows are whole vectors
  T logit[kSlots], e[kSlots];

  __device__ Row(Group group, const Memory<T>& matrix, int64_t row, int64_t classes, bool vectorised, int64_t skip)
      : group(group), classes(int32_t(classes)), vectorised(vectorised) {
#pragma unroll
    for (int s = 0; s < kSlots; s += kVector) {
      const auto vector = matrix.template get<kVector>(row * classes + index(s), at_once(s), count(s));
#pragma unroll
      for (int v = 0; v < kVector; ++v)
        logit[s + v] = index(s + v) < classes && index(s + v) != skip ? vector.v[v] : minus_infinity<T>();
    }
  }

  __device__ static constexpr int slots() { return kSlots; }
  __device__ int32_t index(int s) const { return (s / kVector * group.size() + group.rank()) * kVector + s % kVector; }
  __device__ int count(int s) const { return classes - index(s) < kVector ? classes - index(s) : kVector; }
  __device__ bool at_once(int s) const { return vectorised && index(s) < classes; }
  __device__ T at(int s) const { return logit[s]; }
  __device__ T exp_at(int s, const Softmax<T>&) const { return e[s]; }

  __device__ Softmax<T> softmax() {
    T top = logit[0], sum = T(0);
#pragma unroll
    for (int s = 1; s < kSlots; ++s) top = larger(top, logit[s]);
    top = group.reduce(top, Larger());
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      e[s] = exp_(logit[s] - top);
      sum += e[s];
    }
    return {top, group.reduce(sum, Plus())};
  }

  // to[row, k] = f(slot) for every class.
  template <class F>
  __device__ void write(const Memory<T>& to, int64_t row, const F& f) const {
#pragma unroll
    for (int s = 0; s < kSlots; s += kVector) {
      Pack<T, kVector> values;
#pragma unroll
      for (int v = 0; v < kVector; ++v) values.v[v] = f(s + v);
      to.set(row * classes + index(s), at_once(s), count(s), values);
    }
  }
};

// A row in memory, read again for each use.
template <class T>
struct Row<T, 0> {
  Group group;
  Memory<T> matrix;
  int64_t start;
  int32_t classes, skip, slots_;

  __device__ Row(Group group, const Memory<T>& matrix, int64_t row, int64_t classes, bool, int64_t skip)
      : group(group),
        matrix(matrix),
        start(row * classes),
        classes(int32_t(classes)),
        skip(int32_t(skip)),
        slots_((int32_t(classes) - group.rank() + group.size() - 1) / group.size()) {}

  __device__ int slots() const { return slots_; }
  __device__ int32_t index(int s) const { return group.rank() + s * group.size(); }
  __device__ T at(int s) const { return index(s) == skip ? minus_infinity<T>() : matrix.get(start + index(s)); }
  __device__ T exp_at(int s, const Softmax<T>& softmax) const { return exp_(at(s) - softmax.max); }

  __device__ Softmax<T> softmax() {
    Softmax<T> mine{minus_infinity<T>(), T(0)};
    for (int s = 0; s < slots(); ++s) {
      const T z = at(s);
      if (z > mine.max) mine = {z, mine.sum * exp_(mine.max - z) + T(1)};
      else if (z != minus_infinity<T>()) mine.sum += exp_(z - mine.max);
    }
    const T top = group.reduce(mine.max, Larger());
    return {top, group.reduce(mine.sum * exp_(mine.max - top), Plus())};
  }

  template <class F>
  __device__ void write(const Memory<T>& to, int64_t to_row, const F& f) const {
    for (int s = 0; s < slots(); ++s) to.set(to_row * classes + index(s), f(s));
  }
};

template <int kSlots>
constexpr int kUnroll = kSlots ? kSlots : 1;  // registers have no index; a streamed row's loop stays a loop

// The sum over a row of f(slot), the same in all its threads.
template <class T, int kSlots, class F>
__device__ auto sum(const Row<T, kSlots>& row, const F& f) {
  decltype(f(0)) total{};
#pragma unroll kUnroll<kSlots>
  for (int s = 0; s < row.slots(); ++s) total = total + f(s);
  return row.group.reduce(total, Plus());
}

template <class T>
struct Candidate {
  T value;
  int32_t index;
};

// The larger; of equals the one of the smaller index.
struct Better {
  template <class T>
  __device__ Candidate<T> operator()(const Candidate<T>& a, const Candidate<T>& b) const {
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
  }
};

// The first class of the largest logit among those that `among` admits, of which there are some; NaN ranks with +inf.
template <class T, int kSlots, class Among>
__device__ int32_t argmax(const Row<T, kSlots>& row, const Among& among) {
  Candidate<T> best{minus_infinity<T>(), std::numeric_limits<int32_t>::max()};
#pragma unroll kUnroll<kSlots>
  for (int s = 0; s < row.slots(); ++s) {
    const T z = row.at(s);
    if (row.index(s) < row.classes && among(row.index(s)))
      best = Better()(best, Candidate<T>{z == z ? z : -minus_infinity<T>(), row.index(s)});
  }
  return row.group.reduce(best, Better()).index;
}

// ---------------------------------------------------------------------------------------------------------- the losses

// A label; one that is no class counts as class 0, and makes its row NaN.
struct Label {
  int64_t index;
  bool valid;
};

// Row i of a batch, and where its results go.
template <class T_, int kSlots>
struct Sample {
  using T = T_;
  const LossArgs& args;
  Group group;
  bool vectorised;
  int64_t i;

  __device__ Label label(const int64_t* labels) const {
    const int64_t k = labels ? labels[i] : 0;
    const bool valid = k >= 0 && k < args.classes;
    return {valid ? k : 0, valid};
  }
  __device__ Memory<T> matrix(const void* data) const { return {const_cast<void*>(data), args.dtype}; }
  __device__ T logit(int64_t k) const { return matrix(args.logits).get(i * args.classes + k); }
  __device__ Row<T, kSlots> row(const void* data, int64_t skip = -1) const {
    return Row<T, kSlots>(group, matrix(data), i, args.classes, vectorised, skip);
  }
  __device__ void loss(T value) const {
    if (group.rank() == 0) static_cast<T*>(args.loss)[i] = value;
  }
  // grad[i, k] = f(slot); likewise the gradient of the reference logits.
  template <class F>
  __device__ void grad(const Row<T, kSlots>& row, const F& f) const {
    row.write(matrix(args.grad), i, f);
  }
  template <class F>
  __device__ void grad_ref(const Row<T, kSlots>& row, const F& f) const {
    row.write(matrix(args.grad_ref), i, f);
  }
};

// ce; log_odds, which is cross-entropy with the softmax over the classes other than y.
struct LabelLoss {
  bool odds;

  template <class Sample>
  __device__ void operator()(const Sample& sample) const {
    using T = typename Sample::T;
    const Label y = sample.label(sample.args.labels);
    auto row = sample.row(sample.args.logits, odds ? y.index : -1);
    const Softmax<T> softmax = row.softmax();
    const T nothing = y.valid ? T(0) : T(NAN);
    const CrossEntropy<T> formula{divide(T(1), softmax.sum) + nothing, T(1)};
    sample.loss(log_(softmax.sum) - (sample.logit(y.index) - softmax.max) + nothing);
    sample.grad(row, [&](int s) { return formula(row.exp_at(s, softmax), T(row.index(s) == y.index)); });
  }
};

// ce of soft labels.
struct SoftLabelLoss {
  template <class Sample>
  __device__ void operator()(const Sample& sample) const {
    using T = typename Sample::T;
    auto row = sample.row(sample.args.logits);
    const Softmax<T> softmax = row.softmax();
    const T* soft = static_cast<const T*>(sample.args.soft) + sample.i * sample.args.classes;
    const auto target = [&](int s) { return row.index(s) < row.classes ? soft[row.index(s)] : T(0); };
    const T mass = sum(row, target);
    const T dot = sum(row, [&](int s) { return target(s) == T(0) ? T(0) : target(s) * (row.at(s) - softmax.max); });
    const CrossEntropy<T> formula{divide(T(1), softmax.sum), mass};
    sample.loss(log_(softmax.sum) * mass - dot);
    sample.grad(row, [&](int s) { return formula(row.exp_at(s, softmax), target(s)); });
  }
};

// rise / spread, rise = z_rival - z_y. How many of the largest logits it ranks makes the loss:
//   1   margin: the rival is the largest other class, and there is no spread
//   3   dlr: the same rival, spread z_(1) - z_(3)
//   4   dlr_targeted: the rival is the target, spread z_(1) - (z_(3) + z_(4)) / 2
//   0   dlr_targeted of fewer classes than ranks: no spread
struct RatioLoss {
  int ranks;

  template <class Sample>
  __device__ void operator()(const Sample& sample) const {
    using T = typename Sample::T;
    const Label y = sample.label(sample.args.labels), target = sample.label(sample.args.targets);
    const auto row = sample.row(sample.args.logits);
    int64_t rank[4] = {-1, -1, -1, ranks == 1 ? y.index : -1};
#pragma unroll 1
    for (int r = 0; r < ranks; ++r) {
      const int64_t next = argmax(row, [&](int64_t k) { return k != rank[0] && k != rank[1] && k != rank[2] && k != rank[3]; });
#pragma unroll
      for (int i = 0; i < 4; ++i) rank[i] = i == r ? next : rank[i];
    }
    const bool valid = y.valid && target.valid;
    const int64_t best = rank[0] != y.index ? rank[0] : rank[1], rival = sample.args.targets ? target.index : best;
    const T rise = sample.logit(rival) - sample.logit(y.index);
    T loss = rise, up = T(1), down = T(0);  // up, down: the derivatives by rise and spread
    const int64_t first = rank[0], third = rank[2], last = ranks == 4 ? rank[3] : third;
    if (ranks >= 3) {
      const LogitsRatio<T> ratio(rise, sample.logit(first) - (sample.logit(third) + sample.logit(last)) * T(0.5));
      loss = ratio.value();
      up = ratio.grad_rise();
      down = ratio.grad_spread();
    }
    sample.loss(valid ? loss : T(NAN));
    up = valid ? up : T(NAN);
    sample.grad(row, [&](int s) {
      const auto is = [&](int64_t k) { return T(row.index(s) == k); };
      return (is(rival) - is(y.index)) * up + (is(first) - (is(third) + is(last)) * T(0.5)) * down;
    });
  }
};

struct KlLoss {
  template <class Sample>
  __device__ void operator()(const Sample& sample) const {
    using T = typename Sample::T;
    auto q = sample.row(sample.args.logits), p = sample.row(sample.args.logits_ref);
    const Softmax<T> of_q = q.softmax(), of_p = p.softmax();
    const KullbackLeibler<T> formula{divide(T(1), of_p.sum), divide(T(1), of_q.sum), log_(of_p.sum) - log_(of_q.sum)};
    const auto ep = [&](int s) { return p.exp_at(s, of_p); };
    const auto zp = [&](int s) { return p.at(s) - of_p.max; };
    const auto zq = [&](int s) { return q.at(s) - of_q.max; };
    const T kl = sum(p, [&](int s) { return formula.term(ep(s), zp(s), zq(s)); });
    sample.loss(kl);
    sample.grad(q, [&](int s) { return formula.grad_q(ep(s), q.exp_at(s, of_q)); });
    if (sample.args.grad_ref) sample.grad_ref(p, [&](int s) { return formula.grad_p(ep(s), zp(s), zq(s), kl); });
  }
};

// |q - p|^2, <q, q - p> and <p, q - p>.
template <class T>
struct SeSums {
  T gap_gap, q_gap, p_gap;
};

template <class T>
__device__ SeSums<T> operator+(const SeSums<T>& a, const SeSums<T>& b) {
  return {a.gap_gap + b.gap_gap, a.q_gap + b.q_gap, a.p_gap + b.p_gap};
}

struct SeLoss {
  template <class Sample>
  __device__ void operator()(const Sample& sample) const {
    using T = typename Sample::T;
    auto q = sample.row(sample.args.logits), p = sample.row(sample.args.logits_ref);
    const Softmax<T> of_q = q.softmax(), of_p = p.softmax();
    const SquaredError<T> formula{divide(T(1), of_p.sum), divide(T(1), of_q.sum)};
    const auto ep = [&](int s) { return p.exp_at(s, of_p); };
    const auto eq = [&](int s) { return q.exp_at(s, of_q); };
    const SeSums<T> sums = sum(q, [&](int s) {
      const T e_p = ep(s), e_q = eq(s), gap = formula.gap(e_p, e_q);
      return SeSums<T>{gap * gap, formula.q(e_q) * gap, formula.p(e_p) * gap};
    });
    sample.loss(sums.gap_gap);
    sample.grad(q, [&](int s) { return formula.grad_q(ep(s), eq(s), sums.q_gap); });
    if (sample.args.grad_ref) sample.grad_ref(p, [&](int s) { return formula.grad_p(ep(s), eq(s), sums.p_gap); });
  }
};

// ------------------------------------------------------------------------------------------------------------ launches

// 64 registers a thread, for twice the warps; fp64 would spill.
template <class T, int kSlots, class Loss>
__global__ void __launch_bounds__(kMaxThreads, sizeof(T) == 8 ? 1 : 2)
    loss_kernel(Loss loss, LossArgs args, int lanes, bool vectorised) {
  const Group group(lanes);
  for (int64_t i = group.first_row(); i < args.rows; i += group.row_stride())
    loss(Sample<T, kSlots>{args, group, vectorised, i});
}

// Are rows whole vectors, and where vectors should be?
bool vectorisable(const LossArgs& args) {
  const auto fits = [&](const void* data) { return aligned(data, args.dtype, kVector); };
  return args.classes % kVector == 0 && fits(args.logits) && fits(args.logits_ref) && fits(args.grad) && fits(args.grad_ref);
}

template <class Loss>
void run(const char* name, const Loss& loss, const LossArgs& args, void* stream) {
  if (args.rows == 0) return;
  const bool wide = args.dtype == DType::f64;
  const RowLaunch plan = row_launch(args.rows, args.classes, wide);
  const auto kernel = wide ? loss_kernel<double, 0, Loss>
                      : plan.items == 0 ? loss_kernel<float, 0, Loss> : loss_kernel<float, kRowItems, Loss>;
  launch(name, plan.launch, stream, kernel, loss, args, plan.lanes, vectorisable(args));
}

}  // namespace

void ce_cuda(const LossArgs& args, void* stream) {
  args.labels ? run("ce", LabelLoss{false}, args, stream) : run("ce", SoftLabelLoss{}, args, stream);
}
void log_odds_cuda(const LossArgs& args, void* stream) { run("log_odds", LabelLoss{true}, args, stream); }
void margin_cuda(const LossArgs& args, void* stream) { run("margin", RatioLoss{1}, args, stream); }
// With fewer classes than ranks the ratio's denominator does not exist; the rise alone is the loss.
void dlr_cuda(const LossArgs& args, void* stream) { run("dlr", RatioLoss{args.classes < 3 ? 1 : 3}, args, stream); }
void dlr_targeted_cuda(const LossArgs& args, void* stream) {
  run("dlr_targeted", RatioLoss{args.classes < 4 ? 0 : 4}, args, stream);
}
void kl_cuda(const LossArgs& args, void* stream) { run("kl", KlLoss{}, args, stream); }
void se_cuda(const LossArgs& args, void* stream) { run("se", SeLoss{}, args, stream); }

}  // namespace fastadv
