"""The compiled library under AddressSanitizer and UndefinedBehaviorSanitizer, over shapes drawn at random."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

_SOURCES = Path(__file__).parents[2] / "src" / "native"
_WIDE = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]
_FLAGS = {"baseline": (4, []), "avx2": (8, ["-mavx2", "-mfma"]), "avx512_256": (8, _WIDE), "avx512": (16, _WIDE)}

# Buffers end where tensors end, so that one float too far is found. No PyTorch: its own libraries are not sanitized.
_DRIVER = r"""
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <string>
#include <vector>
#include "gossamer.h"
extern "C" {
int64_t gossamer_count_bits(const uint8_t*, int64_t);
int64_t gossamer_count_gaps(const uint8_t*, int64_t, int64_t*);
int32_t gossamer_expand_bits(const uint8_t*, int64_t, const void*, int64_t, void*, int32_t);
int32_t gossamer_expand_gaps(const uint8_t*, int64_t, int64_t, const void*, void*, int32_t);
}
std::mt19937 r(0);
int in(int a, int b) { return a + int(r() % unsigned(b - a + 1)); }
float real() { return float(r() % 2001) / 1000 - 1; }
float* aligned(int64_t floats) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, size_t(std::max<int64_t>(1, floats)) * 4)) std::abort();
  float* x = static_cast<float*>(data);
  for (int64_t i = 0; i < floats; i++) x[i] = real();
  return x;
}

// A tensor in a buffer of its own: as PyTorch has it, by tokens, or planar, where it may be a part of something larger.
struct Tensor {
  GossamerValue v{};
  float* data;
  int64_t images, channels, pixels;
  bool planar;
  Tensor(int64_t n, int64_t c, int64_t p, bool in_planar, int buffer)
      : images(n), channels(c), pixels(p), planar(in_planar) {
    v.buffer = buffer;
    const int64_t before = planar ? in(0, 2) : 0, behind = planar ? in(0, 2) : 0;
    v.view.channel = !planar ? pixels : n * p < 8 ? n * p : 16 * (((n * p + 15) / 16) | 1);
    v.view.image = planar ? pixels : channels * pixels;
    v.at = before * v.view.channel;
    data = aligned(planar ? (before + c + behind) * v.view.channel : n * c * p);
  }
  float& of(int64_t n, int64_t c, int64_t p) { return data[v.at + n * v.view.image + c * v.view.channel + p]; }
  bool whole() const { return planar && images * pixels >= 8; }
};
void near(float got, double want, const char* what) {
  if (!(std::abs(got - want) <= 1e-4 * std::max(1.0, std::abs(want)))) {
    std::printf("%s: %g and not %g\n", what, got, want);
    std::exit(1);
  }
}

std::set<std::string> ways;

