// Input gradient of a spatial pass before a batch norm on Hopper: dx from du = g + p·u + q, which
// is formed in shared memory. A file of its own to compile beside the others.
#include <device/hopper_spatial.cuh>

namespace fastst {
namespace {

template <class T>
void choose(Dtype dtype, const HopperSpatial& conv, Stream stream) {
  const auto is = [&](int columns, int groups, int blocks) {
    return is_tile(conv.tile, columns, groups, blocks);
  };
  if (is(64, 2, 2)) return run<T, 64, 2, 2, true>(dtype, conv, stream);
  if (is(128, 2, 1)) return run<T, 128, 2, 1, true>(dtype, conv, stream);
  no_tile(conv.tile);
}

}  // namespace

void hopper_spatial_affine(Dtype dtype, const HopperSpatial& conv, Stream stream) {
  if (dtype == Dtype::f16) return choose<__half>(dtype, conv, stream);
  if (dtype == Dtype::bf16) return choose<__nv_bfloat16>(dtype, conv, stream);
  throw std::invalid_argument("hopper_spatial is for float16 and bfloat16");
}

}  // namespace fastst
