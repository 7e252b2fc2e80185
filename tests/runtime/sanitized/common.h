// What the sanitized programs share: random numbers, buffers that end where tensors end, and a comparison. No PyTorch: its
// own libraries are not sanitized.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "gossamer.h"

inline std::mt19937 r(0);
inline int in(int a, int b) { return a + int(r() % unsigned(b - a + 1)); }
inline float real() { return float(r() % 2001) / 1000 - 1; }
inline float* aligned(int64_t floats) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, size_t(std::max<int64_t>(1, floats)) * 4)) std::abort();
  float* x = static_cast<float*>(data);
  for (int64_t i = 0; i < floats; i++) x[i] = real();
  return x;
}
inline void near(float got, double want, const char* what) {
  if (!(std::abs(got - want) <= 1e-4 * std::max(1.0, std::abs(want)))) {
    std::printf("%s: %g and not %g\n", what, got, want);
    std::exit(1);
  }
}