// A layer, and another one behind it that reads what the first wrote, in one run.
void layers(int isa) {
  const bool point = in(0, 2) == 0, depthwise = !point && in(0, 3) == 0;
  const int groups = point ? 1 : depthwise ? in(2, 6) : in(1, 3);
  const int cin = depthwise ? 1 : in(1, 12), out = groups * in(1, 9);
  const int kh = point ? 1 : in(1, 5), kw = point ? 1 : in(1, 5);
  const int32_t shape[] = {out, cin, kh, kw, groups, point ? 1 : in(1, 3), point ? 1 : in(1, 3), point ? 0 : in(0, 3),
                           point ? 0 : in(0, 3), in(1, 2), in(1, 2)};
  const int images = in(0, 3) ? in(1, 3) : in(4, 33), threads = in(1, 3);
  const int h = in(1, images > 3 ? 6 : 20), w = in(1, images > 3 ? 6 : 40);
  if (h + 2 * shape[7] < shape[9] * (kh - 1) + 1 || w + 2 * shape[8] < shape[10] * (kw - 1) + 1) return;
  const int oh = (h + 2 * shape[7] - shape[9] * (kh - 1) - 1) / shape[5] + 1;
  const int ow = (w + 2 * shape[8] - shape[10] * (kw - 1) - 1) / shape[6] + 1;
  std::vector<float> weight(size_t(out) * cin * kh * kw), bias(out), second(size_t(3) * out);
  const int keep = in(0, 3);
  for (auto& v : weight) v = in(1, 3) > keep ? 0 : real();
  for (auto& v : bias) v = real();
  for (auto& v : second) v = in(0, 1) ? 0 : real();
  const bool with_bias = in(0, 1), with_more = in(0, 1);
  Tensor x(images, cin * groups, h * w, in(0, 1), 0), more(images, out, oh * ow, in(0, 1), 1);
  Tensor y(images, out, oh * ow, in(0, 1), 2), z(images, 3, oh * ow, in(0, 1), 3);
  float* buffers[] = {x.data, more.data, y.data, z.data};
  GossamerLayer* layer = gossamer_layer_new(weight.data(), with_bias ? bias.data() : nullptr, shape);
  const int32_t point_shape[] = {3, out, 1, 1, 1, 1, 1, 0, 0, 1, 1};
  GossamerLayer* next = gossamer_layer_new(second.data(), nullptr, point_shape);
  const bool together = x.planar && y.planar && (!with_more || more.planar);
  const GossamerUse use{images, h, w, threads, isa, (x.whole() ? 1 : 0) + (together && y.whole() ? 2 : 0), 0};
  const GossamerUse use_next{images, oh, ow, threads, isa, (y.whole() ? 1 : 0) + (y.planar && z.whole() ? 2 : 0), 0};
  const char* why = nullptr;
  GossamerPlan* plans[] = {gossamer_plan_new(layer, &use, &why), gossamer_plan_new(next, &use_next, &why)};
  if (!plans[0] || !plans[1]) { std::printf("no plan: %s\n", why); std::exit(1); }
  char text[160];
  gossamer_plan_text(plans[0], text, sizeof text);
  ways.insert(std::string(text).find("in place") != std::string::npos   ? "in place"
              : std::string(text).find("plane by") != std::string::npos ? "depthwise"
              : std::string(text).find("weight") != std::string::npos   ? "tokens"
              : std::string(text).find(" 1 images") != std::string::npos ? "tile" : "tile of several");
  if (!(gossamer_plan_cost(plans[0]) >= 0) || !(gossamer_dense_cost(layer, &use) >= 0)) std::exit(1);
  GossamerStep steps[2] = {};
  const int activation = in(0, 8), add_last = in(0, 1);
  steps[0] = {plans[0], x.v, more.v, y.v, images, cin * groups, h, w, oh, ow, {}, GOSSAMER_LAYER, activation, add_last,
              isa};
  if (!with_more) steps[0].b.buffer = -1;
  GossamerValue none{};
  none.buffer = -1;
  steps[1] = {plans[1], y.v, none, z.v, images, out, oh, ow, oh, ow, {}, GOSSAMER_LAYER, 0, 0, isa};
  double seconds[2];
  const int64_t strides[4] = {};
  const GossamerRun once{steps, 2, buffers, strides, 4, 1, threads, 0, in(0, 1) ? seconds : nullptr};
  if (gossamer_run(&once)) std::exit(1);
  const int per = out / groups;
  for (int times = 0; times < 5; times++) {  // some of the numbers
    const int n = in(0, images - 1), o = in(0, out - 1), i = in(0, oh - 1), j = in(0, ow - 1);
    double sum = with_bias ? bias[o] : 0;
    for (int c = 0; c < cin; c++)
      for (int a = 0; a < kh; a++)
        for (int b = 0; b < kw; b++) {
          const int row = i * shape[5] - shape[7] + a * shape[9], column = j * shape[6] - shape[8] + b * shape[10];
          if (row < 0 || row >= h || column < 0 || column >= w) continue;
          const double factor = weight[((size_t(o) * cin + c) * kh + a) * kw + b];
          sum += factor * x.of(n, o / per * cin + c, row * w + column);
        }
    const int at = i * ow + j;
    const double rest = with_more ? more.of(n, o, at) : 0;
    if (activation <= 1) {
      const double before = add_last ? sum : sum + rest;
      near(y.of(n, o, at), (activation ? std::max(0.0, before) : before) + (add_last ? rest : 0), text);
    }
    double last = 0;
    for (int k = 0; k < out; k++) last += double(second[size_t(2) * out + k]) * y.of(n, k, at);
    near(z.of(n, 2, at), last, "the second layer");
  }
  for (auto* p : plans) gossamer_plan_free(p);
  gossamer_layer_free(layer);
  gossamer_layer_free(next);
  for (float* b : buffers) std::free(b);
}

