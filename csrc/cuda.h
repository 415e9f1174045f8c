// What the CUDA kernels share: vectors of memory, reductions over the threads that share a row, launches.
//
// The same sources are compiled by g++ for tests, where tests/cuda_host/cuda_runtime.h runs the threads of a block as fibers.
// What needs hardware (clusters, dynamic shared memory) is one small function each; elsewhere a cluster is one block.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "dtype.h"
#include "launch.h"

namespace fastadv {

// -------------------------------------------------------------------------------------------------------------- memory

// kCount neighbouring elements that move together, 16 bytes an instruction (or all of them, if they are fewer).
template <class S, int kCount>
struct alignas(sizeof(S) * kCount > 16 ? 16 : sizeof(S) * kCount) Pack {
  S v[kCount];
};

// Memory to registers and back: all at once, or the `count` elements that there are one by one.
template <class S, int kCount>
__device__ void read(const S* from, bool at_once, int count, Pack<S, kCount>& to) {
  if (at_once) {
    to = *reinterpret_cast<const Pack<S, kCount>*>(from);
  } else {
#pragma unroll
    for (int v = 0; v < kCount; ++v)
      if (v < count) to.v[v] = from[v];
  }
}

template <class S, int kCount>
__device__ void write(S* to, bool at_once, int count, const Pack<S, kCount>& from) {
  if (at_once) {
    *reinterpret_cast<Pack<S, kCount>*>(to) = from;
  } else {
#pragma unroll
    for (int v = 0; v < kCount; ++v)
      if (v < count) to[v] = from.v[v];
  }
}

// Memory in one of the storage types that are computed in T, known when the kernel runs: one branch a load, the same for all
// threads, for a third of the code to compile. Loads of T itself do not wait for each other.
template <class T>
struct Memory {
  void* data;
  DType dtype;

  __device__ bool half() const { return sizeof(T) == 4 && dtype != DType::f32; }
  __device__ T of_half(uint16_t bits) const { return T(dtype == DType::bf16 ? load(bf16{bits}) : load(f16{bits})); }
  __device__ uint16_t to_half(T value) const {
    bf16 b;
    f16 h;
    store(b, float(value));
    store(h, float(value));
    return dtype == DType::bf16 ? b.bits : h.bits;
  }

  __device__ T get(int64_t at) const {
    return half() ? of_half(static_cast<const uint16_t*>(data)[at]) : static_cast<const T*>(data)[at];
  }
  __device__ void set(int64_t at, T value) const {
    if (half()) static_cast<uint16_t*>(data)[at] = to_half(value);
    else static_cast<T*>(data)[at] = value;
  }

  // Neighbours, moved as by read() and write() above; zeros for those that there are not. Raw, they are as in memory, in `own`
  // or in `half`: no load waits for an earlier one until that one's values are asked for.
  template <int kCount>
  struct Raw {
    Pack<T, kCount> own;
    Pack<uint16_t, kCount> half;
  };
  template <int kCount>
  __device__ Raw<kCount> raw(int64_t at, bool at_once, int count) const {
    Raw<kCount> elements{};
    if (half()) read(static_cast<const uint16_t*>(data) + at, at_once, count, elements.half);
    else read(static_cast<const T*>(data) + at, at_once, count, elements.own);
    return elements;
  }
  template <int kCount>
  __device__ void set(int64_t at, bool at_once, int count, const Raw<kCount>& elements) const {
    if (half()) write(static_cast<uint16_t*>(data) + at, at_once, count, elements.half);
    else write(static_cast<T*>(data) + at, at_once, count, elements.own);
  }
  template <int kCount>
  __device__ Pack<T, kCount> values(const Raw<kCount>& elements) const {
    Pack<T, kCount> values = elements.own;
    if (half()) {
#pragma unroll
      for (int v = 0; v < kCount; ++v) values.v[v] = of_half(elements.half.v[v]);
    }
    return values;
  }
  template <int kCount>
  __device__ Pack<T, kCount> get(int64_t at, bool at_once, int count) const {
    return values(raw<kCount>(at, at_once, count));
  }
  template <int kCount>
  __device__ void set(int64_t at, bool at_once, int count, const Pack<T, kCount>& values) const {
    Raw<kCount> elements{values, {}};
    if (half()) {
#pragma unroll
      for (int v = 0; v < kCount; ++v) elements.half.v[v] = to_half(values.v[v]);
    }
    set(at, at_once, count, elements);
  }
};

constexpr int kVector = 4;  // neighbours of which 16 bytes move at once in fp32, 8 in a half format

FASTADV_FN bool aligned(const void* pointer, size_t power_of_two) {
  return (reinterpret_cast<uintptr_t>(pointer) & (power_of_two - 1)) == 0;
}

// May vectors of so many elements begin here?
FASTADV_FN bool aligned(const void* pointer, DType dtype, int count) {
  return aligned(pointer, size_t(least(count * size_of(dtype), 16)));
}

// A block's dynamic shared memory, 16-byte aligned.
template <class T>
__device__ T* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
#else
  return static_cast<T*>(cuda_host::dynamic_shared());
#endif
}

