// CPU loops of the step family.
//
//   linf  one pass: read adv, grad, x, write out (16 bytes per fp32 element); an eager chain moves 44 to 60.
//   l2    per sample, one pass for three sums and one to apply them; a sample is still in cache for the second.
//   start one pass: read x, write out; the random numbers are computed, not stored.
//   hyperplane  per sample: its pulls and rooms once, then a few passes over these in cache for the one number that is sought.
//   l1    per sample: select the largest gradients, move, then find the one number of the exact projection.
//   apgd  one pass: read adv, old, grad, x, write adv, old (24 bytes); what is remembered is copied from a piece in cache.
//   momentum  per sample, one pass over the gradient for its size and one to move.
//
// Samples are independent and each is handled by one thread in a fixed order, so results are bit-identical for any number
// of threads.
#include "step.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu.h"

namespace fastadv {
namespace {

// One sample's (or a piece of one sample's) pointers.
template <class S, class G>
struct Piece {
  S* out;
  const S* adv;
  const G* grad;
  const S* x;
  int64_t size;

  Piece(const StepArgs& args, int64_t offset, int64_t size)
      : out(static_cast<S*>(args.out) + offset),
        adv(static_cast<const S*>(args.adv) + offset),
        grad(static_cast<const G*>(args.grad) + offset),
        x(static_cast<const S*>(args.x) + offset),
        size(size) {}
};

// out = f(adv, grad, x) elementwise. `omp simd` promises what the compiler cannot see: out is adv or does not overlap it.
template <class S, class G, class F>
FASTADV_MULTIVERSION void apply(Piece<S, G> p, F f) {
#pragma omp simd
  for (int64_t i = 0; i < p.size; ++i) store(p.out[i], f(load(p.adv[i]), load(p.grad[i]), load(p.x[i])));
}

template <class S, class G, class T>
FASTADV_MULTIVERSION void apgd_move(S* adv, S* old, const G* grad, const S* x, int64_t size, ApgdStep<T> f) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const S before = adv[i];
    store(adv[i], f(load(before), load(old[i]), load(grad[i]), load(x[i])));
    old[i] = before;
  }
}

template <class G>
FASTADV_MULTIVERSION void sum_of_sizes(const G* grad, int64_t size, double& result) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += std::abs(double(load(grad[i])));
  result = sum;
}

template <class S, class G, class T>
FASTADV_MULTIVERSION void momentum_move(S* adv, S* velocity, const G* grad, const S* x, int64_t size, Velocity<T> faster,
                                        LinfStep<T> step) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    S v;  // the step is along the velocity as it is kept
    store(v, faster(load(velocity[i]), load(grad[i])));
    velocity[i] = v;
    store(adv[i], step(load(adv[i]), load(v), load(x[i])));
  }
}

// Elements [begin, end) of one row; begin is a multiple of kGrain. Words are drawn for a block that stays in L1, then used.
template <class S, class F>
FASTADV_MULTIVERSION void start(const StartArgs& args, int64_t row, int64_t begin, int64_t end, F f) {
  constexpr int kCounters = 256;
  alignas(64) uint32_t words[4 * kCounters];
  const int64_t sample = row / args.copies;
  S* out = static_cast<S*>(args.out) + row * args.size;
  const S* x = static_cast<const S*>(args.x) + sample * args.size;
  const uint64_t seed = args.seed, number = args.number_of(sample);
  const uint32_t step = args.step + uint32_t(row % args.copies);
  for (int64_t block = begin; block < end; block += 4 * kCounters) {
    const uint64_t first = uint64_t(block / 4);  // a multiple of kCounters: its low word does not overflow below
    const uint32_t low = uint32_t(first), high = uint32_t(first >> 32) + step;
#pragma omp simd
    for (int k = 0; k < kCounters; ++k) {
      const Words w = philox(seed, low + uint32_t(k), high, uint32_t(number), uint32_t(number >> 32));
      words[4 * k] = w.word[0];
      words[4 * k + 1] = w.word[1];
      words[4 * k + 2] = w.word[2];
      words[4 * k + 3] = w.word[3];
    }
    const int64_t count = std::min<int64_t>(4 * kCounters, end - block);
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) store(out[block + k], f(words[k], load(x[block + k])));
  }
}

template <class S, class G>
FASTADV_MULTIVERSION void l2_sums(Piece<S, G> p, L2Sums& sums) {
  double dd = 0, dg = 0, gg = 0;
#pragma omp simd reduction(+ : dd, dg, gg)
  for (int64_t i = 0; i < p.size; ++i) {
    const double d = double(load(p.adv[i])) - double(load(p.x[i]));
    const double g = double(load(p.grad[i]));
    dd += d * d;
    dg += d * g;
    gg += g * g;
  }
  sums = {dd, dg, gg};
}

