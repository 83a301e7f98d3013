// The sums of a tap convolution as they stand: for each output over its taps and channels.
#pragma once

#include <amx.h>
#include <tiling.h>

#include <deque>

namespace fastst::cpu {

// Weights of two input channels each, side by side in the place of a float. Taps of a row may be
// taken together, as channels.
template <class Kind>
class PairPacker {
 public:
  PairPacker(const Weights& weights, int64_t together)
      : paired_(together > 1 ? std::nullopt : weights.paired()),
        channels_(weights.in * together),
        units_(units<Kind>(channels_)),
        packer_(paired_.value_or(weights), paired_ ? units_ : weights.in, paired_ ? units_ : 0,
                Kind::kMostVectors),
        taps_(packer_.taps() / together) {}

  const std::vector<Block>& blocks() const { return packer_.blocks(); }
  int64_t channels() const { return units_; }
  int64_t chunk() const { return units_; }
  int64_t row(int64_t tap, int64_t unit) const { return tap * units_ + unit; }
  int64_t size(const Block& b) const { return taps_ * units_ * b.vectors * kLanes; }
  void pack(const Block& b, float* to) const {
    if (paired_) return packer_.pack(b, to);
    const Scratch rows(packer_.size(b));
    packer_.pack(b, rows);
    const int64_t pitch = b.vectors * kLanes;
    for (int64_t tap = 0; tap < taps_; ++tap)
      for (int64_t c = 0; c < 2 * units_; c += 2) {
        const float* even = rows + (tap * channels_ + c) * pitch;
        for (int64_t i = 0; i < pitch; i += kLanes, to += kLanes) {
          const Vec both[] = {c < channels_ ? load(even + i) : Vec{},
                              c + 1 < channels_ ? load(even + pitch + i) : Vec{}};
          store(to, Bf16Pairs::of(both));
        }
      }
  }

 private:
  std::optional<Weights> paired_;  // whose numbers are pairs, where they lie so
  int64_t channels_, units_;
  WeightPacker packer_;
  int64_t taps_;
};

// Positions of a tile that lie evenly apart in what is packed.
struct Run {
  int64_t length, step;
};

// All channels of a position, one after the other.
struct AllChannels {
  // How many taps of a row are one stretch of k, where neighbours lie `apart`.
  static int64_t taps_together(const Axis& w, int64_t apart, int64_t channels) {
    return w.dilation == 1 && apart == channels ? w.kernel : 1;
  }
};

// What an output channel sums over: all channels of the source.
template <class K>
struct Dense : AllChannels {
  using Kind = K;
  using Packer = std::conditional_t<Kind::kChannels == 1, WeightPacker, PairPacker<Kind>>;
  // Input channels whose weights a block keeps in the cache.
  static int64_t chunk_of(const Weights& w) {
    constexpr int64_t kBlockFloats = 112 << 10;
    const int64_t taps = std::max<int64_t>(1, w.size[0] * w.size[1] * w.size[2]);
    const int64_t most = std::max<int64_t>(1, kBlockFloats / (taps * kMostVectors * kLanes));
    return parts_of(w.in, parts_of(w.in, most));
  }

  static constexpr int64_t kMargin = 0;   // positions before and behind the sums that are touched
  static constexpr bool kBeside = false;  // whether sums are finished beside other products
  const Block& block;
  Dense(const Block& block, int64_t, const Run&) : block(block) {}
  // As many positions as are finished together: whole calls of the microkernel.
  struct Calls {
    int64_t positions, rows;
    Groups calls;
    const int64_t count = calls.count;
    int64_t start(int64_t i) const { return std::min(calls.start(i) * rows, positions); }
  };
  Calls groups(int64_t positions) const {
    const int64_t rows = most_rows(block.vectors);
    return {positions, rows, {parts_of(positions, rows), finished_rows(rows) / rows}};
  }
  // Sums of `count` positions from `first` on, onto what is there if `accumulate`.
  void operator()(int64_t first, int64_t count, const float* x, const Offsets& places,
                  const float* weights, const std::vector<Segment>& segments, float* to,
                  bool accumulate) const {
    const int64_t pitch = block.vectors * kLanes;
    const Groups parts(count, most_rows(block.vectors));
    for (int64_t j = 0; j < parts.count; ++j) {
      const int64_t at = parts.start(j);
      const int n = static_cast<int>(parts.start(j + 1) - at);
      multiply_for<Kind>(n, block.vectors, true)(x, places.from(first + at), 1, weights, pitch,
                                                 segments.data(), segments.size(), to + at * pitch,
                                                 pitch, accumulate);
    }
  }
};

// The same by AMX, some parts of runs at a time. All parts have as many positions: of a run they
// may overlap, and reach beyond those that are asked for.
struct DenseAmx : AllChannels {
  using Kind = AmxPairs;
  using Packer = PairPacker<Kind>;