// ---------------------------------------------------------------------------------------------------------- reductions

// v of the lane `offset` away, of any trivially copyable type.
template <class T>
__device__ T shuffle_xor(unsigned mask, T v, int offset) {
  static_assert(sizeof(T) % 4 == 0, "shuffles move words");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &v, sizeof(T));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(mask, word, offset);
  memcpy(&v, words, sizeof(T));
  return v;
}

// The threads that share a row: `lanes` neighbours in a warp (a power of two), or a whole block. Every thread gets the result
// of a reduction: the butterfly and the loop add the same numbers in the same order for all, so all have the same bits.
class Group {
 public:
  __device__ explicit Group(int lanes_or_0)  // 0: the block
      : in_warp_(lanes_or_0 > 0),
        size_(in_warp_ ? lanes_or_0 : int(blockDim.x)),
        rank_(in_warp_ ? int(threadIdx.x) & (lanes_or_0 - 1) : int(threadIdx.x)) {}

  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }
  __device__ int64_t first_row() const { return blockIdx.x * int64_t(blockDim.x / size_) + threadIdx.x / size_; }
  __device__ int64_t row_stride() const { return gridDim.x * int64_t(blockDim.x / size_); }

  template <class T, class Op>
  __device__ T reduce(T v, const Op& op) const {
    const int lanes = in_warp_ ? size_ : kWarp;
    const int first = int(threadIdx.x) & (kWarp - lanes);  // other rows of the warp may have ended
    const unsigned mask = (0xffffffffu >> (kWarp - lanes)) << first;
    for (int offset = lanes / 2; offset > 0; offset /= 2) v = op(v, shuffle_xor(mask, v, offset));
    const int warps = int(blockDim.x) / kWarp;
    if (in_warp_ || warps == 1) return v;

    __shared__ T partial[kWarp];
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = v;
    __syncthreads();
    v = partial[0];
    for (int warp = 1; warp < warps; ++warp) v = op(v, partial[warp]);
    __syncthreads();  // before the next reduction writes
    return v;
  }

 private:
  bool in_warp_;
  int size_, rank_;
};

struct Plus {
  template <class T>
  __device__ T operator()(const T& a, const T& b) const {
    return a + b;
  }
};

struct Larger {
  template <class T>
  __device__ T operator()(const T& a, const T& b) const {
    return larger(a, b);
  }
};

// ------------------------------------------------------------------------------------------------------------ clusters
// Blocks on neighbouring multiprocessors that read each other's shared memory, from sm_90 on. Elsewhere a cluster is a block.

__device__ inline int cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ inline void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// *local of the block of that rank; `local` points to shared memory.
template <class T>
__device__ T cluster_read(const T* local, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  static_assert(sizeof(T) % 8 == 0, "read by words of 8 bytes");
  const auto address = uint32_t(__cvta_generic_to_shared(local));
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  uint64_t words[sizeof(T) / 8];
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 8); ++i)
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(words[i]) : "r"(remote + 8 * i));
  T value;
  memcpy(&value, words, sizeof(T));
  return value;
#else
  return rank == 0 ? *local : T{};
#endif
}

// ------------------------------------------------------------------------------------------------------------ launches

inline void check_cuda(const char* name, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

// Whether code with clusters runs on a device: it is the newest that was built and is not newer than the device.
inline bool runs_cluster_code(int device_arch) {
#if defined(__CUDA_ARCH_LIST__)
  for (const int arch : {__CUDA_ARCH_LIST__})
    if (900 <= arch && arch <= device_arch) return true;
#endif
  (void)device_arch;
  return false;
}

// What the current device offers; asked once for each.
inline const Device& current_device() {
  constexpr int kDevices = 64;
  static Device known[kDevices];
  static std::once_flag asked[kDevices];
  int index = 0;
  check_cuda("cudaGetDevice", cudaGetDevice(&index));
  if (index >= kDevices) throw std::runtime_error("fastadv knows 64 GPUs; the current one is number " + std::to_string(index));
  std::call_once(asked[index], [index] {
    int sms = 0, shared = 0, major = 0, minor = 0;
    check_cuda("device", cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, index));
    check_cuda("device", cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    check_cuda("device", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    check_cuda("device", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    known[index] = {sms, shared, runs_cluster_code(100 * major + 10 * minor) ? 8 : 1};
  });
  return known[index];
}

// kernel<<<...>>>(arguments...), with clusters.
template <class... Parameters, class... Arguments>
void launch(const char* name, const Launch& plan, void* stream, void (*kernel)(Parameters...), const Arguments&... arguments) {
  constexpr int64_t kSharedUnasked = 32 * 1024;  // 48 KB with what a kernel declares itself
  if (plan.shared > kSharedUnasked)  // always the same value: another thread's launch of this kernel may be under way
    check_cuda(name, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          int(current_device().shared - kDeclaredShared)));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(plan.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(plan.blocks), unsigned(plan.rows));
  config.blockDim = dim3(unsigned(plan.threads));
  config.dynamicSmemBytes = size_t(plan.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = plan.cluster > 1 ? 1 : 0;
  check_cuda(name, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace fastadv
