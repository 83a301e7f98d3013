#include "machine.h"

#include <algorithm>
#include <cstring>

namespace ptx {

// ---- shared memory

void Shared::resize(uint32_t size) {
  bytes.assign(size, 0xa5);
  state.assign(size, 0);
  readers.assign(size, 0);
  unfenced.assign(size, 0);
}

namespace {

std::string bytes_at(uint32_t address, uint32_t size) {
  return std::to_string(size) + " bytes of shared memory at " + std::to_string(address);
}

}  // namespace

void Shared::will_write(uint32_t address, uint32_t size, const char* why) {
  for (uint32_t n = address; n < address + size; ++n) {
    if (state[n] & kIncoming)
      throw Error(std::string(why) + " writes " + bytes_at(address, size) +
                  ", which another copy under way will write");
    if (state[n] & kOutgoing)
      throw Error(std::string(why) + " writes " + bytes_at(address, size) +
                  ", which is still to be read by a product or copy under way");
    state[n] |= kIncoming;
  }
}

void Shared::wrote(uint32_t address, uint32_t size) {
  for (uint32_t n = address; n < address + size; ++n) state[n] = (state[n] & ~kIncoming) | kWritten;
}

void Shared::will_read(uint32_t address, uint32_t size, const char* why) {
  for (uint32_t n = address; n < address + size; ++n) {
    if (state[n] & kIncoming)
      throw Error(std::string(why) + " reads " + bytes_at(address, size) +
                  ", which a copy under way will write");
    if (!(state[n] & kWritten))
      throw Error(std::string(why) + " reads " + bytes_at(address, size) +
                  ", which nothing has written");
    if (state[n] & kUnfenced)
      throw Error(std::string(why) + " reads " + bytes_at(address, size) +
                  ", written by ordinary stores without a fence.proxy.async in between");
    ++readers[n];
    state[n] |= kOutgoing;
  }
}

void Shared::was_read(uint32_t address, uint32_t size) {
  for (uint32_t n = address; n < address + size; ++n)
    if (--readers[n] == 0) state[n] &= ~kOutgoing;
}

void Shared::fence(uint32_t address, uint32_t size) {
  for (uint32_t n = address; n < address + size; ++n)
    if (--unfenced[n] == 0) state[n] &= ~kUnfenced;
}

// ---- groups

void Groups::commit() {
  sent.push_back(std::move(open));
  open.clear();
}

void Groups::wait(size_t pending) {
  while (sent.size() > pending) {
    for (Deed& deed : sent.front()) deed();
    sent.pop_front();
  }
}

// ---- warps

void Warp::set(Register r, int lane, uint64_t value) {
  if (r.file == File::b64)
    d[r.index][lane] = value;
  else if (r.file == File::b32)
    w[r.index][lane] = static_cast<uint32_t>(value);
  else
    p[r.index] = (p[r.index] & ~(Lanes{1} << lane)) | static_cast<Lanes>(value & 1) << lane;
}

void Warp::wrote_unfenced(uint32_t address, uint32_t size) {
  if (!block->cluster->launch->program->asynchronous_proxy) return;
  Shared& shared = block->shared;
  for (uint32_t n = address; n < address + size; ++n) {
    shared.state[n] |= kUnfenced;
    ++shared.unfenced[n];
  }
  if (!unfenced.empty() && unfenced.back().address + unfenced.back().size == address)
    unfenced.back().size += size;
  else
    unfenced.push_back({address, size});
}

bool Warp::runnable() const {
  for (const Path& path : paths)
    if (path.wait == Wait::none ||
        (path.wait == Wait::progress && path.progress != block->cluster->progress))
      return true;
  return false;
}

void Warp::wait(Wait why, int barrier) {
  blocked_ = true;
  path().wait = why;
  path().barrier = barrier;
  path().progress = block->cluster->progress;
}

// A product under way reads or writes registers: nobody else may.
void Warp::check_products(const Instruction& i) {
  if (i.product) return;
  for (size_t n = 0; n < i.r.size(); ++n) {
    if (i.r[n].file != File::b32) continue;
    const uint32_t r = i.r[n].index;
    const bool writes = n < static_cast<size_t>(i.writes);
    if (being_written[r] || (writes && being_read[r]))
      throw Error(std::string(writes ? "writes" : "reads") + " a register that a wgmma under way " +
                  (being_written[r] ? "will write" : "will read"));
  }
}

// Paths at the same instruction are one; the one that is furthest behind goes next.
void Warp::merge() {
  for (size_t a = 0; a < paths.size(); ++a)
    for (size_t b = a + 1; b < paths.size();)
      if (paths[a].pc == paths[b].pc && paths[a].wait == paths[b].wait &&
          (paths[a].wait == Wait::none || paths[a].wait == Wait::lanes)) {
        paths[a].lanes |= paths[b].lanes;
        paths[a].wait = Wait::none;
        paths.erase(paths.begin() + b);
      } else {
        ++b;
      }
  current = paths.size();
  for (size_t n = 0; n < paths.size(); ++n) {
    Path& path = paths[n];
    if (path.wait == Wait::progress && path.progress != block->cluster->progress)
      path.wait = Wait::none;
    if (path.wait == Wait::none && (current == paths.size() || path.pc < paths[current].pc))
      current = n;
  }
}

// Runs until every path waits or has ended.
void Warp::run() {
  Launch& launch = *block->cluster->launch;
  const Program& program = *launch.program;
  const bool registers_matter = program.asynchronous_proxy;
  for (;;) {
    merge();
    if (current == paths.size()) return;
    bool alone = paths.size() == 1;
    for (bool same = true; same;) {
      const Instruction& i = program.code[path().pc];
      Lanes lanes = path().lanes;
      if (i.guarded) lanes &= i.guard_negated ? ~p[i.guard] : p[i.guard];
      try {
        if (i.flow == Flow::next) {
          if (lanes) {
            if (products_under_way) check_products(i);
            i.run(*this, i, lanes);
            if (registers_matter && !i.copy)
              for (int n = 0; n < i.writes; ++n)
                written_at[static_cast<int>(i.r[n].file)][i.r[n].index] = fences;
          }
          ++path().pc;
        } else if (i.flow == Flow::branch) {
          const Lanes rest = path().lanes & ~lanes;
          if (!lanes) {
            ++path().pc;
          } else {
            if (rest) {
              paths.push_back({path().pc + 1, rest, Wait::none, 0, 0});
              path().lanes = lanes;
              same = false;
            }
            path().pc = i.target;
          }
        } else if (i.flow == Flow::exit) {
          live &= ~lanes;
          path().lanes &= ~lanes;
          ++path().pc;
          for (Path& other : paths)
            if (other.wait == Wait::lanes) other.wait = Wait::none;
          if (!path().lanes) {
            paths.erase(paths.begin() + current);
            block->settle();
            same = false;
          }
        } else if (!lanes) {
          ++path().pc;
        } else {
          const Lanes rest = path().lanes & ~lanes;
          const uint32_t next = path().pc + 1;
          path().lanes = lanes;
          blocked_ = false;
          if (products_under_way) check_products(i);
          i.run(*this, i, lanes);
          if (registers_matter)
            for (int n = 0; n < i.writes; ++n)
              written_at[static_cast<int>(i.r[n].file)][i.r[n].index] = fences;
          // Who waits for other lanes of the warp executes the instruction again with them.
          if (path().wait != Wait::lanes) path().pc = next;
          if (rest) paths.push_back({next, rest, Wait::none, 0, 0});
          same = !blocked_ && !rest;
        }
      } catch (const Error& error) {
        throw Error(std::string(error.what()) + "\n" + where(*this, i));
      }
      if (launch.count) ++launch.counters.at(i).executed;
      if (!alone) same = false;
    }
  }
}

std::string where(const Warp& warp, const Instruction& i) {
  const Block& block = *warp.block;
  const Program& program = *block.cluster->launch->program;
  std::string text = "  in " + program.name + ", PTX line " + std::to_string(i.line);
  if (i.source) text += ", " + program.sources[i.source - 1];
  return text + ": " + i.text + "\n  block (" + std::to_string(block.id[0]) + ", " +
         std::to_string(block.id[1]) + ", " + std::to_string(block.id[2]) + "), warp " +
         std::to_string(warp.index);
}

// ---- blocks

int Block::threads_alive() const {
  int alive = 0;
  for (const auto& warp : warps) alive += __builtin_popcount(warp->live);
  return alive;
}

void Block::release(int barrier) {
  Barrier& b = barriers[barrier];
  ordered.insert(ordered.end(), b.unfenced.begin(), b.unfenced.end());
  b = {};
  ++cluster->progress;
  for (auto& warp : warps)
    for (Path& path : warp->paths)
      if (path.wait == Wait::barrier && path.barrier == barrier) path.wait = Wait::none;
}

bool Block::arrive(int barrier, int threads, int expected, Warp& by) {
  Barrier& b = barriers[barrier];
  if (b.arrived && b.expected != expected)
    throw Error("barrier " + std::to_string(barrier) + " is told " + std::to_string(expected) +
                " threads, and was told " + std::to_string(b.expected));
  b.expected = expected;
  b.arrived += threads;
  b.unfenced.insert(b.unfenced.end(), by.unfenced.begin(), by.unfenced.end());
  by.unfenced.clear();
  const int needed = expected ? expected : threads_alive();
  if (b.arrived > needed)
    throw Error("more threads than " + std::to_string(needed) + " arrive at barrier " +
                std::to_string(barrier));
  return b.arrived == needed;
}

void Block::settle() {
  for (auto& [number, b] : barriers)
    if (b.arrived && !b.expected && b.arrived == threads_alive()) release(number);
}

// ---- clusters

void Cluster::run() {
  std::vector<Warp*> warps;
  for (auto& block : blocks)
    for (auto& warp : block->warps) warps.push_back(warp.get());
  for (;;) {
    std::shuffle(warps.begin(), warps.end(), launch->random);
    bool ran = false, alive = false;
    for (Warp* warp : warps) {
      if (warp->paths.empty()) continue;
      alive = true;
      if (!warp->runnable()) continue;
      warp->run();
      ran = true;
    }
    if (!alive) return;
    if (ran) continue;
    if (pending.empty()) deadlock();
    // Nobody can go on without it: now a copy arrives, any of them.
    const size_t which = launch->random() % pending.size();
    const Deed deed = std::move(pending[which]);
    pending.erase(pending.begin() + which);
    deed();
    ++progress;
  }
}

void Cluster::deadlock() const {
  std::string text = "deadlock: every thread waits";
  for (const auto& block : blocks) {
    for (const auto& warp : block->warps)
      for (const Path& path : warp->paths) {
        const Program& program = *launch->program;
        const Instruction& i = program.code[path.wait == Wait::lanes ? path.pc : path.pc - 1];
        char lanes[16];
        std::snprintf(lanes, sizeof lanes, "%08x", path.lanes);
        text += "\n" + where(*warp, i) + ", lanes " + lanes;
      }
    for (const auto& [address, b] : block->mbarriers)
      if (b.pending || b.bytes)
        text += "\n  block rank " + std::to_string(block->rank) + ": mbarrier at " +
                std::to_string(address) + " in phase " + std::to_string(b.phase) + " lacks " +
                std::to_string(b.pending) + " arrivals and " + std::to_string(b.bytes) + " bytes";
  }
  throw Error(text);
}

// ---- launches

void Launch::run() {
  const int threads = block[0] * block[1] * block[2];
  if (program->threads && program->threads != threads)
    throw Error(program->name + " is for blocks of " + std::to_string(program->threads) +
                " threads, launched with " + std::to_string(threads));
  if (parameters.size() != program->parameter_bytes)
    throw Error(program->name + " takes " + std::to_string(program->parameter_bytes) +
                " bytes of parameters, given " + std::to_string(parameters.size()));
  random.seed(seed);
  counters.program = program, counters.sites.resize(program->code.size());

  Warp fresh;
  fresh.p.resize(program->registers[0]);
  fresh.w.resize(program->registers[1]);
  fresh.d.resize(program->registers[2]);
  for (const auto& [r, value] : program->numbers)
    for (int lane = 0; lane < kLanes; ++lane) fresh.set(r, lane, value);
  for (int file = 0; file < 3; ++file)
    if (program->asynchronous_proxy) fresh.written_at[file].resize(program->registers[file]);
  fresh.being_read.resize(program->registers[1]);
  fresh.being_written.resize(program->registers[1]);

  const uint32_t shared =
      program->static_shared
          ? (program->static_shared + kDynamicAlignment - 1) / kDynamicAlignment * kDynamicAlignment
          : 0;
  const auto make = [&](uint32_t x, uint32_t y, uint32_t z, Cluster& cluster) {
    auto made = std::make_unique<Block>();
    made->cluster = &cluster;
    made->id = {x, y, z};
    made->rank = cluster.blocks.size();
    made->shared.resize(shared + dynamic_shared);
    for (int n = 0; n * kLanes < threads; ++n) {
      auto warp = std::make_unique<Warp>(fresh);
      warp->block = made.get();
      warp->index = n;
      warp->local.resize(program->local * kLanes);
      const int lanes = std::min(kLanes, threads - n * kLanes);
      warp->live = lanes == kLanes ? kAllLanes : (Lanes{1} << lanes) - 1;
      warp->paths.push_back({0, warp->live, Wait::none, 0, 0});
      for (const auto& [r, which] : program->specials)
        for (int lane = 0; lane < kLanes; ++lane)
          warp->set(r, lane, special(which, *this, *made, n, lane));
      made->warps.push_back(std::move(warp));
    }
    cluster.blocks.push_back(std::move(made));
  };
  const auto& c = cluster;
  for (uint32_t z = 0; z < grid[2]; z += c[2])
    for (uint32_t y = 0; y < grid[1]; y += c[1])
      for (uint32_t x = 0; x < grid[0]; x += c[0]) {
        Cluster together;
        together.launch = this;
        for (uint32_t dz = 0; dz < c[2]; ++dz)
          for (uint32_t dy = 0; dy < c[1]; ++dy)
            for (uint32_t dx = 0; dx < c[0]; ++dx) make(x + dx, y + dy, z + dz, together);
        together.run();
        // What nobody waited for is still to happen, or was never meant to: a store must be done.
        for (auto& done : together.blocks)
          for (auto& warp : done->warps) {
            if (!warp->products.open.empty() || !warp->products.sent.empty())
              throw Error("a kernel ends with wgmma under way: " + program->name);
            for (Groups* groups : {&warp->bulk, &warp->copies}) {
              groups->commit();
              groups->wait(0);
            }
          }
        if (!together.pending.empty())
          throw Error("a kernel ends with copies under way that nobody waited for: " +
                      program->name);
      }
}

Place Launch::place(Warp& warp, uint64_t address, uint32_t size, bool write, int lane) {
  const auto refuse = [&](const std::string& what) {
    throw Error("lane " + std::to_string(lane) + (write ? " writes " : " reads ") +
                std::to_string(size) + " bytes " + what);
  };
  if (address % size)
    refuse("at an address that is no multiple of them: " + std::to_string(address));
  const uint64_t window = address & kWindow, at = address & ~kWindow;
  if (window == kLocalWindow) {
    if (at + size > program->local) refuse("outside of local memory");
    return {Place::local, &warp.local[lane * program->local + at], nullptr, 0};
  }
  if (window == kParameterWindow) {
    if (write || at + size > parameters.size()) refuse("outside of the parameters");
    return {Place::parameter, &parameters[at], nullptr, 0};
  }
  if (window == kConstantWindow) {
    if (write || at + size > program->constants.size()) refuse("outside of constants");
    return {Place::constant, const_cast<uint8_t*>(&program->constants[at]), nullptr, 0};
  }
  if (window == kSharedWindow) {
    Block* block = warp.block;
    const uint64_t rank = at >> kRankBits, inside = at & ((uint64_t{1} << kRankBits) - 1);
    if (rank) {
      if (rank > block->cluster->blocks.size()) refuse("of a block that the cluster has not");
      block = block->cluster->blocks[rank - 1].get();
    }
    if (inside + size > block->shared.bytes.size())
      refuse("outside of shared memory: at " + std::to_string(inside) + " of " +
             std::to_string(block->shared.bytes.size()));
    return {Place::shared, &block->shared.bytes[inside], block, static_cast<uint32_t>(inside)};
  }
  // Sorted by base.
  auto after = std::upper_bound(allocations->begin(), allocations->end(), address,
                                [](uint64_t a, const Allocation& b) { return a < b.base; });
  if (after == allocations->begin() || address + size > (after - 1)->base + (after - 1)->size)
    refuse("outside of every tensor: at " + std::to_string(address));
  Allocation& a = *(after - 1);
  if (!a.written.empty()) {
    for (uint64_t n = address - a.base; n < address - a.base + size; ++n) {
      if (write)
        a.written[n] = 1;
      else if (!a.written[n])
        refuse("of a tensor before anything has written them");
    }
  }
  return {Place::global, reinterpret_cast<uint8_t*>(address), nullptr, 0};
}

}  // namespace ptx