  static constexpr int64_t kMargin = kAmxRows;
  static constexpr bool kBeside = true;
  const Block& block;
  const Run run;
  const Amx amx;
  DenseAmx(const Block& block, int64_t, const Run& run)
      : block(block),
        run(run),
        amx(static_cast<int>(parts_of(run.length, parts_of(run.length, kAmxRows)))) {}

  // Of as many parts as are multiplied together, at most `most`.
  struct Groups {
    int64_t run, rows, each, parts, count, lefts;  // each: parts of a run
    Groups(int64_t positions, int64_t run, int64_t rows, int64_t most)
        : run(run),
          rows(rows),
          each(parts_of(run, rows)),
          parts(positions / run * each),
          count(parts_of(parts, most)),
          lefts(parts_of(parts, std::max<int64_t>(count, 1))) {}
    int64_t start(int64_t i) const {
      const int64_t part = std::min(i * lefts, parts);
      return part / each * run + part % each * rows;
    }
  };
  Groups groups(int64_t positions) const {
    return {positions, run.length, amx.rows(), most_lefts(block.vectors)};
  }

  void operator()(int64_t first, int64_t count, const float* x, const Offsets& places,
                  const float* weights, const std::vector<Segment>& segments, float* to,
                  Beside beside) const {
    const int64_t pitch = block.vectors * kLanes, end = first + count;
    AmxProduct p = {{}, run.step, {},    pitch, segments.data(), std::ssize(segments),
                    {}, pitch,    beside};
    for (int v = 0; v < block.vectors; ++v) p.b[v] = weights + v * kLanes;
    for (int64_t at = first; at < end;) {
      int parts = 0;
      for (; parts < most_lefts(block.vectors) && at < end; ++parts) {
        const int64_t last = (at / run.length + 1) * run.length;  // end of its run
        const int64_t start = std::min(at, last - amx.rows());
        p.a[parts] = x + places[start];
        for (int v = 0; v < block.vectors; ++v)
          p.c[parts][v] = to + (start - first) * pitch + v * kLanes;
        at = std::min(start + amx.rows(), end);
      }
      amx(parts, block.vectors, p);
    }
  }
};

// The channel of its own number alone.
struct Channelwise {
  using Kind = Floats;
  using Packer = WeightPacker;
  static int64_t chunk_of(const Weights&) { return 1; }
  // Taps that lie as far apart as outputs read the same positions.
  static int64_t taps_together(const Axis& w, int64_t, int64_t) {
    return w.stride == w.dilation && taken_together(w.kernel) ? w.kernel : 1;
  }

  static constexpr int64_t kMargin = 0;
  static constexpr bool kBeside = false;
  const Block& block;
  const int64_t channels;
  const Run run;
  Channelwise(const Block& block, int64_t channels, const Run& run)
      : block(block), channels(channels), run(run) {}
  // As many positions as are finished together, whole runs if these are shorter.
  struct RunGroups {
    int64_t run;
    Groups runs;
    const int64_t count = runs.count;
    int64_t start(int64_t i) const { return runs.start(i) * run; }
  };
  RunGroups groups(int64_t positions) const {
    const int64_t unit = run.length <= kMostPlaces ? run.length : 1;
    return {unit, Groups(positions / unit, kMostPlaces / unit)};
  }
  void operator()(int64_t first, int64_t count, const float* x, const Offsets& places,
                  const float* weights, const std::vector<Segment>& segments, float* to,
                  bool) const {
    const int64_t pitch = block.vectors * kLanes, taps = segments.empty() ? 1 : segments[0].count;
    for (int64_t at = first, end; at < first + count; at = end) {
      end = std::min((at / run.length + 1) * run.length, first + count);
      for (int v = 0; v < block.vectors; ++v) {
        const int64_t channel = (block.vector + v) * kLanes, last = channels - channel;
        const int rows = static_cast<int>(
            parts_of(end - at, parts_of(end - at, kMostChannelRows)));  // alike in size
        const MultiplyChannels multiply = multiply_channels_for(rows, taps, last >= kLanes);
        for (int64_t i = at; i < end; i += rows) {
          const int64_t start = std::min(i, end - rows);  // the last ones may be summed twice
          multiply(x + places[start] + channel, run.step, weights + v * kLanes, pitch,
                   segments.data(), segments.size(), to + (start - first) * pitch + v * kLanes,
                   last);
        }
      }
    }
  }
};

// Several problems may share a source: the residues of a transposed convolution with a stride, or
// two branches.
template <class Products>
class Direct {
 public:
  using Ready = Packed;  // what a tile reads
  using Kind = typename Products::Kind;
  // Floats of all that is read, if weights are to go through them as soon as they are packed.
  static constexpr int64_t kStays = std::is_same_v<Kind, AmxPairs> ? 256 << 10 : 0;

