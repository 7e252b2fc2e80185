"""The compiled library under AddressSanitizer and UndefinedBehaviorSanitizer, over shapes drawn at random."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_SOURCES = Path(__file__).parents[2] / "src" / "native"
_FLAGS = {"baseline": [], "avx2": ["-mavx2", "-mfma"]}
_FLAGS["avx512"] = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]

# Buffers end where tensors end, so that one float too far is found. No PyTorch: its own libraries are not sanitized.
_DRIVER = r"""
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>
#include "gossamer.h"
extern "C" {
int64_t gossamer_count_bits(const uint8_t*, int64_t);
int64_t gossamer_count_gaps(const uint8_t*, int64_t, int64_t*);
int32_t gossamer_expand_bits(const uint8_t*, int64_t, const void*, int64_t, void*, int32_t);
int32_t gossamer_expand_gaps(const uint8_t*, int64_t, int64_t, const void*, void*, int32_t);
}
int main() {
  std::mt19937 r(0);
  auto in = [&](int a, int b) { return a + int(r() % unsigned(b - a + 1)); };
  auto real = [&] { return float(r() % 2001) / 1000 - 1; };
  int n_isas = 0, n = 0;
  while (gossamer_isa(n_isas)) n_isas++;
  while (n < 700) {
    const int groups = in(1, 3), cin = in(1, 12), out = groups * in(1, 9), kh = in(1, 5), kw = in(1, 5);
    const int32_t shape[] = {out, cin, kh, kw, groups, in(1, 3), in(1, 3), in(0, 3), in(0, 3), in(1, 2), in(1, 2)};
    const int images = in(1, 3), h = in(1, 20), w = in(1, 40), threads = in(1, 3);
    const int oh = (h + 2 * shape[7] - shape[9] * (kh - 1) - 1) / shape[5] + 1;
    const int ow = (w + 2 * shape[8] - shape[10] * (kw - 1) - 1) / shape[6] + 1;
    if (h + 2 * shape[7] < shape[9] * (kh - 1) + 1 || w + 2 * shape[8] < shape[10] * (kw - 1) + 1) continue;
    std::vector<float> weight(size_t(out) * cin * kh * kw), bias(out), x(size_t(images) * cin * groups * h * w);
    std::vector<float> y(size_t(images) * out * oh * ow), more(y.size());
    const int keep = in(0, 3);
    for (auto& v : weight) v = in(1, 3) > keep ? 0 : real();
    for (auto& v : bias) v = real();
    for (auto& v : x) v = real();
    for (auto& v : more) v = real();
    GossamerLayer* layer = gossamer_layer_new(weight.data(), in(0, 1) ? bias.data() : nullptr, shape);
    for (int isa = 0; isa < n_isas; isa++) {
      const char* why = nullptr;
      GossamerPlan* plan = gossamer_plan_new(layer, images, h, w, threads, isa, &why);
      if (!plan) { std::printf("no plan: %s\n", why); return 1; }
      GossamerStep step{plan, x.data(), in(0, 1) ? more.data() : nullptr, y.data(), images, in(0, 8), in(0, 1)};
      if (gossamer_run(&step, 1, threads)) return 1;
      gossamer_plan_free(plan);
    }
    if (kh * kw * groups == 1) {
      std::vector<float> tokens(3 * cin), result(3 * out);
      gossamer_run_tokens(layer, tokens.data(), result.data(), 3, in(0, 8), threads);
    }
    gossamer_layer_free(layer);
    const int k = in(1, 4), p = in(0, k / 2), s = in(1, 3);
    if (h + 2 * p >= k && w + 2 * p >= k) {
      const int32_t pool[] = {h, w, (h + 2 * p - k) / s + 1, (w + 2 * p - k) / s + 1, k, k, s, s, p, p};
      std::vector<float> pooled(size_t(images) * cin * groups * pool[2] * pool[3]);
      gossamer_max_pool(x.data(), pooled.data(), images * cin * groups, pool, threads);
    }
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
    n++;
  }
  std::printf("%d shapes, %d instruction sets\n", n, n_isas);
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' run time is looked for on Linux")
def test_no_access_outside_and_nothing_undefined(tmp_path: Path) -> None:
    (tmp_path / "driver.cpp").write_text(_DRIVER)
    common = ["c++", "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    common += [f"-I{_SOURCES}", "-c"]
    isas = list(_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
    jobs = [[*common, str(s), "-o", f"{s.stem}.o"] for s in (*_SOURCES.glob("[cep]*.cpp"), tmp_path / "driver.cpp")]
    jobs += [
        [*common, *_FLAGS[isa], f"-DGOSSAMER_ISA={isa}", str(_SOURCES / "kernels.cpp"), "-o", f"kernels_{isa}.o"]
        for isa in isas
    ]
    for job in jobs:
        subprocess.run(job, cwd=tmp_path, check=True)
    objects = [job[-1] for job in jobs]
    linked = subprocess.run(
        ["c++", "-fsanitize=address,undefined", *objects, "-o", "driver", "-pthread"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if linked.returncode and "san" in linked.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert linked.returncode == 0, linked.stderr
    # The thread pool lives as long as the process, by design.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([tmp_path / "driver"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "700 shapes" in done.stdout


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
    const int n_layers = in(1, 3), isa = n % 3;
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
    # Which instruction sets there are, the engine says; here a few lines do, so that it need not be compiled again.
    names = (
        'extern "C" const char* gossamer_isa(int i) { __builtin_cpu_init(); const char* n[4] = {}; int k = 0; '
        'if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) n[k++] = "avx512"; '
        'if (__builtin_cpu_supports("avx2")) n[k++] = "avx2"; n[k++] = "baseline"; return i < k ? n[i] : nullptr; }'
        if is_x86
        else 'extern "C" const char* gossamer_isa(int i) { return i ? nullptr : "baseline"; }'
    )
    (tmp_path / "names.cpp").write_text(names)
    sources = [_SOURCES / "select.cpp", _SOURCES / "pool.cpp", tmp_path / "driver.cpp", tmp_path / "names.cpp"]
    jobs = [[*common, str(s), "-o", f"{s.stem}.o"] for s in sources]
    jobs += [
        [*common, *_FLAGS[isa], f"-DGOSSAMER_ISA={isa}", str(_SOURCES / "sweep.cpp"), "-o", f"sweep_{isa}.o"]
        for isa in (_FLAGS if is_x86 else ["baseline"])
    ]
    for job in jobs:
        subprocess.run(job, cwd=tmp_path, check=True)
    linked = subprocess.run(
        ["c++", "-fsanitize=address,undefined", *(job[-1] for job in jobs), "-o", "driver", "-pthread"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if linked.returncode and "san" in linked.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert linked.returncode == 0, linked.stderr
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([tmp_path / "driver"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "600 selections" in done.stdout
