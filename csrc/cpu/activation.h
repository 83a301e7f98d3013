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

#if defined(__AVX512F__)
// v·2^n of an integer n, and out of range what is nearest.
inline Vec scale_by_power(Vec v, Vec n) { return _mm512_scalef_ps(v, n); }
// NaN is v's.
inline Vec at_most(Vec v, float most) { return _mm512_min_ps(splat(most), v); }
inline Vec at_least(Vec v, float least) { return _mm512_max_ps(splat(least), v); }
// 1/v within 1.5 units in the last place, many times as fast as a division.
inline Vec reciprocal(Vec v) {
  const Vec guess = _mm512_rcp14_ps(v), error = _mm512_fnmadd_ps(v, guess, splat(1.0f));
  const __mmask16 finite = _mm512_cmp_ps_mask(v, splat(INFINITY), _CMP_NEQ_UQ);
  return _mm512_mask_fmadd_ps(guess, finite, error, guess);
}
#else
inline Vec scale_by_power(Vec v, Vec n) {
  const auto power = [](Bits n) { return reinterpret_cast<Vec>((n + 127) << 23); };
  const Bits whole = reinterpret_cast<Bits>(_mm256_cvtps_epi32(n)), half = whole >> 1;
  return v * power(half) * power(whole - half);  // 2^n itself may be out of range
}
inline Vec at_most(Vec v, float most) { return _mm256_min_ps(splat(most), v); }
inline Vec at_least(Vec v, float least) { return _mm256_max_ps(splat(least), v); }
inline Vec reciprocal(Vec v) { return 1.0f / v; }
#endif

// Within 1.5 units in the last place; overflows to infinity, underflows to zero, keeps NaN.
[[gnu::always_inline]] inline Vec exp(Vec x) {
  x = at_most(at_least(x, -105.0f), 89.0f);
  const Vec n = x * 1.44269504f + 12582912.0f - 12582912.0f;  // 1.5·2^23: rounds to an integer
  const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
  Vec p = splat(1.9841270e-4f);
  for (float c : {1.3888889e-3f, 8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f})
    p = p * r + c;
  return scale_by_power(p, n);
}

// What the formulas of activations need.
struct Lanes {
  static Vec of(double c) { return splat(static_cast<float>(c)); }
  [[gnu::always_inline]] static Vec sigmoid(Vec v) { return reciprocal(1.0f + exp(-v)); }
  static Vec normal_cdf(Vec v) {
    return by_lane(v, [](float x) { return 0.5f * std::erfc(x * -0.707106781f); });
  }
  static Vec normal_density(Vec v) { return exp(-0.5f * v * v) * 0.398942280f; }
};

template <Activation K>
[[gnu::always_inline]] inline Vec activate(Vec v, float slope) {
  return Formula<K>::template act<Lanes>(v, splat(slope));
}

// The gradient of v, from that of act(v).
template <Activation K>
inline Vec activate_gradient(Vec dz, Vec v, float slope) {
  const Vec dv = dz * Formula<K>::template derivative<Lanes>(v, splat(slope));
  if constexpr (requires { Formula<K>::kFlatUpTo; })
    return v <= splat(Formula<K>::kFlatUpTo) ? splat(0.0f) : dv;
  return dv;
}

}  // namespace fastst::cpu
