// Selection on any bytes: exact, and inside.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>
#include "gossamer.h"
static bool is_finite(const std::vector<uint8_t>& bytes, size_t i, int kind) {
  const int size = kind == 2 ? 4 : kind == 3 ? 8 : 2;
  const uint64_t exponents[] = {0x7c00, 0x7f80, 0x7f800000, 0x7ff0000000000000};
  uint64_t bits = 0;
  std::memcpy(&bits, bytes.data() + i * size, size);
  return (bits & exponents[kind]) != exponents[kind];
}
int main() {
  std::mt19937 r(0);
  auto in = [&](int a, int b) { return a + int(r() % unsigned(b - a + 1)); };
  const double odd[] = {0, -0.0, INFINITY, -INFINITY, NAN, 1e-45, -1, 1e39, -1e39};
  const int32_t sizes[] = {2, 2, 4, 8, 4, 8};
  int n_isas = 0, n = 0;
  for (; n < 600; n++) {
    const int n_layers = in(1, 3), isa = n % 4;
    std::vector<std::vector<uint8_t>> scores(n_layers), keep(n_layers), other(n_layers);
    std::vector<std::vector<void*>> tensors(n_layers);
    std::vector<std::vector<int32_t>> widths(n_layers);
    std::vector<GossamerSweep> layers(n_layers);
    int64_t kept = 0;
    const bool whole = in(0, 1), is_tame = in(0, 1);
    bool all_finite = true;
    for (int l = 0; l < n_layers; l++) {
      const int kind = in(0, 5), size = in(0, 9) ? in(0, 300) : in(30000, 70000), width = 1 << in(0, 3);
      scores[l].resize(size_t(size) * sizes[kind]);
      for (auto& b : scores[l]) b = uint8_t(r());
      keep[l].resize(size);
      for (auto& k : keep[l]) k = in(0, 2) > 0;
      for (size_t i = 0; kind < 4 && i < keep[l].size(); i++) {
        if (is_tame && !is_finite(scores[l], i, kind)) std::memset(&scores[l][i * sizes[kind]], 1, sizes[kind]);
        if (keep[l][i] && !is_finite(scores[l], i, kind)) all_finite = false;
      }
      other[l].resize(size_t(size) * width);
      tensors[l] = {scores[l].data(), other[l].data()};
      widths[l] = {sizes[kind], width};
      int64_t here = 0;
      for (uint8_t k : keep[l]) here += k;
      kept += here;
      layers[l] = {keep[l].data(), size, here, tensors[l].data(), widths[l].data(), 2, kind, scores[l].data(), 0};
    }
    const double hint = in(0, 1) ? odd[in(0, 8)] : double(in(-100, 100)) / 7;
    GossamerGroup group{layers.data(), n_layers, 1 + int64_t(r() % unsigned(kept + 1)), hint, 0, 0, 0, 0};
    gossamer_drop(&group, 1, in(1, 3), isa, whole);
    int64_t left = 0, masked = 0;
    for (int l = 0; l < n_layers; l++) {
      for (uint8_t k : keep[l]) left += k;
      masked += layers[l].n_masked;
      for (size_t i = 0; i < keep[l].size(); i++)
        for (int b = 0; b < widths[l][0]; b++)
          if (!keep[l][i] && group.failed == 0 && scores[l][i * widths[l][0] + b]) return std::printf("not zero\n"), 1;
    }
    if (group.failed == 0 && (kept - left != group.need || masked != group.need)) return std::printf("not exact\n"), 1;
    if (group.failed == 3 && kept != left) return std::printf("masks have changed\n"), 1;
    if (whole && !all_finite && !group.failed) return std::printf("not finite\n"), 1;
    if (gossamer_isa(isa) && is_tame && group.failed == 3 && all_finite && n_layers == 1 && layers[0].kind < 4 &&
        group.need <= kept)
      return std::printf("all finite\n"), 1;
    if (gossamer_isa(isa) && group.failed != 0 && group.failed != 3) return std::printf("failed\n"), 1;
    gossamer_zero(&layers[0], in(1, 3), 0);
  }
  while (gossamer_isa(n_isas)) n_isas++;
  std::printf("%d selections, %d instruction sets\n", n, n_isas);
}
