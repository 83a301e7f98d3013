// What becomes of the accumulators of a warpgroup's 64 × N tile: statistics, epilogue, rows.
//
// A thread holds, of its warp's 16 rows, rows r = lane / 4 and r + 8, and of every 8 columns the
// two at 2·(lane % 4): values[4·j + 2·half + e] is row r + 8·half, column 8·j + 2·(lane % 4) + e.
#pragma once

#include <device/tensor.cuh>

namespace fastst {

// Where the thread's two rows of a block lie; negative: such a row does not exist. Made when it is
// needed: those of all blocks at once would take too many registers.
struct RowPair {
  int64_t out[2], residual[2];
};

template <int N>
class ColumnStatistics;

// value = act(accumulator·scale + shift + residual), written where `channels` of a row are left.
template <class T>
struct Epilogue {
  template <int N>
  using Statistics = ColumnStatistics<N>;

  Global<T> out;
  Global<const T> residual{};        // rows of channels as of out, or none
  Global<const float> scale, shift;  // of whole tiles of columns
  Global<float> partials;            // (blocks · warps, 3, channels): count, mean, Σ(v − mean)²
  int channels;                      // that are computed
  int stored;      // that a row of out has, a multiple of 8: zeros from channels on
  float negative;  // what multiplies values below zero: 1, 0, or a slope

  Epilogue() = default;
  explicit Epilogue(const HopperOutput& o)
      : out(global<T>(o.out.data, o.out.span())),
        scale(global<const float>(o.affine.data, o.affine.count)),
        shift(scale + o.affine.count / 2),
        partials(global<float>(o.partials.data, o.partials.count)),
        channels(narrow_size(o.channels)),
        stored(narrow_size(o.out.size[1])),
        negative(o.act == Activation::relu         ? 0.0f
                 : o.act == Activation::leaky_relu ? static_cast<float>(o.slope)
                                                   : 1.0f) {
    // Others would take a thousand instructions per kernel; the temporal prologue has them.
    if (o.act != Activation::none && negative == 1.0f && o.slope != 1.0)
      throw std::invalid_argument(
          "Hopper's epilogue has relu, leaky_relu, and no other activation");
    if (o.residual) residual = global<const T>(o.residual->data, o.residual->span());
  }
};

// Of every 32 columns a lane has 8, in two values each: element i is column 8·(i / 2) +
// 2·(lane % 4) + i % 2. Eight lanes have the same ones, and halve them among each other: f(level,
// i, first, second) joins to element i what the partner has of it. What is left is element 0, of
// column lane_column().
template <class F>
__device__ void halve_columns(float (&first)[8], float (&second)[8], F f) {
#pragma unroll
  for (int level = 0; level < 3; ++level) {
    const int kept = 4 >> level;
    const bool upper = threadIdx.x & (16 >> level);
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const float a = shuffle_xor(upper ? first[i] : first[i + kept], 16 >> level);
      const float b = shuffle_xor(upper ? second[i] : second[i + kept], 16 >> level);
      if (upper) first[i] = first[i + kept], second[i] = second[i + kept];
      f(level, i, a, b);
    }
  }
}

__device__ inline int lane_column() {
  const int lane = threadIdx.x % 32;
  return 8 * (lane / 8) + 2 * (lane % 4) + lane / 4 % 2;
}

// Mean and sum of squared deviations of every column, over all tiles that a warp has had.
//
// A lane keeps one column of every 32.
template <int N>
class ColumnStatistics {
  static constexpr int kBatches = (N + 31) / 32;

 public:
  __device__ void clear() {
    count_ = 0;
#pragma unroll
    for (int b = 0; b < kBatches; ++b) mean_[b] = square_[b] = 0;
  }

  // Of all blocks of a tile, whose columns are the same.
  template <int Blocks, class Rows>
  __device__ void add(const float (&values)[Blocks][N / 2], Rows rows) {
    bool there[2 * Blocks];
    float total = 0;
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
      const RowPair pair = rows(b);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        there[2 * b + half] = pair.out[half] >= 0, total += float(pair.out[half] >= 0);
    }
    // Most tiles are whole: then nothing is asked of a value.
    if (warp_all(total == 2 * Blocks))
      add_rows<Blocks, true>(values, there, total);
    else
      add_rows<Blocks, false>(values, there, total);
  }

  // Row `row` of the partials, columns from `first` on.
  template <class T>
  __device__ void write(const Epilogue<T>& e, int64_t row, int first) const {
    const Global<float> to = e.partials + row * 3 * e.channels;
#pragma unroll
    for (int b = 0; b < kBatches; ++b) {
      const int column = 32 * b + lane_column(), c = first + column;
      if (column >= N || c >= e.channels) continue;
      to[c] = count_;
      to[e.channels + c] = mean_[b];
      to[2 * e.channels + c] = square_[b];
    }
  }

 private:
  template <int Blocks, bool All>
  __device__ void add_rows(const float (&values)[Blocks][N / 2], const bool (&there)[2 * Blocks],
                           float total) {
    const float share = total > 0 ? 1 / total : 0.0f;  // of a row of this lane
    // Weights of the partner's mean and of the squared difference of the means, for each merge.
    float weight[3], product[3];
#pragma unroll
    for (int level = 0; level < 3; ++level) {
      const float other = shuffle_xor(total, 16 >> level);
      weights(total, other, weight[level], product[level]);
      total += other;
    }
    float running_weight, running_product;
    weights(count_, total, running_weight, running_product);
    count_ += total;
#pragma unroll
    for (int b = 0; b < kBatches; ++b) {
      float mean[8], square[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int j = 4 * b + i / 2;
        mean[i] = square[i] = 0;
        if (8 * j >= N) continue;
        const auto value = [&](int r) {
          return All || there[r] ? values[r / 2][4 * j + 2 * (r % 2) + i % 2] : 0.0f;
        };
        mean[i] = value(0);
#pragma unroll
        for (int r = 1; r < 2 * Blocks; ++r) mean[i] += value(r);
        mean[i] *= share;
#pragma unroll
        for (int r = 0; r < 2 * Blocks; ++r) {
          const float d = All || there[r] ? value(r) - mean[i] : 0.0f;
          square[i] += d * d;
        }
      }
      halve_columns(mean, square, [&](int level, int i, float m, float s) {
        merge(mean[i], square[i], m, s, weight[level], product[level]);
      });
      merge(mean_[b], square_[b], mean[0], square[0], running_weight, running_product);
    }
  }
  static __device__ void weights(float mine, float other, float& weight, float& product) {
    weight = other > 0 ? other / (mine + other) : 0.0f;
    product = mine * weight;
  }
  static __device__ void merge(float& mean, float& square, float other_mean, float other_square,
                               float weight, float product) {
    const float delta = other_mean - mean;
    mean += delta * weight;
    square += other_square + delta * delta * product;
  }

  float count_, mean_[kBatches], square_[kBatches];
};

