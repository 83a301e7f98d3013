// Geometry of a tap convolution, and the tiles of its input that the microkernel reads.
#pragma once

#include <activation.h>
#include <cpu.h>
#include <parallel.h>
#include <products.h>

#include <algorithm>
#include <cstring>

namespace fastst::cpu {

// One axis: output o reads position o·stride − before + j·dilation through tap j < kernel.
struct Axis {
  int64_t kernel, stride, dilation, before, in, out;
  PadMode mode;

  // Whether output o is what becomes of position o alone.
  bool idle() const { return kernel == 1 && stride == 1 && before == 0 && in == out; }
  // Whether there are taps, and none of them reads padding.
  bool inside() const {
    return kernel > 0 && before <= 0 && first(out - 1) + (kernel - 1) * dilation < in;
  }
  int64_t first(int64_t o) const { return o * stride - before; }
  // Positions that outputs [0, count) of a tile read, counted from the first.
  int64_t extent(int64_t count) const {
    return (count - 1) * stride + std::max<int64_t>(kernel - 1, 0) * dilation + 1;
  }
  // Index of what is read at a position; −1 for a zero.
  int64_t source(int64_t i) const {
    if (0 <= i && i < in) return i;
    switch (mode) {
      case PadMode::replicate:
        return i < 0 ? 0 : in - 1;
      case PadMode::reflect:
        i = i < 0 ? -i : i;
        return i < in ? i : 2 * (in - 1) - i;
      case PadMode::circular:
        return (i % in + in) % in;
      default:
        return -1;
    }
  }
};

struct Geometry {
  Axis t, h, w;
  int64_t batch;
  int64_t taps() const { return t.kernel * h.kernel * w.kernel; }
};

inline Axis axis(const Conv& conv, int i, int64_t in, int64_t out) {
  return {conv.kernel[i],
          conv.stride[i],
          conv.dilation[i],
          conv.padding[2 * i],
          in,
          out,
          i == 0 ? conv.frame_mode : conv.mode};
}

// Whether each output channel is made of one input channel, which makes no other.
inline bool is_depthwise(const View& weight, const Conv& conv) {
  return conv.groups > 1 && weight.size[0] == conv.groups && weight.size[1] == 1;
}

inline int64_t frames_before(const Source& s) { return s.past ? s.past->size[2] : 0; }

inline Geometry geometry(const Conv& conv, const Source& s, const View& out) {
  return {axis(conv, 0, frames_before(s) + s.a.size[2], out.size[2]),
          axis(conv, 1, s.a.size[3], out.size[3]), axis(conv, 2, s.a.size[4], out.size[4]),
          out.size[0]};
}

// Per-channel vectors (5, pitch), from some channel on; none: the identity. There may be such a
// table for each clip and frame, `n` and `t` floats apart.
struct Norm {
  const float* data = nullptr;
  int64_t pitch = 0, n = 0, t = 0;

  Norm() = default;
  explicit Norm(const Array& a) : data(static_cast<const float*>(a.data)), pitch(a.count / 5) {}
  // Tables for what a view holds: one, one for each clip, or one for each frame.
  Norm(const Array& a, const View& v) : Norm(a) {
    const int64_t clips = v.size[0], frames = v.size[2], c = v.size[1];
    if (a.count == 5 * c * clips * frames)
      pitch = c, t = 5 * c, n = frames * t;
    else if (a.count == 5 * c * clips)
      pitch = c, n = 5 * c;
  }
  Norm at(int64_t clip, int64_t frame) const {
    Norm shifted = *this;
    if (data) shifted.data += clip * n + frame * t;
    return shifted;
  }
  Norm from(int64_t channel) const {
    Norm shifted = *this;
    if (data) shifted.data += channel;
    return shifted;
  }
  const float* mean() const { return data; }
  const float* scale() const { return data + pitch; }
  const float* beta() const { return data + 2 * pitch; }
  const float* p() const { return data + 3 * pitch; }
  const float* q() const { return data + 4 * pitch; }
};

struct Tensor {
  std::byte* data = nullptr;
  Storage storage = Storage::f32;
  int64_t n = 0, c = 0, t = 0, h = 0, w = 0;  // strides

