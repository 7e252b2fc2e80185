// The loops, in the compiler's vector extensions; compiled once per instruction set, in a namespace of its own.
//
// One kernel covers every layer. A tile is a flat run of pixels: a few rows of the output, each padded to a whole number
// of vectors. T vectors of sums of one output channel stay in registers; each weight that is not zero is broadcast and
// multiplied with T vectors of one input plane. Rows of the planes begin at vectors too, so that a kernel's row is an
// aligned offset; a kernel's column is not, and instead of loading unaligned (half the speed) all weights of one column
// are summed up first, and then the sums are shifted by a pixel, in registers, before those of the next are added.
#include "kernels.h"

#ifndef GOSSAMER_ISA
#error "compile with -DGOSSAMER_ISA=baseline, avx2 or avx512"
#endif

#define INLINE static inline __attribute__((always_inline))

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

#if defined(__AVX__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif
#if defined(__AVX512VL__) || defined(__aarch64__)
constexpr int LONGEST = 28;  // 32 registers
#else
constexpr int LONGEST = 14;  // 16 registers
#endif

typedef float V __attribute__((vector_size(L * 4)));
typedef float U __attribute__((vector_size(L * 4), aligned(4)));
typedef int32_t I __attribute__((vector_size(L * 4)));

INLINE V load(const float* p) { return *reinterpret_cast<const U*>(p); }
INLINE void store(float* p, V v) { *reinterpret_cast<U*>(p) = v; }
INLINE V all(float x) { return x - V{}; }
INLINE V pick(I mask, V yes, V no) { return (V)((mask & (I)yes) | (~mask & (I)no)); }
// As torch has it, nan stays nan.
INLINE V at_least(V v, float low) { return pick(v < all(low), all(low), v); }
INLINE V at_most(V v, float high) { return pick(v > all(high), all(high), v); }

INLINE V shifted(V before, V v) {
#if defined(__AVX__)
  return __builtin_shufflevector(before, v, 7, 8, 9, 10, 11, 12, 13, 14);
#else
  return __builtin_shufflevector(before, v, 3, 4, 5, 6);
#endif
}

// e^x to a few units in the last place: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes).
INLINE V exponential(V x) {
  V y = at_most(at_least(x, -87.3f), 88.3f);
  V n = y * 1.44269504f + 12582912.0f;  // rounds to a whole number
  I whole = (I)n - 0x4B400000;
  n -= 12582912.0f;
  V r = y - n * 0.693359375f + n * 2.12194440e-4f;
  V p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  V result = (V)((I)p + (whole << 23));
  return pick(x != x, x, result);
}

INLINE V sigmoid(V x) { return 1.0f / (1.0f + exponential(-x)); }

INLINE V tangent(V x) {  // tanh
  V e = exponential(2.0f * at_most(at_least(x, -10.0f), 10.0f));
  return pick(x != x, x, (e - 1.0f) / (e + 1.0f));
}

// The normal distribution's function, by 1 - erf to 1.5e-7 (Abramowitz and Stegun 7.1.26), which is small where x is.
INLINE V normal(V x) {
  V a = pick(x < V{}, -x, x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * a);
  V p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  V tail = 0.5f * p * exponential(-a * a);
  return pick(x < V{}, tail, 1.0f - tail);
}

