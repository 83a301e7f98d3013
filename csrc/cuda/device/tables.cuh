// Tables of values per channel that epilogues and prologues read, from a norm's tensors.
#pragma once

#include <device/math.cuh>
#include <device/primitives.cuh>
#include <stdexcept>
#include <type_traits>

namespace fastst {

constexpr int kMaxTables = 4, kMaxRows = 5;  // of a launch, of a table

// A per-channel tensor in the dtype in which its owner keeps it.
class Channels {
 public:
  Channels() = default;
  Channels(const PerChannel& p, int64_t channels) {
    if (!p.data) return;
    with_type(p.dtype, [&](auto element) {
      using T = decltype(element);
      auto& at = [&]() -> auto& {
        if constexpr (std::is_same_v<T, __half>)
          return half_;
        else if constexpr (std::is_same_v<T, __nv_bfloat16>)
          return bfloat_;
        else if constexpr (std::is_same_v<T, float>)
          return single_;
        else
          return double_;
      }();
      at = global<const T>(p.data, channels);
    });
  }
  // Its value for a channel, or `absent` where there is no such tensor.
  template <class A>
  __device__ A read(int64_t c, A absent) const {
    if (single_) return A(single_[c]);
    if (bfloat_) return A(widen(bfloat_[c]));
    if (half_) return A(widen(half_[c]));
    if (double_) return A(double_[c]);
    return absent;
  }

 private:
  Global<const __half> half_{};
  Global<const __nv_bfloat16> bfloat_{};
  Global<const float> single_{};
  Global<const double> double_{};
};

// What is known of a channel: v = scale·(u − mean) + beta, du = scale·dv + p·(u − mean) + q.
template <class A>
struct OfChannel {
  A mean = A(0), scale = A(1), beta = A(0), bias = A(0), p = A(0), q = A(0);

  __device__ A row(Row kind) const {
    switch (kind) {
      case Row::zero:
        return A(0);
      case Row::one:
        return A(1);
      case Row::mean:
        return mean;
      case Row::scale:
        return scale;
      case Row::beta:
        return beta;
      case Row::shift:
        return beta - mean * scale;
      case Row::biased:
        return beta + (bias - mean) * scale;
      case Row::p:
        return p;
      case Row::q:
        return q;
      case Row::r:
        return q - p * mean;
    }
    return A(0);
  }
};

// A Norm as kernels see it.
template <class A>
struct NormOf {
  Channels mean, var, gamma, beta, bias;
  A eps = A(0);
  bool normalises = false;
  int64_t channels = 0;

  NormOf() = default;
  explicit NormOf(const Norm& n)
      : mean(n.mean, n.channels),
        var(n.var, n.channels),
        gamma(n.gamma, n.channels),
        beta(n.beta, n.channels),
        bias(n.bias, n.channels),
        eps(A(n.eps)),
        normalises(n.var.data != nullptr),
        channels(n.channels) {}

  __device__ OfChannel<A> read(int64_t c) const {
    if (normalises) return read(c, mean.read(c, A(0)), var.read(c, A(0)));
    OfChannel<A> found;
    found.bias = bias.read(c, A(0));
    return found;
  }
  // With statistics that are not in memory yet.
  __device__ OfChannel<A> read(int64_t c, A mean, A var) const {
    OfChannel<A> found;
    found.mean = mean, found.bias = bias.read(c, A(0));
    found.scale = gamma.read(c, A(1)) / sqrt(var + eps), found.beta = beta.read(c, A(0));
    return found;
  }
};

template <class A>
struct Tables {
  struct Each {
    NormOf<A> norm;
    Global<A> out;
    int64_t columns;
    int rows;
    Row kind[kMaxRows];
  };
  Each each[kMaxTables];
  int count = 0;

  Tables() = default;
  // Throws std::invalid_argument where there are more tables or rows than kernels have room for.
  explicit Tables(const std::vector<Table>& tables) {
    for (const Table& t : tables) {
      if (count == kMaxTables || t.rows.empty() || t.rows.size() > size_t(kMaxRows))
        throw std::invalid_argument("tables need at most 4 at a time, each of 1 to 5 rows");
      Each& one = each[count++];
      one.norm = NormOf<A>(t.norm);
      one.out = global<A>(t.out.data, t.out.count);
      one.rows = static_cast<int>(t.rows.size()), one.columns = t.out.count / one.rows;
      for (int i = 0; i < one.rows; ++i) one.kind[i] = t.rows[i];
    }
  }
  // Of the widest.
  int64_t columns() const {
    int64_t most = 0;
    for (int i = 0; i < count; ++i) most = most > each[i].columns ? most : each[i].columns;
    return most;
  }
  // Column c of all of them; found(norm): what is known of the channel.
  template <class F>
  __device__ void write(int64_t c, F found) const {
    for (int i = 0; i < count; ++i) {
      const Each& t = each[i];
      if (c >= t.columns) continue;
      OfChannel<A> channel;
      if (c < t.norm.channels) channel = found(t.norm);
      for (int r = 0; r < t.rows; ++r)
        t.out[r * t.columns + c] = c < t.norm.channels ? channel.row(t.kind[r]) : A(0);
    }
  }
};

}  // namespace fastst
