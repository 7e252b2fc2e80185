// The instruction sets that something is compiled for, and which of them this machine can run. Whatever is compiled once for
// each goes by this list, so that a number means the same everywhere.
#pragma once
#include <cstdint>

namespace gossamer {

enum class Isa : int32_t { AVX512, AVX512_256, AVX2, BASELINE };  // best first; see CMakeLists.txt

struct Isas {
  Isa best_first[4];
  int32_t n;
};
const Isas& isas();

}  // namespace gossamer
