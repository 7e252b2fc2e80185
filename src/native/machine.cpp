// Which kernels this machine runs, and what its cache and vectors are worth.
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <string>

#include "isa.h"
#include "plan.h"

namespace gossamer {
namespace {

#if defined(__APPLE__)
// Of the fast cores, where there are two kinds; of the second level, each core's share.
int64_t told(const char* name) {
  int64_t value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) ? 0 : value;
}
int64_t told_cache(int level) {
  if (level == 1) return std::max(told("hw.perflevel0.l1dcachesize"), told("hw.l1dcachesize"));
  const int64_t fast = told("hw.perflevel0.l2cachesize") / std::max<int64_t>(1, told("hw.perflevel0.cpusperl2"));
  return fast ? fast : told("hw.l2cachesize");
}
#else
int64_t told_cache(int level) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const int64_t size = int64_t(sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : _SC_LEVEL2_CACHE_SIZE));
  if (size > 0) return size;
#endif
  // Where the C library does not know, as on arm64, Linux does.
  for (int i = 0; i < 8; i++) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
    std::string type, unit;
    int found = 0;
    int64_t size = 0;
    std::ifstream(folder + "level") >> found;
    std::ifstream(folder + "type") >> type;
    std::ifstream(folder + "size") >> size >> unit;
    if (found == level && type != "Instruction") return size * (unit == "K" ? 1 << 10 : unit == "M" ? 1 << 20 : 1);
  }
  return 0;
}
#endif

int64_t cache_size(int level, int64_t least, int64_t most, int64_t unknown) {
  const int64_t size = told_cache(level);
  return size <= 0 ? unknown : std::min(std::max(size, least), most);
}

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

// Seconds that the vectors of two tables take to multiply as many floats, each the least of many turns: whatever disturbs only
// adds. Widest vectors are slow at first, until the processor has the power for them, and are not counted until then.
std::array<double, 2> times_of(const Kernels& wide, const Kernels& narrow, const float* x, int64_t floats) {
  using Clock = std::chrono::steady_clock;
  const auto begun = Clock::now();
  float result[32] = {1e-9f};
  while (Clock::now() - begun < std::chrono::microseconds(100)) wide.multiply(x, floats / wide.lanes, result);
  std::array<double, 2> best{1e300, 1e300};
  for (int turn = 0; turn < 64; turn++) {
    const Kernels& kernels = turn % 2 ? narrow : wide;
    const auto began = Clock::now();
    for (int i = 0; i < 16; i++) kernels.multiply(x, floats / kernels.lanes, result);
    best[turn % 2] = std::min(best[turn % 2], std::chrono::duration<double>(Clock::now() - began).count());
  }
  return best;
}

Machine look() {
  Machine m;
  // Most of it, since weights pass through as well.
  m.l1 = cache_size(1, 16 << 10, 128 << 10, 32 << 10) * 7 / 8;
  m.l2 = cache_size(2, 256 << 10, 16 << 20, 1 << 20);
  for (int32_t i = 0; i < isas().n; i++) m.kernels.push_back(kernels_of(isas().best_first[i]));
  m.costs.assign(m.kernels.size(), 1.0);
  // Some processors multiply their widest vectors in two halves. Then they gain nothing, and waste more at every edge.
  if (m.kernels.size() > 1 && m.kernels[0]->lanes == 16) {
    constexpr int64_t N = 4096;
    void* data = nullptr;
    if (!posix_memalign(&data, 64, N * sizeof(float))) {
      float* x = static_cast<float*>(data);
      std::fill(x, x + N, 1.0f);
      const auto [wide, narrow] = times_of(*m.kernels[0], *m.kernels[1], x, N);
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
