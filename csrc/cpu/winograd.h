// Winograd's minimal filtering (arXiv 1509.09308): two outputs along an axis from fewer products
// than three taps each.
//
//   stride 1, F(2, 3): 4 products for 6     m0 = (d0 − d2)·g0             y0 = m0 + m1 + m2
//                                           m1 = (d1 + d2)·(g0 + g1 + g2)/2
//                                           m2 = (d2 − d1)·(g0 − g1 + g2)/2
//                                           m3 = (d1 − d3)·g2             y1 = m1 − m2 − m3
//   stride 2: 5 for 6, two outputs of the   m0 = (d0 − d2)·g0             y0 = m0 + m1 + m3
//   taps g0, g2 by F(2, 2), and g1 apart    m1 = d2·(g0 + g2)
//                                           m2 = (d2 − d4)·g2             y1 = m1 − m2 + m4
//                                           m3 = d1·g1,  m4 = d3·g1
//
// An output depends on nothing but what its own taps read, in every intermediate value: rounding
// stays as local as without. Only infinities and overflow would turn into NaN.
#pragma once

#include <microkernel.h>
#include <tiling.h>

#include <atomic>
#include <cmath>

namespace fastst::cpu {

struct Untouched {
  static constexpr int kTaps = 1, kStride = 1, kIn = 1, kPoints = 1, kOut = 1;
  static void input(const Vec* d, Vec* v) { v[0] = d[0]; }
  static void weight(const Vec* g, Vec* u) { u[0] = g[0]; }
  static void output(const Vec* m, Vec* y) { y[0] = m[0]; }
};

struct Stride1 {
  static constexpr int kTaps = 3, kStride = 1, kIn = 4, kPoints = 4, kOut = 2;
  static void input(const Vec* d, Vec* v) {
    v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
  }
  static void weight(const Vec* g, Vec* u) {
    const Vec even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
    u[0] = g[0], u[1] = even + odd, u[2] = even - odd, u[3] = g[2];
  }
  static void output(const Vec* m, Vec* y) { y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3]; }
};

struct Stride2 {
  static constexpr int kTaps = 3, kStride = 2, kIn = 5, kPoints = 5, kOut = 2;
  static void input(const Vec* d, Vec* v) {
    v[0] = d[0] - d[2], v[1] = d[2], v[2] = d[2] - d[4], v[3] = d[1], v[4] = d[3];
  }
  static void weight(const Vec* g, Vec* u) {
    u[0] = g[0], u[1] = g[0] + g[2], u[2] = g[2], u[3] = g[1], u[4] = g[1];
  }
  static void output(const Vec* m, Vec* y) { y[0] = m[0] + m[1] + m[3], y[1] = m[1] - m[2] + m[4]; }
};

// Applies f along the second, then along the first axis of an array.
template <int A, int B, int A1, int B1, class First, class Second>
inline void along_both(const Vec* from, Vec* to, First first, Second second) {
  Vec half[A * B1];
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) second(from + a * B, half + a * B1);
#pragma GCC unroll 8
  for (int b = 0; b < B1; ++b) {
    Vec column[A], result[A1];
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) column[a] = half[a * B1 + b];
    first(column, result);
#pragma GCC unroll 8
    for (int a = 0; a < A1; ++a) to[a * B1 + b] = result[a];
  }
}

// Largest magnitude of what was seen, as the bits of a float: NaN and infinity are the largest.
class Largest {
 public:
  void see(Vec v) {
    const Bits bits = reinterpret_cast<Bits>(v) & 0x7fffffff;
    bits_ = bits > bits_ ? bits : bits_;
  }
  int32_t bits() const {
    int32_t most = 0;
    for (int i = 0; i < kLanes; ++i) most = std::max(most, bits_[i]);
    return most;
  }

 private:
  Bits bits_{};
};

inline void raise_to(std::atomic<int32_t>& most, int32_t bits) {
  int32_t seen = most.load(std::memory_order_relaxed);
  while (seen < bits && !most.compare_exchange_weak(seen, bits, std::memory_order_relaxed)) {
  }
}

