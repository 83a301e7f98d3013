// What is done to the sums of a few positions and vectors of channels before they are stored.
#pragma once

#include <activation.h>
#include <cpu.h>
#include <microkernel.h>
#include <tile.h>

namespace fastst::cpu {

// Positions that are finished together, and where they lie in a tensor.
constexpr int kMostPlaces = 32;
static_assert(kMostPlaces >= 2 * kMostRows && kMostPlaces * 4 >= kLine);
// Of rows that are multiplied `rows` at a time, how many are finished together. With AVX2 four are
// too few for what finishing them takes at least, and for a transposition.
constexpr int64_t finished_rows(int64_t rows) {
  return kLanes == 16 ? rows : kMostPlaces / rows * rows;
}
struct Places {
  const int64_t* offset;
  int count;

  // How many from r on, at most kLanes, are neighbours: each one element after the one before it.
  int run(int r) const {
    int n = 1;
    while (n < kLanes && r + n < count && offset[r + n] == offset[r] + n) ++n;
    return n;
  }
};

// Reductions of one tile and vector of channels: mean and squared deviations of Σ + bias, or the
// two sums of a norm_gradient.
struct Partial {
  float *first, *second;
};

class Finisher {
 public:
  Finisher(const Epilogue& e, Activation outer, const Tensor& out, const Tensor& aux,
           int64_t channels, int64_t stored, const float* bias, const Norm& norm)
      : write_(e.write),
        act_(e.act),
        outer_(outer),
        slope_(static_cast<float>(e.slope)),
        large_(e.large),
        lines_(has_lines(out, stored)),
        out_(out),
        aux_(aux),
        channels_(channels),
        stored_(stored),
        bias_(bias),
        norm_(norm) {}

  // Says that some vectors of channels will be read from `aux` and stored to these places. Of
  // neighbours each line once: where the last one is not whole, it is the first of the next place.
  void expect(int64_t channel, int vectors, const Places& to, const Places& aux) const {
    if (aux_.data && aux_.c == 1) {
      const std::byte* const from = aux_.data + channel * bytes_of(aux_.storage);
      const int64_t bytes =
          std::min<int64_t>(vectors * kLanes, channels_ - channel) * bytes_of(aux_.storage);
      for (int r = 0; r < aux.count; ++r) {
        const std::byte* at = from + aux.offset[r] * bytes_of(aux_.storage);
        for (int64_t b = 0; b < bytes; b += kLine) prefetch(at + b);
      }
    }
    if (large_ && (lines_ || out_.c != 1)) return;
    const int64_t each = bytes_of(out_.storage);
    const std::byte* const base = out_.data + channel * out_.c * each;
    const int64_t wide = std::min<int64_t>(vectors * kLanes, stored_ - channel);
    if (out_.c == 1) {
      for (int r = 0; r < to.count; ++r) {
        const std::byte* at = base + to.offset[r] * each;
        for (int64_t b = 0; b < wide * each; b += kLine) prefetch_to_write(at + b);
      }
      return;
    }
    const std::byte* const last = base + to.offset[to.count - 1] * each;
    for (int64_t i = 0; i < wide; ++i) prefetch_to_write(last + i * out_.c * each);
  }

