// Vectors of float32 of the width of one instruction set, on the compiler's vector extension (GCC and Clang).
//
// Included with LPA_WIDTH set to 4, 8 (AVX2, FMA, F16C) or 16 (AVX-512 F, BW, DQ, VL). Everything sits in an unnamed
// namespace and nothing comes from the C++ library: an inline function compiled for AVX-512 here must never be the
// copy that the linker keeps for the rest of the program.
#pragma once

#include <cstdint>

#if LPA_WIDTH > 4
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header
#endif
#include <immintrin.h>
#endif

#define LPA_INLINE inline __attribute__((always_inline))
#define LPA_LAMBDA __attribute__((always_inline))

namespace {

constexpr int64_t W = LPA_WIDTH;
typedef float VFloat __attribute__((vector_size(4 * LPA_WIDTH)));
typedef int32_t VInt __attribute__((vector_size(4 * LPA_WIDTH)));
typedef uint32_t VBits __attribute__((vector_size(4 * LPA_WIDTH)));
typedef uint16_t VHalf __attribute__((vector_size(2 * LPA_WIDTH)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

LPA_INLINE VFloat all(float x) { return x - VFloat{}; }
LPA_INLINE VBits bits(VFloat x) { return (VBits)x; }
LPA_INLINE VFloat floats(VBits x) { return (VFloat)x; }
LPA_INLINE VFloat absolute(VFloat x) { return floats(bits(x) & 0x7fffffffu); }

// The larger; b where either is NaN.
LPA_INLINE VFloat larger(VFloat a, VFloat b) {
#if LPA_WIDTH == 16
  return (VFloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif LPA_WIDTH == 8
  return (VFloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

LPA_INLINE VFloat square_root(VFloat x) {
#if LPA_WIDTH == 16
  return (VFloat)_mm512_sqrt_ps((__m512)x);
#elif LPA_WIDTH == 8
  return (VFloat)_mm256_sqrt_ps((__m256)x);
#else
  for (int64_t i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// 16 bits to 32 and back, for values below 2^16. (GCC 12 takes __builtin_convertvector apart in halves.)
LPA_INLINE VBits wide(VHalf x) {
#if LPA_WIDTH == 16
  return (VBits)_mm512_cvtepu16_epi32((__m256i)x);
#elif LPA_WIDTH == 8
  return (VBits)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, VBits);
#endif
}
LPA_INLINE VHalf narrow(VBits x) {
#if LPA_WIDTH == 16
  return (VHalf)_mm512_cvtepi32_epi16((__m512i)x);
#elif LPA_WIDTH == 8
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (VHalf)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(x, VHalf);
#endif
}

// Exact.
LPA_INLINE VFloat to_float(VFloat x, float) { return x; }
LPA_INLINE VFloat to_float(VHalf x, bfloat16) { return floats(wide(x) << 16); }
LPA_INLINE VFloat to_float(VHalf x, float16) {
#if LPA_WIDTH == 16
  return (VFloat)_mm512_cvtph_ps((__m256i)x);
#elif LPA_WIDTH == 8
  return (VFloat)_mm256_cvtph_ps((__m128i)x);
#else
  const VBits h = wide(x), magnitude = (h & 0x7fffu) << 13;
  const VFloat scaled = floats(magnitude) * 0x1p112f;  // moves the exponent's bias from 15 to 127; subnormals too
  const VBits special = floats(magnitude) >= all(0x1p-112f * 65536) ? VBits{} + 0x7f800000u : VBits{};
  return floats(bits(scaled) | special | (h & 0x8000u) << 16);
#endif
}

// Rounded to nearest, ties to even; NaN stays NaN.
LPA_INLINE VFloat from_float(VFloat x, float) { return x; }
LPA_INLINE VHalf from_float(VFloat x, bfloat16) {
  const VBits b = bits(x), rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  return narrow(x == x ? rounded : VBits{} + 0x7fc0u);
}
LPA_INLINE VHalf from_float(VFloat x, float16) {
#if LPA_WIDTH == 16
  return (VHalf)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif LPA_WIDTH == 8
  return (VHalf)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const VBits sign = (bits(x) >> 16) & 0x8000u;
  const VFloat a = absolute(x);
  // Normal results round on the bits; small ones in the addition of 2^-1, whose last place is half's smallest step.
  const VBits b = bits(a), normal = (b - 0x38000000u + 0xfffu + ((b >> 13) & 1u)) >> 13;
  const VBits small = bits(a + 0.5f) - 0x3f000000u;
  VBits out = a < all(0x1p-14f) ? small : normal;
  out = a >= all(65520.0f) ? VBits{} + 0x7c00u : out;
  out = a == a ? out : VBits{} + 0x7e00u;
  return narrow(out | sign);
#endif
}

template <class T>
struct Lanes {
  typedef VHalf type;
};
template <>
struct Lanes<float> {
  typedef VFloat type;
};

// W numbers from memory of any alignment; the first n of them, and 0 for the rest, where n < W.
template <class T>
LPA_INLINE VFloat load(const T* p, int64_t n) {
  typename Lanes<T>::type raw{};
  __builtin_memcpy(&raw, p, n == W ? sizeof raw : n * sizeof(T));
  return to_float(raw, T{});
}
template <class T>
LPA_INLINE void store(T* p, VFloat x, int64_t n) {
  const auto raw = from_float(x, T{});
  __builtin_memcpy(p, &raw, n == W ? sizeof raw : n * sizeof(T));
}

// x where lane < n, 0 elsewhere: for sums over the last, partial vector.
LPA_INLINE VFloat first(VFloat x, int64_t n) {
  if (n == W) return x;
  for (int64_t i = n; i < W; ++i) x[i] = 0;
  return x;
}

LPA_INLINE double sum(VFloat x) {
  double total = 0;
  for (int64_t i = 0; i < W; ++i) total += x[i];
  return total;
}
LPA_INLINE float largest(VFloat x) {
  float top = x[0];
  for (int64_t i = 1; i < W; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// body(i, n) for each vector of [0, size): n = W, and less at the end.
template <class Body>
LPA_INLINE void sweep(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + W <= size; i += W) body(i, W);
  if (i < size) body(i, size - i);
}

// exp(x) for x <= 0 within 1 ulp: 2^n * p(r) with |r| <= ln(2)/2. Exactly 0 below -87.7, NaN for NaN.
LPA_INLINE VFloat exp_negative(VFloat x) {
  constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer, found in the low bits
  x = larger(all(-88.0f), x);
  const VFloat shifted = x * 0x1.715476p0f + magic;
  const VFloat n = shifted - magic;
  const VFloat r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts, the first exact times n
  VFloat p = all(0x1.6a2256p-10f);  // minimax for (exp(r) - 1 - r) / r^2
  p = p * r + 0x1.123b02p-7f;
  p = p * r + 0x1.5558f8p-5f;
  p = p * r + 0x1.555490p-3f;
  p = p * r + 0x1.fffffcp-2f;
  const VFloat scale = floats((bits(shifted) + 127u) << 23);  // 2^n; 0 for n = -127
  return scale + scale * (p * r * r + r);
}

}  // namespace
