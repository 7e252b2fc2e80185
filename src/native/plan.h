// What the engine's own files share: a layer's weights, and the plan that fits them to a shape.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "float32/kernels.h"
#include "gossamer.h"

struct GossamerLayer {
  struct Shape {
    int32_t out, in, kh, kw, groups, sy, sx, py, px, dy, dx;
  } s;
  std::vector<float> values, bias;
  std::vector<int32_t> places;  // in a row of the weight: (channel of the group, ky, kx)
  std::vector<int64_t> starts;  // of each output channel's values
};

namespace gossamer {

struct Block {
  int32_t plane, n_planes;
  std::vector<float> weights;
  std::vector<uint16_t> offsets, counts;
  std::vector<uint32_t> rows;
};

struct Group {
  std::vector<int32_t> channels;
  std::vector<Block> blocks;
};

// What this machine is like: its caches, and what a multiplication of a narrow vector costs, over that of the widest.
struct Machine {
  int64_t l1, l2;
  std::vector<const Kernels*> kernels;  // best first
  std::vector<double> costs;            // of one multiplication with what lies in the cache, the cheapest being 1
};
const Machine& machine();

enum class Way { TILES, IN_PLACE, DEPTHWISE, TOKENS };

}  // namespace gossamer

struct GossamerPlan {
  const GossamerLayer* layer;
  std::unique_ptr<GossamerLayer> less;  // where that is a part of the one that the plan was asked for
  const gossamer::Kernels* kernels;
  gossamer::Way way;
  int64_t images;
  int32_t height, width, out_height, out_width;
  double cost;

  // A tile: how many vectors wide and rows high, of how many images side by side, and how many there are.
  int32_t row_vectors, rows, columns, tile_images;
  int32_t across, down;
  int64_t along;        // of images
  int64_t all_vectors;  // in place: of a channel, tiles of row_vectors each
  int32_t image_pitch;
  int32_t y_first, n_dy, x_first, n_shifts;  // where a kernel's rows and columns lie, in a phase
  int32_t left, first;  // columns of a block before the tile's first pixel, and where that is in the sums
  std::vector<uint8_t> shifts;
  std::vector<int32_t> planes;  // channel, row phase, column phase
  int32_t block_planes;
  bool has_gaps;  // between what is copied, which must be zero
  bool write_direct;
  std::vector<gossamer::Group> groups;

  // Depthwise: each channel meets one input channel, by weights at these offsets.
  int32_t n_phases, plane_pitch;
  int32_t together;  // planes that are copied before the first is met, since what was just stored is slow to load
  int32_t parts, part_rows;  // of each plane, so that threads take the same rows in every layer
  std::vector<int32_t> plane_offsets;
  std::vector<int32_t> taps;  // in place: (row, column) that each weight meets
  bool by_channels = false;   // whether threads share channels, and not pixels
  bool by_rows = false;       // a kernel of 3 × 3 weights, all of them there, in steps of 1 or 2

  int32_t vectors() const { return row_vectors * rows; }
  int32_t pitch() const { return row_vectors * kernels->lanes; }
  int32_t block_rows() const { return rows + n_dy - 1; }
  int64_t items() const;
};
