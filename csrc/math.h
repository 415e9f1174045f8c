// Every scalar formula of fastadv, once.
//
// Each struct holds the scalars of one formula and applies it with a const operator(). The same code is compiled by g++
// (CPU loops) and nvcc (CUDA kernels); fastadv/reference/ states the same formulas in PyTorch and is the specification.
//
// Two rules keep all backends equal:
//   * sign and clamp are comparisons, never fmin/fmax: a NaN gradient has sign 0 and moves nothing, and a NaN value stays
//     NaN through a clamp, as in torch.
//   * alpha * sign(g) is exact, so the linf step rounds the same with or without fused multiply-add: bit-identical. Where a
//     product is not exact and bits matter, product() is never fused.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define FASTADV_FN __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FASTADV_FN inline __attribute__((always_inline))
#else
#define FASTADV_FN inline
#endif

namespace fastadv {

// ---------------------------------------------------------------------------------------------------------- elementary

template <class T>
FASTADV_FN T sign(T v) {
  return T((v > T(0)) - (v < T(0)));
}

template <class T>
FASTADV_FN T clamp(T v, T lo, T hi) {
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

template <class T>
FASTADV_FN T larger(T a, T b) {
  return a < b ? b : a;
}

template <class T>
FASTADV_FN T smaller(T a, T b) {
  return b < a ? b : a;
}

// a * b, rounded before anything is added to it. Compilers like to fuse the two, some more than others; not mul.rn, and not
// across a comparison.
#if defined(__CUDA_ARCH__)
FASTADV_FN float product(float a, float b) {
  float p;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(p) : "f"(a), "f"(b));
  return p;
}
FASTADV_FN double product(double a, double b) {
  double p;
  asm("mul.rn.f64 %0, %1, %2;" : "=d"(p) : "d"(a), "d"(b));
  return p;
}
#else
template <class T>
FASTADV_FN T product(T a, T b) {
  const T p = a * b;
  return p == p ? p : std::numeric_limits<T>::quiet_NaN();
}
#endif

template <class To, class From>
FASTADV_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// a / b. On a GPU by the reciprocal unit, an ulp or two off: exact division there is a subroutine, around which kernels spill.
FASTADV_FN float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
#else
  return a / b;
#endif
}
FASTADV_FN double divide(double a, double b) { return a / b; }

// exp(x) for x <= 0, the only argument that a stable softmax has; below -87.3 (where float has no normal result) it is 0.
// libm's expf is a call that stops a row loop from vectorising, which makes the loop 3x slower than torch; this is
// straight-line code with a relative error under 1e-7.
//   x = n ln2 + r with |r| <= ln2/2;   exp(r) = 1 + r + r^2 P(r), P of degree 4 fitted to a relative error of 3e-9.
FASTADV_FN float exp_(float x) {
  const float smallest = -87.3f;
#if defined(__CUDA_ARCH__)  // there the special function unit has 2^t; `rest` is what the product lost to rounding
  const float t = x * 1.44269504f, rest = fmaf(x, 1.44269504f, -t) + x * 1.92596299e-8f;
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
  return x < smallest ? 0.0f : power + power * (rest * 0.693147181f);
#else
  const float y = x < smallest ? smallest : x;  // a NaN passes
  const float round_to_integer = 12582912.0f;   // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = y * 1.44269504f + round_to_integer;
  const float n = shifted - round_to_integer;
  const float r = (y - n * 0.693359375f) - n * -2.12194440e-4f;  // ln2 in two parts; the first product is exact
  float p = 1.38144731e-3f;
  p = p * r + 8.36873216e-3f;
  p = p * r + 4.16683908e-2f;
  p = p * r + 1.66665205e-1f;
  p = p * r + 4.99999934e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(round_to_integer);
  const float scale = bit_cast<float>(uint32_t(exponent + 127) << 23);
  return x < smallest ? 0.0f : p * scale;
#endif
}

