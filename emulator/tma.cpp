// The copy engine, proxies and register files of the emulator's Block.
//
// What TMA loads lands as late as can be: when nobody can run without it, the last load first.
// Until its barrier has completed its phase and has been waited for, any access is a race.
#include <tensor_map.h>

#include <cstring>

#include "emulator.h"
#include "swizzle.h"

namespace emulator {
namespace {

// Bytes of a tensor from element `first` on; null where they lie outside.
unsigned char* row(Block& b, const fastst::Tiles& t, const std::vector<int>& at, int64_t element) {
  int64_t offset = 0;
  for (int i = 0; i < t.rank; ++i) {
    const int64_t c = i == 0 ? element : at[i];
    if (c < 0 || c >= t.size[i]) return nullptr;
    offset += c * t.stride[i];
  }
  if (offset >= t.span)
    b.fail("out of bounds: a tensor map reaches element " + std::to_string(offset) +
           " of a tensor that spans " + std::to_string(t.span));
  return static_cast<unsigned char*>(t.data) + offset * t.element_bytes();
}

// f(bytes in the tensor or null, byte in the box as it lies in shared memory) for each element.
template <class F>
void each_element(Block& b, const fastst::Tiles& t, const std::vector<int>& at, F f) {
  std::vector<int> index(t.rank), place(t.rank);
  const int bytes = t.element_bytes();
  for (int64_t to = 0; to < t.box_bytes(); to += bytes) {
    for (int i = 0; i < t.rank; ++i) place[i] = at[i] + index[i] * t.step[i];
    f(row(b, t, place, place[0]), swizzled(t.swizzle, to));
    for (int i = 0; i < t.rank && ++index[i] == t.box[i]; ++i) index[i] = 0;
  }
}

void check(Block& b, const fastst::Tiles& t, int64_t shared, const std::vector<int>& at) {
  if (static_cast<int>(at.size()) != t.rank)
    b.fail("TMA with " + std::to_string(at.size()) + " coordinates for a tensor map of " +
           std::to_string(t.rank));
  const int alignment = std::max(128, 8 * swizzle_span(t.swizzle));
  if (shared % alignment)
    b.fail("misaligned: TMA box at byte " + std::to_string(shared) +
           " of shared memory, alignment " + std::to_string(alignment));
}

}  // namespace

int64_t swizzled(fastst::Swizzle mode, int64_t address) {
  const int64_t pieces = mode == fastst::Swizzle::b128  ? 7
                         : mode == fastst::Swizzle::b64 ? 3
                         : mode == fastst::Swizzle::b32 ? 1
                                                        : 0;
  return address ^ (address / 128 & pieces) * 16;
}

void Block::tma_load(int64_t to, const fastst::Tiles& from, int64_t barrier, std::vector<int> at,
                     unsigned mask) {
  emulator::check(*this, from, to, at);
  if (mask == 0 || mask >> cluster_.blocks.size())
    fail("TMA to the blocks of mask " + std::to_string(mask) + " of a cluster of " +
         std::to_string(cluster_.blocks.size()));
  std::vector<unsigned char> box(from.box_bytes());
  const size_t bytes = from.element_bytes();
  each_element(*this, from, at, [&](const unsigned char* element, int64_t place) {
    if (element) std::memcpy(&box[place], element, bytes);
  });
  for (const auto& block : cluster_.blocks)
    if (mask >> block->rank() & 1) block->receive(to, box, barrier);
}

void Block::receive(int64_t to, std::vector<unsigned char> box, int64_t barrier) {
  Mbarrier& b = reached(barrier);
  const auto size = static_cast<int64_t>(box.size());
  touch(to, size, 1, true, {b.clock, static_cast<uint32_t>(b.phase + 1)}, true);
  std::memset(&memory_[to], 0xff, size);
  b.under_way += size;
  cluster_.loads.push_back({this, to, barrier, std::move(box)});
}

void Block::deliver(const Load& load) {
  std::memcpy(&memory_[load.to], load.box.data(), load.box.size());
  Mbarrier& b = mbarriers_.at(load.barrier);
  b.under_way -= static_cast<int64_t>(load.box.size());
  b.bytes -= static_cast<int64_t>(load.box.size());
  complete(b);
}

void Block::tma_store(const fastst::Tiles& to, int64_t from, std::vector<int> at) {
  emulator::check(*this, to, from, at);
  const int number = reading("a TMA store", me().rank, 1);
  Need need;
  collect(from, to.box_bytes(), number, need);
  check(need, reading(number).what);
  each_element(*this, to, at, [&](unsigned char* element, int64_t place) {
    if (element) std::memcpy(element, &memory_[from + place], to.element_bytes());
  });
  self().open_stores.push_back(number);
}

void Block::tma_commit() {
  self().stores.push_back(std::move(self().open_stores));
  self().open_stores.clear();
}

void Block::tma_wait_read(size_t pending) {
  auto& groups = self().stores;
  for (; groups.size() > pending; groups.pop_front())
    for (const int number : groups.front()) retire(reading(number));
}

// A kernel of n threads starts with 65536 / n registers each, rounded down to a multiple of 8.
void Block::change_registers(int to, bool increase, Where where) {
  int& mine = self().registers;
  if (increase ? to < mine : to > mine)
    fail("registers " + std::string(increase ? "increased" : "decreased") + " from " +
         std::to_string(mine) + " to " + std::to_string(to));
  const int more = to - mine;
  wait([&] { return free_registers_ >= more; },
       [&] { return std::to_string(more) + " registers more, at " + line(where); });
  free_registers_ -= more, mine = to;
}

}  // namespace emulator
