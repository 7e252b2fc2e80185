// Where a kernel's weights lie, whatever its stride, padding and dilation.
#include <algorithm>

#include "fit.h"

namespace gossamer {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

Tap tap(int32_t k, int32_t stride, int32_t padding, int32_t dilation) {
  const int64_t at = int64_t(k) * dilation - padding, offset = floor_div(at, stride);
  return {int32_t(at - offset * stride), int32_t(offset)};
}

// Of a kernel's rows (or columns): from the first to the last one that meets the input at all, and not its padding alone.
std::array<int32_t, 2> met(int32_t kernel, int32_t stride, int32_t padding, int32_t dilation, int32_t size, int32_t out) {
  int32_t first = kernel, last = -1;
  for (int32_t k = 0; k < kernel; k++) {
    for (int32_t o = 0; o < out; o++) {
      const int64_t at = int64_t(o) * stride + int64_t(k) * dilation - padding;
      if (at < 0 || at >= size) continue;
      first = std::min(first, k);
      last = k;
      break;
    }
  }
  if (last < 0) return {0, 0};
  return {std::min(first, padding / dilation), last};  // so that no padding is negative
}

}  // namespace

std::unique_ptr<GossamerLayer> without_unmet(const GossamerPlan& p) {
  const GossamerLayer& layer = *p.layer;
  const Shape& s = layer.s;
  const auto [top, bottom] = met(s.kh, s.sy, s.py, s.dy, p.height, p.out_height);
  const auto [left, right] = met(s.kw, s.sx, s.px, s.dx, p.width, p.out_width);
  if (bottom - top + 1 == s.kh && right - left + 1 == s.kw) return nullptr;
  auto less = std::make_unique<GossamerLayer>();
  less->s = s;
  less->s.kh = bottom - top + 1;
  less->s.kw = right - left + 1;
  less->s.py -= top * s.dy;
  less->s.px -= left * s.dx;
  less->bias = layer.bias;
  less->starts.push_back(0);
  for (int32_t o = 0; o < s.out; o++) {
    for (int64_t j = layer.starts[o]; j < layer.starts[o + 1]; j++) {
      const int32_t place = layer.places[j], x = place % s.kw - left, y = place / s.kw % s.kh - top;
      if (x < 0 || x >= less->s.kw || y < 0 || y >= less->s.kh) continue;
      less->values.push_back(layer.values[j]);
      less->places.push_back((place / (s.kw * s.kh) * less->s.kh + y) * less->s.kw + x);
    }
    less->starts.push_back(int64_t(less->values.size()));
  }
  return less;
}

Phases phases_of(const Shape& s) {
  Phases p;
  for (int32_t k = 0; k < s.kh; k++) p.ys.push_back(tap(k, s.sy, s.py, s.dy));
  for (int32_t k = 0; k < s.kw; k++) p.xs.push_back(tap(k, s.sx, s.px, s.dx));
  for (Tap y : p.ys) {
    p.y_first = std::min(p.y_first, y.offset);
    p.y_last = std::max(p.y_last, y.offset);
    for (Tap x : p.xs) {
      p.x_first = std::min(p.x_first, x.offset);
      p.x_last = std::max(p.x_last, x.offset);
      const std::array<int32_t, 2> phase{y.phase, x.phase};
      const auto found = std::find(p.all.begin(), p.all.end(), phase);
      p.of.push_back(int32_t(found - p.all.begin()));
      if (found == p.all.end()) p.all.push_back(phase);
    }
  }
  return p;
}

}  // namespace gossamer
