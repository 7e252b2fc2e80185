// A small network with a step of each kind, run for several shapes in turn: batches of many images, parts of them for each
// thread, and memory in which what lies between two values is poisoned.
#pragma once
#include <array>
#include <memory>

#include "common.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, size) ((void)(from), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(from, size) ((void)(from), (void)(size))
#endif

using Images = std::vector<double>;  // of one image: [channels, height, width]

struct Freed {
  void operator()(GossamerLayer* layer) const { gossamer_layer_free(layer); }
  void operator()(GossamerPlan* plan) const { gossamer_plan_free(plan); }
  void operator()(float* data) const { std::free(data); }
};

struct Conv {
  int32_t shape[11];
  std::vector<float> weight, bias;
  std::unique_ptr<GossamerLayer, Freed> layer;
  Conv(int out, int in_channels, int kernel, int groups, int stride)
      : shape{out, in_channels, kernel, kernel, groups, stride, stride, kernel / 2, kernel / 2, 1, 1},
        weight(size_t(out) * in_channels * kernel * kernel), bias(out) {
    for (auto& v : weight) v = in(0, 2) ? 0 : real();
    for (auto& v : bias) v = real();
    layer.reset(gossamer_layer_new(weight.data(), bias.data(), shape));
  }
  int size(int of) const { return (of + 2 * shape[7] - shape[2]) / shape[5] + 1; }
  Images operator()(const Images& x, int h, int w) const {
    const int oh = size(h), ow = size(w), per = shape[0] / shape[4];
    Images y(size_t(shape[0]) * oh * ow);
    for (int o = 0; o < shape[0]; o++)
      for (int i = 0; i < oh; i++)
        for (int j = 0; j < ow; j++) {
          double sum = bias[o];
          for (int c = 0; c < shape[1]; c++)
            for (int a = 0; a < shape[2]; a++)
              for (int b = 0; b < shape[3]; b++) {
                const int row = i * shape[5] - shape[7] + a, column = j * shape[6] - shape[8] + b;
                if (row < 0 || row >= h || column < 0 || column >= w) continue;
                const double factor = weight[((size_t(o) * shape[1] + c) * shape[2] + a) * shape[3] + b];
                sum += factor * x[(size_t(o / per * shape[1]) + c) * h * w + row * w + column];
              }
          y[(size_t(o) * oh + i) * ow + j] = sum;
        }
    return y;
  }
};

inline Images relu(Images x) {
  for (double& v : x) v = std::max(0.0, v);
  return x;
}

struct Network {
  int channels = in(1, 20), first = in(1, 6);
  Conv conv{channels, first, 2 * in(0, 2) + 1, 1, in(1, 2)};
  Conv depthwise{channels, 1, 3, channels, 1}, point{channels, channels, 1, 1, 1}, gate{channels, channels, 1, 1, 1};

  // [channels, h, w] of each image, as plain loops have it.
  Images operator()(const Images& x, int h, int w) const {
    const int oh = conv.size(h), ow = conv.size(w), ph = std::max(1, oh / 2), pw = std::max(1, ow / 2);
    const Images a = relu(conv(x, h, w)), b = depthwise(a, oh, ow);
    Images c = point(b, oh, ow), d(size_t(channels) * ph * pw), mean(channels);
    for (size_t i = 0; i < c.size(); i++) c[i] = std::max(0.0, c[i] + a[i]);
    for (int o = 0; o < channels; o++)
      for (int i = 0; i < ph; i++)
        for (int j = 0; j < pw; j++) {
          double most = -1e30;
          for (int k = 2 * i; k < std::min(oh, 2 * i + 2); k++)
            for (int l = 2 * j; l < std::min(ow, 2 * j + 2); l++) most = std::max(most, c[(size_t(o) * oh + k) * ow + l]);
          d[(size_t(o) * ph + i) * pw + j] = 2 * most;  // it is added to itself
          mean[o] += 2 * most / (ph * pw);
        }
    const Images factor = relu(gate(mean, 1, 1));
    for (int o = 0; o < channels; o++)
      for (int i = 0; i < ph * pw; i++) d[size_t(o) * ph * pw + i] *= factor[o];
    return d;
  }
};

