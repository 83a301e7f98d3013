// Spatial pass on Hopper: u = act(scale·conv(x) + shift).
#include <hopper/spatial.cuh>

namespace fastst {
namespace {

template <class T>
void choose(Dtype dtype, const HopperSpatial& conv, Stream stream) {
  const auto is = [&](int columns, int groups, int blocks) {
    return is_tile(conv.tile, columns, groups, blocks);
  };
  if (is(48, 2, 2)) return run<T, 48, 2, 2>(dtype, conv, stream);
  if (is(64, 2, 2)) return run<T, 64, 2, 2>(dtype, conv, stream);
  if (is(96, 2, 2)) return run<T, 96, 2, 2>(dtype, conv, stream);
  if (is(112, 2, 2)) return run<T, 112, 2, 2>(dtype, conv, stream);
  if (is(128, 2, 2)) return run<T, 128, 2, 2>(dtype, conv, stream);
  if (is(144, 2, 2)) return run<T, 144, 2, 2>(dtype, conv, stream);
  if (is(192, 2, 1)) return run<T, 192, 2, 1>(dtype, conv, stream);
  if (is(232, 2, 1)) return run<T, 232, 2, 1>(dtype, conv, stream);
  no_tile(conv.tile);
}

}  // namespace

void hopper_spatial(Dtype dtype, const HopperSpatial& conv, Stream stream) {
  if (dtype == Dtype::f16) return choose<__half>(dtype, conv, stream);
  if (dtype == Dtype::bf16) return choose<__nv_bfloat16>(dtype, conv, stream);
  throw std::invalid_argument("hopper_spatial is for float16 and bfloat16");
}

}  // namespace fastst
