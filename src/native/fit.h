// How a plan comes about: where a kernel's weights lie, which tile is best, and the weights in the order it takes them.
#pragma once
#include <climits>
#include <memory>

#include "plan.h"

namespace gossamer {

using Shape = GossamerLayer::Shape;

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where a weight's column (or row) lies: output x meets input x * stride + k * dilation - padding.
struct Tap {
  int32_t phase, offset;
};

// Where all of a kernel's rows and columns lie, and the phases that they meet: an input is taken apart into those, so that
// whatever the stride, neighbours in a phase are met by neighbours in the output.
struct Phases {
  std::vector<Tap> ys, xs;
  std::vector<std::array<int32_t, 2>> all;  // row phase, column phase
  std::vector<int32_t> of;                  // of each weight of a kernel: its place in `all`
  int32_t y_first = INT_MAX, y_last = INT_MIN, x_first = INT_MAX, x_last = INT_MIN;
};
Phases phases_of(const Shape& s);
// The plan's layer without those rows and columns of its kernel that meet padding alone, as most do on a pixel or two;
// null where there are none. The plan knows its sizes already.
std::unique_ptr<GossamerLayer> without_unmet(const GossamerPlan& p);

struct Tile {
  const Kernels* kernels = nullptr;
  double cost = 1e300;
  int32_t row_vectors = 0, rows = 0, columns = 0, images = 0, across = 0, down = 0, image_pitch = 0, left = 0, block = 0;
};

// In tiles.cpp. As few groups of channels as share out evenly, since each reads its blocks anew.
int32_t groups_for(const GossamerPlan& p, int32_t threads, int64_t tiles);
// How wide and how high a tile is, and of how many images, for the least that is done in vain.
Tile choose_tile(const GossamerPlan& p, const Phases& phases, int32_t isa, int32_t threads);
// The same where planes are read where they lie: whether blocks that fit the cache are worth their sums, too.
Tile choose_in_place(const GossamerPlan& p, int64_t pixels, int32_t isa, int32_t threads);

// In pack.cpp. Channels to groups of threads, contiguous and balanced by weights.
void share_out(GossamerPlan& p, int32_t n_groups);
// Weights to blocks of planes, in the order in which the kernels take them.
void pack(GossamerPlan& p, const Phases& phases, int64_t block, int64_t plane_units);

}  // namespace gossamer
