// Which instruction sets this machine can run.
#include "isa.h"

#include "gossamer.h"

namespace gossamer {
namespace {

Isas look() {
  Isas found{};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq")) {
    found.best_first[found.n++] = Isa::AVX512;
    found.best_first[found.n++] = Isa::AVX512_256;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.best_first[found.n++] = Isa::AVX2;
#endif
  found.best_first[found.n++] = Isa::BASELINE;
  return found;
}

}  // namespace

const Isas& isas() {
  static const Isas found = look();
  return found;
}

}  // namespace gossamer

const char* gossamer_isa(int32_t i) {
  static constexpr const char* NAMES[] = {"avx512", "avx512_256", "avx2", "baseline"};
  const auto& found = gossamer::isas();
  return i >= 0 && i < found.n ? NAMES[int32_t(found.best_first[i])] : nullptr;
}
