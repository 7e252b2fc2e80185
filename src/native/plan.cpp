// Layers, and the plans that fit them to a shape: tiles, blocks of planes that fit the cache, rows shared out to threads.
#include "plan.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>

using namespace gossamer;

namespace {

using Shape = GossamerLayer::Shape;

constexpr int MAX_PART = 60000;  // weights between two shifts of a row, counted in 16 bits
constexpr int64_t FEW = 8;       // tokens below which a vector would be mostly empty

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where a weight's column (or row) lies: output x meets input x * stride + k * dilation - padding.
struct Tap {
  int32_t phase, offset;
};
Tap tap(int32_t k, int32_t stride, int32_t padding, int32_t dilation) {
  const int64_t at = int64_t(k) * dilation - padding, offset = floor_div(at, stride);
  return {int32_t(at - offset * stride), int32_t(offset)};
}

// Where all of a kernel's rows and columns lie, and the phases that they meet: an input is taken apart into those, so that
// whatever the stride, neighbours in a phase are met by neighbours in the output.
struct Phases {
  std::vector<Tap> ys, xs;
  std::vector<std::array<int32_t, 2>> all;  // row phase, column phase
  std::vector<int32_t> of;                  // of each weight of a kernel: its place in `all`
  int32_t y_first = INT_MAX, y_last = INT_MIN, x_first = INT_MAX, x_last = INT_MIN;
};
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

// Costs are in multiplications of the cheapest vector from the first-level cache, two of which are made at a time. What
// the other things cost was fitted to layers on an Emerald Rapids and a Zen 4; elsewhere they are about as much.
struct Costs {
  double multiply;  // of a vector of these lanes
  explicit Costs(double of) : multiply(of) {}
  // Of a weight: its broadcast and its offset, and no less than a part of the sums' latency.
  double weight(int32_t t) const { return std::max(5.5, t * multiply + 1.0); }
  // The same where what it meets comes from the second-level cache.
  double far_weight(int32_t t) const { return std::max(5.5, 2.2 * t * multiply + 1.0); }
  // Of a row of a block: the loop's end is guessed wrong, and the sums are shifted from part to part.
  double row(int32_t t, int32_t shifts) const { return 6.0 + shifts * 8.0 + (shifts - 1) * 2.0 * t * multiply; }
  // Of sums that are kept from one block to the next, in the second-level cache.
  double sums(int32_t t) const { return 5.0 * t * multiply; }
};

// As few groups of channels as share out evenly, since each reads its blocks anew.
int32_t groups_for(const GossamerPlan& p, int32_t threads, int64_t tiles) {
  int32_t groups = 1;
  while (threads > 1 && groups < p.layer->s.out && tiles * groups < 6 * threads && (tiles * groups) % threads) groups++;
  return groups;
}

// What threads that share tiles take: no thread should wait for the last, and each should find in its cache what it wrote
// in the layer before, which it does where tiles alone are shared out.
double shared(const GossamerPlan& p, int32_t threads, double cost, int64_t tiles) {
  if (threads <= 1) return cost;
  const int64_t groups = groups_for(p, threads, tiles), items = tiles * groups;
  return cost * double(up(items, threads) * threads) / double(items) * (groups > 1 ? 1.15 : 1.0);
}

struct Tile {
  const Kernels* kernels = nullptr;
  double cost = 1e300;
  int32_t row_vectors = 0, rows = 0, columns = 0, images = 0, across = 0, down = 0, image_pitch = 0, left = 0, block = 0;
};

// Runs `use(kernels, cost of a multiplication)` for the instruction set that was asked for, or for those worth a look.
template <class F>
void for_kernels(int32_t isa, F use) {
  const Machine& m = machine();
  for (size_t i = 0; i < m.kernels.size(); i++)
    if (isa >= 0 ? size_t(isa) == i : m.kernels[i]->longest == m.kernels[0]->longest && (i == 0 || m.kernels[0]->lanes == 16))
      use(m.kernels[i], m.costs[i]);
}

// How wide and how high a tile is, and of how many images, for the least that is done in vain.
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
            n_planes * block_rows * images * (4 + (s.sx > 1 ? 5.0 : 2.5) * (per_row + halo / 16.0)) +
            out * (20 + tile.rows * images * (3 + 3 * per_row));
        const int64_t tiles = int64_t(tile.across) * tile.down * up(p.images, images);
        const double cost = shared(p, threads, cost_of_tile * double(tiles), tiles);
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

// The same where planes are read where they lie: whether blocks that fit the cache are worth their sums, too.
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
        const double weight = cached ? costs.weight(int32_t(t)) : costs.far_weight(int32_t(t));
        const double alone = double(tiles) * (nonzero * weight + met * costs.row(int32_t(t), 1) +
                                             std::max(0.0, met - out) * costs.sums(int32_t(t)) +
                                             n_planes * double(t) * 2 + out * (8 + 4.0 * double(t)));
        const double cost = shared(p, threads, alone, tiles);
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

struct Entry {
  int32_t part;
  uint16_t offset;
  float value;
};

// Channels to groups of threads, contiguous and balanced by weights.
void share_out(GossamerPlan& p, int32_t n_groups) {
  const GossamerLayer& layer = *p.layer;
  std::vector<int64_t> load(layer.s.out + 1, 0);
  for (int32_t o = 0; o < layer.s.out; o++) load[o + 1] = load[o] + (layer.starts[o + 1] - layer.starts[o]) + 4;
  p.groups.resize(n_groups);
  for (int32_t o = 0; o < layer.s.out; o++) {
    const int64_t middle = (load[o] + load[o + 1]) / 2;
    p.groups[std::min<int64_t>(n_groups - 1, middle * n_groups / load[layer.s.out])].channels.push_back(o);
  }
}

void pack(GossamerPlan& p, const Phases& phases, int64_t block, int64_t plane_units) {
  const GossamerLayer& layer = *p.layer;
  const Shape& s = layer.s;
  const int32_t per_group = s.out / s.groups, n_planes = int32_t(p.planes.size() / 3);
  block = std::min(block, MAX_PART / (int64_t(s.kh) * s.kw) + 1);
  block = std::max<int64_t>(1, std::min(block, 65535 / plane_units));
  const int64_t n_blocks = up(n_planes, block);
  block = up(n_planes, n_blocks);
  p.block_planes = int32_t(block);

  // Columns that are met, in order; the sums are shifted from one to the next.
  std::vector<int32_t> part_of(s.kw), columns;
  for (Tap x : phases.xs) columns.push_back(x.offset);
  std::sort(columns.begin(), columns.end());
  columns.erase(std::unique(columns.begin(), columns.end()), columns.end());
  for (int32_t x = 0; x < s.kw; x++)
    part_of[x] = int32_t(std::lower_bound(columns.begin(), columns.end(), phases.xs[x].offset) - columns.begin());
  for (size_t i = 0; i < columns.size(); i++) p.shifts.push_back(uint8_t(i ? columns[i] - columns[i - 1] : 0));

  for (auto& group : p.groups) {
    const size_t n = group.channels.size();
    if (!n) continue;
    std::vector<std::vector<std::vector<Entry>>> entries(n_blocks, std::vector<std::vector<Entry>>(n));
    std::vector<int64_t> first(n, -1), last(n, -1);
    for (size_t i = 0; i < n; i++) {
      const int32_t o = group.channels[i], base = o / per_group * s.in;
      for (int64_t j = layer.starts[o]; j < layer.starts[o + 1]; j++) {
        const int32_t place = layer.places[j], tap_at = place % (s.kh * s.kw), c = base + place / (s.kh * s.kw);
        const int32_t ky = tap_at / s.kw, kx = tap_at % s.kw;
        const int64_t plane = int64_t(c) * p.n_phases + phases.of[tap_at], b = plane / block;
        const int64_t row = phases.ys[ky].offset - p.y_first;
        const int64_t offset = (plane - b * block) * plane_units + row * p.row_vectors;
        entries[b][i].push_back({part_of[kx], uint16_t(offset), layer.values[j]});
        first[i] = first[i] < 0 ? b : std::min(first[i], b);
        last[i] = std::max(last[i], b);
      }
      if (first[i] < 0) first[i] = last[i] = 0;  // a channel without weights is its bias
    }
    for (int64_t b = 0; b < n_blocks; b++) {
      Block out;
      out.plane = int32_t(b * block);
      out.n_planes = int32_t(std::min<int64_t>(block, n_planes - b * block));
      std::vector<size_t> order;
      for (size_t i = 0; i < n; i++)
        if (!entries[b][i].empty() || first[i] == b) order.push_back(i);
      // Rows of about as many weights come one after the other, so that loops end where the processor expects it.
      std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) {
        return entries[b][x].size() < entries[b][y].size();
      });
      for (size_t i : order) {
        auto& row = entries[b][i];
        std::stable_sort(row.begin(), row.end(), [](const Entry& x, const Entry& y) { return x.part < y.part; });
        std::vector<uint16_t> counts(p.n_shifts, 0);
        for (const auto& e : row) {
          counts[e.part]++;
          out.weights.push_back(e.value);
          out.offsets.push_back(e.offset);
        }
        out.counts.insert(out.counts.end(), counts.begin(), counts.end());
        out.rows.push_back(uint32_t(i) | (first[i] == b ? FIRST : 0) | (last[i] == b ? LAST : 0));
      }
      if (!out.rows.empty()) group.blocks.push_back(std::move(out));
      for (auto& row : entries[b]) std::vector<Entry>().swap(row);
    }
  }
}

