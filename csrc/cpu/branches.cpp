// The parallel layer: two convolutions of the same x, added or side by side.
#include <tile.h>

namespace fastst::cpu {
namespace {

Source plain(const View& v) { return {v, {}, {}, Read::plain, Activation::none, 0.0}; }

// Where sums are added to what is in their place, they cannot be tried in Winograd's way, which may
// have to be given up.
Sums sums_onto(const std::optional<View>& aux, Sums sums) { return aux ? Sums::direct : sums; }

}  // namespace

void parallel(const ParallelPlan& p, const ParallelTensors& t, const View& out, int threads) {
  std::array<Branch, 2> both;
  for (int i = 0; i < 2; ++i) both[i] = {t.weight[i], t.bias[i], p.conv[i], out, {}, p.act};
  if (p.add) {
    both[0].outer = Activation::none, both[1].aux = out;
  } else {
    const int64_t channels = t.weight[0].size[0];
    both[0].out.size[1] = channels, both[1].out.size[1] -= channels;
    both[1].out.data = Tensor(out).from(channels).data;
  }
  const Epilogue e = {Write::forward, {}, {}, p.branch, Activation::none, p.slope, {}, {}};
  if (p.conv[0].groups == 1 && p.conv[1].groups == 1)
    return branches(plain(t.x), both, e, p.sums, threads);
  for (const Branch& b : both) {
    Epilogue own = e;
    own.bias = b.bias, own.outer = b.outer, own.aux = b.aux;
    tap_conv(plain(t.x), b.weight, b.conv, b.out, own, sums_onto(b.aux, p.sums), threads);
  }
}

void parallel_backward(const ParallelPlan& p, const ParallelTensors& t,
                       const std::array<View, 2>& dy, const std::optional<View>& dx,
                       const std::array<std::optional<View>, 2>& dweight, int threads) {
  for (int i = 0; i < 2; ++i) {
    if (dweight[i])
      weight_gradient(plain(t.x), plain(dy[i]), p.conv[i], *dweight[i], p.sums, threads);
    if (!dx) continue;
    Epilogue e = {Write::forward, {}, {}, Activation::none, Activation::none, 0.0, {}, {}};
    if (i) e.aux = dx;
    input_gradient(plain(dy[i]), t.weight[i], p.conv[i], *dx, e, sums_onto(e.aux, p.sums), threads);
  }
}

}  // namespace fastst::cpu
