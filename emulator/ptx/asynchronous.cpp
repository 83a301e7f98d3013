// Copies that go on beside the threads, the barriers that tell of them, and the proxies' fences.
#include <algorithm>
#include <cstring>

#include "numbers.h"

namespace ptx {

namespace {

constexpr uint64_t kRankMask = (uint64_t{1} << kRankBits) - 1;

// The block and the place in it of a shared address of 32 or 64 bits.
std::pair<Block*, uint32_t> shared_place(Warp& w, uint64_t address) {
  const uint64_t at = address & ~kWindow, rank = at >> kRankBits;
  if (rank > w.block->cluster->blocks.size())
    throw Error("a shared address of a block that the cluster has not");
  Block* block = rank ? w.block->cluster->blocks[rank - 1].get() : w.block;
  return {block, static_cast<uint32_t>(at & kRankMask)};
}

// ---- cp.async: r = to, from[, bytes that are read]; number: bytes

void copy_async(Warp& w, const Instruction& i, Lanes lanes) {
  struct Copy {
    uint32_t to, read;
    const uint8_t* from;
  };
  const auto size = static_cast<uint32_t>(i.number);
  Launch& launch = *w.block->cluster->launch;
  Shared& shared = w.block->shared;
  std::vector<Copy> copies;
  Longs sources, targets;
  Lanes reading = 0;
  each(lanes, [&](int l) {
    const uint32_t read = i.r.size() > 2 ? w.value(i.r[2], l) : size;
    if (read > size) throw Error("cp.async reads more than it writes");
    const Place to = launch.place(w, w.address(i, 0, l, 0) | kSharedWindow, size, true, l);
    const uint8_t* from = nullptr;
    if (read) {
      const uint64_t at = w.address(i, 1, l, 1);
      if (at % size) throw Error("cp.async from an address that is no multiple of its bytes");
      from = launch.place(w, at, 1, false, l).bytes;
      launch.place(w, at + read - 1, 1, false, l);
    }
    shared.will_write(to.address, size, "cp.async");
    copies.push_back({to.address, read, from});
    sources[l] = reinterpret_cast<uint64_t>(from), targets[l] = to.address;
    if (read) reading |= Lanes{1} << l;
  });
  if (launch.count) {
    if (reading) launch.counters.of_global(i, reading, sources, size, false);
    launch.counters.of_shared(i, lanes, targets, size);
  }
  w.copies.open.push_back([&w, &shared, copies = std::move(copies), size] {
    for (const Copy& copy : copies) {
      if (copy.read) std::memcpy(&shared.bytes[copy.to], copy.from, copy.read);
      std::memset(&shared.bytes[copy.to + copy.read], 0, size - copy.read);
      shared.wrote(copy.to, size);
      w.wrote_unfenced(copy.to, size);
    }
  });
}
void copies_commit(Warp& w, const Instruction&, Lanes) { w.copies.commit(); }
void copies_wait(Warp& w, const Instruction& i, Lanes) { w.copies.wait(i.number); }
void copies_wait_all(Warp& w, const Instruction&, Lanes) {
  w.copies.commit();
  w.copies.wait(0);
}

// ---- mbarriers

Mbarrier& mbarrier_at(Block& block, uint32_t address) {
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end())
    throw Error("no mbarrier was made at " + std::to_string(address) + " of shared memory");
  return found->second;
}

void settle(Cluster& cluster, Mbarrier& b) {
  if (b.pending < 0) throw Error("more arrivals at an mbarrier than it expects");
  if (b.pending || b.bytes) return;
  b.pending = b.expected;
  ++b.phase;
  ++cluster.progress;
}

void mbarrier_init(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const auto [block, at] = shared_place(w, w.address(i, 0, l));
    const auto count = static_cast<uint32_t>(w.value(i.r[1], l));
    block->mbarriers[at] = {count, count, 0, 0};
  });
}
void mbarrier_end(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const auto [block, at] = shared_place(w, w.address(i, 0, l));
    block->mbarriers.erase(at);
  });
}

