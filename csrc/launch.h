// How the CUDA kernels are launched: pure functions of sizes and device, so that they are tested without a GPU
// (tests/test_launch.py, through _C.launches).
#pragma once

#include <cstdint>

#include "math.h"

namespace fastadv {

struct Device {
  int sms;         // multiprocessors
  int64_t shared;  // bytes of shared memory that one block may ask for
  int cluster;     // blocks in the largest portable cluster: 8 from sm_90 on, 1 before
};

struct Launch {
  int64_t blocks;   // grid.x
  int64_t rows;     // grid.y
  int threads;      // of a block, whole warps
  int64_t shared;   // dynamic shared memory of a block, bytes
  int cluster;      // blocks of a cluster; divides `blocks`
};

constexpr int kWarp = 32;
// Of kernels that keep much in registers: up to 128 for each thread. Their __launch_bounds__ say how many blocks a
// multiprocessor must hold; left to itself, ptxas takes fewer registers and spills.
constexpr int kMaxThreads = 512;
constexpr int kStreamThreads = 256;
constexpr int64_t kMaxBlocks = 0x7fffffff;  // of grid.x
constexpr int64_t kMaxRows = 65535;         // of grid.y

FASTADV_FN constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTADV_FN constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTADV_FN constexpr int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

// A streaming kernel: one thread for each item of a row, blocks over rows. Nothing is shared and a thread has its loads in
// flight at once, so plain blocks that the hardware schedules are as fast as any loop; the loop is for grids too large.
constexpr Launch stream_launch(int64_t rows, int64_t items) {
  return {least(most(ceil_div(items, kStreamThreads), 1), kMaxBlocks), least(rows, kMaxRows), kStreamThreads, 0, 1};
}

constexpr int64_t kDeclaredShared = 1024;  // bytes that kernels declare themselves, for reductions, at most

// The l2 step with its sample on chip: a cluster of blocks for each sample, each block keeping its share (`item_bytes` for
// each of `items`) in shared memory between the reduction and the update. threads == 0: a sample does not fit.
//
// Small shares let several blocks live on a multiprocessor, so that one loads while another stores; more blocks than
// multiprocessors keep all busy at small batches. The smallest cluster that has both is taken, else the largest that fits.
constexpr Launch l2_launch(const Device& device, int64_t samples, int64_t items, int64_t item_bytes) {
  constexpr int64_t kRoomy = 32 * 1024;
  Launch chosen{0, 1, 0, 0, 1};
  for (int cluster = 1; cluster <= device.cluster; cluster *= 2) {
    const int64_t share = ceil_div(items, cluster), bytes = share * item_bytes;
    if (bytes > device.shared - kDeclaredShared) continue;
    const int64_t threads = ceil_div(ceil_div(share, 4), kWarp) * kWarp;
    chosen = {least(samples, kMaxBlocks / cluster) * cluster, 1, int(least(most(threads, 4 * kWarp), kMaxThreads)), bytes,
              cluster};
    if (share <= kStreamThreads || (bytes <= kRoomy && samples * cluster >= device.sms)) break;
  }
  return chosen;
}

// The part of `count` items that the block of this rank keeps.
struct Share {
  int64_t begin, end;
};
FASTADV_FN constexpr Share share_of(int rank, int cluster, int64_t count) {
  const int64_t share = ceil_div(count, cluster);
  return {least(rank * share, count), least((rank + 1) * share, count)};
}

// The l2 step otherwise, and the momentum step: partial sums of each sample by chunks, then an elementwise pass.
constexpr int64_t kSumChunks = 64;  // of a sample, at most: their partial sums are added up by one block
constexpr Launch sums_launch(int64_t samples, int64_t items) {
  return {least(most(ceil_div(items, 8 * kStreamThreads), 1), kSumChunks), least(samples, kMaxRows), kStreamThreads, 0, 1};
}

// The second pass: several items a thread, which first adds up its sample's partial sums.
constexpr Launch apply_launch(int64_t samples, int64_t items) { return stream_launch(samples, ceil_div(items, 8)); }

// The weights family: of all blocks of a launch, a tensor has so many, each thread with eight items. In the first pass as many
// as there are partial sums, at most: every block of the second adds them all up. A launch takes the tensors that fit its
// arguments, which are 4 KB for drivers before CUDA 12.1.
constexpr int kTableTensors = 88;
constexpr int64_t kMaxTensorBlocks = kMaxBlocks / kTableTensors;
constexpr int64_t weight_blocks(int64_t items, int64_t most_blocks) {
  return least(most(ceil_div(items, 8 * kStreamThreads), 1), least(most_blocks, kMaxTensorBlocks));
}

// A row of logits: `lanes` threads of a warp, or one block (lanes == 0), hold it in registers, `items` logits a thread; or
// (items == 0) a block streams it. Two lanes would do for 16 classes; four find work for twice the warps at small batches.
struct RowLaunch {
  Launch launch;
  int lanes, items;
};
constexpr int kRowItems = 8;

constexpr RowLaunch row_launch(int64_t rows, int64_t classes, bool wide) {
  const auto block_per_row = [&](int64_t warps) { return Launch{least(rows, kMaxBlocks), 1, int(warps) * kWarp, 0, 1}; };
  // fp64 serves tests and exact work, not speed: one shape of kernel is enough.
  if (wide || classes > kMaxThreads * kRowItems)
    return {block_per_row(least(most(ceil_div(classes, kRowItems * kWarp), 1), 16)), 0, 0};
  if (classes > kWarp * kRowItems) return {block_per_row(ceil_div(classes, kRowItems * kWarp)), 0, kRowItems};
  int lanes = 4;
  while (lanes * kRowItems < classes) lanes *= 2;
  constexpr int kThreads = 4 * kWarp;
  return {{least(ceil_div(rows, kThreads / lanes), kMaxBlocks), 1, kThreads, 0, 1}, lanes, kRowItems};
}

// The l1 step: a block for each sample, which it reads many times (from cache).
constexpr Launch l1_launch(int64_t samples, int64_t size) {
  const int64_t threads = least(most(ceil_div(ceil_div(size, 4), kWarp), 1) * kWarp, kMaxThreads);
  return {least(samples, kMaxBlocks), 1, int(threads), 0, 1};
}

}  // namespace fastadv
