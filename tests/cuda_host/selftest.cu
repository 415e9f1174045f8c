// Small kernels, right and wrong on purpose, that show what tests/cuda_host/cuda_runtime.h notices. tests/test_cuda_host.py
// compiles this file, runs one case a process, and looks at what it prints and how it ends.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <map>
#include <string>

constexpr int kThreads = 96;

struct alignas(16) Float4 {
  float v[4];
};

// out[i] = in[n - 1 - i], through shared memory.
__global__ void reverse(const int* in, int* out, bool with_barrier) {
  __shared__ int values[kThreads];
  const int i = int(threadIdx.x), last = int(blockDim.x) - 1;
  values[i] = in[blockIdx.x * blockDim.x + i];
  if (with_barrier) __syncthreads();
  out[blockIdx.x * blockDim.x + i] = values[last - i];
}

// Sums over the block, again and again: a warp that runs ahead must not overwrite what others have yet to read.
__global__ void sum_block(int* out, bool with_barrier) {
  __shared__ int partial[kThreads / 32];
  int total = 0;
  for (int turn = 0; turn < 3; ++turn) {
    int v = turn;
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffff, v, offset);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    for (int w = 0; w < kThreads / 32; ++w) total += partial[w];
    if (with_barrier) __syncthreads();
  }
  out[threadIdx.x] = total;
}

__global__ void fill_shared(size_t bytes) {
  char* shared = static_cast<char*>(cuda_host::dynamic_shared());
  for (size_t i = threadIdx.x; i < bytes; i += blockDim.x) shared[i] = 0;
}

__global__ void sum_shared(float* out) {
  *out = 0;
  const float* shared = static_cast<const float*>(cuda_host::dynamic_shared());
  for (int i = 0; i < 4; ++i) *out += shared[i];
}

__global__ void copy(const Float4* in, Float4* out) { out[threadIdx.x] = in[threadIdx.x]; }

__global__ void overrun_local(int* out, int index) {
  int local[4] = {1, 2, 3, 4};
  __syncwarp();  // ASAN must know this stack after a switch
  int* volatile hidden = local;
  *out = hidden[index];
}

// Groups of eight lanes turn their loop a different number of times, each with its own mask.
__global__ void sum_groups(int* out) {
  const int group = int(threadIdx.x) / 8;
  const unsigned mask = 0xffu << (group % 4 * 8);
  for (int turn = 0; turn <= group; ++turn) {
    int v = int(threadIdx.x) + turn;
    for (int offset = 4; offset > 0; offset /= 2) v += __shfl_xor_sync(mask, v, offset);
    out[threadIdx.x] = v;
  }
}

__global__ void votes(int* out) {
  const int i = int(threadIdx.x);
  int score = __syncthreads_count(i % 3 == 0) + 1000 * __syncthreads_or(i == 5) + 2000 * __syncthreads_and(i != 5);
  if (i < 32) {
    score += int(__ballot_sync(0xffffffff, i < 4)) + 10000 * __any_sync(0xffffffff, i == 31);
    score += 20000 * __all_sync(0xffffffff, i);
    score += 100000 * int(__shfl_down_sync(0xffffffff, 1.0 * i, 2, 16)) + 10000000 * __shfl_sync(0xffffffff, i, 7);
  }
  out[i] = score;
}

__global__ void leave_early() {
  if (threadIdx.x < 40) return;
  __syncthreads();
}

__global__ void two_barriers() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void lane_missing_from_mask() { __syncwarp(0x0000ffff); }
__global__ void lane_left() {
  if (threadIdx.x != 3) __syncwarp();
}
__global__ void read_outside_mask(int* out) {
  if (threadIdx.x < 16) *out = __shfl_sync(0x0000ffff, 1, 20);
}
__global__ void two_calls(int* out) { *out = threadIdx.x == 0 ? __any_sync(0xffffffff, 1) : __shfl_sync(0xffffffff, 1, 0); }

__global__ void nothing() {}