// log(x) for normal x > 0. x = 2^e m with m in [sqrt(1/2), sqrt(2)); with s = (m-1)/(m+1), log m = 2 atanh(s), whose
// series in s^2 (|s| < 0.172) is below float rounding after the s^9 term.
FASTADV_FN float log_(float x) {
  const int32_t bits = bit_cast<int32_t>(x);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3 is sqrt(1/2)
  const float m = bit_cast<float>(uint32_t(bits) - (uint32_t(exponent) << 23));
  const float s = divide(m - 1.0f, m + 1.0f);
  const float s2 = s * s;
  float p = 1.0f / 9.0f;
  p = p * s2 + 1.0f / 7.0f;
  p = p * s2 + 1.0f / 5.0f;
  p = p * s2 + 1.0f / 3.0f;
  const float log_m = 2.0f * s + 2.0f * s * s2 * p;
  const float e = float(exponent);
  const float y = (e * -2.12194440e-4f + log_m) + e * 0.693359375f;
  return x == x ? y : x;
}

// Double precision serves tests and exact work, not speed: libm is right there.
FASTADV_FN double exp_(double x) { return ::exp(x); }
FASTADV_FN double log_(double x) { return ::log(x); }

FASTADV_FN float sqrt_(float x) { return ::sqrtf(x); }
FASTADV_FN double sqrt_(double x) { return ::sqrt(x); }

// ---------------------------------------------------------------------------------------------------------- step family

// adv <- clamp_[lo,hi]( clamp_[x-eps,x+eps]( adv + alpha sign(g) ) )
template <class T>
struct LinfStep {
  T alpha, eps, lo, hi;
  FASTADV_FN T project(T moved, T x) const { return clamp(clamp(moved, x - eps, x + eps), lo, hi); }
  FASTADV_FN T operator()(T adv, T g, T x) const { return project(adv + alpha * sign(g), x); }
};

// Auto-PGD's move: towards the linf step z, and on in the direction of the last move, from `old`; projected.
template <class T>
struct ApgdStep {
  LinfStep<T> step;
  T momentum, inertia;  // inertia = 1 - momentum
  FASTADV_FN T operator()(T adv, T old, T g, T x) const {
    const T z = step(adv, g, x);
    return step.project(adv + product(momentum, z - adv) + product(inertia, adv - old), x);
  }
};

// velocity <- decay velocity + g/|g|_1, of one sample; MI-FGSM steps along it.
template <class T>
struct Velocity {
  T decay, share, unit;  // share is that of g * unit; unit is the power of two that keeps it a normal float

  static FASTADV_FN Velocity from_sum(double sum, double decay) {
    const bool adds = sum > 0.0 && sum < HUGE_VAL;  // a zero or NaN gradient does not
    const double far = 18446744073709551616.0;      // 2^64
    const double unit = sum * far < 1.0 ? far : sum > far ? 1.0 / far : 1.0;
    return {T(decay), adds ? T(1.0 / (sum * unit)) : T(0), T(unit)};
  }
  FASTADV_FN T operator()(T velocity, T g) const {
    const T added = share == T(0) ? T(0) : product(share, g * unit);  // 0 * NaN would be NaN
    return product(decay, velocity) + added;
  }
};

// <d,d>, <d,g>, <g,g> of a step from d along g. In double: squares of small fp32 gradients would underflow to 0.
struct L2Sums {
  double dd, dg, gg;
};

FASTADV_FN L2Sums operator+(const L2Sums& a, const L2Sums& b) { return {a.dd + b.dd, a.dg + b.dg, a.gg + b.gg}; }

// adv <- clamp_[lo,hi]( x + s (d + a g/|g|) ), d = adv - x, s = min(1, eps / |d + a g/|g||): one sample's step in the
// l2 ball. |d + a g/|g||^2 = |d|^2 + 2a<d,g>/|g| + a^2, so three sums over the sample fix both coefficients.
template <class T>
struct L2Step {
  T keep, move, unit, lo, hi;  // coefficients of d and of g * unit; unit is the power of two that keeps `move` a normal float