void adopt(GossamerPlan& p, const Tile& tile, const Phases& phases) {
  p.kernels = tile.kernels;
  p.row_vectors = tile.row_vectors;
  p.rows = tile.rows;
  p.columns = tile.columns;
  p.tile_images = tile.images;
  p.image_pitch = tile.image_pitch;
  p.across = tile.across;
  p.down = tile.down;
  p.along = up(p.images, tile.images);
  p.left = tile.left;
  p.first = tile.left + phases.x_last;
  p.cost = tile.cost;
}

// Each channel by itself: its plane is copied, padded and taken apart by phases, and each weight meets all of it.
void plan_planes(GossamerPlan& p, const Phases& phases) {
  const int32_t lanes = p.kernels->lanes, kw = p.layer->s.kw;
  const Shape& s = p.layer->s;
  // Of two phases half of what is copied would not be met again; of one, all is, and a mask costs more than a copy.
  if (p.kernels->plane_in_place && s.sx == 2 && s.kh * s.kw <= 64) {
    for (int32_t place : p.layer->places)
      p.taps.insert(p.taps.end(), {place / kw * s.dy - s.py, place % kw * s.dx - s.px});
  }
  p.plane_pitch = int32_t(up(p.out_width + phases.x_last - p.x_first, lanes)) * lanes;
  const int64_t rows = p.out_height + p.n_dy - 1;
  for (int32_t place : p.layer->places) {
    const int64_t row = phases.of[place] * rows + phases.ys[place / kw].offset - p.y_first;
    p.plane_offsets.push_back(int32_t(row * p.plane_pitch + phases.xs[place % kw].offset - p.x_first));
  }
  const double vectors = double(up(p.out_width, lanes)) * p.out_height;
  p.cost = double(p.images) * (double(p.layer->values.size()) * vectors * 2 + p.layer->s.out * (40 + 6 * vectors));
}

}  // namespace

