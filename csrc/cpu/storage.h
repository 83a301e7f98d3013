// What tensors are stored in. Arithmetic is in float32: 16 bits become floats as they are loaded,
// and are rounded to nearest, ties to even, as they are stored. NaN stays NaN.
#pragma once

#include <simd.h>

#include <cstddef>
#include <cstring>
#include <type_traits>

namespace fastst::cpu {

enum class Storage { f32, bf16, f16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// BFloat16 on processors that round to it by an instruction (AVX512_BF16).
struct RoundedBFloat16 : BFloat16 {};

// Calls f with a value of the type, so that what it compiles to has no choice inside.
template <class F>
auto with_storage(Storage storage, F&& f) {
  switch (storage) {
    case Storage::bf16:
      return f(BFloat16{});
    case Storage::f16:
      return f(Float16{});
    default:
      return f(0.0f);
  }
}

constexpr int64_t bytes_of(Storage storage) { return storage == Storage::f32 ? 4 : 2; }

#if defined(__AVX512F__)
using Half = __m256i;  // a vector of 16 bits
inline Half load_half(const void* p) { return _mm256_loadu_si256(static_cast<const Half*>(p)); }
inline void store_half(void* p, Half v) { _mm256_storeu_si256(static_cast<Half*>(p), v); }
inline Half load_half(const void* p, int64_t n) { return _mm256_maskz_loadu_epi16(lanes(n), p); }
inline void store_half(void* p, Half v, int64_t n) { _mm256_mask_storeu_epi16(p, lanes(n), v); }

inline Vec widen(Half v, Float16) { return _mm512_cvtph_ps(v); }
inline Half narrow(Vec v, Float16) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec widen(Half v, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
inline Half pack_half(Bits v) { return _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v)); }
#else
using Half = __m128i;  // a vector of 16 bits
inline Half load_half(const void* p) { return _mm_loadu_si128(static_cast<const Half*>(p)); }
inline void store_half(void* p, Half v) { _mm_storeu_si128(static_cast<Half*>(p), v); }

// In pieces of 4, 2 and 1, from the last to the first, since there are no masks for 16 bits.
inline Half load_half(const void* p, int64_t n) {
  if (n == kLanes) return load_half(p);
  const char* from = static_cast<const char*>(p) + 2 * n;
  uint64_t four = 0, rest = 0;
  uint32_t two = 0;
  uint16_t one = 0;
  if (n & 1) std::memcpy(&one, from -= 2, 2), rest = one;
  if (n & 2) std::memcpy(&two, from -= 4, 4), rest = rest << 32 | two;
  if (!(n & 4)) return _mm_cvtsi64_si128(static_cast<int64_t>(rest));
  std::memcpy(&four, from - 8, 8);
  return _mm_set_epi64x(static_cast<int64_t>(rest), static_cast<int64_t>(four));
}
inline void store_half(void* p, Half v, int64_t n) {
  if (n == kLanes) return store_half(p, v);
  char* to = static_cast<char*>(p);
  uint64_t rest = static_cast<uint64_t>(_mm_cvtsi128_si64(v));
  if (n & 4) {
    std::memcpy(to, &rest, 8), to += 8;
    rest = static_cast<uint64_t>(_mm_extract_epi64(v, 1));
  }
  if (n & 2) std::memcpy(to, &rest, 4), to += 4, rest >>= 32;
  if (n & 1) std::memcpy(to, &rest, 2);
}

inline Vec widen(Half v, Float16) { return _mm256_cvtph_ps(v); }
inline Half narrow(Vec v, Float16) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec widen(Half v, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
inline Half pack_half(Bits v) {  // of what fits 16 bits
  const auto all = reinterpret_cast<__m256i>(v);
  return _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}
#endif

using UnsignedBits = uint32_t __attribute__((vector_size(kLanes * 4)));
inline Half narrow(Vec v, BFloat16) {
  const auto bits = reinterpret_cast<UnsignedBits>(v);
  const UnsignedBits high = bits >> 16, rounded = (bits + (high & 1) + 0x7fff) >> 16;
  return pack_half(reinterpret_cast<Bits>(v == v ? rounded : high | 0x40));
}

#if defined(__AVX512F__)
// By that instruction, which takes denormals for zeros. In assembler: with the compiler's option
// for it, it would use such instructions elsewhere as well.
inline Half round_bf16(Vec v) {
  Half rounded;
  asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
  return rounded;
}
inline Half narrow(Vec v, RoundedBFloat16) {
  constexpr int kDenormal = 0x20;
  if (_mm512_fpclass_ps_mask(v, kDenormal)) [[unlikely]]
    return narrow(v, BFloat16{});
  return round_bf16(v);
}
#else
inline Half round_bf16(Vec v) { return narrow(v, BFloat16{}); }
inline Half narrow(Vec v, RoundedBFloat16) { return narrow(v, BFloat16{}); }
#endif

template <class S>
concept Narrow = std::is_base_of_v<BFloat16, S> || std::is_same_v<S, Float16>;

template <Narrow S>
inline Vec load(const S* p) {
  return widen(load_half(p), S{});
}
template <Narrow S>
inline Vec load(const S* p, int64_t n) {
  return widen(load_half(p, n), S{});
}
template <Narrow S>
inline void store(S* p, Vec v) {
  store_half(p, narrow(v, S{}));
}
template <Narrow S>
inline void store(S* p, Vec v, int64_t n) {
  store_half(p, narrow(v, S{}), n);
}

// n ≤ kLanes values at a constant step.
template <class S>
inline Vec gather(const S* p, int64_t step, int64_t n) {
  if (step == 1) return n == kLanes ? load(p) : load(p, n);
  alignas(kLine) S lane[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lane[i] = p[i * step];
  return load(lane);
}
template <class S>
inline void scatter(S* p, int64_t step, Vec v, int64_t n) {
  if (step == 1) return store(p, v, n);
  alignas(kLine) S lane[kLanes];
  store(lane, v);
  for (int64_t i = 0; i < n; ++i) p[i * step] = lane[i];
}

}  // namespace fastst::cpu
