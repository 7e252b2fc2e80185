// Which kernels this machine runs, and what its cache and vectors are worth.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "isa.h"
#include "plan.h"

namespace gossamer {
namespace {

int64_t cache_size(int name, int64_t least, int64_t most, int64_t unknown) {
  const int64_t size = name < 0 ? 0 : int64_t(sysconf(name));
  return size <= 0 ? unknown : std::min(std::max(size, least), most);
}
#if defined(_SC_LEVEL1_DCACHE_SIZE)
constexpr int LEVEL1 = _SC_LEVEL1_DCACHE_SIZE, LEVEL2 = _SC_LEVEL2_CACHE_SIZE;
#else
constexpr int LEVEL1 = -1, LEVEL2 = -1;
#endif

const Kernels* kernels_of(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::AVX512: return &avx512::kernels;
    case Isa::AVX512_256: return &avx512_256::kernels;
    case Isa::AVX2: return &avx2::kernels;
    case Isa::BASELINE: break;
  }
#endif
  (void)isa;
  return &baseline::kernels;
}

// Nanoseconds of a float, the least of several: whatever disturbs only adds.
double time_of(const Kernels& kernels, const float* x, int64_t floats) {
  double best = 1e300;
  float result[32] = {1e-9f};
  for (int round = 0; round < 9; round++) {
    const auto began = std::chrono::steady_clock::now();
    for (int i = 0; i < 8; i++) kernels.multiply(x, floats / kernels.lanes, result);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  }
  return best;
}

Machine look() {
  Machine m;
  // Most of it, since weights pass through as well.
  m.l1 = cache_size(LEVEL1, 16 << 10, 128 << 10, 32 << 10) * 7 / 8;
  m.l2 = cache_size(LEVEL2, 256 << 10, 16 << 20, 1 << 20);
  for (int32_t i = 0; i < isas().n; i++) m.kernels.push_back(kernels_of(isas().best_first[i]));
  m.costs.assign(m.kernels.size(), 1.0);
  // Some processors multiply their widest vectors in two halves. Then they gain nothing, and waste more at every edge.
  if (m.kernels.size() > 1 && m.kernels[0]->lanes == 16) {
    constexpr int64_t N = 4096;
    void* data = nullptr;
    if (!posix_memalign(&data, 64, N * sizeof(float))) {
      float* x = static_cast<float*>(data);
      std::fill(x, x + N, 1.0f);
      const double wide = time_of(*m.kernels[0], x, N), narrow = time_of(*m.kernels[1], x, N);
      if (wide > 0.8 * narrow) m.costs[0] = 2.0;
      std::free(data);
    }
  }
  return m;
}

}  // namespace

const Machine& machine() {
  static const Machine m = look();
  return m;
}

}  // namespace gossamer

int64_t gossamer_cache() { return gossamer::machine().l2; }