  Tensor() = default;
  explicit Tensor(const View& v)
      : data(static_cast<std::byte*>(v.data)),
        storage(v.storage),
        n(v.stride[0]),
        c(v.stride[1]),
        t(v.stride[2]),
        h(v.stride[3]),
        w(v.stride[4]) {}
  Tensor from(int64_t channel) const { return data ? shifted(channel * c) : *this; }
  Tensor shifted(int64_t elements) const {
    Tensor t = *this;
    t.data += elements * bytes_of(storage);
    return t;
  }
  template <class S>
  S* at(int64_t elements) const {
    return reinterpret_cast<S*>(data) + elements;
  }
  int64_t offset(int64_t in, int64_t it, int64_t ih, int64_t iw) const {
    return in * n + it * t + ih * h + iw * w;
  }
};

// Where a row is read from: elements of both tensors, and what the norm takes there.
struct From {
  int64_t a, b;
  Norm norm;
  const float *mean, *factor;  // of the position; or none
};

// A Source of some channels.
struct Input {
  Tensor a, b, past;
  int64_t before = 0;  // frames of the past
  Norm norm;
  Tensor mean, factor;  // of positions; no channels
  Read read;
  Activation act;
  float slope;
  int64_t channels;
  int64_t zeros = 0;  // that follow the channels of a plain source

  Input from(int64_t channel, int64_t count) const {
    Input part = *this;
    part.a = a.from(channel), part.b = b.from(channel), part.norm = norm.from(channel);
    part.past = past.from(channel);
    part.channels = count, part.zeros = 0;
    return part;
  }
  // The past alone: it is read as it is.
  Input as_past() const {
    Input part = *this;
    part.a = past, part.read = Read::plain;
    return part;
  }
  From at(int64_t n, int64_t t, int64_t h, int64_t w) const {
    const auto place = [&](const Tensor& x) {
      return x.data ? x.at<const float>(x.offset(n, t, h, w)) : nullptr;
    };
    return {a.offset(n, t, h, w), b.offset(n, t, h, w), norm.at(n, t), place(mean), place(factor)};
  }
};

// What belongs to the positions of a view, one after the other.
inline Tensor of_positions(const View& v, float* data) {
  Tensor t;
  t.data = reinterpret_cast<std::byte*>(data);
  t.w = 1, t.h = v.size[4], t.t = v.size[3] * t.h, t.n = v.size[2] * t.t;
  return t;
}

inline Input input_of(const Source& s, int64_t first, int64_t channels) {
  Input in;
  if (s.past) in.past = Tensor(*s.past).from(first), in.before = s.past->size[2];
  if (s.positions.count) {
    float* at = static_cast<float*>(s.positions.data);
    in.mean = of_positions(s.a, at);
    in.factor = of_positions(s.a, at + s.positions.count / 2);
  }
  in.a = Tensor(s.a).from(first);
  if (s.b) in.b = Tensor(*s.b).from(first);
  in.norm = Norm(s.coefficients, s.a).from(first);
  in.read = s.read, in.act = s.act, in.slope = static_cast<float>(s.slope);
  in.channels = channels;
  return in;
}

// Outputs [t0, t1) × [h0, h1) × [w0, w1) of clip n.
struct Tile {
  int64_t n, t0, t1, h0, h1, w0, w1;
  int64_t frame() const { return (h1 - h0) * (w1 - w0); }
  int64_t positions() const { return (t1 - t0) * frame(); }
};

// What the outputs of a tile read: channels are neighbours, and these are the other strides.
struct Packed {
  const float* data;
  int64_t t, h, w;
};

template <class Kind>
Packed packed_strides(const Geometry& g, const Tile& tile, int64_t channels, float* data) {
  const int64_t w = units<Kind>(channels), h = w * g.w.extent(tile.w1 - tile.w0);
  return {data, h * g.h.extent(tile.h1 - tile.h0), h, w};
}

template <class Kind>
int64_t packed_size(const Geometry& g, const Tile& tile, int64_t channels) {
  return packed_strides<Kind>(g, tile, channels, nullptr).t * g.t.extent(tile.t1 - tile.t0);
}

constexpr int kFew = 4;
// Row and place of the floats that interleaving makes, from that of their neighbour.
struct Few {
  Bits row[kFew], from[kFew];
  explicit Few(int64_t rows) {
    for (int64_t i = 0; i < kFew * kLanes; ++i) {
      const int64_t r = i % rows;
      row[i / kLanes][i % kLanes] = static_cast<int32_t>(r);
      from[i / kLanes][i % kLanes] = static_cast<int32_t>(i / rows % kLanes + r % 2 * kLanes);
    }
  }
};

// Made once: a row of channels takes less time than such a table.
inline const Few& few_of(int64_t rows) {
  static const Few all[] = {Few(1), Few(2), Few(3), Few(4)};
  return all[rows - 1];
}

// Reads neighbours in w as the Source says and lays their channels side by side, to be multiplied,
// those of the next one `pitch` on; zeros follow where there is room for a whole vector: it is
// multiplied as a whole, and subnormal numbers that somebody left there would be, a hundred times
// as slowly. S: what a and b are stored in.
template <Read R, Activation K, class S, class Kind>
class Reader {
 public:
  explicit Reader(const Input& input) : in_(input) {}