  static FASTADV_FN L2Step from_sums(const L2Sums& sums, double alpha, double eps, T lo, T hi) {
    const double g_norm = ::sqrt(sums.gg);
    const bool moves = g_norm > 0.0 && g_norm < HUGE_VAL;  // a zero or NaN gradient moves nothing
    const double a = moves ? alpha : 0.0;
    const double cross = moves ? sums.dg / g_norm : 0.0;
    const double norm = ::sqrt(larger(sums.dd + 2.0 * a * cross + a * a, 0.0));
    const double shrink = norm > eps ? eps / norm : 1.0;
    const double far = 18446744073709551616.0;  // 2^64
    const double unit = g_norm * far < 1.0 ? far : g_norm > far ? 1.0 / far : 1.0;
    return {T(shrink), moves ? T(shrink * a / (g_norm * unit)) : T(0), T(unit), lo, hi};
  }
  FASTADV_FN T operator()(T adv, T g, T x) const {
    const T moved = move == T(0) ? T(0) : move * (g * unit);  // 0 * NaN would be NaN
    return clamp(x + (keep * (adv - x) + moved), lo, hi);
  }
};

// Adversarial weight perturbation (AWP): the l2 step of a tensor w about its origin o, all lengths relative to |o|. The sums
// are |o|^2 and those of the step, d = w - o.
struct WeightSums {
  double oo;
  L2Sums step;
};

FASTADV_FN WeightSums operator+(const WeightSums& a, const WeightSums& b) { return {a.oo + b.oo, a.step + b.step}; }

template <class T>
FASTADV_FN L2Step<T> weight_step(const WeightSums& sums, double gamma, double alpha) {
  const double length = ::sqrt(sums.oo);
  return L2Step<T>::from_sums(sums.step, alpha * length, gamma * length, T(-HUGE_VAL), T(HUGE_VAL));
}

// The sparse l1 step before its projection: u = adv - x + step * sign(g) where pull >= threshold. The pull is |g|, and 0
// where the step would run into the wall that adv already touches: those elements would waste their share of the step.
template <class T>
struct L1Move {
  T step, threshold, lo, hi;
  FASTADV_FN T pull(T adv, T g) const {
    const T ahead = step < T(0) ? -g : g;
    const T up = adv < hi ? ahead : T(0), down = adv > lo ? -ahead : T(0);
    return ahead > T(0) ? up : ahead < T(0) ? down : T(0);  // a NaN has none
  }
  FASTADV_FN T operator()(T adv, T g, T x) const {
    return (adv - x) + (pull(adv, g) >= threshold ? step * sign(g) : T(0));
  }
};

// |d|_1 after a projection, and how many coordinates still slide with its shrink.
struct L1Length {
  double total;
  int64_t sliding;
};

FASTADV_FN L1Length operator+(const L1Length& a, const L1Length& b) { return {a.total + b.total, a.sliding + b.sliding}; }

// The projection of u onto {|d|_1 <= eps} and {lo <= x + d <= hi} at once is d = sign(u) clamp(|u| - shrink, 0, room),
// room being the distance to the wall ahead; `shrink` >= 0 is the one number that makes |d|_1 = eps (or 0 inside the ball).
template <class T>
struct L1Project {
  T shrink, lo, hi;
  FASTADV_FN T room(T u, T x) const { return u < T(0) ? x - lo : hi - x; }
  FASTADV_FN T length(T u, T x) const { return clamp((u < T(0) ? -u : u) - shrink, T(0), room(u, x)); }
  FASTADV_FN L1Length length_of(T u, T x) const {
    const T d = length(u, x);
    return {double(d), d > T(0) && d < room(u, x)};
  }
  FASTADV_FN T operator()(T u, T x) const { return clamp(x + sign(u) * length(u, x), lo, hi); }
};

