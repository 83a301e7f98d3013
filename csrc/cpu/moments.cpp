// Mean and mean square deviation of what a norm takes together: the values of a channel in a frame,
// or the channels of a position. Two sweeps over what is in the cache: nothing cancels.
#include <cpu.h>
#include <parallel.h>
#include <simd.h>
#include <storage.h>
#include <tile.h>

#include <algorithm>

namespace fastst::cpu {
namespace {

float total(Vec v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// Σ f(p, n) over what lies in memory from `data` on: `outer` times `inner` vectors of n lanes. Sums
// of sums round less than one long one.
template <class S, class F>
Vec sum(const S* data, int64_t outer, int64_t outer_step, int64_t inner, int64_t step, F f) {
  Vec all{};
  for (int64_t i = 0; i < outer; ++i, data += outer_step) {
    Vec some{};
    for (int64_t j = 0; j < inner; ++j) some += f(data + j * step, j);
    all += some;
  }
  return all;
}

// A vector of channels of a frame, neighbours in memory.
template <class S>
void channels_of_frame(const Tensor& x, int64_t h, int64_t w, int64_t n, float* mean, float* m2) {
  const auto of = [&](auto f) { return sum(x.at<const S>(0), h, x.h, w, x.w, f); };
  const float share = 1.0f / static_cast<float>(h * w);
  const Vec middle = of([&](const S* p, int64_t) { return load(p, n); }) * share;
  const Vec away = of([&](const S* p, int64_t) {
    const Vec d = load(p, n) - middle;
    return d * d;
  });
  store(mean, middle, n), store(m2, away * share, n);
}

// One channel of a frame.
template <class S>
void channel_of_frame(const Tensor& x, int64_t h, int64_t w, float* mean, float* m2) {
  const int64_t vectors = (w + kLanes - 1) / kLanes, last = w - (vectors - 1) * kLanes;
  const auto of = [&](auto f) {
    return total(sum(x.at<const S>(0), h, x.h, vectors, kLanes * x.w, [&](const S* p, int64_t j) {
      const int64_t n = j + 1 < vectors ? kLanes : last;
      return first(f(gather(p, x.w, n)), n);
    }));
  };
  const float share = 1.0f / static_cast<float>(h * w);
  const float middle = of([](Vec v) { return v; }) * share;
  *mean = middle;
  *m2 = of([&](Vec v) { return (v - middle) * (v - middle); }) * share;
}

constexpr int64_t kBlock = 32;  // channels whose values are summed before they are added to others

// Channels of n ≤ kLanes positions that are neighbours in memory.
template <class S>
void positions(const Tensor& x, int64_t channels, int64_t n, bool centred, float* mean, float* m2) {
  const auto of = [&](auto f) {
    const int64_t blocks = channels / kBlock, rest = channels % kBlock;
    const Vec whole = sum(x.at<const S>(0), blocks, kBlock * x.c, kBlock, x.c, f);
    return whole + sum(x.at<const S>(blocks * kBlock * x.c), 1, 0, rest, x.c, f);
  };
  const float share = 1.0f / static_cast<float>(channels);
  Vec middle{};
  if (centred) {
    middle = of([&](const S* p, int64_t) { return gather(p, x.w, n); }) * share;
    store(mean, middle, n);
  }
  const Vec away = of([&](const S* p, int64_t) {
    const Vec d = gather(p, x.w, n) - middle;
    return d * d;
  });
  store(m2, away * share, n);
}

// Channels of one position, neighbours in memory.
template <class S>
void position(const Tensor& at, int64_t channels, bool centred, float* mean, float* m2) {
  const S* x = at.at<const S>(0);
  Tensor row = at;
  row.w = 1;
  if (centred) return channel_of_frame<S>(row, 1, channels, mean, m2);
  Vec squares{};
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Vec v = load(x + c, std::min<int64_t>(kLanes, channels - c));
    squares += v * v;
  }
  *m2 = total(squares) / static_cast<float>(channels);
}

}  // namespace

void channel_moments(const View& v, const Array& out, int threads) {
  const Tensor x(v);
  const auto [clips, channels, frames, height, width] = v.size;
  float* const means = static_cast<float*>(out.data);
  float* const squares = means + out.count / 2;
  const int64_t c = channels, h = height, w = width, t = frames;
  with_storage(v.storage, [&](auto s) {
    using S = decltype(s);
    parallel_for(threads, clips * frames, [&](int64_t i) {
      for (int64_t k = 0; k < c; k += x.c == 1 ? kLanes : 1) {
        const Tensor part = x.from(k).shifted(x.offset(i / t, i % t, 0, 0));
        float *mean = means + i * c + k, *m2 = squares + i * c + k;
        if (x.c == 1)
          channels_of_frame<S>(part, h, w, std::min<int64_t>(kLanes, c - k), mean, m2);
        else
          channel_of_frame<S>(part, h, w, mean, m2);
      }
    });
  });
}

void position_moments(const View& v, bool centred, const Array& out, int threads) {
  const Tensor x(v);
  const auto [clips, channels, frames, height, width] = v.size;
  float* const means = static_cast<float*>(out.data);
  float* const squares = means + (centred ? out.count / 2 : 0);
  const int64_t c = channels, h = height, w = width, t = frames;
  with_storage(v.storage, [&](auto s) {
    using S = decltype(s);
    parallel_for(threads, clips * frames * height, [&](int64_t i) {
      for (int64_t k = 0; k < w; k += x.c == 1 ? 1 : kLanes) {
        const Tensor part = x.shifted(x.offset(i / (t * h), i / h % t, i % h, k));
        float *mean = means + i * w + k, *m2 = squares + i * w + k;
        if (x.c == 1)
          position<S>(part, c, centred, mean, m2);
        else
          positions<S>(part, c, std::min<int64_t>(kLanes, w - k), centred, mean, m2);
      }
    });
  });
}

}  // namespace fastst::cpu
