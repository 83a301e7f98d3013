// A ring of shared-memory stages between those who fill them and warpgroups that consume.
#pragma once

#include <device/tensor.cuh>
#include <device/tma.cuh>

namespace fastst {

constexpr int kWarpGroup = 128;
constexpr int kSwizzleRow = 64;   // elements of 16 bits in one 128-byte row of a swizzled tile
constexpr int kTileAlign = 1024;  // of such a tile: its pattern repeats every 8 rows
constexpr int kMaxStages = 16;
constexpr int kSharedLimit = 227 * 1024;     // bytes of a block of compute capability 9.0
constexpr int kRingBytes = 16 * kMaxStages;  // of its barriers

// Rows of 64 elements of the reduction, one for each output channel of a tile; box: one tile.
inline TensorMap packed_weight(Dtype dtype, const Array& rows, int columns) {
  return tensor_map({.dtype = dtype,
                     .data = rows.data,
                     .span = rows.count,
                     .rank = 2,
                     .size = {kSwizzleRow, rows.count / kSwizzleRow},
                     .stride = {1, kSwizzleRow},
                     .box = {kSwizzleRow, columns},
                     .step = {1, 1},
                     .swizzle = Swizzle::b128});
}

class Ring {
 public:
  // `byte`: where its barriers lie.
  __device__ Ring(int byte, int stages)
      : full_(shared<uint64_t>(byte)),
        empty_(shared<uint64_t>(byte + 8 * kMaxStages)),
        stages_(stages) {}

  // By one thread, before the block's barrier. A stage is given back by every consuming warp, and
  // filled by one thread's copies or by the stores of `producers` warps.
  __device__ void init(int warps, int producers = 1) const {
    for (int i = 0; i < stages_; ++i) {
      mbarrier_init(full_ + i, producers);
      mbarrier_init(empty_ + i, warps);
    }
  }

  __device__ int stage() const { return stage_; }
  __device__ Shared<uint64_t> full() const { return full_ + stage_; }

  // Producers that store: once the stage is free; and when it is filled.
  __device__ void acquire() const { mbarrier_wait(empty_ + stage_, phase_ ^ 1); }
  __device__ void publish() const {
    sync_warp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(full());
  }
  // The producer that copies: announces what will be copied to a stage; first waits until it is
  // free.
  __device__ void expect(int bytes) const { mbarrier_arrive_expect(full(), bytes); }
  __device__ void acquire(int bytes) const {
    acquire();
    expect(bytes);
  }
  // A consumer: until the stage is filled.
  __device__ void wait() const { wait(stage_); }
  // Another stage of the same round.
  __device__ void wait(int stage) const { mbarrier_wait(full_ + stage, phase_); }
  // A consuming warp, together: gives a stage back.
  __device__ void release(int stage) const {
    sync_warp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty_ + stage);
  }

  __device__ void advance() {
    if (++stage_ == stages_) stage_ = 0, phase_ ^= 1;
  }

 private:
  Shared<uint64_t> full_, empty_;
  int stages_, stage_ = 0, phase_ = 0;
};

}  // namespace fastst
