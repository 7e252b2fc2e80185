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
  static INLINE void of(const Writer& w, int32_t channel, const float* tile) {
    const V bias = all(w.bias ? w.bias[channel] : 0.0f);
    const int64_t base = channel * w.view.channel, more_base = channel * w.residual_view.channel;
    for (int32_t image = 0; image < w.images; image++) {
      const float* from = tile + w.first + image * w.image_pitch;
      float* to = w.out + base + image * w.view.image;
      const float* more = w.residual ? w.residual + more_base + image * w.residual_view.image : nullptr;
      for (int32_t row = 0; row < w.rows; row++) {
        for (int32_t x = 0; x < w.columns; x += L) {
          const int32_t left = w.columns - x, n = left < L ? left : L;
          finish<KIND>(w, to + x, more ? more + x : nullptr, load(from + x) + bias, n);  // a tile has a vector of slack
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
    for (; i + L < n; i += L) {  // the last one's neighbour may lie outside
      store(to + i, every_second(from + 2 * i));
    }
    for (; i < n; i++) to[i] = from[2 * i];
  } else {
    for (; i < n; i++) to[i] = from[int64_t(stride) * i];
  }
}

}  // namespace

void rows(int32_t vectors, const Rows& a) { dispatch<LONGEST>(vectors, a); }

void copy(const Copy& c) {
  float* to = c.to;
  for (int32_t p = 0; p < c.n_planes; p++, to += int64_t(c.rows) * c.pitch) {
    const int32_t phase_y = c.planes[3 * p + 1], phase_x = c.planes[3 * p + 2];
    const float* plane = c.in + c.planes[3 * p] * c.view.channel;
    // Columns of the block whose pixel is inside the input: 0 <= (x + q) stride + phase < width; rows likewise.
    const int32_t inside = (c.width - phase_x + c.stride_x - 1) / c.stride_x;  // pixels of this phase
    const int32_t from = c.x < 0 ? -c.x : 0, end = inside - c.x < c.columns ? inside - c.x : c.columns;
    const int32_t high = (c.height - phase_y + c.stride_y - 1) / c.stride_y;
    const int32_t top = c.y < 0 ? -c.y : 0, bottom = high - c.y < c.rows ? high - c.y : c.rows;
    if (c.fill) {
      for (int32_t r = 0; r < c.rows; r++) {
        const bool is_inside = r >= top && r < bottom && from < end;
        zero(to + int64_t(r) * c.pitch, 0, is_inside ? from : c.pitch);
        if (is_inside) zero(to + int64_t(r) * c.pitch, end, c.pitch);
      }
    }
    if (from >= end) continue;
    for (int32_t r = top; r < bottom; r++) {
      const int64_t y = int64_t(c.y + r) * c.stride_y + phase_y, x = int64_t(c.x + from) * c.stride_x + phase_x;
      const float* row = plane + y * c.width + x;
      float* here = to + int64_t(r) * c.pitch + from;
      for (int32_t image = 0; image < c.images; image++)
        copy_row(here + image * c.image_pitch, row + image * c.view.image, end - from, c.stride_x);
    }
  }
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
