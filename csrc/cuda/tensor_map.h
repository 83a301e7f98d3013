// A tensor in global memory as TMA sees it: boxes of up to five dimensions, fastest first.
#pragma once

#include <kernels.h>
#include <swizzle.h>

namespace fastst {

struct Tiles {
  Dtype dtype;  // f16, bf16 or f32
  void* data;
  int64_t span;  // elements from the first to the last, that may be touched
  int rank;
  std::array<int64_t, 5> size, stride;  // in elements; stride[0] is 1
  std::array<int, 5> box;               // elements that arrive, of each dimension
  std::array<int, 5> step;              // distance between them in the tensor, 1 to 8; step[0] is 1
  Swizzle swizzle = Swizzle::none;

  int element_bytes() const { return dtype == Dtype::f32 ? 4 : 2; }
  int row_bytes() const { return box[0] * element_bytes(); }
  // Of a box in shared memory, which is what a load delivers, zeros included.
  int box_bytes() const {
    int bytes = element_bytes();
    for (int i = 0; i < rank; ++i) bytes *= box[i];
    return bytes;
  }
};

// What the driver and the copy engine require of them.
// Throws std::invalid_argument, saying what was required and what came.
void check(const Tiles&);

}  // namespace fastst
