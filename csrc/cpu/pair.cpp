// A pair at inference, in one call. The mid tensor of a stem is large and its weights are small: it
// is made and used strip by strip, in the second-level cache, and is never whole.
#include <cpu.h>
#include <parallel.h>
#include <simd.h>

#include <algorithm>

namespace fastst::cpu {
namespace {

// Floats of weights that are packed again for every strip.
constexpr int64_t kFewWeights = 32 << 10;

View part(View v, int dimension, int64_t begin, int64_t end) {
  v.data = static_cast<float*>(v.data) + begin * v.stride[dimension];
  v.size[dimension] = end - begin;
  return v;
}

// Whether output i along the axis becomes of position i alone.
bool idle(const Conv& c, int axis) {
  return c.kernel[axis] == 1 && c.stride[axis] == 1 && c.padding[2 * axis] == 0 &&
         c.padding[2 * axis + 1] == 0;
}

// Both passes of some clips and, along an axis, of some frames or rows of y.
struct Strips {
  const Pair& p;
  Epilogue between;
  Sums sums;
  int axis;  // of t, h, w

  void operator()(int64_t clip, int64_t end_clip, int64_t begin, int64_t end, bool large,
                  int threads) const {
    auto [n, t, h, w, pitch] = p.mid_shape;
    (axis == 0 ? t : h) = end - begin;
    const Scratch memory((end_clip - clip) * t * h * w * pitch);
    View mid = {memory.data(),
                {end_clip - clip, pitch, t, h, w},
                {t * h * w * pitch, 1, h * w * pitch, w * pitch, pitch}};
    Conv conv = p.first.conv;
    conv.padding[2 * axis] -= begin * conv.stride[axis];
    const auto plain = [](const View& v) {
      return Source{v, {}, {}, Read::plain, Activation::none, 0.0};
    };
    tap_conv(plain(part(p.x, 0, clip, end_clip)), p.first.weight, conv, mid, between, sums,
             threads);
    mid.size[1] = p.first.weight.size[0];
    const auto cut = [&](const View& v) {
      return part(part(v, 0, clip, end_clip), 2 + axis, begin, end);
    };
    Epilogue last = {Write::forward, p.second.bias, {}, Activation::none, p.outer, p.slope, {}, {},
                     large};
    if (p.residual) last.aux = cut(*p.residual);
    tap_conv(plain(mid), p.second.weight, p.second.conv, cut(p.out), last, sums, threads);
  }
};

}  // namespace

int64_t pair(const Pair& p, Sums sums, int threads) {
  const auto [n, frames, height, width, pitch] = p.mid_shape;
  const int64_t m = p.first.weight.size[0], floats = n * frames * height * width * pitch;
  const Scratch memory(5 * m);
  Array norm;
  if (p.mean.count) {
    norm = {memory.data(), 5 * m};
    norm_coefficients(p.mean, p.var, p.gamma, p.beta, p.eps, norm);
  }
  const Epilogue between = {Write::forward,   p.first.bias, norm, p.act,
                            Activation::none, p.slope,      {},   {}};
  // No row or no frame of y is made of another one of the mid tensor.
  const int axis = idle(p.second.conv, 1) ? 1 : 0;
  const Strips strips = {p, between, sums, axis};
  const int64_t size = p.mid_shape[1 + axis];
  const int64_t one = floats / std::max<int64_t>(1, n * size);
  const int64_t weights = p.first.weight.count() + p.second.weight.count();
  if (floats <= p.large || one > p.strip || weights > kFewWeights || !idle(p.second.conv, axis)) {
    strips(0, n, 0, size, false, threads);
    return 1;
  }
  const int64_t most = p.strip / one, count = (size + most - 1) / most;
  parallel_for(threads, n * count, [&](int64_t i) {
    const int64_t j = i % count;
    strips(i / count, i / count + 1, size * j / count, size * (j + 1) / count,
           p.out.count() > p.large, 1);
    _mm_sfence();  // what was stored past the caches
  });
  return n * count;
}

}  // namespace fastst::cpu
