// What is compiled once per instruction set. No std header here or where it is included: an inline function of the
// standard library that is compiled with wide vectors in one file and without in another may be kept in either form.
#pragma once
#include <stdint.h>

namespace gossamer {

// What follows the sum: y = act(x + bias + residual), or act(x + bias) + residual.
enum Activation : int32_t { NONE, RELU, RELU6, SILU, GELU, GELU_TANH, HARDSWISH, HARDSIGMOID, SIGMOID, N_ACTIVATIONS };

// Where the values of a tensor are, in floats: rows follow each other, images and channels lie this far apart.
struct View {
  int64_t channel, image;
};

// The rows of a tile that are written, and where to. A tile holds rows of one image or, side by side, of several.
struct Writer {
  float* out;             // of the first output channel at the tile's first pixel
  const float* residual;  // the same place in another tensor, or null
  const float* bias;      // one a channel, or null
  View view, residual_view;
  int32_t pitch;          // floats from one row to the next, in both
  int32_t images, rows, columns;  // of the tile that are inside the output
  int32_t image_pitch, tile_pitch, first;  // floats from one image and row to the next in the tile; its first pixel
  int32_t activation, add_last;
  int32_t direct;         // the tile is whole vectors, and they lie in the output as they are
};

// A group of output channels over a block of input planes, for one tile.
struct Rows {
  const float* x;           // the block's planes, aligned
  const float* weights;     // in the order in which they are used
  const uint16_t* offsets;  // of the input vector that each one meets, in units
  const uint16_t* counts;   // n_shifts a row: how many weights before the next shift
  const uint32_t* rows;     // channel in the group, and two flags
  const int32_t* channels;  // channel in the group -> output channel
  const uint8_t* shifts;    // how far to shift before each part
  float* sums;              // tile of each channel in the group
  int64_t unit;             // of offsets, in floats
  int32_t n_rows, n_shifts;
  Writer write;
};

// Weights that are met at a time, each by sums of its own: few sums would wait for one another.
constexpr int32_t ways_of(int32_t vectors) { return vectors <= 2 ? 4 : vectors == 3 ? 2 : 1; }

constexpr uint32_t FIRST = 1u << 31, LAST = 1u << 30;  // of the blocks that a channel has weights in

// How the planes of a block come out of the input.
struct Copy {
  const float* in;        // the tile's first image
  float* to;              // the block, aligned; what is not copied is zero already, or else with `fill` made so
  const int32_t* planes;  // channel, row phase, column phase of each
  View view;              // of the input
  int32_t n_planes, height, width;  // of the input
  int32_t stride_y, stride_x;
  int32_t y, x;              // of the block's first pixel, in the coordinates of a phase; may lie outside
  int32_t images, image_pitch;  // side by side in a row of the block
  int32_t rows, columns, pitch;  // of a plane in the block; columns are those that an image may fill
  int32_t fill;              // whole rows, of one image
};

// One channel of a depthwise convolution: a few weights, each of which meets the whole plane.
struct Plane {
  const float* x;          // the channel's planes, one a phase, with slack behind them
  const float* weights;
  const int32_t* offsets;  // of the float that each one meets first
  int32_t n, pitch;        // of the planes
  int32_t channel;
  Writer write;            // rows and columns are the output's
};

// The same where the plane is read as it lies, with masks at its edges.
struct PlaneInPlace {
  const float *in, *weights;
  const int32_t* taps;     // (row, column) of the pixel that each weight meets, from the output's times the stride
  int32_t n, height, width, stride_y, stride_x;
  int32_t top;             // the first row that is written
  int32_t channel;
  Writer write;
  bool by_rows;            // nine weights, of 3 × 3 pixels that are next to each other, in steps of 1 or of 2 both ways
};

// The largest of each window of one plane.
struct Pool {
  const float* in;
  float* out;
  float* row;  // scratch of width + 2 vectors
  int32_t height, width, out_height, out_width;
  int32_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x;
};

// Few tokens through a linear layer: the weights of a row that are not zero, times what they meet.
struct Tokens {
  const float *weights, *in;  // of feature f and token t: in[f * feature + t * token]
  const int32_t* places;      // of each weight, in its row
  const int64_t* starts;      // of each row's weights
  const float* bias;
  float* out;
  View in_view, out_view;     // channel: from one feature to the next, image: from one token to the next
  int64_t first, last;        // rows [first, last)
  int32_t tokens, activation;
};

// n floats of one plane: out = act(a + b), act(a), or a times the number in b.
struct Elements {
  const float *a, *b;
  float* out;
  int64_t n;
  int32_t activation;
};

// [rows, columns] -> [columns, rows]
struct Turn {
  const float* in;
  float* out;
  int64_t in_pitch, out_pitch;
  int32_t rows, columns;
};

struct Kernels {
  const char* name;
  int32_t lanes;     // floats a vector
  int32_t longest;   // vectors a tile, at most
  void (*rows)(int32_t vectors, const Rows&);
  void (*copy)(const Copy&);
  void (*plane)(const Plane&);
  void (*plane_in_place)(const PlaneInPlace&);  // null where there are no masks; of stride 2 along rows
  void (*max_pool)(const Pool&);
  void (*tokens)(const Tokens&);
  void (*add)(const Elements&);
  void (*scale)(const Elements&);
  float (*sum)(const float*, int64_t n);
  void (*turn)(const Turn&);
  void (*multiply)(const float* x, int64_t n, float* result);  // for timing: n vectors, each into one of 16 sums
};

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512_256 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

}  // namespace gossamer
