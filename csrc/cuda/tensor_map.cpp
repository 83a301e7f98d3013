#include <tensor_map.h>

#include <stdexcept>
#include <string>

namespace fastst {

void check(const Tiles& t) {
  const auto require = [](bool holds, const char* what, int64_t came) {
    if (!holds)
      throw std::invalid_argument("a tensor map needs " + std::string(what) + ", got " +
                                  std::to_string(came));
  };
  require(t.dtype != Dtype::f64, "elements of 2 or 4 bytes", 8);
  require(t.rank >= 1 && t.rank <= 5, "1 to 5 dimensions", t.rank);
  const auto address = reinterpret_cast<uintptr_t>(t.data);
  require(address % 16 == 0, "an address that is a multiple of 16", address % 16);
  require(t.stride[0] == 1, "a first dimension of stride 1", t.stride[0]);
  require(t.step[0] == 1, "a first dimension of step 1", t.step[0]);
  require(t.row_bytes() % 16 == 0, "box rows of a multiple of 16 bytes", t.row_bytes());
  // Shorter rows are allowed with a swizzle, but nobody here knows how they lie.
  require(t.swizzle == Swizzle::none || t.row_bytes() == swizzle_span(t.swizzle),
          "box rows as long as the swizzle's span", t.row_bytes());
  for (int i = 0; i < t.rank; ++i) {
    require(t.size[i] >= 1 && t.size[i] <= int64_t(1) << 32, "sizes from 1 to 2^32", t.size[i]);
    require(t.step[i] >= 1 && t.step[i] <= 8, "steps from 1 to 8", t.step[i]);
    require(t.box[i] >= 1 && t.box[i] * t.step[i] <= 256, "boxes that span 1 to 256 elements",
            int64_t(t.box[i]) * t.step[i]);
    const int64_t bytes = t.stride[i] * t.element_bytes();
    require(i == 0 || (bytes % 16 == 0 && bytes > 0 && bytes < int64_t(1) << 40),
            "strides of a multiple of 16 bytes below 2^40", bytes);
  }
}

}  // namespace fastst
