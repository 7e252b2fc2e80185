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

// One convolution to run. Linear layers are convolutions of one pixel a token.
struct GossamerStep {
  const GossamerPlan* plan;
  const float* in;        // [images, in channels, height, width]
  const float* residual;  // as out, or null
  float* out;             // [images, out channels, out height, out width]
  int64_t images;
  int32_t activation;     // see kernels.h
  int32_t add_last;       // residual after the activation
};

GOSSAMER_API int32_t gossamer_abi();
// Names of the instruction sets that this machine can run, best first; null beyond the last.
GOSSAMER_API const char* gossamer_isa(int32_t i);
// Null where memory is short. shape: out channels, in channels of a group, kernel height, width, groups, strides (y, x),
// paddings (y, x), dilations (y, x).
GOSSAMER_API GossamerLayer* gossamer_layer_new(const float* weight, const float* bias, const int32_t* shape);
GOSSAMER_API void gossamer_layer_free(GossamerLayer*);
// Null where the layer does not fit the kernel (the message says why), or memory is short.
GOSSAMER_API GossamerPlan* gossamer_plan_new(
    const GossamerLayer*, int64_t images, int32_t height, int32_t width, int32_t threads, int32_t isa, const char** why);
GOSSAMER_API void gossamer_plan_free(GossamerPlan*);
// These give 0, or 1 where memory is short.
GOSSAMER_API int32_t gossamer_run(const GossamerStep* steps, int64_t n, int32_t threads);
// A layer of 1×1 kernels as a linear one, for few tokens: [tokens, in channels] -> [tokens, out channels].
GOSSAMER_API int32_t gossamer_run_tokens(
    const GossamerLayer*, const float* in, float* out, int64_t tokens, int32_t activation, int32_t threads);
// shape: height, width, out height, out width, kernel (y, x), stride (y, x), padding (y, x)
GOSSAMER_API int32_t gossamer_max_pool(
    const float* in, float* out, int64_t planes, const int32_t* shape, int32_t threads);

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
                     // kept scores that are numbers; no mask was changed then
};

// Masks in each group the `need` lowest kept scores (ties in the order of layers and positions), and zeroes.
GOSSAMER_API void gossamer_drop(GossamerGroup* groups, int64_t n_groups, int32_t threads, int32_t isa);
