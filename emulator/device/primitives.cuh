// The emulator's counterpart of csrc/cuda/device/primitives.cuh: the same names, every access
// checked.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../emulator.h"

namespace fastst {

using emulator::Where;

// A pointer that knows the tensor it points into.
template <class T>
class Global {
 public:
  Global() = default;
  Global(T* at, T* begin, T* end) : at_(at), begin_(begin), end_(end) {}

  explicit operator bool() const { return at_ != nullptr; }
  operator Global<const T>() const
    requires(!std::is_const_v<T>)
  {
    return {at_, begin_, end_};
  }
  Global operator+(int64_t n) const { return {at_ + n, begin_, end_}; }
  T& operator[](int64_t n) const { return *checked(n, 1); }

  T* checked(int64_t n, int count) const {
    T* const first = at_ + n;
    if (first < begin_ || first + count > end_)
      emulator::block().fail("out of bounds: " + std::to_string(count) + " elements at " +
                             std::to_string(first - begin_) + " of a tensor that spans " +
                             std::to_string(end_ - begin_));
    if (reinterpret_cast<uintptr_t>(first) % (count * sizeof(T)))
      emulator::block().fail("misaligned: global access of " + std::to_string(count * sizeof(T)) +
                             " bytes");
    return first;
  }

 private:
  T *at_ = nullptr, *begin_ = nullptr, *end_ = nullptr;
};

template <class T>
Global<T> global(const void* data, int64_t count) {
  T* const begin = static_cast<T*>(const_cast<void*>(data));
  return {begin, begin, begin + count};
}

template <class T>
class Shared {
 public:
  explicit Shared(int64_t byte) : byte_(byte) {}

  struct Element {
    int64_t byte;
    operator T() const {
      T value;
      emulator::block().read_shared(byte, &value, sizeof(T), alignof(T));
      return value;
    }
    const Element& operator=(const T& value) const {
      emulator::block().write_shared(byte, &value, sizeof(T), alignof(T));
      return *this;
    }
    const Element& operator=(const Element& other) const { return *this = T(other); }
  };

  Element operator[](int64_t n) const { return {byte_ + n * int64_t(sizeof(T))}; }
  Shared operator+(int64_t n) const { return Shared(byte_ + n * int64_t(sizeof(T))); }
  int64_t byte() const { return byte_; }

 private:
  int64_t byte_;
};

template <class T>
Shared<T> shared(int byte) {
  return Shared<T>(byte);
}

template <class T>
uint32_t shared_address(Shared<T> p) {
  return static_cast<uint32_t>(p.byte());
}

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T lane[V];
};

template <int V, class T>
auto load(Global<T> from) {
  Pack<std::remove_const_t<T>, V> pack;
  std::memcpy(&pack, from.checked(0, V), sizeof(pack));
  return pack;
}

template <int V, class T>
auto load(Shared<T> from) {
  Pack<T, V> pack;
  emulator::block().read_shared(from.byte(), &pack, sizeof(pack), sizeof(pack));
  return pack;
}

template <class T, int V>
void store(Global<T> to, Pack<T, V> pack) {
  std::memcpy(to.checked(0, V), &pack, sizeof(pack));
}

template <class T, int V>
void store(Shared<T> to, Pack<T, V> pack) {
  emulator::block().write_shared(to.byte(), &pack, sizeof(pack), sizeof(pack));
}

inline void sync_block(Where where = Where::current()) {
  auto& b = emulator::block();
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  b.meet(b.named(0), threads, "sync_block", where, false);
}

inline void sync_named(int id, int threads, Where where = Where::current()) {
  auto& b = emulator::block();
  if (id < 1 || id > 15 || threads % emulator::kWarp)
    b.fail("named barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads");
  b.meet(b.named(id), threads, "named barrier " + std::to_string(id), where, true);
}

inline void sync_warp(Where where = Where::current()) {
  auto& b = emulator::block();
  b.meet(b.warp(), b.warp_size(), "sync_warp", where, true);
}

template <class T>
T shuffle_xor(T value, int lanes, Where where = Where::current()) {
  static_assert(sizeof(T) <= 8);
  auto& b = emulator::block();
  const int lane = b.self().rank % emulator::kWarp;
  if ((lane ^ lanes) >= b.warp_size()) b.fail("shuffle with a lane that does not exist");
  std::memcpy(&b.slots()[lane], &value, sizeof(T));
  b.meet(b.warp(), b.warp_size(), "shuffle_xor", where, false);
  std::memcpy(&value, &b.slots()[lane ^ lanes], sizeof(T));
  b.meet(b.warp(), b.warp_size(), "shuffle_xor", where, false);
  return value;
}

inline float relu(float v) { return v < 0 ? 0.0f : v; }

inline bool warp_all(bool holds, Where where = Where::current()) {
  auto& b = emulator::block();
  b.slots()[b.self().rank % emulator::kWarp] = holds;
  b.meet(b.warp(), b.warp_size(), "warp_all", where, false);
  bool all = true;
  for (int lane = 0; lane < b.warp_size(); ++lane) all &= b.slots()[lane] != 0;
  b.meet(b.warp(), b.warp_size(), "warp_all", where, false);
  return all;
}

inline float exp2_approx(float v) { return std::exp2(v); }
inline float reciprocal_approx(float v) { return 1 / v; }

template <class T>
void copy16_async(Shared<T> to, Global<const T> from, bool valid) {
  emulator::block().issue(to.byte(), valid ? from.checked(0, 16 / int(sizeof(T))) : nullptr);
}

inline void copy_commit() { emulator::block().commit(); }

template <int Pending>
void copy_wait() {
  emulator::block().wait_copies(Pending);
}

inline void mbarrier_init(Shared<uint64_t> barrier, int arrivals) {
  emulator::block().mbarrier_init(barrier.byte(), arrivals);
}

inline void mbarrier_arrive(Shared<uint64_t> barrier) {
  emulator::block().mbarrier_arrive(barrier.byte());
}

inline void mbarrier_wait(Shared<uint64_t> barrier, int parity, Where where = Where::current()) {
  emulator::block().mbarrier_wait(barrier.byte(), parity, where);
}

}  // namespace fastst
