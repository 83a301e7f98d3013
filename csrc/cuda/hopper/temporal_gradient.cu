// Input gradient of the temporal pass on Hopper, through the activation and norm before it:
// dv = act'(v)·(Wtᵀ∗dy), its sums for the norm, and what is stored, factor·dv.
#include <hopper/temporal.cuh>
#include <hopper/temporal_gradient.cuh>

namespace fastst {
namespace {

template <class T, int N, int Frames, int Up>
void run(const HopperTemporalGradient& g, const Parameters<T, GradientEpilogue>& p, Stream stream) {
  run<N, Frames, 1, Up, false, T, GradientEpilogue>("hopper_temporal_gradient", p, g.tile, g.out,
                                                    stream);
}

template <class T>
void choose(Dtype dtype, const HopperTemporalGradient& g, Stream stream) {
  const int up = narrow_size(g.conv.stride[0]), before = narrow_size(g.conv.padding[0]);
  if (g.conv.kernel[0] != kTaps || g.conv.dilation[0] != 1)
    throw std::invalid_argument("hopper_temporal_gradient has 3 taps without dilation");
  auto p =
      parameters<T, GradientEpilogue>(dtype, g.dy, g.out, g.weight, g.tile, kTaps - 1 - before, up);
  p.epilogue = GradientEpilogue<T>(g);
  const auto is = [&](int columns, int frames, int step) {
    return is_tile(g.tile, columns, frames) && up == step;
  };
  if (is(64, 4, 1)) return run<T, 64, 4, 1>(g, p, stream);
  if (is(120, 2, 2)) return run<T, 120, 2, 2>(g, p, stream);
  if (is(128, 2, 1)) return run<T, 128, 2, 1>(g, p, stream);
  if (is(144, 2, 1)) return run<T, 144, 2, 1>(g, p, stream);
  if (is(232, 1, 1)) return run<T, 232, 1, 1>(g, p, stream);
  throw std::invalid_argument("hopper_temporal_gradient has no tile of " +
                              std::to_string(g.tile.box[1]) + " frames × " +
                              std::to_string(g.tile.columns) + " of stride " + std::to_string(up));
}

}  // namespace

void hopper_temporal_gradient(Dtype dtype, const HopperTemporalGradient& g, Stream stream) {
  if (dtype == Dtype::f16) return choose<__half>(dtype, g, stream);
  if (dtype == Dtype::bf16) return choose<__nv_bfloat16>(dtype, g, stream);
  throw std::invalid_argument("hopper_temporal_gradient is for float16 and bfloat16");
}

}  // namespace fastst
