// How a pass is cut into tiles, and what its tiles reduce to.
#pragma once

#include <cpu.h>
#include <epilogue.h>
#include <parallel.h>
#include <tile.h>
#include <weights.h>

#include <memory>
#include <optional>
#include <vector>

namespace fastst::cpu {

// One convolution without groups.
struct Problem {
  Geometry g;
  Input in;
  Weights weights;
  Tensor out, aux;
  bool apart;        // each output channel is summed over the input channel of its number alone
  bool adds;         // to out, as another problem leaves it: out is aux
  Activation outer;  // of an Epilogue
  int64_t first, stored;  // channel of out in its tensor; channels of out
  const float* bias;
  Norm norm;
  std::optional<Axis> row;  // the axis w as it was, where its taps are channels of each output
  bool lines;  // channels of out are not neighbours: sums wait until they fill lines of positions
};

// Weights of some vectors of output channels, for one of several problems on the same source.
struct Work {
  int problem;
  Block block;
};

// What of a tile is output of one of several problems.
inline Tile inside(const Tile& tile, const Geometry& g) {
  Tile part = tile;
  part.t1 = std::clamp(g.t.out, tile.t0, tile.t1), part.h1 = std::clamp(g.h.out, tile.h0, tile.h1);
  part.w1 = std::clamp(g.w.out, tile.w0, tile.w1);
  return part;
}

// An offset for each output of a tile, of its place along t, h and w: a table, since the divisions
// that find a place take as long as many products.
class Offsets {
 public:
  // t, h, w: from one output to the next.
  Offsets(const Tile& tile, int64_t start, int64_t t, int64_t h, int64_t w)
      : memory_(tile.positions() * sizeof(int64_t) / sizeof(float)),
        data_(reinterpret_cast<int64_t*>(memory_.data())) {
    int64_t* to = data_;
    const int64_t width = tile.w1 - tile.w0;
    for (int64_t i = 0; i < tile.t1 - tile.t0; ++i)
      for (int64_t j = 0; j < tile.h1 - tile.h0; ++j, to += width)
        for (int64_t k = 0; k < width; ++k) to[k] = start + i * t + j * h + k * w;
  }
  int64_t operator[](int64_t i) const { return data_[i]; }
  const int64_t* from(int64_t i) const { return data_ + i; }

 private:
  Scratch memory_;
  int64_t* const data_;
};

inline int64_t parts_of(int64_t size, int64_t most) { return (size + most - 1) / most; }

// Outputs along t, h, w that are computed together: tiles hold whole ones, but at the end.
using Steps = std::array<int64_t, 3>;

// Tiles of which `floats` is at most `most`, of any shape: frames are split first where they do not
// overlap, then rows, then what is left.
template <class F>
std::vector<Tile> cut(const Geometry& g, const Steps& steps, int64_t most, F floats) {
  const Steps all = {parts_of(g.t.out, steps[0]), parts_of(g.h.out, steps[1]),
                     parts_of(g.w.out, steps[2])};
  Steps size = all;
  const auto tile = [&](int64_t n, const Steps& from, const Steps& until) {
    const auto end = [&](int i, int64_t out) { return std::min(until[i] * steps[i], out); };
    return Tile{n,
                from[0] * steps[0],
                end(0, g.t.out),
                from[1] * steps[1],
                end(1, g.h.out),
                from[2] * steps[2],
                end(2, g.w.out)};
  };
  const Steps order = g.t.kernel > 1 ? Steps{1, 2, 0} : Steps{0, 1, 2};
  for (const int64_t axis : order) {
    const int64_t least = axis == 2 ? std::min<int64_t>(size[2], 14) : 1;
    while (floats(tile(0, {}, size)) > most && size[axis] > least)
      size[axis] = std::max(least, (size[axis] + 1) / 2);
  }
  Steps parts, i;
  for (int axis = 0; axis < 3; ++axis) parts[axis] = parts_of(all[axis], size[axis]);
  std::vector<Tile> tiles;
  for (int64_t n = 0; n < g.batch; ++n)
    for (i[0] = 0; i[0] < parts[0]; ++i[0])
      for (i[1] = 0; i[1] < parts[1]; ++i[1])
        for (i[2] = 0; i[2] < parts[2]; ++i[2]) {
          Steps from, until;
          for (int axis = 0; axis < 3; ++axis) {
            from[axis] = all[axis] * i[axis] / parts[axis];
            until[axis] = all[axis] * (i[axis] + 1) / parts[axis];
          }
          tiles.push_back(tile(n, from, until));
        }
  return tiles;
}

// Reductions of all tiles, combined in their order: the same whatever the threads are.
class Reductions {
 public:
  Reductions(Write write, int64_t channels) : write_(write), channels_(channels) {}

  // Memory for the next tiles, (2, padded) for each problem.
  void add(const std::vector<Problem>& problems, const std::vector<Tile>& tiles) {
    last_ = parts_.size();
    for (const Problem& p : problems) {
      const int64_t padded = (p.weights.out + kLanes - 1) / kLanes * kLanes;
      const int64_t floats = static_cast<int64_t>(tiles.size()) * 2 * padded;
      parts_.push_back({std::make_unique<Scratch>(floats), p.first, p.weights.out, padded, {}});
      Part& part = parts_.back();
      std::fill_n(part.data->data(), floats, 0.0f);
      for (const Tile& t : tiles) part.positions.push_back(inside(t, p.g).positions());
    }
  }
  // Forgets what was added last: it is computed again.
  void drop() { parts_.resize(last_); }

  Partial at(int problem, int64_t tile, int64_t vector) const {
    const Part& p = parts_[last_ + problem];
    float* first = p.data->data() + tile * 2 * p.padded + vector * kLanes;
    return {first, first + p.padded};
  }

  // to (2, channels): mean and biased variance, or the two sums.
  void combine(float* to) const {
    std::vector<double> a(channels_), b(channels_), n(channels_);
    for (const Part& p : parts_)
      for (size_t tile = 0; tile < p.positions.size(); ++tile) {
        const float* x = p.data->data() + tile * 2 * p.padded;
        const float* y = x + p.padded;
        const double count = static_cast<double>(p.positions[tile]);
        if (count == 0) continue;
        for (int64_t i = 0; i < p.count; ++i) {
          const int64_t c = p.first + i;
          if (write_ == Write::forward) {
            const double delta = x[i] - a[c], share = count / (n[c] + count);
            a[c] += delta * share;
            b[c] += y[i] + delta * delta * share * n[c];
            n[c] += count;
          } else {
            a[c] += x[i], b[c] += y[i];
          }
        }
      }
    for (int64_t c = 0; c < channels_; ++c) {
      to[c] = static_cast<float>(a[c]);
      to[channels_ + c] = static_cast<float>(write_ == Write::forward ? b[c] / n[c] : b[c]);
    }
  }

 private:
  struct Part {
    std::unique_ptr<Scratch> data;
    int64_t first, count, padded;
    std::vector<int64_t> positions;
  };
  Write write_;
  int64_t channels_;
  std::vector<Part> parts_;
  size_t last_ = 0;
};

}  // namespace fastst::cpu