// The shrink that brings |d|_1 = length_at(shrink) down to eps. The length falls piecewise linearly in shrink: Newton's step
// is exact on the last piece, and bisection guards it before. A dozen passes over a sample in cache beat sorting its corners.
// reach() is the largest |u|, beyond which nothing is left.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class T, class LengthAt, class Reach>
FASTADV_FN T l1_shrink(double eps, const LengthAt& length_at, const Reach& reach) {
  L1Length at = length_at(T(0));
  if (!(at.total > eps)) return T(0);
  T low = T(0), high = reach(), shrink = T(0);
  for (int pass = 0; pass < 128; ++pass) {
    const T newton = at.sliding ? T(double(shrink) + (at.total - eps) / double(at.sliding)) : low;
    const T next = newton > low && newton < high ? newton : low + (high - low) / T(2);
    if (next == shrink || next <= low || next >= high) break;
    shrink = next;
    at = length_at(shrink);
    (at.total > eps ? low : high) = shrink;
    if (at.total == eps) break;
  }
  return at.total > eps ? high : shrink;
}

// The counter-based generator Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four
// random words from a counter and a key, so that any element of any sample is drawn on its own, in any order.
struct Words {
  uint32_t word[4];
};

// Recursion rather than a loop: straight-line code vectorises over counters.
template <int kRounds>
FASTADV_FN Words philox_rounds(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  if constexpr (kRounds == 0) {
    return {{c0, c1, c2, c3}};
  } else {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    return philox_rounds<kRounds - 1>(uint32_t(p1 >> 32) ^ c1 ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c3 ^ k1, uint32_t(p0),
                                      k0 + 0x9E3779B9u, k1 + 0xBB67AE85u);
  }
}

FASTADV_FN Words philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  return philox_rounds<10>(c0, c1, c2, c3, uint32_t(key), uint32_t(key >> 32));
}

// adv <- clamp_[lo,hi]( x + eps u ), u uniform in [-1, 1) in steps of 2^-23, from one random word.
template <class T>
struct LinfStart {
  T eps, lo, hi;
  FASTADV_FN T operator()(uint32_t word, T x) const {
    const T u = T(int32_t(word >> 8) - (1 << 23)) * T(1.0 / (1 << 23));
    return clamp(x + eps * u, lo, hi);
  }
};

// A standard normal number from one random word: the lowest bit is its sign, the other 31 are the probability q in (0, 1/2) of a
// larger one. |z| = u P(w) with u = 1 - 2q and w = -log(4 q (1 - q)); P is two polynomials of degree 7, fitted to a relative error
// of 3.3e-7. q keeps its digits where it is small, so that z reaches to 6.3.
template <class T>
FASTADV_FN T normal(uint32_t word) {
  const T q = (T(int32_t(word >> 1)) + T(0.5)) * T(1.0 / 4294967296.0);
  const T w = -log_(T(4) * q * (T(1) - q)), near = w - T(3), far = sqrt_(w > T(0) ? w : T(0)) - T(3.5);
  T p = T(4.76244099e-07), r = T(-0.000270750392);
  p = p * near + T(-2.78265038e-06), r = r * far + T(0.000782027805);
  p = p * near + T(-1.69058753e-05), r = r * far + T(-0.00102686316);
  p = p * near + T(0.00027713409), r = r * far + T(0.00144144364);
  p = p * near + T(-0.00118519707), r = r * far + T(-0.00289236312);
  p = p * near + T(-0.00811687838), r = r * far + T(0.00465632908);
  p = p * near + T(0.34171873), r = r * far + T(1.42463229);
  p = p * near + T(2.29603561), r = r * far + T(4.71708838);
  const T z = (T(1) - T(2) * q) * (w < T(6) ? p : r);
  return word & 1 ? -z : z;
}

