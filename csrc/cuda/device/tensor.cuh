// Views as kernels see them.
#pragma once

#include <cstdint>
#include <device/math.cuh>
#include <device/primitives.cuh>
#include <stdexcept>
#include <string>

namespace fastst {

template <class T>
struct Tensor {
  Global<T> data{};            // null: it is absent
  int64_t size[5], stride[5];  // (N, C, T, H, W)

  Tensor() = default;
  explicit Tensor(const View& v) : data(global<T>(v.data, v.span())) {
    for (int i = 0; i < 5; ++i) size[i] = v.size[i], stride[i] = v.stride[i];
  }
  __device__ int64_t offset(int64_t n, int t, int h, int w) const {
    return n * stride[0] + t * stride[2] + h * stride[3] + w * stride[4];
  }
  __device__ int64_t positions() const { return size[0] * size[2] * size[3] * size[4]; }
};

// (n, t, h, w) of a position counted with w fastest.
struct Position {
  int64_t n;
  int t, h, w;

  template <class T>
  __device__ Position(int64_t index, const Tensor<T>& like) {
    w = static_cast<int>(index % like.size[4]), index /= like.size[4];
    h = static_cast<int>(index % like.size[3]), index /= like.size[3];
    t = static_cast<int>(index % like.size[2]), n = index / like.size[2];
  }
};

template <class A>
struct Coefficients {  // (5, channels); none: the identity
  Global<const A> data{};
  int64_t channels;

  Coefficients() = default;
  explicit Coefficients(const Array& a) : Coefficients(a, a.count / 5) {}
  Coefficients(const Array& a, int64_t channels)
      : data(global<const A>(a.data, a.count)), channels(channels) {}
  __device__ A mean(int64_t c) const { return data[c]; }
  __device__ A scale(int64_t c) const { return data[channels + c]; }
  __device__ A beta(int64_t c) const { return data[2 * channels + c]; }
  __device__ A p(int64_t c) const { return data[3 * channels + c]; }
  __device__ A q(int64_t c) const { return data[4 * channels + c]; }
};

// Positions along one axis are 32-bit (64-bit division is slow); offsets of elements never are.
inline int narrow_size(int64_t n) {
  if (n > INT32_MAX / 4) throw std::invalid_argument("an axis of " + std::to_string(n));
  return static_cast<int>(n);
}

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

}  // namespace fastst