// Each of the other steps, one after the other on the same tensor, in any layout.
void planes(int isa) {
  const int images = in(1, 5), channels = in(1, 20), h = in(1, 20), w = in(1, 40), threads = in(1, 3);
  const int k = in(1, 4), l = in(1, 4), p = in(0, k / 2), q = in(0, l / 2), s = in(1, 3), t = in(1, 3);
  const int oh = (h + 2 * p - k) / s + 1, ow = (w + 2 * q - l) / t + 1;
  if (h + 2 * p < k || w + 2 * q < l) return;
  Tensor x(images, channels, h * w, in(0, 1), 0), y(images, channels, h * w, in(0, 1), 1);
  Tensor few(images, channels, 1, in(0, 1), 2), pooled(images, channels, oh * ow, in(0, 1), 3);
  Tensor scaled(images, channels, h * w, in(0, 1), 4), turned(images, channels, 1, in(0, 1), 5);
  Tensor copied(images, channels, h * w, in(0, 1), 6);
  float* buffers[] = {x.data, y.data, few.data, pooled.data, scaled.data, turned.data, copied.data};
  GossamerValue none{};
  none.buffer = -1;
  const bool two = in(0, 1);
  const GossamerValue extra = two ? x.v : none;
  const GossamerStep steps[] = {
      {nullptr, x.v, extra, y.v, images, channels, h, w, h, w, {}, GOSSAMER_ADD, 1, 0, isa},
      {nullptr, y.v, none, few.v, images, channels, h, w, 1, 1, {}, GOSSAMER_MEAN, 0, 0, isa},
      {nullptr, y.v, none, pooled.v, images, channels, h, w, oh, ow, {k, l, s, t, p, q}, GOSSAMER_MAX_POOL, 0, 0, isa},
      {nullptr, y.v, few.v, scaled.v, images, channels, h, w, h, w, {}, GOSSAMER_SCALE, 0, 0, isa},
      {nullptr, few.v, none, turned.v, images, channels, 1, 1, 1, 1, {}, GOSSAMER_COPY, 0, 0, isa},
      {nullptr, y.v, none, copied.v, images, channels, h, w, h, w, {}, GOSSAMER_COPY, 0, 0, isa},
  };
  double seconds[6];
  const int64_t strides[7] = {};
  const GossamerRun once{steps, 6, buffers, strides, 7, 1, threads, 0, seconds};
  if (gossamer_run(&once)) std::exit(1);
  for (int times = 0; times < 5; times++) {
    const int n = in(0, images - 1), c = in(0, channels - 1), at = in(0, h * w - 1);
    const int i = in(0, oh - 1), j = in(0, ow - 1);
    near(y.of(n, c, at), std::max(0.0, (two ? 2.0 : 1.0) * x.of(n, c, at)), "add");
    near(copied.of(n, c, at), y.of(n, c, at), "copy");
    near(scaled.of(n, c, at), double(y.of(n, c, at)) * few.of(n, c, 0), "scale");
    double sum = 0, most = -1e30;
    for (int pixel = 0; pixel < h * w; pixel++) sum += y.of(n, c, pixel);
    near(few.of(n, c, 0), sum / (h * w), "mean");
    near(turned.of(n, c, 0), few.of(n, c, 0), "turn");
    for (int a = std::max(0, i * s - p); a < std::min(h, i * s - p + k); a++)
      for (int b = std::max(0, j * t - q); b < std::min(w, j * t - q + l); b++)
        most = std::max(most, double(y.of(n, c, a * w + b)));
    near(pooled.of(n, c, i * ow + j), most, "max pool");
  }
  for (float* b : buffers) std::free(b);
}

void codec() {
  const int64_t bits = in(0, 200);
  std::vector<uint8_t> index((bits + 7) / 8);
  for (auto& b : index) b = uint8_t(r());
  const int64_t set = gossamer_count_bits(index.data(), bits);
  if (set >= 0) {
    std::vector<uint16_t> values(set), wide(bits);
    gossamer_expand_bits(index.data(), bits, values.data(), set, wide.data(), 2);
  }
  std::vector<uint8_t> gaps(in(0, 30));
  for (auto& g : gaps) g = in(0, 3) ? uint8_t(r()) : 255;
  int64_t covered = 0;
  const int64_t count = gossamer_count_gaps(gaps.data(), int64_t(gaps.size()), &covered);
  std::vector<uint64_t> values(count), wide(covered);
  gossamer_expand_gaps(gaps.data(), int64_t(gaps.size()), covered, values.data(), wide.data(), 8);
}