int64_t GossamerPlan::items() const {
  switch (way) {
    case Way::DEPTHWISE: return images * parts * up(layer->s.out, together);
    case Way::TOKENS: return up(layer->s.out, 64);
    case Way::IN_PLACE: return across * int64_t(groups.size());
    default: return along * across * down * int64_t(groups.size());
  }
}

int32_t gossamer_abi() { return 2; }

const char* gossamer_isa(int32_t i) {
  const auto& all = machine().kernels;
  return i >= 0 && size_t(i) < all.size() ? all[i]->name : nullptr;
}

GossamerLayer* gossamer_layer_new(const float* weight, const float* bias, const int32_t* shape) try {
  auto layer = std::make_unique<GossamerLayer>();
  std::memcpy(&layer->s, shape, sizeof(Shape));
  const Shape& s = layer->s;
  const int64_t row = int64_t(s.in) * s.kh * s.kw;
  layer->starts.push_back(0);
  for (int64_t o = 0; o < s.out; o++) {
    for (int64_t i = 0; i < row; i++) {
      const float value = weight[o * row + i];
      if (value != 0) {  // nan too
        layer->values.push_back(value);
        layer->places.push_back(int32_t(i));
      }
    }
    layer->starts.push_back(int64_t(layer->values.size()));
  }
  layer->values.shrink_to_fit();
  layer->places.shrink_to_fit();
  if (bias) layer->bias.assign(bias, bias + s.out);
  return layer.release();
} catch (const std::exception&) {
  return nullptr;
}

