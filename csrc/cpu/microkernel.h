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
constexpr Multiply pick(int rows, std::integer_sequence<int, R...>) {
  constexpr Multiply all[] = {multiply<Kind, R + 1, V, Unit>...};
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

// c[r·V·kLanes + w] = Σ_s a[rows[r] + segments[s].a + w] · b[segments[s].b + w]   for w < V·kLanes:
// each channel by itself. Of the last vector only `last` lanes of a are there.
template <int V>
__attribute__((noinline)) void multiply_channels(const float* a, const int64_t* rows, int count,
                                                 const float* b, const Segment* segments,
                                                 int64_t taps, float* c, int64_t last) {
  constexpr int kRows = 4;
  const auto block = [&](auto r_, auto whole) {
    constexpr int R = decltype(r_)::value;
    Vec sum[R][V];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
    for (const Segment* s = segments; s < segments + taps; ++s) {
      Vec w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = load(b + s->b + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const float* x = a + rows[r] + s->a;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const float* p = x + v * kLanes;
          sum[r][v] += (whole || v + 1 < V ? load(p) : load(p, last)) * w[v];
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(c + (r * V + v) * kLanes, sum[r][v]);
    rows += R, c += R * V * kLanes, count -= R;
  };
  const auto all = [&](auto whole) {
    while (count >= kRows) block(std::integral_constant<int, kRows>{}, whole);
    while (count > 0) block(std::integral_constant<int, 1>{}, whole);
  };
  last == kLanes ? all(std::true_type{}) : all(std::false_type{});
}

using MultiplyChannels = void (*)(const float*, const int64_t*, int, const float*, const Segment*,
                                  int64_t, float*, int64_t);

inline MultiplyChannels multiply_channels_for(int vectors) {
  return vectors == 3   ? multiply_channels<3>
         : vectors == 2 ? multiply_channels<2>
                        : multiply_channels<1>;
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
