// Gradients of a batch norm in training, where channels are neighbours in memory: PyTorch's own
// kernel adds up such a channel position by position in float32, which costs a digit.
#include <cpu.h>
#include <parallel.h>
#include <tile.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace fastst::cpu {
namespace {

constexpr int64_t kMostPositions = 256;  // that are added up in float32
constexpr int kVectors = 4;              // of channels that are added up at once, in registers

// Lines along W, and chunks of them.
struct Lines {
  int64_t times, heights, width, count, per_chunk, chunks;

  Lines(const View& y, int threads)
      : times(y.size[2]),
        heights(y.size[3]),
        width(y.size[4]),
        count(y.size[0] * times * heights),
        per_chunk(std::clamp<int64_t>(count / (4 * threads), 1,
                                      std::max<int64_t>(1, kMostPositions / width))),
        chunks((count + per_chunk - 1) / per_chunk) {}

  // Calls body(line) for those of a chunk, with what gives a line's place in a tensor.
  template <class F>
  void each(int64_t chunk, F&& body) const {
    const int64_t end = std::min(count, (chunk + 1) * per_chunk);
    for (int64_t i = chunk * per_chunk; i < end; ++i)
      body([&, i](const Tensor& t) {
        return t.offset(i / (times * heights), i / heights % times, i % heights, 0);
      });
  }
};

const float* floats(const Array& a) { return static_cast<const float*>(a.data); }

template <class S>
void backward(const View& dv, const View& y, const Array& mean, const Array& var,
              const Array& gamma, double eps, const std::optional<View>& dy, const Array& sums,
              int threads) {
  const int64_t channels = y.size[1], padded = (channels + kLanes - 1) / kLanes * kLanes;
  const Tensor from(dv), at(y);
  const Lines lines(y, threads);
  const Scratch parts(lines.chunks * 2 * padded);
  parallel_for(threads, lines.chunks, [&](int64_t chunk) {
    float* first = parts + chunk * 2 * padded;
    for (int64_t c = 0; c < channels; c += kVectors * kLanes) {
      const int vectors =
          static_cast<int>(std::min<int64_t>(kVectors, (channels - c + kLanes - 1) / kLanes));
      Vec sum[kVectors] = {}, product[kVectors] = {}, centre[kVectors] = {};
      int64_t n[kVectors] = {};
      for (int v = 0; v < vectors; ++v) {
        n[v] = std::min<int64_t>(kLanes, channels - c - v * kLanes);
        centre[v] = load(floats(mean) + c + v * kLanes, n[v]);
      }
      lines.each(chunk, [&](const auto& place) {
        const S *g = from.at<S>(place(from)) + c, *x = at.at<S>(place(at)) + c;
        for (int64_t w = 0; w < lines.width; ++w, g += from.w, x += at.w)
          for (int v = 0; v < vectors; ++v) {
            const Vec d = load(g + v * kLanes, n[v]);
            sum[v] += d;
            product[v] += d * (load(x + v * kLanes, n[v]) - centre[v]);
          }
      });
      for (int v = 0; v < vectors; ++v) {
        store(first + c + v * kLanes, sum[v]);
        store(first + padded + c + v * kLanes, product[v]);
      }
    }
  });

  // dy = s·dv + p·(y − mean) + q
  std::vector<float> s(padded), p(padded), q(padded);
  float* dbeta = static_cast<float*>(sums.data);
  float* dgamma = dbeta + channels;
  const double positions = static_cast<double>(lines.count * lines.width);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, product = 0;
    for (int64_t i = 0; i < lines.chunks; ++i) {
      sum += parts[i * 2 * padded + c];
      product += parts[(i * 2 + 1) * padded + c];
    }
    const double scale = 1 / std::sqrt(floats(var)[c] + eps);
    const double weight = gamma.count ? floats(gamma)[c] : 1.0;
    dbeta[c] = static_cast<float>(sum);
    dgamma[c] = static_cast<float>(product * scale);
    s[c] = static_cast<float>(weight * scale);
    p[c] = static_cast<float>(-weight * scale * scale * scale * product / positions);
    q[c] = static_cast<float>(-weight * scale * sum / positions);
  }
  if (!dy) return;
  const Tensor to(*dy);
  parallel_for(threads, lines.chunks, [&](int64_t chunk) {
    lines.each(chunk, [&](const auto& place) {
      const S *g = from.at<S>(place(from)), *x = at.at<S>(place(at));
      S* out = to.at<S>(place(to));
      for (int64_t w = 0; w < lines.width; ++w, g += from.w, x += at.w, out += to.w)
        for (int64_t c = 0; c < channels; c += kLanes) {
          const int64_t n = std::min<int64_t>(kLanes, channels - c);
          const Vec centred = load(x + c, n) - load(floats(mean) + c, n);
          store(out + c, load(&s[c]) * load(g + c, n) + load(&p[c]) * centred + load(&q[c]), n);
        }
    });
  });
}

}  // namespace

void batch_norm_backward(const View& dv, const View& y, const Array& mean, const Array& var,
                         const Array& gamma, double eps, const std::optional<View>& dy,
                         const Array& sums, int threads) {
  with_storage(y.storage, [&](auto s) {
    backward<decltype(s)>(dv, y, mean, var, gamma, eps, dy, sums, threads);
  });
}

void update_running(const Array& running_mean, const Array& running_var, const Array& mean,
                    const Array& var, double unbiased, double momentum) {
  const auto update = [&](const Array& to, const Array& from, double factor) {
    float* running = static_cast<float*>(to.data);
    for (int64_t i = 0; i < to.count; ++i) {
      const double old = running[i];
      running[i] = static_cast<float>(old + momentum * (factor * floats(from)[i] - old));
    }
  };
  update(running_mean, mean, 1.0);
  update(running_var, var, unbiased);
}

}  // namespace fastst::cpu