  // sums (places.count, pitch) of one vector of channels that starts at `channel`. Channels that
  // are stored beyond those that are computed become zeros, whatever the sums are.
  void operator()(const float* sums, int64_t pitch, int64_t channel, const Places& to,
                  const Places& aux, const Partial* partial, int64_t before) const {
    const int64_t n = std::min<int64_t>(kLanes, channels_ - channel);
    const bool forward = write_ == Write::forward, rows_apart = out_.c == 1;
    const int rows = to.count;
    const Channels k(*this, channel, n);
    Vec x[kMostPlaces], beside[kMostPlaces];
    if (aux_.data) fetch(beside, channel, n, aux);
    if (forward && partial) {
      for (int r = 0; r < rows; ++r) x[r] = load(sums + r * pitch) + k.bias;
      statistics(x, rows, *partial, before);
    }
    with_stored([&](auto s) {
      using S = decltype(s);
      S* const base = out_.at<S>(channel * out_.c);
      const int64_t wide = std::min<int64_t>(kLanes, stored_ - channel);
      const auto some = [&](int from, auto many) __attribute__((always_inline)) {
        constexpr int R = decltype(many)::value;
        Vec v[R], other[R] = {};
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) v[i] = load(sums + (from + i) * pitch);
        if (aux_.data)
#pragma GCC unroll 8
          for (int i = 0; i < R; ++i) other[i] = beside[from + i];
        if (forward)
          finish(v, other, k);
        else
          gradient(v, other, k, partial);
        if (n < kLanes)
#pragma GCC unroll 8
          for (int i = 0; i < R; ++i) v[i] = first(v[i], n);
        const int64_t* offset = to.offset + from;
        if (!rows_apart)
#pragma GCC unroll 8
          for (int i = 0; i < R; ++i) x[from + i] = v[i];
        else if (large_ && lines_)
#pragma GCC unroll 8
          for (int i = 0; i < R; ++i) past(base + offset[i], v[i]);
        else if (wide == kLanes)
#pragma GCC unroll 8
          for (int i = 0; i < R; ++i) store(base + offset[i], v[i]);
        else
#pragma GCC unroll 8
          for (int i = 0; i < R; ++i) store(base + offset[i], v[i], wide);
      };
      int from = 0;
      for (; from + kBlock <= rows; from += kBlock)
        some(from, std::integral_constant<int, kBlock>{});
      for (; from + 2 <= rows; from += 2) some(from, std::integral_constant<int, 2>{});
      if (from < rows) some(from, std::integral_constant<int, 1>{});
      if (!rows_apart) put(base, x, wide, to);
      if (channel + kLanes < channels_) return;
      for (int64_t c = kLanes; c < stored_ - channel; c += kLanes)  // vectors without a channel
        for (int r = 0; r < rows; ++r)
          scatter(base + c * out_.c + to.offset[r], out_.c, Vec{},
                  std::min<int64_t>(kLanes, stored_ - channel - c));
    });
  }

 private:
  static constexpr int kBlock = kLanes == 16 ? 8 : 4;  // rows that are finished in registers

  static bool has_lines(const Tensor& out, int64_t stored) {
    const auto whole = [](auto... floats) { return ((floats % (kLine / 4) == 0) && ...); };
    return out.storage == Storage::f32 && out.c == 1 && whole(stored, out.n, out.t, out.h, out.w) &&
           reinterpret_cast<uintptr_t>(out.data) % kLine == 0;
  }

  template <class F>
  void with_stored(F&& f) const {
    if (out_.storage == Storage::bf16 && rounds_) return f(RoundedBFloat16{});
    with_storage(out_.storage, f);
  }

  // What is done to a vector of channels.
  struct Channels {
    Vec bias{}, mean{}, scale = splat(1.0f), beta{};

    Channels(const Finisher& f, int64_t channel, int64_t n) {
      if (f.bias_) bias = load(f.bias_ + channel, n);
      if (!f.norm_.data) return;
      mean = load(f.norm_.mean() + channel, n), scale = load(f.norm_.scale() + channel, n);
      beta = load(f.norm_.beta() + channel, n);
    }
  };

