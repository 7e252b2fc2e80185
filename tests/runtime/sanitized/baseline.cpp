// A machine that has the baseline only, so that the other instruction sets need not be compiled.
#include "plan.h"

namespace gossamer {
const Machine& machine() {
  static const Machine m{28 << 10, 1 << 20, {&baseline::kernels}, {1.0}};
  return m;
}
}  // namespace gossamer

int64_t gossamer_cache() { return gossamer::machine().l2; }