// A network for one shape, with buffers of its own: `images` at a time, `batches` times.
class Ready {
 public:
  Ready(const Network& network, int isa, int images, int batches, int threads)
      : net_(network), images_(images), batches_(batches), threads_(threads) {
    h_ = in(1, images > 3 ? 9 : 24), w_ = in(1, images > 3 ? 9 : 40);
    oh_ = net_.conv.size(h_), ow_ = net_.conv.size(w_), ph_ = std::max(1, oh_ / 2), pw_ = std::max(1, ow_ / 2);
    const int c = net_.channels, pixels = oh_ * ow_, few = ph_ * pw_;
    // Six values between steps, each followed by a line that nobody may touch.
    const int64_t sizes[] = {pixels, pixels, pixels, few, few, 1, 1, few};
    GossamerValue values[8];
    for (int i = 0; i < 8; i++) {
      const int64_t n = sizes[i] * images, pitch = n < 8 ? n : 16 * (((n + 15) / 16) | 1);
      values[i] = {0, 0, memory_, {pitch, sizes[i]}};
      memory_ += (c * pitch + 15) / 16 * 16;
      gaps_.push_back(memory_);
      memory_ += 16;
    }
    const int64_t in_size = int64_t(images) * net_.first * h_ * w_, out_size = int64_t(images) * c * few;
    memory.reset(aligned(memory_ * threads));
    x.reset(aligned(in_size * batches));
    y.reset(aligned(out_size * batches));
    const GossamerValue from{1, 0, 0, {int64_t(h_) * w_, int64_t(net_.first) * h_ * w_}};
    const GossamerValue to{2, 0, 0, {few, int64_t(c) * few}}, none{-1, 0, 0, {0, 0}};
    const auto& [a, b, d, pooled, twice, mean, factor, scaled] = values;
    strides_ = {memory_, in_size, out_size};
    const int shared = batches > 1 ? 1 : threads;
    const bool whole = pixels * images >= 8, one = images >= 8;
    const GossamerPlan* plans[] = {
        plan(net_.conv, {images, h_, w_, shared, isa, whole ? 2 : 0, 0}),
        plan(net_.depthwise, {images, oh_, ow_, shared, isa, whole ? 3 : 0, 0}),
        plan(net_.point, {images, oh_, ow_, shared, isa, whole ? 3 : 0, 0}),
        plan(net_.gate, {images, 1, 1, shared, isa, one ? 3 : 0, 0}),
    };
    const int32_t kernel_y = std::min(2, oh_), kernel_x = std::min(2, ow_);
    steps_ = {
        {plans[0], from, none, a, images, net_.first, h_, w_, oh_, ow_, {}, GOSSAMER_LAYER, 1, 0, isa},
        {plans[1], a, none, b, images, c, oh_, ow_, oh_, ow_, {}, GOSSAMER_LAYER, 0, 0, isa},
        {plans[2], b, a, d, images, c, oh_, ow_, oh_, ow_, {}, GOSSAMER_LAYER, 1, 0, isa},
        {nullptr, d, none, pooled, images, c, oh_, ow_, ph_, pw_, {kernel_y, kernel_x, 2, 2, 0, 0}, GOSSAMER_MAX_POOL, 0, 0, isa},
        {nullptr, pooled, pooled, twice, images, c, ph_, pw_, ph_, pw_, {}, GOSSAMER_ADD, 0, 0, isa},
        {nullptr, twice, none, mean, images, c, ph_, pw_, 1, 1, {}, GOSSAMER_MEAN, 0, 0, isa},
        {plans[3], mean, none, factor, images, c, 1, 1, 1, 1, {}, GOSSAMER_LAYER, 1, 0, isa},
        {nullptr, twice, factor, scaled, images, c, ph_, pw_, ph_, pw_, {}, GOSSAMER_SCALE, 0, 0, isa},
        {nullptr, scaled, none, to, images, c, ph_, pw_, ph_, pw_, {}, GOSSAMER_COPY, 0, 0, isa},
    };
    for (int image : {0, images * batches / 2, images * batches - 1}) {
      const float* begin = x.get() + int64_t(image) * net_.first * h_ * w_;
      wants_.push_back({image, net_(Images(begin, begin + int64_t(net_.first) * h_ * w_), h_, w_)});
    }
    for (int t = 0; t < threads; t++)
      for (int64_t gap : gaps_) ASAN_POISON_MEMORY_REGION(memory.get() + t * memory_ + gap, 64);
  }
  ~Ready() { ASAN_UNPOISON_MEMORY_REGION(memory.get(), memory_ * threads_ * 4); }

  void run() {
    float* buffers[] = {memory.get(), x.get(), y.get()};
    const int64_t out_size = strides_[2] / images_;
    std::fill(y.get(), y.get() + strides_[2] * batches_, NAN);
    const GossamerRun once{steps_.data(), int64_t(steps_.size()), buffers, strides_.data(), 3, batches_, threads_, 0, nullptr};
    if (gossamer_run(&once)) std::exit(1);
    for (const auto& [image, want] : wants_)
      for (int64_t i = 0; i < out_size; i++) near(y.get()[image * out_size + i], want[size_t(i)], "a network");
  }

 private:
  const GossamerPlan* plan(const Conv& conv, const GossamerUse& use) {
    const char* why = nullptr;
    plans_.emplace_back(gossamer_plan_new(conv.layer.get(), &use, &why));
    if (!plans_.back()) std::printf("no plan: %s\n", why), std::exit(1);
    return plans_.back().get();
  }
  const Network& net_;
  int images_, batches_, threads_, h_, w_, oh_, ow_, ph_, pw_;
  int64_t memory_ = 0;
  std::unique_ptr<float, Freed> memory, x, y;
  std::vector<std::unique_ptr<GossamerPlan, Freed>> plans_;
  std::vector<GossamerStep> steps_;
  std::vector<int64_t> strides_, gaps_;
  std::vector<std::pair<int, Images>> wants_;
};

// One network, for several batches and image sizes, each of which comes again.
inline void networks(int isa) {
  const Network network;
  std::vector<std::unique_ptr<Ready>> all;
  for (int images : {1, 2, 7, 33}) all.push_back(std::make_unique<Ready>(network, isa, images, in(1, 3), in(1, 2)));
  for (int times = 0; times < 2; times++)
    for (auto& ready : all) ready->run();
  std::shuffle(all.begin(), all.end(), r);
  for (auto& ready : all) ready->run();
}
