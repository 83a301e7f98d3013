// Everything a kernel does that is not arithmetic: memory access, barriers, asynchronous copies.
//
// Kernels include this header as <device/primitives.cuh>. The emulator puts a header of the same
// name before it on the include path, with checked types for Global and Shared; so kernels name
// memory only through these types and never through raw pointers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastst {

template <class T>
using Global = T*;
template <class T>
using Shared = T*;

// A pointer to `count` elements of global memory.
template <class T>
__host__ Global<T> global(const void* data, int64_t) {
  return static_cast<T*>(const_cast<void*>(data));
}

// Dynamic shared memory from `byte` on; aligned to the period of the 128-byte swizzle.
template <class T>
__device__ Shared<T> shared(int byte) {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  return reinterpret_cast<T*>(dynamic_shared + byte);
}

// V neighbouring elements, moved by one instruction: the pointer must be aligned to all of them.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T lane[V];
};

template <int V, class T>
__device__ Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <class T, int V>
__device__ void store(T* to, Pack<T, V> pack) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

__device__ inline void sync_block() { __syncthreads(); }

// Barrier `id` (1 to 15) of the first `threads` threads to come, a multiple of 32.
__device__ inline void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void sync_warp() { __syncwarp(); }

template <class T>
__device__ T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- 2^v and 1/v, a few units of the last place off

__device__ inline float exp2_approx(float v) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}

__device__ inline float reciprocal_approx(float v) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}

// max(v, 0), NaN where v is.
__device__ inline float relu(float v) {
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(v));
  return v;
}

// Whether it holds for all lanes of the warp.
__device__ inline bool warp_all(bool holds) { return __all_sync(0xffffffffu, holds); }

// ---- asynchronous copies of 16 bytes, zeros where not valid; before sm_80 a plain copy

template <class T>
__device__ void copy16_async(T* to, const T* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *reinterpret_cast<uint4*>(to) =
      valid ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}

__device__ inline void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most `Pending` of this thread's groups are under way. Other threads need a barrier too.
template <int Pending>
__device__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// ---- mbarriers: arrivals and bytes to come, in phases of alternating parity

__device__ inline void mbarrier_init(Shared<uint64_t> barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ inline void mbarrier_arrive(Shared<uint64_t> barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Until the phase of this parity has completed.
__device__ inline void mbarrier_wait(Shared<uint64_t> barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n .reg .pred done;\n"
      "again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n .reg .pred done;\n"
      "again:\n mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

}  // namespace fastst
