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
        int length = 1;
        if (w_.out_stride == 1) {
          store(column + e->row * pitch, load(from + e->offset, n));
        } else if (w_.out_stride <= kLanes) {
          while (i + length < entries_.size() && e[length].offset - e->offset < w_.out_stride)
            ++length;
          pick(e, length, from, n, column, pitch);
        } else {
          while (length < kLanes && i + length < entries_.size() &&
                 e[length].offset == e->offset + length)
            ++length;
          turn(e, length, from, n, column, pitch);
        }
        i += length;
      }
    }
  }

 private:
  struct Entry {
    int64_t offset, row;
  };

  // Entries that are neighbours in memory, of n output channels: a transposition.
  void turn(const Entry* e, int length, const float* from, int64_t n, float* column,
            int64_t pitch) const {
    Vec rows[kLanes] = {};
    for (int64_t o = 0; o < n; ++o) rows[o] = load(from + o * w_.out_stride + e->offset, length);
    transpose(rows);
    for (int j = 0; j < length; ++j) store(column + e[j].row * pitch, rows[j]);
  }

  // Entries between which the next output channel does not begin: each takes every out_stride-th
  // float of a stretch of memory.
  void pick(const Entry* e, int length, const float* from, int64_t n, float* column,
            int64_t pitch) const {
    const int64_t floats = (n - 1) * w_.out_stride + e[length - 1].offset - e->offset + 1;
    Vec read[kLanes];
    int count = 0;
    for (int64_t i = 0; i < floats; i += kLanes)
      read[count++] = load(from + e->offset + i, std::min<int64_t>(kLanes, floats - i));
    for (int j = 0; j < length; ++j) {
      Bits at{};
      for (int lane = 0; lane < kLanes; ++lane)
        at[lane] = static_cast<int32_t>(lane * w_.out_stride + e[j].offset - e->offset);
      Vec row = permute(read[0], at % kLanes);
      for (int i = 1; i < count; ++i) row = at / kLanes == i ? permute(read[i], at % kLanes) : row;
      store(column + e[j].row * pitch, first(row, n));
    }
  }

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
