// The matrix unit: what a warpgroup has issued, in order. A result does not exist before it was
// waited for: until then the accumulators hold NaN.
#pragma once

#include <array>

#include "emulator.h"

namespace emulator {

struct Instruction {
  int n;
  bool half, a_in_registers, a_along_m, b_along_n;
  uint64_t a, b;  // descriptors
  bool accumulate;

  bool operator==(const Instruction&) const = default;
};

// Accumulators of a warpgroup: 64 × 256, row by row, of which the first n columns are used.
using Tile = std::array<float, 64 * 256>;

struct Wgmma {
  Instruction instruction;
  Where at;
  std::string where;  // the same in words
  int arrived = 0, reading = 0;
  bool computed = false;
  std::array<bool, 4> came{};  // somebody of each warp
  std::array<Need, 4> a_need;
  Need b_need;
  std::array<std::array<uint32_t, 4>, kWarpgroup> a;  // as they were when it was issued
  std::array<const uint32_t*, kWarpgroup> a_at;
  std::shared_ptr<Tile> tile;
};

struct Warpgroup {
  struct Pending {  // accumulators that this thread must not touch
    float* d;
    int n, open;
    std::shared_ptr<Tile> tile;
  };
  struct Member {
    size_t issued = 0;
    bool fenced = false;
    std::vector<Pending> pending;
    std::vector<std::shared_ptr<Wgmma>> open;
    std::deque<std::vector<std::shared_ptr<Wgmma>>> groups;
  };
  std::array<Member, kWarpgroup> member;
  std::deque<std::shared_ptr<Wgmma>> queue;  // issued by some and not by all
  size_t first = 0;                          // how many were before them
};

void wgmma(const Instruction&, float* d, const uint32_t* a, Where);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(size_t pending, Where);

}  // namespace emulator