  explicit Direct(const std::vector<Problem>& problems)
      : problems_(problems),
        g_(joined(problems)),
        in_(problems[0].in),
        row_(problems[0].row),
        channels_(in_.channels * (row_ ? row_->kernel : 1)),
        in_place_(!row_ && readable_in_place<Kind>(g_, in_)) {
    for (const Problem& p : problems) {
      const int index = static_cast<int>(packers_.size());
      if constexpr (Kind::kChannels == 1)
        packers_.emplace_back(p.weights, Products::chunk_of(p.weights));
      else
        packers_.emplace_back(p.weights, row_ ? row_->kernel : 1);
      for (const Block& b : packers_.back().blocks()) work_.push_back({index, b});
    }
  }

  std::vector<Tile> tiles() const {
    return cut(g_, {1, 1, 1}, kTileFloats, [&](const Tile& t) { return reads(t); });
  }
  const std::vector<Work>& work() const { return work_; }
  int64_t weights_size(const Work& w) const { return packers_[w.problem].size(w.block); }
  void pack_weights(const Work& w, float* to) const { packers_[w.problem].pack(w.block, to); }

  int64_t reads(const Tile& t) const { return packed_size<Kind>(g_, t, channels_); }
  int64_t tile_size(const Tile& t) const { return in_place_ ? 0 : reads(t) + (row_ ? kLanes : 0); }
  Packed pack(const Tile& t, float* to) const {
    if (in_place_) return in_place<Kind>(g_, t, in_);
    if constexpr (Kind::kChannels > 1)
      if (row_) {
        pack_rows_of_taps<Kind>(g_, *row_, t, in_, to);
        return packed_strides<Kind>(g_, t, channels_, to);
      }
    pack_tile<Kind>(g_, t, in_, to);
    return packed_strides<Kind>(g_, t, channels_, to);
  }

  // Calls done(sums, pitch, positions, count) until all positions of a tile, which is inside what
  // the problem computes, were in one; before it computes them, expect(positions, count).
  template <class E, class F>
  void operator()(const Tile& tile, const Packed& all, const Work& work, const float* weights,
                  E expect, F done) const {
    const Problem& p = problems_[work.problem];
    const typename Products::Packer& packer = packers_[work.problem];
    const Block& block = work.block;
    Packed packed = all;
    packed.data += (g_.t.before - p.g.t.before) * all.t + (g_.h.before - p.g.h.before) * all.h +
                   (g_.w.before - p.g.w.before) * all.w;
    const int64_t pitch = block.vectors * kLanes;
    const int64_t chunks = parts_of(packer.channels(), packer.chunk());
    // Positions that are multiplied together share their taps: of one frame if taps may lie
    // outside.
    const int64_t frames = p.g.t.inside() ? 1 : tile.t1 - tile.t0;
    const int64_t each = tile.positions() / frames;
    const int64_t width = tile.w1 - tile.w0, step = p.g.w.stride * packed.w;
    const bool joins = tile.h1 - tile.h0 == 1 || p.g.h.stride * packed.h == width * step;
    const Products multiply(block, in_.channels, {joins ? tile.frame() : width, step});
    const auto groups = multiply.groups(each);
    constexpr int64_t kPiece = kLine / sizeof(float), kBatch = kHeld / kPiece * kPiece;
    const int64_t batches = p.lines ? parts_of(each, kBatch) : groups.count;
    const int64_t piece = p.lines ? kPiece : kMostPlaces;
    const auto start = [&](int64_t i) {
      return p.lines ? std::min(i * kBatch, each) : groups.start(i);
    };
    const Offsets places(tile, 0, p.g.t.stride * packed.t, p.g.h.stride * packed.h, step);
    const int64_t held = chunks > 1 ? tile.positions() : kHeld, margin = Products::kMargin;
    const int64_t set = (held + 2 * margin) * pitch;
    const Scratch memory(set * (Products::kBeside ? 2 : 1));
    float* sums = memory + margin * pitch;
    float* others = sums + set;  // where some are finished while the next ones are multiplied

    struct {
      const float* sums;
      int64_t next, end, first;  // positions, and that of the first sum
    } waiting = {};
    const auto named = [&](int64_t from, int64_t most, int64_t end, auto f) {
      int64_t positions[kMostPlaces];
      const int n = static_cast<int>(std::min(most, end - from));
      for (int r = 0; r < n; ++r) positions[r] = from + r;
      f(positions, n);
      return n;
    };
    const auto finish = [&](int64_t most) {
      const float* from = waiting.sums + (waiting.next - waiting.first) * pitch;
      waiting.next += named(waiting.next, most, waiting.end, [&](const int64_t* positions, int n) {
        done(from, pitch, positions, n);
      });
    };
    const auto finish_all = [&] {
      while (waiting.next < waiting.end) finish(piece);
    };
    std::vector<Segment> segments;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t frame = 0; frame < frames; ++frame) {
        list_segments(p.g, packer, tile, packed, frame, chunk, pitch, segments);
        for (int64_t i = 0; i < batches; ++i) {
          const int64_t first = frame * each + start(i), end = frame * each + start(i + 1);
          float* const to = sums + (chunks > 1 ? first * pitch : 0);
          const bool last = chunk + 1 == chunks;
          for (int64_t at = first; last && at < end;) at += named(at, piece, end, expect);
          if constexpr (Products::kBeside) {
            int64_t stretches = 0, passed = 0;
            for (const Segment& s : segments) stretches += parts_of(s.count, kAmxPairs);
            const int64_t pieces = parts_of(waiting.end - waiting.next, kPiece);
            const int64_t apart = stretches / std::max<int64_t>(pieces, 1);
            auto some = [&] {
              if (++passed < apart || waiting.next == waiting.end) return;
              passed = 0, finish(kPiece);
            };
            const Beside beside = {[](void* of) { (*static_cast<decltype(some)*>(of))(); }, &some};
            multiply(first, end - first, packed.data, places, weights, segments, to, beside);
            finish_all();
            std::swap(sums, others);
          } else {
            multiply(first, end - first, packed.data, places, weights, segments, to, chunk > 0);
          }
          if (last) waiting = {to, first, end, first};
          if (!Products::kBeside) finish_all();
        }
      }
    finish_all();
  }

