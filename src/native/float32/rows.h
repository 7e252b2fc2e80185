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

void rows(int32_t vectors, const Rows& a);
void copy(const Copy& c);

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
