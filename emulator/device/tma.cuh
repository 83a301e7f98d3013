// The emulator's counterpart of csrc/cuda/device/tma.cuh.
#pragma once

#include <tensor_map.h>

#include <device/hopper.cuh>
#include <memory>

#include "../ptx/tensor_map.h"

namespace fastst {

// As large and as aligned as the driver's, so that what kernels are given lies as on a GPU. Its
// first bytes are what the machine that executes PTX looks for.
struct alignas(64) TensorMap {
  const ptx::TensorMap* described;
  std::shared_ptr<const std::pair<ptx::TensorMap, Tiles>> both;
  char rest[104];

  const Tiles& tiles() const { return both->second; }
};
static_assert(sizeof(TensorMap) == 128);

inline TensorMap tensor_map(const Tiles& t) {
  check(t);
  ptx::TensorMap map{
      reinterpret_cast<uint64_t>(t.data),       t.rank, t.element_bytes(), {}, {}, {}, {},
      static_cast<int>(swizzle_span(t.swizzle))};
  for (int i = 0; i < t.rank; ++i) {
    map.size[i] = t.size[i], map.stride[i] = t.stride[i] * t.element_bytes();
    map.box[i] = t.box[i], map.step[i] = t.step[i];
  }
  const auto both = std::make_shared<const std::pair<ptx::TensorMap, Tiles>>(map, t);
  return {&both->first, both, {}};
}

inline void tma_prefetch(const TensorMap&) {}

template <class T, class... C>
void tma_load(Shared<T> to, const TensorMap& map, Shared<uint64_t> barrier, C... at) {
  auto& b = emulator::block();
  b.tma_load(to.byte(), map.tiles(), barrier.byte(), {static_cast<int>(at)...}, 1u << b.rank());
}

template <class T>
void tma_multicast(Shared<T> to, const TensorMap& map, Shared<uint64_t> barrier, uint16_t blocks,
                   int x, int y) {
  emulator::block().tma_load(to.byte(), map.tiles(), barrier.byte(), {x, y}, blocks);
}

template <class T, class... C>
void tma_store(const TensorMap& map, Shared<T> from, C... at) {
  emulator::block().tma_store(map.tiles(), from.byte(), {static_cast<int>(at)...});
}

inline void tma_commit() { emulator::block().tma_commit(); }

template <int Pending>
void tma_wait_read() {
  emulator::block().tma_wait_read(Pending);
}

}  // namespace fastst
