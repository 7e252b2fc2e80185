// Layers, the plans that fit them to a shape, and running them. What the kernels need is in kernels.h.
#include "gossamer.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "pool.h"

using namespace gossamer;

namespace {

constexpr int64_t L1 = 28 * 1024;  // bytes of a block of planes, so that most of a 32 KiB cache is used
constexpr int MAX_PART = 60000;    // weights between two shifts of a row, counted in 16 bits

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Shape {
  int32_t out, in, kh, kw, groups, sy, sx, py, px, dy, dx;
};

// 64-byte aligned floats, grown and never shrunk.
class Scratch {
 public:
  float* at_least(int64_t n) {
    if (n > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      const size_t bytes = size_t(up(n * 4, 64) * 64);
      if (posix_memalign(reinterpret_cast<void**>(&data_), 64, bytes)) throw std::bad_alloc();
      std::memset(data_, 0, bytes);  // so that what lies beyond a tile is no nan
      size_ = n;
    }
    return data_;
  }
  ~Scratch() { std::free(data_); }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

const Kernels* supported(int32_t i) {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    found.push_back(&avx512::kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernels);
#endif
  found.push_back(&baseline::kernels);
  return i >= 0 && i < int32_t(found.size()) ? found[i] : nullptr;
}

}  // namespace

struct GossamerLayer {
  Shape s;
  std::vector<float> values, bias;
  std::vector<int32_t> places;  // in a row of the weight: (channel of the group, ky, kx)
  std::vector<int64_t> starts;  // of each output channel's values
};

namespace {

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

}  // namespace

struct GossamerPlan {
  const GossamerLayer* layer;
  const Kernels* kernels;
  int32_t height, width, out_height, out_width;
  int32_t row_vectors, rows, columns, across, down;  // of a tile, and how many tiles
  int32_t y_first, n_dy, x_first, n_shifts;          // where a kernel's rows and columns lie, in a phase
  int32_t left, first;  // columns of a block before the tile's first pixel, and where that is in the sums
  std::vector<uint8_t> shifts;
  std::vector<int32_t> planes;  // channel, row phase, column phase
  int32_t block_planes;
  std::vector<Group> groups;
  bool depthwise;  // then there are no groups: each channel meets one input channel, by weights at these offsets
  int32_t n_phases, plane_pitch;
  std::vector<int32_t> plane_offsets;

