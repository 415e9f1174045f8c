// CUDA kernels of the step family.
//
//   linf   one pass: read adv, grad, x, write out, 16 bytes per fp32 element, the least any step can move. Pure streaming:
//          each thread moves 16 bytes per load, and its three loads are independent and so in flight at once. A row is the
//          whole batch where the scalars are shared, else one sample.
//   start  one pass: read x, write out; a thread draws the four words of one counter and uses them on four neighbours.
//   l2     16 bytes again where a sample fits on chip: a block, or a cluster of blocks, keeps it in shared memory between the
//          three sums that fix the step and the update. Otherwise 28: partial sums by chunks, then an elementwise pass.
//   apgd   one pass: read adv, old, grad, x, write adv, old, 24 bytes; what is remembered goes out on the way.
//   momentum  28 bytes: partial sums of the gradient by chunks, then an elementwise pass, for which a small batch's gradient
//          is still in cache.
//   l1     a block a sample. The selection reads it once for each byte of the threshold, the projection a dozen times; all but
//          the first come from cache.
//
// No kernel waits for the host, and none adds floats with atomics: results are the same bits in every run.

#include <initializer_list>

#include "cuda.h"
#include "step.h"

namespace fastadv {
namespace {

template <class S>
constexpr int kWidth = 16 / sizeof(S);  // elements in 16 bytes

// kWidth neighbours of adv, grad and x. Where there is no element, zeros: they change no sum.
template <class S>
struct Item {
  Pack<S, kWidth<S>> adv, x;
  Pack<arithmetic_t<S>, kWidth<S>> grad;

  template <class F>
  __device__ Pack<S, kWidth<S>> apply(const F& f) const {
    Pack<S, kWidth<S>> out;
#pragma unroll
    for (int k = 0; k < kWidth<S>; ++k) store(out.v[k], f(load(adv.v[k]), grad.v[k], load(x.v[k])));
    return out;
  }
};

// A row as items, read and written 16 bytes at once; element by element where memory is not aligned, and at the row's end.
// Kernels are compiled for each type of image; the type of its gradient is known when they run.
template <class S>
struct Row {
  using Vector = Pack<S, kWidth<S>>;
  using Gradients = Memory<arithmetic_t<S>>;

  int64_t offset, size;
  bool vectorised;

  __device__ int64_t count() const { return ceil_div(size, kWidth<S>); }
  __device__ int64_t at(int64_t i) const { return offset + i * kWidth<S>; }
  __device__ bool at_once(int64_t i) const { return vectorised && (i + 1) * kWidth<S> <= size; }
  __device__ int left(int64_t i) const { return int(least(size - i * kWidth<S>, kWidth<S>)); }

  __device__ Vector read(const void* from, int64_t i) const {
    Vector item{};
    fastadv::read(static_cast<const S*>(from) + at(i), at_once(i), left(i), item);
    return item;
  }
  __device__ auto read(const Gradients& from, int64_t i) const {
    return from.template raw<kWidth<S>>(at(i), at_once(i), left(i));
  }
  __device__ void write(void* to, int64_t i, const Vector& item) const {
    fastadv::write(static_cast<S*>(to) + at(i), at_once(i), left(i), item);
  }
  template <class Raw>
  __device__ void write(const Gradients& to, int64_t i, const Raw& item) const {
    to.set(at(i), at_once(i), left(i), item);
  }
};

// The rows of a step.
template <class S>
struct Items : Row<S> {
  const StepArgs& args;

