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

}  // namespace

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
