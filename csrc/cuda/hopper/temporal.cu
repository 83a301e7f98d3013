// Temporal pass on Hopper: y = act(scale·conv(z) + shift + residual), z = act(s·u + h).
#include <hopper/temporal.cuh>

namespace fastst {
namespace {

template <class T, int N, int Frames, int Stride>
void run(const HopperTemporal& conv, const Parameters<T, Epilogue>& p, Stream stream) {
  const auto go = conv.coefficients.data ? run<N, Frames, Stride, 1, true, T, Epilogue>
                                         : run<N, Frames, Stride, 1, false, T, Epilogue>;
  go("hopper_temporal", p, conv.tile, conv.output.out, stream);
}

template <class T>
void choose(Dtype dtype, const HopperTemporal& conv, Stream stream) {
  const View& out = conv.output.out;
  const int64_t stride = conv.conv.stride[0];
  if (conv.conv.kernel[0] != kTaps || conv.conv.dilation[0] != 1)
    throw std::invalid_argument("hopper_temporal has 3 taps without dilation");
  if (stride != 1 && stride != 2)
    throw std::invalid_argument("hopper_temporal has strides 1 and 2, not " +
                                std::to_string(stride));
  auto p = parameters<T, Epilogue>(dtype, conv.u, out, conv.weight, conv.tile,
                                   narrow_size(conv.conv.padding[0]), 1);
  p.replicate = conv.conv.mode == PadMode::replicate;
  p.shift = global<const float>(conv.coefficients.data, conv.coefficients.count);
  p.scale = p.shift, p.shift = p.shift + p.chunks * kSwizzleRow;
  p.act = conv.act, p.slope = static_cast<float>(conv.slope);
  if (const auto& residual = conv.output.residual)
    p.residual_clip = residual->stride[0], p.residual_frame = residual->stride[2],
    p.residual_pixel = residual->stride[4];
  p.epilogue = Epilogue<T>(conv.output);
  const auto is = [&](int columns, int frames, int step) {
    return is_tile(conv.tile, columns, frames) && stride == step;
  };
  if (is(64, 4, 1)) return run<T, 64, 4, 1>(conv, p, stream);
  if (is(128, 2, 1)) return run<T, 128, 2, 1>(conv, p, stream);
  if (is(128, 2, 2)) return run<T, 128, 2, 2>(conv, p, stream);
  if (is(128, 1, 1)) return run<T, 128, 1, 1>(conv, p, stream);
  if (is(128, 1, 2)) return run<T, 128, 1, 2>(conv, p, stream);
  throw std::invalid_argument("hopper_temporal has no tile of " + std::to_string(conv.tile.box[1]) +
                              " frames × " + std::to_string(conv.tile.columns) + " of stride " +
                              std::to_string(stride));
}

}  // namespace

void hopper_temporal(Dtype dtype, const HopperTemporal& conv, Stream stream) {
  if (dtype == Dtype::f16) return choose<__half>(dtype, conv, stream);
  if (dtype == Dtype::bf16) return choose<__nv_bfloat16>(dtype, conv, stream);
  throw std::invalid_argument("hopper_temporal is for float16 and bfloat16");
}

}  // namespace fastst
