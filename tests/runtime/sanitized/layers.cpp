// Layers, the other steps, a small network and the file format, in every instruction set that there is.
#include <set>
#include <string>

#include "common.h"
#include "network.h"

extern "C" {
int64_t gossamer_count_bits(const uint8_t*, int64_t);
int64_t gossamer_count_gaps(const uint8_t*, int64_t, int64_t*);
int32_t gossamer_expand_bits(const uint8_t*, int64_t, const void*, int64_t, void*, int32_t);
int32_t gossamer_expand_gaps(const uint8_t*, int64_t, int64_t, const void*, void*, int32_t);
}

// A tensor in a buffer of its own: as PyTorch has it, by tokens, or planar, where it may be a part of something larger.
struct Tensor {
  GossamerValue v{};
  float* data;
  int64_t images, channels, pixels;
  bool planar;
  Tensor(int64_t n, int64_t c, int64_t p, bool in_planar, int buffer)
      : images(n), channels(c), pixels(p), planar(in_planar) {
    v.buffer = buffer;
    const int64_t before = planar ? in(0, 2) : 0, behind = planar ? in(0, 2) : 0;
    v.view.channel = !planar ? pixels : n * p < 8 ? n * p : 16 * (((n * p + 15) / 16) | 1);
    v.view.image = planar ? pixels : channels * pixels;
    v.at = before * v.view.channel;
    data = aligned(planar ? (before + c + behind) * v.view.channel : n * c * p);
  }
  float& of(int64_t n, int64_t c, int64_t p) { return data[v.at + n * v.view.image + c * v.view.channel + p]; }
  bool whole() const { return planar && images * pixels >= 8; }
};

std::set<std::string> ways;

