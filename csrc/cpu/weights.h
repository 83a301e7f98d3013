// Weights as the microkernel reads them: blocks of a few vectors of output channels; in a block one
// row for each k, ordered by chunk of input channels, tap, input channel.
#pragma once

#include <api.h>
#include <microkernel.h>
#include <simd.h>

#include <algorithm>
#include <array>
#include <vector>

namespace fastst::cpu {

struct Weights {
  const float* data;  // of the first tap and channels; strides may be negative
  int64_t out, in;    // channels
  int64_t out_stride, in_stride;
  std::array<int64_t, 3> size, stride;  // taps
};

struct Block {
  int64_t vector;  // the first
  int vectors;
};

class WeightPacker {
 public:
  // chunk: input channels that are summed before the next ones, to keep a block in the caches.
  WeightPacker(const Weights& weights, int64_t chunk) : w_(weights), chunk_(chunk) {
    for (int64_t v = 0, n = vectors(); v < n; v += blocks_.back().vectors)
      blocks_.push_back({v, block_vectors(v, n)});
    list_rows();
  }

  int64_t taps() const { return w_.size[0] * w_.size[1] * w_.size[2]; }
  int64_t rows() const { return taps() * w_.in; }
  int64_t vectors() const { return (w_.out + kLanes - 1) / kLanes; }
  int64_t chunk() const { return chunk_; }
  const std::vector<Block>& blocks() const { return blocks_; }
  // Floats of a block, and where it starts when all are laid out in order.
  int64_t size(const Block& b) const { return rows() * b.vectors * kLanes; }
  int64_t offset(const Block& b) const { return rows() * b.vector * kLanes; }
  // Row of the first channel of a chunk at a tap.
  int64_t row(int64_t tap, int64_t channel) const {
    const int64_t start = channel / chunk_ * chunk_;
    return start * taps() + tap * std::min(chunk_, w_.in - start) + channel - start;
  }

  void pack(const Block& b, float* to) const {
    const int64_t pitch = b.vectors * kLanes;
    for (int v = 0; v < b.vectors; ++v) {
      const int64_t first = (b.vector + v) * kLanes;
      const int64_t n = std::min<int64_t>(kLanes, w_.out - first);
      const float* from = w_.data + first * w_.out_stride;
      float* column = to + v * kLanes;
      for (size_t i = 0; i < entries_.size();) {
        const Entry* e = &entries_[i];
        if (w_.out_stride == 1) {
          store(column + e->row * pitch, load(from + e->offset, n));
          ++i;
          continue;
        }
        int length = 1;
        while (length < kLanes && i + length < entries_.size() &&
               e[length].offset == e->offset + length)
          ++length;
        Vec rows[kLanes] = {};
        for (int64_t o = 0; o < n; ++o) {
          const float* p = from + o * w_.out_stride + e->offset;
          rows[o] = length == kLanes ? load(p) : load(p, length);
        }
        transpose(rows);
        for (int j = 0; j < length; ++j) store(column + e[j].row * pitch, rows[j]);
        i += length;
      }
    }
  }

 private:
  struct Entry {
    int64_t offset, row;
  };

  // Every (input channel, tap) in the order of its place in memory.
  void list_rows() {
    struct Dimension {
      int64_t size, stride, which;
    };
    std::array<Dimension, 4> d = {{{w_.in, w_.in_stride, 0},
                                   {w_.size[0], w_.stride[0], 1},
                                   {w_.size[1], w_.stride[1], 2},
                                   {w_.size[2], w_.stride[2], 3}}};
    std::stable_sort(d.begin(), d.end(), [](const Dimension& x, const Dimension& y) {
      return std::abs(x.stride) > std::abs(y.stride);
    });
    entries_.reserve(rows());
    std::array<int64_t, 4> at{};
    const auto nest = [&](auto self, int level, int64_t offset) -> void {
      if (level == 4) {
        const int64_t tap = (at[1] * w_.size[1] + at[2]) * w_.size[2] + at[3];
        entries_.push_back({offset, row(tap, at[0])});
        return;
      }
      const Dimension& dim = d[level];
      for (int64_t i = 0; i < dim.size; ++i) {
        const int64_t j = dim.stride < 0 ? dim.size - 1 - i : i;
        at[dim.which] = j;
        self(self, level + 1, offset + j * dim.stride);
      }
    };
    nest(nest, 0, 0);
  }

  Weights w_;
  int64_t chunk_;
  std::vector<Block> blocks_;
  std::vector<Entry> entries_;
};

}  // namespace fastst::cpu
