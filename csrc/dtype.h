// Storage types and their arithmetic types: what lies in memory may be fp32, fp64, bf16 or fp16; what is computed is fp32
// (fp64 for fp64). The half formats are plain bit patterns converted by branch-free integer code, so loops over them
// vectorise on every compiler; on a GPU by its own instructions, which round the same (a NaN may differ in its bits).
#pragma once

#include <stdexcept>

#include "math.h"

namespace fastadv {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

FASTADV_FN constexpr int size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class S>
struct arithmetic {
  using type = S;
};
template <>
struct arithmetic<bf16> {
  using type = float;
};
template <>
struct arithmetic<f16> {
  using type = float;
};
template <class S>
using arithmetic_t = typename arithmetic<S>::type;

FASTADV_FN float load(float v) { return v; }
FASTADV_FN double load(double v) { return v; }

FASTADV_FN float load(bf16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }

// The exponent bias differs by 112: a multiplication by 2^112 re-biases normal and subnormal halves alike.
FASTADV_FN float load(f16 v) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
#else
  const uint32_t magnitude = uint32_t(v.bits & 0x7fff) << 13;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 5.192296858534828e33f);
  const uint32_t infinite_or_nan = magnitude | 0x7f800000;
  return bit_cast<float>(((v.bits & 0x7c00) == 0x7c00 ? infinite_or_nan : finite) | uint32_t(v.bits & 0x8000) << 16);
#endif
}

FASTADV_FN void store(float& to, float v) { to = v; }
FASTADV_FN void store(double& to, double v) { to = v; }

// Round to nearest, ties to even; every NaN becomes the quiet one that torch writes.
FASTADV_FN void store(bf16& to, float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(v));
#else
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t(v == v ? rounded : 0x7fc0);
#endif
}

FASTADV_FN void store(f16& to, float v) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(v));
#else
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t magnitude = bits & 0x7fffffff;
  // Subnormal halves: adding 0.5 shifts the mantissa so that the addition itself rounds to the half's last place.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t overflow = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t half = magnitude >= 0x47800000 ? overflow : magnitude < 0x38800000 ? subnormal : normal;
  to.bits = uint16_t(half | (bits >> 16 & 0x8000));
#endif
}

// Calls f with a value of the storage type that `dtype` names.
template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float());
    case DType::f64: return f(double());
    case DType::bf16: return f(bf16());
    case DType::f16: return f(f16());
  }
  throw std::invalid_argument("unknown storage type");
}

// The same for an image and its gradient, of the pairs that kernels are built for.
template <class F>
void dispatch(DType image, DType gradient, const F& f) {
  if (image == gradient) return dispatch(image, [&](auto s) { f(s, s); });
  if (image == DType::f32 && gradient == DType::bf16) return f(float(), bf16());
  if (image == DType::f32 && gradient == DType::f16) return f(float(), f16());
  if (image == DType::bf16 && gradient == DType::f32) return f(bf16(), float());
  if (image == DType::f16 && gradient == DType::f32) return f(f16(), float());
  throw std::invalid_argument("unsupported pair of storage types");
}

}  // namespace fastadv
