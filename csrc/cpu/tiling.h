// How a pass is cut into tiles, and what its tiles reduce to.
#pragma once

#include <cpu.h>
#include <epilogue.h>
#include <parallel.h>
#include <tile.h>
#include <weights.h>

#include <deque>
#include <memory>
#include <vector>

namespace fastst::cpu {

// One convolution without groups.
struct Problem {
  Geometry g;
  Input in;
  Weights weights;
  Tensor out, aux;
  int64_t stored;  // channels of out
  const float* bias;
  Norm norm;
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

  // Memory for the next tiles, (2, padded) each, of `count` channels from `first` on.
  void add(const std::vector<Tile>& tiles, int64_t first, int64_t count, int64_t padded) {
    const int64_t floats = static_cast<int64_t>(tiles.size()) * 2 * padded;
    parts_.push_back({std::make_unique<Scratch>(floats), first, count, padded, {}});
    Part& p = parts_.back();
    std::fill_n(p.data->data(), floats, 0.0f);
    for (const Tile& t : tiles) p.positions.push_back(t.positions());
  }
  // Forgets the last tiles: they are computed again.
  void drop() { parts_.pop_back(); }

  Partial at(int64_t tile, int64_t vector) const {
    const Part& p = parts_.back();
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
  std::deque<Part> parts_;
};

}  // namespace fastst::cpu
