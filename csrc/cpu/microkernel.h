// The inner loop of every pass: an outer product of a few rows with a few vectors, summed over k.
#pragma once

#include <products.h>

#include <algorithm>

namespace fastst::cpu {

// A stretch of k along which both operands advance by a constant step.
struct Segment {
  int64_t a, b;   // where it starts, in elements
  int64_t count;  // of k
};

// Rows and vectors of one call: accumulators, vectors of b and one broadcast fill the registers.
constexpr int kMostVectors = Floats::kMostVectors;
constexpr int most_rows(int vectors) {
  if (kLanes == 16) return vectors == 3 ? 8 : 14;
  return vectors == 3 ? 4 : vectors == 2 ? 6 : 12;
}
constexpr int kMostRows = most_rows(1);

// c[r·ldc + w] (+)= Σ_k a[rows[r] + k·a_step] · b[k·b_step + w]   for r < R and w < V·kLanes, of
// Floats or of pairs
template <class Kind, int R, int V, bool Unit>
__attribute__((noinline)) void multiply(const float* a, const int64_t* rows, int64_t a_step,
                                        const float* b, int64_t b_step, const Segment* segments,
                                        int64_t count, float* c, int64_t ldc, bool accumulate) {
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
  const int64_t step = Unit ? 1 : a_step;
  for (int64_t i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    const float* row[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) row[r] = a + s.a + rows[r];
    const float* right = b + s.b;
    for (int64_t k = 0; k < s.count; ++k, right += b_step) {
      Vec w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = load(right + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec left = splat(row[r][k * step]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = Kind::add(sum[r][v], left, w[v]);
      }
    }
  }
  // What was there comes last: sums of sums round less than one long one.
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = c + r * ldc + v * kLanes;
      store(to, accumulate ? load(to) + sum[r][v] : sum[r][v]);
    }
}

using Multiply = void (*)(const float*, const int64_t*, int64_t, const float*, int64_t,
                          const Segment*, int64_t, float*, int64_t, bool);

template <class Kind, bool Unit, int V, int... R>
Multiply pick(int rows, std::integer_sequence<int, R...>) {
  static constexpr Multiply all[] = {multiply<Kind, R + 1, V, Unit>...};
  return all[rows - 1];
}

// The function for 1 ≤ rows ≤ most_rows(vectors); unit: a_step is 1.
template <class Kind = Floats>
Multiply multiply_for(int rows, int vectors, bool unit) {
  const auto with = [&](auto u, auto v) {
    constexpr int V = decltype(v)::value;
    return pick<Kind, decltype(u)::value, V>(rows, std::make_integer_sequence<int, most_rows(V)>{});
  };
  const auto by_vectors = [&](auto u) {
    using std::integral_constant;
    if (vectors == 3) return with(u, integral_constant<int, 3>{});
    if (vectors == 2) return with(u, integral_constant<int, 2>{});
    return with(u, integral_constant<int, 1>{});
  };
  return unit ? by_vectors(std::true_type{}) : by_vectors(std::false_type{});
}

// c[r·pitch + w] = Σ_s Σ_j a[segments[s].a + (r + j)·step + w] · b[segments[s].b + j·pitch + w] for
// r < R, j < K and w < kLanes: each channel by itself. A position is loaded once for the K taps of
// a row. Whole: all lanes of a are there, else the `last` first.
template <int R, int K, bool Whole>
__attribute__((noinline)) void multiply_channels(const float* a, int64_t step, const float* b,
                                                 int64_t pitch, const Segment* segments,
                                                 int64_t count, float* c, int64_t last) {
  Vec sum[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r] = Vec{};
  for (const Segment* s = segments; s < segments + count; ++s) {
    Vec w[K];
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) w[j] = load(b + s->b + j * pitch);
    const float* x = a + s->a;
#pragma GCC unroll 24
    for (int i = 0; i < R + K - 1; ++i) {
      const Vec v = Whole ? load(x + i * step) : load(x + i * step, last);
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j)
        if (0 <= i - j && i - j < R) sum[i - j] += v * w[j];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store(c + r * pitch, sum[r]);
}

using MultiplyChannels = void (*)(const float*, int64_t, const float*, int64_t, const Segment*,
                                  int64_t, float*, int64_t);

// Taps of a row that are taken together.
constexpr bool taken_together(int64_t taps) { return taps == 3 || taps == 5 || taps == 7; }

constexpr int kMostChannelRows = 8;

template <int K, bool Whole, int... R>
MultiplyChannels pick_channels(int rows, std::integer_sequence<int, R...>) {
  static constexpr MultiplyChannels all[] = {multiply_channels<R + 1, K, Whole>...};
  return all[rows - 1];
}

inline MultiplyChannels multiply_channels_for(int rows, int64_t taps, bool whole) {
  const auto with = [&](auto k) {
    constexpr int K = decltype(k)::value;
    constexpr std::make_integer_sequence<int, kMostChannelRows> every;
    return whole ? pick_channels<K, true>(rows, every) : pick_channels<K, false>(rows, every);
  };
  using std::integral_constant;
  if (taps == 7) return with(integral_constant<int, 7>{});
  if (taps == 5) return with(integral_constant<int, 5>{});
  if (taps == 3) return with(integral_constant<int, 3>{});
  return with(integral_constant<int, 1>{});
}

// Any number of vectors from two on as a sum of threes and twos, or of at most `most` each: width
// of the block that starts at vector `at` of `total`.
constexpr int block_vectors(int64_t at, int64_t total, int most = kMostVectors) {
  const int64_t left = total - at;
  if (left <= most) return static_cast<int>(left);
  return most == 3 && left == 4 ? 2 : most;
}

// Rows in group `at` of `total`, of at most `most` each and alike in size.
struct Groups {
  int64_t total, count;
  Groups(int64_t total, int64_t most)
      : total(total),
        count((total + most - 1) / most),
        each_(count ? total / count : 0),
        more_(total - each_ * count) {}
  int64_t start(int64_t i) const { return i * each_ + std::min(i, more_); }

 private:
  int64_t each_, more_;  // rows of a group, and how many groups have one more
};

}  // namespace fastst::cpu