 private:
  static constexpr int64_t kFar = int64_t(1) << 60;
  static constexpr int64_t kTileFloats = 96 << 10;  // what a tile reads: of the second-level cache
  static constexpr int64_t kHeld = 112;             // positions whose sums wait

  // What the tiles of all problems read together, which have strides in common.
  static Geometry joined(const std::vector<Problem>& problems) {
    Geometry g = problems[0].g;
    if (problems.size() == 1) return g;
    for (Axis Geometry::* axis : {&Geometry::t, &Geometry::h, &Geometry::w}) {
      Axis& all = g.*axis;
      int64_t last = -kFar;
      all.before = -kFar;
      for (const Problem& p : problems) {
        const Axis& a = p.g.*axis;
        all.out = std::max(all.out, a.out);
        if (!a.inside()) all.mode = a.mode;
        if (a.kernel == 0) continue;
        all.before = std::max(all.before, a.before);
        last = std::max(last, (a.kernel - 1) * a.dilation - a.before);
      }
      const bool none = last == -kFar;
      all.kernel = none ? 0 : last + all.before + 1, all.dilation = 1;
      if (none) all.before = 0;
    }
    return g;
  }

  // The stretches of k for a frame of the tile: one for each tap, or for each row of taps where
  // their channels follow each other.
  static void list_segments(const Geometry& g, const typename Products::Packer& packer,
                            const Tile& tile, const Packed& packed, int64_t frame, int64_t chunk,
                            int64_t pitch, std::vector<Segment>& list) {
    const int64_t first = chunk * packer.chunk();
    const int64_t channels = std::min(packer.chunk(), packer.channels() - first);
    const int64_t together = Products::taps_together(g.w, packed.w, channels);
    list.clear();
    for (int64_t kt = 0; kt < g.t.kernel; ++kt) {
      if (g.t.source(g.t.first(tile.t0 + frame) + kt * g.t.dilation) < 0) continue;
      for (int64_t kh = 0; kh < g.h.kernel; ++kh)
        for (int64_t kw = 0; kw < g.w.kernel; kw += together) {
          const int64_t tap = (kt * g.h.kernel + kh) * g.w.kernel + kw;
          list.push_back({kt * g.t.dilation * packed.t + kh * g.h.dilation * packed.h +
                              kw * g.w.dilation * packed.w + first,
                          packer.row(tap, first) * pitch, together * channels});
        }
    }
  }

  const std::vector<Problem>& problems_;
  const Geometry g_;
  const Input in_;
  const std::optional<Axis> row_;
  const int64_t channels_;  // of what is packed
  const bool in_place_;
  std::deque<typename Products::Packer> packers_;
  std::vector<Work> work_;
};

}  // namespace fastst::cpu