// A along the height and B along the width, whose products are summed over the taps in time as they
// stand; or A along the frames, B untouched, of a temporal pass.
template <class Kind, class A, class B>
class Winograd {
 public:
  static constexpr int64_t kStays = 0;
  struct Ready {
    const float* data;  // (points, rows, units): what each product of each row reads
    int64_t point;      // from one point to the next
  };

  explicit Winograd(const Problem& p)
      : p_(p), packer_(p.weights, p.weights.in), in_place_(readable_in_place<Kind>(p.g, p.in)) {
    for (const Block& b : packer_.blocks()) work_.push_back({0, b});
  }

  static bool fits(const Problem& p) {
    const Axis& a = kSpatial ? p.g.h : p.g.t;
    const auto is = [](const Axis& axis, auto form) {
      return axis.kernel == form.kTaps && axis.stride == form.kStride && axis.dilation == 1;
    };
    if (kSpatial) return p.g.t.kernel > 0 && is(a, A{}) && is(p.g.w, B{});
    const bool apart = is(p.g.h, Untouched{}) && p.g.h.inside() && p.g.w.inside();
    return p.g.t.mode == PadMode::zeros && apart && is(a, A{}) && is(p.g.w, B{});
  }

  // Whether it is known to take less, counted in products of a position: packed weights cost about
  // as much as kPacking positions more, transforms as kTransforms channels more on either side.
  // Frames that are zeros are multiplied here but skipped otherwise.
  static bool pays(const Problem& p) {
    constexpr double kPacking = 250, kTransforms = 10;
    const Geometry& g = p.g;
    const double in = p.weights.in, out = p.weights.out, taps = g.t.kernel;
    const double parts = p.weights.in % kLanes ? 2 : 1;  // masked loads and stores that cross lines
    int64_t reads = 0;                                   // of all taps in time
    for (int64_t t = 0; t < g.t.out; ++t)
      for (int64_t i = 0; i < g.t.kernel; ++i)
        reads += g.t.source(g.t.first(t) + i * g.t.dilation) >= 0;
    const double rows = static_cast<double>(g.batch * parts_of(g.h.out, kSteps[1]) *
                                            parts_of(g.w.out, kSteps[2]));  // of a frame
    const double frames = static_cast<double>(parts_of(g.t.out, kSteps[0]));
    const double products = kSpatial ? static_cast<double>(reads) : frames;
    const double ours = kPacking * (kSpatial ? taps : 1) +
                        rows * (products + frames * kTransforms * (parts / in + 1 / out));
    const double frame = static_cast<double>(g.batch * g.h.out * g.w.out * reads);
    const double direct = static_cast<double>(g.h.kernel * g.w.kernel) * (frame + kPacking * taps);
    return kPoints * ours < direct;
  }

  std::vector<Tile> tiles() const {
    return cut(p_.g, kSteps, taps() > 1 ? kDeepFloats : kTileFloats,
               [&](const Tile& t) { return tile_size(t); });
  }
  const std::vector<Work>& work() const { return work_; }
  int64_t weights_size(const Work& w) const {
    return kPoints * taps() * units<Kind>(p_.weights.in) * w.block.vectors * kLanes;
  }

  void pack_weights(const Work& w, float* to) const {
    const int64_t channels = p_.weights.in, pitch = w.block.vectors * kLanes;
    const Scratch taps(packer_.size(w.block));
    packer_.pack(w.block, taps);
    Largest largest;
    constexpr int kEach = A::kTaps * B::kTaps;
    for (int64_t t = 0; t < this->taps(); ++t)
      for (int64_t unit = 0; unit < units<Kind>(channels); ++unit)
        for (int64_t i = 0; i < pitch; i += kLanes) {
          Vec u[kPoints][Kind::kChannels] = {};
          for (int j = 0; j < Kind::kChannels; ++j) {
            const int64_t c = unit * Kind::kChannels + j;
            if (c == channels) break;
            Vec g[kEach], of_channel[kPoints];
            for (int tap = 0; tap < kEach; ++tap) {
              g[tap] = load(taps + ((t * kEach + tap) * channels + c) * pitch + i);
              largest.see(g[tap]);
            }
            along_both<A::kTaps, B::kTaps, A::kPoints, B::kPoints>(g, of_channel, A::weight,
                                                                   B::weight);
            for (int point = 0; point < kPoints; ++point) u[point][j] = of_channel[point];
          }
          for (int point = 0; point < kPoints; ++point)
            store(to + ((point * this->taps() + t) * units<Kind>(channels) + unit) * pitch + i,
                  Kind::of(u[point]));
        }
    raise_to(largest_weight_, largest.bits());
  }

