// What meets a plane, or a row of tokens, as a whole: depthwise convolutions, pooling, sums, and few tokens.
#include "rows.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

// N vectors of a plane at once: side by side in a row, or one below the other where rows are short.
template <int KIND, bool BELOW>
INLINE void plane_as(const Plane& a) {
  constexpr int N = 4;
  const Writer& w = a.write;
  const V bias = all(w.bias ? w.bias[a.channel] : 0.0f);
  const int32_t rows_step = BELOW ? N : 1, columns_step = BELOW ? L : N * L;
  const int32_t apart = BELOW ? a.pitch : L, apart_out = BELOW ? w.pitch : L;
  float* out = w.out + a.channel * w.view.channel;
  const float* more = w.residual ? w.residual + a.channel * w.residual_view.channel : nullptr;
  for (int32_t row = 0; row < w.rows; row += rows_step) {
    const int64_t at = int64_t(row) * w.pitch;
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
        const int32_t left = w.columns - first - (BELOW ? 0 : t * L), n = left < L ? left : L;
        if (left <= 0 || (BELOW && row + t >= w.rows)) break;
        const int64_t here = at + first + int64_t(t) * apart_out;
        finish<KIND>(w, out + here, more ? more + here : nullptr, sum[t], n);
      }
    }
  }
}

template <int KIND>
struct Planed {
  static INLINE void of(const Plane& a) { a.write.columns > 2 * L ? plane_as<KIND, false>(a) : plane_as<KIND, true>(a); }
};

void plane(const Plane& a) { by_activation<Planed>(a.write.activation, a); }

#if defined(__AVX512VL__)
// Lanes l with 0 <= first + l < width.
INLINE uint32_t lanes_inside(int32_t first, int32_t width) {
  const int32_t low = first < 0 ? -first : 0, high = width - first < L ? width - first : L;
  return low >= high ? 0 : ((1u << high) - 1) & ~((1u << low) - 1);
}

// Four rows of a plane at once, L columns of each.
template <int KIND>
struct PlanedInPlace {
  static INLINE void of(const PlaneInPlace& a) {
    constexpr int N = 4, MOST = 64;
    const Writer& w = a.write;
    const V bias = all(w.bias ? w.bias[a.channel] : 0.0f);
    float* out = w.out + a.channel * w.view.channel;
    const float* more = w.residual ? w.residual + a.channel * w.residual_view.channel : nullptr;
    for (int32_t first = 0; first < w.columns; first += L) {
      const int32_t n = w.columns - first < L ? w.columns - first : L;
      uint32_t inside[MOST][2];
      for (int32_t i = 0; i < a.n; i++) {
        const int32_t column = first * 2 + a.taps[2 * i + 1];
        inside[i][0] = lanes_inside(column, a.width);
        inside[i][1] = lanes_inside(column + L, a.width);
      }
      for (int32_t row = 0; row < w.rows; row += N) {
        V sum[N];
#pragma GCC unroll 4
        for (int t = 0; t < N; t++) sum[t] = bias;
        for (int32_t i = 0; i < a.n; i++) {
          const V weight = all(a.weights[i]);
          const int32_t column = first * 2 + a.taps[2 * i + 1];
          const int32_t top = (a.top + row) * a.stride_y + a.taps[2 * i];
          if (top >= 0 && top + (N - 1) * a.stride_y < a.height) {
            const float* x = a.in + int64_t(top) * a.width + column;
            const int64_t apart = int64_t(a.stride_y) * a.width;
#pragma GCC unroll 4
            for (int t = 0; t < N; t++) {
              const float* from = x + t * apart;
              sum[t] += weight * every_second(load_some(from, inside[i][0]), load_some(from + L, inside[i][1]));
            }
            continue;
          }
          for (int t = 0; t < N; t++) {
            const int32_t y = top + t * a.stride_y;
            const uint32_t there = y >= 0 && y < a.height ? ~0u : 0;
            const float* x = a.in + int64_t(y) * a.width + column;
            sum[t] += weight * every_second(load_some(x, inside[i][0] & there), load_some(x + L, inside[i][1] & there));
          }
        }
#pragma GCC unroll 4
        for (int t = 0; t < N; t++) {
          if (row + t >= w.rows) break;
          const int64_t here = int64_t(row + t) * w.pitch + first;
          finish<KIND>(w, out + here, more ? more + here : nullptr, sum[t], n);
        }
      }
    }
  }
};

