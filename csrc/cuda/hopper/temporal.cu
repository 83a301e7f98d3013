// Temporal pass on Hopper: y = act(scale·conv(z) + shift + residual), z = act(s·u + h).
#include <hopper/temporal.cuh>

namespace fastst {
namespace {

template <class T>
Parameters<T, Epilogue> parameters(Dtype dtype, const HopperTemporal& conv) {
  auto p = parameters<T, Epilogue>(dtype, conv.u, conv.output.out, conv.weight, conv.tile,
                                   narrow_size(conv.conv.padding[0]), 1);
  p.replicate = conv.conv.mode == PadMode::replicate;
  p.shift = global<const float>(conv.coefficients.data, conv.coefficients.count);
  p.scale = p.shift, p.shift = p.shift + p.chunks * kSwizzleRow;
  p.act = conv.act, p.slope = static_cast<float>(conv.slope);
  if (const auto& residual = conv.output.residual)
    p.residual_clip = residual->stride[0], p.residual_frame = residual->stride[2],
    p.residual_pixel = residual->stride[4];
  p.epilogue = Epilogue<T>(conv.output);
  return p;
}

}  // namespace

void hopper_temporal(Dtype dtype, const HopperTemporal& conv, Stream stream) {
  check_temporal("hopper_temporal", conv.conv, conv.tile);
  with_instance<instances::temporal>(
      "hopper_temporal", dtype, {conv.tile.columns, conv.tile.box[1], conv.conv.stride[0]},
      [&]<class T, int N, int Frames, int Stride>() {
        const auto go = conv.coefficients.data ? run<N, Frames, Stride, 1, true, T, Epilogue>
                                               : run<N, Frames, Stride, 1, false, T, Epilogue>;
        go("hopper_temporal", parameters<T>(dtype, conv), conv.tile, conv.output.out, stream);
      });
}

}  // namespace fastst
