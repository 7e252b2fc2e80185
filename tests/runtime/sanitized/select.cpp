// Selection on any bytes: exact, and inside.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>
#include "gossamer.h"
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
    for (int l = 0; l < n_layers; l++) {
      const int kind = in(0, 5), size = in(0, 9) ? in(0, 300) : in(30000, 70000), width = 1 << in(0, 3);
      scores[l].resize(size_t(size) * sizes[kind]);
      for (auto& b : scores[l]) b = uint8_t(r());
      keep[l].resize(size);
      for (auto& k : keep[l]) k = in(0, 2) > 0;
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
    gossamer_drop(&group, 1, in(1, 3), isa);
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
    if (gossamer_isa(isa) && group.failed != 0 && group.failed != 3) return std::printf("failed\n"), 1;
    gossamer_zero(&layers[0], in(1, 3), 0);
  }
  while (gossamer_isa(n_isas)) n_isas++;
  std::printf("%d selections, %d instruction sets\n", n, n_isas);
}