template <class... Parameters, class... Arguments>
cudaError_t run(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

void print(const char* what, cudaError_t error) { std::printf("%s: %s\n", what, cudaGetErrorString(error)); }

void print_reversed(bool with_barrier) {
  std::vector<int> in(2 * kThreads), out(2 * kThreads, -1);
  for (int i = 0; i < 2 * kThreads; ++i) in[i] = i + 1;
  run(reverse, 2, kThreads, 0, in.data(), out.data(), with_barrier);
  for (int v : out) std::printf("%d ", v);
}

void print_limits() {
  const auto many_threads = run(nothing, 1, dim3(32, 33), 0);
  print("1056 threads", many_threads);
  print("the last error", cudaGetLastError());
  print("and then", cudaGetLastError());
  print("no block", run(nothing, 0, 32, 0));
  print("65536 rows", run(nothing, dim3(1, 65536), 32, 0));
  print("48 KB and more", run(fill_shared, 1, 32, 48 * 1024 + 16, size_t(48 * 1024 + 16)));
  const auto kernel = reinterpret_cast<const void*>(fill_shared);
  print("asking for 1 MB", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20));
  print("asking for 64 KB", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 * 1024));
  print("64 KB", run(fill_shared, 1, 32, 64 * 1024, size_t(64 * 1024)));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = 2;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = 2;
  config.blockDim = 32;
  config.attrs = &cluster;
  config.numAttrs = 1;
  print("a cluster", cudaLaunchKernelEx(&config, nothing));
}

int main(int, char** arguments) {
  int number = 0;
  float sum = 0;
  std::vector<int> numbers(kThreads);
  std::vector<float> floats(4 * 32 + 1);
  const auto print_numbers = [&] {
    for (int v : numbers) std::printf("%d ", v);
  };
  const auto as_packs = [&](int offset) { return reinterpret_cast<Float4*>(floats.data() + offset); };
  const std::map<std::string, std::function<void()>> cases = {
      {"barrier", [&] { print_reversed(true); }},
      {"no barrier", [&] { print_reversed(false); }},
      {"second barrier", [&] { run(sum_block, 1, kThreads, 0, numbers.data(), true), print_numbers(); }},
      {"no second barrier", [&] { run(sum_block, 1, kThreads, 0, numbers.data(), false), print_numbers(); }},
      {"groups", [&] { run(sum_groups, 1, kThreads, 0, numbers.data()), print_numbers(); }},
      {"votes", [&] { run(votes, 1, kThreads, 0, numbers.data()), print_numbers(); }},
      {"limits", print_limits},
      {"uninitialised shared memory", [&] { run(sum_shared, 1, 1, 16, &sum), std::printf("%d", std::isnan(sum)); }},
      {"shared memory overrun", [&] { run(fill_shared, 1, 32, 100, size_t(101)); }},
      {"overrun", [&] { run(copy, 1, 33, 0, as_packs(0), as_packs(0)); }},
      {"misaligned", [&] { run(copy, 1, 32, 0, as_packs(1), as_packs(0)); }},
      {"stack overrun", [&] { run(overrun_local, 1, 32, 0, &number, 4); }},
      {"stack in bounds", [&] { run(overrun_local, 1, 32, 0, &number, 3), std::printf("%d", number); }},
      {"left before a barrier", [&] { run(leave_early, 1, kThreads, 0); }},
      {"two barriers", [&] { run(two_barriers, 1, kThreads, 0); }},
      {"lane missing from mask", [&] { run(lane_missing_from_mask, 1, 32, 0); }},
      {"left before a warp barrier", [&] { run(lane_left, 1, 32, 0); }},
      {"warp cut short", [&] { run(lane_left, 1, 2, 0); }},
      {"read outside mask", [&] { run(read_outside_mask, 1, 32, 0, &number); }},
      {"two calls", [&] { run(two_calls, 1, 32, 0, &number); }},
  };
  cases.at(arguments[1])();
}
