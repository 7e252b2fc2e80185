// Which tile is best: what each would cost, and what a dense kernel does.
#include <algorithm>
#include <cmath>

#include "fit.h"

namespace gossamer {
namespace {

// Costs are in multiplications of the cheapest vector from the first-level cache, two of which are made at a time. What
// the other things cost was fitted to what the tiles of ResNets' and a MobileNet's layers take, each in its network, on a
// Zen 4; elsewhere they are about as much.
struct Costs {
  double multiply;  // of a vector of these lanes
  explicit Costs(double of) : multiply(of) {}
  // Of a weight: its broadcast and its offset, and no less than a part of the sums' latency.
  double weight(int32_t t) const { return std::max(waiting(t), t * multiply + 2.0); }
  // The same where what it meets comes from the second-level cache, or beyond.
  double far_weight(int32_t t, double bytes) const {
    return std::max(waiting(t), (bytes < 0.7 * double(machine().l2) ? 1.9 : 2.8) * t * multiply + 2.0);
  }
  // Where sums do not wait, weights do: those of a whole network pass through the second-level cache, once for each tile.
  static double waiting(int32_t t) { return ways_of(t) > 1 ? 3.5 : 4.5; }
  // Of a row of a block; with several parts, whose loops' ends are guessed wrong, and between which sums are shifted.
  double row(int32_t t, int32_t shifts) const { return 14.0 + (shifts - 1) * (20.0 + 3.0 * t * multiply); }
  // Of sums that are kept from one block to the next, in the second-level cache.
  double sums(int32_t t) const { return 4.0 * t * multiply; }
};

// What it costs to fetch a line that another core wrote.
constexpr double FOREIGN = 25.0;

// Each tile meets all weights, with their offsets. They come from beyond the second-level cache: the first time, since other
// layers were there since, and each time where they do not fit it.
double weights_read(double nonzero, int64_t tiles) {
  const double bytes = nonzero * 6;
  return bytes / 64 * 8.0 * (bytes > double(machine().l2) ? double(tiles) : 1.0);
}

// What threads that share tiles take: no thread should wait for the last, and each should find in its cache what it wrote
// in the layer before, which it does where tiles alone are shared out.
double shared(const GossamerPlan& p, int32_t threads, double cost, int64_t tiles) {
  if (threads <= 1) return cost;
  const int64_t groups = groups_for(p, threads, tiles), items = tiles * groups;
  return cost * double(up(items, threads) * threads) / double(items) * (groups > 1 ? 1.15 : 1.0);
}

// Runs `use(kernels, cost of a multiplication)` for the instruction set that was asked for, or for those worth a look.
template <class F>
void for_kernels(int32_t isa, F use) {
  const Machine& m = machine();
  for (size_t i = 0; i < m.kernels.size(); i++)
    if (isa >= 0 ? size_t(isa) == i : m.kernels[i]->longest == m.kernels[0]->longest && (i == 0 || m.kernels[0]->lanes == 16))
      use(m.kernels[i], m.costs[i]);
}

}  // namespace

int32_t groups_for(const GossamerPlan& p, int32_t threads, int64_t tiles) {
  int32_t groups = 1;
  while (threads > 1 && groups < p.layer->s.out && tiles * groups < 6 * threads && (tiles * groups) % threads) groups++;
  return groups;
}

Tile choose_tile(const GossamerPlan& p, const Phases& phases, int32_t isa, int32_t threads) {
  const Shape& s = p.layer->s;
  const double n_planes = double(p.planes.size()) / 3, nonzero = double(p.layer->values.size());
  const double out = s.out;
  const int32_t halo = phases.x_last - phases.x_first, gap = std::max({phases.x_last, -phases.x_first, 0});
  const bool may_be_whole = phases.x_first <= 0 && phases.x_last >= 0 && s.sx * int64_t(p.out_width) >= p.width;
  Tile best;
  for_kernels(isa, [&](const Kernels* kernels, double multiply) {
    const Costs costs(multiply);
    const int32_t lanes = kernels->lanes, longest = kernels->longest;
    auto consider = [&](int32_t v, int32_t images, bool whole) {
      Tile tile;
      tile.kernels = kernels;
      tile.row_vectors = v;
      tile.images = images;
      tile.image_pitch = p.out_width + gap;
      tile.columns = whole ? p.out_width : std::min(v * lanes - halo, p.out_width);
      tile.across = int32_t(up(p.out_width, tile.columns));
      tile.left = whole ? 0 : -phases.x_first;
      for (int32_t most = std::min(longest / v, p.out_height), before = 0; most >= 1; most--) {
        tile.down = int32_t(up(p.out_height, most));
        tile.rows = int32_t(up(p.out_height, tile.down));
        if (tile.rows == before) continue;
        before = tile.rows;
        const int32_t t = v * tile.rows, block_rows = tile.rows + p.n_dy - 1;
        const double bytes = double(block_rows) * v * lanes * 4;
        const double block = std::max(1.0, std::floor(double(machine().l1) / bytes));
        const double blocks = std::ceil(n_planes / block), met = std::min(out * blocks, nonzero + out);
        const double per_row = std::ceil(double(std::min(tile.columns, p.out_width)) / lanes);
        const double cost_of_tile =
            nonzero * costs.weight(t) + met * costs.row(t, p.n_shifts) + std::max(0.0, met - out) * costs.sums(t) +
            n_planes * block_rows * images * (3 + (s.sx > 1 ? 6.0 * v : 0.0)) +
            out * (50 + tile.rows * images * (10 + 12 * per_row));
        const int64_t tiles = int64_t(tile.across) * tile.down * up(p.images, images);
        const double cost = shared(p, threads, cost_of_tile * double(tiles) + weights_read(nonzero, tiles), tiles);
        if (cost < best.cost) {
          tile.cost = cost;
          best = tile;
        }
      }
    };
    for (int32_t v = 1; v <= longest; v++)
      if (v * lanes > halo) consider(v, 1, false);
    if (!may_be_whole) return;
    for (int64_t images = 1; images <= p.images; images++) {
      const int64_t v = up(images * (int64_t(p.out_width) + gap), lanes);
      if (v > longest) break;
      consider(int32_t(v), int32_t(images), true);
    }
  });
  return best;
}

Tile choose_in_place(const GossamerPlan& p, int64_t pixels, int32_t isa, int32_t threads) {
  const Shape& s = p.layer->s;
  const double n_planes = double(s.in) * s.groups, nonzero = double(p.layer->values.size()), out = s.out;
  Tile best;
  for_kernels(isa, [&](const Kernels* kernels, double multiply) {
    const Costs costs(multiply);
    const int64_t vectors = up(pixels, kernels->lanes);
    for (int64_t most = std::min<int64_t>(vectors, kernels->longest), before = 0; most >= 1; most--) {
      const int64_t tiles = up(vectors, most), t = up(vectors, tiles);
      if (t == before) continue;
      before = t;
      for (bool cached : {true, false}) {
        const double bytes = double(t) * kernels->lanes * 4;
        const double block = cached ? std::max(1.0, std::floor(double(machine().l1) / bytes)) : n_planes;
        const double blocks = std::ceil(n_planes / block), met = std::min(out * blocks, nonzero + out);
        if (!cached && n_planes * bytes <= double(machine().l1)) continue;
        const double weight = cached ? costs.weight(int32_t(t)) : costs.far_weight(int32_t(t), n_planes * bytes);
        const double alone = weights_read(nonzero, tiles) +
                             double(tiles) * (nonzero * weight + met * costs.row(int32_t(t), 1) +
                                             std::max(0.0, met - out) * costs.sums(int32_t(t)) +
                                             n_planes * double(t) * 7 + out * (30 + 3.0 * double(t)));
        const double cost = p.by_channels
                                ? alone + FOREIGN * n_planes * double(up(pixels, 16)) * (threads - 1)
                                : shared(p, threads, alone, tiles);
        if (cost < best.cost) {
          best.cost = cost;
          best.kernels = kernels;
          best.row_vectors = int32_t(t);
          best.rows = best.images = 1;
          best.down = 1;
          best.across = int32_t(tiles);
          best.block = int32_t(block);
        }
      }
    }
  });
  return best;
}

}  // namespace gossamer

