// Selection in few passes over the weights: masking and looking for the threshold in one, cutting and masking in another.
// The loops are in sweep.cpp. The twin is in Python: rules/selection.py, and zero_masked in masks.py.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "gossamer.h"
#include "isa.h"
#include "order.h"
#include "pool.h"
#include "scores.h"
#include "sweep.h"

namespace gossamer {
namespace {

constexpr int64_t ITEM = 4 * PIECE;  // what a thread takes at a time
constexpr int64_t SMALL = 1 << 15;   // so few units are all ordered
constexpr int64_t SAMPLE = 1 << 12;  // at least

const Loops* loops_of(int32_t i) {
  if (i < 0 || i >= isas().n) return nullptr;
#if defined(__x86_64__)
  switch (isas().best_first[i]) {
    case Isa::AVX512: case Isa::AVX512_256: return &avx512::loops;  // of 256 bits too, which makes no difference here
    case Isa::AVX2: return &avx2::loops;
    case Isa::BASELINE: break;
  }
#endif
  return &baseline::loops;
}

bool fits(const GossamerSweep& s) {
  for (int32_t t = 0; t < s.n_tensors; t++)
    if (s.sizes[t] != 1 && s.sizes[t] != 2 && s.sizes[t] != 4 && s.sizes[t] != 8) return false;
  return (s.keep || !s.n) && s.n >= 0 && s.kind >= 0 && s.kind < N_KINDS;
}

// Which of a layer's tensors its scores are read from; -1 for none.
int32_t own_tensor(const GossamerSweep& s) {
  for (int32_t t = 0; t < s.n_tensors; t++)
    if (s.tensors[t] == s.scores && s.sizes[t] == SIZE[s.kind]) return t;
  return -1;
}

// A piece of a layer, and what was found in it.
struct Item {
  int32_t layer;
  int64_t start, n;
  Seen seen{0, 0};
  std::vector<uint32_t> places;  // from the start
  std::vector<int64_t> keys;
};

struct Job {
  GossamerSweep* layers;
  int64_t n_layers, need;
  int32_t threads;
  const Loops& loops;
  std::vector<Item> items;
  double lower = -INF, upper = INF;  // the bracket
  int64_t settled = 0, found = 0;    // below it, and in it
  bool is_finite = true;             // are all magnitudes

  Job(GossamerSweep* layers, int64_t n_layers, int64_t need, int32_t threads, const Loops& loops)
      : layers(layers), n_layers(n_layers), need(need), threads(threads), loops(loops) {
    for (int64_t l = 0; l < n_layers; l++)
      for (int64_t i = 0; i < layers[l].n; i += ITEM) {
        items.emplace_back();
        items.back().layer = int32_t(l);
        items.back().start = i;
        items.back().n = std::min(ITEM, layers[l].n - i);
      }
  }

  void zero(const GossamerSweep& s, int64_t start, int64_t n, int32_t without = -1) const {
    for (int32_t t = 0; t < s.n_tensors; t++)
      if (t != without) loops.zero[__builtin_ctz(unsigned(s.sizes[t]))](
          s.keep + start, static_cast<char*>(s.tensors[t]) + start * s.sizes[t], n);
  }

  template <class F>
  void each_item(F work) {
    share(int64_t(items.size()), items.size() > 4 ? threads : 1, [&](int64_t i, int) { work(items[size_t(i)]); }, true);
  }

  template <class F>
  static void each_piece(const Item& item, F work) {
    const int64_t end = item.start + item.n;
    for (int64_t i = item.start; i < end; i += PIECE) work(i, std::min(PIECE, end - i));
  }

  void zero_all() {
    each_item([&](Item& item) {
      each_piece(item, [&](int64_t start, int64_t n) { zero(layers[item.layer], start, n); });
    });
  }

  // Zeroes what is masked, and finds the kept scores from low (which is in) to high (which is not, unless infinite).
  bool scan(double low, double high) {
    std::vector<Bound> under, inside;
    for (int64_t l = 0; l < n_layers; l++) {
      under.push_back(before(layers[l].kind, low));
      inside.push_back(high == INF ? up_to(layers[l].kind, INF) : before(layers[l].kind, high));
    }
    std::atomic<bool> is_short{false};
    each_item([&](Item& item) {
      const GossamerSweep& s = layers[item.layer];
      const bool all = s.n_kept == s.n;
      item.seen = {0, 0};
      item.places.clear();
      item.keys.clear();
      uint16_t here[PIECE + SLACK];
      try {  // no exception may leave a thread of the pool
        each_piece(item, [&](int64_t start, int64_t n) {
          if (!all) zero(s, start, n);
          const char* scores = static_cast<const char*>(s.scores) + start * SIZE[s.kind];
          const int64_t found = loops.scan[LOOP[s.kind]](
              scores, all ? nullptr : s.keep + start, n, under[size_t(item.layer)], inside[size_t(item.layer)], here,
              &item.seen);
          const size_t before = item.places.size();
          item.places.resize(before + size_t(found));
          item.keys.resize(before + size_t(found));
          uint32_t* places = item.places.data() + before;
          int64_t* keys = item.keys.data() + before;
          with_scores(s, [&](auto read) {  // while they are in the cache
            for (int64_t k = 0; k < found; k++) {
              places[k] = uint32_t(start - item.start) + here[k];
              keys[k] = key_of(read(start + here[k]));
            }
          });
        });
      } catch (const std::bad_alloc&) {
        is_short = true;
      }
    });
    if (is_short) throw std::bad_alloc();
    lower = low, upper = high;
    settled = found = 0;
    for (const Item& item : items) {
      settled += item.seen.settled, found += int64_t(item.keys.size());
      is_finite = is_finite && item.seen.most < INFINITE[layers[item.layer].kind];
    }
    return settled <= need && need <= settled + found;
  }

