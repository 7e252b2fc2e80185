// Bounds on scores, in the form that a layer has them in.
#include "scores.h"

namespace gossamer {
namespace {

// The bits of the largest magnitude that is at most a number; -1 where none is.
int64_t largest(double at_most, int64_t infinity, double (*from)(int64_t)) {
  int64_t low = -1, high = infinity;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (from(middle) <= at_most) low = middle;
    else high = middle - 1;
  }
  return low;
}

}  // namespace

Bound up_to(int32_t kind, double end) {
  switch (kind) {
    case FLOAT16: return {largest(end, 0x7c00, from_float16), end};
    case BFLOAT16: return {largest(end, 0x7f80, from_bfloat16), end};
    case FLOAT32: return {largest(end, 0x7f800000, from_float32), end};
    case FLOAT64: return {largest(end, 0x7ff0000000000000, from_float64), end};
    case SCORES32: {  // as a float that is no larger
      const float limit = std::numeric_limits<float>::max();
      if (!(std::fabs(end) <= double(limit))) return {-1, end > 0 && end != INF ? double(limit) : end < 0 ? -INF : end};
      const float near = float(end);
      return {-1, double(near) <= end ? near : std::nextafter(near, -std::numeric_limits<float>::infinity())};
    }
    default: return {-1, end};
  }
}

Bound before(int32_t kind, double end) { return up_to(kind, end == -INF ? NO_NUMBER : std::nextafter(end, -INF)); }

}  // namespace gossamer
