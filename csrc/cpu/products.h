// What is multiplied, and how it lies in the place of floats.
#pragma once

#include <storage.h>

#include <algorithm>

namespace fastst::cpu {

// What is multiplied: floats.
struct Floats {
  using Stored = float;
  static constexpr int kChannels = 1;     // in the place of a float
  static constexpr int kMultiple = 1;     // of such places, which the channels of a position fill
  static constexpr int kMostVectors = 3;  // of results at a time
  static constexpr bool kWhole = true;    // and all that lies there
  static Vec add(Vec sum, Vec a, Vec b) { return sum + a * b; }
  static Vec of(const Vec* channels) { return *channels; }
  // n neighbouring channels of a position, from c on.
  static Vec get(const float* position, int64_t c, int64_t n) {
    return n == kLanes ? load(position + c) : load(position + c, n);
  }
  static void put(float* position, int64_t c, Vec v, int64_t n) {
    if (n == kLanes)
      store(position + c, v);
    else
      store(position + c, v, n);
  }
  template <class F>
  static void with_stored(Storage storage, F f) {
    with_storage(storage, f);
  }
};

// Pairs of bfloat16, of neighbouring k, in the place of a float each: two products at once, which
// are added in float32.
#if defined(__AVX512F__)
constexpr bool kHasPairs = true;  // on processors with AVX512_BF16
#else
constexpr bool kHasPairs = false;
#endif
struct Bf16Pairs {
  using Stored = BFloat16;
  static constexpr int kChannels = 2;
  static constexpr int kMultiple = 1;
  static constexpr int kMostVectors = 3;
  static constexpr bool kWhole = true;
#if defined(__AVX512F__)
  static Vec add(Vec sum, Vec a, Vec b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
#else
  // What that instruction does, so that all around it can be tried without.
  static Vec add(Vec sum, Vec a, Vec b) {
    const auto x = reinterpret_cast<Bits>(a), y = reinterpret_cast<Bits>(b);
    const auto odd = [](Bits v) { return reinterpret_cast<Vec>(v & static_cast<int>(0xffff0000)); };
    const auto even = [](Bits v) { return reinterpret_cast<Vec>(v << 16); };
    return sum + odd(x) * odd(y) + even(x) * even(y);
  }
#endif
  static Vec of(const Vec* channels) {
    const auto low = bits(channels[0]) >> 16, high = bits(channels[1]);
    return reinterpret_cast<Vec>(high | low);
  }
  static Vec get(const float* position, int64_t c, int64_t n) {
    const BFloat16* from = reinterpret_cast<const BFloat16*>(position) + c;
    return n == kLanes ? load(from) : load(from, n);
  }
  // v is zero where there are no channels: so is what fills the last pair.
  static void put(float* position, int64_t c, Vec v, int64_t n) {
    BFloat16* to = reinterpret_cast<BFloat16*>(position) + c;
    if (n == kLanes)
      store_half(to, round_bf16(v));
    else
      store_half(to, round_bf16(v), n + n % 2);
  }
  // Neighbouring channels, and zeros that fill the last vector.
  static void fill(const BFloat16* from, int64_t channels, float* to) {
    constexpr int64_t kAtOnce = 2 * kLanes;
    for (; channels > 0; channels -= kAtOnce, from += kAtOnce, to += kLanes) {
      const int64_t n = std::min(channels, kAtOnce);
#if defined(__AVX512F__)
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(~__mmask32(0) >> (kAtOnce - n), from));
#else
      std::memset(to, 0, kLanes * sizeof(float));
      std::memcpy(to, from, n * sizeof(BFloat16));
#endif
    }
  }
  template <class F>
  static void with_stored(Storage, F f) {
    f(BFloat16{});
  }
  // Rounded, in the upper half.
  static UnsignedBits bits(Vec v) {
    return reinterpret_cast<UnsignedBits>(widen(round_bf16(v), BFloat16{}));
  }
};

// Pairs whose two numbers come apart: the first one, beside a zero; and the second.
struct FirstOfPairs : Floats {
  using Stored = void;
  static constexpr bool kWhole = false;
  static void put(float* to, int64_t c, Vec v, int64_t n) {
    Floats::put(to, c, reinterpret_cast<Vec>(Bf16Pairs::bits(v) >> 16), n);
  }
  template <class F>
  static void with_stored(Storage storage, F f) {
    Bf16Pairs::with_stored(storage, f);
  }
};
struct SecondOfPairs : FirstOfPairs {
  static void put(float* to, int64_t c, Vec v, int64_t n) {
    const auto first = reinterpret_cast<UnsignedBits>(get(to, c, n));
    Floats::put(to, c, reinterpret_cast<Vec>(first | Bf16Pairs::bits(v)), n);
  }
};

// Floats that hold the channels of a position.
template <class Kind>
constexpr int64_t units(int64_t channels) {
  constexpr int64_t each = Kind::kChannels * Kind::kMultiple;
  return (channels + each - 1) / each * Kind::kMultiple;
}

}  // namespace fastst::cpu