  __device__ Item<S> read(int64_t i) const {
    const Memory<arithmetic_t<S>> grad{const_cast<void*>(args.grad), args.grad_dtype};
    Item<S> item{Row<S>::read(args.adv, i), Row<S>::read(args.x, i), {}};
    item.grad = grad.values(Row<S>::read(grad, i));  // last: converting a half format waits for it
    return item;
  }
  __device__ void write(int64_t i, const Pack<S, kWidth<S>>& item) const { Row<S>::write(args.out, i, item); }
};

// Are rows of this size where 16-byte loads should be?
template <class S>
bool vectorisable(int64_t rows, int64_t row_size, std::initializer_list<const void*> images, DType grad_dtype,
                  std::initializer_list<const void*> gradients) {
  bool all = rows == 1 || row_size % kWidth<S> == 0;
  for (const void* t : images) all = all && aligned(t, 16);
  for (const void* t : gradients) all = all && aligned(t, grad_dtype, kWidth<S>);
  return all;
}

template <class S>
bool vectorisable(const StepArgs& args, int64_t rows, int64_t row_size) {
  return vectorisable<S>(rows, row_size, {args.out, args.adv, args.x}, args.grad_dtype, {args.grad});
}

// ---------------------------------------------------------------------------------------------------------------- linf

template <class S>
__global__ void __launch_bounds__(kStreamThreads)
    linf_step_kernel(StepArgs args, int64_t rows, int64_t row_size, bool vectorised) {
  using T = arithmetic_t<S>;
  const int64_t first = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const LinfStep<T> step{T(args.alpha_of(row)), T(args.eps_of(row)), T(args.lo), T(args.hi)};
    const Items<S> items{{row * row_size, row_size, vectorised}, args};
    for (int64_t i = first; i < items.count(); i += stride) items.write(i, items.read(i).apply(step));
  }
}

template <class T>
FASTADV_FN LinfStart<T> start_of(const StartArgs& args, int64_t sample, LinfStart<T>) {
  return {T(args.eps_of(sample)), T(args.lo), T(args.hi)};
}
template <class T>
FASTADV_FN NormalStart<T> start_of(const StartArgs& args, int64_t sample, NormalStart<T>) {
  return {T(args.eps_of(sample))};
}

template <class S, template <class> class Start>
__global__ void __launch_bounds__(kStreamThreads) start_kernel(StartArgs args, bool vectorised) {
  const int64_t counters = ceil_div(args.size, 4);
  const int64_t first = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t row = blockIdx.y; row < args.rows(); row += gridDim.y) {
    const int64_t sample = row / args.copies;
    const auto f = start_of(args, sample, Start<arithmetic_t<S>>{});
    const uint64_t number = args.number_of(sample);
    const uint32_t step = args.step + uint32_t(row % args.copies);
    const S* x = static_cast<const S*>(args.x) + sample * args.size;
    S* out = static_cast<S*>(args.out) + row * args.size;
    for (int64_t c = first; c < counters; c += stride) {
      const Words w = philox(args.seed, uint32_t(c), uint32_t(c >> 32) + step, uint32_t(number), uint32_t(number >> 32));
      if (vectorised) {
        const auto from = reinterpret_cast<const Pack<S, 4>*>(x)[c];
        Pack<S, 4> to;
#pragma unroll
        for (int k = 0; k < 4; ++k) store(to.v[k], f(w.word[k], load(from.v[k])));
        reinterpret_cast<Pack<S, 4>*>(out)[c] = to;
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (4 * c + k < args.size) store(out[4 * c + k], f(w.word[k], load(x[4 * c + k])));
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- apgd

template <class S>
__global__ void __launch_bounds__(kStreamThreads) apgd_step_kernel(ApgdArgs args, bool vectorised) {
  const int64_t first = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, stride = int64_t(gridDim.x) * blockDim.x;
  const Memory<arithmetic_t<S>> grad{const_cast<void*>(args.grad), args.grad_dtype}, best_grad{args.best_grad, args.grad_dtype};
  for (int64_t sample = blockIdx.y; sample < args.samples; sample += gridDim.y) {
    const auto step = args.step_of<arithmetic_t<S>>(sample);
    const bool better = args.better[sample], taken = args.taken[sample];
    const Row<S> row{sample * args.size, args.size, vectorised};
    for (int64_t i = first; i < row.count(); i += stride) {
      const auto adv = row.read(args.adv, i), old = row.read(args.old, i), x = row.read(args.x, i);
      const auto raw = row.read(grad, i);  // all are on their way before the first write, which might have changed them
      if (better) {
        row.write(args.best, i, adv);
        row.write(best_grad, i, raw);
      }
      if (taken) row.write(args.image, i, adv);
      const auto g = grad.values(raw);
      typename Row<S>::Vector moved;
#pragma unroll
      for (int k = 0; k < kWidth<S>; ++k) store(moved.v[k], step(load(adv.v[k]), load(old.v[k]), g.v[k], load(x.v[k])));
      row.write(args.old, i, adv);
      row.write(args.adv, i, moved);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ momentum

// gridDim.x blocks sum the sizes of a sample's gradient into args.sums [samples, chunks] ...
template <class S>
__global__ void __launch_bounds__(kStreamThreads, 1) momentum_sums_kernel(MomentumArgs args, bool vectorised) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  const Memory<arithmetic_t<S>> grad{const_cast<void*>(args.grad), args.grad_dtype};
  for (int64_t sample = blockIdx.y; sample < args.samples; sample += gridDim.y) {
    const Row<S> row{sample * args.size, args.size, vectorised};
    double sum = 0.0;
#pragma unroll 2
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < row.count(); i += stride) {
      const auto g = grad.values(row.read(grad, i));
#pragma unroll
      for (int k = 0; k < kWidth<S>; ++k) sum += double(g.v[k] < 0 ? -g.v[k] : g.v[k]);
    }
    sum = Group(0).reduce(sum, Plus());
    if (threadIdx.x == 0) args.sums[sample * gridDim.x + blockIdx.x] = sum;
  }
}

// ... and every block of the second pass adds them up for itself, in one order, before it moves its elements.
template <class S>
__global__ void __launch_bounds__(kStreamThreads, 1) momentum_apply_kernel(MomentumArgs args, int chunks, bool vectorised) {
  using T = arithmetic_t<S>;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  const Memory<T> grad{const_cast<void*>(args.grad), args.grad_dtype};
  for (int64_t sample = blockIdx.y; sample < args.samples; sample += gridDim.y) {
    double sum = 0.0;
    for (int c = threadIdx.x; c < chunks; c += blockDim.x) sum += args.sums[sample * chunks + c];
    const auto faster = Velocity<T>::from_sum(Group(0).reduce(sum, Plus()), args.scalars.momentum_of(sample));
    const auto step = args.scalars.linf_of<T>(sample);
    const Row<S> row{sample * args.size, args.size, vectorised};
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < row.count(); i += stride) {
      auto adv = row.read(args.adv, i), velocity = row.read(args.velocity, i);
      const auto x = row.read(args.x, i);
      const auto g = grad.values(row.read(grad, i));
#pragma unroll
      for (int k = 0; k < kWidth<S>; ++k) {
        store(velocity.v[k], faster(load(velocity.v[k]), g.v[k]));
        store(adv.v[k], step(load(adv.v[k]), load(velocity.v[k]), load(x.v[k])));  // along the velocity as it is kept
      }
      row.write(args.velocity, i, velocity);
      row.write(args.adv, i, adv);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------ l2

template <class S>
__device__ L2Sums operator+(L2Sums sums, const Item<S>& item) {
#pragma unroll
  for (int k = 0; k < kWidth<S>; ++k) {
    const double d = double(load(item.adv.v[k])) - double(load(item.x.v[k])), g = double(item.grad.v[k]);
    sums = sums + L2Sums{d * d, d * g, g * g};
  }
  return sums;
}

// The sum over the blocks of a cluster, in the order of their ranks.
__device__ inline L2Sums cluster_sum(const L2Sums& mine, int cluster) {
  if (cluster == 1) return mine;
  __shared__ L2Sums shown;
  if (threadIdx.x == 0) shown = mine;
  cluster_barrier();
  L2Sums sum{};
  for (int rank = 0; rank < cluster; ++rank) sum = sum + cluster_read(&shown, rank);
  cluster_barrier();  // nobody overwrites its sums, or ends, while others read them
  return sum;
}

template <class S>
__device__ L2Step<arithmetic_t<S>> l2_step_of(const StepArgs& args, int64_t sample, const L2Sums& sums) {
  using T = arithmetic_t<S>;
  return L2Step<T>::from_sums(sums, args.alpha_of(sample), args.eps_of(sample), T(args.lo), T(args.hi));
}

// One cluster a sample; a block keeps its share of adv, grad and x in shared memory. Each thread reads back only what it
// wrote there itself, so that needs no barrier.
template <class S>
__global__ void __launch_bounds__(kMaxThreads, 1) l2_on_chip_kernel(StepArgs args, int cluster, bool vectorised) {
  const auto [begin, end] = share_of(cluster_rank(), cluster, ceil_div(args.size, kWidth<S>));
  auto* kept = dynamic_shared<Item<S>>();
  for (int64_t sample = blockIdx.x / cluster; sample < args.samples; sample += gridDim.x / cluster) {
    const Items<S> items{{sample * args.size, args.size, vectorised}, args};
    L2Sums sums{};
#pragma unroll 2
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      const Item<S> item = items.read(i);
      kept[i - begin] = item;
      sums = sums + item;
    }
    const auto step = l2_step_of<S>(args, sample, cluster_sum(Group(0).reduce(sums, Plus()), cluster));
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) items.write(i, kept[i - begin].apply(step));
  }
}

// Samples too large for that: gridDim.x blocks sum a sample into args.workspace [samples, chunks] ...
template <class S>
__global__ void __launch_bounds__(kStreamThreads, 1) l2_sums_kernel(StepArgs args, bool vectorised) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t sample = blockIdx.y; sample < args.samples; sample += gridDim.y) {
    const Items<S> items{{sample * args.size, args.size, vectorised}, args};
    L2Sums sums{};
#pragma unroll 2
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < items.count(); i += stride)
      sums = sums + items.read(i);
    sums = Group(0).reduce(sums, Plus());
    if (threadIdx.x == 0) args.workspace[sample * gridDim.x + blockIdx.x] = sums;
  }
}

// ... and every block of the second pass adds them up for itself, in one order, before it moves its elements.
template <class S>
__global__ void __launch_bounds__(kStreamThreads, 1) l2_apply_kernel(StepArgs args, int chunks, bool vectorised) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t sample = blockIdx.y; sample < args.samples; sample += gridDim.y) {
    L2Sums sums{};
    for (int c = threadIdx.x; c < chunks; c += blockDim.x) sums = sums + args.workspace[sample * chunks + c];
    const auto step = l2_step_of<S>(args, sample, Group(0).reduce(sums, Plus()));
    const Items<S> items{{sample * args.size, args.size, vectorised}, args};
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < items.count(); i += stride)
      items.write(i, items.read(i).apply(step));
  }
}

