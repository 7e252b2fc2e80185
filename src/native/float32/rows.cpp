// The sparse convolution. One kernel covers every layer: a tile is a flat run of pixels, T vectors of sums of one output
// channel stay in registers, and each weight that is not zero is broadcast and multiplied with T vectors of one input
// plane. Rows of the planes begin at vectors, so that a kernel's row is an aligned offset; a kernel's column is not, and
// instead of loading unaligned (half the speed) all weights of one column are summed up first, and then the sums are
// shifted by a pixel, in registers, before those of the next are added.
#include "rows.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

template <int KIND>
struct Written {
#if defined(__AVX512VL__)
  // Rows of N vectors, the last of which may be a part.
  template <int N>
  static INLINE void vectors(const Writer& w, int32_t channel, const float* tile) {
    const V bias = all(w.bias ? w.bias[channel] : 0.0f);
    const uint32_t last = (1u << (w.columns - (N - 1) * L)) - 1;
    const int64_t down = w.pitch, tile_down = w.tile_pitch;
    for (int32_t image = 0; image < w.images; image++) {
      const float* from = tile + w.first + image * w.image_pitch;
      float* to = w.out + channel * w.view.channel + image * w.view.image;
      const float* more = w.residual;
      if (more) more += channel * w.residual_view.channel + image * w.residual_view.image;
      for (int32_t row = 0; row < w.rows; row++, from += tile_down, to += down) {
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
          const bool is_whole = n < N - 1;
          const V rest = !more ? V{} : is_whole ? load(more + n * L) : load_some(more + n * L, last);
          V v = load(from + n * L) + bias;  // a tile has a vector of slack
          if (more && !w.add_last) v += rest;
          v = activated<KIND>(v);
          if (more && w.add_last) v += rest;
          is_whole ? store(to + n * L, v) : store_some(to + n * L, v, last);
        }
        if (more) more += down;
      }
    }
  }
#endif

  static INLINE void of(const Writer& w, int32_t channel, const float* tile) {
#if defined(__AVX512VL__)
    switch ((w.columns + L - 1) / L) {
      case 1: return vectors<1>(w, channel, tile);
      case 2: return vectors<2>(w, channel, tile);
      case 4: return vectors<4>(w, channel, tile);
      default: break;
    }
#endif
    const V bias = all(w.bias ? w.bias[channel] : 0.0f);
    const int64_t base = channel * w.view.channel, more_base = channel * w.residual_view.channel;
    for (int32_t image = 0; image < w.images; image++) {
      const float* from = tile + w.first + image * w.image_pitch;
      float* to = w.out + base + image * w.view.image;
      const float* more = w.residual ? w.residual + more_base + image * w.residual_view.image : nullptr;
      for (int32_t row = 0; row < w.rows; row++) {
        for (int32_t x = 0; x < w.columns; x += L) {
          const int32_t left = w.columns - x, n = left < L ? left : L;
          finish<KIND>(w, to + x, more ? more + x : nullptr, load(from + x) + bias, n);
        }
        from += w.tile_pitch;
        to += w.pitch;
        if (more) more += w.pitch;
      }
    }
  }
};

// One function for all lengths of a tile: inlined into each, it would take the compiler minutes.
__attribute__((noinline)) void write_tile(const Writer& w, int32_t channel, const float* tile) {
  by_activation<Written>(w.activation, w, channel, tile);
}

// Out of registers, where the output's pixels lie in whole vectors and what follows is cheap.
template <int T>
INLINE void write_sums(const Writer& w, int32_t channel, V (&sum)[T]) {
  const V bias = all(w.bias ? w.bias[channel] : 0.0f);
  V* to = reinterpret_cast<V*>(w.out + channel * w.view.channel);
  const V* more = w.residual ? reinterpret_cast<const V*>(w.residual + channel * w.residual_view.channel) : nullptr;
#pragma GCC unroll 32
  for (int t = 0; t < T; t++) sum[t] += bias;
  if (more) {
#pragma GCC unroll 32
    for (int t = 0; t < T; t++) sum[t] += more[t];
  }
  if (w.activation != NONE) {
#pragma GCC unroll 32
    for (int t = 0; t < T; t++) sum[t] = at_least(sum[t], 0.0f);
  }
  if (w.activation == RELU6) {
#pragma GCC unroll 32
    for (int t = 0; t < T; t++) sum[t] = at_most(sum[t], 6.0f);
  }
#pragma GCC unroll 32
  for (int t = 0; t < T; t++) to[t] = sum[t];
}

// One weight, and the vectors of its plane.
template <int T>
INLINE void meet(V (&sum)[T], const char* at, float weight) {
  const V* x = reinterpret_cast<const V*>(at);
  const V w = all(weight);
#pragma GCC unroll 32
  for (int t = 0; t < T; t++) sum[t] += w * x[t];
}