  template <int R>
  [[gnu::always_inline]] void finish(Vec (&v)[R], const Vec (&residual)[R],
                                     const Channels& k) const {
    if (bias_)
#pragma GCC unroll 8
      for (Vec& x : v) x += k.bias;
    if (norm_.data)
#pragma GCC unroll 8
      for (Vec& x : v) x = (x - k.mean) * k.scale + k.beta;
    activate_all(act_, v);
    if (aux_.data)
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) v[i] += residual[i];
    activate_all(outer_, v);
  }

  template <int R>
  [[gnu::always_inline]] void activate_all(Activation act, Vec (&v)[R]) const {
    if (act == Activation::none) return;
    if (act == Activation::relu) {  // in registers, where a choice of all would pass them in memory
#pragma GCC unroll 8
      for (Vec& x : v) x = activate<Activation::relu>(x, slope_);
      return;
    }
    with_activation(act, [&](auto k) __attribute__((always_inline)) {
      for (Vec& x : v) x = activate<decltype(k)::value>(x, slope_);
    });
  }

  template <int R>
  [[gnu::always_inline]] void gradient(Vec (&v)[R], Vec (&u)[R], const Channels& k,
                                       const Partial* partial) const {
#pragma GCC unroll 8
    for (Vec& x : u) x -= k.mean;
    with_activation(act_, [&](auto a) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i)
        v[i] = activate_gradient<decltype(a)::value>(v[i], u[i] * k.scale + k.beta, slope_);
    });
    if (!partial) return;
    Vec sum{}, product{};
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sum += v[i], product += v[i] * u[i];
    store(partial->first, load(partial->first) + sum);
    store(partial->second, load(partial->second) + product);
  }

  // Joins the mean and the squared deviations of these rows to those of the `before` rows so far.
  // The mean takes what deviates from it once more: of values that are all alike it is that value,
  // and none of them deviates.
  static void statistics(const Vec* x, int rows, const Partial& p, int64_t before) {
    const float one = 1.0f / static_cast<float>(rows);
    Vec mean{}, away{}, m2{};
    for (int r = 0; r < rows; ++r) mean += x[r];
    mean *= one;
    for (int r = 0; r < rows; ++r) away += x[r] - mean;
    mean += away * one;
    for (int r = 0; r < rows; ++r) m2 += (x[r] - mean) * (x[r] - mean);
    if (before) {
      const float share = static_cast<float>(rows) / static_cast<float>(before + rows);
      const Vec old = load(p.first), delta = mean - old;
      mean = old + delta * share;
      m2 += load(p.second) + delta * delta * (share * static_cast<float>(before));
    }
    store(p.first, mean), store(p.second, m2);
  }

  void fetch(Vec* x, int64_t channel, int64_t n, const Places& from) const {
    with_storage(aux_.storage, [&](auto s) { fetch<decltype(s)>(x, channel, n, from); });
  }

  template <class S>
  void fetch(Vec* x, int64_t channel, int64_t n, const Places& from) const {
    const S* base = aux_.at<S>(channel * aux_.c);
    for (int r = 0, width; r < from.count; r += width) {
      width = aux_.c == 1 ? 1 : from.run(r);
      if (width == 1) {
        x[r] = gather(base + from.offset[r], aux_.c, n);
        continue;
      }
      Vec rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        rows[i] = i < n ? load(base + i * aux_.c + from.offset[r], width) : Vec{};
      transpose(rows);
      for (int j = 0; j < width; ++j) x[r + j] = rows[j];
    }
  }

  // Where channels are not neighbours.
  template <class S>
  void put(S* base, const Vec* x, int64_t wide, const Places& to) const {
    for (int r = 0, width; r < to.count; r += width) {
      width = to.run(r);
      if (width == 1) {
        scatter(base + to.offset[r], out_.c, x[r], wide);
        continue;
      }
      Vec rows[kLanes];
      for (int j = 0; j < kLanes; ++j) rows[j] = j < width ? x[r + j] : Vec{};
      transpose(rows);
      for (int64_t i = 0; i < wide; ++i) {
        S* p = base + i * out_.c + to.offset[r];
        if (width < kLanes)
          store(p, rows[i], width);
        else if (large_ && reinterpret_cast<uintptr_t>(p) % sizeof(Vec) == 0)
          past(p, rows[i]);
        else
          store(p, rows[i]);
      }
    }
  }

  // Past the caches, where a vector fills lines.
  template <class S>
  static void past(S* p, Vec v) {
    if constexpr (std::is_same_v<S, float>)
      stream(p, v);
    else
      store(p, v);
  }

  Write write_;
  Activation act_, outer_;
  float slope_;
  bool large_;
  bool lines_;  // channels of a position fill whole lines: others go through the caches
  const bool rounds_ = multiplies_pairs();  // by an instruction
  Tensor out_, aux_;
  int64_t channels_, stored_;
  const float* bias_;
  Norm norm_;
};

}  // namespace fastst::cpu