  void operator()(const From& from, int64_t count, float* to, int64_t pitch) const {
    read(in_.a.at<S>(from.a), in_.b.data ? in_.b.at<S>(from.b) : nullptr, from, count, to, pitch);
  }

 private:
  void read(const S* a, const S* b, const From& from, int64_t count, float* to,
            int64_t pitch) const {
    const int64_t channels = in_.channels, each = units<Kind>(channels);
    if (R == Read::plain && pitch == each) {
      if (in_.a.c == 1 && in_.a.w == channels && channels == each * Kind::kChannels)
        return copy(a, count * channels, to);
      if (in_.a.w == 1 && each <= kFew && Kind::kWhole) return interleave(a, count, to);
    }
    // All channels of some positions, so that memory is read in its order.
    const int64_t some = in_.a.c == 1 ? kLanes : count;
    for (int64_t w = 0; w < count; w += some) {
      From part = from;
      if (from.factor) part.mean += w * in_.mean.w, part.factor += w * in_.factor.w;
      read_vectors(a + w * in_.a.w, b ? b + w * in_.b.w : nullptr, part, std::min(some, count - w),
                   to + w * pitch, pitch);
    }
  }

  void read_vectors(const S* a, const S* b, const From& from, int64_t count, float* to,
                    int64_t pitch) const {
    const int64_t channels = in_.channels, each = units<Kind>(channels);
    // Where places are filled beyond the channels, zeros.
    const int64_t filled = Kind::kMultiple > 1 ? each * Kind::kChannels : channels;
    for (int64_t c = 0; c < filled; c += kLanes) {
      const int64_t n = std::clamp<int64_t>(channels - c, 0, kLanes);
      const int64_t stored = pitch * Kind::kChannels < c + kLanes ? n : kLanes;
      const Coefficients k(from.norm, c, n);
      const auto normed = [&](Vec v, int64_t w) {
        if (R != Read::norm_act || !from.factor) return v;
        return (v - splat(from.mean[w * in_.mean.w])) * splat(from.factor[w * in_.factor.w]);
      };
      const auto put = [&](Vec v, int64_t w) {
        const S* second = R == Read::norm_gradient ? b + w * in_.b.w + c * in_.b.c : nullptr;
        const Vec u = R == Read::norm_gradient ? gather(second, in_.b.c, n) : Vec{};
        v = prologue(normed(v, w), k, u);
        Kind::put(to + w * pitch, c, n == kLanes ? v : first(v, n), stored);
      };
      if (in_.a.c == 1 && (R != Read::norm_gradient || in_.b.c == 1) && n == kLanes) {
        for (int64_t w = 0; w < count; ++w) {
          const S* second = R == Read::norm_gradient ? b + w * in_.b.w + c : nullptr;
          const Vec u = R == Read::norm_gradient ? load(second) : Vec{};
          const Vec v = prologue(normed(load(a + w * in_.a.w + c), w), k, u);
          Kind::put(to + w * pitch, c, v, kLanes);
        }
        continue;
      }
      if (in_.a.w != 1 || in_.a.c == 1) {
        for (int64_t w = 0; w < count; ++w)
          put(gather(a + w * in_.a.w + c * in_.a.c, in_.a.c, n), w);
        continue;
      }
      for (int64_t w = 0; w < count; w += kLanes) {
        const int64_t width = std::min<int64_t>(kLanes, count - w);
        Vec rows[kLanes];
        for (int64_t i = n; i < kLanes; ++i) rows[i] = Vec{};
        for (int64_t i = 0; i < n; ++i) {
          const S* p = a + (c + i) * in_.a.c + w;
          rows[i] = width == kLanes ? load(p) : load(p, width);
          prefetch(p + in_.a.h);  // too many streams for the processor to do so
        }
        transpose(rows);
        for (int64_t j = 0; j < width; ++j) put(rows[j], w + j);
      }
    }
  }

  static void copy(const S* from, int64_t count, float* to) {
    if constexpr (std::is_same_v<S, typename Kind::Stored>) {
      std::memcpy(to, from, count * sizeof(S));
    } else {
      const int64_t whole = count / kLanes * kLanes;
      for (int64_t i = 0; i < whole; i += kLanes) Kind::put(to, i, load(from + i), kLanes);
      if (whole < count) Kind::put(to, whole, load(from + whole, count - whole), count - whole);
    }
  }

