// Vectors of 16 lanes in GCC's and Clang's portable vector types: one source for every instruction
// set, which the compiler lowers to one AVX-512 register, two AVX2 registers or plain SSE2.
//
// This header is compiled several times, once per value of DELTA_ISA, and everything lives in that
// namespace, so that no function compiled for a newer processor is ever linked into older code.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "problem.h"

namespace vllm_delta {
namespace DELTA_ISA {

#define DELTA_INLINE static inline __attribute__((always_inline))

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

DELTA_INLINE f32x16 broadcast(float x) {
  return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

DELTA_INLINE i32x16 lane_index() {
  return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

DELTA_INLINE f32x16 as_float(u32x16 bits) { return (f32x16)bits; }

template <typename V>
DELTA_INLINE V load_raw(const void* source) {
  V value;
  std::memcpy(&value, source, sizeof(V));
  return value;
}

DELTA_INLINE f32x16 bf16_to_f32(u16x16 bits) {
  return as_float(__builtin_convertvector(bits, u32x16) << 16);
}

DELTA_INLINE f32x16 f16_to_f32(u16x16 bits) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
  alignas(64) uint16_t in[16];
  std::memcpy(in, &bits, sizeof(in));
  f32x16 out;
  const __m256 low = _mm256_cvtph_ps(_mm_load_si128((const __m128i*)in));
  const __m256 high = _mm256_cvtph_ps(_mm_load_si128((const __m128i*)(in + 8)));
  std::memcpy(&out, &low, 32);
  std::memcpy((char*)&out + 32, &high, 32);
  return out;
#else
  // Exponent re-biased by a multiplication, which also handles subnormal numbers; infinities and
  // NaN (exponent 31) get the exponent 255.
  const u32x16 wide = __builtin_convertvector(bits, u32x16);
  const u32x16 magnitude = (wide & 0x7fff) << 13;
  const f32x16 scaled = as_float(magnitude) * as_float(u32x16{} + (254u - 15u) * (1u << 23));
  const u32x16 special = magnitude | (255u << 23);
  const u32x16 value = (magnitude >= (31u << 23)) ? special : (u32x16)scaled;
  return as_float(value | ((wide & 0x8000) << 16));
#endif
}

DELTA_INLINE f32x16 load16(const float* source) { return load_raw<f32x16>(source); }
DELTA_INLINE f32x16 load16(const BFloat16* source) { return bf16_to_f32(load_raw<u16x16>(source)); }
DELTA_INLINE f32x16 load16(const Float16* source) { return f16_to_f32(load_raw<u16x16>(source)); }

DELTA_INLINE void store16(float* target, f32x16 value) { std::memcpy(target, &value, 64); }

// 16 pairs of neighbours: `even` gets elements 0, 2, ..., `odd` elements 1, 3, ...
DELTA_INLINE void load16_pairs(const BFloat16* source, f32x16& even, f32x16& odd) {
  const u32x16 pairs = load_raw<u32x16>(source);
  even = as_float(pairs << 16);
  odd = as_float(pairs & 0xffff0000u);
}
DELTA_INLINE void load16_pairs(const Float16* source, f32x16& even, f32x16& odd) {
  const u32x16 pairs = load_raw<u32x16>(source);
  even = f16_to_f32(__builtin_convertvector(pairs & 0xffffu, u16x16));
  odd = f16_to_f32(__builtin_convertvector(pairs >> 16, u16x16));
}

// Scalar conversions for queries and outputs, with rounding to the nearest even number.
DELTA_INLINE float to_float(float x) { return x; }
DELTA_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  return load_raw<float>(&bits);
}
DELTA_INLINE float to_float(Float16 x) {
  u16x16 bits = {};
  bits[0] = x.bits;
  return f16_to_f32(bits)[0];
}
DELTA_INLINE void from_float(float x, float& out) { out = x; }
DELTA_INLINE void from_float(float x, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = static_cast<uint16_t>((bits >> 16) | 0x40);  // a quiet NaN stays one
  } else {
    out.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}
DELTA_INLINE void from_float(float x, Float16& out) {
#if defined(__F16C__)
  out.bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) {
    out.bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (bits >= 0x477ff000u) {  // rounds to 65520 or more: infinity
    out.bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (bits < 0x38800000u) {  // subnormal: let the adder round at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &magnitude, 4);
    out.bits = static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  } else {
    const uint32_t odd = (bits >> 13) & 1u;
    out.bits = static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + odd) >> 13));
  }
#endif
}

DELTA_INLINE f32x16 maximum(f32x16 a, f32x16 b) { return a > b ? a : b; }

// Fixed trees: the order of the additions does not depend on where in a sequence the lanes come
// from.
DELTA_INLINE float reduce_add(f32x16 x) {
  float lanes[16];
  std::memcpy(lanes, &x, 64);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}
DELTA_INLINE float reduce_max(f32x16 x) {
  float lanes[16];
  std::memcpy(lanes, &x, 64);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i)
      lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  }
  return lanes[0];
}

// e^x for x <= 88, within 2 units in the last place; 0 below -87 (-inf included), NaN stays NaN.
// Range reduction x = n ln 2 + r with |r| <= ln 2 / 2, then a polynomial of degree 7 in r (Taylor
// coefficients; the first term left out is below 2^-27 of the result).
DELTA_INLINE f32x16 exponential(f32x16 x) {
  const f32x16 rounding = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32x16 floor_value = broadcast(-87.0f);
  const f32x16 clamped = x < floor_value ? floor_value : x;
  const f32x16 shifted = clamped * 1.44269504088896341f + rounding;
  const f32x16 n = shifted - rounding;
  const f32x16 r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  f32x16 y = r * (1.0f / 5040.0f) + (1.0f / 720.0f);
  y = y * r + (1.0f / 120.0f);
  y = y * r + (1.0f / 24.0f);
  y = y * r + (1.0f / 6.0f);
  y = y * r + 0.5f;
  y = y * (r * r) + r + 1.0f;
  const i32x16 exponent = ((i32x16)shifted - (i32x16)rounding) << 23;
  const f32x16 result = (f32x16)((i32x16)y + exponent);
  const f32x16 defined = x == x ? result : x;
  return x < floor_value ? broadcast(0.0f) : defined;
}

// tanh x: a Taylor polynomial near 0, where the quotient would cancel, else (e^2x - 1) / (e^2x +
// 1).
DELTA_INLINE f32x16 hyperbolic_tangent(f32x16 x) {
  const f32x16 limit = broadcast(10.0f);
  f32x16 bounded = x > limit ? limit : x;
  bounded = bounded < -limit ? -limit : bounded;
  const f32x16 e = exponential(bounded + bounded);
  const f32x16 quotient = (e - 1.0f) / (e + 1.0f);
  const f32x16 s = x * x;
  const f32x16 series =
      x * (1.0f + s * (-1.0f / 3.0f + s * (2.0f / 15.0f + s * (-17.0f / 315.0f))));
  return s < broadcast(0.01f) ? series : quotient;
}

}  // namespace DELTA_ISA
}  // namespace vllm_delta