// adv <- x + std z
template <class T>
struct NormalStart {
  T std;
  FASTADV_FN T operator()(uint32_t word, T x) const { return x + std * normal<T>(word); }
};

// The shortest move d of a point x with <w, d> = gap, inside the box [lo, hi] (Croce and Hein, 2020): each element moves
// towards the plane by a distance that is one function of its pull |w| and of its room, the distance to the wall ahead.
template <class T>
struct Hyperplane {
  T side, lo, hi;  // the sign of the gap

  static FASTADV_FN Hyperplane to(double gap, double lo, double hi) {
    return {gap - gap == 0.0 ? T(sign(gap)) : T(0), T(lo), T(hi)};  // a gap that is not finite moves nothing
  }
  FASTADV_FN T ahead(T w) const { return w - w == T(0) ? sign(w) * side : T(0); }  // nor does such a w
  FASTADV_FN T pull(T w) const { return ahead(w) == T(0) ? T(0) : w < T(0) ? -w : w; }
  FASTADV_FN T room(T w, T x) const {
    const T up = x < hi ? hi - x : T(0), down = x > lo ? x - lo : T(0);
    return ahead(w) > T(0) ? up : ahead(w) < T(0) ? down : T(0);
  }
};

// In linf and l2 that distance is min(t speed, room), with speed 1 or |w|, for the one t at which <|w|, distance> = |gap|.
template <class T, bool kLinf>
struct HyperplaneStretch {
  double t;
  static FASTADV_FN double speed(T pull) { return kLinf ? 1.0 : double(pull); }
  FASTADV_FN bool at_wall(T pull, T room) const { return !(double(room) > t * speed(pull)); }  // so is what 0 * inf says
  FASTADV_FN T operator()(T pull, T room) const { return at_wall(pull, room) ? room : T(t * speed(pull)); }
};

// What the elements at their wall give to the product, and what the others give for each unit of t.
struct HyperplaneReach {
  double full, slope;
};

FASTADV_FN HyperplaneReach operator+(const HyperplaneReach& a, const HyperplaneReach& b) {
  return {a.full + b.full, a.slope + b.slope};
}

// The product rises in t less and less, so Newton's steps from 0 never pass the root, and they end on its own linear piece:
// a handful of passes over a row in cache, where sorting it would take a hundred. Infinite where every element is at its wall.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class ReachAt>
FASTADV_FN double hyperplane_stretch(double far, const ReachAt& reach_at) {
  double t = 0.0;
  for (int pass = 0; pass < 128; ++pass) {
    const HyperplaneReach at = reach_at(t);
    if (!(at.slope > 0.0)) return HUGE_VAL;
    const double next = (far - at.full) / at.slope;
    if (!(next > t)) break;
    t = next;
  }
  return t;
}

// In l1 the elements of the largest |w| go to their wall, those of |w| = threshold a fraction of their way, the others nowhere.
template <class T>
struct HyperplaneFill {
  T threshold;
  double fraction, far;
  // One element alone need not go farther than |gap| / |w|: with this even unbounded elements have an end.
  FASTADV_FN double gain(T pull, T room) const { return smaller(double(pull) * double(room), far); }
  FASTADV_FN T operator()(T pull, T room) const {
    const double partly = pull > T(0) ? fraction * smaller(double(room), far / double(pull)) : 0.0;
    return pull > threshold ? room : pull == threshold ? T(partly) : T(0);
  }
};

// What the elements with pull >= threshold gain together, the least of their pulls and the largest of the others'.
template <class T>
struct HyperplaneTotal {
  double gain;
  T least, below;
};

