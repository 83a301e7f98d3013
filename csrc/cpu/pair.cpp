// A pair in one call: at inference, in training, and its gradients. At inference, the mid tensor of
// a stem is large and its weights are small: it is made and used strip by strip, in the
// second-level cache, and is never whole. Backward makes one tensor between dy and the results,
//    dv = (Wtᵀ ∗ dy) · act'(s·u + h)         and Σdv, Σdv·(u − mean) as it is stored
//    du = s·dv + p·(u − mean) + q            as it is loaded, for dWs and dx
//    z  = act(s·u + h)                       as it is loaded, for dWt
#include <amx.h>
#include <coefficients.h>
#include <tiling.h>

#include <algorithm>

namespace fastst::cpu {
namespace {

// Floats of weights that are packed again for every strip.
constexpr int64_t kFewWeights = 32 << 10;
// Where AMX multiplies, moving the mid tensor counts more: how much larger a strip may be (of 16
// bits, in a cache of 2 MiB), and all of them than the weights that are packed for each.
constexpr int64_t kAmxStrip = 3, kAmxWeights = 4;

View part(View v, int dimension, int64_t begin, int64_t end) {
  v.data = Tensor(v).shifted(begin * v.stride[dimension]).data;
  v.size[dimension] = end - begin;
  return v;
}

// Memory like u as a tensor: channels last.
View rows(void* memory, const std::array<int64_t, 5>& shape, Storage storage) {
  const auto [n, t, h, w, m] = shape;
  return {{memory, {n, m, t, h, w}, {t * h * w * m, 1, h * w * m, w * m, m}}, storage};
}

Source plain(const View& v) { return {v, {}, {}, Read::plain, Activation::none, 0.0}; }

// z, as it is read from u.
Source between(const PairPlan& p, const PairTensors& t, void* u, const Array& norm) {
  View from = rows(u, p.mid_shape, t.x.storage);
  from.size[1] = t.mid_channels();
  if (!norm.count && p.act == Activation::none) return plain(from);
  return {from, {}, norm, Read::norm_act, p.act, p.slope};
}

// What the first and the second convolution store.
Epilogue beginning(const PairPlan& p, const PairTensors& t, const Array& norm, Activation act) {
  return {Write::forward, t.bias[0], norm, act, Activation::none, p.slope, {}, {}};
}
Epilogue ending(const PairPlan& p, const PairTensors& t) {
  return {Write::forward, t.bias[1], t.outer_table, Activation::none,
          p.outer,        p.slope,   t.residual,    {}};
}

// One of the two convolutions in training, and statistics of what it stores.
void run(const PairPlan& p, const PairTensors& t, int which, const Source& from, const View& out,
         Epilogue e, const Statistics& statistics, int threads) {
  const int64_t channels = statistics.mean.count;
  const Scratch both(2 * channels);
  if (channels) e.reductions = {both.data(), 2 * channels};
  tap_conv(from, t.weight[which], p.conv[which], out, e, in_training(p.sums), threads);
  if (!channels) return;
  std::copy_n(both.data(), channels, static_cast<float*>(statistics.mean.data));
  std::copy_n(both + channels, channels, static_cast<float*>(statistics.var.data));
}

// Gradients of what is per channel, from the sums of dv and of dv·(u − mean); p and q of du.
void finish(const PairPlan& plan, const Coefficients& norm, const PairKept& kept, const float* sums,
            int64_t m, const PairGradients& gradients) {
  const auto set = [](const Array& a, int64_t i, double v) {
    if (a.count) static_cast<float*>(a.data)[i] = static_cast<float>(v);
  };
  const float* means = static_cast<const float*>(kept.means.data);
  const double count = static_cast<double>(plan.positions());
  for (int64_t i = 0; i < m; ++i) {
    const double sum = sums[i], product = sums[m + i];
    set(gradients.beta, i, sum);
    if (!norm.array().count) {
      set(gradients.bias, i, sum);
      continue;
    }
    const double var = static_cast<const float*>(kept.norm.var.data)[i] + plan.eps;
    const double scale = norm.row(1)[i];
    set(gradients.gamma, i, product / std::sqrt(var));
    double q = 0;
    if (plan.norm == PairNorm::batch) {
      q = -scale * (means ? means[i] : sum / count);
      norm.row(3)[i] = static_cast<float>(-scale / var * (means ? means[m + i] : product / count));
      norm.row(4)[i] = static_cast<float>(q);
    }
    set(gradients.bias, i, scale * sum + count * q);
  }
}

// Whether output i along the axis becomes of position i alone.
bool idle(const Conv& c, int axis) {
  return c.kernel[axis] == 1 && c.stride[axis] == 1 && c.padding[2 * axis] == 0 &&
         c.padding[2 * axis + 1] == 0;
}

// Both passes of some clips and, along an axis, of some frames or rows of y.
struct Strips {
  const PairPlan& p;
  const PairTensors& t;
  const View& out;
  Epilogue between;
  int axis;          // of t, h, w
  int64_t channels;  // of the mid tensor, rounded up

