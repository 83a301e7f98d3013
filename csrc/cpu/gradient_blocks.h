// What the ways to sum a weight gradient have in common: boxes, pairs of positions and how dW is
// written.
#pragma once

#include <parallel.h>
#include <window.h>

#include <optional>

namespace fastst::cpu {

constexpr int64_t kLongestSum = 512;          // products, before they are added to others
constexpr int64_t kBoxFloats = 192 << 10;     // packed x and dy of one box: most of an L2
constexpr int64_t kWholeFloats = 512 << 10;   // packed at once if dW then is written only once
constexpr int64_t kResultFloats = 160 << 10;  // of dW that a thread sums for itself

// padded: with the zeros around frames.
inline Reads reads_of(const std::array<Axis, 3>& axis, const Box& box, bool padded = false) {
  return {
      axis,
      box[0],
      {Window(axis[0], box[1]), Window(axis[1], box[2], padded), Window(axis[2], box[3], padded)}};
}

// to[m·stride + r] = from[r·step + m] for neighbouring r < rows.
template <class S>
void write_rows(const float* from, int64_t step, int64_t rows, int64_t channels, S* to,
                int64_t stride) {
  for (int64_t m = 0; m < channels; m += kLanes) {
    const int64_t some = std::min<int64_t>(kLanes, channels - m);
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, rows - r);
      Vec square[kLanes] = {};
      for (int64_t i = 0; i < n; ++i) square[i] = load(from + (r + i) * step + m);
      transpose(square);
      for (int64_t i = 0; i < some; ++i) store(to + (m + i) * stride + r, square[i], n);
    }
  }
}

// dw[m, c, tap] = block[c·taps + tap][m] for one panel of x and one of dy.
template <class S>
void write_block(const float* block, const Panel& in, const Panel& out, const View& dw) {
  const int64_t taps = dw.size[2] * dw.size[3] * dw.size[4];
  S* to = static_cast<S*>(dw.data) + out.channel * dw.stride[0] + in.channel * dw.stride[1];
  const bool dense = dw.stride[1] == taps && (dw.size[4] == 1 || dw.stride[4] == 1) &&
                     (dw.size[3] == 1 || dw.stride[3] == dw.size[4]) &&
                     (dw.size[2] == 1 || dw.stride[2] == dw.size[3] * dw.size[4]);
  if (dense)
    return write_rows(block, out.width, in.channels * taps, out.channels, to, dw.stride[0]);
  for (int64_t t = 0; t < dw.size[2]; ++t)
    for (int64_t h = 0; h < dw.size[3]; ++h)
      for (int64_t w = 0; w < dw.size[4]; ++w, block += out.width) {
        S* at = to + t * dw.stride[2] + h * dw.stride[3] + w * dw.stride[4];
        if (dw.stride[1] == 1) {
          write_rows(block, taps * out.width, in.channels, out.channels, at, dw.stride[0]);
          continue;
        }
        for (int64_t c = 0; c < in.channels; ++c)
          for (int64_t m = 0; m < out.channels; m += kLanes)
            scatter(at + c * dw.stride[1] + m * dw.stride[0], dw.stride[0],
                    load(block + c * taps * out.width + m),
                    std::min<int64_t>(kLanes, out.channels - m));
      }
}

inline void write_block(const float* block, const Panel& in, const Panel& out, const View& dw) {
  with_storage(dw.storage, [&](auto s) { write_block<decltype(s)>(block, in, out, dw); });
}

// The axis along which positions are joined in pairs: one without taps.
struct Pairing {
  int64_t Tensor::* step;
  Axis Geometry::* axis;
  int which;  // of t, h, w

  static std::optional<Pairing> of(const Geometry& g) {
    const auto free = [](const Axis& a) { return a.kernel == 1 && a.inside() && a.out > 1; };
    if (free(g.w)) return Pairing{&Tensor::w, &Geometry::w, 2};
    if (free(g.t)) return Pairing{&Tensor::t, &Geometry::t, 0};
    return {};
  }
  // Every second one of neighbours that are `stride` positions apart, from the first or second on.
  Input half(const Input& in, int64_t stride, bool second) const {
    Input part = in;
    for (Tensor* t : {&part.a, &part.b, &part.mean, &part.factor}) {
      if (second && t->data) *t = t->shifted(t->*step * stride);
      t->*step *= 2 * stride;
    }
    if (which == 0) {  // tables of frames
      if (second) part.norm = part.norm.at(0, stride);
      part.norm.t *= 2 * stride;
    }
    return part;
  }
  Geometry halved(const Geometry& g) const {
    Geometry half = g;
    const int64_t out = ((g.*axis).out + 1) / 2;
    half.*axis = {1, 1, 1, 0, out, out, PadMode::zeros};
    return half;
  }
};

}  // namespace fastst::cpu
