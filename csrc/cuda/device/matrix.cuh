// How Hopper's matrix unit sees matrices: in shared memory through descriptors, in registers as
// fragments. Nothing in here touches memory; the emulator has a reading of its own, from PTX's
// text.
#pragma once

#include <swizzle.h>

#include <cstdint>
#include <device/primitives.cuh>

namespace fastst {

// Along which dimension neighbours of a tile in shared memory lie: the reduction's, or the other.
enum class Major { k, mn };

// A tile in shared memory as wgmma reads it.
struct Descriptor {
  uint64_t bits;

  // The same tile from `bytes` on, a multiple of 16: the next 16 of the reduction are 32 bytes on
  // in rows that lie along K, because the swizzle is a function of the address alone.
  __device__ Descriptor operator+(int bytes) const { return {bits + (bytes >> 4)}; }
};

// A tile whose rows are one swizzle span long (128 bytes: 64 elements) and are stored one after
// another, as TMA leaves them. Eight rows make a group.
//
//   Major::k   rows of the matrix. `groups`: bytes from one group of 8 rows to the next.
//   Major::mn  rows of the transposed matrix, that is one per k. `groups`: bytes from 8 k to the
//              next 8; `spans`: bytes from one span of M or N to the next.
//
// `at` starts a group: aligned to 8 spans, or that plus a step along a row. 0 groups: 8 spans.
template <class T>
__device__ Descriptor descriptor(Shared<T> at, Swizzle swizzle = Swizzle::b128, int groups = 0,
                                 int spans = 16) {
  if (groups == 0) groups = 8 * (16 << int(swizzle));
  const auto field = [](uint64_t bytes) { return (bytes & 0x3ffff) >> 4; };
  const uint64_t code = 4 - int(swizzle);  // 1 for 128 bytes, 2 for 64, 3 for 32
  return {field(shared_address(at)) | field(spans) << 16 | field(groups) << 32 | code << 62};
}

// ---- fragments: what of a 64-row tile thread `t` (0 to 127) of a warpgroup has in its registers

struct Place {
  int row, column;
};

// Register i of the accumulators: of 64 × N, float.
__host__ __device__ constexpr Place accumulator(int t, int i) {
  return {t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + t % 4 * 2 + i % 2};
}

// Element i (0 to 7; two in a register, the lower half first) of A in registers: of 64 × 16.
// Accumulators 8j to 8j + 7, rounded and packed in order, are A of columns 16j to 16j + 15.
__host__ __device__ constexpr Place a_fragment(int t, int i) { return accumulator(t, i); }

}  // namespace fastst
