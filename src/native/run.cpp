// Runs steps one after the other, each shared out to threads.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "plan.h"
#include "pool.h"

using namespace gossamer;

namespace {

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

struct Place {
  float* data;  // null: there is none
  View view;
};
Place place(const GossamerValue& v, float* const* buffers) {
  return {v.buffer < 0 ? nullptr : buffers[v.buffer] + v.at, {v.view.channel, v.view.image}};
}

const float* at(const Place& p, int64_t image, int64_t channel) {
  return p.data + image * p.view.image + channel * p.view.channel;
}
float* into(const Place& p, int64_t image, int64_t channel) {
  return p.data + image * p.view.image + channel * p.view.channel;
}

// A step, with its tensors found.
struct Run {
  const GossamerStep& step;
  Place a, b, out;
};

Writer writer(const Run& run, int64_t image, int64_t at) {
  const GossamerPlan& p = *run.step.plan;
  Writer w{};
  w.out = run.out.data + image * run.out.view.image + at;
  w.residual = run.b.data ? run.b.data + image * run.b.view.image + at : nullptr;
  w.view = run.out.view;
  w.residual_view = run.b.view;
  w.bias = p.layer->bias.empty() ? nullptr : p.layer->bias.data();
  w.pitch = p.out_width;
  w.images = 1;
  w.activation = run.step.activation;
  w.add_last = run.step.add_last;
  return w;
}

Copy copy_of(const Run& run, int64_t image) {
  const GossamerPlan& p = *run.step.plan;
  Copy copy{};
  copy.in = run.a.data + image * run.a.view.image;
  copy.view = run.a.view;
  copy.height = p.height;
  copy.width = p.width;
  copy.stride_y = p.layer->s.sy;
  copy.stride_x = p.layer->s.sx;
  copy.images = 1;
  return copy;
}

void run_planes(const Run& run, int64_t item) {
  const GossamerPlan& p = *run.step.plan;
  const auto& s = p.layer->s;
  static thread_local Scratch planes;
  const int64_t runs = up(s.out, p.together);
  const int32_t begin = int32_t(item % runs) * p.together, end = std::min(begin + p.together, s.out);
  const int32_t part = int32_t(item / runs % p.parts), per_channel = s.out / s.groups;
  const int64_t image = item / runs / p.parts;
  const int32_t top = part * p.part_rows, bottom = std::min(top + p.part_rows, p.out_height);
  const float* weights = p.layer->values.data();
  const int64_t* starts = p.layer->starts.data();
  Writer write = writer(run, image, int64_t(top) * p.out_width);
  write.rows = bottom - top;
  write.columns = p.out_width;
  if (!p.taps.empty()) {
    for (int32_t o = begin; o < end; o++)
      p.kernels->plane_in_place({at(run.a, image, o / per_channel), weights + starts[o], p.taps.data() + 2 * starts[o],
                                 int32_t(starts[o + 1] - starts[o]), p.height, p.width, s.sy, s.sx, top, o, write,
                                 p.by_rows});
    return;
  }
  // Behind the last row, what the kernel reads of rows and columns that it does not write.
  const int64_t rows = write.rows + p.n_dy - 1, size = (p.n_phases * rows + 4) * p.plane_pitch + 8 * p.kernels->lanes;
  float* scratch = planes.at_least(size * p.together);
  Copy copy = copy_of(run, image);
  copy.fill = 1;
  copy.n_planes = p.n_phases;
  copy.y = top + p.y_first;
  copy.x = p.x_first;
  copy.rows = int32_t(rows);
  copy.columns = copy.pitch = p.plane_pitch;
  for (int32_t o = begin; o < end; o++) {
    copy.to = scratch + (o - begin) * size;
    copy.planes = p.planes.data() + 3 * int64_t(o / per_channel) * p.n_phases;
    p.kernels->copy(copy);
  }
  for (int32_t o = begin; o < end; o++)
    p.kernels->plane({scratch + (o - begin) * size, weights + starts[o], p.plane_offsets.data() + starts[o],
                      int32_t(starts[o + 1] - starts[o]), p.plane_pitch, o, write});
}

Rows rows_of(const GossamerPlan& p, const Group& group) {
  Rows rows{};
  rows.channels = group.channels.data();
  rows.shifts = p.shifts.data();
  rows.n_shifts = p.n_shifts;
  return rows;
}

void run_block(const GossamerPlan& p, const Block& block, int32_t vectors, Rows& rows) {
  rows.weights = block.weights.data();
  rows.offsets = block.offsets.data();
  rows.counts = block.counts.data();
  rows.rows = block.rows.data();
  rows.n_rows = int32_t(block.rows.size());
  p.kernels->rows(vectors, rows);
}

void run_in_place(const Run& run, int64_t item) {
  const GossamerPlan& p = *run.step.plan;
  static thread_local Scratch sums;
  const int64_t n_groups = int64_t(p.groups.size());
  const Group& group = p.groups[p.by_channels ? item / p.across : item % n_groups];
  if (group.channels.empty()) return;
  const int64_t tile = p.by_channels ? item % p.across : item / n_groups, at = tile * p.row_vectors * p.kernels->lanes;
  const int32_t vectors = int32_t(std::min<int64_t>(p.row_vectors, p.all_vectors - tile * p.row_vectors));
  Rows rows = rows_of(p, group);
  rows.unit = run.a.view.channel;
  rows.sums = group.blocks.size() > 1 ? sums.at_least(int64_t(group.channels.size()) * vectors * p.kernels->lanes) : run.a.data;
  rows.write = writer(run, 0, at);
  rows.write.rows = 1;
  rows.write.columns = int32_t(std::min<int64_t>(int64_t(vectors) * p.kernels->lanes, p.out_width - at));
  rows.write.direct = p.write_direct;
  for (const Block& block : group.blocks) {
    rows.x = run.a.data + block.plane * run.a.view.channel + at;
    run_block(p, block, vectors, rows);
  }
}

void run_tile(const Run& run, int64_t item) {
  const GossamerPlan& p = *run.step.plan;
  static thread_local Scratch planes, sums;
  const int64_t n_groups = int64_t(p.groups.size());
  const Group& group = p.groups[item % n_groups];
  item /= n_groups;
  const int32_t across = int32_t(item % p.across);
  item /= p.across;
  const int32_t down = int32_t(item % p.down);
  const int64_t image = item / p.down * p.tile_images;
  if (group.channels.empty()) return;

  const int32_t y = down * p.rows, x = across * p.columns, pitch = p.pitch();
  const int64_t block_floats = int64_t(p.block_planes) * p.block_rows() * pitch;
  float* block_data = planes.at_least(block_floats + int64_t(p.vectors() + 1) * p.kernels->lanes);

  Copy copy = copy_of(run, image);
  copy.to = block_data;
  copy.y = y + p.y_first;
  copy.x = x - p.left;
  copy.images = int32_t(std::min<int64_t>(p.tile_images, p.images - image));
  copy.image_pitch = p.image_pitch;
  copy.rows = p.block_rows();
  copy.pitch = pitch;
  copy.columns = p.left || p.across > 1 ? pitch : std::min(pitch, p.out_width + std::max(p.first, 0));
  copy.fill = p.has_gaps && p.tile_images == 1;

  Rows rows = rows_of(p, group);
  rows.x = block_data;
  rows.unit = p.kernels->lanes;
  rows.sums = group.blocks.size() > 1 ? sums.at_least(int64_t(group.channels.size()) * p.vectors() * p.kernels->lanes)
                                      : block_data;
  rows.write = writer(run, image, int64_t(y) * p.out_width + x);
  rows.write.images = copy.images;
  rows.write.image_pitch = p.image_pitch;
  rows.write.rows = std::min(p.rows, p.out_height - y);
  rows.write.columns = std::min(p.columns, p.out_width - x);
  rows.write.tile_pitch = pitch;
  rows.write.first = p.first;
  // Blocks fill the same places, unless a place is of another phase in the next.
  const bool anew = p.block_planes % p.n_phases != 0;
  for (const Block& block : group.blocks) {
    if (p.has_gaps && !copy.fill && (anew || &block == &group.blocks.front())) std::memset(block_data, 0, size_t(block_floats) * sizeof(float));
    copy.planes = p.planes.data() + 3 * int64_t(block.plane);
    copy.n_planes = block.n_planes;
    p.kernels->copy(copy);
    run_block(p, block, p.vectors(), rows);
  }
}

void run_tokens(const Run& run, int64_t item) {
  const GossamerLayer& layer = *run.step.plan->layer;
  constexpr int64_t ROWS = 64;
  Tokens t{};
  t.weights = layer.values.data();
  t.places = layer.places.data();
  t.starts = layer.starts.data();
  t.bias = layer.bias.empty() ? nullptr : layer.bias.data();
  t.first = item * ROWS;
  t.last = std::min<int64_t>(layer.s.out, t.first + ROWS);
  // A residual is added afterwards, and what follows it too.
  const bool more = run.b.data != nullptr;
  t.activation = more && !run.step.add_last ? NONE : run.step.activation;
  const Kernels& kernels = *run.step.plan->kernels;
  const int64_t pixels = int64_t(run.step.height) * run.step.width;
  for (int64_t image = 0; image < run.step.images; image++) {
    t.in = at(run.a, image, 0);
    t.out = into(run.out, image, 0);
    t.in_view = {run.a.view.channel, 1};
    t.out_view = {run.out.view.channel, 1};
    t.tokens = int32_t(pixels);
    kernels.tokens(t);
    for (int64_t o = t.first; more && o < t.last; o++) {
      float* out = into(run.out, image, o);
      kernels.add({out, at(run.b, image, o), out, pixels, run.step.add_last ? NONE : run.step.activation});
    }
  }
}

const Kernels& kernels_of(const GossamerStep& s) {
  const auto& all = machine().kernels;
  return *all[std::min(size_t(std::max(s.isa, 0)), all.size() - 1)];
}

// Some planes to an item, since one may be small.
struct Planes {
  int64_t all, each;
  Planes(const GossamerStep& s, int64_t floats)
      : all(s.images * s.channels), each(std::max<int64_t>(1, 16384 / std::max<int64_t>(1, floats))) {}
  int64_t items() const { return up(all, each); }
  template <class F>
  void of(int64_t item, const GossamerStep& s, F use) const {
    for (int64_t i = item * each; i < std::min(all, (item + 1) * each); i++) use(i / s.channels, i % s.channels);
  }
};
void run_plane_step(const Run& run, int64_t item) {
  const GossamerStep& s = run.step;
  const Kernels& kernels = kernels_of(s);
  const int64_t pixels = int64_t(s.height) * s.width;
  Planes(s, pixels).of(item, s, [&](int64_t image, int64_t channel) {
    const float* in = at(run.a, image, channel);
    float* out = into(run.out, image, channel);
    switch (s.kind) {
      case GOSSAMER_MAX_POOL: {
        static thread_local Scratch row;
        Pool pool{in, out, row.at_least(s.width + 64), s.height, s.width, s.out_height, s.out_width, s.window[0], s.window[1],
                  s.window[2], s.window[3], s.window[4], s.window[5]};
        return kernels.max_pool(pool);
      }
      case GOSSAMER_MEAN:
        *out = kernels.sum(in, pixels) / float(pixels);
        return;
      case GOSSAMER_SCALE:
        return kernels.scale({in, at(run.b, image, channel), out, pixels, NONE});
      case GOSSAMER_ADD:
        return kernels.add({in, run.b.data ? at(run.b, image, channel) : nullptr, out, pixels, s.activation});
      default:
        std::memcpy(out, in, size_t(pixels) * sizeof(float));
    }
  });
}

// A copy between tokens by features and features by tokens.
bool is_turn(const GossamerStep& s) {
  return s.kind == GOSSAMER_COPY && s.height * int64_t(s.width) == 1 && s.a.view.channel != s.out.view.channel &&
         (s.a.view.channel == 1) != (s.out.view.channel == 1);
}

void run_turn(const Run& run, int64_t item, int64_t each) {
  const GossamerStep& s = run.step;
  const bool to_features = run.a.view.channel == 1;  // in: [images, channels]
  const int64_t all = to_features ? s.channels : s.images, from = item * each, n = std::min(each, all - from);
  Turn t{};
  t.in_pitch = to_features ? run.a.view.image : run.a.view.channel;
  t.out_pitch = to_features ? run.out.view.channel : run.out.view.image;
  t.in = run.a.data + from;
  t.out = run.out.data + from * t.out_pitch;
  t.rows = int32_t(to_features ? s.images : s.channels);
  t.columns = int32_t(n);
  kernels_of(s).turn(t);
}

void run_layer(const Run& run, int64_t item) {
  switch (run.step.plan->way) {
    case Way::DEPTHWISE: return run_planes(run, item);
    case Way::TOKENS: return run_tokens(run, item);
    case Way::IN_PLACE: return run_in_place(run, item);
    default: return run_tile(run, item);
  }
}

void run_steps(const GossamerRun& all, float* const* buffers, int threads, std::atomic<int32_t>& failed) {
  for (int64_t i = 0; i < all.n_steps && !failed.load(); i++) {
    const GossamerStep& s = all.steps[i];
    const auto began = std::chrono::steady_clock::now();
    const Run run{s, place(s.a, buffers), place(s.b, buffers), place(s.out, buffers)};
    const bool turn = is_turn(s);
    constexpr int64_t EACH = 64;
    const int64_t items = s.kind == GOSSAMER_LAYER ? s.plan->items()
                          : turn ? up(run.a.view.channel == 1 ? s.channels : s.images, EACH)
                                 : Planes(s, int64_t(s.height) * s.width).items();
    share(items, threads, [&](int64_t item, int) {
      try {
        if (s.kind == GOSSAMER_LAYER) run_layer(run, item);
        else if (turn) run_turn(run, item, EACH);
        else run_plane_step(run, item);
      } catch (const std::bad_alloc&) {
        failed.store(1);
      }
    }, all.team != 0);
    if (all.seconds) all.seconds[i] = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  }
}

}  // namespace

int32_t gossamer_run(const GossamerRun* run) {
  std::atomic<int32_t> failed{0};
  if (run->batches == 1) {
    run_steps(*run, run->buffers, run->threads, failed);
    return failed.load();
  }
  share(run->batches, run->threads, [&](int64_t batch, int worker) {
    try {
      std::vector<float*> buffers(size_t(run->n_buffers));
      for (int64_t i = 0; i < run->n_buffers; i++) buffers[i] = run->buffers[i] + (i ? batch : worker) * run->strides[i];
      run_steps(*run, buffers.data(), 1, failed);
    } catch (const std::bad_alloc&) {
      failed.store(1);
    }
  }, run->team != 0);
  return failed.load();
}