template <int T>
void rows_of(const Rows& a) {
  constexpr int W = ways_of(T);
  const float* weights = a.weights;
  const uint16_t *offsets = a.offsets, *counts = a.counts;
  const uint64_t unit = uint64_t(a.unit) * sizeof(float);
  const char* x0 = reinterpret_cast<const char*>(a.x);
  const bool in_registers =
      a.write.direct && a.write.activation <= RELU6 && !(a.write.residual && a.write.add_last);
  // Tiles that are done wait for a few others, since what was just stored in vectors cannot be loaded across them yet.
  constexpr int WAITING = 4;
  alignas(64) float tiles[WAITING][(T + 1) * L];
  for (int i = 0; i < WAITING; i++) store(tiles[i] + T * L, V{});
  int32_t waiting[WAITING], n_waiting = 0;
  for (int32_t row = 0; row < a.n_rows; row++, counts += a.n_shifts) {
    const uint32_t code = a.rows[row], channel = code & ~(FIRST | LAST);
    V* sums = reinterpret_cast<V*>(a.sums + uint64_t(channel) * T * L);
    if (!(code & FIRST)) {  // on their way while this block's are summed
#pragma GCC unroll 32
      for (int t = 0; t < T; t++) __builtin_prefetch(sums + t, 1, 3);
    }
    V sum[T];
#pragma GCC unroll 32
    for (int t = 0; t < T; t++) sum[t] = V{};
    for (int32_t part = 0; part < a.n_shifts; part++) {
      for (int32_t times = a.shifts[part]; times; times--) {
#pragma GCC unroll 32
        for (int t = T - 1; t > 0; t--) sum[t] = shifted(sum[t - 1], sum[t]);
        sum[0] = shifted(V{}, sum[0]);
      }
      const int32_t n = counts[part];
      int32_t i = 0;
      if constexpr (W > 1) {
        V more[W - 1][T];
#pragma GCC unroll 4
        for (int w = 0; w < W - 1; w++)
#pragma GCC unroll 32
          for (int t = 0; t < T; t++) more[w][t] = V{};
        for (; i + W <= n; i += W) {
          meet<T>(sum, x0 + offsets[i] * unit, weights[i]);
#pragma GCC unroll 4
          for (int w = 1; w < W; w++) meet<T>(more[w - 1], x0 + offsets[i + w] * unit, weights[i + w]);
        }
#pragma GCC unroll 4
        for (int w = 0; w < W - 1; w++)
#pragma GCC unroll 32
          for (int t = 0; t < T; t++) sum[t] += more[w][t];
      }
      for (; i < n; i++) meet<T>(sum, x0 + offsets[i] * unit, weights[i]);
      weights += n;
      offsets += n;
    }
    if (!(code & FIRST)) {
#pragma GCC unroll 32
      for (int t = 0; t < T; t++) sum[t] += sums[t];
    }
    if (!(code & LAST)) {
#pragma GCC unroll 32
      for (int t = 0; t < T; t++) sums[t] = sum[t];
    } else if (in_registers) {
      write_sums<T>(a.write, a.channels[channel], sum);
    } else {
      V* to = reinterpret_cast<V*>(tiles[n_waiting]);
#pragma GCC unroll 32
      for (int t = 0; t < T; t++) to[t] = sum[t];
      waiting[n_waiting++] = a.channels[channel];
      if (n_waiting == WAITING) {
        for (int i = 0; i < WAITING; i++) write_tile(a.write, waiting[i], tiles[i]);
        n_waiting = 0;
      }
    }
  }
  for (int i = 0; i < n_waiting; i++) write_tile(a.write, waiting[i], tiles[i]);
}

template <int T>
void dispatch(int32_t vectors, const Rows& a) {
  if (vectors >= T) return rows_of<T>(a);
  if constexpr (T > 1) dispatch<T - 1>(vectors, a);
}

// Whole vectors, from the one that holds `from` to the one before `to`.
INLINE void zero(float* row, int32_t from, int32_t to) {
  for (int32_t i = from / L * L; i < to; i += L) store(row + i, V{});
}

INLINE void copy_row(float* to, const float* from, int32_t n, int32_t stride) {
  int32_t i = 0;
  if (stride == 1) {
    for (; i + L <= n; i += L) store(to + i, load(from + i));
    if (i < n) store_few(to + i, load_few(from + i, n - i), n - i);
  } else if (stride == 2) {
    for (; i + L < n; i += L) store(to + i, every_second(from + 2 * i));
    // Behind the last float there may be no memory.
#if defined(__AVX512VL__)
    const int32_t left = n - i, span = 2 * left - 1, more = span > L ? span - L : 0;
    store_few(to + i, every_second(load_few(from + 2 * i, span - more), load_few(from + 2 * i + L, more)), left);
#else
    if (i) return store(to + n - L, other_seconds(from + 2 * (n - L) - 1));
    for (; i < n; i++) to[i] = from[2 * i];
#endif
  } else {
    for (; i < n; i++) to[i] = from[int64_t(stride) * i];
  }
}

