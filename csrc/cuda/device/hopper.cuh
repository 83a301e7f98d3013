// What Hopper adds to barriers, fences and register files. Compiled for sm_90a alone.
#pragma once

#include <device/primitives.cuh>

namespace fastst {

// Which block of its cluster this one is.
__device__ inline int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster; orders their accesses to shared memory.
__device__ inline void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// Arrives at the mbarrier in the same place of another block of the cluster, or of this one: after
// what has been read there, but not for what has been written, which would ask for
// .release.cluster, and that ptxas makes a fence of all of the GPU's memory.
__device__ inline void mbarrier_arrive_at(Shared<uint64_t> barrier, int block) {
  asm volatile(
      "{\n .reg .b32 there;\n"
      " mapa.shared::cluster.u32 there, %0, %1;\n"
      " mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}

// This thread's mbarrier_init is seen by the copy engine, and after a barrier by everyone: also by
// other blocks, after cluster_sync.
__device__ inline void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// An arrival that adds `bytes` to what must be delivered before the phase completes.
__device__ inline void mbarrier_arrive_expect(Shared<uint64_t> barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Shared memory as this thread sees it becomes what TMA and wgmma see: after its own writes, before
// the barrier by which others learn of them.
__device__ inline void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Registers of each thread of this warpgroup from here on: a multiple of 8 from 24 to 256. All
// four warps call it. The increase waits until other warpgroups have given up enough.
template <int N>
__device__ void registers_increase() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ void registers_decrease() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Four 8 × 8 matrices of 16-bit elements: lanes 8j to 8j + 7 give the addresses of the 16-byte rows
// of matrix j; lane l gets elements 2(l % 4) and 2(l % 4) + 1 of row l / 4 of matrix j in r[j].
template <class T>
__device__ void ldmatrix_x4(uint32_t (&r)[4], Shared<T> row) {
  static_assert(sizeof(T) == 2);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, and each matrix transposed on the way: lane l gets elements of column l / 4 of matrix
// j, of rows 2(l % 4) and 2(l % 4) + 1.
template <class T>
__device__ void ldmatrix_x4_transposed(uint32_t (&r)[4], Shared<T> row) {
  static_assert(sizeof(T) == 2);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The other way.
template <class T>
__device__ void stmatrix_x4(Shared<T> row, const uint32_t (&r)[4]) {
  static_assert(sizeof(T) == 2);
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

}  // namespace fastst
