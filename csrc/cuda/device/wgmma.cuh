// Hopper's matrix unit: D (64 × N, float, in registers) += A (64 × 16) · B (16 × N), by the 128
// threads of a warpgroup together and asynchronously. Compiled for sm_90a alone.
//
//   wgmma_fence(a);                       registers written so far are seen
//   wgmma<T, N>(d, a, b, true); ...       nobody touches d, nor A's registers or shared tiles
//   wgmma_commit();
//   wgmma_wait<0>();                      until they are free, and d is there
//   keep(d);
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <device/matrix.cuh>
#include <device/wgmma_operands.cuh>
#include <type_traits>

namespace fastst {

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most `Pending` of this warp's groups are under way. Other warps of the warpgroup may
// still wait: a tile is free when all four have.
template <int Pending>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

__device__ inline void keep(float& r) { asm volatile("" : "+f"(r)::"memory"); }
__device__ inline void keep(uint32_t& r) { asm volatile("" : "+r"(r)::"memory"); }
// Keeps the compiler from moving accesses to these registers across: around what it does not know
// to read or change them, that is before a fence and after a wait.
template <class T, int R>
__device__ void keep(T (&registers)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) keep(registers[i]);
}

// Before the first wgmma of a group, with all registers that were written since the last one: what
// is not named here the compiler may write behind the fence.
template <class... Registers>
__device__ void wgmma_fence(Registers&... written) {
  (keep(written), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

#define FASTST_WGMMA(N, TYPE, R, A, SCALE, FLAGS)                                             \
  "{\n .reg .pred p;\n setp.ne.b32 p, %" #SCALE ", 0;\n wgmma.mma_async.sync.aligned.m64n" #N \
  "k16.f32." TYPE "." TYPE " {" FASTST_TEXT_##R "}, " A ", p, 1, 1, " FLAGS ";\n}"

// A and B from shared memory. Without `accumulate`, D is overwritten.
template <class T, int N, Major MajorA = Major::k, Major MajorB = Major::k>
__device__ void wgmma(float (&d)[N / 2], Descriptor a, Descriptor b, bool accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
#define FASTST_SS(TYPE, N_, R, O0, O1, O2, O3, O4)                                              \
  asm volatile(FASTST_WGMMA(N_, TYPE, R, "%" #O0 ", %" #O1, O2, "%" #O3 ", %" #O4)              \
               : FASTST_D_##R                                                                   \
               : "l"(a.bits), "l"(b.bits), "r"(int(accumulate)), "n"(int(MajorA == Major::mn)), \
                 "n"(int(MajorB == Major::mn)))
#define FASTST_CASE(N_, R, O0, O1, O2, O3, O4, O5, O6) \
  if constexpr (N == N_) {                             \
    if constexpr (std::is_same_v<T, __half>)           \
      FASTST_SS("f16", N_, R, O0, O1, O2, O3, O4);     \
    else                                               \
      FASTST_SS("bf16", N_, R, O0, O1, O2, O3, O4);    \
  }
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  FASTST_EVERY_N(FASTST_CASE)
#undef FASTST_CASE
#undef FASTST_SS
}

// A from registers: its fragment, two elements in each.
template <class T, int N, Major MajorB = Major::k>
__device__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], Descriptor b, bool accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
#define FASTST_RS(TYPE, N_, R, O0, O1, O2, O3, O4, O5, O6)                                      \
  asm volatile(                                                                                 \
      FASTST_WGMMA(N_, TYPE, R, "{%" #O0 ", %" #O1 ", %" #O2 ", %" #O3 "}, %" #O4, O5, "%" #O6) \
      : FASTST_D_##R                                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(int(accumulate)),          \
        "n"(int(MajorB == Major::mn)))
#define FASTST_CASE(N_, R, O0, O1, O2, O3, O4, O5, O6)      \
  if constexpr (N == N_) {                                  \
    if constexpr (std::is_same_v<T, __half>)                \
      FASTST_RS("f16", N_, R, O0, O1, O2, O3, O4, O5, O6);  \
    else                                                    \
      FASTST_RS("bf16", N_, R, O0, O1, O2, O3, O4, O5, O6); \
  }
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  FASTST_EVERY_N(FASTST_CASE)
#undef FASTST_CASE
#undef FASTST_RS
}

#undef FASTST_WGMMA

}  // namespace fastst
