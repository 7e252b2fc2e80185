// The C interface. Pointers are to row-major float32; nothing is owned across it but what is made and freed here.
#pragma once
#include <stdint.h>

#if defined(__GNUC__)
#define GOSSAMER_API extern "C" __attribute__((visibility("default")))
#else
#define GOSSAMER_API extern "C"
#endif

struct GossamerLayer;
struct GossamerPlan;

// Where a tensor's values are, in elements: rows of an image follow each other, channels and images lie this far apart.
// Linear layers are convolutions of one pixel a token: a feature is a channel.
struct GossamerView {
  int64_t channel, image;
};

// A tensor in one of the buffers that a run is given.
struct GossamerValue {
  int32_t buffer;  // -1: there is none
  int32_t unused;
  int64_t at;      // its first element
  GossamerView view;
};

enum GossamerKind : int32_t {
  GOSSAMER_LAYER,     // out = act(layer(a) + b), or act(layer(a)) + b
  GOSSAMER_MAX_POOL,  // window: kernel (y, x), stride (y, x), padding (y, x)
  GOSSAMER_ADD,       // out = act(a + b), or act(a)
  GOSSAMER_SCALE,     // out = a times b, which has one pixel
  GOSSAMER_MEAN,      // of all pixels
  GOSSAMER_COPY,      // from one view to another
};

struct GossamerStep {
  const GossamerPlan* plan;  // of a layer
  GossamerValue a, b, out;
  int64_t images, channels;  // of a
  int32_t height, width, out_height, out_width;
  int32_t window[6];
  int32_t kind;
  int32_t activation;        // see float32/kernels.h
  int32_t add_last;          // b after the activation
  int32_t isa;               // one of gossamer_isa, for what has no plan
};

// What a layer is run on. direct: bit 0, a lies in whole vectors, images one after the other; bit 1, so do b and out; bit 2,
// threads share channels where planes are small, as in a network with depthwise layers, so that each finds its own again.
struct GossamerUse {
  int64_t images;
  int32_t height, width, threads, isa;  // isa: one of gossamer_isa, or -1 for the best
  int32_t direct;
  int32_t dry;  // only the cost is asked for
};

GOSSAMER_API int32_t gossamer_abi();
// Names of the instruction sets that this machine can run, best first; null beyond the last.
GOSSAMER_API const char* gossamer_isa(int32_t i);
// Null where memory is short. shape: out channels, in channels of a group, kernel height, width, groups, strides (y, x),
// paddings (y, x), dilations (y, x).
GOSSAMER_API GossamerLayer* gossamer_layer_new(const float* weight, const float* bias, const int32_t* shape);
GOSSAMER_API void gossamer_layer_free(GossamerLayer*);
// Null where the layer does not fit the kernel (the message says why), or memory is short.
GOSSAMER_API GossamerPlan* gossamer_plan_new(const GossamerLayer*, const GossamerUse*, const char** why);
GOSSAMER_API void gossamer_plan_free(GossamerPlan*);
// What the plan is expected to cost, in multiplications of the widest vectors from the first-level cache.
GOSSAMER_API double gossamer_plan_cost(const GossamerPlan*);
// In words: instruction set, tile, blocks. Into `text` of `size` bytes.
GOSSAMER_API void gossamer_plan_text(const GossamerPlan*, char* text, int64_t size);
// The same for a dense kernel, PyTorch's.
GOSSAMER_API double gossamer_dense_cost(const GossamerLayer*, const GossamerUse*);

// Steps over some buffers, `batches` times, each time on the next part of each buffer; batches are shared out to threads,
// or, where there is one, each step is.
struct GossamerRun {
  const GossamerStep* steps;
  int64_t n_steps;
  float* const* buffers;   // the first is memory for what is between steps, a part for each thread that takes batches
  const int64_t* strides;  // of each buffer's parts, in elements
  int64_t n_buffers, batches;
  int32_t threads;
  int32_t team;            // whether on PyTorch's threads, where they can be had
  double* seconds;         // of each step, or null; with one batch
};
// 0, or 1 where memory is short.
GOSSAMER_API int32_t gossamer_run(const GossamerRun*);
// Bytes of the second-level cache.
GOSSAMER_API int64_t gossamer_cache();
// Whether PyTorch's threads can be had.
GOSSAMER_API int32_t gossamer_has_team();

// Selection (select.cpp): the weights of a layer, or scores of its units, and the mask that belongs to them.
struct GossamerSweep {
  uint8_t* keep;         // the mask, n bytes of 0 or 1
  int64_t n, n_kept;     // n_kept: how many of them are 1
  void* const* tensors;  // of n elements, to be zero where the mask is 0
  const int32_t* sizes;  // of their elements: 1, 2, 4 or 8 bytes
  int32_t n_tensors;
  int32_t kind;        // scores are the magnitudes of 0 float16, 1 bfloat16, 2 float32, 3 float64; or 4 float32, 5 float64
  const void* scores;  // n of these; may be one of the tensors
  int64_t n_masked;    // out: how many more are masked now
  int64_t least;       // how many must be kept
};

// Gives 1 where an argument is none of those above, 2 where memory is short. isa: as for gossamer_isa.
GOSSAMER_API int32_t gossamer_zero(const GossamerSweep*, int32_t threads, int32_t isa);
// Layers that compete for what is to be masked.
struct GossamerGroup {
  GossamerSweep* layers;  // which compete
  int64_t n_layers;
  int64_t need;      // at least 1
  double hint;       // a score that the needed ones probably lie below, or nan
  double threshold;  // out: the highest score that went; nan where that is not known
  double upper;      // out: the upper end of the bracket that was looked at
  int64_t left;      // out: how many kept scores were left in it
  int32_t failed;    // out: 1 where an argument is none of those above, 2 where memory is short, 3 where there are fewer
                     // kept scores that are numbers, 4 where a layer would keep too few; no mask was changed then
};

// Masks in each group the `need` lowest kept scores (ties in the order of layers and positions), and zeroes. whole: where
// a group fails, or a magnitude is infinite or no number, all groups fail.
GOSSAMER_API void gossamer_drop(GossamerGroup* groups, int64_t n_groups, int32_t threads, int32_t isa, int32_t whole);
