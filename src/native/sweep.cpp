// Loops over weights and masks, for the compiler to make vectors of; compiled once per instruction set.
#include "sweep.h"

#ifndef GOSSAMER_ISA
#error "compile with -DGOSSAMER_ISA=baseline, avx2 or avx512"
#endif

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

constexpr int64_t BLOCK = 64;  // elements whose flags are looked at together
constexpr int64_t AHEAD = 4096;  // bytes that are fetched before they are needed
constexpr uint64_t ONES = 0x0101010101010101u;

// For a block of what is read: the processor's own guess ends at each page, every 4096 bytes.
template <class T>
void fetch(const T* x) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(x) + AHEAD;
  for (uintptr_t b = 0; b < BLOCK * sizeof *x; b += 64) __builtin_prefetch(reinterpret_cast<const void*>(at + b));
}

uint64_t word(const uint8_t* bytes) {
  uint64_t w;
  __builtin_memcpy(&w, bytes, 8);
  return w;
}

template <class T>
void zero(const uint8_t* keep, void* tensor, int64_t n) {
  T* x = static_cast<T*>(tensor);
  int64_t i = 0;
  for (; i + BLOCK <= n; i += BLOCK) {
    uint64_t all = ONES;
    for (int j = 0; j < BLOCK; j += 8) all &= word(keep + i + j);
    fetch(x + i);
    if (all == ONES) continue;  // as where whole filters are masked, and others kept
    for (int j = 0; j < BLOCK; j++) x[i + j] = keep[i + j] ? x[i + j] : T(0);
  }
  for (; i < n; i++) x[i] = keep[i] ? x[i] : T(0);
}

#if defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <class T>
struct Vector {
  static constexpr int L = BYTES / int(sizeof(T));
  typedef T V __attribute__((vector_size(BYTES)));
  typedef T U __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
};

template <class T, int N>
struct Lanes {
  typedef T V __attribute__((vector_size(N * sizeof(T))));
};

// One bit for each lane of a comparison's result, the first in the lowest. No vector extension has a word for it, and the
// compiler does not see it in a loop.
template <class M>
uint32_t bits(M lanes) {
  constexpr int SIZE = int(sizeof lanes[0]);
  [[maybe_unused]] constexpr int N = int(sizeof lanes) / SIZE;
  typedef int8_t Narrow __attribute__((vector_size(16), unused));
  typedef char Chars __attribute__((vector_size(BYTES), unused));
  typedef char HalfChars __attribute__((vector_size(16), unused));
  typedef float Floats __attribute__((vector_size(BYTES), unused));
  typedef double Doubles __attribute__((vector_size(BYTES), unused));
#if defined(__AVX2__)
  if constexpr (SIZE == 8) return uint32_t(__builtin_ia32_movmskpd256((Doubles)lanes));
  else if constexpr (SIZE == 4) return uint32_t(__builtin_ia32_movmskps256((Floats)lanes));
  else if constexpr (SIZE == 1) return uint32_t(__builtin_ia32_pmovmskb256((Chars)lanes));
  else return uint32_t(__builtin_ia32_pmovmskb128((HalfChars)__builtin_convertvector(lanes, Narrow)));
#elif defined(__SSE2__)
  if constexpr (SIZE == 8) return uint32_t(__builtin_ia32_movmskpd((Doubles)lanes));
  else if constexpr (SIZE == 4) return uint32_t(__builtin_ia32_movmskps((Floats)lanes));
  else if constexpr (SIZE == 1) return uint32_t(__builtin_ia32_pmovmskb128((Chars)lanes));
  else return uint32_t(__builtin_ia32_pmovmskb128((HalfChars)__builtin_ia32_packsswb128(lanes, lanes))) & 255;
#else
  uint32_t all = 0;
  for (int i = 0; i < N; i++) all |= uint32_t(lanes[i] & 1) << i;
  return all;
#endif
}

// A float's bits without the sign order as its magnitude does, and nan above all.
template <class K>
struct Magnitude : Vector<K> {
  typedef K Type;
  typedef typename Vector<K>::V V;
  static constexpr K SIGN = K(K(1) << (sizeof(K) * 8 - 1));
  K bound;
  explicit Magnitude(Bound b) : bound(K(b.whole)) {}
  bool reaches(K bits) const { return K(bits & K(~SIGN)) <= bound; }
  auto reaches(V bits) const { return (bits & K(~SIGN)) <= bound; }

  // The largest of all, which says whether all are finite, while they are at hand.
  struct Most {
    V lanes{};
    void see(const K* x) {
      for (int j = 0; j < BLOCK; j += Vector<K>::L) {
        const V here = V(*reinterpret_cast<const typename Vector<K>::U*>(x + j)) & K(~SIGN);
        lanes = here > lanes ? here : lanes;
      }
    }
    void see_one(K x) {
      if (K(x & K(~SIGN)) > lanes[0]) lanes[0] = K(x & K(~SIGN));
    }
    void into(int64_t* most) const {
      for (int j = 0; j < Vector<K>::L; j++) *most = lanes[j] > *most ? lanes[j] : *most;
    }
  };
};

template <class F>
struct Given : Vector<F> {
  typedef F Type;
  typedef typename Vector<F>::V V;
  F bound;
  explicit Given(Bound b) : bound(F(b.real)) {}
  bool reaches(F score) const { return score <= bound; }
  auto reaches(V scores) const { return scores <= bound; }

  struct Most {
    void see(const F*) {}
    void see_one(F) {}
    void into(int64_t*) const {}
  };
};

