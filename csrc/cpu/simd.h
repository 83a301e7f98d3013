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
inline void store(float* p, Vec v, int64_t n) { _mm256_maskstore_ps(p, lanes(n), v); }
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

}  // namespace fastst::cpu