// r = state, address[, count or bytes]; number: 1 expects bytes, 2 does not arrive
void mbarrier_arrive(Warp& w, const Instruction& i, Lanes lanes) {
  auto& ordered = w.block->ordered;
  ordered.insert(ordered.end(), w.unfenced.begin(), w.unfenced.end());
  w.unfenced.clear();
  const int first = i.writes;
  each(lanes, [&](int l) {
    const auto [block, at] = shared_place(w, w.address(i, first, l));
    Mbarrier& b = mbarrier_at(*block, at);
    const uint64_t given =
        i.r.size() > static_cast<size_t>(first) + 1 ? w.value(i.r[first + 1], l) : 1;
    if (i.writes) w.set(i.r[0], l, b.phase);
    if (i.number) b.bytes += given;
    if (i.number != 2) b.pending -= i.number ? 1 : given;
    settle(*w.block->cluster, b);
  });
}

// r = whether the phase is over, address, state or parity; number: by parity
void mbarrier_wait(Warp& w, const Instruction& i, Lanes lanes) {
  bool over = false;
  each(lanes, [&](int l) {
    const auto [block, at] = shared_place(w, w.address(i, 1, l));
    const Mbarrier& b = mbarrier_at(*block, at);
    const uint64_t told = w.value(i.r[2], l);
    const bool is = i.number ? (b.phase & 1) != (told & 1) : b.phase > told;
    w.set(i.r[0], l, is);
    over |= is;
  });
  if (!over) w.wait(Wait::progress);
}

// ---- bulk copies of tensors

int64_t swizzled(int span, int64_t address) {
  const int64_t mask = span == 128 ? 7 : span == 64 ? 3 : span == 32 ? 1 : 0;
  return address ^ (address >> 7 & mask) << 4;
}

const TensorMap& map_at(const Launch& launch, uint64_t address) {
  const uint64_t at = address & ~kWindow;
  if ((address & kWindow) != kParameterWindow || at % 64 || at + 128 > launch.parameters.size())
    throw Error("no tensor map lies where a bulk copy looks for one");
  const TensorMap* map;
  std::memcpy(&map, &launch.parameters[at], sizeof map);
  return *map;
}

int64_t box_bytes(const TensorMap& map) {
  int64_t bytes = map.element;
  for (int n = 0; n < map.rank; ++n) bytes *= map.box[n];
  return bytes;
}

// f(byte in the box, the element's address or 0 outside of the tensor), element by element.
template <class F>
void each_element(const TensorMap& map, const std::array<int32_t, 5>& from, F f) {
  std::array<int32_t, 5> index{};
  const int64_t bytes = box_bytes(map);
  for (int64_t at = 0; at < bytes; at += map.element) {
    uint64_t address = map.base;
    for (int n = 0; n < map.rank && address; ++n) {
      const int64_t c = int64_t{from[n]} + int64_t{index[n]} * map.step[n];
      if (c < 0 || c >= map.size[n])
        address = 0;
      else
        address += c * map.stride[n];
    }
    f(at, address);
    for (int n = 0; n < map.rank && ++index[n] == map.box[n]; ++n) index[n] = 0;
  }
}

struct Box {
  const TensorMap* map;
  std::array<int32_t, 5> from{};
};

// `first`: of the map and the coordinates behind it.
Box box_of(Warp& w, const Instruction& i, int first, int lane, int which) {
  Box box{&map_at(*w.block->cluster->launch, w.address(i, first, lane, which)), {}};
  for (int n = 0; n < box.map->rank; ++n)
    box.from[n] = static_cast<int32_t>(w.value(i.r[first + 1 + n], lane));
  return box;
}

void check_alignment(const TensorMap& map, uint32_t at) {
  if (at % std::max(128, 8 * map.swizzle))
    throw Error("a box of a bulk copy at byte " + std::to_string(at) + " of shared memory");
}