int main() {
  int n_isas = 0;
  while (gossamer_isa(n_isas)) n_isas++;
  if (gossamer_isa(-1) || gossamer_abi() < 1) return 1;
  const int32_t one[] = {1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1}, wide[] = {1, 1, 1, 400, 1, 1, 1, 0, 0, 1, 1};
  std::vector<float> weight(400, 1);
  for (const int32_t* shape : {one, wide}) {
    GossamerLayer* layer = gossamer_layer_new(weight.data(), nullptr, shape);
    const char* why = nullptr;
    const GossamerUse use{1, 1, 500, 1, shape == one ? n_isas : 0, 0, 0};
    if (gossamer_plan_new(layer, &use, &why) || !why) return 1;
    gossamer_layer_free(layer);
  }
  int n = 0;
  for (; n < 150; n++) {
    for (int isa = 0; isa < n_isas; isa++) {
      layers(isa);
      planes(isa);
    }
    codec();
  }
  std::printf("%d rounds, %d instruction sets", n, n_isas);
  for (auto& way : ways) std::printf(", %s", way.c_str());
}
"""


def _linked_and_run(objects: list[str], folder: Path) -> str:
    """What a driver prints; the test is skipped where the compiler has no sanitizers."""
    linked = subprocess.run(
        ["c++", "-fsanitize=address,undefined", *objects, "-o", "driver", "-pthread"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if linked.returncode and "san" in linked.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert linked.returncode == 0, linked.stderr
    # The thread pool lives as long as the process, by design.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([folder / "driver"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' run time is looked for on Linux")
def test_no_access_outside_and_nothing_undefined(tmp_path: Path) -> None:
    (tmp_path / "driver.cpp").write_text(_DRIVER)
    common = ["c++", "-std=gnu++17", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    common += [f"-I{_SOURCES}", "-c"]
    isas = list(_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
    jobs = [[*common, str(s), "-o", f"{s.stem}.o"] for s in (*_SOURCES.glob("*.cpp"), tmp_path / "driver.cpp")]
    jobs = [job for job in jobs if job[-1] not in ("sweep.o", "select.o", "scores.o")]  # a test of their own, below
    for isa in isas:
        lanes, flags = _FLAGS[isa]
        own = [*common, *flags, f"-DGOSSAMER_ISA={isa}", f"-DGOSSAMER_LANES={lanes}"]
        jobs += [[*own, str(s), "-o", f"{s.stem}_{isa}.o"] for s in (_SOURCES / "float32").glob("*.cpp")]
    with ThreadPoolExecutor(2) as two:
        list(two.map(lambda job: subprocess.run(job, cwd=tmp_path, check=True), jobs))
    said = _linked_and_run([job[-1] for job in jobs], tmp_path)
    assert "150 rounds" in said
    ways = {"depthwise", "in place", "tile", "tile of several", "tokens"}
    assert set(said.split(", ")[2:]) == ways, said


_SELECT_DRIVER = r"""
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
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' run time is looked for on Linux")
def test_selection_stays_inside_and_is_exact_on_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "driver.cpp").write_text(_SELECT_DRIVER)
    common = ["c++", "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    common += [f"-I{_SOURCES}", "-c"]
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    own = [_SOURCES / f"{name}.cpp" for name in ("select", "scores", "isa", "pool")]  # and nothing of the engine
    jobs = [[*common, str(s), "-o", f"{s.stem}.o"] for s in (*own, tmp_path / "driver.cpp")]
    jobs += [
        [*common, *_FLAGS[isa][1], f"-DGOSSAMER_ISA={isa}", str(_SOURCES / "sweep.cpp"), "-o", f"sweep_{isa}.o"]
        for isa in (("baseline", "avx2", "avx512") if is_x86 else ("baseline",))
    ]
    for job in jobs:
        subprocess.run(job, cwd=tmp_path, check=True)
    assert "600 selections" in _linked_and_run([job[-1] for job in jobs], tmp_path)
