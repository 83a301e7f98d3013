// Vectors of floats for the instruction set that this library is compiled for: 16 lanes with
// AVX-512, 8 with AVX2. Built on the vector extensions that GCC and Clang share.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <utility>

namespace fastst::cpu {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kLanes = 8;
#else
#error "requires AVX2 and FMA, or AVX-512"
#endif

using Vec = float __attribute__((vector_size(kLanes * 4)));
using Bits = int32_t __attribute__((vector_size(kLanes * 4)));
using UnalignedVec = float __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// For a store that follows: its line comes, to be owned, while something else is computed. In
// assembler, since compilers take an ordinary prefetch, which owns nothing, unless told otherwise.
// Processors that do not know the instruction skip it.
inline void prefetch_to_write(const void* p) {
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));
}

// Past the caches, to an aligned address. What follows on another thread needs a fence.
#if defined(__AVX512F__)
inline void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
#else
inline void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
#endif
constexpr int64_t kLine = 64;  // bytes

// Lanes that are all v (Vec{} + v would have to add, for the sake of −0).
#if defined(__AVX512F__)
inline Vec splat(float v) { return _mm512_set1_ps(v); }
#else
inline Vec splat(float v) { return _mm256_set1_ps(v); }
#endif

// The first n lanes, 0 ≤ n ≤ kLanes; no others are touched, and zeros are loaded in their place.
#if defined(__AVX512F__)
inline __mmask16 lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
inline void store(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), v); }
inline Vec first(Vec v, int64_t n) { return _mm512_maskz_mov_ps(lanes(n), v); }
#else
inline __m256i lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load(const float* p, int64_t n) { return _mm256_maskload_ps(p, lanes(n)); }
// In pieces of 4, 2 and 1: a store through a mask takes 13 cycles on AMD's processors with AVX2.
inline void store(float* p, Vec v, int64_t n) {
  if (n == kLanes) return store(p, v);
  __m128 rest = _mm256_castps256_ps128(v);
  if (n & 4) {
    _mm_storeu_ps(p, rest), p += 4;
    rest = _mm256_extractf128_ps(v, 1);
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), rest), p += 2;
    rest = _mm_movehl_ps(rest, rest);
  }
  if (n & 1) _mm_store_ss(p, rest);
}
inline Vec first(Vec v, int64_t n) { return _mm256_and_ps(v, _mm256_castsi256_ps(lanes(n))); }
#endif

// Lane i becomes lane from[i] of a and b, one after the other.
#if defined(__AVX512F__)
inline Vec permute(Vec a, Vec b, Bits from) {
  return _mm512_permutex2var_ps(a, reinterpret_cast<__m512i>(from), b);
}
#else
inline Vec permute(Vec a, Vec b, Bits from) {
  const auto at = reinterpret_cast<__m256i>(from);
  const Vec left = _mm256_permutevar8x32_ps(a, at), right = _mm256_permutevar8x32_ps(b, at);
  return from < kLanes ? left : right;
}
#endif

#if defined(__AVX512F__)
// One step of a transposition: blocks of B lanes change places between two rows.
template <int B, int... Lane>
inline void exchange(Vec& x, Vec& y, std::integer_sequence<int, Lane...>) {
  const Vec low = __builtin_shufflevector(x, y, (Lane & B ? kLanes + Lane - B : Lane)...);
  y = __builtin_shufflevector(x, y, (Lane & B ? kLanes + Lane : Lane + B)...);
  x = low;
}

template <int B = 1>
inline void transpose(Vec (&rows)[kLanes]) {
  if constexpr (B < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & B)) exchange<B>(rows[i], rows[i | B], std::make_integer_sequence<int, kLanes>{});
    transpose<B * 2>(rows);
  }
}
#else
// Within halves of the vectors, then of these: every step is one instruction.
[[gnu::always_inline]] inline void transpose(Vec (&rows)[kLanes]) {
  Vec pairs[kLanes], fours[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  const auto wide = [](Vec v) { return _mm256_castps_pd(v); };
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 2) {
    const int from = i / 4 * 4 + i / 2 % 2;
    const __m256d a = wide(pairs[from]), b = wide(pairs[from + 2]);
    fours[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
    fours[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 2; ++i) {
    rows[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}
#endif

}  // namespace fastst::cpu