// r = to, map, coordinates…, mbarrier[, blocks]; number: coordinates
void bulk_load(Warp& w, const Instruction& i, Lanes lanes) {
  const int rank = static_cast<int>(i.number);
  each(lanes, [&](int l) {
    const Box box = box_of(w, i, 1, l, 1);
    if (box.map->rank != rank) throw Error("a tensor map of another rank");
    const auto [own, to] = shared_place(w, w.address(i, 0, l));
    const uint32_t barrier = shared_place(w, w.address(i, 2 + rank, l, 2)).second;
    check_alignment(*box.map, to);
    const auto size = static_cast<uint32_t>(box_bytes(*box.map));
    const bool many = i.r.size() > static_cast<size_t>(3 + rank);
    const uint64_t mask = many ? w.value(i.r[3 + rank], l) : uint64_t{1} << own->rank;
    Cluster& cluster = *w.block->cluster;
    for (size_t rank_of = 0; rank_of < cluster.blocks.size(); ++rank_of) {
      if (!(mask >> rank_of & 1)) continue;
      Block* block = cluster.blocks[rank_of].get();
      if (to + size > block->shared.bytes.size())
        throw Error("a bulk copy outside of shared memory");
      block->shared.will_write(to, size, "a bulk copy");
      cluster.pending.push_back([block, box, to = to, size, barrier, &cluster] {
        Launch& launch = *cluster.launch;
        Warp& any = *block->warps[0];
        each_element(*box.map, box.from, [&](int64_t at, uint64_t address) {
          uint8_t* out = &block->shared.bytes[swizzled(box.map->swizzle, to + at)];
          if (address) {
            std::memcpy(out, launch.place(any, address, box.map->element, false, 0).bytes,
                        box.map->element);
            if (launch.count) launch.counters.bytes_read += box.map->element;
          } else {
            std::memset(out, 0, box.map->element);
          }
        });
        block->shared.wrote(to, size);
        Mbarrier& b = mbarrier_at(*block, barrier);
        b.bytes -= size;
        settle(cluster, b);
      });
    }
  });
}

// r = map, coordinates…, from
void bulk_store(Warp& w, const Instruction& i, Lanes lanes) {
  const int rank = static_cast<int>(i.number);
  each(lanes, [&](int l) {
    const Box box = box_of(w, i, 0, l, 0);
    if (box.map->rank != rank) throw Error("a tensor map of another rank");
    const auto [block, from] = shared_place(w, w.address(i, 1 + rank, l, 1));
    check_alignment(*box.map, from);
    const auto size = static_cast<uint32_t>(box_bytes(*box.map));
    if (from + size > block->shared.bytes.size())
      throw Error("a bulk copy outside of shared memory");
    block->shared.will_read(from, size, "a bulk copy");
    w.bulk.open.push_back([block = block, box, from = from, size] {
      Launch& launch = *block->cluster->launch;
      Warp& any = *block->warps[0];
      each_element(*box.map, box.from, [&](int64_t at, uint64_t address) {
        if (!address) return;
        std::memcpy(launch.place(any, address, box.map->element, true, 0).bytes,
                    &block->shared.bytes[swizzled(box.map->swizzle, from + at)], box.map->element);
        if (launch.count) launch.counters.bytes_written += box.map->element;
      });
      block->shared.was_read(from, size);
    });
  });
}
void bulk_commit(Warp& w, const Instruction&, Lanes) { w.bulk.commit(); }
void bulk_wait(Warp& w, const Instruction& i, Lanes) { w.bulk.wait(i.number); }

// ---- proxies and clusters

// What this warp wrote, and what others wrote before a barrier, is seen by the asynchronous proxy.
void proxy_fence(Warp& w, const Instruction&, Lanes) {
  for (auto* ranges : {&w.unfenced, &w.block->ordered}) {
    for (const Range& r : *ranges) w.block->shared.fence(r.address, r.size);
    ranges->clear();
  }
}