// A row of a plane as three weights side by side meet it: each by L pixels, which are STEP apart.
template <int STEP>
struct Row {
  V of[3];
  INLINE Row(const float* x, const uint32_t (&inside)[3][2]) {
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) {
      of[i] = load_some(x + i, inside[i][0]);
      if constexpr (STEP == 2) of[i] = every_second(of[i], load_some(x + i + L, inside[i][1]));
    }
  }
  INLINE V times(const V* weight) const { return weight[0] * of[0] + weight[1] * of[1] + weight[2] * of[2]; }
};

// A kernel of 3 × 3 weights: each row of the input is read once, and meets all rows of the output that it reaches, L columns
// of each.
template <int KIND, int STEP>
INLINE void plane_by_rows(const PlaneInPlace& a) {
  const Writer& w = a.write;
  const V bias = all(w.bias ? w.bias[a.channel] : 0.0f);
  float* out = w.out + a.channel * w.view.channel;
  const float* more = w.residual ? w.residual + a.channel * w.residual_view.channel : nullptr;
  V weight[9];
#pragma GCC unroll 9
  for (int i = 0; i < 9; i++) weight[i] = all(a.weights[i]);
  for (int32_t first = 0; first < w.columns; first += L) {
    const int32_t n = w.columns - first < L ? w.columns - first : L, column = first * STEP + a.taps[1];
    uint32_t inside[3][2];
    for (int32_t i = 0; i < 3; i++) {
      inside[i][0] = lanes_inside(column + i, a.width);
      inside[i][1] = lanes_inside(column + i + L, a.width);
    }
    // Of the row that is written next, and of the one after it, what the rows before have given.
    V sum = bias, next = bias;
    const int32_t top = a.top * STEP + a.taps[0];
    int32_t y = top;
    auto meet = [&](auto use) {
      if (y >= 0 && y < a.height) use(Row<STEP>(a.in + int64_t(y) * a.width + column, inside));
      y++;
    };
    meet([&](const auto& x) { sum += x.times(weight); });
    if constexpr (STEP == 1)
      meet([&](const auto& x) {
        sum += x.times(weight + 3);
        next += x.times(weight);
      });
    for (int32_t row = 0; row < w.rows; row++) {
      V after = bias;
      if constexpr (STEP == 1) {
        meet([&](const auto& x) {
          sum += x.times(weight + 6);
          next += x.times(weight + 3);
          after += x.times(weight);
        });
      } else {
        meet([&](const auto& x) { sum += x.times(weight + 3); });
        meet([&](const auto& x) {
          sum += x.times(weight + 6);
          next += x.times(weight);
        });
      }
      const int64_t at = int64_t(row) * w.pitch + first;
      finish<KIND>(w, out + at, more ? more + at : nullptr, sum, n);
      sum = next;
      next = after;
    }
  }
}

template <int KIND>
struct PlanedByRows {
  static INLINE void of(const PlaneInPlace& a) {
    a.stride_x == 1 ? plane_by_rows<KIND, 1>(a) : plane_by_rows<KIND, 2>(a);
  }
};

void plane_in_place(const PlaneInPlace& a) {
  if (a.by_rows) by_activation<PlanedByRows>(a.write.activation, a);
  else by_activation<PlanedInPlace>(a.write.activation, a);
}
#else
void (*const plane_in_place)(const PlaneInPlace&) = nullptr;
#endif

// As torch has it: nan is larger than anything.
INLINE V larger_or_nan(V a, V b) { return pick(a != a, a, larger(a, b)); }

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
      for (int32_t k = 1; k < bottom - top; k++) v = larger_or_nan(load(in + int64_t(k) * p.width + x), v);
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
        for (int32_t k = 1; k < p.kernel_x; k++) v = larger_or_nan(p.stride_x == 1 ? load(row + k) : every_second(row + k), v);
        store(out + i, v);
      }
    }
    for (; i < p.out_width; i++) out[i] = largest(p, i);
  }
}

// The weights of one row, times what they meet `apart` floats from one another: L are picked, and then multiplied at once.
template <bool ADJACENT>
INLINE float met(const float* weights, const int32_t* places, int64_t n, const float* in, int64_t apart) {
  if (ADJACENT) apart = 1;
  V sums = {};
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    V x;
#pragma GCC unroll 16
    for (int k = 0; k < L; k++) x[k] = in[places[i + k] * apart];
    sums += x * load(weights + i);
  }
  float result = 0;
  for (; i < n; i++) result += weights[i] * in[places[i] * apart];
#pragma GCC unroll 16
  for (int k = 0; k < L; k++) result += sums[k];
  return result;
}