// What of a phase's plane is inside the input: pixels (x + q) stride + phase of it, for columns q in [from, end) of a
// block, and rows alike in [top, bottom). None where the first is not below the second.
struct Inside {
  int32_t from, end, top, bottom;
};
INLINE Inside inside(const Copy& c, int32_t phase_y, int32_t phase_x) {
  const int32_t wide = (c.width - phase_x + c.stride_x - 1) / c.stride_x - c.x;
  const int32_t high = (c.height - phase_y + c.stride_y - 1) / c.stride_y - c.y;
  return {c.x < 0 ? -c.x : 0, wide < c.columns ? wide : c.columns, c.y < 0 ? -c.y : 0, high < c.rows ? high : c.rows};
}

#if defined(__AVX512VL__)
// The bits of [from, end) that are in the L from `at`.
INLINE uint32_t bits(int32_t from, int32_t end, int32_t at) {
  const int32_t a = from < at ? 0 : from > at + L ? L : from - at, b = end < at ? 0 : end > at + L ? L : end - at;
  return ((1u << b) - 1) & ~((1u << a) - 1);
}

// As `copy`, where N vectors are a row: masks know the edges, and what is outside comes as zeros.
template <int N, int STEP>
void copy_vectors(const Copy& c) {
  V* to = reinterpret_cast<V*>(c.to);
  const int64_t down = int64_t(c.stride_y) * c.width;
  for (int32_t p = 0; p < c.n_planes; p++) {
    const int32_t phase_y = c.planes[3 * p + 1], phase_x = c.planes[3 * p + 2];
    const Inside in = inside(c, phase_y, phase_x);
    uint32_t there[N][STEP];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
#pragma GCC unroll 2
      for (int i = 0; i < STEP; i++) there[n][i] = bits(STEP * in.from, STEP * (in.end - 1) + 1, (STEP * n + i) * L);
    }
    const float* from = c.in + c.planes[3 * p] * c.view.channel + (int64_t(c.y) * c.stride_y + phase_y) * c.width +
                        c.x * STEP + phase_x;
    for (int32_t r = 0; r < c.rows; r++, from += down, to += N) {
      if (r < in.top || r >= in.bottom) {
        for (int n = 0; n < N; n++) to[n] = V{};
        continue;
      }
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        to[n] = load_some(from + STEP * n * L, there[n][0]);
        if constexpr (STEP == 2) to[n] = every_second(to[n], load_some(from + 2 * n * L + L, there[n][1]));
      }
    }
  }
}

template <int N>
INLINE bool is_copied(const Copy& c) {
  if (c.pitch != N * L || c.stride_x > 2) return false;
  c.stride_x == 1 ? copy_vectors<N, 1>(c) : copy_vectors<N, 2>(c);
  return true;
}
#endif

}  // namespace

void rows(int32_t vectors, const Rows& a) { dispatch<LONGEST>(vectors, a); }

void copy(const Copy& c) {
#if defined(__AVX512VL__)
  if (c.fill && (is_copied<1>(c) || is_copied<2>(c) || is_copied<3>(c) || is_copied<4>(c))) return;
#endif
  float* to = c.to;
  for (int32_t p = 0; p < c.n_planes; p++, to += int64_t(c.rows) * c.pitch) {
    const int32_t phase_y = c.planes[3 * p + 1], phase_x = c.planes[3 * p + 2];
    const float* plane = c.in + c.planes[3 * p] * c.view.channel;
    const Inside in = inside(c, phase_y, phase_x);
    if (c.fill) {
      for (int32_t r = 0; r < c.rows; r++) {
        const bool is_inside = r >= in.top && r < in.bottom && in.from < in.end;
        zero(to + int64_t(r) * c.pitch, 0, is_inside ? in.from : c.pitch);
        if (is_inside) zero(to + int64_t(r) * c.pitch, in.end, c.pitch);
      }
    }
    if (in.from >= in.end) continue;
    for (int32_t r = in.top; r < in.bottom; r++) {
      const int64_t y = int64_t(c.y + r) * c.stride_y + phase_y, x = int64_t(c.x + in.from) * c.stride_x + phase_x;
      const float* row = plane + y * c.width + x;
      float* here = to + int64_t(r) * c.pitch + in.from;
      for (int32_t image = 0; image < c.images; image++)
        copy_row(here + image * c.image_pitch, row + image * c.view.image, in.end - in.from, c.stride_x);
    }
  }
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
