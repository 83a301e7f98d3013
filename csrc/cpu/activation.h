// Activations and their derivatives on vectors, with PyTorch's choice at the kinks and for NaN.
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

inline Vec sigmoid(Vec v) { return 1.0f / (1.0f + exp(-v)); }

constexpr float kTanhInner = 0.044715f;
constexpr float kTanhTwice = 1.59576912f;  // 2·√(2/π)

// activate<K>(v) = act(v), activate_gradient<K>(v) = act'(v)
template <Activation K>
inline Vec activate(Vec v, [[maybe_unused]] float slope) {
  const Vec zero{};
  if constexpr (K == Activation::relu) return v < zero ? zero : v;
  if constexpr (K == Activation::silu) return v / (1.0f + exp(-v));
  if constexpr (K == Activation::gelu)
    return by_lane(v, [](float x) { return 0.5f * x * std::erfc(x * -0.707106781f); });
  if constexpr (K == Activation::gelu_tanh)
    return v / (1.0f + exp(-kTanhTwice * (v + kTanhInner * v * v * v)));
  if constexpr (K == Activation::leaky_relu) return v > zero ? v : v * slope;
  if constexpr (K == Activation::hardswish) {
    Vec gate = v + 3.0f;
    gate = gate < zero ? zero : gate;
    gate = gate > splat(6.0f) ? splat(6.0f) : gate;
    return v * gate / 6.0f;
  }
  if constexpr (K == Activation::none) return v;
}

template <Activation K>
inline Vec activate_gradient(Vec v, [[maybe_unused]] float slope) {
  const Vec zero{}, one = splat(1.0f);
  if constexpr (K == Activation::relu) return v <= zero ? zero : one;
  if constexpr (K == Activation::silu) {
    const Vec s = sigmoid(v);
    return s * (1.0f + v * (1.0f - s));
  }
  if constexpr (K == Activation::gelu)
    return by_lane(v, [](float x) {
      return 0.5f * std::erfc(x * -0.707106781f) + x * std::exp(-0.5f * x * x) * 0.398942280f;
    });
  if constexpr (K == Activation::gelu_tanh) {
    const Vec s = sigmoid(kTanhTwice * (v + kTanhInner * v * v * v));
    return s + v * s * (1.0f - s) * kTanhTwice * (1.0f + 3.0f * kTanhInner * v * v);
  }
  if constexpr (K == Activation::leaky_relu) return v > zero ? one : splat(slope);
  if constexpr (K == Activation::hardswish) {
    const Vec inside = v < splat(3.0f) ? v / 3.0f + 0.5f : one;
    return v <= splat(-3.0f) ? zero : inside;
  }
  if constexpr (K == Activation::none) return one;
}

// Calls f with the activation as a type, so that what it compiles to has no choice inside.
template <Activation K>
struct Kind {
  static constexpr Activation value = K;
};

template <class F>
void with_activation(Activation kind, F f) {
  switch (kind) {
    case Activation::none:
      return f(Kind<Activation::none>{});
    case Activation::relu:
      return f(Kind<Activation::relu>{});
    case Activation::silu:
      return f(Kind<Activation::silu>{});
    case Activation::gelu:
      return f(Kind<Activation::gelu>{});
    case Activation::gelu_tanh:
      return f(Kind<Activation::gelu_tanh>{});
    case Activation::leaky_relu:
      return f(Kind<Activation::leaky_relu>{});
    case Activation::hardswish:
      return f(Kind<Activation::hardswish>{});
  }
}

}  // namespace fastst::cpu