  int32_t vectors() const { return row_vectors * rows; }
  int32_t pitch() const { return row_vectors * kernels->lanes; }
  int32_t block_rows() const { return rows + n_dy - 1; }
};

namespace {

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
};
Phases phases_of(const Shape& s) {
  Phases p;
  for (int32_t k = 0; k < s.kh; k++) p.ys.push_back(tap(k, s.sy, s.py, s.dy));
  for (int32_t k = 0; k < s.kw; k++) p.xs.push_back(tap(k, s.sx, s.px, s.dx));
  for (Tap y : p.ys) {
    for (Tap x : p.xs) {
      const std::array<int32_t, 2> phase{y.phase, x.phase};
      const auto found = std::find(p.all.begin(), p.all.end(), phase);
      p.of.push_back(int32_t(found - p.all.begin()));
      if (found == p.all.end()) p.all.push_back(phase);
    }
  }
  return p;
}

void list_planes(GossamerPlan& p, const Phases& phases) {
  for (int32_t c = 0; c < p.layer->s.in * p.layer->s.groups; c++)
    for (auto phase : phases.all) p.planes.insert(p.planes.end(), {c, phase[0], phase[1]});
  p.n_phases = int32_t(phases.all.size());
}

// How wide and how high a tile is: as many pixels as registers hold, with the least that is done in vain. Costs are in
// vector operations, as they were found on a Zen 4; elsewhere they are about as much to each other.
bool choose_tile(GossamerPlan& p, const Shape& s, int32_t x_first, int32_t x_last) {
  const double planes = double(p.planes.size()) / 3, out = s.out, nonzero = double(p.layer->values.size());
  const int32_t lanes = p.kernels->lanes, longest = p.kernels->longest;
  const int32_t halo = x_last - x_first;
  double best = 1e300;
  for (int32_t v = 1; v <= longest; v++) {
    const int32_t pitch = v * lanes;
    // A whole row needs no halo of its own: a row's last columns are zero, and stand before the next one's first.
    const bool whole = pitch >= p.out_width + std::max({x_last, -x_first, 0}) && x_first <= 0 && x_last >= 0 &&
                       s.sx * p.out_width >= p.width;
    if (!whole && pitch <= halo) continue;
    const int32_t columns = whole ? p.out_width : std::min(pitch - halo, p.out_width);
    const int32_t across = int32_t(up(p.out_width, columns));
    const int32_t most = std::min(longest / v, p.out_height), down = int32_t(up(p.out_height, most));
    const int32_t rows = int32_t(up(p.out_height, down));
    const int32_t t = v * rows;
    const double block_rows = rows + p.n_dy - 1, blocks = std::max(1.0, planes * block_rows * pitch * 4 / L1);
    const double weights = nonzero * ((t < 7 ? 7 : t) + 2.5);             // a broadcast, an offset, t multiplications
    const double copied = planes * block_rows * (3 + 1.5 * v);            // rows into the block
    const double sums = out * (blocks - 1) * (2 * t + 20);                // kept from block to block
    const double written = out * (30 + rows * (3 + 1.5 * v));             // rows into the output
    const double cost = double(across) * down * (weights + copied + sums + written);
    if (cost < best) {
      best = cost;
      p.row_vectors = v;
      p.rows = rows;
      p.columns = columns;
      p.across = across;
      p.down = down;
      p.left = whole ? 0 : -x_first;
      p.first = p.left + x_last;
    }
  }
  return best < 1e300;
}

void pack(GossamerPlan& p, int32_t n_groups, const Phases& phases) {
  const GossamerLayer& layer = *p.layer;
  const Shape& s = layer.s;
  const int32_t per_group = s.out / s.groups, n_planes = int32_t(p.planes.size() / 3);
  const int64_t plane_vectors = int64_t(p.block_rows()) * p.row_vectors, bytes = plane_vectors * p.kernels->lanes * 4;
  int64_t block = std::max<int64_t>(1, L1 / bytes);
  block = std::min(block, MAX_PART / (int64_t(s.kh) * s.kw) + 1);
  block = std::min(block, 65535 / plane_vectors > 0 ? 65535 / plane_vectors : 1);
  const int64_t n_blocks = up(n_planes, block);
  block = up(n_planes, n_blocks);
  p.block_planes = int32_t(block);

  // Columns that are met, in order; the sums are shifted from one to the next.
  std::vector<int32_t> part_of(s.kw);
  std::vector<int32_t> columns;
  for (Tap x : phases.xs) columns.push_back(x.offset);
  std::sort(columns.begin(), columns.end());
  columns.erase(std::unique(columns.begin(), columns.end()), columns.end());
  for (int32_t x = 0; x < s.kw; x++)
    part_of[x] = int32_t(std::lower_bound(columns.begin(), columns.end(), phases.xs[x].offset) - columns.begin());
  p.n_shifts = int32_t(columns.size());
  for (size_t i = 0; i < columns.size(); i++) p.shifts.push_back(uint8_t(i ? columns[i] - columns[i - 1] : 0));

  // Channels to groups of threads, contiguous and balanced by weights.
  std::vector<int64_t> load(s.out + 1, 0);
  for (int32_t o = 0; o < s.out; o++) load[o + 1] = load[o] + (layer.starts[o + 1] - layer.starts[o]) + 4;
  p.groups.resize(n_groups);
  for (int32_t o = 0; o < s.out; o++) {
    const int64_t middle = (load[o] + load[o + 1]) / 2;
    p.groups[std::min<int64_t>(n_groups - 1, middle * n_groups / load[s.out])].channels.push_back(o);
  }
  struct Entry {
    int32_t part;
    uint16_t offset;
    float value;
  };
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
        const int64_t offset = (plane - b * block) * plane_vectors + row * p.row_vectors;
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

// Each channel by itself: its plane is copied, padded and taken apart by phases, and each weight meets all of it.
void plan_planes(GossamerPlan& p, int32_t x_last, const Phases& phases) {
  const int32_t lanes = p.kernels->lanes, kw = p.layer->s.kw;
  p.plane_pitch = int32_t(up(p.out_width + x_last - p.x_first, lanes)) * lanes;
  const int64_t rows = p.out_height + p.n_dy - 1;
  for (int32_t place : p.layer->places) {
    const int64_t row = phases.of[place] * rows + phases.ys[place / kw].offset - p.y_first;
    p.plane_offsets.push_back(int32_t(row * p.plane_pitch + phases.xs[place % kw].offset - p.x_first));
  }
}

void run_plane(const GossamerStep& step, int64_t item) {
  const GossamerPlan& p = *step.plan;
  const Shape& s = p.layer->s;
  static thread_local Scratch planes;
  const int64_t image = item / s.out, rows = p.out_height + p.n_dy - 1;
  const int32_t o = int32_t(item % s.out), c = o / (s.out / s.groups);
  // Behind the last row, what the kernel reads of rows and columns that it does not write.
  float* to = planes.at_least((p.n_phases * rows + 4) * p.plane_pitch + 8 * p.kernels->lanes);
  Copy copy{};
  copy.in = step.in + image * s.groups * p.height * p.width;
  copy.to = to;
  copy.planes = p.planes.data() + 3 * int64_t(c) * p.n_phases;
  copy.n_planes = p.n_phases;
  copy.in_plane = int64_t(p.height) * p.width;
  copy.height = p.height;
  copy.width = p.width;
  copy.stride_y = s.sy;
  copy.stride_x = s.sx;
  copy.y = p.y_first;
  copy.x = p.x_first;
  copy.rows = int32_t(rows);
  copy.columns = copy.pitch = p.plane_pitch;
  p.kernels->copy(copy);
  const int64_t plane = int64_t(p.out_height) * p.out_width, at = image * s.out * plane, first = p.layer->starts[o];
  Plane a{};
  a.x = to;
  a.weights = p.layer->values.data() + first;
  a.offsets = p.plane_offsets.data() + first;
  a.n = int32_t(p.layer->starts[o + 1] - first);
  a.pitch = p.plane_pitch;
  a.channel = o;
  a.write.out = step.out + at;
  a.write.residual = step.residual ? step.residual + at : nullptr;
  a.write.bias = p.layer->bias.empty() ? nullptr : p.layer->bias.data();
  a.write.plane = plane;
  a.write.pitch = p.out_width;
  a.write.rows = p.out_height;
  a.write.columns = p.out_width;
  a.write.activation = step.activation;
  a.write.add_last = step.add_last;
  p.kernels->plane(a);
}

void run_item(const GossamerStep& step, int64_t item) {
  const GossamerPlan& p = *step.plan;
  const Shape& s = p.layer->s;
  static thread_local Scratch planes, sums;
  const int64_t n_groups = int64_t(p.groups.size());
  const Group& group = p.groups[item % n_groups];
  item /= n_groups;
  const int32_t across = int32_t(item % p.across);
  item /= p.across;
  const int32_t down = int32_t(item % p.down);
  const int64_t image = item / p.down;
  if (group.channels.empty()) return;

  const int32_t y = down * p.rows, x = across * p.columns, pitch = p.pitch();
  const int64_t in_plane = int64_t(p.height) * p.width, out_plane = int64_t(p.out_height) * p.out_width;
  const int64_t block_floats = int64_t(p.block_planes) * p.block_rows() * pitch;
  float* block_data = planes.at_least(block_floats + int64_t(p.vectors() + 1) * p.kernels->lanes);

  Copy copy{};
  copy.in = step.in + image * s.in * s.groups * in_plane;
  copy.to = block_data;
  copy.in_plane = in_plane;
  copy.height = p.height;
  copy.width = p.width;
  copy.stride_y = s.sy;
  copy.stride_x = s.sx;
  copy.y = y + p.y_first;
  copy.x = x - p.left;
  copy.rows = p.block_rows();
  copy.pitch = pitch;
  copy.columns = p.left || p.across > 1 ? pitch : std::min(pitch, p.out_width + std::max(p.first, 0));

  Rows rows{};
  rows.x = block_data;
  rows.channels = group.channels.data();
  rows.shifts = p.shifts.data();
  rows.n_shifts = p.n_shifts;
  rows.sums = group.blocks.size() > 1 ? sums.at_least(int64_t(group.channels.size()) * p.vectors() * p.kernels->lanes)
                                      : block_data;
  const int64_t at = image * s.out * out_plane + int64_t(y) * p.out_width + x;
  Writer& write = rows.write;
  write.out = step.out + at;
  write.residual = step.residual ? step.residual + at : nullptr;
  write.bias = p.layer->bias.empty() ? nullptr : p.layer->bias.data();
  write.plane = out_plane;
  write.pitch = p.out_width;
  write.rows = std::min(p.rows, p.out_height - y);
  write.columns = std::min(p.columns, p.out_width - x);
  write.tile_pitch = pitch;
  write.first = p.first;
  write.activation = step.activation;
  write.add_last = step.add_last;

  for (const Block& block : group.blocks) {
    copy.planes = p.planes.data() + 3 * int64_t(block.plane);
    copy.n_planes = block.n_planes;
    p.kernels->copy(copy);
    rows.weights = block.weights.data();
    rows.offsets = block.offsets.data();
    rows.counts = block.counts.data();
    rows.rows = block.rows.data();
    rows.n_rows = int32_t(block.rows.size());
    p.kernels->rows(p.vectors(), rows);
  }
}

}  // namespace

int32_t gossamer_abi() { return 1; }

const char* gossamer_isa(int32_t i) {
  const Kernels* kernels = supported(i);
  return kernels ? kernels->name : nullptr;
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

GossamerPlan* gossamer_plan_new(
    const GossamerLayer* layer, int64_t images, int32_t height, int32_t width, int32_t threads, int32_t isa,
    const char** why) try {
  const Shape& s = layer->s;
  auto p = std::make_unique<GossamerPlan>();
  *why = nullptr;
  p->layer = layer;
  p->kernels = supported(isa);
  if (!p->kernels) {
    *why = "no such instruction set here";
    return nullptr;
  }
  const bool pointwise = s.kh == 1 && s.kw == 1 && s.sy == 1 && s.sx == 1 && !s.py && !s.px;
  if (pointwise && int64_t(height) * width < INT_MAX) {  // one row of pixels, with no seams in it
    width *= height;
    height = 1;
  }
  p->height = height;
  p->width = width;
  p->out_height = (height + 2 * s.py - s.dy * (s.kh - 1) - 1) / s.sy + 1;
  p->out_width = (width + 2 * s.px - s.dx * (s.kw - 1) - 1) / s.sx + 1;
  if (height + 2 * s.py < s.dy * (s.kh - 1) + 1 || width + 2 * s.px < s.dx * (s.kw - 1) + 1) {
    *why = "the kernel is larger than the padded input";
    return nullptr;
  }
  int32_t y_last = INT_MIN, x_first = INT_MAX, x_last = INT_MIN;
  p->y_first = INT_MAX;
  const Phases phases = phases_of(s);
  for (Tap y : phases.ys) {
    p->y_first = std::min(p->y_first, y.offset);
    y_last = std::max(y_last, y.offset);
  }
  for (Tap x : phases.xs) {
    x_first = std::min(x_first, x.offset);
    x_last = std::max(x_last, x.offset);
  }
  list_planes(*p, phases);
  p->n_dy = y_last - p->y_first + 1;
  p->x_first = x_first;
  p->depthwise = s.groups > 1 && s.in == 1 &&
                 int64_t(p->out_height + p->n_dy) * s.sy * s.sx * (p->out_width + x_last - x_first + 16) < INT_MAX;
  if (p->depthwise) {
    plan_planes(*p, x_last, phases);
    return p.release();
  }
  if (x_last - x_first > 255 || !choose_tile(*p, s, x_first, x_last)) {
    *why = "the kernel is too wide";
    return nullptr;
  }
  if (int64_t(p->block_rows()) * p->row_vectors > 65535) {
    *why = "the kernel is too high";
    return nullptr;
  }
  // As few groups of channels as share out evenly, since each copies its blocks anew.
  const int64_t tiles = images * p->across * p->down;
  int32_t groups = 1;
  while (threads > 1 && groups < s.out && tiles * groups < 6 * threads && (tiles * groups) % threads) groups++;
  pack(*p, groups, phases);
  return p.release();
} catch (const std::exception&) {
  *why = "not enough memory";
  return nullptr;
}

void gossamer_plan_free(GossamerPlan* plan) { delete plan; }

int32_t gossamer_run(const GossamerStep* steps, int64_t n, int32_t threads) {
  std::atomic<int32_t> failed{0};
  for (int64_t i = 0; i < n; i++) {
    const GossamerStep& step = steps[i];
    const GossamerPlan& p = *step.plan;
    const int64_t items = step.images * (p.depthwise ? p.layer->s.out : p.across * p.down * int64_t(p.groups.size()));
    share(items, threads, [&](int64_t item) {
      try {
        p.depthwise ? run_plane(step, item) : run_item(step, item);
      } catch (const std::bad_alloc&) {
        failed.store(1);
      }
    });
    if (failed.load()) return 1;
  }
  return 0;
}

int32_t gossamer_run_tokens(
    const GossamerLayer* layer, const float* in, float* out, int64_t tokens, int32_t activation, int32_t threads) {
  const Shape& s = layer->s;
  const int64_t rows = 64;
  const Kernels* kernels = supported(0);
  share(up(s.out, rows), threads, [&](int64_t item) {
    Tokens t{};
    t.weights = layer->values.data();
    t.places = layer->places.data();
    t.starts = layer->starts.data();
    t.bias = layer->bias.empty() ? nullptr : layer->bias.data();
    t.in = in;
    t.out = out;
    t.in_features = s.in;
    t.out_features = s.out;
    t.first = item * rows;
    t.last = std::min<int64_t>(s.out, t.first + rows);
    t.tokens = int32_t(tokens);
    t.activation = activation;
    kernels->tokens(t);
  });
  return 0;
}

int32_t gossamer_max_pool(const float* in, float* out, int64_t planes, const int32_t* shape, int32_t threads) {
  std::atomic<int32_t> failed{0};
  const Kernels* kernels = supported(0);
  // Some planes to an item, since one may be small.
  const int64_t each = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, int64_t(shape[0]) * shape[1]));
  share(up(planes, each), threads, [&](int64_t item) {
    static thread_local Scratch row;
    try {
      Pool p{};
      p.row = row.at_least(shape[1] + 64);
      std::memcpy(&p.height, shape, 10 * sizeof(int32_t));
      for (int64_t i = item * each; i < std::min(planes, (item + 1) * each); i++) {
        p.in = in + i * shape[0] * shape[1];
        p.out = out + i * shape[2] * shape[3];
        kernels->max_pool(p);
      }
    } catch (const std::bad_alloc&) {
      failed.store(1);
    }
  });
  return failed.load();
}
