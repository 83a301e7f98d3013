// What a tensor map says. The 128 bytes of one that a kernel is given hold the address of this.
#pragma once

#include <array>
#include <cstdint>

namespace ptx {

// A tensor as the copy engine sees it, fastest dimension first; sizes in elements, strides in
// bytes.
struct TensorMap {
  uint64_t base = 0;
  int rank = 0, element = 0;  // bytes
  std::array<int64_t, 5> size{}, stride{};
  std::array<int32_t, 5> box{}, step{};
  int swizzle = 0;  // bytes that it spans: 0, 32, 64, 128
};

}  // namespace ptx
