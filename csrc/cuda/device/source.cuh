// What the generic kernels read, and the geometry of their convolutions.
#pragma once

#include <device/tensor.cuh>

namespace fastst {

// A Source: what is read is a function of what is stored, evaluated at every use.
template <class T>
class Reader {
  using A = Acc<T>;

 public:
  Tensor<const T> a;

  // Where the channels of a position lie, in memory and in tables.
  struct Place {
    int64_t a, b, table, position;
    bool past;
  };

  Reader() = default;
  explicit Reader(const Source& s)
      : a(s.a),
        b_(s.b ? *s.b : s.a),
        past_(s.past.value_or(View{})),
        norm_(s.coefficients, s.a.size[1]),
        positions_(global<const A>(s.positions.data, s.positions.count)),
        read_(s.read),
        act_(s.act),
        slope_(A(s.slope)) {
    const int64_t table = 5 * s.a.size[1], clips = s.a.size[0], frames = s.a.size[2];
    const int64_t tables = table > 0 ? s.coefficients.count / table : 1;
    if (s.read != Read::plain && s.coefficients.data && tables != 1 && tables != clips &&
        tables != clips * frames)
      throw std::invalid_argument(
          "a source needs a table for all clips, for each or for each frame");
    if (tables > 1) clip_ = tables / clips * table;
    if (tables > clips) frame_ = table;
  }

  __device__ Place place(int64_t n, int t, int h, int w) const {
    if (past_.data) {
      if (t < past_.size[2]) return {past_.offset(n, t, h, w), 0, 0, 0, true};
      t -= static_cast<int>(past_.size[2]);
    }
    const int64_t position = ((n * a.size[2] + t) * a.size[3] + h) * a.size[4] + w;
    return {a.offset(n, t, h, w), b_.offset(n, t, h, w), n * clip_ + t * frame_, position, false};
  }
  __device__ A operator()(Place at, int64_t c) const {
    if (at.past) return widen(past_.data[at.a + c * past_.stride[1]]);
    const A v = widen(a.data[at.a + c * a.stride[1]]);
    if (read_ == Read::norm_act) return activate(act_, slope_, normalised(v, at, c));
    if (read_ == Read::norm_gradient && norm_.data) {
      const A u = centred(widen(b_.data[at.b + c * b_.stride[1]]), at, c);
      const A g = norm_.scale(at.table + c) * v;
      if (positions_) return row(1, at) * (g - row(2, at) - row(3, at) * u);
      return g + norm_.p(at.table + c) * u + norm_.q(at.table + c);
    }
    return v;
  }
  // act'(v) where the value is act(v).
  __device__ A derivative(Place at, int64_t c) const {
    if (read_ != Read::norm_act) return A(1);
    return activate_gradient(act_, slope_,
                             normalised(widen(a.data[at.a + c * a.stride[1]]), at, c));
  }
  // What is stored without its mean, and x̂ where positions have values.
  __device__ A centred(Place at, int64_t c) const {
    return centred(widen(a.data[at.a + c * a.stride[1]]), at, c);
  }
  __device__ A scale(Place at, int64_t c) const {
    return norm_.data ? norm_.scale(at.table + c) : A(1);
  }

 private:
  __device__ A row(int i, Place at) const {
    const int64_t positions = a.positions();
    return positions_[i * positions + at.position];
  }
  __device__ A centred(A u, Place at, int64_t c) const {
    if (positions_) u = (u - row(0, at)) * row(1, at);
    return norm_.data ? u - norm_.mean(at.table + c) : u;
  }
  __device__ A normalised(A u, Place at, int64_t c) const {
    u = centred(u, at, c);
    return norm_.data ? u * norm_.scale(at.table + c) + norm_.beta(at.table + c) : u;
  }

  Tensor<const T> b_, past_;
  Coefficients<A> norm_;          // (tables, 5, C), of which it knows the first
  Global<const A> positions_{};   // (4, positions)
  int64_t clip_ = 0, frame_ = 0;  // from a table to that of the next clip, of the next frame
  Read read_;
  Activation act_;
  A slope_;
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

// The size of what a source gives: with the frames of past.
inline std::array<int64_t, 5> size_of(const Source& s) {
  std::array<int64_t, 5> size = s.a.size;
  if (s.past) size[2] += s.past->size[2];
  return size;
}

struct Geometry {
  Axis t, h, w;
  int groups;

  Geometry() = default;
  Geometry(const Conv& conv, const std::array<int64_t, 5>& input,
           const std::array<int64_t, 5>& output)
      : groups(narrow_size(conv.groups)) {
    Axis* axes[3] = {&t, &h, &w};
    for (int i = 0; i < 3; ++i)
      *axes[i] = {narrow_size(input[2 + i]),        narrow_size(output[2 + i]),
                  narrow_size(conv.kernel[i]),      narrow_size(conv.stride[i]),
                  narrow_size(conv.padding[2 * i]), narrow_size(conv.padding[2 * i + 1]),
                  narrow_size(conv.dilation[i]),    i == 0 ? conv.frame_mode : conv.mode};
  }
};

}  // namespace fastst
