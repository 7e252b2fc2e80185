// A layer's weights as its plan has them: shared out to threads, block by block, in the order in which they are met.
#include <algorithm>

#include "fit.h"

namespace gossamer {
namespace {

constexpr int MAX_PART = 60000;  // weights between two shifts of a row, counted in 16 bits

struct Entry {
  int32_t part;
  uint16_t offset;
  float value;
};

// Where weights are met several at a time, the last of a part is made of as many halves and quarters as fill up the count.
void even(Block& block, uint16_t& count, int32_t ways) {
  const float value = block.weights.back(), quarter = value / 4;
  if (count % ways == 0 || quarter * 4 != value) return;  // or not as exact
  const uint16_t offset = block.offsets.back();
  block.weights.pop_back();
  const int32_t missing = ways - count % ways;
  const float split[3][4] = {{value / 2, value / 2}, {value / 2, quarter, quarter}, {quarter, quarter, quarter, quarter}};
  for (int32_t i = 0; i <= missing; i++) {
    block.weights.push_back(split[missing - 1][i]);
    if (i) block.offsets.push_back(offset);
  }
  count = uint16_t(count + missing);
}

}  // namespace

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
        for (size_t j = 0; j < row.size(); j++) {
          const Entry& e = row[j];
          counts[e.part]++;
          out.weights.push_back(e.value);
          out.offsets.push_back(e.offset);
          if (j + 1 == row.size() || row[j + 1].part != e.part) even(out, counts[e.part], ways_of(p.vectors()));
        }
        out.counts.insert(out.counts.end(), counts.begin(), counts.end());
        out.rows.push_back(uint32_t(i) | (first[i] == b ? FIRST : 0) | (last[i] == b ? LAST : 0));
      }
      if (!out.rows.empty()) group.blocks.push_back(std::move(out));
      for (auto& row : entries[b]) std::vector<Entry>().swap(row);
    }
  }
}

}  // namespace gossamer
