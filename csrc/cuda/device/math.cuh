// Element types and activations.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <kernels.h>

#include <cstring>
#include <device/primitives.cuh>
#include <stdexcept>

namespace fastst {

// Calls f with a value of the element type.
template <class F>
void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f16:
      return f(__half{});
    case Dtype::bf16:
      return f(__nv_bfloat16{});
    case Dtype::f32:
      return f(float{});
    case Dtype::f64:
      return f(double{});
  }
  throw std::invalid_argument("unknown dtype");
}

// Type of accumulation and of statistics.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

__device__ inline double widen(double v) { return v; }
__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

// Rounds to nearest even.
template <class T>
__device__ T narrow(Acc<T> v) {
  return v;
}
template <>
__device__ inline __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <class To, class From>
__device__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// What the formulas of activations need.
template <class A>
struct Exact {
  static __device__ A of(double c) { return A(c); }
  static __device__ A sigmoid(A v) { return A(1) / (A(1) + exp(-v)); }
  // Without cancellation for negative v.
  static __device__ A normal_cdf(A v) { return A(0.5) * erfc(v * A(-0.70710678118654752440)); }
  static __device__ A normal_density(A v) {
    return exp(A(-0.5) * v * v) * A(0.39894228040143267794);
  }
};

// The same for results that are rounded to 16 bits: off by 1e-5 at most, a third of the
// instructions.
struct Quick : Exact<float> {
  static __device__ float sigmoid(float v) {
    return reciprocal_approx(1 + exp2_approx(v * -1.44269504f));
  }
  // exp(−v²/2)·t·P(t) for negative v, t = 1/(1 + 0.4·|v|/√2); P: a minimax fit.
  static __device__ float normal_cdf(float v) {
    const float t = reciprocal_approx(1 + 0.28284271f * (v < 0 ? -v : v));
    float p = -0.095308918f / 2;
    p = p * t + 0.18682606f / 2;
    p = p * t + 0.068062767f / 2;
    p = p * t + 0.18213708f / 2;
    p = p * t + 0.20694389f / 2;
    p = p * t + 0.22565739f / 2;
    p = p * t + 0.22567692f / 2;
    const float tail = p * t * exp2_approx(v * v * -0.72134752f);
    return v < 0 ? tail : 1 - tail;
  }
};

template <class A>
__device__ A activate(Activation kind, A slope, A v) {
  with_activation(kind, [&](auto k) { v = Formula<k.value>::template act<Exact<A>>(v, slope); });
  return v;
}

template <class A>
__device__ A activate_gradient(Activation kind, A slope, A v) {
  with_activation(kind,
                  [&](auto k) { v = Formula<k.value>::template derivative<Exact<A>>(v, slope); });
  return v;
}

// ---- the same for arrays: one decision, then straight code

template <int N>
__device__ void activate_in_place(Activation kind, float slope, float (&values)[N]) {
  with_activation(kind, [&](auto k) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = Formula<k.value>::template act<Quick>(values[i], slope);
  });
}

template <int N, int V>
__device__ void activate_all(Activation kind, float slope, float (&values)[N][V]) {
  with_activation(kind, [&](auto k) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v)
        values[i][v] = Formula<k.value>::template act<Exact<float>>(values[i][v], slope);
  });
}

template <int N, int V>
__device__ void activate_gradient_all(Activation kind, float slope, float (&values)[N][V]) {
  with_activation(kind, [&](auto k) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v)
        values[i][v] = Formula<k.value>::template derivative<Exact<float>>(values[i][v], slope);
  });
}

}  // namespace fastst