using namespace gossamer;

// Dense kernels make 0.85 of the multiplications that there could be, fewer on few pixels, and move what they read into a
// layout of their own; on a few pixels or tokens they take as long as it takes to read the weights, and longer where those
// have to come from beyond the second-level cache. Tokens meet them as they lie, which wide vectors do not shorten.
double gossamer_dense_cost(const GossamerLayer* layer, const GossamerUse* use) {
  const Shape& s = layer->s;
  const double lanes = machine().kernels[0]->lanes / machine().costs[0];
  const double height = std::max(0, (use->height + 2 * s.py - s.dy * (s.kh - 1) - 1) / s.sy + 1);
  const double width = std::max(0, (use->width + 2 * s.px - s.dx * (s.kw - 1) - 1) / s.sx + 1);
  const double pixels = height * width * double(use->images), weights = double(s.out) * s.in * s.kh * s.kw;
  const double efficiency = 0.85 * std::min(1.0, s.in * s.kh * s.kw / 32.0), bytes = weights * 4, l2 = double(machine().l2);
  const double read = s.kh * s.kw == 1 ? (bytes > l2 ? 0.65 : 0.45) : (bytes > 4 * l2 ? 28.0 : 14.0) / lanes;
  const double inputs = double(use->images) * s.in * s.groups * use->height * use->width;
  const double met = s.kh * s.kw == 1 ? pixels : std::max(pixels, 8.0);  // a vector is multiplied whole
  return weights * (met / efficiency / lanes + read) + 3 * (inputs + pixels * s.out) / lanes;
}