template <int KIND>
struct Told {
  static INLINE void of(const Tokens& t) {
    const int64_t apart = t.in_view.channel;
    for (int32_t token = 0; token < t.tokens; token++) {
      const float* in = t.in + token * t.in_view.image;
      float* out = t.out + token * t.out_view.image;
      for (int64_t row = t.first; row < t.last; row += L) {
        float sums[L] = {};
        const int32_t here = t.last - row < L ? int32_t(t.last - row) : L;
        for (int32_t i = 0; i < here; i++) {
          const int64_t from = t.starts[row + i], n = t.starts[row + i + 1] - from;
          sums[i] = apart == 1 ? met<true>(t.weights + from, t.places + from, n, in, 1)
                               : met<false>(t.weights + from, t.places + from, n, in, apart);
          if (t.bias) sums[i] += t.bias[row + i];
        }
        float few[L];
        store(few, activated<KIND>(load(sums)));
        for (int32_t i = 0; i < here; i++) out[(row + i) * t.out_view.channel] = few[i];
      }
    }
  }
};

void tokens(const Tokens& t) { by_activation<Told>(t.activation, t); }

template <int KIND>
struct Added {
  static INLINE void of(const Elements& e) {
    int64_t i = 0;
    for (; i + L <= e.n; i += L) {
      V v = load(e.a + i);
      if (e.b) v += load(e.b + i);
      store(e.out + i, activated<KIND>(v));
    }
    if (i == e.n) return;
    const int32_t n = int32_t(e.n - i);
    V v = load_few(e.a + i, n);
    if (e.b) v += load_few(e.b + i, n);
    store_few(e.out + i, activated<KIND>(v), n);
  }
};

void add(const Elements& e) { by_activation<Added>(e.activation, e); }

void scale(const Elements& e) {
  const V factor = all(*e.b);
  int64_t i = 0;
  for (; i + L <= e.n; i += L) store(e.out + i, load(e.a + i) * factor);
  if (i < e.n) store_few(e.out + i, load_few(e.a + i, int32_t(e.n - i)) * factor, int32_t(e.n - i));
}

float sum(const float* x, int64_t n) {
  V sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int k = 0; k < 4; k++) sums[k] += load(x + i + k * L);
  for (; i + L <= n; i += L) sums[0] += load(x + i);
  if (i < n) sums[1] += load_few(x + i, int32_t(n - i));
  const V both = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float result = 0;
  for (int k = 0; k < L; k++) result += both[k];
  return result;
}

// Squares that stay in the first-level cache; inside one, columns of the input are read down and written along.
void turn(const Turn& t) {
  constexpr int32_t SIDE = 16;
  for (int32_t r = 0; r < t.rows; r += SIDE) {
    const int32_t rows = t.rows - r < SIDE ? t.rows - r : SIDE;
    for (int32_t c = 0; c < t.columns; c += SIDE) {
      const int32_t columns = t.columns - c < SIDE ? t.columns - c : SIDE;
      const float* in = t.in + r * t.in_pitch + c;
      float* out = t.out + c * t.out_pitch + r;
      if (rows == SIDE) {
        for (int32_t j = 0; j < columns; j++) {
          float few[SIDE];
#pragma GCC unroll 16
          for (int32_t i = 0; i < SIDE; i++) few[i] = in[i * t.in_pitch + j];
          for (int32_t i = 0; i < SIDE; i += L) store(out + j * t.out_pitch + i, load(few + i));
        }
      } else {
        for (int32_t j = 0; j < columns; j++)
          for (int32_t i = 0; i < rows; i++) out[j * t.out_pitch + i] = in[i * t.in_pitch + j];
      }
    }
  }
}

void multiply(const float* x, int64_t n, float* result) {
  constexpr int T = 14;
  V sums[T] = {};
  const V weight = all(result[0]);
  const V* from = reinterpret_cast<const V*>(x);
  for (int64_t i = 0; i + T <= n; i += T) {
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) sums[t] += weight * from[i + t];
  }
  V all_of_them = {};
  for (int t = 0; t < T; t++) all_of_them += sums[t];
  for (int k = 0; k < L; k++) result[1 + k] = all_of_them[k];
}

#define GOSSAMER_QUOTED_(x) #x
#define GOSSAMER_QUOTED(x) GOSSAMER_QUOTED_(x)

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {GOSSAMER_QUOTED(GOSSAMER_ISA), L, LONGEST, rows, copy, plane, plane_in_place,
                         max_pool, tokens, add, scale, sum, turn, multiply};

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