// A layer, and another one behind it that reads what the first wrote, in one run.
void layers(int isa) {
  const bool point = in(0, 2) == 0, depthwise = !point && in(0, 3) == 0;
  const int groups = point ? 1 : depthwise ? in(2, 6) : in(1, 3);
  const int cin = depthwise ? 1 : in(1, 12), out = groups * in(1, 9);
  const bool three = depthwise && in(0, 1);  // 3 × 3 weights, all of them there, which have a kernel of their own
  const int kh = point ? 1 : three ? 3 : in(1, 5), kw = point ? 1 : three ? 3 : in(1, 5), step = in(1, 2);
  const int32_t shape[] = {out, cin, kh, kw, groups, point ? 1 : three ? step : in(1, 3), point ? 1 : three ? step : in(1, 3),
                           point ? 0 : in(0, 3), point ? 0 : in(0, 3), three ? 1 : in(1, 2), three ? 1 : in(1, 2)};
  const int images = in(0, 3) ? in(1, 3) : in(4, 33), threads = in(1, 3);
  const int h = in(1, images > 3 ? 6 : 20), w = in(1, images > 3 ? 6 : 40);
  if (h + 2 * shape[7] < shape[9] * (kh - 1) + 1 || w + 2 * shape[8] < shape[10] * (kw - 1) + 1) return;
  const int oh = (h + 2 * shape[7] - shape[9] * (kh - 1) - 1) / shape[5] + 1;
  const int ow = (w + 2 * shape[8] - shape[10] * (kw - 1) - 1) / shape[6] + 1;
  std::vector<float> weight(size_t(out) * cin * kh * kw), bias(out), second(size_t(3) * out);
  const int keep = three ? 3 : in(0, 3);
  for (auto& v : weight) v = in(1, 3) > keep ? 0 : real();
  for (auto& v : bias) v = real();
  for (auto& v : second) v = in(0, 1) ? 0 : real();
  const bool with_bias = in(0, 1), with_more = in(0, 1);
  Tensor x(images, cin * groups, h * w, in(0, 1), 0), more(images, out, oh * ow, in(0, 1), 1);
  Tensor y(images, out, oh * ow, in(0, 1), 2), z(images, 3, oh * ow, in(0, 1), 3);
  float* buffers[] = {x.data, more.data, y.data, z.data};
  GossamerLayer* layer = gossamer_layer_new(weight.data(), with_bias ? bias.data() : nullptr, shape);
  const int32_t point_shape[] = {3, out, 1, 1, 1, 1, 1, 0, 0, 1, 1};
  GossamerLayer* next = gossamer_layer_new(second.data(), nullptr, point_shape);
  const bool together = x.planar && y.planar && (!with_more || more.planar);
  const GossamerUse use{images, h, w, threads, isa, (x.whole() ? 1 : 0) + (together && y.whole() ? 2 : 0), 0};
  const GossamerUse use_next{images, oh, ow, threads, isa, (y.whole() ? 1 : 0) + (y.planar && z.whole() ? 2 : 0), 0};
  const char* why = nullptr;
  GossamerPlan* plans[] = {gossamer_plan_new(layer, &use, &why), gossamer_plan_new(next, &use_next, &why)};
  if (!plans[0] || !plans[1]) { std::printf("no plan: %s\n", why); std::exit(1); }
  char text[160];
  gossamer_plan_text(plans[0], text, sizeof text);
  ways.insert(std::string(text).find("row by") != std::string::npos     ? "depthwise by rows"
              : std::string(text).find("plane by") != std::string::npos ? "depthwise"
              : std::string(text).find("in place") != std::string::npos ? "in place"
              : std::string(text).find("weight") != std::string::npos   ? "tokens"
              : std::string(text).find(" 1 images") != std::string::npos ? "tile" : "tile of several");
  if (!(gossamer_plan_cost(plans[0]) >= 0) || !(gossamer_dense_cost(layer, &use) >= 0)) std::exit(1);
  GossamerStep steps[2] = {};
  const int activation = in(0, 8), add_last = in(0, 1);
  steps[0] = {plans[0], x.v, more.v, y.v, images, cin * groups, h, w, oh, ow, {}, GOSSAMER_LAYER, activation, add_last,
              isa};
  if (!with_more) steps[0].b.buffer = -1;
  GossamerValue none{};
  none.buffer = -1;
  steps[1] = {plans[1], y.v, none, z.v, images, out, oh, ow, oh, ow, {}, GOSSAMER_LAYER, 0, 0, isa};
  double seconds[2];
  const int64_t strides[4] = {};
  const GossamerRun once{steps, 2, buffers, strides, 4, 1, threads, 0, in(0, 1) ? seconds : nullptr};
  if (gossamer_run(&once)) std::exit(1);
  const int per = out / groups;
  for (int times = 0; times < 5; times++) {  // some of the numbers
    const int n = in(0, images - 1), o = in(0, out - 1), i = in(0, oh - 1), j = in(0, ow - 1);
    double sum = with_bias ? bias[o] : 0;
    for (int c = 0; c < cin; c++)
      for (int a = 0; a < kh; a++)
        for (int b = 0; b < kw; b++) {
          const int row = i * shape[5] - shape[7] + a * shape[9], column = j * shape[6] - shape[8] + b * shape[10];
          if (row < 0 || row >= h || column < 0 || column >= w) continue;
          const double factor = weight[((size_t(o) * cin + c) * kh + a) * kw + b];
          sum += factor * x.of(n, o / per * cin + c, row * w + column);
        }
    const int at = i * ow + j;
    const double rest = with_more ? more.of(n, o, at) : 0;
    if (activation <= 1) {
      const double before = add_last ? sum : sum + rest;
      near(y.of(n, o, at), (activation ? std::max(0.0, before) : before) + (add_last ? rest : 0), text);
    }
    double last = 0;
    for (int k = 0; k < out; k++) last += double(second[size_t(2) * out + k]) * y.of(n, k, at);
    near(z.of(n, 2, at), last, "the second layer");
  }
  for (auto* p : plans) gossamer_plan_free(p);
  gossamer_layer_free(layer);
  gossamer_layer_free(next);
  for (float* b : buffers) std::free(b);
}