// Which of a block's elements are at most at a bound.
template <class S>
uint64_t reach(const typename S::Type* x, S s) {
  uint64_t here = 0;
  for (int j = 0; j < BLOCK; j += S::L)
    here |= uint64_t(bits(s.reaches(typename S::V(*reinterpret_cast<const typename S::U*>(x + j))))) << j;
  return here;
}

uint64_t kept(const uint8_t* keep) {
  typedef Vector<int8_t> B;
  uint64_t here = 0;
  for (int j = 0; j < BLOCK; j += B::L)
    here |= uint64_t(bits(*reinterpret_cast<const B::U*>(keep + j) != 0)) << j;
  return here;
}

template <class S, bool MASKED, bool LOW>
int64_t scan_block(
    const typename S::Type* x, const uint8_t* keep, S low, S high, int64_t first, uint16_t* found, int64_t* settled) {
  uint64_t here = reach(x, high);
  if (MASKED) here &= kept(keep);
  if (LOW) {
    const uint64_t under = here & reach(x, low);
    *settled += __builtin_popcountll(under);
    here ^= under;
  }
  // Most blocks have none or one or two, and no processor can guess which: two are written in any case.
  int64_t count = 0;
  for (int k = 0; k < 2; k++) {
    found[count] = uint16_t(first + __builtin_ctzll(here | uint64_t(1) << 63));
    count += here != 0;
    here &= here - 1;
  }
  for (; here; here &= here - 1) found[count++] = uint16_t(first + __builtin_ctzll(here));
  return count;
}

template <class S, bool MASKED, bool LOW>
int64_t scan_all(const typename S::Type* x, const uint8_t* keep, int64_t n, S low, S high, uint16_t* found, Seen* seen) {
  int64_t count = 0, i = 0, settled = 0;
  typename S::Most most;
  for (; i + BLOCK <= n; i += BLOCK) {
    fetch(x + i);
    most.see(x + i);
    count += scan_block<S, MASKED, LOW>(x + i, MASKED ? keep + i : keep, low, high, i, found + count, &settled);
  }
  for (; i < n; i++) {
    most.see_one(x[i]);
    const bool under = LOW && low.reaches(x[i]), here = high.reaches(x[i]) && (!MASKED || keep[i]);
    settled += here && under;
    if (here && !under) found[count++] = uint16_t(i);
  }
  seen->settled += settled;
  most.into(&seen->most);
  return count;
}

template <class S, bool MASKED>
int64_t scan_kept(
    const void* scores, const uint8_t* keep, int64_t n, Bound low, Bound high, uint16_t* found, Seen* seen) {
  const auto* x = static_cast<const typename S::Type*>(scores);
  const bool none = low.whole < 0 && low.real != low.real;
  return none ? scan_all<S, MASKED, false>(x, keep, n, S(low), S(high), found, seen)
              : scan_all<S, MASKED, true>(x, keep, n, S(low), S(high), found, seen);
}

template <class S>
int64_t scan(const void* scores, const uint8_t* keep, int64_t n, Bound low, Bound high, uint16_t* found, Seen* seen) {
  return keep ? scan_kept<S, true>(scores, keep, n, low, high, found, seen)
              : scan_kept<S, false>(scores, keep, n, low, high, found, seen);
}

template <class S>
void cut(const void* scores, uint8_t* keep, int64_t n, Bound bound) {
  const auto* x = static_cast<const typename S::Type*>(scores);
  const S s(bound);
  int64_t i = 0;
  for (; i + BLOCK <= n; i += BLOCK) {
    fetch(x + i);
    for (int j = 0; j < BLOCK; j++) keep[i + j] = s.reaches(x[i + j]) ? 0 : keep[i + j];
  }
  for (; i < n; i++) keep[i] = s.reaches(x[i]) ? 0 : keep[i];
}

template <class S>
void drop(void* weights, uint8_t* keep, int64_t n, Bound bound) {
  typedef typename S::Type K;
  typedef typename Lanes<int8_t, S::L>::V Flags;
  auto* x = static_cast<K*>(weights);
  const S s(bound);
  int64_t i = 0;
  for (; i + BLOCK <= n; i += BLOCK) {
    fetch(x + i);
    for (int j = 0; j < BLOCK; j += S::L) {
      auto* at = reinterpret_cast<typename S::U*>(x + i + j);
      Flags flags;
      __builtin_memcpy(&flags, keep + i + j, sizeof flags);
      const typename S::V v = *at;
      const typename S::V goes = s.reaches(v);
      *at = v & ~goes;
      flags &= ~__builtin_convertvector(goes, Flags);
      __builtin_memcpy(keep + i + j, &flags, sizeof flags);
    }
  }
  for (; i < n; i++)
    if (s.reaches(x[i])) x[i] = 0, keep[i] = 0;
}

#define NAME_OF(isa) #isa
#define NAME(isa) NAME_OF(isa)

}  // namespace

extern const Loops loops = {
    NAME(GOSSAMER_ISA),
    {zero<uint8_t>, zero<uint16_t>, zero<uint32_t>, zero<uint64_t>},
    {scan<Magnitude<int16_t>>, scan<Magnitude<int32_t>>, scan<Magnitude<int64_t>>, scan<Given<float>>,
     scan<Given<double>>},
    {cut<Magnitude<int16_t>>, cut<Magnitude<int32_t>>, cut<Magnitude<int64_t>>, cut<Given<float>>, cut<Given<double>>},
    {drop<Magnitude<int16_t>>, drop<Magnitude<int32_t>>, drop<Magnitude<int64_t>>},
};

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