  int64_t reads(const Tile& t) const { return kPoints * point_size(t); }
  int64_t tile_size(const Tile& t) const { return reads(t); }

  Ready pack(const Tile& tile, float* to) const {
    const Rows rows = read_by(tile);
    Tile whole = tile;  // with what the last products read beyond the outputs
    if (!kSpatial) whole.t1 = tile.t0 + rows.t * kSteps[0];
    whole.h1 = tile.h0 + rows.h * kSteps[1];
    whole.w1 = tile.w0 + rows.w * kSteps[2];
    const bool direct = in_place_ && reads_inside(whole);
    const Scratch copy(direct ? 0 : packed_size<Kind>(p_.g, whole, p_.in.channels));
    Packed from = in_place<Kind>(p_.g, whole, p_.in);
    if (!direct) {
      pack_tile<Kind>(p_.g, whole, p_.in, copy);
      from = packed_strides<Kind>(p_.g, whole, p_.in.channels, copy);
    }
    transform(tile, rows, from, to);
    return {to, point_size(tile)};
  }

  template <class E, class F>
  void operator()(const Tile& tile, const Ready& ready, const Work& work, const float* weights,
                  E expect, F done) const {
    const Rows rows(tile);
    const Block& block = work.block;
    const int64_t pitch = block.vectors * kLanes, row = units<Kind>(p_.weights.in);
    const Scratch sums(kPoints * batch() * pitch);
    const std::vector<Few> groups = grouped(tile, rows, most_rows(block.vectors), pitch);
    int64_t offset[kMostRows];
    for (int r = 0; r < kMostRows; ++r) offset[r] = r * row;
    for (size_t begin = 0, end; begin < groups.size(); begin = end) {
      const int64_t first = groups[begin].row;
      for (end = begin + 1; end < groups.size(); ++end)
        if (groups[end].row + groups[end].count - first > batch()) break;
      for (int point = 0; point < kPoints; ++point)
        for (size_t i = begin; i < end; ++i) {
          const Few& few = groups[i];
          if (point + 1 == kPoints) {
            const Outputs soon(tile, rows, few.row, few.count);
            for (int a = 0; a < A::kOut; ++a)
              if (soon.count[a]) expect(soon.positions[a], soon.count[a]);
          }
          multiply_for<Kind>(few.count, block.vectors, true)(
              ready.data + point * ready.point + few.from * row, offset, 1,
              weights + point * taps() * row * pitch, pitch, few.taps.data(), few.taps.size(),
              sums + (point * batch() + few.row - first) * pitch, pitch, false);
        }
      for (size_t i = begin, next; i < end; i = next) {
        int count = groups[i].count;
        for (next = i + 1; next < end; count += groups[next++].count)
          if (count + groups[next].count > put_rows(block)) break;
        put_together(tile, rows, groups[i].row, count, first, sums, block, done);
      }
    }
  }

  // Whether neither a product nor a sum can have left the range of float; of all that was packed.
  bool stayed_finite() const {
    const auto value = [](const std::atomic<int32_t>& bits) {
      const int32_t b = bits.load();
      float v;
      std::memcpy(&v, &b, sizeof v);
      return v;
    };
    const float bound = 1e3f * value(largest_input_) * value(largest_weight_);
    return bound * static_cast<float>(p_.weights.in * taps()) < 1e38f;  // false for NaN
  }

 private:
  static constexpr bool kSpatial = B::kTaps > 1;
  static constexpr int kPoints = A::kPoints * B::kPoints, kOut = A::kOut * B::kOut;
  static constexpr Steps kSteps = kSpatial ? Steps{1, A::kOut, B::kOut} : Steps{A::kOut, 1, 1};
  // Of the second-level cache: what a tile's products read, and rows of sums of all points.
  static constexpr int64_t kTileFloats = 120 << 10;
  // Weights of several taps in time do not stay there: fewer and larger tiles read them less often,
  // and frames of tiles that overlap in time are transformed less often.
  static constexpr int64_t kDeepFloats = 320 << 10;
  int64_t batch() const { return taps() > 1 ? 112 : 56; }

