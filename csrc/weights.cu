// CUDA kernels of the weights family: two launches for a model, however many tensors it has (one more each 88 tensors).
//
// A launch's arguments hold a table of tensors. Each block belongs to one of them, which it finds by the number of its first
// block, and moves it 16 bytes at once: 8 bytes per fp32 element for the sums of weights that are their own origins (12 with
// the backup), 12 for the step. Storage types are known when kernels run, so that tensors of all types share a launch.
//
// No kernel waits for the host, and sums are added up in one order: results are the same bits in every run.

#include "cuda.h"
#include "weights.h"

namespace fastadv {
namespace {

// What a launch is about: `count` tensors of WeightsArgs, and their sums.
struct Table {
  Weight tensors[kTableTensors];
  int first_block[kTableTensors + 1];
  int count;
  WeightSums* sums;
  int64_t slices;
};

// The tensor that a block works on, and where in it the block's threads begin and how far they stride, in items.
struct Place {
  int tensor;
  int64_t block, blocks, first, stride;

  __device__ explicit Place(const Table& table) : tensor(0) {
    const int mine = int(blockIdx.x);
    for (int behind = table.count; behind - tensor > 1;) {
      const int middle = (tensor + behind) / 2;
      (table.first_block[middle] <= mine ? tensor : behind) = middle;
    }
    block = mine - table.first_block[tensor];
    blocks = table.first_block[tensor + 1] - table.first_block[tensor];
    first = block * blockDim.x + threadIdx.x;
    stride = blocks * blockDim.x;
  }
};

// A tensor as items of kVector elements, of w, g and origin; element by element where memory is not aligned, and at the end.
template <class T>
struct Items {
  using Raw = typename Memory<T>::template Raw<kVector>;

  Memory<T> w, g, origin;
  int64_t size;
  bool vectorised;

  __device__ explicit Items(const Weight& t)
      : w{t.w, t.dtype},
        g{const_cast<void*>(t.g), t.grad_dtype},
        origin{t.origin, t.dtype},
        size(t.size),
        vectorised(aligned(t.w, t.dtype, kVector) && aligned(t.g, t.grad_dtype, kVector) &&
                   aligned(t.origin, t.dtype, kVector)) {}

  __device__ int64_t count() const { return ceil_div(size, kVector); }
  __device__ bool at_once(int64_t i) const { return vectorised && (i + 1) * kVector <= size; }
  __device__ int left(int64_t i) const { return int(least(size - i * kVector, kVector)); }
  __device__ Raw read(const Memory<T>& from, int64_t i) const {
    return from.template raw<kVector>(i * kVector, at_once(i), left(i));
  }
  template <class Elements>
  __device__ void write(const Memory<T>& to, int64_t i, const Elements& elements) const {
    to.set(i * kVector, at_once(i), left(i), elements);
  }
};

// In double: squares of small fp32 gradients would underflow to 0.
template <class T>
__device__ WeightSums sums_of(const Items<T>& items, const Place& place, bool record) {
  const bool at_origin = record || items.w.data == items.origin.data;  // then d = 0, and w is read once
  WeightSums sums{};
#pragma unroll 1
  for (int64_t i = place.first; i < items.count(); i += place.stride) {
    const auto raw_w = items.read(items.w, i), raw_g = items.read(items.g, i);
    const auto raw_o = at_origin ? raw_w : items.read(items.origin, i);
    if (record) items.write(items.origin, i, raw_w);
    const auto w = items.w.values(raw_w), g = items.g.values(raw_g), o = items.origin.values(raw_o);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const double origin = double(o.v[v]), gradient = double(g.v[v]);
      sums.oo += origin * origin;
      sums.step.gg += gradient * gradient;
      if (at_origin) continue;
      const double d = double(w.v[v]) - origin;
      sums.step.dd += d * d;
      sums.step.dg += d * gradient;
    }
  }
  return sums;
}

__global__ void __launch_bounds__(kStreamThreads) weight_sums_kernel(const __grid_constant__ Table table, bool record) {
  const Place place(table);
  const Weight& t = table.tensors[place.tensor];
  const WeightSums mine =
      t.dtype == DType::f64 ? sums_of(Items<double>(t), place, record) : sums_of(Items<float>(t), place, record);
  const WeightSums sums = Group(0).reduce(mine, Plus());
  WeightSums* slices = table.sums + place.tensor * table.slices;
  if (threadIdx.x == 0) slices[place.block] = sums;
  if (place.block == place.blocks - 1)  // what no block sums up
    for (int64_t s = place.blocks + threadIdx.x; s < table.slices; s += blockDim.x) slices[s] = {};
}

template <class T>
__device__ void move(const Items<T>& items, const Place& place, const L2Step<T>& step) {
  const bool at_origin = items.w.data == items.origin.data;
#pragma unroll 1
  for (int64_t i = place.first; i < items.count(); i += place.stride) {
    const auto raw_w = items.read(items.w, i), raw_g = items.read(items.g, i);
    const auto raw_o = at_origin ? raw_w : items.read(items.origin, i);
    const auto w = items.w.values(raw_w), g = items.g.values(raw_g), o = items.origin.values(raw_o);
    Pack<T, kVector> moved;
#pragma unroll
    for (int v = 0; v < kVector; ++v) moved.v[v] = step(w.v[v], g.v[v], o.v[v]);
    items.write(items.w, i, moved);
  }
}

__global__ void __launch_bounds__(kStreamThreads)
    perturb_kernel(const __grid_constant__ Table table, double gamma, double alpha) {
  const Place place(table);
  const Weight& t = table.tensors[place.tensor];
  WeightSums sums{};
  for (int64_t s = threadIdx.x; s < table.slices; s += blockDim.x) sums = sums + table.sums[place.tensor * table.slices + s];
  sums = Group(0).reduce(sums, Plus());
  if (t.dtype == DType::f64) move(Items<double>(t), place, weight_step<double>(sums, gamma, alpha));
  else move(Items<float>(t), place, weight_step<float>(sums, gamma, alpha));
}

// launch(table, blocks) for all tensors, as many at a time as a table holds.
template <class Launcher>
void for_tables(const WeightsArgs& args, int64_t most_blocks, const Launcher& launch) {
  for (int64_t begin = 0; begin < args.count; begin += kTableTensors) {
    Table table{};
    table.count = int(least(args.count - begin, kTableTensors));
    table.sums = args.sums + begin * args.slices;
    table.slices = args.slices;
    for (int t = 0; t < table.count; ++t) {
      table.tensors[t] = args.tensors[begin + t];
      const int64_t items = ceil_div(table.tensors[t].size, kVector);
      table.first_block[t + 1] = table.first_block[t] + int(weight_blocks(items, most_blocks));
    }
    launch(table, Launch{table.first_block[table.count], 1, kStreamThreads, 0, 1});
  }
}

}  // namespace

void weight_sums_cuda(const WeightsArgs& args, void* stream) {
  for_tables(args, args.slices, [&](const Table& table, const Launch& plan) {
    launch("weight_sums", plan, stream, weight_sums_kernel, table, args.record);
  });
}

void perturb_cuda(const WeightsArgs& args, void* stream) {
  for_tables(args, kMaxTensorBlocks, [&](const Table& table, const Launch& plan) {
    launch("perturb", plan, stream, perturb_kernel, table, args.gamma, args.alpha);
  });
}

}  // namespace fastadv