template <class S, class G, class T>
FASTADV_MULTIVERSION void l1_pulls(Piece<S, G> p, L1Move<T> move, T* pull) {
#pragma omp simd
  for (int64_t i = 0; i < p.size; ++i) pull[i] = move.pull(load(p.adv[i]), T(load(p.grad[i])));
}

template <class T>
FASTADV_MULTIVERSION int64_t count_at_least(const T* values, T threshold, int64_t size) {
  int64_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < size; ++i) count += values[i] >= threshold;
  return count;
}

template <class S, class G, class T>
FASTADV_MULTIVERSION void l1_move(Piece<S, G> p, L1Move<T> move, T* u) {
#pragma omp simd
  for (int64_t i = 0; i < p.size; ++i) u[i] = move(load(p.adv[i]), T(load(p.grad[i])), load(p.x[i]));
}

template <class S, class T>
FASTADV_MULTIVERSION void l1_project(const T* u, const S* x, S* out, int64_t size, L1Project<T> project) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) store(out[i], project(u[i], load(x[i])));
}

template <class S, class T>
FASTADV_MULTIVERSION void l1_length(const T* u, const S* x, int64_t size, L1Project<T> project, L1Length& result) {
  double total = 0;
  int64_t sliding = 0;
#pragma omp simd reduction(+ : total, sliding)
  for (int64_t i = 0; i < size; ++i) {
    const L1Length at = project.length_of(u[i], load(x[i]));
    total += at.total;
    sliding += at.sliding;
  }
  result = {total, sliding};
}

// Calls body(row, from, to) for each part of [begin, end) that lies in one row of that size.
template <class Body>
void for_each_row(int64_t begin, int64_t end, int64_t size, const Body& body) {
  while (begin < end) {
    const int64_t row = begin / size, stop = std::min(end, (row + 1) * size);
    body(row, begin, stop);
    begin = stop;
  }
}

// One sample's pulls and rooms, which the passes to come read from cache.
template <class S, class G, class T>
FASTADV_MULTIVERSION void hyperplane_rooms(const S* x, const G* w, int64_t size, Hyperplane<T> plane, T* pull, T* room) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    pull[i] = plane.pull(T(load(w[i])));
    room[i] = plane.room(T(load(w[i])), load(x[i]));
  }
}

template <class T, bool kLinf>
FASTADV_MULTIVERSION void hyperplane_reach(const T* pull, const T* room, int64_t size, HyperplaneStretch<T, kLinf> stretch,
                                           HyperplaneReach& result) {
  double full = 0, slope = 0;
#pragma omp simd reduction(+ : full, slope)
  for (int64_t i = 0; i < size; ++i) {
    const double p = double(pull[i]);
    const bool at_wall = stretch.at_wall(pull[i], room[i]);
    full += at_wall ? p * double(room[i]) : 0.0;
    slope += at_wall ? 0.0 : p * stretch.speed(pull[i]);
  }
  result = {full, slope};
}

template <class T>
FASTADV_MULTIVERSION void hyperplane_total(const T* pull, const T* room, int64_t size, HyperplaneFill<T> fill,
                                           HyperplaneTotal<T>& result) {
  double gain = 0;
  T least = std::numeric_limits<T>::max(), below = 0;
#pragma omp simd reduction(+ : gain) reduction(min : least) reduction(max : below)
  for (int64_t i = 0; i < size; ++i) {
    const bool filled = pull[i] >= fill.threshold;
    gain += filled ? fill.gain(pull[i], room[i]) : 0.0;
    least = smaller(least, filled ? pull[i] : least);
    below = larger(below, filled ? below : pull[i]);
  }
  result = {gain, least, below};
}

template <class S, class G, class T, class F>
FASTADV_MULTIVERSION void hyperplane_move(S* out, const G* w, const T* pull, const T* room, int64_t size, Hyperplane<T> plane,
                                          F distance) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) store(out[i], plane.ahead(T(load(w[i]))) * distance(pull[i], room[i]));
}

