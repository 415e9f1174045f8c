// A CUDA device made of g++, for tests only: put this directory before all others on the include path, compile a .cu file
// with `g++ -x c++ -fsanitize=address,undefined`, and its kernels run on the CPU under the sanitizers.
//
// A block's threads are fibers: stacks of their own, on one OS thread, and exactly one of them runs. A fiber runs until it
// must wait for others, at a barrier or a warp shuffle; then another thread of its warp goes on, or else of another warp.
// Blocks run one after the other. So nothing here is a data race in the sense of C++, and everything is repeatable. What goes
// wrong on a GPU goes wrong here as follows:
//
//   out of bounds, misaligned   Tensors and dynamic shared memory come from malloc in exactly their size: ASAN sees an overrun
//                               by one byte. UBSAN sees a 16-byte load from an address that is no multiple of 16.
//   a missing barrier           Warps run in ascending order, or descending under CUDA_HOST_ORDER=reverse, the first as far
//                               ahead of the others as barriers let it. Who reads what another thread has yet to write, or
//                               has written over already, reads something else in at least one of the two.
//   a barrier not reached       Stricter than today's hardware: a barrier waits for every thread of the block, a shuffle for
//                               every lane of its mask, even those that have returned. When no thread can run: an abort that
//                               says who waits where. Threads that meet at two different __syncthreads(): an abort.
//   a wrong mask                A lane that calls without being in the mask, or reads one that is not: an abort.
//   uninitialised shared memory Dynamic shared memory is NaN (all bits set) at the start of every block.
//   an impossible launch        Too many threads, too much shared memory, too large a grid: the error that CUDA returns.
//
// What it cannot show: speed, registers, the memory model between blocks, clusters (no device here has them), rounding of
// fused multiply-adds, and races between threads that both orders happen to forgive. Static shared memory starts as the last
// block left it.
//
// Two environment variables are read at every launch and query: CUDA_HOST_ORDER, forward (the default) or reverse, and
// CUDA_HOST_DEVICE, which of `devices` below is current.
#pragma once

#if !defined(__x86_64__) || !defined(__linux__)
#error "this stand-in for CUDA switches stacks in x86-64 assembly, on Linux"
#endif

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// ------------------------------------------------------------------------------------------------------ words of CUDA C++

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static  // one block runs at a time
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ----------------------------------------------------------------------------------------------------------------- fibers

