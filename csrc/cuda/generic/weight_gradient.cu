// Generic weight gradient: dW[k, c, tap] = Σ_p x[p·stride + tap, c] · dy[p, k].
//
// One thread per weight and split of the positions. Every sum has a fixed order: partials of the
// splits are added by sum_rows.
#include <device/launch.cuh>
#include <device/source.cuh>

namespace fastst {
namespace {

constexpr int kThreads = 256;
constexpr int kChain = 32;  // terms added up before they join the total: shorter rounding chains

template <class T>
struct Parameters {
  Reader<T> x, dy;
  Geometry geometry;
  Global<Acc<T>> partials;  // (splits, weights)
  int64_t size[5];          // of the weight
  int64_t weights, chunk;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    weight_gradient_kernel(const __grid_constant__ Parameters<T> p) {
  using A = Acc<T>;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.weights) return;
  int64_t rest = index;
  const int kw = static_cast<int>(rest % p.size[4]);
  rest /= p.size[4];
  const int kh = static_cast<int>(rest % p.size[3]);
  rest /= p.size[3];
  const int kt = static_cast<int>(rest % p.size[2]);
  rest /= p.size[2];
  const int64_t k = rest / p.size[1];
  const int64_t c = k / (p.size[0] / p.geometry.groups) * p.size[1] + rest % p.size[1];

  const int64_t positions = p.dy.a.positions();
  const int64_t begin = blockIdx.y * p.chunk;
  const int64_t end = begin + p.chunk < positions ? begin + p.chunk : positions;
  A total(0), sum(0);
  for (int64_t i = begin; i < end; ++i) {
    const Position at(i, p.dy.a);
    const int t = p.geometry.t.source(at.t, kt);
    const int h = p.geometry.h.source(at.h, kh);
    const int w = p.geometry.w.source(at.w, kw);
    if (t >= 0 && h >= 0 && w >= 0)
      sum += p.x(p.x.place(at.n, t, h, w), c) * p.dy(p.dy.place(at.n, at.t, at.h, at.w), k);
    if ((i - begin) % kChain == kChain - 1) total += sum, sum = A(0);
  }
  p.partials[blockIdx.y * p.weights + index] = total + sum;
}

template <class T>
void run(const Source& x, const Source& dy, const Conv& conv, const View& weight, Array partials,
         int64_t splits, Stream stream) {
  Parameters<T> p{};
  p.x = Reader<T>(x), p.dy = Reader<T>(dy), p.geometry = Geometry(conv, size_of(x), dy.a.size);
  p.partials = global<Acc<T>>(partials.data, partials.count);
  for (int i = 0; i < 5; ++i) p.size[i] = weight.size[i];
  p.weights = weight.count();
  const int64_t positions = dy.a.size[0] * dy.a.size[2] * dy.a.size[3] * dy.a.size[4];
  p.chunk = (positions + splits - 1) / splits;
  const dim3 grid((p.weights + kThreads - 1) / kThreads, splits);
  launch("weight_gradient", weight_gradient_kernel<T>, grid, dim3(kThreads), 0, stream,
         "weight " + shape(weight), p);
}

}  // namespace

void weight_gradient(Dtype dtype, const Source& x, const Source& dy, const Conv& conv, View weight,
                     Array partials, int64_t splits, Stream stream) {
  with_type(dtype, [&](auto element) {
    run<decltype(element)>(x, dy, conv, weight, partials, splits, stream);
  });
}

}  // namespace fastst
