// The sums of a tap convolution as they stand: for each output over its taps and channels.
#pragma once

#include <microkernel.h>
#include <tiling.h>

namespace fastst::cpu {

class Direct {
 public:
  using Ready = Packed;  // what a tile reads

  explicit Direct(const Problem& p)
      : p_(p), packer_(p.weights, chunk_of(p.weights)), in_place_(readable_in_place(p.g, p.in)) {}

  std::vector<Tile> tiles() const {
    return cut(p_.g, {1, 1, 1}, kTileFloats,
               [&](const Tile& t) { return packed_size(p_.g, t, p_.in.channels); });
  }
  const WeightPacker& weights() const { return packer_; }
  int64_t block_size(const Block& b) const { return packer_.size(b); }
  void pack_block(const Block& b, float* to) const { packer_.pack(b, to); }

  int64_t tile_size(const Tile& t) const {
    return in_place_ ? 0 : packed_size(p_.g, t, p_.in.channels);
  }
  Packed pack(const Tile& t, float* to) const {
    if (in_place_) return in_place(p_.g, t, p_.in);
    pack_tile(p_.g, t, p_.in, to);
    return packed_strides(p_.g, t, p_.in.channels, to);
  }

  // Calls done(sums, pitch, positions, count) until all positions of a tile were in one.
  template <class F>
  void operator()(const Tile& tile, const Packed& packed, const Block& block, const float* weights,
                  F done) const {
    const int64_t pitch = block.vectors * kLanes;
    const int64_t chunks = parts_of(p_.weights.in, packer_.chunk());
    // A group of rows shares its taps: those of one frame if taps may lie outside.
    const int64_t frames = p_.g.t.inside() ? 1 : tile.t1 - tile.t0;
    const int64_t each = tile.positions() / frames;
    const Groups groups(each, most_rows(block.vectors));
    const Scratch sums((chunks > 1 ? tile.positions() : kMostRows) * pitch);
    std::vector<Segment> segments;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t frame = 0; frame < frames; ++frame) {
        list_segments(tile, packed, frame, chunk, pitch, segments);
        for (int64_t i = 0; i < groups.count; ++i) {
          const int64_t start = frame * each + groups.start(i);
          const int count = static_cast<int>(groups.start(i + 1) - groups.start(i));
          int64_t rows[kMostRows], positions[kMostRows];
          for (int r = 0; r < count; ++r) {
            positions[r] = start + r;
            rows[r] = place(tile, start + r, packed);
          }
          float* to = sums + (chunks > 1 ? start * pitch : 0);
          multiply_for(count, block.vectors, true)(packed.data, rows, 1, weights, pitch,
                                                   segments.data(), segments.size(), to, pitch,
                                                   chunk > 0);
          if (chunk + 1 == chunks) done(to, pitch, positions, count);
        }
      }
  }

 private:
  // Of the second-level cache: what a tile reads, and what a block of weights holds of one chunk.
  static constexpr int64_t kTileFloats = 96 << 10;
  static constexpr int64_t kBlockFloats = 112 << 10;

  // Input channels whose weights a block keeps in the cache.
  static int64_t chunk_of(const Weights& w) {
    const int64_t taps = std::max<int64_t>(1, w.size[0] * w.size[1] * w.size[2]);
    const int64_t most = std::max<int64_t>(1, kBlockFloats / (taps * kMostVectors * kLanes));
    return parts_of(w.in, parts_of(w.in, most));
  }

  int64_t place(const Tile& tile, int64_t i, const Packed& packed) const {
    const int64_t width = tile.w1 - tile.w0, height = tile.h1 - tile.h0;
    return i / (width * height) * p_.g.t.stride * packed.t +
           i / width % height * p_.g.h.stride * packed.h + i % width * p_.g.w.stride * packed.w;
  }

  // The stretches of k for a frame of the tile: one for each tap, or for each row of taps where
  // their channels follow each other.
  void list_segments(const Tile& tile, const Packed& packed, int64_t frame, int64_t chunk,
                     int64_t pitch, std::vector<Segment>& list) const {
    const Geometry& g = p_.g;
    const int64_t first = chunk * packer_.chunk();
    const int64_t channels = std::min(packer_.chunk(), p_.weights.in - first);
    const bool together = g.w.dilation == 1 && packed.w == channels;
    list.clear();
    for (int64_t kt = 0; kt < g.t.kernel; ++kt) {
      if (g.t.source(g.t.first(tile.t0 + frame) + kt * g.t.dilation) < 0) continue;
      for (int64_t kh = 0; kh < g.h.kernel; ++kh)
        for (int64_t kw = 0; kw < g.w.kernel; kw += together ? g.w.kernel : 1) {
          const int64_t tap = (kt * g.h.kernel + kh) * g.w.kernel + kw;
          list.push_back({kt * g.t.dilation * packed.t + kh * g.h.dilation * packed.h +
                              kw * g.w.dilation * packed.w + first,
                          packer_.row(tap, first) * pitch,
                          together ? g.w.kernel * channels : channels});
        }
    }
  }

  const Problem& p_;
  WeightPacker packer_;
  bool in_place_;
};

}  // namespace fastst::cpu
