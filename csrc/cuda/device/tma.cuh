// Hopper's copy engine: boxes of a tensor between global and shared memory, asynchronously.
// Compiled for sm_90a alone.
#pragma once

#include <cuda.h>
#include <driver.h>
#include <tensor_map.h>

#include <device/hopper.cuh>
#include <stdexcept>
#include <string>

namespace fastst {

// Part of a kernel's parameters, which must be a __grid_constant__.
struct TensorMap {
  CUtensorMap map;
};

// Throws std::invalid_argument where the tensor does not suit TMA, std::runtime_error where the
// driver has none.
inline TensorMap tensor_map(const Tiles& t) {
  check(t);
  static const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(
      driver_entry_point("cuTensorMapEncodeTiled", 12000));
  if (!encode) throw std::runtime_error("this driver cannot make tensor maps: CUDA 12.0 is needed");
  ensure_context();
  cuuint64_t size[5], stride[5];
  cuuint32_t box[5], step[5];
  for (int i = 0; i < t.rank; ++i) {
    size[i] = t.size[i], step[i] = t.step[i], box[i] = t.box[i] * t.step[i];
    if (i > 0) stride[i - 1] = t.stride[i] * t.element_bytes();
  }
  const auto type = t.dtype == Dtype::f16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                    : t.dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const auto swizzle = t.swizzle == Swizzle::b128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : t.swizzle == Swizzle::b64 ? CU_TENSOR_MAP_SWIZZLE_64B
                       : t.swizzle == Swizzle::b32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                   : CU_TENSOR_MAP_SWIZZLE_NONE;
  TensorMap made;
  const CUresult error = encode(
      &made.map, type, t.rank, t.data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS)
    throw std::runtime_error("the driver refused a tensor map: error " + std::to_string(error));
  return made;
}

__device__ inline void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Where the box begins: one coordinate per dimension, fastest first, also negative or beyond. What
// lies outside of the tensor arrives as zeros. One thread; delivers the bytes of a whole box to the
// barrier. `to` is aligned to 128 bytes, and to 8 spans of the swizzle.
template <class T, class... C>
__device__ void tma_load(Shared<T> to, const TensorMap& map, Shared<uint64_t> barrier, C... at) {
  const int c[] = {at...};
  constexpr int rank = sizeof...(C);
  static_assert(rank >= 1 && rank <= 5);
#define FASTST_TMA(RANK, PLACES, ...)                                                     \
  asm volatile("cp.async.bulk.tensor." RANK                                               \
               ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {" PLACES \
               "}], [%2];" ::"r"(shared_address(to)),                                     \
               "l"(&map), "r"(shared_address(barrier)), __VA_ARGS__                       \
               : "memory")
  if constexpr (rank == 1) FASTST_TMA("1d", "%3", "r"(c[0]));
  if constexpr (rank == 2) FASTST_TMA("2d", "%3, %4", "r"(c[0]), "r"(c[1]));
  if constexpr (rank == 3) FASTST_TMA("3d", "%3, %4, %5", "r"(c[0]), "r"(c[1]), "r"(c[2]));
  if constexpr (rank == 4)
    FASTST_TMA("4d", "%3, %4, %5, %6", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  if constexpr (rank == 5)
    FASTST_TMA("5d", "%3, %4, %5, %6, %7", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]));
#undef FASTST_TMA
}

// The same to every block of the cluster whose bit in `blocks` is set: to the same place in its
// shared memory, its bytes to the barrier in the same place there. Read out of L2 once.
template <class T>
__device__ void tma_multicast(Shared<T> to, const TensorMap& map, Shared<uint64_t> barrier,
                              uint16_t blocks, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "h"(blocks), "r"(x), "r"(y)
      : "memory");
}

// The other way; what lies outside of the tensor is not written. Shared memory must have been
// fenced (fence_proxy_async) by those who wrote it.
template <class T, class... C>
__device__ void tma_store(const TensorMap& map, Shared<T> from, C... at) {
  const int c[] = {at...};
  constexpr int rank = sizeof...(C);
  static_assert(rank >= 1 && rank <= 5);
#define FASTST_TMA(RANK, PLACES, ...)                                                      \
  asm volatile("cp.async.bulk.tensor." RANK ".global.shared::cta.bulk_group [%0, {" PLACES \
               "}], [%1];" ::"l"(&map),                                                    \
               "r"(shared_address(from)), __VA_ARGS__                                      \
               : "memory")
  if constexpr (rank == 1) FASTST_TMA("1d", "%2", "r"(c[0]));
  if constexpr (rank == 2) FASTST_TMA("2d", "%2, %3", "r"(c[0]), "r"(c[1]));
  if constexpr (rank == 3) FASTST_TMA("3d", "%2, %3, %4", "r"(c[0]), "r"(c[1]), "r"(c[2]));
  if constexpr (rank == 4)
    FASTST_TMA("4d", "%2, %3, %4, %5", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  if constexpr (rank == 5)
    FASTST_TMA("5d", "%2, %3, %4, %5, %6", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]));
#undef FASTST_TMA
}

__device__ inline void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most `Pending` groups of this thread's stores still read shared memory. Before the block
// ends, none may.
template <int Pending>
__device__ void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

}  // namespace fastst
