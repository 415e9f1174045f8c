// What the CPU loops share: one build for several instruction sets, and threads over chunks.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// GCC compiles a function marked so once per instruction set and picks at load time: the loops are AVX-512 where the
// machine has it, and the extension still runs on any x86-64. Elsewhere the compiler's baseline is used.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTADV_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FASTADV_MULTIVERSION
#endif

namespace fastadv {

// Elements of work below which a thread is not worth waking.
constexpr int64_t kGrain = 32768;

// Calls body(begin, end) over [0, n) in chunks of `chunk`, on at most `threads` OpenMP threads. A body's result must not
// depend on where the chunks are cut: then results do not depend on the number of threads.
template <class Body>
void parallel_chunks(int64_t n, int64_t chunk, int threads, const Body& body) {
  const int64_t chunks = (n + chunk - 1) / chunk;
  if (threads > chunks) threads = int(chunks);
  if (threads <= 1) {
    if (n > 0) body(int64_t(0), n);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = i * chunk;
    body(begin, begin + chunk < n ? begin + chunk : n);
  }
}

// Asks for huge pages behind memory that is about to be written for the first time: a page fault for each 2 MB, not for each
// 4 KB, which on a large fresh tensor cost more than the kernel. A hint: memory that is already mapped is left as it is.
inline void prefer_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(begin) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(begin) + uintptr_t(bytes)) / kHuge * kHuge;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

// How many rows of `row_size` elements make a chunk worth a thread.
inline int64_t rows_per_chunk(int64_t row_size) { return row_size >= kGrain ? 1 : kGrain / (row_size > 0 ? row_size : 1); }

}  // namespace fastadv
