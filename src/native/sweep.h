// What of select.cpp is compiled once per instruction set. As in the kernels: no std header here or in sweep.cpp.
#pragma once
#include <stdint.h>

namespace gossamer {

// What scores are read from: the bits of weights whose magnitude is the score, or scores that are given.
enum Scores : int32_t { MAGNITUDE_HALF, MAGNITUDE_FLOAT, MAGNITUDE_DOUBLE, GIVEN_FLOAT, GIVEN_DOUBLE, N_SCORES };

// A bound that scores are compared with: at most `whole` where the score is a magnitude's bits, at most `real` else.
struct Bound {
  int64_t whole;  // -1: nothing is as low
  double real;    // nan: nothing is as low
};

// What a scan has come across so far.
struct Seen {
  int64_t settled;  // kept elements at most at the lower bound
  int64_t most;     // the bits of the largest magnitude, kept or not, where scores are magnitudes
};

constexpr int64_t PIECE = 1 << 13;  // elements that a loop is called with, at most
constexpr int64_t SLACK = 2;        // that may be written behind what was found

struct Loops {
  const char* name;
  // Sets elements of 1 << i bytes to zero where keep is 0.
  void (*zero[4])(const uint8_t* keep, void* tensor, int64_t n);
  // Of the kept elements: writes where those are that lie at most at `high` and not at `low`, counts them, and adds to
  // settled how many lie at most at `low`. keep null: all are kept.
  int64_t (*scan[N_SCORES])(
      const void* scores, const uint8_t* keep, int64_t n, Bound low, Bound high, uint16_t* found, Seen* seen);
  // Sets keep to 0 where a score lies at most at the bound.
  void (*cut[N_SCORES])(const void* scores, uint8_t* keep, int64_t n, Bound bound);
  // The same, and what the scores are read from to zero, which is so already where keep was 0.
  void (*drop[MAGNITUDE_DOUBLE + 1])(void* weights, uint8_t* keep, int64_t n, Bound bound);
};

namespace baseline { extern const Loops loops; }
namespace avx2 { extern const Loops loops; }
namespace avx512 { extern const Loops loops; }

}  // namespace gossamer