// distance_of(far, pull, room) says how far the elements of a sample move, as a function of pull and room.
template <class DistanceOf>
void hyperplane(const HyperplaneArgs& args, int threads, const DistanceOf& distance_of) {
  dispatch(args.dtype, args.w_dtype, [&](auto s, auto g) {
    using S = decltype(s);
    using T = arithmetic_t<S>;
    const int64_t size = args.size;
    parallel_chunks(args.points, rows_per_chunk(size), threads, [&](int64_t begin, int64_t end) {
      std::vector<T> pull(size), room(size);
      for (int64_t i = begin; i < end; ++i) {
        S* out = static_cast<S*>(args.out) + i * size;
        const auto* w = static_cast<const decltype(g)*>(args.w) + i % args.planes * size;
        const auto plane = Hyperplane<T>::to(args.gaps[i], args.lo, args.hi);
        hyperplane_rooms(static_cast<const S*>(args.x) + i * size, w, size, plane, pull.data(), room.data());
        const double far = args.gaps[i] < 0.0 ? -args.gaps[i] : args.gaps[i];
        hyperplane_move(out, w, pull.data(), room.data(), size, plane, distance_of(far, pull, room));
      }
    });
  });
}

template <bool kLinf>
void stretched_hyperplane(const HyperplaneArgs& args, int threads) {
  hyperplane(args, threads, [](double far, const auto& pull, const auto& room) {
    using Stretch = HyperplaneStretch<typename std::decay_t<decltype(pull)>::value_type, kLinf>;
    return Stretch{hyperplane_stretch(far, [&](double t) {
      HyperplaneReach at;
      hyperplane_reach(pull.data(), room.data(), int64_t(pull.size()), Stretch{t}, at);
      return at;
    })};
  });
}

template <class T>
T largest_size(const T* u, int64_t size) {
  T largest = T(0);
  for (int64_t i = 0; i < size; ++i) largest = larger(largest, u[i] < T(0) ? -u[i] : u[i]);
  return largest;
}

}  // namespace

void linf_step_cpu(const StepArgs& args, int threads) {
  dispatch(args.dtype, args.grad_dtype, [&](auto s, auto g) {
    using S = decltype(s);
    using T = arithmetic_t<S>;
    const auto step = [&](int64_t sample) {
      return LinfStep<T>{T(args.alpha_of(sample)), T(args.eps_of(sample)), T(args.lo), T(args.hi)};
    };
    const bool one_step_for_all = !args.alphas && !args.radii;
    const int64_t row = one_step_for_all ? args.samples * args.size : args.size;  // the stretch with constant scalars
    parallel_chunks(args.samples * args.size, kGrain, threads, [&](int64_t begin, int64_t end) {
      for_each_row(begin, end, row, [&](int64_t sample, int64_t from, int64_t to) {
        apply(Piece<S, decltype(g)>(args, from, to - from), step(sample));
      });
    });
  });
}

void apgd_step_cpu(const ApgdArgs& args, int threads) {
  dispatch(args.dtype, args.grad_dtype, [&](auto s, auto g) {
    using S = decltype(s);
    using G = decltype(g);
    parallel_chunks(args.samples * args.size, kGrain, threads, [&](int64_t begin, int64_t end) {
      for_each_row(begin, end, args.size, [&](int64_t sample, int64_t from, int64_t to) {
        const auto image = [&](const void* data) { return static_cast<S*>(const_cast<void*>(data)) + from; };
        const auto gradient = [&](const void* data) { return static_cast<G*>(const_cast<void*>(data)) + from; };
        const size_t count = size_t(to - from);
        if (args.better[sample]) {
          std::memcpy(image(args.best), image(args.adv), count * sizeof(S));
          std::memcpy(gradient(args.best_grad), gradient(args.grad), count * sizeof(G));
        }
        if (args.taken[sample]) std::memcpy(image(args.image), image(args.adv), count * sizeof(S));
        apgd_move<S, G>(image(args.adv), image(args.old), gradient(args.grad), image(args.x), to - from,
                        args.step_of<arithmetic_t<S>>(sample));
      });
    });
  });
}

void momentum_step_cpu(const MomentumArgs& args, int threads) {
  dispatch(args.dtype, args.grad_dtype, [&](auto s, auto g) {
    using S = decltype(s);
    using G = decltype(g);
    using T = arithmetic_t<S>;
    parallel_chunks(args.samples, rows_per_chunk(args.size), threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i * args.size;
        const G* grad = static_cast<const G*>(args.grad) + at;
        double sum;
        sum_of_sizes(grad, args.size, sum);
        momentum_move(static_cast<S*>(args.adv) + at, static_cast<S*>(args.velocity) + at, grad,
                      static_cast<const S*>(args.x) + at, args.size,
                      Velocity<T>::from_sum(sum, args.scalars.momentum_of(i)), args.scalars.linf_of<T>(i));
      }
    });
  });
}