  // As in rules/selection.py: a bracket that the threshold is in, by the hint, or where it probably, almost surely, surely
  // is. Whether there is one.
  bool find(double hint) {
    if (hint == hint && scan(-INF, hint)) return true;
    int64_t total = 0, n_kept = 0;
    for (int64_t l = 0; l < n_layers; l++) total += layers[l].n, n_kept += layers[l].n_kept;
    if (total > SMALL) {
      const std::vector<int64_t> keys = sample(total);
      const double n = double(keys.size()), q = double(need) / double(std::max<int64_t>(1, n_kept));
      if (keys.empty()) return scan(-INF, INF);
      auto each = [&](auto&& use) {
        for (int64_t key : keys) use(key);
      };
      const auto [least, most] = std::minmax_element(keys.begin(), keys.end());
      for (int sigmas : {3, 16}) {
        const double away = sigmas * std::sqrt(n * q * (1 - q)) + 8;
        const int64_t first = std::llround(q * n - away), last = std::llround(q * n + away);
        const double low = first >= 0 ? from_key(smallest(each, *least, *most, first)) : -INF;
        const double high = last < int64_t(keys.size()) ? from_key(smallest(each, *least, *most, last)) : INF;
        if (scan(low, high)) return true;
      }
    }
    return scan(-INF, INF);
  }

  // Kept scores that are numbers, some n^(2/3) of them; the odd stride that 3 does not divide meets every kernel tap.
  std::vector<int64_t> sample(int64_t total) const {
    int64_t stride = int64_t(double(total) / std::max(double(SAMPLE), std::cbrt(double(total) * double(total)))) | 1;
    if (stride % 3 == 0) stride += 2;
    std::vector<int64_t> keys;
    keys.reserve(size_t(total / stride + n_layers));
    for (int64_t l = 0; l < n_layers; l++) {
      const GossamerSweep& s = layers[l];
      const bool all = s.n_kept == s.n;
      const char* scores = static_cast<const char*>(s.scores);
      with_scores(s, [&](auto read) {
        for (int64_t i = 0; i < s.n; i += stride) {
          __builtin_prefetch(scores + (i + 16 * stride) * SIZE[s.kind]);  // each is in a line of its own
          const double score = read(i);
          if ((all || s.keep[i]) && score == score) keys.push_back(key_of(score));
        }
      });
    }
    return keys;
  }

  // The highest score that goes, of those that were found; the bracket's lower end where none of them does.
  double threshold() const {
    if (need == settled) return lower;
    auto each = [&](auto&& use) {
      for (const Item& item : items)
        for (int64_t key : item.keys) use(key);
    };
    return from_key(smallest(each, key_of(lower), key_of(upper), need - settled - 1));
  }

  // Masks what is below the threshold, and ties up to the last position that is needed, and zeroes. Not where a layer
  // would keep less than it must.
  bool cut(double threshold) {
    const int64_t bound = key_of(threshold);
    for (int64_t l = 0; l < n_layers; l++) layers[l].n_masked = 0;
    int64_t ties = need;
    for (Item& item : items) {
      int64_t below = item.seen.settled;
      for (int64_t key : item.keys) below += key < bound;
      layers[item.layer].n_masked += below;
      ties -= below;
    }
    std::vector<int64_t> last(size_t(n_layers), -1);  // the last tie that goes
    for (size_t i = 0; ties && i < items.size(); i++)
      for (size_t k = 0; ties && k < items[i].keys.size(); k++)
        if (items[i].keys[k] == bound) {
          ties--;
          last[size_t(items[i].layer)] = items[i].start + items[i].places[k];
          layers[items[i].layer].n_masked++;
        }
    for (int64_t l = 0; l < n_layers; l++)
      if (layers[l].n_kept - layers[l].n_masked < layers[l].least) return false;
    if (!settled) {
      each_item([&](Item& item) {
        const GossamerSweep& s = layers[item.layer];
        for (size_t k = 0; k < item.keys.size(); k++) {
          const int64_t i = item.start + item.places[k];
          if (item.keys[k] > bound || (item.keys[k] == bound && i > last[size_t(item.layer)])) continue;
          s.keep[i] = 0;
          for (int32_t t = 0; t < s.n_tensors; t++)
            std::memset(static_cast<char*>(s.tensors[t]) + i * s.sizes[t], 0, size_t(s.sizes[t]));
        }
      });
      return true;
    }
    std::vector<Bound> at, under;
    for (int64_t l = 0; l < n_layers; l++) {
      at.push_back(up_to(layers[l].kind, threshold));
      under.push_back(before(layers[l].kind, threshold));
    }
    each_item([&](Item& item) {
      const GossamerSweep& s = layers[item.layer];
      if (!s.n_masked) return;
      const int64_t end = last[size_t(item.layer)] + 1;
      const Scores form = LOOP[s.kind];
      // Weights that are their own scores are read and written once.
      const int32_t own = form <= MAGNITUDE_DOUBLE ? own_tensor(s) : -1;
      each_piece(item, [&](int64_t start, int64_t n) {
        const int64_t with = std::max<int64_t>(0, std::min(n, end - start));
        auto both = [&](auto* from, auto loop) {
          loop(from + start * SIZE[s.kind], s.keep + start, with, at[size_t(item.layer)]);
          loop(from + (start + with) * SIZE[s.kind], s.keep + start + with, n - with, under[size_t(item.layer)]);
        };
        if (own >= 0) both(static_cast<char*>(s.tensors[own]), loops.drop[form]);
        else both(static_cast<const char*>(s.scores), loops.cut[form]);
        zero(s, start, n, own);
      });
    });
    return true;
  }
};

}  // namespace
}  // namespace gossamer