template <class S>
Launch l2_on_chip_launch(int64_t samples, int64_t size) {
  return l2_launch(current_device(), samples, ceil_div(size, kWidth<S>), sizeof(Item<S>));
}

template <class S>
void launch_l2(const StepArgs& args, void* stream) {
  const bool vectorised = vectorisable<S>(args, args.samples, args.size);
  if (const Launch plan = l2_on_chip_launch<S>(args.samples, args.size); plan.threads)
    return launch("l2_step", plan, stream, l2_on_chip_kernel<S>, args, plan.cluster, vectorised);
  const int64_t items = ceil_div(args.size, kWidth<S>);
  const Launch sums = sums_launch(args.samples, items);
  launch("l2_step", sums, stream, l2_sums_kernel<S>, args, vectorised);
  launch("l2_step", apply_launch(args.samples, items), stream, l2_apply_kernel<S>, args, int(sums.blocks), vectorised);
}

// ------------------------------------------------------------------------------------------------------------------ l1

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
};
template <>
struct Bits<double> {
  using type = uint64_t;
};

// The `wanted`-th largest of the non-negative values value(i), i < size, whose bits are ordered as they are: digit by digit
// from the top, counting the values that share the digits found so far. Counts are integers, so atomics leave no trace.
template <class T, class Value>
__device__ T select_largest(int64_t size, int64_t wanted, const Value& value) {
  using B = typename Bits<T>::type;
  __shared__ uint32_t count[256];
  __shared__ int digit;
  __shared__ int64_t above;  // values whose digit here is larger than the one chosen
  B found = 0;
  for (int shift = 8 * int(sizeof(B)) - 8; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x) count[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
      const B bits = bit_cast<B>(value(i));
      if (((bits ^ found) >> shift >> 8) == 0) atomicAdd(&count[(bits >> shift) & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int64_t passed = 0;
      int d = 255;
      while (d > 0 && passed + count[d] < wanted) passed += count[d--];
      digit = d;
      above = passed;
    }
    __syncthreads();
    found |= B(digit) << shift;  // digit and above change again two barriers from here
    wanted -= above;
  }
  return bit_cast<T>(found);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) l1_step_kernel(StepArgs args) {
  const int64_t size = args.size;
  const int64_t moved = least(size, most(1, int64_t(args.fraction * double(size))));
  const Group block(0);
  for (int64_t sample = block.first_row(); sample < args.samples; sample += block.row_stride()) {
    const auto memory = [&](const void* data, DType dtype) { return Memory<T>{const_cast<void*>(data), dtype}; };
    const auto adv = [&](int64_t i) { return memory(args.adv, args.dtype).get(sample * size + i); };
    const auto grad = [&](int64_t i) { return memory(args.grad, args.grad_dtype).get(sample * size + i); };
    const auto x = [&](int64_t i) { return memory(args.x, args.dtype).get(sample * size + i); };
    // sum over the sample of f(i), the same in all threads
    const auto sum = [&](auto zero, const auto& f) {
      for (int64_t i = threadIdx.x; i < size; i += blockDim.x) zero = zero + f(i);
      return block.reduce(zero, Plus());
    };

    const double alpha = args.alpha_of(sample);
    L1Move<T> move{T(alpha), T(0), T(args.lo), T(args.hi)};
    const auto pull = [&](int64_t i) { return move.pull(adv(i), grad(i)); };
    // Ties may select more than `moved`; elements without any pull are never among them.
    move.threshold = larger(select_largest<T>(size, moved, pull), bit_cast<T>(typename Bits<T>::type(1)));
    const int64_t movers = sum(int64_t(0), [&](int64_t i) { return int64_t(pull(i) >= move.threshold); });
    move.step = movers ? T(alpha / double(movers)) : T(0);

    const auto u = [&](int64_t i) { return move(adv(i), grad(i), x(i)); };
    const auto reach = [&] {
      T largest = T(0);
      for (int64_t i = threadIdx.x; i < size; i += blockDim.x) largest = larger(largest, u(i) < T(0) ? -u(i) : u(i));
      return block.reduce(largest, Larger());
    };
    const auto length_at = [&](T shrink) {
      const L1Project<T> project{shrink, T(args.lo), T(args.hi)};
      return sum(L1Length{0.0, 0}, [&](int64_t i) { return project.length_of(u(i), x(i)); });
    };
    const T shrink = l1_shrink<T>(args.eps_of(sample), length_at, reach);
    const L1Project<T> project{shrink, T(args.lo), T(args.hi)};
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x)
      memory(args.out, args.dtype).set(sample * size + i, project(u(i), x(i)));
  }
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------ launches

void linf_step_cuda(const StepArgs& args, void* stream) {
  const bool one_step_for_all = !args.alphas && !args.radii;
  const int64_t rows = one_step_for_all ? 1 : args.samples;
  const int64_t row_size = one_step_for_all ? args.samples * args.size : args.size;
  if (rows == 0 || row_size == 0) return;
  dispatch(args.dtype, [&](auto s) {
    using S = decltype(s);
    launch("linf_step", stream_launch(rows, ceil_div(row_size, kWidth<S>)), stream, linf_step_kernel<S>, args, rows, row_size,
           vectorisable<S>(args, rows, row_size));
  });
}

void apgd_step_cuda(const ApgdArgs& args, void* stream) {
  if (args.samples == 0 || args.size == 0) return;
  dispatch(args.dtype, [&](auto s) {
    using S = decltype(s);
    launch("apgd_step", stream_launch(args.samples, ceil_div(args.size, kWidth<S>)), stream, apgd_step_kernel<S>, args,
           vectorisable<S>(args.samples, args.size, {args.adv, args.old, args.best, args.image, args.x}, args.grad_dtype,
                           {args.grad, args.best_grad}));
  });
}

void momentum_step_cuda(const MomentumArgs& args, void* stream) {
  if (args.samples == 0 || args.size == 0) return;
  dispatch(args.dtype, [&](auto s) {
    using S = decltype(s);
    const bool vectorised =
        vectorisable<S>(args.samples, args.size, {args.adv, args.velocity, args.x}, args.grad_dtype, {args.grad});
    const int64_t items = ceil_div(args.size, kWidth<S>);
    const Launch sums = sums_launch(args.samples, items), apply = apply_launch(args.samples, items);
    launch("momentum_step", sums, stream, momentum_sums_kernel<S>, args, vectorised);
    launch("momentum_step", apply, stream, momentum_apply_kernel<S>, args, int(sums.blocks), vectorised);
  });
}

template <template <class> class Start>
void launch_start(const char* name, const StartArgs& args, void* stream) {
  if (args.rows() == 0 || args.size == 0) return;
  const Launch plan = stream_launch(args.rows(), ceil_div(args.size, 4));
  dispatch(args.dtype, [&](auto s) {
    using S = decltype(s);
    constexpr size_t alignment = alignof(Pack<S, 4>);
    const bool vectorised = args.size % 4 == 0 && aligned(args.out, alignment) && aligned(args.x, alignment);
    launch(name, plan, stream, start_kernel<S, Start>, args, vectorised);
  });
}

void linf_start_cuda(const StartArgs& args, void* stream) { launch_start<LinfStart>("linf_start", args, stream); }
void normal_start_cuda(const StartArgs& args, void* stream) { launch_start<NormalStart>("normal_start", args, stream); }

void l2_step_cuda(const StepArgs& args, void* stream) {
  if (args.samples == 0 || args.size == 0) return;
  dispatch(args.dtype, [&](auto s) { launch_l2<decltype(s)>(args, stream); });
}

int64_t l2_workspace_cuda(int64_t samples, int64_t size, DType dtype) {
  bool fits = true;
  dispatch(dtype, [&](auto s) { fits = l2_on_chip_launch<decltype(s)>(samples, size).threads; });
  return fits ? 0 : int64_t(sizeof(L2Sums)) * kSumChunks * samples;
}

void l1_step_cuda(const StepArgs& args, void* stream) {
  if (args.samples == 0 || args.size == 0) return;
  const auto kernel = args.dtype == DType::f64 ? l1_step_kernel<double> : l1_step_kernel<float>;
  launch("l1_step", l1_launch(args.samples, args.size), stream, kernel, args);
}

}  // namespace fastadv