void map_address(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const uint64_t address = w.value(i.r[1], l), rank = w.value(i.r[2], l);
    if (rank >= w.block->cluster->blocks.size())
      throw Error("mapa to block " + std::to_string(rank) + " of a cluster of " +
                  std::to_string(w.block->cluster->blocks.size()));
    w.set(i.r[0], l, (address & (kWindow | kRankMask)) | (rank + 1) << kRankBits);
  });
}

void nothing(Warp&, const Instruction&, Lanes) {}

// The map and the coordinates of `[map, {x, y}]`.
int read_box(Decoder& d, int operand, int which) {
  const Operand& o = d.operands.at(operand);
  d.address(operand, which);
  const Operand& coordinates = o.inner.at(1);
  for (const Operand& c : coordinates.inner) d.i->r.push_back(d.source(c, File::b32));
  return static_cast<int>(coordinates.inner.size());
}

bool bulk(Decoder& d) {
  Instruction& i = *d.i;
  if (d.has("commit_group")) {
    i.run = bulk_commit;
  } else if (d.has("wait_group")) {
    i.number = static_cast<int64_t>(d.operands.at(0).value);
    i.run = bulk_wait;
  } else if (!d.has("tensor")) {
    return false;
  } else if (d.has("bulk_group")) {
    i.number = read_box(d, 0, 0);
    d.address(1, 1);
    i.run = bulk_store;
  } else {
    d.address(0, 0);
    i.number = read_box(d, 1, 1);
    d.address(2, 2);
    if (d.has("multicast::cluster")) d.read(3, File::b32);
    i.run = bulk_load;
  }
  return true;
}

bool barriers(Decoder& d) {
  Instruction& i = *d.i;
  if (d.has("init")) {
    d.address(0);
    d.read(1, File::b32);
    i.run = mbarrier_init;
  } else if (d.has("inval")) {
    d.address(0);
    i.run = mbarrier_end;
  } else if (d.has("try_wait") || d.has("test_wait")) {
    d.write(0, File::predicate);
    d.address(1);
    d.read(2, d.has("parity") ? File::b32 : File::b64);
    i.number = d.has("parity");
    i.flow = Flow::wait;
    i.run = mbarrier_wait;
  } else if (d.has("arrive") || d.has("expect_tx")) {
    int n = 0;
    if (d.operands.at(0).kind != Operand::address) d.write(n++, File::b64);
    d.address(n++);
    if (n < static_cast<int>(d.operands.size())) d.read(n, File::b32);
    i.number = d.has("expect_tx") ? (d.has("arrive") ? 1 : 2) : 0;
    i.run = mbarrier_arrive;
  } else {
    return false;
  }
  return true;
}

}  // namespace

bool asynchronous(Decoder& d) {
  const std::string& op = d.name[0];
  Instruction& i = *d.i;
  if (op == "mbarrier") return barriers(d);
  if (op == "mapa") {
    d.write(0, file_of(d.type()));
    d.read(1, file_of(d.type()));
    d.read(2, File::b32);
    i.run = map_address;
    return true;
  }
  if (op == "fence" && d.has("proxy")) {
    i.run = d.has("async") ? proxy_fence : nothing;
    return true;
  }
  if (op == "prefetch") {
    i.run = nothing;
    return true;
  }
  if (op != "cp") return false;
  if (d.has("bulk")) return bulk(d);
  if (d.has("commit_group")) {
    i.run = copies_commit;
  } else if (d.has("wait_group")) {
    i.number = static_cast<int64_t>(d.operands.at(0).value);
    i.run = copies_wait;
  } else if (d.has("wait_all")) {
    i.run = copies_wait_all;
  } else if (d.has("mbarrier")) {
    return false;
  } else {
    d.address(0, 0);
    d.address(1, 1);
    i.number = static_cast<int64_t>(d.operands.at(2).value);
    if (d.operands.size() > 3) d.read(3, File::b32);
    i.run = copy_async;
  }
  return true;
}

}  // namespace ptx
