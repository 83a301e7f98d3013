// What the ways to sum a weight gradient have in common: boxes, pairs of positions, the items of
// work and how dW is written.
#pragma once

#include <parallel.h>
#include <window.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

namespace fastst::cpu {

constexpr int64_t kLongestSum = 128;          // products, before they are added to others
constexpr int64_t kBoxFloats = 192 << 10;     // packed x and dy of one box: most of an L2
constexpr int64_t kWholeFloats = 512 << 10;   // packed at once if dW then is written only once
constexpr int64_t kResultFloats = 160 << 10;  // of dW that a thread sums for itself

// padded: with the zeros around frames.
inline Reads reads_of(const Geometry& g, const Box& box, bool padded = false) {
  return {{g.t, g.h, g.w},
          box[0],
          {Window(g.t, box[1]), Window(g.h, box[2], padded), Window(g.w, box[3], padded)}};
}

// to[m·stride + r] = from[r·step + m] for neighbouring r < rows.
template <class S>
void write_rows(const float* from, int64_t step, int64_t rows, int64_t channels, S* to,
                int64_t stride) {
  for (int64_t m = 0; m < channels; m += kLanes) {
    const int64_t some = std::min<int64_t>(kLanes, channels - m);
    int64_t r = 0;
    if (some == kLanes)
      for (; r + kLanes <= rows; r += kLanes) {  // in registers
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load(from + (r + i) * step + m);
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + (m + i) * stride + r, square[i]);
      }
    for (; r < rows; r += kLanes) {
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

// One group of channels. Work is cut into (parts of the boxes) × (ranges of dy's channels), one
// item for each thread; sums over the parts come last, in order: results do not depend on which
// thread ran what.
class GradientGroup {
 protected:
  // pairing: what is multiplied are pairs of positions.
  GradientGroup(const Input& x, const Input& dy, const Geometry& g, const View& dw, int threads,
                const std::optional<Pairing>& pairing)
      : g_(pairing ? pairing->halved(g) : g),
        dw_(dw),
        threads_(threads),
        taps_(g.taps()),
        x_width_(std::min<int64_t>(kLanes, x.channels)),  // a few lie as close as in a clip
        pairing_(pairing) {
    for (int64_t c = 0; c < x.channels; c += kLanes)
      in_.push_back({c, std::min<int64_t>(kLanes, x.channels - c), x_width_});
    if (!pairing) {
      x_[0] = x, dy_[0] = dy;
      return;
    }
    const Axis& axis = g.*pairing->axis;
    for (const bool second : {false, true}) {
      x_[second] = pairing->half(x, axis.stride, second);
      dy_[second] = pairing->half(dy, 1, second);
    }
    seconds_ = axis.out / 2;
  }

  void add_panel(const Panel& out) {
    out_.push_back(out);
    start_.push_back(start_.back() + block_size(out) * in_.size());
  }

  // Cuts by at most `most` ranges of dy's channels, so that a large dW is summed once; else by
  // positions.
  void cut_ranges(int64_t most, int64_t results) {
    ranges_ = std::min<int64_t>({threads_, most, (results + kResultFloats - 1) / kResultFloats});
    parts_ = threads_ / ranges_;
  }
  // share: channels of dy that an item packs.
  void cut_parts(int64_t share) {
    const int64_t wide = in_.size() * x_width_;
    boxes_ = cut_boxes(g_, wide, share, parts_ == 1 ? kWholeFloats : kBoxFloats, parts_);
    if (parts_ == 1 && boxes_.size() > 1) boxes_ = cut_boxes(g_, wide, share, kBoxFloats, 1);
    parts_ = std::min<int64_t>(parts_, boxes_.size());
  }

  // Whether one item sums all that there is of its channels, and writes it.
  bool whole() const { return parts_ == 1 && boxes_.size() == 1; }
  int64_t block_size(const Panel& out) const { return taps_ * kLanes * out.width; }
  // Where sums of two panels are among those of a part.
  int64_t at(int64_t out, int64_t in) const { return start_[out] + in * block_size(out_[out]); }
  int64_t total() const { return start_.back(); }

  // item(range, boxes, sums of that part) for all of them and, unless one gave up, write(block,
  // panel of x, panel of dy). Whether none did.
  template <class F, class G>
  bool run(F item, G write) const {
    const Scratch sums(whole() ? 0 : parts_ * total());
    const int64_t boxes = boxes_.size(), many = in_.size();
    std::atomic<bool> good = true;
    parallel_for(threads_, parts_ * ranges_, [&](int64_t i) {
      const int64_t part = i / ranges_;
      const Range own = {boxes * part / parts_, boxes * (part + 1) / parts_};
      if (!item(i % ranges_, own, sums + part * total())) good = false;
    });
    if (whole() || !good) return good;
    parallel_for(threads_, many * out_.size(), [&](int64_t i) {
      const Panel &in = in_[i % many], &out = out_[i / many];
      float* block = sums + at(i / many, i % many);
      for (int64_t part = 1; part < parts_; ++part)
        for (int64_t j = 0; j < block_size(out); j += kLanes)
          store(block + j, load(block + j) + load(block + part * total() + j));
      write(block, in, out);
    });
    return true;
  }

  // Of both sources what a box reads.
  void pack_x(const Reads& r, float* to) const { pack(r, x_, &in_.front(), &in_.back() + 1, to); }
  void pack_dy(const Reads& r, const Panel* begin, const Panel* end, float* to) const {
    pack(r, dy_, begin, end, to);
  }

  const Geometry g_;  // of pairs, where they are multiplied
  const View& dw_;
  const int threads_;
  const int64_t taps_;
  const int64_t x_width_;  // of panels of x
  std::vector<Panel> in_, out_;
  std::vector<Box> boxes_;
  int64_t parts_ = 1, ranges_ = 1;

 private:
  void pack(Reads r, const Input (&in)[2], const Panel* begin, const Panel* end, float* to) const {
    if (!pairing_) return pack_panels<Floats>(r, in[0], begin, end, to);
    pack_panels<FirstOfPairs>(r, in[0], begin, end, to);
    r.axis[pairing_->which].in = seconds_;
    pack_panels<SecondOfPairs>(r, in[1], begin, end, to);
  }

  const std::optional<Pairing> pairing_;
  Input x_[2], dy_[2];  // of pairs the first and the second positions
  int64_t seconds_ = 0;
  std::vector<int64_t> start_ = {0};  // of each dy panel's blocks among the sums of one part
};

}  // namespace fastst::cpu
