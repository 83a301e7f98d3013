// The emulator's counterpart of csrc/cuda/device/wgmma.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <device/matrix.cuh>
#include <type_traits>

#include "../wgmma.h"

namespace fastst {

template <class... Registers>
void wgmma_fence(Registers&...) {
  emulator::wgmma_fence();
}
inline void wgmma_commit() { emulator::wgmma_commit(); }

template <int Pending>
void wgmma_wait(Where where = Where::current()) {
  emulator::wgmma_wait(Pending, where);
}

template <class Registers>
void keep(Registers&) {}

template <class T, int N>
constexpr bool is_wgmma = N % 8 == 0 && N >= 8 && N <= 256 &&
                          (std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);

template <class T, int N, Major MajorA = Major::k, Major MajorB = Major::k>
void wgmma(float (&d)[N / 2], Descriptor a, Descriptor b, bool accumulate,
           Where where = Where::current()) {
  static_assert(is_wgmma<T, N>);
  emulator::wgmma({N, std::is_same_v<T, __half>, false, MajorA == Major::mn, MajorB == Major::mn,
                   a.bits, b.bits, accumulate},
                  d, nullptr, where);
}

template <class T, int N, Major MajorB = Major::k>
void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], Descriptor b, bool accumulate,
           Where where = Where::current()) {
  static_assert(is_wgmma<T, N>);
  emulator::wgmma(
      {N, std::is_same_v<T, __half>, true, false, MajorB == Major::mn, 0, b.bits, accumulate}, d, a,
      where);
}

}  // namespace fastst