namespace cuda_host {

struct Fiber {
  void* sp = nullptr;            // its stack pointer while it does not run; its registers lie there
  const void* bottom = nullptr;  // the lowest address of its stack, and the size: ASAN wants to know where it is
  size_t size = 0;
  void* fake_stack = nullptr;  // ASAN's own, kept for it while the fiber does not run
};

inline std::deque<Fiber> fibers;    // all there ever were
inline Fiber launcher;              // the stack that kernels are launched from
inline Fiber* running = &launcher;  // the one we are on
inline Fiber* left = nullptr;       // the one we came from

// Saves the registers that a function call must preserve and the stack pointer, and takes up those saved at `to`. Not
// swapcontext: it makes a system call, and ASAN's version of it forgets everything that it knew about the stack.
[[gnu::naked, gnu::noinline]] inline void swap_stacks(void** /*from, in rdi*/, void* /*to, in rsi*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n"
      "mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n"
      "ret");
}

// To be called first on a stack that was just switched to.
inline void arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(running->fake_stack, &left->bottom, &left->size);
#endif
}

inline void switch_to(Fiber& to) {
  Fiber& self = *running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&self.fake_stack, to.bottom, to.size);
#endif
  left = &self;
  running = &to;
  swap_stacks(&self.sp, to.sp);
  arrived();
}

// A fiber that will begin with `entry`, which must never return. Below its stack lies a page that nobody may touch.
inline Fiber* new_fiber(void (*entry)()) {
  constexpr size_t kGuard = 4096, kSize = 256 * 1024;
  void* memory = mmap(nullptr, kGuard + kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
    std::perror("cuda_host: a stack");
    std::abort();
  }
  char* bottom = static_cast<char*>(memory) + kGuard;
  // What swap_stacks will pop: six registers, then the address it returns to. Above it the return address that `entry` finds,
  // and with it the alignment that a function may expect.
  void** sp = reinterpret_cast<void**>(bottom + kSize) - 8;
  sp[6] = reinterpret_cast<void*>(entry);
  fibers.push_back({sp, bottom, kSize});
  return &fibers.back();
}

// ------------------------------------------------------------------------------------------------------ a block of threads

inline bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

// Where in the source a thread waits. As a default argument it is the caller's line.
struct Where {
  const char* file;
  int line;
  Where(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
  bool operator!=(const Where& other) const { return line != other.line || !same(file, other.file); }
};

enum class State { fresh, ready, running, waiting, done };

struct Thread {
  uint3 index;
  State state = State::fresh;
  Fiber* fiber = nullptr;
  // While it waits: for what, where, and for which lanes of its warp (0: for the whole block).
  const char* call = "";
  Where where;
  unsigned mask = 0;
  // In an exchange between lanes: the word it brings and whose it wants; then that word, and the lanes that brought a true one.
  uint64_t word = 0;
  int source = 0;
  uint64_t received = 0;
  unsigned votes = 0;
};

struct Block {
  std::vector<Thread> threads;
  Thread* current = nullptr;
  std::function<void()> kernel;  // what each thread runs
  std::vector<Fiber*> idle;      // fibers whose thread has returned
  bool reverse = false;
  size_t done = 0;
  // The barrier: how many have come, who came first, how many with a true predicate, and that number at the last full house.
  size_t arrived = 0;
  const Thread* first = nullptr;
  int votes = 0, result = 0;
  void* dynamic_shared = nullptr;
};

inline Block block;

inline void* dynamic_shared() { return block.dynamic_shared; }

inline size_t number(const Thread& thread) { return size_t(&thread - block.threads.data()); }
inline unsigned lane() { return unsigned(number(*block.current) % warpSize); }
inline Thread* warp() { return block.current - lane(); }  // its first thread

[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  std::fprintf(stderr, "cuda_host: block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::abort();
}

[[noreturn]] inline void report_deadlock() {
  const Thread* previous = nullptr;
  for (const Thread& t : block.threads) {
    if (t.state != State::waiting) continue;
    if (!previous || previous->where != t.where || previous->mask != t.mask)
      std::fprintf(stderr, "cuda_host: from thread %zu on: %s with mask %08x at %s:%d\n", number(t), t.call, t.mask,
                   t.where.file, t.where.line);
    previous = &t;
  }
  fail("deadlock: of %zu threads %zu have returned, the others wait as said above", block.threads.size(), block.done);
}

inline bool can_run(const Thread& t) { return t.state == State::fresh || t.state == State::ready; }

// The next thread to run: in the current warp if that can go on, else the first in the order of the block that can; or null.
// A warp so runs as far ahead of the others as it may, which is what shows that it should have waited for them.
inline Thread* next_thread() {
  const int n = int(block.threads.size()), self = int(number(*block.current)), first = self / warpSize * warpSize;
  const int width = std::min(warpSize, n - first);
  for (int k = 1; k <= width; ++k) {
    Thread& t = block.threads[first + (self - first + (block.reverse ? width - k : k)) % width];
    if (can_run(t)) return &t;
  }
  for (int k = 0; k < n; ++k) {
    Thread& t = block.threads[block.reverse ? n - 1 - k : k];
    if (can_run(t)) return &t;
  }
  return nullptr;
}

// The thread after which the first in the order of the block comes next.
inline Thread* before_first() {
  const size_t n = block.threads.size();
  return &block.threads[block.reverse ? (n - 1) / warpSize * warpSize : std::min<size_t>(warpSize, n) - 1];
}

inline void make_current(Thread& t) {
  block.current = &t;
  t.state = State::running;
  threadIdx = t.index;
}

// The life of a fiber: it runs a fresh thread, and where that never waits the next one too, with no switch in between.
[[noreturn]] inline void run_threads() {
  arrived();
  for (;;) {
    block.kernel();
    block.current->state = State::done;
    ++block.done;
    Thread* next = next_thread();
    if (next && next->state == State::fresh) {
      next->fiber = running;
      make_current(*next);
      continue;
    }
    if (!next && block.done < block.threads.size()) report_deadlock();
    if (next) make_current(*next);
    block.idle.push_back(running);
    switch_to(next ? *next->fiber : launcher);  // comes back when a fresh thread is current
  }
}

// Goes on with the next thread. In a thread it returns when somebody has made that thread ready; in the launcher, when all
// are done.
inline void yield() {
  Thread* next = next_thread();
  if (!next) report_deadlock();
  if (next->state == State::fresh) {
    if (block.idle.empty()) block.idle.push_back(new_fiber(run_threads));
    next->fiber = block.idle.back();
    block.idle.pop_back();
  }
  make_current(*next);
  if (next->fiber != running) switch_to(*next->fiber);
}

inline void begin_to_wait(const char* call, Where where, unsigned mask) {
  Thread& self = *block.current;
  self.state = State::waiting;
  self.call = call;
  self.where = where;
  self.mask = mask;
}

// __syncthreads and its kin: returns how many threads came with a true predicate.
inline int barrier(const char* call, Where where, bool predicate) {
  if (block.arrived == 0) block.first = block.current;
  begin_to_wait(call, where, 0);
  if (block.first->where != where)
    fail("thread %zu is at %s, %s:%d, and thread %zu waits at %s:%d", number(*block.current), call, where.file, where.line,
         number(*block.first), block.first->where.file, block.first->where.line);
  block.votes += predicate;
  if (++block.arrived == block.threads.size()) {
    block.result = std::exchange(block.votes, 0);
    block.arrived = 0;
    for (Thread& t : block.threads) t.state = State::ready;
    block.current = before_first();
  }
  yield();
  return block.result;
}

// Every lane in `mask` brings a word and names the lane whose word it wants. All go on when the last has come.
inline const Thread& exchange(const char* call, Where where, unsigned mask, uint64_t word, int source) {
  const int self = int(lane());
  if (!(mask >> self & 1)) fail("lane %d is at %s, %s:%d, and not in mask %08x", self, call, where.file, where.line, mask);
  if (!(mask >> source & 1)) fail("%s, %s:%d, reads lane %d, not in mask %08x", call, where.file, where.line, source, mask);
  begin_to_wait(call, where, mask);
  block.current->word = word;
  block.current->source = source;
  Thread* const lanes = warp();
  const int width = int(std::min<size_t>(warpSize, block.threads.size() - number(*lanes)));  // the last warp may be cut short
  const auto complete = [&] {
    for (int k = 0; k < warpSize; ++k) {
      const int i = block.reverse ? k : warpSize - 1 - k;  // first who comes last
      if (mask >> i & 1 && (i >= width || lanes[i].state != State::waiting || lanes[i].mask != mask)) return false;
    }
    return true;
  };
  if (complete()) {
    unsigned votes = 0;
    for (int i = 0; i < width; ++i)
      if (mask >> i & 1 && lanes[i].word) votes |= 1u << i;
    for (int i = 0; i < width; ++i) {
      if (!(mask >> i & 1)) continue;
      if (!same(lanes[i].call, call))
        fail("lane %d is at %s, %s:%d, and lane %d at %s", self, call, where.file, where.line, i, lanes[i].call);
      lanes[i].received = lanes[lanes[i].source].word;
      lanes[i].votes = votes;
      lanes[i].state = State::ready;
    }
  }
  Thread& me = *block.current;
  yield();
  return me;
}

// The value that `source` brought; a source outside the caller's part of the warp gives the caller's own.
template <class T>
T shuffle(const char* call, Where where, unsigned mask, T value, int source, bool inside) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 and 8 byte numbers");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  const Thread& self = exchange(call, where, mask, word, inside ? source : int(lane()));
  std::memcpy(&value, &self.received, sizeof(T));
  return value;
}

// The lanes in `mask` whose predicate is true.
inline unsigned ballot(const char* call, Where where, unsigned mask, bool predicate) {
  return exchange(call, where, mask, predicate, int(lane())).votes;
}

// The first and last lane of the caller's part of the warp, where it is divided into parts of `width`.
inline int first_lane(int width) { return int(lane()) & ~(width - 1); }
inline int last_lane(int width) { return first_lane(width) | (width - 1); }

}  // namespace cuda_host

// ------------------------------------------------------------------------------------------------- what kernels may call

inline void __syncthreads(cuda_host::Where where = {}) { cuda_host::barrier("__syncthreads", where, false); }
inline int __syncthreads_count(int predicate, cuda_host::Where where = {}) {
  return cuda_host::barrier("__syncthreads_count", where, predicate != 0);
}
inline int __syncthreads_or(int predicate, cuda_host::Where where = {}) {
  return cuda_host::barrier("__syncthreads_or", where, predicate != 0) > 0;
}
inline int __syncthreads_and(int predicate, cuda_host::Where where = {}) {
  return cuda_host::barrier("__syncthreads_and", where, predicate == 0) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffff, cuda_host::Where where = {}) {
  cuda_host::ballot("__syncwarp", where, mask, false);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, cuda_host::Where where = {}) {
  return cuda_host::shuffle("__shfl_sync", where, mask, value, cuda_host::first_lane(width) | (source & (width - 1)), true);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, cuda_host::Where where = {}) {
  const int source = int(cuda_host::lane()) ^ bits;
  return cuda_host::shuffle("__shfl_xor_sync", where, mask, value, source, source <= cuda_host::last_lane(width));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, cuda_host::Where where = {}) {
  const int source = int(cuda_host::lane() + delta);
  return cuda_host::shuffle("__shfl_down_sync", where, mask, value, source, source <= cuda_host::last_lane(width));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, cuda_host::Where where = {}) {
  const int source = int(cuda_host::lane()) - int(delta);
  return cuda_host::shuffle("__shfl_up_sync", where, mask, value, source, source >= cuda_host::first_lane(width));
}

inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_host::Where where = {}) {
  return cuda_host::ballot("__ballot_sync", where, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, cuda_host::Where where = {}) {
  return cuda_host::ballot("__any_sync", where, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cuda_host::Where where = {}) {
  return cuda_host::ballot("__all_sync", where, mask, predicate == 0) == 0;
}

// No other thread runs meanwhile.
template <class T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>,
                "integers only: sums of floats would depend on the order");
  const T old = *address;
  *address = T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(value));
  return old;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }

// ------------------------------------------------------------------------------------------------------------ the runtime

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_host {

struct Device {
  int capability, multiprocessors;
  int shared;  // bytes of shared memory that a block may have if its kernel asks for it
};

constexpr Device devices[] = {
    {80, 108, 163 * 1024},  // like an A100
    {80, 2, 2 * 1024},      // so small that little fits on chip
    {89, 132, 227 * 1024},  // like an H100, without its clusters
};

constexpr int kSharedUnasked = 48 * 1024;
inline std::map<const void*, int> shared_asked;  // by kernel
inline cudaError_t last_error = cudaSuccess;

inline cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

inline int current_device() {
  const char* index = std::getenv("CUDA_HOST_DEVICE");
  return index ? std::atoi(index) : 0;
}

inline bool reverse_order() {
  const char* order = std::getenv("CUDA_HOST_ORDER");
  return order && std::strcmp(order, "reverse") == 0;
}

inline void run_block(size_t shared_bytes) {
  const size_t n = size_t(blockDim.x) * blockDim.y * blockDim.z;
  block.threads.assign(n, Thread());
  for (size_t i = 0; i < n; ++i)
    block.threads[i].index = {unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
                              unsigned(i / blockDim.x / blockDim.y)};
  block.done = 0;
  if (posix_memalign(&block.dynamic_shared, 16, shared_bytes) != 0) std::abort();
  std::memset(block.dynamic_shared, 0xff, shared_bytes);
  block.current = before_first();
  yield();
  std::free(block.dynamic_shared);
  block.dynamic_shared = nullptr;
}

inline void run_grid(const cudaLaunchConfig_t& config, std::function<void()> kernel) {
  static std::mutex one_kernel_at_a_time;
  const std::lock_guard<std::mutex> lock(one_kernel_at_a_time);
  block.reverse = reverse_order();
  block.kernel = std::move(kernel);
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  const uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  for (uint64_t k = 0; k < blocks; ++k) {
    const uint64_t i = block.reverse ? blocks - 1 - k : k;
    blockIdx = {unsigned(i % gridDim.x), unsigned(i / gridDim.x % gridDim.y), unsigned(i / gridDim.x / gridDim.y)};
    run_block(config.dynamicSmemBytes);
  }
}

// The limits of every CUDA device, and of this one.
inline cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
  const auto within = [](const dim3& d, unsigned x, unsigned y, unsigned z) {
    return 1 <= d.x && d.x <= x && 1 <= d.y && d.y <= y && 1 <= d.z && d.z <= z;
  };
  if (!within(config.gridDim, 0x7fffffff, 65535, 65535) || !within(config.blockDim, 1024, 1024, 64) ||
      config.blockDim.x * config.blockDim.y * config.blockDim.z > 1024)
    return cudaErrorInvalidConfiguration;
  const auto asked = shared_asked.find(kernel);
  const int granted = asked == shared_asked.end() ? kSharedUnasked : asked->second;
  if (config.dynamicSmemBytes > size_t(std::min(granted, devices[current_device()].shared))) return cudaErrorInvalidValue;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& a = config.attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension && a.val.clusterDim.x * a.val.clusterDim.y * a.val.clusterDim.z > 1)
      return cudaErrorNotSupported;
  }
  return cudaSuccess;
}

}  // namespace cuda_host

inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_host::current_device();
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= int(std::size(cuda_host::devices))) return cuda_host::remember(cudaErrorInvalidValue);
  const cuda_host::Device& asked = cuda_host::devices[device];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = asked.multiprocessors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = asked.capability / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = asked.capability % 10; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = asked.shared; return cudaSuccess;
  }
  return cuda_host::remember(cudaErrorInvalidValue);
}

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_host::last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNotSupported: return "operation not supported";
  }
  return "unknown error";
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > cuda_host::devices[cuda_host::current_device()].shared)
    return cuda_host::remember(cudaErrorInvalidValue);
  cuda_host::shared_asked[kernel] = value;
  return cudaSuccess;
}

// Runs the whole grid before it returns. Every thread has its own copy of the kernel's parameters.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a kernel's parameters take 4 KB at most");
  const cudaError_t error = cuda_host::check(*config, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return cuda_host::remember(error);
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  cuda_host::run_grid(*config, [&] { std::apply(kernel, parameters); });
  return cudaSuccess;
}
