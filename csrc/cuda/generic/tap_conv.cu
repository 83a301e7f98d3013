// Generic tap convolution: every pass, forward and input gradient, on any architecture.
//
// One thread per output element; it sums over its taps and input channels, reading through a
// Reader. Plain on purpose: it is what the fast kernels are compared with on a GPU.
#include <device/launch.cuh>
#include <device/source.cuh>

namespace fastst {
namespace {

constexpr int kThreads = 256;

template <class T>
struct TypedBranch {
  Reader<T> source;
  Tensor<const T> weight;  // (out, in/groups, kt, kh, kw)
  Global<const Acc<T>> bias;
  Geometry geometry;
  Activation act;
};

template <class T>
struct Parameters {
  TypedBranch<T> branch[2];
  Tensor<T> out[2];
  Reader<T> aux;
  int branches;
  Write write;
  Activation act;
  Acc<T> slope;
  int before;  // frames of what the convolution reads, before those of out
  bool channels_fastest;
};

// v of output element (n, k, t, h, w), bias included.
template <class T>
__device__ Acc<T> convolve(const TypedBranch<T>& b, int k, Position at) {
  const Geometry& g = b.geometry;
  const int in_per_group = static_cast<int>(b.weight.size[1]);
  const int out_per_group = static_cast<int>(b.weight.size[0]) / g.groups;
  const int first = k / out_per_group * in_per_group;
  Acc<T> total = b.bias ? b.bias[k] : Acc<T>(0);
  for (int kt = 0; kt < g.t.kernel; ++kt) {
    const int t = g.t.source(at.t, kt);
    if (t < 0) continue;
    for (int kh = 0; kh < g.h.kernel; ++kh) {
      const int h = g.h.source(at.h, kh);
      if (h < 0) continue;
      for (int kw = 0; kw < g.w.kernel; ++kw) {
        const int w = g.w.source(at.w, kw);
        if (w < 0) continue;
        const auto place = b.source.place(at.n, t, h, w);
        const int64_t tap = k * b.weight.stride[0] + b.weight.offset(0, kt, kh, kw);
        Acc<T> sum(0);  // per tap, then over taps: shorter chains of roundings
        for (int c = 0; c < in_per_group; ++c)
          sum += b.source(place, first + c) * widen(b.weight.data[tap + c * b.weight.stride[1]]);
        total += sum;
      }
    }
  }
  return total;
}

// Gradient of input element (n, c, t, h, w): the same sum from the other side.
template <class T>
__device__ Acc<T> convolve_transposed(const TypedBranch<T>& b, int c, Position at) {
  const Geometry& g = b.geometry;
  const int in_per_group = static_cast<int>(b.weight.size[1]);
  const int out_per_group = static_cast<int>(b.weight.size[0]) / g.groups;
  const int first = c / in_per_group * out_per_group;
  const int64_t column = c % in_per_group * b.weight.stride[1];
  Acc<T> total(0);
  for (int kt = 0; kt < g.t.kernel; ++kt)
    for (int mt = 0; mt < g.t.images(at.t); ++mt) {
      const int t = g.t.reader(at.t, mt, kt);
      if (t < 0) continue;
      for (int kh = 0; kh < g.h.kernel; ++kh)
        for (int mh = 0; mh < g.h.images(at.h); ++mh) {
          const int h = g.h.reader(at.h, mh, kh);
          if (h < 0) continue;
          for (int kw = 0; kw < g.w.kernel; ++kw)
            for (int mw = 0; mw < g.w.images(at.w); ++mw) {
              const int w = g.w.reader(at.w, mw, kw);
              if (w < 0) continue;
              const auto place = b.source.place(at.n, t, h, w);
              const int64_t tap = column + b.weight.offset(0, kt, kh, kw);
              Acc<T> sum(0);
              for (int k = first; k < first + out_per_group; ++k)
                sum += b.source(place, k) * widen(b.weight.data[tap + k * b.weight.stride[0]]);
              total += sum;
            }
        }
    }
  return total;
}

template <class T, bool Transposed>
__global__ void __launch_bounds__(kThreads, 1)
    tap_conv_kernel(const __grid_constant__ Parameters<T> p) {
  using A = Acc<T>;
  const Tensor<T>& out = p.out[0];
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t positions = out.positions(), channels = out.size[1];
  if (index >= positions * channels) return;
  // Neighbouring threads write neighbouring elements in either layout.
  const int64_t inner = out.size[2] * out.size[3] * out.size[4];
  const int c = static_cast<int>(p.channels_fastest ? index % channels : index / inner % channels);
  Position at(
      p.channels_fastest ? index / channels : index / (inner * channels) * inner + index % inner,
      out);
  const int64_t to = out.offset(at.n, at.t, at.h, at.w) + c * out.stride[1];
  const auto beside = p.aux.place(at.n, at.t, at.h, at.w);
  at.t += p.before;
  const int64_t computed = p.branch[0].weight.size[0];
  if (!Transposed && c >= computed) {  // channels that only fill up the rows of u
    out.data[to] = narrow<T>(A(0));
    return;
  }
  A v[2] = {A(0), A(0)};
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (i < p.branches)
      v[i] = Transposed ? convolve_transposed(p.branch[i], c, at) : convolve(p.branch[i], c, at);

  if (p.write == Write::norm_gradient) {
    out.data[to] = narrow<T>((v[0] + v[1]) * p.aux.derivative(beside, c));
    return;
  }
  A sum(0);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (i < p.branches) sum += activate(p.branch[i].act, p.slope, v[i]);
  if (p.write == Write::forward) {
    if (p.aux.a.data) sum += p.aux(beside, c);
    out.data[to] = narrow<T>(activate(p.act, p.slope, sum));
    return;
  }
  const A gradient = p.aux(beside, c) * activate_gradient(p.act, p.slope, sum);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (i < p.branches) {
      const Tensor<T>& o = p.out[i];
      o.data[o.offset(at.n, at.t, at.h, at.w) + c * o.stride[1]] =
          narrow<T>(gradient * activate_gradient(p.branch[i].act, p.slope, v[i]));
    }
}

template <class T>
void run(const TapConv& conv, Stream stream) {
  Parameters<T> p{};
  p.branches = static_cast<int>(conv.branches.size());
  for (int i = 0; i < p.branches; ++i) {
    const Branch& b = conv.branches[i];
    const auto read = size_of(b.source);
    auto out = conv.out[0].size;
    out[2] += conv.around[0] + conv.around[1];
    p.branch[i] = {Reader<T>(b.source), Tensor<const T>(b.weight),
                   global<const Acc<T>>(b.bias.data, b.bias.count),
                   conv.transposed ? Geometry(b.conv, out, read) : Geometry(b.conv, read, out),
                   b.act};
  }
  for (size_t i = 0; i < conv.out.size(); ++i) p.out[i] = Tensor<T>(conv.out[i]);
  if (conv.aux) p.aux = Reader<T>(*conv.aux);
  p.before = narrow_size(conv.around[0]);
  p.write = conv.write, p.act = conv.act, p.slope = Acc<T>(conv.slope);
  p.channels_fastest = conv.out[0].stride[1] == 1;
  const int64_t blocks = (conv.out[0].count() + kThreads - 1) / kThreads;
  const std::string what = (conv.transposed ? "input gradient " : "output ") + shape(conv.out[0]);
  if (blocks > kMaxGridX) throw std::runtime_error("fastst kernel tap_conv: too large, " + what);
  const auto kernel = conv.transposed ? tap_conv_kernel<T, true> : tap_conv_kernel<T, false>;
  launch("tap_conv", kernel, dim3(blocks), dim3(kThreads), 0, stream, what, p);
}

}  // namespace

void tap_conv(Dtype dtype, const TapConv& conv, Stream stream) {
  with_type(dtype, [&](auto element) { run<decltype(element)>(conv, stream); });
}

}  // namespace fastst