void gossamer_layer_free(GossamerLayer* layer) { delete layer; }

GossamerPlan* gossamer_plan_new(const GossamerLayer* layer, const GossamerUse* use, const char** why) try {
  const Shape& s = layer->s;
  auto p = std::make_unique<GossamerPlan>();
  *why = nullptr;
  p->layer = layer;
  p->images = use->images;
  int64_t height = use->height, width = use->width;
  const Machine& m = machine();
  if (use->isa >= int32_t(m.kernels.size())) {
    *why = "no such instruction set here";
    return nullptr;
  }
  p->kernels = m.kernels[use->isa < 0 ? 0 : use->isa];
  const bool pointwise = s.kh == 1 && s.kw == 1 && s.sy == 1 && s.sx == 1 && !s.py && !s.px;
  if (pointwise && height * width < INT_MAX) {  // one row of pixels, with no seams in it
    width *= height;
    height = 1;
  }
  p->height = int32_t(height);
  p->width = int32_t(width);
  p->out_height = int32_t((height + 2 * s.py - s.dy * (s.kh - 1) - 1) / s.sy + 1);
  p->out_width = int32_t((width + 2 * s.px - s.dx * (s.kw - 1) - 1) / s.sx + 1);
  if (height + 2 * s.py < s.dy * (s.kh - 1) + 1 || width + 2 * s.px < s.dx * (s.kw - 1) + 1) {
    *why = "the kernel is larger than the padded input";
    return nullptr;
  }
  if (pointwise && s.groups == 1 && height * width * p->images < FEW) {
    p->way = Way::TOKENS;
    p->cost = double(layer->values.size()) * double(p->images * width);
    return p.release();
  }
  const Phases phases = phases_of(s);
  p->n_phases = int32_t(phases.all.size());
  for (int32_t c = 0; c < s.in * s.groups; c++)
    for (auto phase : phases.all) p->planes.insert(p->planes.end(), {c, phase[0], phase[1]});
  p->y_first = phases.y_first;
  p->x_first = phases.x_first;
  p->n_dy = phases.y_last - phases.y_first + 1;
  const int32_t halo = phases.x_last - phases.x_first;
  if (s.groups > 1 && s.in == 1 &&
      int64_t(p->out_height + p->n_dy) * s.sy * s.sx * (p->out_width + halo + 16) < INT_MAX) {
    p->way = Way::DEPTHWISE;
    if (use->isa < 0 && m.costs[0] > 1) p->kernels = m.kernels[1];
    plan_planes(*p, phases);
    // Parts begin at lines of the cache, since two threads that write to one wait for each other.
    p->part_rows = p->out_height;
    if ((p->n_phases == 1 || !p->taps.empty()) && p->images < use->threads) {
      const int64_t line = 16 / std::gcd(int64_t(p->out_width), int64_t(16));
      p->part_rows = int32_t(std::min<int64_t>(up(up(p->out_height, use->threads), line) * line, p->out_height));
    }
    p->parts = int32_t(up(p->out_height, p->part_rows));
    const int64_t bytes = int64_t(p->n_phases) * (p->part_rows + p->n_dy - 1) * p->plane_pitch * 4;
    p->together = int32_t(std::max<int64_t>(1, std::min<int64_t>({8, m.l1 / 2 / bytes, s.out})));
    return p.release();
  }
  std::vector<int32_t> columns;
  for (Tap x : phases.xs) columns.push_back(x.offset);
  std::sort(columns.begin(), columns.end());
  p->n_shifts = int32_t(std::unique(columns.begin(), columns.end()) - columns.begin());

  const bool together = p->images == 1 || use->direct & 2;  // images follow each other in a, and in out
  if (pointwise && use->direct & 1 && together && height * width * p->images < INT_MAX) {
    const int64_t pixels = width * p->images;
    const Tile tile = choose_in_place(*p, pixels, use->isa, use->threads);
    adopt(*p, tile, phases);
    p->way = Way::IN_PLACE;
    p->all_vectors = up(pixels, p->kernels->lanes);
    p->width = p->out_width = int32_t(pixels);
    p->write_direct = use->direct & 2;
    if (use->dry) return p.release();
    share_out(*p, groups_for(*p, use->threads, p->across));
    pack(*p, phases, tile.block, 1);
    return p.release();
  }
  const Tile tile = halo > 255 ? Tile{} : choose_tile(*p, phases, use->isa, use->threads);
  if (!tile.kernels) {
    *why = "the kernel is too wide";
    return nullptr;
  }
  adopt(*p, tile, phases);
  p->way = Way::TILES;
  const int64_t plane_vectors = int64_t(p->block_rows()) * p->row_vectors;
  if (plane_vectors > 65535) {
    *why = "the kernel is too high";
    return nullptr;
  }
  if (use->dry) return p.release();
  p->has_gaps = !pointwise || p->tile_images > 1;
  share_out(*p, groups_for(*p, use->threads, p->along * p->across * p->down));
  pack(*p, phases, std::max<int64_t>(1, machine().l1 / (plane_vectors * p->kernels->lanes * 4)), plane_vectors);
  return p.release();
} catch (const std::exception&) {
  *why = "not enough memory";
  return nullptr;
}

