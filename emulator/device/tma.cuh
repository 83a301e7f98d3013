// The emulator's counterpart of csrc/cuda/device/tma.cuh.
#pragma once

#include <tensor_map.h>

#include <device/hopper.cuh>

namespace fastst {

struct TensorMap {
  Tiles tiles;
};

inline TensorMap tensor_map(const Tiles& t) { return check(t), TensorMap{t}; }

inline void tma_prefetch(const TensorMap&) {}

template <class T, class... C>
void tma_load(Shared<T> to, const TensorMap& map, Shared<uint64_t> barrier, C... at) {
  auto& b = emulator::block();
  b.tma_load(to.byte(), map.tiles, barrier.byte(), {static_cast<int>(at)...}, 1u << b.rank());
}

template <class T>
void tma_multicast(Shared<T> to, const TensorMap& map, Shared<uint64_t> barrier, uint16_t blocks,
                   int x, int y) {
  emulator::block().tma_load(to.byte(), map.tiles, barrier.byte(), {x, y}, blocks);
}

template <class T, class... C>
void tma_store(const TensorMap& map, Shared<T> from, C... at) {
  emulator::block().tma_store(map.tiles, from.byte(), {static_cast<int>(at)...});
}

inline void tma_commit() { emulator::block().tma_commit(); }

template <int Pending>
void tma_wait_read() {
  emulator::block().tma_wait_read(Pending);
}

}  // namespace fastst
