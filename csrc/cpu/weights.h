// Weights as the microkernel reads them: blocks of a few vectors of output channels; in a block one
// row for each k, ordered by chunk of input channels, tap, input channel.
#pragma once

#include <common/api.h>
#include <microkernel.h>
#include <parallel.h>
#include <storage.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

namespace fastst::cpu {

struct Weights {
  const std::byte* data;  // of the first tap and channels; strides may be negative
  Storage storage;
  int64_t out, in;  // channels
  int64_t out_stride, in_stride;
  std::array<int64_t, 3> size, stride;  // taps

  // The same in 32 bits each, pairs of neighbouring input channels, where bfloat16 lies so.
  std::optional<Weights> paired() const {
    const auto even = [](auto... elements) { return ((elements % 2 == 0) && ...); };
    if (storage != Storage::bf16 || in_stride != 1 ||
        !even(in, out_stride, stride[0], stride[1], stride[2]))
      return {};
    Weights w = *this;
    w.storage = Storage::f32, w.in /= 2, w.out_stride /= 2;
    for (int64_t& s : w.stride) s /= 2;
    return w;
  }
};

struct Block {
  int64_t vector;  // the first
  int vectors;
};

class WeightPacker {
 public:
  // chunk: input channels that are summed before the next ones, to keep a block in the caches;
  // width: rows of a tap, of which zeros fill those that are no channels; most: vectors of a block.
  WeightPacker(const Weights& weights, int64_t chunk, int64_t width = 0, int most = kMostVectors)
      : w_(weights),
        chunk_(chunk),
        width_(std::max(width, weights.in)),
        memory_(entries() * sizeof(Entry) / sizeof(float)),
        entries_(reinterpret_cast<Entry*>(memory_.data())) {
    for (int i = 0; i < kLanes; ++i) every_[i] = static_cast<int32_t>(i * w_.out_stride);
    for (int64_t v = 0, n = vectors(); v < n; v += blocks_.back().vectors)
      blocks_.push_back({v, block_vectors(v, n, most)});
    list_rows();
    if (kLanes == 8 && w_.out_stride <= kMixed && w_.out_stride % 2) choose_lanes();
  }

  int64_t taps() const { return w_.size[0] * w_.size[1] * w_.size[2]; }
  int64_t rows() const { return taps() * width_; }
  int64_t vectors() const { return (w_.out + kLanes - 1) / kLanes; }
  int64_t channels() const { return width_; }
  int64_t chunk() const { return chunk_; }
  const std::vector<Block>& blocks() const { return blocks_; }
  // Floats of a block, and where it starts when all are laid out in order.
  int64_t size(const Block& b) const { return rows() * b.vectors * kLanes; }
  int64_t offset(const Block& b) const { return rows() * b.vector * kLanes; }
  // Row of the first channel of a chunk at a tap.
  int64_t row(int64_t tap, int64_t channel) const {
    const int64_t start = channel / chunk_ * chunk_;
    return start * taps() + tap * std::min(chunk_, width_ - start) + channel - start;
  }

  void pack(const Block& b, float* to) const {
    with_storage(w_.storage, [&](auto s) { pack<decltype(s)>(b, to); });
    if (width_ == w_.in) return;
    const int64_t pitch = b.vectors * kLanes;
    for (int64_t tap = 0; tap < taps(); ++tap)
      std::fill_n(to + (row(tap, 0) + w_.in) * pitch, (width_ - w_.in) * pitch, 0.0f);
  }

 private:
  static constexpr int kMixed = 16;
  struct Entry {
    int64_t offset, row;
  };

  // Which vector of a stretch a lane is taken from, and which lane becomes each.
  struct Chosen {
    Bits vector, lane;
  };
  void choose_lanes() {
    for (int64_t first = 0; first < w_.out_stride; ++first)
      for (int i = 0; i < kLanes; ++i) {
        const int64_t at = first + i * w_.out_stride;
        chosen_[first].vector[at % kLanes] = static_cast<int32_t>(at / kLanes);
        chosen_[first].lane[i] = static_cast<int32_t>(at % kLanes);
      }
  }

  int64_t entries() const { return taps() * w_.in; }

  template <class S>
  void pack(const Block& b, float* to) const {
    const bool rows = w_.out_stride == 1, mixed = !rows && w_.out_stride <= kMixed;
    const int64_t pitch = b.vectors * kLanes;
    // In the order of memory, of which a transposition reads as many stretches as there are lanes.
    const int together = rows || mixed ? b.vectors : 1;
    for (int begin = 0; begin < b.vectors; begin += together)
      for (const Entry *e = entries_, *end = e + entries(); e < end;) {
        int length = 1;
        if (mixed)
          while (e + length < end && e[length].offset - e->offset < w_.out_stride) ++length;
        else if (!rows)
          while (length < kLanes && e + length < end && e[length].offset == e->offset + length)
            ++length;
        const Entry* soon = std::min(e + (rows ? 16 : mixed ? 2 : 4) * length, end - 1);
        for (int v = begin; v < begin + together; ++v) {
          const int64_t first = (b.vector + v) * kLanes;
          const int64_t n = std::min<int64_t>(kLanes, w_.out - first);
          const S* from = reinterpret_cast<const S*>(w_.data) + first * w_.out_stride + e->offset;
          float* column = to + v * kLanes;
          if (rows) {
            store(column + e->row * pitch, load(from, n));
            prefetch(from + soon->offset - e->offset);
          } else if (mixed)
            pick(e, length, from, n, soon->offset - e->offset, column, pitch);
          else
            turn(e, length, from, n, soon->offset - e->offset, column, pitch);
        }
        e += length;
      }
  }

