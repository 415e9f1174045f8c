// What the CPU loops share: one build for several instruction sets, and threads over chunks.
#pragma once

#include <cstdint>

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

// How many rows of `row_size` elements make a chunk worth a thread.
inline int64_t rows_per_chunk(int64_t row_size) { return row_size >= kGrain ? 1 : kGrain / (row_size > 0 ? row_size : 1); }

}  // namespace fastadv
