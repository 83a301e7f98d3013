// Views and sources as kernels see them, and the geometry of a convolution.
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
  explicit Coefficients(const Array& a)
      : data(global<const A>(a.data, a.count)), channels(a.count / 5) {}
  __device__ A mean(int64_t c) const { return data[c]; }
  __device__ A scale(int64_t c) const { return data[channels + c]; }
  __device__ A beta(int64_t c) const { return data[2 * channels + c]; }
  __device__ A p(int64_t c) const { return data[3 * channels + c]; }
  __device__ A q(int64_t c) const { return data[4 * channels + c]; }
  __device__ A normalise(A u, int64_t c) const {
    return data ? (u - mean(c)) * scale(c) + beta(c) : u;
  }
};

// A Source: what is read is a function of what is stored, evaluated at every use.
template <class T>
struct Reader {
  using A = Acc<T>;
  Tensor<const T> a, b;
  Coefficients<A> norm;
  Read read;
  Activation act;
  A slope;

  struct Place {
    int64_t a, b;
  };

  Reader() = default;
  explicit Reader(const Source& s)
      : a(s.a),
        b(s.b ? *s.b : s.a),
        norm(s.coefficients),
        read(s.read),
        act(s.act),
        slope(A(s.slope)) {}

  __device__ Place place(int64_t n, int t, int h, int w) const {
    return {a.offset(n, t, h, w), b.offset(n, t, h, w)};
  }
  __device__ A operator()(Place at, int64_t c) const {
    A v = widen(a.data[at.a + c * a.stride[1]]);
    if (read == Read::norm_act) return activate(act, slope, norm.normalise(v, c));
    if (read == Read::norm_gradient && norm.data) {
      A u = widen(b.data[at.b + c * b.stride[1]]);
      return norm.scale(c) * v + norm.p(c) * (u - norm.mean(c)) + norm.q(c);
    }
    return v;
  }
};

// One axis of a convolution.
struct Axis {
  int size, out;  // of input and output
  int kernel, stride, before, after, dilation;
  PadMode mode;

  // Input index that output index o reads through tap k; -1 for a zero.
  __device__ int source(int o, int k) const {
    int i = o * stride + k * dilation - before;
    if (i >= 0 && i < size) return i;
    switch (mode) {
      case PadMode::replicate:
        return i < 0 ? 0 : size - 1;
      case PadMode::reflect:
        return i < 0 ? -i : 2 * (size - 1) - i;
      case PadMode::circular:
        return i < 0 ? i + size : i - size;
      default:
        return -1;
    }
  }

  // How many padded coordinates may hold input index i: itself, and its copies in the padding.
  __device__ int images(int i) const {
    if (mode == PadMode::zeros) return 1;
    if (mode != PadMode::replicate) return 3;
    return 1 + (i == 0 ? before : 0) + (i == size - 1 ? after : 0);
  }

  // Output index that reads image m of input index i through tap k; -1 if none does.
  __device__ int reader(int i, int m, int k) const {
    int j = i;
    if (mode == PadMode::replicate) j = i - (i == 0 ? before : 0) + m;
    if (mode == PadMode::circular) j = m == 0 ? i : m == 1 ? i - size : i + size;
    if (mode == PadMode::reflect && m != 0) {
      j = m == 1 ? -i : 2 * (size - 1) - i;
      if (j >= 0 && j < size) return -1;
    }
    if (j < -before || j >= size + after) return -1;
    j += before - k * dilation;
    if (j < 0 || j % stride != 0 || j / stride >= out) return -1;
    return j / stride;
  }
};

// Positions along one axis are 32-bit (64-bit division is slow); offsets of elements never are.
inline int narrow_size(int64_t n) {
  if (n > INT32_MAX / 4) throw std::invalid_argument("an axis of " + std::to_string(n));
  return static_cast<int>(n);
}

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

struct Geometry {
  Axis t, h, w;
  int groups;

  Geometry() = default;
  Geometry(const Conv& conv, const View& input, const View& output)
      : groups(narrow_size(conv.groups)) {
    Axis* axes[3] = {&t, &h, &w};
    for (int i = 0; i < 3; ++i)
      *axes[i] = {narrow_size(input.size[2 + i]),   narrow_size(output.size[2 + i]),
                  narrow_size(conv.kernel[i]),      narrow_size(conv.stride[i]),
                  narrow_size(conv.padding[2 * i]), narrow_size(conv.padding[2 * i + 1]),
                  narrow_size(conv.dilation[i]),    conv.mode};
  }
};

}  // namespace fastst
