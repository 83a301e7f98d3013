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

template <class A>
__device__ A sigmoid(A v) {
  return A(1) / (A(1) + exp(-v));
}

// 1 + erf(v/√2) without cancellation for negative v.
template <class A>
__device__ A twice_normal_cdf(A v) {
  return erfc(v * A(-0.70710678118654752440));
}

constexpr double kTanhOuter = 0.79788456080286535588;  // √(2/π)
constexpr double kTanhInner = 0.044715;

template <class A>
__device__ A activate(Activation kind, A slope, A v) {
  switch (kind) {
    case Activation::relu:
      return v < A(0) ? A(0) : v;  // keeps NaN, as PyTorch does
    case Activation::silu:
      return v * sigmoid(v);
    case Activation::gelu:
      return A(0.5) * v * twice_normal_cdf(v);
    case Activation::gelu_tanh:
      return A(0.5) * v * (A(1) + tanh(A(kTanhOuter) * (v + A(kTanhInner) * v * v * v)));
    case Activation::leaky_relu:
      return v > A(0) ? v : v * slope;
    case Activation::hardswish: {
      A gate = v + A(3);
      gate = gate < A(0) ? A(0) : gate > A(6) ? A(6) : gate;
      return v * gate / A(6);
    }
    default:
      return v;
  }
}

// act'(v), with PyTorch's choice at the kinks.
template <class A>
__device__ A activate_gradient(Activation kind, A slope, A v) {
  switch (kind) {
    case Activation::relu:
      return v <= A(0) ? A(0) : A(1);
    case Activation::silu: {
      A s = sigmoid(v);
      return s * (A(1) + v * (A(1) - s));
    }
    case Activation::gelu: {
      A density = exp(A(-0.5) * v * v) * A(0.39894228040143267794);
      return A(0.5) * twice_normal_cdf(v) + v * density;
    }
    case Activation::gelu_tanh: {
      A th = tanh(A(kTanhOuter) * (v + A(kTanhInner) * v * v * v));
      A inner = A(kTanhOuter) * (A(1) + A(3 * kTanhInner) * v * v);
      return A(0.5) * (A(1) + th) + A(0.5) * v * (A(1) - th * th) * inner;
    }
    case Activation::leaky_relu:
      return v > A(0) ? A(1) : slope;
    case Activation::hardswish:
      return v <= A(-3) ? A(0) : v < A(3) ? v / A(3) + A(0.5) : A(1);
    default:
      return A(1);
  }
}

// ---- the same for arrays: one decision, then straight code

template <Activation K>
struct Kind {
  static constexpr Activation value = K;
};

template <class F>
__device__ void with_activation(Activation kind, F f) {
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

// act(v) for results that are rounded to 16 bits: off by 1e-5 at most, a third of the instructions.
__device__ inline float quick_sigmoid(float v) {
  return reciprocal_approx(1 + exp2_approx(v * -1.44269504f));
}

// (1 + erf(v/√2))/2 = exp(−v²/2)·t·P(t) for negative v, t = 1/(1 + 0.4·|v|/√2); P: a minimax fit.
__device__ inline float quick_normal_cdf(float v) {
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

__device__ inline float quick_activate(Activation kind, float slope, float v) {
  switch (kind) {
    case Activation::silu:
      return v * quick_sigmoid(v);
    case Activation::gelu:
      return v * quick_normal_cdf(v);
    case Activation::gelu_tanh:  // (1 + tanh(a))/2 = sigmoid(2a)
      return v * quick_sigmoid(float(2 * kTanhOuter) * (v + float(kTanhInner) * v * v * v));
    case Activation::hardswish: {
      const float gate = v + 3;
      return v * (gate < 0 ? 0.0f : gate > 6 ? 6.0f : gate) * (1 / 6.0f);
    }
    default:
      return activate(kind, slope, v);
  }
}

template <int N>
__device__ void activate_in_place(Activation kind, float slope, float (&values)[N]) {
  with_activation(kind, [&](auto k) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = quick_activate(k.value, slope, values[i]);
  });
}

template <int N, int V>
__device__ void activate_all(Activation kind, float slope, float (&values)[N][V]) {
  with_activation(kind, [&](auto k) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) values[i][v] = activate(k.value, slope, values[i][v]);
  });
}

template <int N, int V>
__device__ void activate_gradient_all(Activation kind, float slope, float (&values)[N][V]) {
  with_activation(kind, [&](auto k) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) values[i][v] = activate_gradient(k.value, slope, values[i][v]);
  });
}

}  // namespace fastst
