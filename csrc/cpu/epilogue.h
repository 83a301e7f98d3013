// What is done to the sums of a few positions and vectors of channels before they are stored.
#pragma once

#include <activation.h>
#include <cpu.h>
#include <microkernel.h>
#include <tile.h>

namespace fastst::cpu {

// Positions that are finished together, and where they lie in a tensor.
constexpr int kMostPlaces = 32;
static_assert(kMostPlaces >= 2 * kMostRows && kMostPlaces * 2 >= kLine);
struct Places {
  int64_t offset[kMostPlaces];
  int count = 0;

  void add(int64_t at) { offset[count++] = at; }
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
        out_(out),
        aux_(aux),
        channels_(channels),
        stored_(stored),
        bias_(bias),
        norm_(norm) {}

  // Says that a vector of channels will be stored to these places.
  void expect(int64_t channel, const Places& to) const {
    if (large_) return;
    const Tensor base = out_.from(channel);
    const auto place = [&](int64_t at) { return base.shifted(at).data; };
    if (out_.c == 1) {
      for (int r = 0; r < to.count; ++r) prefetch_to_write(place(to.offset[r]));
      return;
    }
    const int64_t wide = std::min<int64_t>(kLanes, stored_ - channel);
    const int64_t last = to.offset[to.count - 1];
    for (int64_t i = 0; i < wide; ++i) prefetch_to_write(place(i * out_.c + last));
  }

  // sums (places.count, pitch) of one vector of channels that starts at `channel`. Channels that
  // are stored beyond those that are computed become zeros, whatever the sums are.
  void operator()(const float* sums, int64_t pitch, int64_t channel, const Places& to,
                  const Places& aux, const Partial* partial, int64_t before) const {
    const int64_t n = std::min<int64_t>(kLanes, channels_ - channel);
    Vec x[kMostPlaces];
    const int rows = to.count;
    for (int r = 0; r < rows; ++r) x[r] = load(sums + r * pitch);
    if (write_ == Write::norm_gradient) {
      gradient(x, rows, channel, n, aux, partial);
    } else {
      if (bias_) {
        const Vec b = load(bias_ + channel, n);
        for (int r = 0; r < rows; ++r) x[r] += b;
      }
      if (partial) statistics(x, rows, *partial, before);
      if (norm_.data) {
        const Vec mean = load(norm_.mean() + channel, n), scale = load(norm_.scale() + channel, n);
        const Vec beta = load(norm_.beta() + channel, n);
        for (int r = 0; r < rows; ++r) x[r] = (x[r] - mean) * scale + beta;
      }
      activate_all(act_, x, rows);
      if (aux_.data) {
        Vec residual[kMostPlaces];
        fetch(residual, channel, n, aux);
        for (int r = 0; r < rows; ++r) x[r] += residual[r];
      }
      activate_all(outer_, x, rows);
    }
    with_storage(out_.storage, [&](auto s) { put<decltype(s)>(x, channel, n, to); });
  }

 private:
  void activate_all(Activation act, Vec* x, int rows) const {
    if (act == Activation::none) return;
    with_activation(act, [&](auto k) {
      for (int r = 0; r < rows; ++r) x[r] = activate<decltype(k)::value>(x[r], slope_);
    });
  }

  void gradient(Vec* x, int rows, int64_t channel, int64_t n, const Places& aux,
                const Partial* partial) const {
    Vec u[kMostPlaces];
    fetch(u, channel, n, aux);
    Vec mean{}, scale = splat(1.0f), beta{};
    if (norm_.data) {
      mean = load(norm_.mean() + channel, n), scale = load(norm_.scale() + channel, n);
      beta = load(norm_.beta() + channel, n);
    }
    for (int r = 0; r < rows; ++r) u[r] -= mean;
    with_activation(act_, [&](auto k) {
      for (int r = 0; r < rows; ++r)
        x[r] *= activate_gradient<decltype(k)::value>(u[r] * scale + beta, slope_);
    });
    if (!partial) return;
    Vec sum{}, product{};
    for (int r = 0; r < rows; ++r) sum += x[r], product += x[r] * u[r];
    store(partial->first, load(partial->first) + sum);
    store(partial->second, load(partial->second) + product);
  }

  // Joins the mean and the squared deviations of these rows to those of the `before` rows so far.
  static void statistics(const Vec* x, int rows, const Partial& p, int64_t before) {
    Vec mean{}, m2{};
    for (int r = 0; r < rows; ++r) mean += x[r];
    mean *= 1.0f / static_cast<float>(rows);
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

  template <class S>
  void put(const Vec* x, int64_t channel, int64_t n, const Places& to) const {
    const int64_t wide = std::min<int64_t>(kLanes, stored_ - channel);
    S* base = out_.at<S>(channel * out_.c);
    if (out_.c == 1) {
      for (int r = 0; r < to.count; ++r) {
        S* p = base + to.offset[r];
        if (wide == kLanes)
          whole(p, n == kLanes ? x[r] : first(x[r], n));
        else
          store(p, first(x[r], n), wide);
      }
      return;
    }
    for (int r = 0, width; r < to.count; r += width) {
      width = to.run(r);
      if (width == 1) {
        scatter(base + to.offset[r], out_.c, first(x[r], n), wide);
        continue;
      }
      Vec rows[kLanes];
      for (int j = 0; j < kLanes; ++j) rows[j] = j < width ? first(x[r + j], n) : Vec{};
      transpose(rows);
      for (int64_t i = 0; i < wide; ++i) {
        S* p = base + i * out_.c + to.offset[r];
        if (width == kLanes)
          whole(p, rows[i]);
        else
          store(p, rows[i], width);
      }
    }
  }

  template <class S>
  void whole(S* p, Vec v) const {
    if (large_ && reinterpret_cast<uintptr_t>(p) % (kLanes * sizeof(S)) == 0)
      stream(p, v);
    else
      store(p, v);
  }

  Write write_;
  Activation act_, outer_;
  float slope_;
  bool large_;
  Tensor out_, aux_;
  int64_t channels_, stored_;
  const float* bias_;
  Norm norm_;
};

}  // namespace fastst::cpu
