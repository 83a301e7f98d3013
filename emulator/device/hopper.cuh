// The emulator's counterpart of csrc/cuda/device/hopper.cuh.
#pragma once

#include <device/primitives.cuh>

namespace fastst {

inline void mbarrier_fence_init() { emulator::block().mbarrier_fence(); }

inline void mbarrier_arrive_expect(Shared<uint64_t> barrier, int bytes) {
  emulator::block().mbarrier_arrive(barrier.byte(), bytes);
}

inline int cluster_rank() { return emulator::block().rank(); }

inline void cluster_sync(Where where = Where::current()) {
  emulator::block().cluster().sync(where);
}

inline void mbarrier_arrive_at(Shared<uint64_t> barrier, int block) {
  emulator::block().mbarrier_arrive_at(barrier.byte(), block);
}

inline void fence_proxy_async() { emulator::block().fence_proxy(); }

template <int N>
void registers_increase(Where where = Where::current()) {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  emulator::block().change_registers(N, true, where);
}

template <int N>
void registers_decrease(Where where = Where::current()) {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  emulator::block().change_registers(N, false, where);
}

// f(j, addresses of the rows of matrix j), as the lanes of the warp give them.
template <class F>
void with_rows(int64_t row, const char* name, Where where, F f) {
  auto& b = emulator::block();
  const int lane = b.self().rank % emulator::kWarp;
  if (b.warp_size() != emulator::kWarp) b.fail(std::string(name) + " by less than a warp");
  if (row % 16) b.fail(std::string("misaligned: row of ") + name + " at " + std::to_string(row));
  b.slots()[lane] = static_cast<uint64_t>(row);
  b.meet(b.warp(), emulator::kWarp, name, where, false);
  for (int j = 0; j < 4; ++j) f(j, &b.slots()[8 * j]);
  b.meet(b.warp(), emulator::kWarp, name, where, false);
}

template <class T>
void ldmatrix_x4(uint32_t (&r)[4], Shared<T> row, Where where = Where::current()) {
  static_assert(sizeof(T) == 2);
  const int lane = emulator::block().self().rank % emulator::kWarp;
  with_rows(row.byte(), "ldmatrix", where, [&](int j, const uint64_t* rows) {
    emulator::block().read_shared(int64_t(rows[lane / 4]) + lane % 4 * 4, &r[j], 4, 4);
  });
}

template <class T>
void ldmatrix_x4_transposed(uint32_t (&r)[4], Shared<T> row, Where where = Where::current()) {
  static_assert(sizeof(T) == 2);
  const int lane = emulator::block().self().rank % emulator::kWarp;
  with_rows(row.byte(), "ldmatrix", where, [&](int j, const uint64_t* rows) {
    uint16_t both[2];
    for (int i = 0; i < 2; ++i)
      emulator::block().read_shared(int64_t(rows[lane % 4 * 2 + i]) + lane / 4 * 2, &both[i], 2, 2);
    std::memcpy(&r[j], both, 4);
  });
}

template <class T>
void stmatrix_x4(Shared<T> row, const uint32_t (&r)[4], Where where = Where::current()) {
  static_assert(sizeof(T) == 2);
  const int lane = emulator::block().self().rank % emulator::kWarp;
  with_rows(row.byte(), "stmatrix", where, [&](int j, const uint64_t* rows) {
    emulator::block().write_shared(int64_t(rows[lane / 4]) + lane % 4 * 4, &r[j], 4, 4);
  });
}

}  // namespace fastst