// The largest threshold at which the elements with |w| >= threshold reach the plane, by bisection over the bits of a number,
// which order positive numbers; each end moves on to the next |w| that there is.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class T, class Bits, class TotalAt>
FASTADV_FN HyperplaneFill<T> hyperplane_fill(double far, T largest, const TotalAt& total_at) {
  Bits low = 1, high = bit_cast<Bits>(largest) + 1;  // all elements that have a pull; none
  double reached = total_at(bit_cast<T>(low)).gain, above = 0.0;
  if (reached < far) return {T(0), 0.0, far};  // to the walls
  while (high - low > 1) {
    const HyperplaneTotal<T> at = total_at(bit_cast<T>(low + (high - low) / 2));
    if (at.gain < far) {
      high = bit_cast<Bits>(at.below) + 1;
      above = at.gain;
    } else {
      low = bit_cast<Bits>(at.least);
      reached = at.gain;
    }
  }
  return {bit_cast<T>(low), (far - above) / (reached - above), far};
}

// ---------------------------------------------------------------------------------------------------------- loss family
// z: logits of one row, shifted so that their maximum is 0; e = exp(z), sum = sum_k e_k; p = e / sum.

// Cross-entropy of label y: log(sum) - z_y, gradient p - 1_y. With soft targets t (tt = sum_k t_k): log(sum) tt - <t,z>,
// gradient tt p - t.
template <class T>
struct CrossEntropy {
  T inverse_sum, target_mass;
  FASTADV_FN T operator()(T e, T target) const { return e * inverse_sum * target_mass - target; }
};

// Kullback-Leibler divergence KL(p || q) of row softmaxes, from shifted logits: log p = z_p - log(sum_p). A class whose
// probability has underflowed to 0 contributes 0, never 0 * inf; NaN stays NaN. Subtracting logits first rounds least.
template <class T>
struct KullbackLeibler {
  T inverse_sum_p, inverse_sum_q, log_sum_ratio;  // log(sum_p) - log(sum_q)
  FASTADV_FN T log_ratio(T z_p, T z_q) const { return (z_p - z_q) - log_sum_ratio; }
  FASTADV_FN T term(T e_p, T z_p, T z_q) const { return e_p == T(0) ? T(0) : e_p * inverse_sum_p * log_ratio(z_p, z_q); }
  FASTADV_FN T grad_q(T e_p, T e_q) const { return e_q * inverse_sum_q - e_p * inverse_sum_p; }
  FASTADV_FN T grad_p(T e_p, T z_p, T z_q, T kl) const {
    return e_p == T(0) ? T(0) : e_p * inverse_sum_p * (log_ratio(z_p, z_q) - kl);
  }
};

// Squared error |q - p|^2 of row softmaxes. With a = q - p: d/dz_q = 2 q (a - <q,a>), d/dz_p = -2 p (a - <p,a>).
template <class T>
struct SquaredError {
  T inverse_sum_p, inverse_sum_q;
  FASTADV_FN T p(T e_p) const { return e_p * inverse_sum_p; }
  FASTADV_FN T q(T e_q) const { return e_q * inverse_sum_q; }
  FASTADV_FN T gap(T e_p, T e_q) const { return q(e_q) - p(e_p); }
  FASTADV_FN T grad_q(T e_p, T e_q, T q_gap) const { return T(2) * q(e_q) * (gap(e_p, e_q) - q_gap); }
  FASTADV_FN T grad_p(T e_p, T e_q, T p_gap) const { return T(-2) * p(e_p) * (gap(e_p, e_q) - p_gap); }
};

// Difference of logits ratio: rise / (spread + 1e-12), rise = z_rival - z_y and spread a difference of the largest logits.
template <class T>
struct LogitsRatio {
  T rise, gap;
  FASTADV_FN LogitsRatio(T rise, T spread) : rise(rise), gap(spread + T(1e-12)) {}
  FASTADV_FN T value() const { return divide(rise, gap); }
  FASTADV_FN T grad_rise() const { return divide(T(1), gap); }
  FASTADV_FN T grad_spread() const { return divide(-value(), gap); }
};

}  // namespace fastadv
