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
