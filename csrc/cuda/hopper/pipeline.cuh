// A ring of shared-memory stages between those who fill them and warpgroups that consume.
#pragma once

#include <device/tensor.cuh>
#include <device/tma.cuh>

namespace fastst {

constexpr int kWarpGroup = 128;
constexpr int kConsumers = 2;     // warpgroups that multiply, beside the producer's
constexpr int kSwizzleRow = 64;   // elements of 16 bits in one 128-byte row of a swizzled tile
constexpr int kTileAlign = 1024;  // of such a tile: its pattern repeats every 8 rows
constexpr int kMaxStages = 16;
constexpr int kMaxCluster = 2;
constexpr int kSharedLimit = 227 * 1024;     // bytes of a block of compute capability 9.0
constexpr int kRingBytes = 16 * kMaxStages;  // of its barriers

inline int tiles_of(int64_t size, int64_t tile) { return narrow_size(divide_up(size, tile)); }

// Rows of 64 elements of the reduction, one for each output channel of a tile; box: a span of the
// swizzle of every row of a tile.
inline TensorMap packed_weight(Dtype dtype, const Array& rows, int columns,
                               Swizzle swizzle = Swizzle::b128) {
  return tensor_map({.dtype = dtype,
                     .data = rows.data,
                     .span = rows.count,
                     .rank = 2,
                     .size = {kSwizzleRow, rows.count / kSwizzleRow},
                     .stride = {1, kSwizzleRow},
                     .box = {swizzle_span(swizzle) / 2, columns},
                     .step = {1, 1},
                     .swizzle = swizzle});
}

// Boxes of positions of a channels-last tensor whose frames are evenly apart.
inline TensorMap position_boxes(Dtype dtype, const View& x, std::array<int, 5> box,
                                std::array<int, 5> step, Swizzle swizzle = Swizzle::b128) {
  return tensor_map({.dtype = dtype,
                     .data = x.data,
                     .span = x.span(),
                     .rank = 4,
                     .size = {x.size[1], x.size[4], x.size[3], x.size[0] * x.size[2]},
                     .stride = {1, x.stride[4], x.stride[3], x.stride[x.size[2] > 1 ? 2 : 0]},
                     .box = box,
                     .step = step,
                     .swizzle = swizzle});
}

// A block's way over the tiles: the blocks of a cluster go together, each to tiles of its own.
struct Walk {
  int rank, first, step;

  __device__ explicit Walk(int cluster)
      : rank(cluster > 1 ? cluster_rank() : 0),
        first(static_cast<int>(blockIdx.x) / cluster),
        step(static_cast<int>(gridDim.x) / cluster) {}
};

// What all blocks of a cluster read at the same time: they take turns in copying it to all of them.
class Multicast {
 public:
  __device__ explicit Multicast(int cluster)
      : cluster_(cluster), rank_(cluster > 1 ? cluster_rank() : 0) {}

  template <class T>
  __device__ void load(Shared<T> to, const TensorMap& map, Shared<uint64_t> barrier, int x, int y) {
    if (turn_ == rank_) {
      if (cluster_ > 1)
        tma_multicast(to, map, barrier, static_cast<uint16_t>((1 << cluster_) - 1), x, y);
      else
        tma_load(to, map, barrier, x, y);
    }
    if (++turn_ == cluster_) turn_ = 0;
  }

 private:
  int cluster_, rank_, turn_ = 0;
};

// Where blocks of a cluster copy to each other's stages, a stage is free when it is in all of them.
class Ring {
 public:
  // `byte`: where its barriers lie; cluster: blocks that copy to each other's stages.
  __device__ Ring(int byte, int stages, int cluster = 1)
      : full_(shared<uint64_t>(byte)),
        empty_(shared<uint64_t>(byte + 8 * kMaxStages)),
        stages_(stages),
        cluster_(cluster) {}

  // By one thread, before `begin`. A stage is given back by every consuming warp, and filled by one
  // thread's copies or by the stores of `producers` warps.
  __device__ void init(int warps, int producers = 1) const {
    for (int i = 0; i < stages_; ++i) {
      mbarrier_init(full_ + i, producers);
      mbarrier_init(empty_ + i, warps * cluster_);
    }
  }
  // By all threads: nobody touches a barrier of any block before it exists.
  __device__ void begin() const {
    if (cluster_ > 1)
      cluster_sync();
    else
      sync_block();
  }
  // The producer that copies, at last: no other block reaches this one's shared memory any more.
  __device__ void end() {
    if (cluster_ == 1) return;
    for (int i = 0; i < stages_; ++i) acquire(), advance();
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
  // A consuming warp, together: gives a stage back, to all who may fill it.
  __device__ void release(int stage) const {
    sync_warp();
    if (threadIdx.x % 32 != 0) return;
    if (cluster_ == 1) return mbarrier_arrive(empty_ + stage);
    // By one lane: with one for each block, the register that tells which was missing elsewhere.
    static_assert(kMaxCluster == 2);
    mbarrier_arrive_at(empty_ + stage, 0), mbarrier_arrive_at(empty_ + stage, 1);
  }

  __device__ void advance() {
    if (++stage_ == stages_) stage_ = 0, phase_ ^= 1;
  }

  // Where in the ring somebody is, for another who goes on from there.
  __device__ int place() const { return 2 * stage_ + phase_; }
  __device__ void go_on(int place) { stage_ = place / 2, phase_ = place % 2; }

 private:
  Shared<uint64_t> full_, empty_;
  int stages_, cluster_, stage_ = 0, phase_ = 0;
};

// Two warpgroups that consume one ring by turns, each the stages of tiles of its own: one
// multiplies while the other writes what it has multiplied.
//
// A turn ends when its last stage has been waited for, ahead of its products. So a stage is waited
// for only when all that come before it in the ring have been filled: else the parity of its
// barrier would not tell this round from the one before last.
class Turns {
 public:
  // `byte`: where a barrier and a place in the ring lie for each; own: 0 or 1, which this is.
  __device__ Turns(int byte, int own)
      : begins_(shared<uint64_t>(byte)),
        place_(shared<int>(byte + 16)),
        own_(own),
        phase_(1 - own) {}

  // By one thread, before the ring's `begin`.
  __device__ void init() const {
    for (int i = 0; i < 2; ++i) mbarrier_init(begins_ + i, kWarpGroup / 32);
    place_[0] = 0;
  }
  // Until the other's turn has ended: the ring goes on where that left it. Before the first of all
  // turns there is none.
  __device__ void begin(Ring& ring) {
    mbarrier_wait(begins_ + own_, phase_);
    phase_ ^= 1;
    ring.go_on(place_[own_]);
  }
  // A warp, together.
  __device__ void end(const Ring& ring) const {
    sync_warp();
    if (threadIdx.x % 32 != 0) return;
    if (threadIdx.x % kWarpGroup == 0) place_[1 - own_] = ring.place();
    mbarrier_arrive(begins_ + (1 - own_));
  }

 private:
  Shared<uint64_t> begins_;
  Shared<int> place_;
  int own_, phase_;
};

}  // namespace fastst
