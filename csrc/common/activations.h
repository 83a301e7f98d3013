// The activations: their list, from which the enum, its names in Python and every choice follow,
// and their formulas, the same for all kernels.
#pragma once

#if defined(__CUDACC__)
#define FASTST_DEVICE __device__
#else
#define FASTST_DEVICE \
  inline __attribute__((always_inline))  // constants of a loop stay in registers
#endif

namespace fastst {

#define FASTST_ACTIVATIONS(_) \
  _(none) _(relu) _(silu) _(gelu) _(gelu_tanh) _(leaky_relu) _(hardswish)

#define FASTST_NAME(name) name,
enum class Activation { FASTST_ACTIVATIONS(FASTST_NAME) };
#undef FASTST_NAME

// act(v, slope) and derivative(v, slope), with PyTorch's choice at the kinks; comparisons are
// written so that NaN passes through. Up to kFlatUpTo, where there is one, PyTorch's gradient is 0
// whatever comes in, infinity and NaN as well.
//
// M has what V lacks: of(c), the constant; sigmoid(v); normal_cdf(v) = (1 + erf(v/√2))/2 and its
// derivative normal_density(v).
template <Activation K>
struct Formula;

template <>
struct Formula<Activation::none> {
  template <class M, class V>
  static FASTST_DEVICE V act(V v, V) {
    return v;
  }
  template <class M, class V>
  static FASTST_DEVICE V derivative(V, V) {
    return M::of(1);
  }
};

template <>
struct Formula<Activation::relu> {
  static constexpr float kFlatUpTo = 0;

  template <class M, class V>
  static FASTST_DEVICE V act(V v, V) {
    return v < M::of(0) ? M::of(0) : v;
  }
  template <class M, class V>
  static FASTST_DEVICE V derivative(V v, V) {
    return v <= M::of(0) ? M::of(0) : M::of(1);
  }
};

template <>
struct Formula<Activation::silu> {
  template <class M, class V>
  static FASTST_DEVICE V act(V v, V) {
    return v * M::sigmoid(v);
  }
  template <class M, class V>
  static FASTST_DEVICE V derivative(V v, V) {
    const V s = M::sigmoid(v);
    return s * (M::of(1) + v * (M::of(1) - s));
  }
};

template <>
struct Formula<Activation::gelu> {
  template <class M, class V>
  static FASTST_DEVICE V act(V v, V) {
    return v * M::normal_cdf(v);
  }
  template <class M, class V>
  static FASTST_DEVICE V derivative(V v, V) {
    return M::normal_cdf(v) + v * M::normal_density(v);
  }
};

// (1 + tanh(a))/2 = sigmoid(2a), without the cancellation at a → −∞.
template <>
struct Formula<Activation::gelu_tanh> {
  static constexpr double kTwice = 1.59576912160573071176;  // 2·√(2/π)
  static constexpr double kCubic = 0.044715;

  template <class M, class V>
  static FASTST_DEVICE V gate(V v) {
    return M::sigmoid(M::of(kTwice) * (v + M::of(kCubic) * v * v * v));
  }
  template <class M, class V>
  static FASTST_DEVICE V act(V v, V) {
    return v * gate<M>(v);
  }
  template <class M, class V>
  static FASTST_DEVICE V derivative(V v, V) {
    const V s = gate<M>(v), rise = M::of(kTwice) * (M::of(1) + M::of(3 * kCubic) * v * v);
    return s + v * s * (M::of(1) - s) * rise;
  }
};

template <>
struct Formula<Activation::leaky_relu> {
  template <class M, class V>
  static FASTST_DEVICE V act(V v, V slope) {
    return v > M::of(0) ? v : v * slope;
  }
  template <class M, class V>
  static FASTST_DEVICE V derivative(V v, V slope) {
    return v > M::of(0) ? M::of(1) : slope;
  }
};

template <>
struct Formula<Activation::hardswish> {
  static constexpr float kFlatUpTo = -3;

  template <class M, class V>
  static FASTST_DEVICE V act(V v, V) {
    V gate = v + M::of(3);
    gate = gate < M::of(0) ? M::of(0) : gate;
    gate = gate > M::of(6) ? M::of(6) : gate;
    return v * gate * M::of(1.0 / 6);
  }
  template <class M, class V>
  static FASTST_DEVICE V derivative(V v, V) {
    const V inside = v < M::of(3) ? v * M::of(1.0 / 3) + M::of(0.5) : M::of(1);
    return v <= M::of(-3) ? M::of(0) : inside;
  }
};

template <Activation K>
struct Kind {
  static constexpr Activation value = K;
};

// Calls f with the activation as a type, so that what it compiles to has no choice inside.
template <class F>
FASTST_DEVICE void with_activation(Activation kind, F f) {
  switch (kind) {
#define FASTST_CASE(name) \
  case Activation::name:  \
    return f(Kind<Activation::name>{});
    FASTST_ACTIVATIONS(FASTST_CASE)
#undef FASTST_CASE
  }
}

}  // namespace fastst