  // Outputs of a tile that are computed together, counted along t, h, w; or the place of one.
  struct Rows {
    int64_t t, h, w;
    Rows(int64_t t, int64_t h, int64_t w) : t(t), h(h), w(w) {}
    explicit Rows(const Tile& tile)
        : Rows(parts_of(tile.t1 - tile.t0, kSteps[0]), parts_of(tile.h1 - tile.h0, kSteps[1]),
               parts_of(tile.w1 - tile.w0, kSteps[2])) {}
    int64_t count() const { return t * h * w; }
    Rows place(int64_t row) const { return {row / (h * w), row / w % h, row % w}; }
    void advance(Rows& at) const {
      if (++at.w < w) return;
      at.w = 0;
      if (++at.h < h) return;
      at.h = 0, ++at.t;
    }
  };

  // Taps in time that are summed as they stand.
  int64_t taps() const { return kSpatial ? p_.g.t.kernel : 1; }

  // Frames that are read, and rows of them: those of the outputs, and what more taps in time reach.
  Rows read_by(const Tile& t) const {
    Rows rows(t);
    if (taps() > 1) rows.t = p_.g.t.extent(t.t1 - t.t0);
    return rows;
  }
  // One vector more, so that the points of one place do not fall into one set of the cache.
  int64_t point_size(const Tile& t) const {
    return read_by(t).count() * units<Kind>(p_.in.channels) + kLanes;
  }

  // Rows of one frame of outputs that are multiplied together.
  struct Few {
    int64_t row, from;  // the first; and where it reads, before taps in time are counted
    int count;
    std::vector<Segment> taps;  // the stretches of k: one for each tap in time that reads something
  };
  std::vector<Few> grouped(const Tile& tile, const Rows& rows, int most, int64_t pitch) const {
    const Axis& t = p_.g.t;
    const int64_t row = units<Kind>(p_.weights.in), each = rows.h * rows.w;
    std::vector<Few> all;
    for (int64_t frame = 0; frame < rows.t; ++frame) {
      std::vector<Segment> found;
      for (int64_t kt = 0; kt < taps(); ++kt)
        if (taps() == 1 || t.source(t.first(tile.t0 + frame) + kt * t.dilation) >= 0)
          found.push_back({kt * t.dilation * each * row, kt * row * pitch, row});
      const int64_t from = taps() == 1 ? frame : frame * t.stride;
      const Groups groups(each, most);
      for (int64_t i = 0; i < groups.count; ++i)
        all.push_back({frame * each + groups.start(i), from * each + groups.start(i),
                       static_cast<int>(groups.start(i + 1) - groups.start(i)), found});
    }
    return all;
  }

  // Whether all that a rounded up tile reads exists; frames that do not are skipped anyway.
  bool reads_inside(const Tile& whole) const {
    const auto inside = [](const Axis& a, int64_t begin, int64_t end) {
      return a.first(begin) >= 0 && a.first(begin) + a.extent(end - begin) <= a.in;
    };
    return inside(p_.g.h, whole.h0, whole.h1) && inside(p_.g.w, whole.w0, whole.w1);
  }