// Each of the other steps, one after the other on the same tensor, in any layout.
void planes(int isa) {
  const int images = in(1, 5), channels = in(1, 20), h = in(1, 20), w = in(1, 40), threads = in(1, 3);
  const int k = in(1, 4), l = in(1, 4), p = in(0, k / 2), q = in(0, l / 2), s = in(1, 3), t = in(1, 3);
  const int oh = (h + 2 * p - k) / s + 1, ow = (w + 2 * q - l) / t + 1;
  if (h + 2 * p < k || w + 2 * q < l) return;
  Tensor x(images, channels, h * w, in(0, 1), 0), y(images, channels, h * w, in(0, 1), 1);
  Tensor few(images, channels, 1, in(0, 1), 2), pooled(images, channels, oh * ow, in(0, 1), 3);
  Tensor scaled(images, channels, h * w, in(0, 1), 4), turned(images, channels, 1, in(0, 1), 5);
  Tensor copied(images, channels, h * w, in(0, 1), 6);
  float* buffers[] = {x.data, y.data, few.data, pooled.data, scaled.data, turned.data, copied.data};
  GossamerValue none{};
  none.buffer = -1;
  const bool two = in(0, 1);
  const GossamerValue extra = two ? x.v : none;
  const GossamerStep steps[] = {
      {nullptr, x.v, extra, y.v, images, channels, h, w, h, w, {}, GOSSAMER_ADD, 1, 0, isa},
      {nullptr, y.v, none, few.v, images, channels, h, w, 1, 1, {}, GOSSAMER_MEAN, 0, 0, isa},
      {nullptr, y.v, none, pooled.v, images, channels, h, w, oh, ow, {k, l, s, t, p, q}, GOSSAMER_MAX_POOL, 0, 0, isa},
      {nullptr, y.v, few.v, scaled.v, images, channels, h, w, h, w, {}, GOSSAMER_SCALE, 0, 0, isa},
      {nullptr, few.v, none, turned.v, images, channels, 1, 1, 1, 1, {}, GOSSAMER_COPY, 0, 0, isa},
      {nullptr, y.v, none, copied.v, images, channels, h, w, h, w, {}, GOSSAMER_COPY, 0, 0, isa},
  };
  double seconds[6];
  const int64_t strides[7] = {};
  const GossamerRun once{steps, 6, buffers, strides, 7, 1, threads, 0, seconds};
  if (gossamer_run(&once)) std::exit(1);
  for (int times = 0; times < 5; times++) {
    const int n = in(0, images - 1), c = in(0, channels - 1), at = in(0, h * w - 1);
    const int i = in(0, oh - 1), j = in(0, ow - 1);
    near(y.of(n, c, at), std::max(0.0, (two ? 2.0 : 1.0) * x.of(n, c, at)), "add");
    near(copied.of(n, c, at), y.of(n, c, at), "copy");
    near(scaled.of(n, c, at), double(y.of(n, c, at)) * few.of(n, c, 0), "scale");
    double sum = 0, most = -1e30;
    for (int pixel = 0; pixel < h * w; pixel++) sum += y.of(n, c, pixel);
    near(few.of(n, c, 0), sum / (h * w), "mean");
    near(turned.of(n, c, 0), few.of(n, c, 0), "turn");
    for (int a = std::max(0, i * s - p); a < std::min(h, i * s - p + k); a++)
      for (int b = std::max(0, j * t - q); b < std::min(w, j * t - q + l); b++)
        most = std::max(most, double(y.of(n, c, a * w + b)));
    near(pooled.of(n, c, i * ow + j), most, "max pool");
  }
  for (float* b : buffers) std::free(b);
}

void codec() {
  const int64_t bits = in(0, 200);
  std::vector<uint8_t> index((bits + 7) / 8);
  for (auto& b : index) b = uint8_t(r());
  const int64_t set = gossamer_count_bits(index.data(), bits);
  if (set >= 0) {
    std::vector<uint16_t> values(set), wide(bits);
    gossamer_expand_bits(index.data(), bits, values.data(), set, wide.data(), 2);
  }
  std::vector<uint8_t> gaps(in(0, 30));
  for (auto& g : gaps) g = in(0, 3) ? uint8_t(r()) : 255;
  int64_t covered = 0;
  const int64_t count = gossamer_count_gaps(gaps.data(), int64_t(gaps.size()), &covered);
  std::vector<uint64_t> values(count), wide(covered);
  gossamer_expand_gaps(gaps.data(), int64_t(gaps.size()), covered, values.data(), wide.data(), 8);
}

int main() {
  int n_isas = 0;
  while (gossamer_isa(n_isas)) n_isas++;
  if (gossamer_isa(-1) || gossamer_abi() < 1) return 1;
  const int32_t one[] = {1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1}, wide[] = {1, 1, 1, 400, 1, 1, 1, 0, 0, 1, 1};
  std::vector<float> weight(400, 1);
  for (const int32_t* shape : {one, wide}) {
    GossamerLayer* layer = gossamer_layer_new(weight.data(), nullptr, shape);
    const char* why = nullptr;
    const GossamerUse use{1, 1, 500, 1, shape == one ? n_isas : 0, 0, 0};
    if (gossamer_plan_new(layer, &use, &why) || !why) return 1;
    gossamer_layer_free(layer);
  }
  int n = 0;
  for (; n < 150; n++) {
    for (int isa = 0; isa < n_isas; isa++) {
      layers(isa);
      planes(isa);
      if (n % 10 == 0) networks(isa);
    }
    codec();
  }
  std::printf("%d rounds, %d instruction sets", n, n_isas);
  for (auto& way : ways) std::printf(", %s", way.c_str());
}
