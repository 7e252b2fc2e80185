// A vector of floats in the compiler's extensions, and what is computed on it. Compiled once per instruction set, in a
// namespace of its own; no std header here, nor in what includes it (see kernels.h).
#pragma once
#include "kernels.h"

#ifndef GOSSAMER_ISA
#error "compile with -DGOSSAMER_ISA=… and -DGOSSAMER_LANES=…"
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

constexpr int L = GOSSAMER_LANES;

typedef float V __attribute__((vector_size(L * 4)));
typedef float U __attribute__((vector_size(L * 4), aligned(4)));
typedef int32_t I __attribute__((vector_size(L * 4)));

INLINE V load(const float* p) { return *reinterpret_cast<const U*>(p); }
INLINE void store(float* p, V v) { *reinterpret_cast<U*>(p) = v; }
INLINE V all(float x) { return x - V{}; }
INLINE V pick(I mask, V yes, V no) { return mask ? yes : no; }
// The larger and the smaller of each two, and b where one is nan or both are zero: as one instruction, which compilers do
// not see in a comparison and a choice.
INLINE V larger(V a, V b) {
#if GOSSAMER_LANES == 16
  return (V)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);  // gcc 12 takes the plain one for uninitialized
#elif GOSSAMER_LANES == 8
  return (V)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (V)_mm_max_ps((__m128)a, (__m128)b);
#else
  return pick(a > b, a, b);
#endif
}
INLINE V smaller(V a, V b) {
#if GOSSAMER_LANES == 16
  return (V)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif GOSSAMER_LANES == 8
  return (V)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (V)_mm_min_ps((__m128)a, (__m128)b);
#else
  return pick(a < b, a, b);
#endif
}
// As torch has it, nan stays nan.
INLINE V at_least(V v, float low) { return larger(all(low), v); }
INLINE V at_most(V v, float high) { return smaller(all(high), v); }

// The last of `before`, then all but the last of v.
INLINE V shifted(V before, V v) {
#if GOSSAMER_LANES == 16
  return __builtin_shufflevector(before, v, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30);
#elif GOSSAMER_LANES == 8
  return __builtin_shufflevector(before, v, 7, 8, 9, 10, 11, 12, 13, 14);
#else
  return __builtin_shufflevector(before, v, 3, 4, 5, 6);
#endif
}