  void transform(const Tile& tile, const Rows& rows, const Packed& from, float* to) const {
    const int64_t channels = p_.in.channels, point = point_size(tile);
    const int64_t step = kSpatial ? from.h : from.t;
    // With several taps in time every frame that they reach is read, else those of the outputs.
    const int64_t along = taps() > 1 ? 1 : kSteps[0] * p_.g.t.stride;
    Largest largest;
    int64_t row = 0;
    for (int64_t t = 0; t < rows.t; ++t) {
      bool there[A::kIn];
      for (int a = 0; a < A::kIn; ++a)
        there[a] = p_.g.t.source(p_.g.t.first(tile.t0) + t * along + (kSpatial ? 0 : a)) >= 0;
      if (taps() > 1 && !there[0]) {  // no tap reads it
        row += rows.h * rows.w;
        continue;
      }
      for (int64_t h = 0; h < rows.h; ++h)
        for (int64_t w = 0; w < rows.w; ++w, ++row) {
          const float* at = from.data + t * along * from.t +
                            h * kSteps[1] * p_.g.h.stride * from.h +
                            w * kSteps[2] * p_.g.w.stride * from.w;
          float* out = to + row * units<Kind>(channels);
          for (int64_t c = 0; c < channels; c += kLanes) {
            const int64_t n = std::min<int64_t>(kLanes, channels - c);
            Vec d[A::kIn * B::kIn], v[kPoints];
            for (int a = 0; a < A::kIn; ++a)
              for (int b = 0; b < B::kIn; ++b) {
                Vec& x = d[a * B::kIn + b];
                x = there[a] ? Kind::get(at + a * step + b * from.w, c, n) : Vec{};
                largest.see(x);
              }
            along_both<A::kIn, B::kIn, A::kPoints, B::kPoints>(d, v, A::input, B::input);
            for (int i = 0; i < kPoints; ++i) Kind::put(out + i * point, c, v[i], n);
          }
        }
    }
    raise_to(largest_input_, largest.bits());
  }

  // For each output of some rows its place among those that are done together, if it is in the
  // tile.
  struct Outputs {
    int place[kMostRows * kOut], count[A::kOut] = {};
    int64_t positions[A::kOut][kMostPlaces];

    Outputs(const Tile& tile, const Rows& rows, int64_t begin, int size) {
      const int64_t height = tile.h1 - tile.h0, width = tile.w1 - tile.w0;
      Rows at = rows.place(begin);
      for (int i = 0; i < size; ++i, rows.advance(at))
        for (int a = 0; a < A::kOut; ++a)
          for (int b = 0; b < B::kOut; ++b) {
            int64_t t = at.t * kSteps[0], h = at.h * kSteps[1];
            const int64_t w = at.w * kSteps[2] + b;
            (kSpatial ? h : t) += a;
            int& to = place[(i * A::kOut + a) * B::kOut + b];
            to = -1;
            if (t >= tile.t1 - tile.t0 || h >= height || w >= width) continue;
            to = count[a]++;
            positions[a][to] = (t * height + h) * width + w;
          }
    }
  };

  // Rows of sums whose outputs are finished together, at most: as finished_rows.
  static int put_rows(const Block& block) {
    return kLanes == 16 ? most_rows(block.vectors) : kMostRows;
  }

  // Outputs of `count` rows from `row` on, of a batch that starts at row `first` of the tile.
  template <class F>
  void put_together(const Tile& tile, const Rows& rows, int64_t row, int count, int64_t first,
                    const float* sums, const Block& block, F done) const {
    const int64_t pitch = block.vectors * kLanes, begin = row - first, end = begin + count;
    const Outputs found(tile, rows, row, count);
    alignas(64) float results[A::kOut][kMostPlaces * kMostVectors * kLanes];
    for (int64_t i = begin; i < end; ++i)
      for (int v = 0; v < block.vectors; ++v) {
        Vec m[kPoints], y[kOut];
        for (int point = 0; point < kPoints; ++point)
          m[point] = load(sums + (point * batch() + i) * pitch + v * kLanes);
        along_both<A::kPoints, B::kPoints, A::kOut, B::kOut>(m, y, A::output, B::output);
        for (int a = 0; a < A::kOut; ++a)
          for (int b = 0; b < B::kOut; ++b)
            if (const int to = found.place[((i - begin) * A::kOut + a) * B::kOut + b]; to >= 0)
              store(results[a] + to * pitch + v * kLanes, y[a * B::kOut + b]);
      }
    for (int a = 0; a < A::kOut; ++a)
      if (found.count[a]) done(results[a], pitch, found.positions[a], found.count[a]);
  }

  const Problem& p_;
  WeightPacker packer_;
  bool in_place_;
  std::vector<Work> work_;
  mutable std::atomic<int32_t> largest_input_{0}, largest_weight_{0};
};

}  // namespace fastst::cpu
