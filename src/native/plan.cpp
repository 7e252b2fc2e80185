// Layers, and the plans that fit them to a shape: which way it is taken, and what each of them needs to know.
#include "plan.h"

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>

#include "fit.h"

using namespace gossamer;

namespace {

constexpr int64_t FEW = 8;  // tokens below which a vector would be mostly empty

// Whether each of the threads would have less than a page of a plane: what the processor fetches ahead of it is then another
// thread's, and lines go to and fro.
bool are_small(int64_t pixels, int32_t threads) {
  return threads > 1 && pixels * int64_t(sizeof(float)) < int64_t(threads) * 4096;
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

// The sizes, and whether there is any output.
bool fits(GossamerPlan& p, const GossamerUse& use) {
  const Shape& s = p.layer->s;
  const int64_t down = use.height + 2 * int64_t(s.py) - int64_t(s.dy) * (s.kh - 1) - 1;
  const int64_t across = use.width + 2 * int64_t(s.px) - int64_t(s.dx) * (s.kw - 1) - 1;
  p.height = use.height;
  p.width = use.width;
  p.out_height = int32_t(down / s.sy + 1);
  p.out_width = int32_t(across / s.sx + 1);
  return down >= 0 && across >= 0;
}

// Each channel by itself: its plane is copied, padded and taken apart by phases, and each weight meets all of it.
void plan_planes(GossamerPlan& p, const Phases& phases) {
  const int32_t lanes = p.kernels->lanes, kw = p.layer->s.kw;
  const Shape& s = p.layer->s;
  // Of two phases half of what is copied would not be met again; of one, all is, and a mask costs more than a copy, but
  // where each row is read once.
  p.by_rows = s.kh == 3 && s.kw == 3 && s.sy == s.sx && s.sx <= 2 && s.dy == 1 && s.dx == 1 &&
              p.layer->values.size() == size_t(s.out) * 9;
  if (p.kernels->plane_in_place && (p.by_rows || (s.sx == 2 && s.kh * s.kw <= 64))) {
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

int32_t gossamer_abi() { return 3; }

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
  auto p = std::make_unique<GossamerPlan>();
  *why = nullptr;
  p->layer = layer;
  p->images = use->images;
  const Machine& m = machine();
  if (use->isa >= int32_t(m.kernels.size())) {
    *why = "no such instruction set here";
    return nullptr;
  }
  p->kernels = m.kernels[use->isa < 0 ? 0 : use->isa];
  if (!fits(*p, *use)) {
    *why = "the kernel is larger than the padded input";
    return nullptr;
  }
  if ((p->less = without_unmet(*p))) p->layer = p->less.get();
  const Shape& s = p->layer->s;
  const bool one_pixel = p->height == 1 && p->width == 1 && p->out_height == 1 && p->out_width == 1;
  const bool pointwise = s.kh == 1 && s.kw == 1 && !s.py && !s.px && (one_pixel || (s.sy == 1 && s.sx == 1));
  const int64_t pixels = int64_t(p->height) * p->width * p->images;
  if (pointwise && pixels / p->images < INT_MAX) {  // one row of pixels, with no seams in it
    p->width = p->out_width = p->height * p->width;
    p->height = p->out_height = 1;
  }
  if (pointwise && s.groups == 1 && pixels < FEW) {
    p->way = Way::TOKENS;
    p->cost = double(pixels) * (2.4 * double(p->layer->values.size()) + 50.0 * s.out);
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
    p->by_channels = use->direct & 4 && are_small(int64_t(p->out_height) * p->out_width, use->threads);
    if ((p->n_phases == 1 || !p->taps.empty()) && p->images < use->threads && !p->by_channels) {
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
  if (pointwise && use->direct & 1 && together && pixels < INT_MAX) {
    p->by_channels = use->direct & 4 && are_small(pixels, use->threads);
    const Tile tile = choose_in_place(*p, pixels, use->isa, use->threads);
    adopt(*p, tile, phases);
    p->way = Way::IN_PLACE;
    p->all_vectors = up(pixels, p->kernels->lanes);
    p->width = p->out_width = int32_t(pixels);
    p->write_direct = use->direct & 2;
    if (use->dry) return p.release();
    share_out(*p, p->by_channels ? std::min(use->threads, s.out) : groups_for(*p, use->threads, p->across));
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

void gossamer_plan_text(const GossamerPlan* p, char* text, int64_t size) {
  const size_t n = size_t(std::max<int64_t>(size, 0));
  switch (p->way) {
    case Way::TOKENS: std::snprintf(text, n, "weight by weight"); return;
    case Way::DEPTHWISE:
      std::snprintf(text, n, "%s, plane by plane%s", p->kernels->name,
                    p->taps.empty() ? "" : p->by_rows ? ", row by row" : ", in place");
      return;
    case Way::IN_PLACE:
      std::snprintf(text, n, "%s, in place, %d vectors, %d planes a block", p->kernels->name, p->row_vectors, p->block_planes);
      return;
    default:
      std::snprintf(text, n, "%s, %d images of %d rows, %d vectors, %d planes a block", p->kernels->name, p->tile_images,
                    p->rows, p->vectors(), p->block_planes);
  }
}