// Of two vectors that follow each other.
INLINE V every_second(V a, V b) {
#if GOSSAMER_LANES == 16
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif GOSSAMER_LANES == 8
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6);
#endif
}
// Of 2L floats; there must be as many.
INLINE V every_second(const float* from) { return every_second(load(from), load(from + L)); }
// The others of them.
INLINE V other_seconds(const float* from) {
  const V a = load(from), b = load(from + L);
#if GOSSAMER_LANES == 16
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif GOSSAMER_LANES == 8
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

#if defined(__AVX512VL__)
// Those whose bit is set; the others are zero, and not touched.
INLINE V load_some(const float* p, uint32_t bits) {
#if GOSSAMER_LANES == 16
  return (V)_mm512_maskz_loadu_ps(__mmask16(bits), p);
#else
  return (V)_mm256_maskz_loadu_ps(__mmask8(bits), p);
#endif
}
INLINE void store_some(float* p, V v, uint32_t bits) {
#if GOSSAMER_LANES == 16
  _mm512_mask_storeu_ps(p, __mmask16(bits), (__m512)v);
#else
  _mm256_mask_storeu_ps(p, __mmask8(bits), (__m256)v);
#endif
}
#endif

// The first n floats, n <= L; the others are zero, and nothing behind them is touched.
INLINE V load_few(const float* p, int32_t n) {
#if defined(__AVX512VL__)
  return load_some(p, (1u << n) - 1);
#else
  float few[L] = {};
  for (int32_t i = 0; i < n; i++) few[i] = p[i];
  return load(few);
#endif
}
INLINE void store_few(float* p, V v, int32_t n) {
#if defined(__AVX512VL__)
  store_some(p, v, (1u << n) - 1);
#else
  typedef float Four __attribute__((vector_size(16), aligned(4)));
  typedef float Two __attribute__((vector_size(8), aligned(4)));
  if (n == L) return store(p, v);
  float few[L];
  const float* from = few;
  store(few, v);
  if (L > 4 && n & 4) {
    *reinterpret_cast<Four*>(p) = *reinterpret_cast<const Four*>(from);
    p += 4;
    from += 4;
  }
  if (n & 2) {
    *reinterpret_cast<Two*>(p) = *reinterpret_cast<const Two*>(from);
    p += 2;
    from += 2;
  }
  if (n & 1) *p = *from;
#endif
}

// e^x to a few units in the last place: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes).
INLINE V exponential(V x) {
  V y = at_most(at_least(x, -87.3f), 88.3f);
  V n = y * 1.44269504f + 12582912.0f;  // rounds to a whole number
  I whole = (I)n - 0x4B400000;
  n -= 12582912.0f;
  V r = y - n * 0.693359375f + n * 2.12194440e-4f;
  V p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  V result = (V)((I)p + (whole << 23));
  return pick(x != x, x, result);
}

// 1 / x for 1 <= x <= 1e36: a guess by the exponent, and three steps of Newton's, which take less than a division.
INLINE V inverse(V x) {
  V r = (V)(0x7EF311C7 - (I)x);
  r *= 2.0f - x * r;
  r *= 2.0f - x * r;
  return r * (2.0f - x * r);
}

INLINE V sigmoid(V x) { return inverse(1.0f + exponential(at_most(-x, 80.0f))); }

INLINE V tangent(V x) {  // tanh
  V e = exponential(2.0f * at_most(at_least(x, -10.0f), 10.0f));
  return pick(x != x, x, (e - 1.0f) / (e + 1.0f));  // exactly 1 far out
}

// x times the normal distribution's function, (x + x erf(x/√2)) / 2: to 7e-7, where PyTorch's own is off by 1.1e-6. erf
// is x times a polynomial in x², fitted to |x| < 5.4 for the least of the largest errors; beyond, it is 1 to 1e-7.
INLINE V gelu(V x) {
  constexpr float END = 5.4f * 5.4f;
  const V t = at_most(x * x, END) * (2.0f / END) - 1.0f, half = 0.5f * x;
  V p = all(6.38364058e-4f);
  p = p * t - 1.93349645e-3f;
  p = p * t + 2.1824385e-3f;
  p = p * t - 2.72251735e-3f;
  p = p * t + 6.82884734e-3f;
  p = p * t - 1.30534749e-2f;
  p = p * t + 1.95697434e-2f;
  p = p * t - 2.81192828e-2f;
  p = p * t + 3.92176323e-2f;
  p = p * t - 5.14458604e-2f;
  p = p * t + 6.42421916e-2f;
  p = p * t - 7.8418456e-2f;
  p = p * t + 9.69987884e-2f;
  p = p * t - 0.130655974f;
  p = p * t + 0.261856228f;
  return half + half * at_most(at_least(x * p, -1.0f), 1.0f);
}

template <int KIND>
INLINE V activated(V v) {
  switch (KIND) {
    case RELU: return at_least(v, 0.0f);
    case RELU6: return at_most(at_least(v, 0.0f), 6.0f);
    case SILU: return at_least(v, -100.0f) * sigmoid(v);  // 0 at minus infinity
    case GELU: return gelu(v);
    case GELU_TANH: return 0.5f * v * (1.0f + tangent(0.79788456f * (v + 0.044715f * v * v * v)));
    case HARDSWISH: return v * at_most(at_least(v + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
    case HARDSIGMOID: return at_most(at_least(v + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
    case SIGMOID: return sigmoid(v);
    default: return v;
  }
}

// Calls F<KIND>::of(arguments…) for an activation that is known when it runs.
template <template <int> class F, class... A>
INLINE void by_activation(int32_t kind, const A&... a) {
  switch (kind) {
    case NONE: return F<NONE>::of(a...);
    case RELU: return F<RELU>::of(a...);
    case RELU6: return F<RELU6>::of(a...);
    case SILU: return F<SILU>::of(a...);
    case GELU: return F<GELU>::of(a...);
    case GELU_TANH: return F<GELU_TANH>::of(a...);
    case HARDSWISH: return F<HARDSWISH>::of(a...);
    case HARDSIGMOID: return F<HARDSIGMOID>::of(a...);
    default: return F<SIGMOID>::of(a...);
  }
}

}  // namespace
}  // namespace GOSSAMER_ISA
}  // namespace gossamer
