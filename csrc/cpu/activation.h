// Activations and their derivatives on vectors.
#pragma once

#include <common/api.h>
#include <simd.h>

#include <cmath>

namespace fastst::cpu {

// Out of line: GCC 12 confuses lanes where a vector is changed by element among other arithmetic.
template <class F>
__attribute__((noinline)) Vec by_lane(Vec v, F f) {
  alignas(sizeof(Vec)) float lane[kLanes];
  store(lane, v);
  for (float& x : lane) x = f(x);
  return load(lane);
}

inline Vec power_of_two(Bits n) { return reinterpret_cast<Vec>((n + 127) << 23); }

// Within 1.5 units in the last place; overflows to infinity, underflows to zero, keeps NaN.
inline Vec exp(Vec x) {
  x = x < splat(-105.0f) ? splat(-105.0f) : x;
  x = x > splat(89.0f) ? splat(89.0f) : x;
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5·2^23: rounds to an integer
  const Vec rounded = shifted - 12582912.0f;
  const Bits n = reinterpret_cast<Bits>(shifted) - 0x4b400000;
  const Vec r = (x - rounded * 0.693145752f) - rounded * 1.42860677e-6f;  // ln 2 in two parts
  Vec p = splat(1.9841270e-4f);
  for (float c : {1.3888889e-3f, 8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f})
    p = p * r + c;
  const Bits half = n >> 1;  // 2^n itself may be out of range
  const Vec result = p * power_of_two(half) * power_of_two(n - half);
  return x == x ? result : x;
}

// What the formulas of activations need.
struct Lanes {
  static Vec of(double c) { return splat(static_cast<float>(c)); }
  static Vec sigmoid(Vec v) { return 1.0f / (1.0f + exp(-v)); }
  static Vec normal_cdf(Vec v) {
    return by_lane(v, [](float x) { return 0.5f * std::erfc(x * -0.707106781f); });
  }
  static Vec normal_density(Vec v) { return exp(-0.5f * v * v) * 0.398942280f; }
};

template <Activation K>
inline Vec activate(Vec v, float slope) {
  return Formula<K>::template act<Lanes>(v, splat(slope));
}

template <Activation K>
inline Vec activate_gradient(Vec v, float slope) {
  return Formula<K>::template derivative<Lanes>(v, splat(slope));
}

}  // namespace fastst::cpu
