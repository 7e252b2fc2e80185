// What a score is, in each of the forms that a layer may have it in; and bounds on it, in that form.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "gossamer.h"
#include "sweep.h"

namespace gossamer {

constexpr double INF = std::numeric_limits<double>::infinity(), NO_NUMBER = std::numeric_limits<double>::quiet_NaN();

enum Kind : int32_t { FLOAT16, BFLOAT16, FLOAT32, FLOAT64, SCORES32, SCORES64, N_KINDS };

constexpr Scores LOOP[] = {MAGNITUDE_HALF, MAGNITUDE_HALF, MAGNITUDE_FLOAT, MAGNITUDE_DOUBLE, GIVEN_FLOAT, GIVEN_DOUBLE};
constexpr int32_t SIZE[] = {2, 2, 4, 8, 4, 8};
// The least bits of a magnitude that is no finite number; of scores that are given nothing is known.
constexpr int64_t INFINITE[] = {0x7c00, 0x7f80, 0x7f800000, 0x7ff0000000000000, 1, 1};

template <class To, class From>
To as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Magnitudes from their bits.
inline double from_float16(int64_t bits) {
  const int exponent = int(bits >> 10 & 31), fraction = int(bits & 1023);
  if (exponent == 31) return fraction ? NO_NUMBER : INF;
  return std::ldexp(exponent ? fraction | 1024 : fraction, (exponent ? exponent : 1) - 25);
}
inline double from_bfloat16(int64_t bits) { return as<float>(int32_t(bits) << 16); }
inline double from_float32(int64_t bits) { return as<float>(int32_t(bits)); }
inline double from_float64(int64_t bits) { return as<double>(bits); }

// Calls use(read), where read(i) is the score of element i.
template <class F>
void with_scores(const GossamerSweep& s, F use) {
  const auto* half = static_cast<const int16_t*>(s.scores);
  const auto* single = static_cast<const float*>(s.scores);
  const auto* wide = static_cast<const double*>(s.scores);
  switch (s.kind) {
    case FLOAT16: return use([=](int64_t i) { return from_float16(half[i] & 0x7fff); });
    case BFLOAT16: return use([=](int64_t i) { return from_bfloat16(half[i] & 0x7fff); });
    case FLOAT32: return use([=](int64_t i) { return double(std::fabs(single[i])); });
    case FLOAT64: return use([=](int64_t i) { return std::fabs(wide[i]); });
    case SCORES32: return use([=](int64_t i) { return double(single[i]); });
    default: return use([=](int64_t i) { return wide[i]; });
  }
}

// Doubles order like these, and -0 is 0.
inline int64_t key_of(double x) {
  const int64_t bits = as<int64_t>(x + 0.0);
  return bits < 0 ? bits ^ std::numeric_limits<int64_t>::max() : bits;
}
inline double from_key(int64_t key) { return as<double>(key < 0 ? key ^ std::numeric_limits<int64_t>::max() : key); }

// Of what is at most a number, in the layer's own dtype.
Bound up_to(int32_t kind, double end);
// Of what is below a number.
Bound before(int32_t kind, double end);

}  // namespace gossamer