  struct Coefficients {
    Vec mean{}, scale{}, beta{}, p{}, q{};
    const bool there;
    Coefficients(const Norm& norm, int64_t c, int64_t n) : there(norm.data) {
      if (R == Read::plain || !there) return;
      mean = load(norm.mean() + c, n), scale = load(norm.scale() + c, n);
      if (R == Read::norm_act) beta = load(norm.beta() + c, n);
      if (R == Read::norm_gradient) p = load(norm.p() + c, n), q = load(norm.q() + c, n);
    }
  };

  // The few channels of a clip, each of them stored by itself.
  void interleave(const S* a, int64_t count, float* to) const {
    const int64_t each = units<Kind>(in_.channels);
    const Few& few = few_of(each);
    for (int64_t w = 0; w < count; w += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, count - w);
      Vec rows[kFew] = {};
      for (int64_t i = 0; i < each; ++i) {
        Vec channel[Kind::kChannels] = {};
        for (int64_t j = 0; j < Kind::kChannels && i * Kind::kChannels + j < in_.channels; ++j)
          channel[j] = load(a + (i * Kind::kChannels + j) * in_.a.c + w, width);
        rows[i] = Kind::of(channel);
      }
      for (int64_t i = 0; i < each; ++i) {
        const int64_t left = std::clamp<int64_t>(width * each - i * kLanes, 0, kLanes);
        const Vec even = permute(rows[0], rows[1], few.from[i]);
        const Vec odd = permute(rows[2], rows[3], few.from[i]);
        store(to + w * each + i * kLanes, few.row[i] < 2 ? even : odd, left);
      }
    }
  }

  Vec prologue(Vec v, const Coefficients& k, [[maybe_unused]] Vec u) const {
    if constexpr (R == Read::norm_act) {
      if (k.there) v = (v - k.mean) * k.scale + k.beta;
      return activate<K>(v, in_.slope);
    }
    if constexpr (R == Read::norm_gradient)
      if (k.there) return k.scale * v + k.p * (u - k.mean) + k.q;
    return v;
  }

  Input in_;
};

template <class Kind, class F>
void with_reader(const Input& in, F f) {
  Kind::with_stored(in.a.storage, [&](auto s) {
    using S = decltype(s);
    switch (in.read) {
      case Read::plain:
        return f(Reader<Read::plain, Activation::none, S, Kind>(in));
      case Read::norm_gradient:
        return f(Reader<Read::norm_gradient, Activation::none, S, Kind>(in));
      case Read::norm_act:
        return with_activation(
            in.act, [&](auto k) { f(Reader<Read::norm_act, decltype(k)::value, S, Kind>(in)); });
    }
  });
}

// The positions of a row that outputs read, from `left` on, in pieces that are neighbours in
// memory: piece(the first, where that is, how many); where there are none, −1. `zeros`: the whole
// row is.
template <class F>
void each_piece(const Axis& axis, int64_t left, int64_t width, bool zeros, F piece) {
  if (zeros) return piece(0, -1, width);
  const int64_t from = std::clamp<int64_t>(-left, 0, width);
  const int64_t until = std::clamp<int64_t>(axis.in - left, from, width);
  for (int64_t i = 0; i < from; ++i) piece(i, axis.source(left + i), 1);
  if (until > from) piece(from, left + from, until - from);
  for (int64_t i = until; i < width; ++i) piece(i, axis.source(left + i), 1);
}

// Fills what the outputs of a tile read. Frames that are zeros are left as they are: taps skip
// them, because zeros that are read through norm and activation would not stay zeros.
template <class Kind>
void pack_tile(const Geometry& g, const Tile& tile, const Input& in, float* to) {
  const Packed at = packed_strides<Kind>(g, tile, in.channels, to);
  const int64_t width = g.w.extent(tile.w1 - tile.w0), left = g.w.first(tile.w0);
  const Input past = in.as_past();
  const auto read_past = [&](const From& at, int64_t count, float* row, int64_t pitch) {
    with_reader<Kind>(past, [&](const auto& read) { read(at, count, row, pitch); });
  };
  with_reader<Kind>(in, [&](const auto& read) {
    for (int64_t it = 0; it < g.t.extent(tile.t1 - tile.t0); ++it) {
      const int64_t t = g.t.source(g.t.first(tile.t0) + it);
      if (t < 0) continue;
      for (int64_t ih = 0; ih < g.h.extent(tile.h1 - tile.h0); ++ih) {
        float* row = to + it * at.t + ih * at.h;
        const int64_t h = g.h.source(g.h.first(tile.h0) + ih);
        each_piece(g.w, left, width, h < 0, [&](int64_t begin, int64_t w, int64_t count) {
          if (w < 0)
            std::memset(row + begin * at.w, 0, count * at.w * sizeof(float));
          else if (t < in.before)
            read_past(past.at(tile.n, t, h, w), count, row + begin * at.w, at.w);
          else
            read(in.at(tile.n, t - in.before, h, w), count, row + begin * at.w, at.w);
        });
      }
    }
  });
}

