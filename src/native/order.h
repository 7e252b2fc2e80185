// The k-th smallest of many numbers.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace gossamer {

constexpr uint64_t BUCKETS = 1 << 11;

// Leaves of keys between two bounds those that may be the k-th smallest, and what k is among them: the keys are counted
// by size first. A search by compares alone takes far longer, since no processor can guess how they come out. each calls
// what it is given for every key.
template <class Each>
std::vector<int64_t> close_to(const Each& each, int64_t least, int64_t most, int64_t& k) {
  const uint64_t low = uint64_t(least), range = uint64_t(most) - low;
  int shift = 0;
  while (range >> shift >= BUCKETS) shift++;
  std::vector<int64_t> counts(BUCKETS);
  each([&](int64_t key) { counts[(uint64_t(key) - low) >> shift]++; });
  uint64_t bucket = 0;
  while (k >= counts[bucket]) k -= counts[bucket++];
  std::vector<int64_t> close;
  close.reserve(size_t(counts[bucket]));
  each([&](int64_t key) {
    if ((uint64_t(key) - low) >> shift == bucket) close.push_back(key);
  });
  return close;
}

template <class Each>
int64_t smallest(const Each& each, int64_t least, int64_t most, int64_t k) {
  std::vector<int64_t> keys = close_to(each, least, most, k);
  while (keys.size() > BUCKETS) {
    const auto [first, last] = std::minmax_element(keys.begin(), keys.end());
    if (*first == *last) break;
    auto each_key = [&keys](auto use) {
      for (int64_t key : keys) use(key);
    };
    keys = close_to(each_key, *first, *last, k);
  }
  std::nth_element(keys.begin(), keys.begin() + k, keys.end());
  return keys[size_t(k)];
}

}  // namespace gossamer