// `of` says what is done with a word in a sample, in arithmetic of the type that it is given a zero of.
template <class Of>
void starts(const StartArgs& args, int threads, Of of) {
  dispatch(args.dtype, [&](auto s) {
    using S = decltype(s);
    const int64_t pieces = (args.size + kGrain - 1) / kGrain;  // of a row
    prefer_huge_pages(args.out, args.rows() * args.size * int64_t(sizeof(S)));
    parallel_chunks(args.rows() * pieces, rows_per_chunk(std::min(args.size, kGrain)), threads, [&](int64_t from, int64_t to) {
      for (int64_t piece = from; piece < to; ++piece) {
        const int64_t row = piece / pieces, begin = piece % pieces * kGrain;
        start<S>(args, row, begin, std::min(begin + kGrain, args.size), of(row / args.copies, arithmetic_t<S>(0)));
      }
    });
  });
}

void linf_start_cpu(const StartArgs& args, int threads) {
  starts(args, threads, [&](int64_t sample, auto zero) {
    using T = decltype(zero);
    return LinfStart<T>{T(args.eps_of(sample)), T(args.lo), T(args.hi)};
  });
}

void normal_start_cpu(const StartArgs& args, int threads) {
  starts(args, threads, [&](int64_t sample, auto zero) {
    using T = decltype(zero);
    return NormalStart<T>{T(args.eps_of(sample))};
  });
}

void l2_step_cpu(const StepArgs& args, int threads) {
  dispatch(args.dtype, args.grad_dtype, [&](auto s, auto g) {
    using S = decltype(s);
    using T = arithmetic_t<S>;
    parallel_chunks(args.samples, rows_per_chunk(args.size), threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Piece<S, decltype(g)> piece(args, i * args.size, args.size);
        L2Sums sums;
        l2_sums(piece, sums);
        apply(piece, L2Step<T>::from_sums(sums, args.alpha_of(i), args.eps_of(i), T(args.lo), T(args.hi)));
      }
    });
  });
}

void l1_step_cpu(const StepArgs& args, int threads) {
  dispatch(args.dtype, args.grad_dtype, [&](auto s, auto g) {
    using S = decltype(s);
    using T = arithmetic_t<S>;
    const int64_t size = args.size;
    const int64_t moved = std::min(size, std::max(int64_t(1), int64_t(args.fraction * double(size))));
    parallel_chunks(args.samples, rows_per_chunk(size), threads, [&](int64_t begin, int64_t end) {
      std::vector<T> pull(size), selected(size), u(size);
      const T lo = T(args.lo), hi = T(args.hi);
      for (int64_t i = begin; i < end && size > 0; ++i) {
        const Piece<S, decltype(g)> piece(args, i * size, size);
        L1Move<T> move{T(args.alpha_of(i)), T(0), lo, hi};
        l1_pulls(piece, move, pull.data());
        selected = pull;
        std::nth_element(selected.begin(), selected.begin() + (moved - 1), selected.end(), std::greater<T>());
        // Ties may select more than `moved`; elements without any pull are never among them.
        move.threshold = larger(selected[moved - 1], std::numeric_limits<T>::denorm_min());
        const int64_t movers = count_at_least(pull.data(), move.threshold, size);
        move.step = movers ? T(args.alpha_of(i) / double(movers)) : T(0);
        l1_move(piece, move, u.data());
        const auto length_at = [&](T shrink) {
          L1Length length;
          l1_length(u.data(), piece.x, size, L1Project<T>{shrink, lo, hi}, length);
          return length;
        };
        const T shrink = l1_shrink<T>(args.eps_of(i), length_at, [&] { return largest_size(u.data(), size); });
        l1_project(u.data(), piece.x, piece.out, size, L1Project<T>{shrink, lo, hi});
      }
    });
  });
}

void linf_hyperplane_cpu(const HyperplaneArgs& args, int threads) { stretched_hyperplane<true>(args, threads); }

void l2_hyperplane_cpu(const HyperplaneArgs& args, int threads) { stretched_hyperplane<false>(args, threads); }

void l1_hyperplane_cpu(const HyperplaneArgs& args, int threads) {
  hyperplane(args, threads, [](double far, const auto& pull, const auto& room) {
    using T = typename std::decay_t<decltype(pull)>::value_type;
    using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
    const int64_t size = int64_t(pull.size());
    return hyperplane_fill<T, Bits>(far, largest_size(pull.data(), size), [&](T threshold) {
      HyperplaneTotal<T> total;
      hyperplane_total(pull.data(), room.data(), size, HyperplaneFill<T>{threshold, 0.0, far}, total);
      return total;
    });
  });
}

}  // namespace fastadv