INLINE V activated(V v, int32_t kind) {
  switch (kind) {
    case RELU: return at_least(v, 0.0f);
    case RELU6: return at_most(at_least(v, 0.0f), 6.0f);
    case SILU: return v * sigmoid(v);
    case GELU: return v * normal(v);
    case GELU_TANH: return 0.5f * v * (1.0f + tangent(0.79788456f * (v + 0.044715f * v * v * v)));
    case HARDSWISH: return v * at_most(at_least(v + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
    case HARDSIGMOID: return at_most(at_least(v + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
    case SIGMOID: return sigmoid(v);
    default: return v;
  }
}

// n < L floats, without a loop that the processor would have to guess the end of.
INLINE void copy_few(float* to, const float* from, int32_t n) {
  typedef float Four __attribute__((vector_size(16), aligned(4)));
  typedef float Two __attribute__((vector_size(8), aligned(4)));
  if (L > 4 && n & 4) {
    *reinterpret_cast<Four*>(to) = *reinterpret_cast<const Four*>(from);
    to += 4;
    from += 4;
  }
  if (n & 2) {
    *reinterpret_cast<Two*>(to) = *reinterpret_cast<const Two*>(from);
    to += 2;
    from += 2;
  }
  if (n & 1) *to = *from;
}

template <int KIND>
INLINE void write_as(const Writer& w, int32_t channel, const float* tile) {
  const V bias = all(w.bias ? w.bias[channel] : 0.0f);
  const int64_t base = channel * w.plane;
  for (int32_t row = 0; row < w.rows; row++) {
    const float* from = tile + row * w.tile_pitch + w.first;
    const int64_t at = base + int64_t(row) * w.pitch;
    float* to = w.out + at;
    const float* more = w.residual ? w.residual + at : nullptr;
    if (w.columns < L) {
      float rest[L] = {}, result[L];
      if (more) copy_few(rest, more, w.columns);
      V v = load(from) + bias;  // a tile has a vector of slack
      if (!w.add_last) v += load(rest);
      v = activated(v, KIND);
      if (w.add_last) v += load(rest);
      store(result, v);
      copy_few(to, result, w.columns);
      continue;
    }
    for (int32_t x = 0;;) {
      V v = load(from + x) + bias;
      if (more && !w.add_last) v += load(more + x);
      v = activated(v, KIND);
      if (more && w.add_last) v += load(more + x);
      store(to + x, v);
      if (x + L == w.columns) break;
      x = x + 2 * L <= w.columns ? x + L : w.columns - L;  // the last vector may overlap the one before it
    }
  }
}

void write(const Writer& w, int32_t channel, const float* tile) {
  switch (w.activation) {
    case NONE: return write_as<NONE>(w, channel, tile);
    case RELU: return write_as<RELU>(w, channel, tile);
    case RELU6: return write_as<RELU6>(w, channel, tile);
    case SILU: return write_as<SILU>(w, channel, tile);
    case GELU: return write_as<GELU>(w, channel, tile);
    case GELU_TANH: return write_as<GELU_TANH>(w, channel, tile);
    case HARDSWISH: return write_as<HARDSWISH>(w, channel, tile);
    case HARDSIGMOID: return write_as<HARDSIGMOID>(w, channel, tile);
    default: return write_as<SIGMOID>(w, channel, tile);
  }
}

// N vectors of a plane at once: side by side in a row, or one below the other where rows are short.
template <int KIND, bool BELOW>
INLINE void plane_as(const Plane& a) {
  constexpr int N = 4;
  const Writer& w = a.write;
  const V bias = all(w.bias ? w.bias[a.channel] : 0.0f);
  const int32_t rows_step = BELOW ? N : 1, columns_step = BELOW ? L : N * L;
  const int32_t apart = BELOW ? a.pitch : L, apart_out = BELOW ? w.pitch : L;
  for (int32_t row = 0; row < w.rows; row += rows_step) {
    const int64_t at = a.channel * w.plane + int64_t(row) * w.pitch;
    for (int32_t first = 0; first < w.columns; first += columns_step) {
      V sum[N];
#pragma GCC unroll 4
      for (int t = 0; t < N; t++) sum[t] = bias;
      const float* from = a.x + int64_t(row) * a.pitch + first;
      for (int32_t i = 0; i < a.n; i++) {
        const float* x = from + a.offsets[i];
        const V weight = all(a.weights[i]);
#pragma GCC unroll 4
        for (int t = 0; t < N; t++) sum[t] += weight * load(x + t * apart);
      }
#pragma GCC unroll 4
      for (int t = 0; t < N; t++) {
        const int32_t left = w.columns - first - (BELOW ? 0 : t * L);
        if (left <= 0 || (BELOW && row + t >= w.rows)) break;
        const int64_t here = at + first + int64_t(t) * apart_out;
        float few[L] = {};
        V rest = V{};
        if (w.residual) {
          if (left < L) copy_few(few, w.residual + here, left);
          rest = left < L ? load(few) : load(w.residual + here);
        }
        V v = sum[t];
        if (!w.add_last) v += rest;
        v = activated(v, KIND);
        if (w.add_last) v += rest;
        if (left >= L) {
          store(w.out + here, v);
        } else {
          store(few, v);
          copy_few(w.out + here, few, left);
        }
      }
    }
  }
}

template <int KIND>
void plane_of(const Plane& a) {
  a.write.columns > 2 * L ? plane_as<KIND, false>(a) : plane_as<KIND, true>(a);
}

void plane(const Plane& a) {
  switch (a.write.activation) {
    case NONE: return plane_of<NONE>(a);
    case RELU: return plane_of<RELU>(a);
    case RELU6: return plane_of<RELU6>(a);
    case SILU: return plane_of<SILU>(a);
    case GELU: return plane_of<GELU>(a);
    case GELU_TANH: return plane_of<GELU_TANH>(a);
    case HARDSWISH: return plane_of<HARDSWISH>(a);
    case HARDSIGMOID: return plane_of<HARDSIGMOID>(a);
    default: return plane_of<SIGMOID>(a);
  }
}

template <int T>
void rows_of(const Rows& a) {
  const float* weights = a.weights;
  const uint16_t *offsets = a.offsets, *counts = a.counts;
  // Tiles that are done wait for a few others, since what was just stored in vectors cannot be loaded across them yet.
  constexpr int WAITING = 4;
  alignas(64) float tiles[WAITING][(T + 1) * L] = {};
  int32_t waiting[WAITING], n_waiting = 0;
  for (int32_t row = 0; row < a.n_rows; row++, counts += a.n_shifts) {
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
      for (int32_t i = 0; i < n; i++) {
        const V* x = reinterpret_cast<const V*>(a.x) + offsets[i];
        const V weight = all(weights[i]);
#pragma GCC unroll 32
        for (int t = 0; t < T; t++) sum[t] += weight * x[t];
      }
      weights += n;
      offsets += n;
    }
    const uint32_t code = a.rows[row], channel = code & ~(FIRST | LAST);
    V* sums = reinterpret_cast<V*>(a.sums + uint64_t(channel) * T * L);
    if (!(code & FIRST)) {
#pragma GCC unroll 32
      for (int t = 0; t < T; t++) sum[t] += sums[t];
    }
    V* to = code & LAST ? reinterpret_cast<V*>(tiles[n_waiting]) : sums;
#pragma GCC unroll 32
    for (int t = 0; t < T; t++) to[t] = sum[t];
    if (code & LAST) {
      waiting[n_waiting++] = a.channels[channel];
      if (n_waiting == WAITING) {
        for (int i = 0; i < WAITING; i++) write(a.write, waiting[i], tiles[i]);
        n_waiting = 0;
      }
    }
  }
  for (int i = 0; i < n_waiting; i++) write(a.write, waiting[i], tiles[i]);
}

template <int T>
void dispatch(int32_t vectors, const Rows& a) {
  if (vectors >= T) return rows_of<T>(a);
  if constexpr (T > 1) dispatch<T - 1>(vectors, a);
}

void rows(int32_t vectors, const Rows& a) { dispatch<LONGEST>(vectors, a); }

// Whole vectors, from the one that holds `from` to the one before `to`.
INLINE void zero(float* row, int32_t from, int32_t to) {
  for (int32_t i = from / L * L; i < to; i += L) store(row + i, V{});
}

// Of 2L floats; there must be as many.
INLINE V every_second(const float* from) {
#if defined(__AVX__)
  return __builtin_shufflevector(load(from), load(from + L), 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector(load(from), load(from + L), 0, 2, 4, 6);
#endif
}

INLINE void copy_row(float* to, const float* from, int32_t n, int32_t stride) {
  int32_t i = 0;
  if (stride == 1) {
    if (n < L) return copy_few(to, from, n);
    for (; i + L <= n; i += L) store(to + i, load(from + i));
    if (i < n) store(to + n - L, load(from + n - L));
  } else if (stride == 2) {
    for (; i + L < n; i += L) {  // the last one's neighbour may lie outside
      store(to + i, every_second(from + 2 * i));
    }
    for (; i < n; i++) to[i] = from[2 * i];
  } else {
    for (; i < n; i++) to[i] = from[int64_t(stride) * i];
  }
}

void copy(const Copy& c) {
  float* to = c.to;
  for (int32_t p = 0; p < c.n_planes; p++) {
    const int32_t phase_y = c.planes[3 * p + 1], phase_x = c.planes[3 * p + 2];
    const float* plane = c.in + c.planes[3 * p] * c.in_plane;
    // Columns of the block whose pixel is inside the input: 0 <= (x + q) stride + phase < width.
    const int32_t inside = (c.width - phase_x + c.stride_x - 1) / c.stride_x;  // pixels of this phase
    int32_t from = c.x < 0 ? -c.x : 0, end = inside - c.x;
    if (end > c.columns) end = c.columns;
    if (from > end) from = end = 0;
    for (int32_t r = 0; r < c.rows; r++, to += c.pitch) {
      const int64_t y = int64_t(c.y + r) * c.stride_y + phase_y;
      if (c.y + r < 0 || y >= c.height || from == end) {
        zero(to, 0, c.pitch);
        continue;
      }
      zero(to, 0, from);
      zero(to, end, c.pitch);
      copy_row(to + from, plane + y * c.width + int64_t(c.x + from) * c.stride_x + phase_x, end - from, c.stride_x);
    }
  }
}

// As torch has it: nan is larger than anything.
INLINE V larger(V a, V b) { return pick((a > b) | (a != a), a, b); }

INLINE float largest(const Pool& p, int32_t i) {
  int32_t left = i * p.stride_x - p.pad_x, right = left + p.kernel_x;
  if (left < 0) left = 0;
  if (right > p.width) right = p.width;
  float v = p.row[left];
  for (int32_t k = left + 1; k < right; k++) v = p.row[k] > v || p.row[k] != p.row[k] ? p.row[k] : v;
  return v;
}

void max_pool(const Pool& p) {
  for (int32_t y = 0; y < p.out_height; y++) {
    int32_t top = y * p.stride_y - p.pad_y, bottom = top + p.kernel_y;
    if (top < 0) top = 0;
    if (bottom > p.height) bottom = p.height;
    // Down each column first, which is contiguous, and then along the row.
    const float* in = p.in + int64_t(top) * p.width;
    int32_t x = 0;
    for (; x + L <= p.width; x += L) {
      V v = load(in + x);
      for (int32_t k = 1; k < bottom - top; k++) v = larger(load(in + int64_t(k) * p.width + x), v);
      store(p.row + x, v);
    }
    for (; x < p.width; x++) {
      float v = in[x];
      for (int32_t k = 1; k < bottom - top; k++) {
        const float other = in[int64_t(k) * p.width + x];
        v = other > v || other != other ? other : v;
      }
      p.row[x] = v;
    }
    float* out = p.out + int64_t(y) * p.out_width;
    // Windows that lie inside, L at a time.
    int32_t i = 0, inside = (p.width - p.kernel_x + p.pad_x) / p.stride_x + 1;
    if (p.width + p.pad_x < p.kernel_x) inside = 0;
    if (inside > p.out_width) inside = p.out_width;
    if (p.stride_x <= 2) {
      for (; i < inside && i * p.stride_x < p.pad_x; i++) out[i] = largest(p, i);
      for (; i + L <= inside; i += L) {
        const float* row = p.row + i * p.stride_x - p.pad_x;
        V v = p.stride_x == 1 ? load(row) : every_second(row);
        for (int32_t k = 1; k < p.kernel_x; k++) v = larger(p.stride_x == 1 ? load(row + k) : every_second(row + k), v);
        store(out + i, v);
      }
    }
    for (; i < p.out_width; i++) out[i] = largest(p, i);
  }
}

void tokens(const Tokens& t) {
  for (int32_t token = 0; token < t.tokens; token++) {
    const float* in = t.in + token * t.in_features;
    float* out = t.out + token * t.out_features;
    for (int64_t row = t.first; row < t.last; row += L) {
      float sums[L] = {}, few[L];
      const int32_t here = t.last - row < L ? int32_t(t.last - row) : L;
      for (int32_t i = 0; i < here; i++) {
        float a = 0, b = 0, c = 0, d = 0;  // four sums, so that one addition need not wait for the other
        int64_t j = t.starts[row + i];
        const int64_t end = t.starts[row + i + 1];
        for (; j + 4 <= end; j += 4) {
          a += t.weights[j] * in[t.places[j]];
          b += t.weights[j + 1] * in[t.places[j + 1]];
          c += t.weights[j + 2] * in[t.places[j + 2]];
          d += t.weights[j + 3] * in[t.places[j + 3]];
        }
        for (; j < end; j++) a += t.weights[j] * in[t.places[j]];
        sums[i] = (a + b) + (c + d) + (t.bias ? t.bias[row + i] : 0);
      }
      store(few, activated(load(sums), t.activation));
      for (int32_t i = 0; i < here; i++) out[row + i] = few[i];
    }
  }
}

#define GOSSAMER_QUOTED_(x) #x
#define GOSSAMER_QUOTED(x) GOSSAMER_QUOTED_(x)

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {GOSSAMER_QUOTED(GOSSAMER_ISA), L, LONGEST, rows, copy, plane, max_pool, tokens};

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