  void operator()(int64_t clip, int64_t end_clip, int64_t begin, int64_t end, bool large,
                  int threads) const {
    std::array<int64_t, 5> shape = p.mid_shape;
    shape[0] = end_clip - clip, shape[1 + axis] = end - begin, shape[4] = channels;
    const int64_t elements = shape[0] * shape[1] * shape[2] * shape[3] * shape[4];
    const Scratch memory(elements * bytes_of(t.x.storage) / bytes_of(Storage::f32));
    View mid = rows(memory, shape, t.x.storage);
    Conv conv = p.conv[0];
    conv.padding[2 * axis] -= begin * conv.stride[axis];
    tap_conv(plain(part(t.x, 0, clip, end_clip)), t.weight[0], conv, mid, between, p.sums, threads);
    const auto cut = [&](const View& v) {
      return part(part(v, 0, clip, end_clip), 2 + axis, begin, end);
    };
    Epilogue last = ending(p, t);
    last.large = large;
    if (t.residual) last.aux = cut(*t.residual);
    tap_conv(plain(mid), t.weight[1], p.conv[1], cut(out), last, p.sums, threads);
  }
};

}  // namespace

int64_t pair(const PairPlan& p, const PairTensors& t, const View& out, int threads) {
  const Coefficients norm(t.mean, t.var, t.gamma, t.beta, p.eps);
  // No row or no frame of y is made of another one of the mid tensor.
  const int axis = idle(p.conv[1], 1) ? 1 : 0;
  const bool amx = t.x.storage == Storage::bf16 && by_amx(p.sums);
  // AMX reads whole stretches of channels where they are.
  const int64_t wide = AmxPairs::kChannels * units<AmxPairs>(t.mid_channels());
  const int64_t channels = amx ? wide : p.mid_shape[4];
  const Strips strips = {p, t, out, beginning(p, t, norm.array(), p.act), axis, channels};
  const int64_t n = p.mid_shape[0], size = p.mid_shape[1 + axis];
  const int64_t floats = p.positions() * channels, one = floats / std::max<int64_t>(1, n * size);
  const int64_t weights = t.weight[0].count() + t.weight[1].count();
  const int64_t strip = amx ? kAmxStrip * p.strip : p.strip;
  const int64_t most = one ? strip / one : 0, count = most ? parts_of(size, most) : 1;
  const bool few = weights <= kFewWeights || (amx && weights * count * kAmxWeights <= floats);
  if (floats <= p.large || !most || !few || !idle(p.conv[1], axis)) {
    strips(0, n, 0, size, false, threads);
    return 1;
  }
  // A vector that fills half of a line, as with AVX2 or of 16 bits, stays in the caches: lines go
  // past them as a whole.
  const bool fills = kLanes * bytes_of(out.storage) == kLine;
  const bool large = out.count() > p.large && fills;
  parallel_for(threads, n * count, [&](int64_t i) {
    const int64_t j = i % count;
    strips(i / count, i / count + 1, size * j / count, size * (j + 1) / count, large, 1);
    _mm_sfence();  // what was stored past the caches
  });
  return n * count;
}

void pair_first(const PairPlan& p, const PairTensors& t, void* u, const Statistics& statistics,
                int threads) {
  const View out = rows(u, p.mid_shape, t.x.storage);
  run(p, t, 0, plain(t.x), out, beginning(p, t, {}, Activation::none), statistics, threads);
}

void pair_second(const PairPlan& p, const PairTensors& t, void* u, const Statistics& of_u,
                 const View& out, const Statistics& statistics, int threads) {
  const Coefficients norm(of_u.mean, of_u.var, t.gamma, t.beta, p.eps);
  run(p, t, 1, between(p, t, u, norm.array()), out, ending(p, t), statistics, threads);
}

void pair_training(const PairPlan& p, const PairTensors& t, void* mid, bool kept,
                   const Statistics& statistics, const View& out, const Statistics& out_statistics,
                   int threads) {
  const bool batch = p.norm == PairNorm::batch;
  if (kept || batch) {
    pair_first(p, t, mid, statistics, threads);
    pair_second(p, t, mid, batch ? statistics : Statistics{t.mean, t.var}, out, out_statistics,
                threads);
    return;
  }
  // z takes the place of u.
  const Coefficients norm(t.mean, t.var, t.gamma, t.beta, p.eps);
  View z = rows(mid, p.mid_shape, t.x.storage);
  run(p, t, 0, plain(t.x), z, beginning(p, t, norm.array(), p.act), {}, threads);
  run(p, t, 1, plain(z), out, ending(p, t), out_statistics, threads);
}

void pair_backward(const PairPlan& p, const PairTensors& t, const View& dy, const PairKept& kept,
                   const PairGradients& gradients, const std::function<void()>& dy_read,
                   const std::function<View()>& make_dx, int threads) {
  if (kept.again) pair_first(p, t, kept.u, {}, threads);
  const int64_t m = t.mid_channels();
  const Coefficients norm(kept.norm.mean, kept.norm.var, t.gamma, t.beta, p.eps);
  View u = rows(kept.u, p.mid_shape, t.x.storage), dv = rows(kept.dv, p.mid_shape, t.x.storage);
  u.size[1] = m;
  if (gradients.weight[1])
    weight_gradient(between(p, t, kept.u, norm.array()), plain(dy), p.conv[1], *gradients.weight[1],
                    p.sums, threads);
  const bool sums = gradients.bias.count || gradients.gamma.count || gradients.beta.count;
  if (!make_dx && !gradients.weight[0] && !sums) return;
  const Scratch table(2 * m);
  input_gradient(plain(dy), t.weight[1], p.conv[1], dv,
                 {Write::norm_gradient,
                  {},
                  norm.array(),
                  p.act,
                  Activation::none,
                  p.slope,
                  u,
                  Array{table.data(), 2 * m}},
                 p.sums, threads);
  finish(p, norm, kept, table, m, gradients);
  dv.size[1] = m;
  Source du = plain(dv);
  if (norm.array().count) du.b = u, du.coefficients = norm.array(), du.read = Read::norm_gradient;
  dy_read();
  if (gradients.weight[0])
    weight_gradient(plain(t.x), du, p.conv[0], *gradients.weight[0], p.sums, threads);
  if (make_dx)
    input_gradient(du, t.weight[0], p.conv[0], make_dx(),
                   {Write::forward, {}, {}, Activation::none, Activation::none, 0.0, {}, {}},
                   p.sums, threads);
}

}  // namespace fastst::cpu