using namespace gossamer;

GOSSAMER_API int32_t gossamer_zero(const GossamerSweep* s, int32_t threads, int32_t isa) {
  const Loops* loops = loops_of(isa);
  if (!loops || !fits(*s)) return 1;
  try {
    GossamerSweep layer = *s;
    Job(&layer, 1, 0, threads, *loops).zero_all();
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}

GOSSAMER_API void gossamer_drop(GossamerGroup* groups, int64_t n_groups, int32_t threads, int32_t isa, int32_t whole) {
  const Loops* loops = loops_of(isa);
  int64_t total = 0, most = 0;
  for (int64_t g = 0; g < n_groups; g++) {
    GossamerGroup& group = groups[g];
    group.failed = loops && group.need > 0 ? 0 : 1;
    int64_t n = 0;
    for (int64_t l = 0; l < group.n_layers; l++) {
      const GossamerSweep& s = group.layers[l];
      if (!fits(s) || (s.n && !s.scores)) group.failed = 1;
      n += s.n;
    }
    total += n, most = std::max(most, n);
  }
  std::vector<std::unique_ptr<Job>> jobs;
  auto find = [&](int64_t g, int32_t with) {
    GossamerGroup& group = groups[g];
    if (group.failed) return;
    try {
      jobs[size_t(g)] = std::make_unique<Job>(group.layers, group.n_layers, group.need, with, *loops);
      const bool is_found = jobs[size_t(g)]->find(group.hint);
      if (!is_found || (whole && !jobs[size_t(g)]->is_finite)) group.failed = 3;
    } catch (const std::bad_alloc&) {
      group.failed = 2;
    }
  };
  auto cut = [&](int64_t g) {
    GossamerGroup& group = groups[g];
    if (group.failed) return;
    try {
      Job& job = *jobs[size_t(g)];
      const double threshold = job.threshold();
      if (!job.cut(threshold)) {
        group.failed = 4;
        return;
      }
      group.threshold = group.need > job.settled ? threshold : NO_NUMBER;
      group.upper = job.upper;
      group.left = job.settled + job.found - group.need;
    } catch (const std::bad_alloc&) {
      group.failed = 2;
    }
  };
  // A thread a group, which leaves nothing that others wait for; or all threads in each, where one group is too large.
  if (total < 4 * ITEM) threads = 1;
  const bool apart = most * threads <= total;
  // Less size, group: the largest first, so that no thread waits for another's large one at the end.
  std::vector<std::pair<int64_t, int64_t>> order;
  try {
    jobs.resize(size_t(n_groups));
    for (int64_t g = 0; g < n_groups; g++) {
      int64_t n = 0;
      for (int64_t l = 0; l < groups[g].n_layers; l++) n -= groups[g].layers[l].n;
      order.emplace_back(n, g);
    }
  } catch (const std::bad_alloc&) {
    for (int64_t g = 0; g < n_groups; g++) groups[g].failed = 2;
    return;
  }
  std::sort(order.begin(), order.end());
  if (apart) share(n_groups, threads, [&](int64_t i, int) { find(order[size_t(i)].second, 1); }, true);
  else for (int64_t g = 0; g < n_groups; g++) find(g, threads);
  // All of them or none, where a score is no number: what is wrong is to be said before anything has changed.
  auto is_wrong = [&](const GossamerGroup& group) { return group.failed == 3 || (whole && group.failed); };
  if (std::any_of(groups, groups + n_groups, is_wrong))
    for (int64_t g = 0; g < n_groups; g++) groups[g].failed = std::max(groups[g].failed, 3);
  if (apart) share(n_groups, threads, [&](int64_t i, int) { cut(order[size_t(i)].second); }, true);
  else for (int64_t g = 0; g < n_groups; g++) cut(g);
}
