// What the files of one instruction set give to its table in planes.cpp.
#pragma once
#include "vectors.h"

namespace gossamer {
namespace GOSSAMER_ISA {

#if defined(__AVX512VL__) || defined(__aarch64__)
constexpr int LONGEST = 28;  // vectors a tile: of 32 registers
#else
constexpr int LONGEST = 14;  // of 16
#endif

// The first n sums of a vector, n <= L, with what follows them. `more` is the residual's place, or null.
template <int KIND>
INLINE void finish(const Writer& w, float* to, const float* more, V v, int32_t n) {
  const V rest = !more ? V{} : n == L ? load(more) : load_few(more, n);
  if (more && !w.add_last) v += rest;
  v = activated<KIND>(v);
  if (more && w.add_last) v += rest;
  n == L ? store(to, v) : store_few(to, v, n);
}

void rows(int32_t vectors, const Rows& a);
void copy(const Copy& c);

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
