// The types of PTX as C++ has them, and how a lane's register is read as one.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "machine.h"

namespace ptx {

using f16 = _Float16;

struct bf16 {
  uint16_t bits = 0;
  bf16() = default;
  explicit bf16(float value) {  // to the nearest, ties to even
    const uint32_t x = std::bit_cast<uint32_t>(value);
    if (std::isnan(value))
      bits = 0x7fff;
    else
      bits = static_cast<uint16_t>((x + 0x7fff + (x >> 16 & 1)) >> 16);
  }
  explicit operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

// Two in a register of 32 bits.
template <class T>
struct Two {
  T low, high;
};

template <size_t size>
using Bits = std::conditional_t<
    size == 8, uint64_t,
    std::conditional_t<size == 4, uint32_t, std::conditional_t<size == 2, uint16_t, uint8_t>>>;

// A register of all lanes, as values of a type.
template <class T>
struct View {
  using Cell = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Cell* cells;

  View(Warp& warp, Register r) {
    if constexpr (sizeof(T) == 8)
      cells = warp.d[r.index].data();
    else
      cells = warp.w[r.index].data();
  }
  T operator[](int lane) const {
    return std::bit_cast<T>(static_cast<Bits<sizeof(T)>>(cells[lane]));
  }
  void set(int lane, T value) { cells[lane] = std::bit_cast<Bits<sizeof(T)>>(value); }
};

// Arithmetic of narrow types is made in float, of float in float, of double in double; sums of
// products in a type that holds the product exactly.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class T>
Wide<T> widen(T value) {
  return static_cast<Wide<T>>(value);
}
template <class T, class From>
T narrow(From value) {
  if constexpr (std::is_same_v<T, bf16>)
    return bf16(static_cast<float>(value));
  else
    return static_cast<T>(value);
}

enum class Round { nearest, zero, down, up };

// value + rest, which is smaller than half a unit of value's last place, as a float.
inline float to_float(double value, Round round, double rest = 0) {
  const float nearest = static_cast<float>(value);
  if (round == Round::nearest || !std::isfinite(value)) return nearest;
  const float infinity = std::numeric_limits<float>::infinity();
  const double off = (value - nearest) + rest;  // of what nearest is
  const bool down = round == Round::down || (round == Round::zero && value > 0);
  if (off < 0 && down) return std::nextafter(nearest, -infinity);
  if (off > 0 && !down) return std::nextafter(nearest, infinity);
  return nearest;
}

}  // namespace ptx
