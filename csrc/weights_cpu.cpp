// CPU loops of the weights family: every tensor is cut into pieces of a fixed size, which threads share whatever tensor they
// belong to. Partial sums are added in the order of the pieces, so results do not depend on the number of threads.
#include "weights.h"

#include <algorithm>
#include <vector>

#include "cpu.h"

namespace fastadv {
namespace {

struct Piece {
  int64_t tensor, begin, end;
};

std::vector<Piece> pieces_of(const WeightsArgs& args) {
  std::vector<Piece> pieces;
  for (int64_t t = 0; t < args.count; ++t)
    for (int64_t begin = 0; begin < args.tensors[t].size; begin += kGrain)
      pieces.push_back({t, begin, std::min(begin + kGrain, args.tensors[t].size)});
  return pieces;
}

// In double: squares of small fp32 gradients would underflow to 0.
template <class S, class G>
FASTADV_MULTIVERSION void sums_of(const S* w, const G* g, const S* origin, int64_t size, WeightSums& sums) {
  double oo = 0, dd = 0, dg = 0, gg = 0;
#pragma omp simd reduction(+ : oo, dd, dg, gg)
  for (int64_t i = 0; i < size; ++i) {
    const double o = double(load(origin[i])), d = double(load(w[i])) - o, gradient = double(load(g[i]));
    oo += o * o;
    dd += d * d;
    dg += d * gradient;
    gg += gradient * gradient;
  }
  sums = {oo, dd, dg, gg};
}

// The same where w is the origin, which is recorded.
template <class S, class G>
FASTADV_MULTIVERSION void record(const S* w, const G* g, S* origin, int64_t size, WeightSums& sums) {
  double oo = 0, gg = 0;
#pragma omp simd reduction(+ : oo, gg)
  for (int64_t i = 0; i < size; ++i) {
    const double o = double(load(w[i])), gradient = double(load(g[i]));
    oo += o * o;
    gg += gradient * gradient;
    origin[i] = w[i];
  }
  sums = {oo, 0.0, 0.0, gg};
}

template <class S, class G, class T>
FASTADV_MULTIVERSION void apply(S* w, const G* g, const S* origin, int64_t size, L2Step<T> step) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) store(w[i], step(load(w[i]), T(load(g[i])), load(origin[i])));
}

}  // namespace

void weight_sums_cpu(const WeightsArgs& args, int threads) {
  const std::vector<Piece> pieces = pieces_of(args);
  std::vector<WeightSums> partial(pieces.size());
  parallel_chunks(int64_t(pieces.size()), 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const Piece piece = pieces[i];
      const Weight& t = args.tensors[piece.tensor];
      dispatch(t.dtype, t.grad_dtype, [&](auto s, auto gradient) {
        const auto* w = static_cast<const decltype(s)*>(t.w) + piece.begin;
        const auto* g = static_cast<const decltype(gradient)*>(t.g) + piece.begin;
        auto* origin = static_cast<decltype(s)*>(t.origin) + piece.begin;
        const int64_t size = piece.end - piece.begin;
        args.record ? record(w, g, origin, size, partial[i])
                    : sums_of(w, g, const_cast<const decltype(s)*>(origin), size, partial[i]);
      });
    }
  });
  std::fill(args.sums, args.sums + args.count * args.slices, WeightSums{0.0, 0.0, 0.0, 0.0});
  for (size_t i = 0; i < pieces.size(); ++i) {
    WeightSums& total = args.sums[pieces[i].tensor * args.slices];
    total = total + partial[i];
  }
}

void perturb_cpu(const WeightsArgs& args, int threads) {
  std::vector<WeightSums> totals(size_t(args.count), WeightSums{0.0, 0.0, 0.0, 0.0});
  for (int64_t t = 0; t < args.count; ++t)
    for (int64_t slice = 0; slice < args.slices; ++slice) totals[t] = totals[t] + args.sums[t * args.slices + slice];
  const std::vector<Piece> pieces = pieces_of(args);
  parallel_chunks(int64_t(pieces.size()), 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const Piece piece = pieces[i];
      const Weight& t = args.tensors[piece.tensor];
      dispatch(t.dtype, t.grad_dtype, [&](auto s, auto gradient) {
        using S = decltype(s);
        const auto step = weight_step<arithmetic_t<S>>(totals[piece.tensor], args.gamma, args.alpha);
        apply(static_cast<S*>(t.w) + piece.begin, static_cast<const decltype(gradient)*>(t.g) + piece.begin,
              static_cast<const S*>(t.origin) + piece.begin, piece.end - piece.begin, step);
      });
    }
  });
}

}  // namespace fastadv