  // Entries of ascending offsets that a vector holds, of n output channels: a transposition.
  template <class S>
  void turn(const Entry* e, int length, const S* from, int64_t n, int64_t ahead, float* column,
            int64_t pitch) const {
    const int64_t width = e[length - 1].offset - e->offset + 1;
    Vec rows[kLanes] = {};
    if (n == kLanes && width == kLanes) {  // in registers
#pragma GCC unroll 16
      for (int o = 0; o < kLanes; ++o) {
        rows[o] = load(from + o * w_.out_stride);
        prefetch(from + o * w_.out_stride + ahead);
      }
      transpose(rows);
    } else {
      for (int64_t o = 0; o < n; ++o) {
        rows[o] = load(from + o * w_.out_stride, width);
        prefetch(from + o * w_.out_stride + ahead);
      }
      transpose(rows);
    }
    if (length == kLanes) {
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(column + e[j].row * pitch, rows[j]);
      return;
    }
    for (int j = 0; j < length; ++j)
      store(column + e[j].row * pitch, rows[e[j].offset - e->offset]);
  }

  // Entries between which the next output channel does not begin. The next stretches lie `ahead`,
  // in other pages.
  template <class S>
  void pick(const Entry* e, int length, const S* from, int64_t n, int64_t ahead, float* column,
            int64_t pitch) const {
    if (kLanes == 8 && w_.out_stride % 2 && length < kLanes)
      return choose(e, length, from, n, ahead, column, pitch);
    // Of neighbours that are close a vector of the output holds too few for a transposition.
    if (w_.out_stride < kLanes) return permute_all(e, length, from, n, ahead, column, pitch);
    for (int begin = 0, end; begin < length; begin = end) {
      const int64_t offset = e[begin].offset;
      const auto reaches = [&](int j) {  // beyond the one before, which may be the same element
        return e[j].offset > e[j - 1].offset && e[j].offset - offset < kLanes;
      };
      for (end = begin + 1; end < length && reaches(end);) ++end;
      const S* const at = from + offset - e->offset;
      if (end - begin == 1)
        store(column + e[begin].row * pitch, gather(at, w_.out_stride, n));
      else
        turn(e + begin, end - begin, at, n, ahead, column, pitch);
    }
  }

  // Each takes every out_stride-th float of a stretch of memory, an odd number: no two of them lie
  // in one lane, so that the lanes are chosen among all vectors and then permuted once.
  template <class S>
  void choose(const Entry* e, int length, const S* from, int64_t n, int64_t ahead, float* column,
              int64_t pitch) const {
    const int64_t floats = (n - 1) * w_.out_stride + e[length - 1].offset - e->offset + 1;
    Vec read[kMixed];
    int count = 0;
    for (int64_t i = 0; i < floats; i += kLanes) {
      read[count++] = i + kLanes <= floats ? load(from + i) : load(from + i, floats - i);
      prefetch(from + i + ahead);
    }
    for (int j = 0; j < length; ++j) {
      const Chosen& chosen = chosen_[e[j].offset - e->offset];
      Vec row = read[0];
      for (int i = 1; i < count; ++i) row = chosen.vector >= i ? read[i] : row;
      row = permute(row, row, chosen.lane);
      store(column + e[j].row * pitch, n == kLanes ? row : first(row, n));
    }
  }

  // Each takes every out_stride-th float of a stretch of memory.
  template <class S>
  void permute_all(const Entry* e, int length, const S* from, int64_t n, int64_t ahead,
                   float* column, int64_t pitch) const {
    const int64_t floats = (n - 1) * w_.out_stride + e[length - 1].offset - e->offset + 1;
    Vec read[2 * kMixed];
    int count = 0;
    for (int64_t i = 0; i < floats; i += kLanes) {
      read[count++] = load(from + i, std::min<int64_t>(kLanes, floats - i));
      prefetch(from + i + ahead);
    }
    read[count] = Vec{};
    for (int j = 0; j < length; ++j) {
      const Bits at = every_ + static_cast<int32_t>(e[j].offset - e->offset);
      Vec row = permute(read[0], read[1], at & (2 * kLanes - 1));
      for (int i = 2; i < count; i += 2)
        row = at >= i * kLanes ? permute(read[i], read[i + 1], at & (2 * kLanes - 1)) : row;
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
    Entry* next = entries_;
    std::array<int64_t, 4> at{};
    const auto nest = [&](auto self, int level, int64_t offset) -> void {
      if (level == 4) {
        const int64_t tap = (at[1] * w_.size[1] + at[2]) * w_.size[2] + at[3];
        *next++ = {offset, row(tap, at[0])};
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
  int64_t chunk_, width_;
  std::vector<Block> blocks_;
  Bits every_{};  // lane · out_stride
  std::array<Chosen, kMixed> chosen_;
  Scratch memory_;  // of the entries: fresh pages for them would cost more than they do
  Entry* const entries_;
};

}  // namespace fastst::cpu
