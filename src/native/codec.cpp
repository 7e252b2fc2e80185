// Sparse tensors from their bytes. What is read has been checked by nobody: each function checks all of it before it
// writes, and says how much there is. docs/format.md describes the encodings.
#include "gossamer.h"

#include <cstring>

namespace {

template <class T>
void expand_bits(const uint8_t* bits, int64_t n, const T* values, int64_t n_values, T* out) {
  int64_t i = 0, at = 0;
  // Without a branch, since no processor can guess the bits; near the end there might be no value to read in vain.
  for (; i + 8 <= n && at + 8 < n_values; i += 8) {
    const uint32_t set = bits[i / 8];
    for (int k = 0; k < 8; k++) {
      const uint32_t here = set >> k & 1;
      out[i + k] = T(values[at] & T(0 - T(here)));
      at += here;
    }
  }
  for (; i < n; i++) out[i] = bits[i / 8] >> (i % 8) & 1 ? values[at++] : T(0);
}

template <class T>
void expand_gaps(const uint8_t* gaps, int64_t n_gaps, int64_t n, const T* values, T* out) {
  if (n) std::memset(out, 0, size_t(n) * sizeof(T));
  int64_t at = 0;
  for (int64_t i = 0; i < n_gaps; i++) {
    at += gaps[i];
    if (gaps[i] != 255) out[at++] = *values++;
  }
}

template <class F>
int32_t by_size(int32_t size, F call) {
  switch (size) {
    case 1: call(uint8_t{}); return 0;
    case 2: call(uint16_t{}); return 0;
    case 4: call(uint32_t{}); return 0;
    case 8: call(uint64_t{}); return 0;
    default: return 1;
  }
}

}  // namespace

// How many values an index has; -1 where bits are set beyond the last element.
GOSSAMER_API int64_t gossamer_count_bits(const uint8_t* bits, int64_t n) {
  int64_t count = 0, i = 0;
  const int64_t bytes = (n + 7) / 8;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, bits + i, 8);
    count += __builtin_popcountll(word);
  }
  for (; i < bytes; i++) count += __builtin_popcount(bits[i]);
  if (n % 8 && bits[bytes - 1] >> (n % 8)) return -1;
  return count;
}

// How many values there are, and in covered how many elements lie up to the last.
GOSSAMER_API int64_t gossamer_count_gaps(const uint8_t* gaps, int64_t n_gaps, int64_t* covered) {
  int64_t count = 0, zeros = 0;
  for (int64_t i = 0; i < n_gaps; i++) {
    zeros += gaps[i];
    count += gaps[i] != 255;
  }
  *covered = zeros + count;
  return count;
}

// Of an index that was counted, with values of `size` bytes each. 1 where the size is none of 1, 2, 4, 8.
GOSSAMER_API int32_t gossamer_expand_bits(
    const uint8_t* bits, int64_t n, const void* values, int64_t n_values, void* out, int32_t size) {
  return by_size(size, [&](auto kind) {
    using T = decltype(kind);
    expand_bits<T>(bits, n, static_cast<const T*>(values), n_values, static_cast<T*>(out));
  });
}

GOSSAMER_API int32_t gossamer_expand_gaps(
    const uint8_t* gaps, int64_t n_gaps, int64_t n, const void* values, void* out, int32_t size) {
  return by_size(size, [&](auto kind) {
    using T = decltype(kind);
    expand_gaps<T>(gaps, n_gaps, n, static_cast<const T*>(values), static_cast<T*>(out));
  });
}