void gossamer_plan_free(GossamerPlan* plan) { delete plan; }

double gossamer_plan_cost(const GossamerPlan* plan) { return plan->cost; }

// Dense kernels make 0.85 of the multiplications that there could be, fewer on few pixels, and move what they read into a
// layout of their own; a few tokens take as long as it takes to read the weights.
double gossamer_dense_cost(const GossamerLayer* layer, const GossamerUse* use) {
  const Shape& s = layer->s;
  const double lanes = machine().kernels[0]->lanes / machine().costs[0];
  const double height = std::max(0, (use->height + 2 * s.py - s.dy * (s.kh - 1) - 1) / s.sy + 1);
  const double width = std::max(0, (use->width + 2 * s.px - s.dx * (s.kw - 1) - 1) / s.sx + 1);
  const double pixels = height * width * double(use->images), weights = double(s.out) * s.in * s.kh * s.kw;
  const double efficiency = 0.85 * pixels / (pixels + 24) * std::min(1.0, s.in * s.kh * s.kw / 32.0);
  const double inputs = double(use->images) * s.in * s.groups * use->height * use->width;
  return std::max(weights * pixels / efficiency, 4 * weights) / lanes + 3 * (inputs + pixels * s.out) / lanes;
}

void gossamer_plan_text(const GossamerPlan* p, char* text, int64_t size) {
  const size_t n = size_t(std::max<int64_t>(size, 0));
  switch (p->way) {
    case Way::TOKENS: std::snprintf(text, n, "weight by weight"); return;
    case Way::DEPTHWISE: std::snprintf(text, n, "%s, plane by plane", p->kernels->name); return;
    case Way::IN_PLACE:
      std::snprintf(text, n, "%s, in place, %d vectors, %d planes a block", p->kernels->name, p->row_vectors, p->block_planes);
      return;
    default:
      std::snprintf(text, n, "%s, %d images of %d rows, %d vectors, %d planes a block", p->kernels->name, p->tile_images,
                    p->rows, p->vectors(), p->block_planes);
  }
}