// Lane q of a quad has one word of each of four 16-byte vectors; after it, all of vector q.
__device__ inline void transpose_quad(uint32_t (&words)[4]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int step = 1; step <= 2; step *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const bool upper = q & step;
      const uint32_t got = shuffle_xor(upper ? words[i] : words[i + step], step);
      if (upper)
        words[i] = got;
      else
        words[i + step] = got;
    }
}

template <class T>
__device__ uint32_t pack_pair(float a, float b) {
  return bit_cast<uint32_t>(Pack<T, 2>{{narrow<T>(a), narrow<T>(b)}});
}

// Columns from `first` on of rows of `stored` channels.
template <class T, int N>
__device__ void store_rows(Global<T> out, int stored, const float (&values)[N / 2],
                           const RowPair& rows, int first) {
  // 8 bytes of a row to each lane: a quad writes 32 neighbouring bytes, the even lanes those of
  // column group j, the odd ones of j + 1. 16 bytes to each would take twice the exchanges.
  const int q = threadIdx.x % 4, odd = q % 2, own = first + 8 * odd + 4 * (q / 2);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int left = rows.out[half] < 0 ? 0 : stored - own;  // channels to write
    const Global<T> row = out + (rows.out[half] < 0 ? 0 : rows.out[half] + own);
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {
      const int at = 4 * j + 2 * half;
      const bool both = j + 1 < N / 8;
      const uint32_t even = pack_pair<T>(values[at], values[at + 1]);
      const uint32_t other = both ? pack_pair<T>(values[at + 4], values[at + 5]) : 0;
      const uint32_t got = shuffle_xor(odd ? even : other, 1);
      const Pack<uint32_t, 2> words{{odd ? got : even, odd ? other : got}};
      if (8 * j < left && (both || !odd)) store(row + 8 * j, bit_cast<Pack<T, 4>>(words));
    }
  }
}

// f(value, column) for every value of a thread.
template <int N, int Blocks, class F>
__device__ void for_each_value(float (&values)[Blocks][N / 2], F f) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int b = 0; b < Blocks; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        f(values[b][4 * j + i], 8 * j + 2 * (static_cast<int>(threadIdx.x) % 4) + i % 2);
}

// Scales and shifts the accumulators of a tile, then counts them: what statistics are about. What
// is not always wanted is a branch around all values, not a choice for each of them. rows(b): of a
// block.
template <class T, int N, int Blocks, class Rows>
__device__ void finish_rows(const Epilogue<T>& e, float (&values)[Blocks][N / 2], Rows rows,
                            int first, ColumnStatistics<N>& statistics) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const int c = first + 8 * j + 2 * q;
    const auto scale = load<2>(e.scale + c), shift = load<2>(e.shift + c);
#pragma unroll
    for (int b = 0; b < Blocks; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        values[b][4 * j + i] = values[b][4 * j + i] * scale.lane[i % 2] + shift.lane[i % 2];
  }
  if (e.partials) statistics.add(values, rows);
  if (e.residual) {
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
      const RowPair pair = rows(b);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (pair.out[half] < 0) continue;
        const int c = first + 2 * q;
        const Global<const T> from = e.residual + pair.residual[half] + c;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
          if (c + 8 * j >= e.channels) break;
          const auto r = load<2>(from + 8 * j);
          values[b][4 * j + 2 * half] += widen(r.lane[0]);
          values[b][4 * j + 2 * half + 1] += widen(r.lane[1]);
        }
      }
    }
  }
  if (e.negative == 0)
    for_each_value<N>(values, [](float& v, int) { v = relu(v); });
  else if (e.negative != 1)
    for_each_value<N>(values, [&](float& v, int) { v = v < 0 ? v * e.negative : v; });
  // Products with zero weights, which are NaN where x is.
  if (first + N > e.channels)
    for_each_value<N>(values, [&](float& v, int column) {
      if (first + column >= e.channels) v = 0;
    });
#pragma unroll
  for (int b = 0; b < Blocks; ++b) store_rows<T, N>(e.out, e.stored, values[b], rows(b), first);
}

}  // namespace fastst
