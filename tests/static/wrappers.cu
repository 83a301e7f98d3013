// Every wrapper of csrc/cuda/device/{hopper,tma,wgmma}.cuh, for the compiler alone: never launched.
#include <device/tma.cuh>
#include <device/wgmma.cuh>

using namespace fastst;

template <class T, int N, Major MajorA, Major MajorB>
__global__ void __launch_bounds__(128) from_shared(float* out) {
  const Shared<T> a = shared<T>(0), b = shared<T>(8192);
  float d[N / 2];
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 2; ++k)
    wgmma<T, N, MajorA, MajorB>(d, descriptor(a) + 32 * k, descriptor(b) + 32 * k, k > 0);
  wgmma_commit();
  wgmma_wait<0>();
  keep(d);
  float sum = 0;
  for (int i = 0; i < N / 2; ++i) sum += d[i];
  out[threadIdx.x] = sum;
}

template <class T, int N, Major MajorB>
__global__ void __launch_bounds__(128) from_registers(float* out) {
  const Shared<T> a = shared<T>(0), b = shared<T>(8192);
  float d[N / 2];
  uint32_t fragments[2][4];
#pragma unroll
  for (int k = 0; k < 2; ++k)
    if constexpr (MajorB == Major::k)
      ldmatrix_x4(fragments[k], a + 64 * (threadIdx.x % 64) + 16 * k);
    else
      ldmatrix_x4_transposed(fragments[k], a + 64 * (threadIdx.x % 64) + 16 * k);
  wgmma_fence(fragments);
#pragma unroll
  for (int k = 0; k < 2; ++k) wgmma<T, N, MajorB>(d, fragments[k], descriptor(b) + 32 * k, k > 0);
  wgmma_commit();
  wgmma_wait<0>();
  keep(d);
  float sum = 0;
  for (int i = 0; i < N / 2; ++i) sum += d[i];
  out[threadIdx.x] = sum;
}

__global__ void __launch_bounds__(384, 1) copies(const __grid_constant__ TensorMap map) {
  const Shared<uint64_t> full = shared<uint64_t>(0);
  const Shared<__half> s = shared<__half>(1024);
  cluster_sync();
  if (threadIdx.x >= 128) {
    registers_increase<240>();
    mbarrier_wait(full, 0);
    uint32_t words[4] = {1, 2, 3, threadIdx.x};
    stmatrix_x4(s + 8 * threadIdx.x, words);
    fence_proxy_async();
    sync_named(1, 256);
    if (threadIdx.x > 128) return;
    tma_store(map, s, 1);
    tma_store(map, s, 1, 2);
    tma_store(map, s, 1, 2, 3);
    tma_store(map, s, 1, 2, 3, 4);
    tma_store(map, s, 1, 2, 3, 4, 5);
    tma_commit();
    tma_wait_read<0>();
    return;
  }
  registers_decrease<24>();
  if (threadIdx.x > 0) return;
  tma_prefetch(map);
  mbarrier_init(full, 1);
  mbarrier_fence_init();
  mbarrier_arrive_expect(full, 4096);
  tma_load(s, map, full, -1);
  tma_load(s, map, full, -1, 2);
  tma_load(s, map, full, -1, 2, 3);
  tma_load(s, map, full, -1, 2, 3, 4);
  tma_load(s, map, full, -1, 2, 3, 4, 5);
  tma_multicast(s, map, full, 3, -1, 2);
  mbarrier_arrive_at(full, cluster_rank() ^ 1);
}

constexpr Major k = Major::k, mn = Major::mn;
#define EVERY(N, ...) template __global__ void from_shared<__nv_bfloat16, N, k, k>(float*);
FASTST_EVERY_N(EVERY)
#undef EVERY
#define SOME(N)                                                   \
  template __global__ void from_shared<__half, N, k, mn>(float*); \
  template __global__ void from_shared<__half, N, mn, k>(float*); \
  template __global__ void from_registers<__half, N, k>(float*);  \
  template __global__ void from_registers<__nv_bfloat16, N, mn>(float*);
SOME(48)
SOME(192)