constexpr int64_t kFewChannels = 8;

// Whether the pixels of a row are stored one after the other, as pairs of bfloat16 are made of
// them.
inline bool has_dense_rows(const Input& in) {
  const Tensor& a = in.a;
  return in.read == Read::plain && a.storage == Storage::bf16 && a.c == 1 && a.w == in.channels &&
         !in.before;
}

// The same, of a few channels, with the taps of a row as channels of an output, side by side: those
// of (w, its channels) in the order of memory, and zeros up to a whole pair. `row` is the axis of
// these taps, `g` what is left without them. Up to a vector of zeros follows.
template <class Kind>
void pack_rows_of_taps(Geometry g, const Axis& row, const Tile& tile, const Input& in, float* to) {
  using Stored = typename Kind::Stored;
  const int64_t c = in.channels, channels = row.kernel * c, each = units<Kind>(channels);
  const int64_t outputs = tile.w1 - tile.w0, width = row.extent(outputs);
  const int64_t pitch = units<Bf16Pairs>(c);
  const bool dense = has_dense_rows(in);
  g.w = row;
  const Scratch apart(dense ? 0 : packed_size<Bf16Pairs>(g, tile, c) + kFewChannels);
  if (!dense) pack_tile<Bf16Pairs>(g, tile, in, apart);
  const Scratch memory(width * pitch + kFewChannels);
  auto* const line = reinterpret_cast<Stored*>(memory.data());
  const float* from = apart;
  for (int64_t it = 0; it < g.t.extent(tile.t1 - tile.t0); ++it)
    for (int64_t ih = 0; ih < g.h.extent(tile.h1 - tile.h0); ++ih) {
      const int64_t t = g.t.source(g.t.first(tile.t0) + it);
      const int64_t h = g.h.source(g.h.first(tile.h0) + ih);
      if (dense && t >= 0)
        each_piece(row, row.first(tile.w0), width, h < 0, [&](int64_t i, int64_t w, int64_t n) {
          if (w < 0)
            std::memset(line + i * c, 0, n * c * sizeof(Stored));
          else
            std::memcpy(line + i * c, in.a.at<Stored>(in.a.offset(tile.n, t, h, w)),
                        n * c * sizeof(Stored));
        });
      else if (!dense)
        for (int64_t w = 0; w < width; ++w, from += pitch)
          std::memcpy(line + w * c, from, kFewChannels * sizeof(Stored));
      for (int64_t o = 0; o < outputs; ++o, to += each)
        Kind::fill(line + o * row.stride * c, channels, to);
    }
}

// Rows of AMX that lie across two lines take several times as long.
template <class Kind>
bool is_aligned(const void* data) {
  return Kind::kMultiple == 1 || reinterpret_cast<uintptr_t>(data) % kLine == 0;
}

// Whether the tiles can be read where they are: stored as they are multiplied, nothing to compute,
// no padding in space.
template <class Kind>
bool readable_in_place(const Geometry& g, const Input& in) {
  using Stored = typename Kind::Stored;
  const Tensor& a = in.a;
  const bool frames = g.t.mode == PadMode::zeros || g.t.inside();
  constexpr int64_t kUnit = Kind::kChannels * Kind::kMultiple;
  const auto whole = [](auto... elements) { return ((elements % kUnit == 0) && ...); };
  const int64_t lacking = units<Kind>(in.channels) * Kind::kChannels - in.channels;
  bool stored = false;
  with_storage(a.storage, [&](auto s) { stored = std::is_same_v<decltype(s), Stored>; });
  return in.read == Read::plain && stored && a.c == 1 && lacking <= in.zeros &&
         whole(a.t, a.h, a.w) && is_aligned<Kind>(a.data) && !in.before && g.h.inside() &&
         g.w.inside() && frames;
}

template <class Kind>
Packed in_place(const Geometry& g, const Tile& tile, const Input& in) {
  const Tensor& a = in.a;
  constexpr int64_t k = Kind::kChannels;
  const int64_t start =
      a.offset(tile.n, g.t.first(tile.t0), g.h.first(tile.h0), g.w.first(tile.w0));
  return {reinterpret_cast<const float*>(a.shifted(start).data), a.t / k, a.h / k, a.w / k};
}

}  // namespace fastst::cpu
