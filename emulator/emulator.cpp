#include "emulator.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace emulator {

std::string line(Where where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

bool same(Where a, Where b) {
  return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

namespace {

// A fifth of the time of a kernel that meets often.
#ifdef __x86_64__
[[gnu::target_clones("avx2", "default")]]
#endif
void latest(uint32_t* mine, const uint32_t* its, size_t n) {
  for (size_t i = 0; i < n; ++i) mine[i] = std::max(mine[i], its[i]);
}

}  // namespace

void Clock::join(const Clock& other) {
  const auto joined = [](std::vector<uint32_t>& mine, const std::vector<uint32_t>& its) {
    if (mine.size() < its.size()) mine.resize(its.size());
    latest(mine.data(), its.data(), its.size());
  };
  joined(seen, other.seen), joined(fenced, other.fenced);
}

Block::Block(Cluster& cluster, int rank, dim3 block, int64_t shared)
    : cluster_(cluster),
      rank_(rank),
      shared_size_(shared),
      threads_(block.x * block.y * block.z),
      slots_((threads_.size() + kWarp - 1) / kWarp * kWarp) {
  for (size_t i = 0; i < threads_.size(); ++i) {
    Thread& t = threads_[i];
    t.rank = static_cast<int>(i), t.block = this;
    t.id = rank * static_cast<int>(threads_.size()) + t.rank;
    t.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
  }
}

void Block::start(dim3 index) {
  index_ = index;
  memory_.assign(shared_size_, 0xff);
  cells_.assign((shared_size_ + 1) / 2, Cell{});
  named_.clear(), mbarriers_.clear(), warpgroups_.clear(), arrivals_.clear();
  free_registers_ = 0, left_ = threads_.size();
  warps_.assign(slots_.size() / kWarp, Barrier{});
  for (Thread& t : threads_) {
    t.done = false, t.ready = nullptr;
    t.clock.seen.assign(cluster_.threads, 0);
    t.clock.seen[t.id] = 1;
    t.clock.fenced.clear();
    t.open.clear(), t.groups.clear(), t.open_stores.clear(), t.stores.clear();
    t.wgmma_under_way = 0;
    t.registers = std::min<int>(kRegisters / static_cast<int>(threads_.size()) / 8 * 8, 256);
  }
}

void Block::end() {
  commit();
  wait_copies(0);
  if (!me().open_stores.empty() || !me().stores.empty())
    fail("ends with TMA stores that may still read shared memory");
  if (me().wgmma_under_way) fail("ends with wgmma under way");
  if (--left_ > 0) return;
  for (const Load& load : cluster_.loads)
    if (load.block == this)
      fail("its block ends with a TMA load under way to byte " + std::to_string(load.to) +
           " of its shared memory");
  Clock last;
  for (const Thread& t : threads_) last.join(t.clock);
  for (const Event& arrival : arrivals_)
    if (!reaches(last.seen, arrival.thread, arrival.release))
      fail("its block ends without having waited for an arrival at one of its mbarriers by " +
           who(arrival.thread));
}

void Block::fail(const std::string& what) const {
  const auto text = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
           ")";
  };
  throw std::runtime_error("emulator: kernel " + cluster_.kernel + ", block " +
                           text(me().block->index_) + ", thread " + text(me().index) + ": " + what);
}

std::string Block::begun(const std::string& of) const {
  std::string told;
  for (const auto& [at, b] : mbarriers_)
    if (b.pending != b.expected || b.bytes != 0)
      told += "\n  the mbarrier at byte " + std::to_string(at) + of + " lacks " +
              std::to_string(b.pending) + " arrivals and " + std::to_string(b.bytes) + " bytes";
  return told;
}

// ---- barriers

// What this thread has done so far is seen by whoever acquires `into`; what follows is not.
void Block::release(Clock& into) {
  into.join(self().clock);
  ++self().clock.seen[self().id];
}

void Block::meet(Barrier& barrier, int expected, const std::string& name, Where where, bool mixed) {
  const auto place = [](const std::string& name, Where where) {
    return name + " at " + line(where);
  };
  if (barrier.arrived == 0)
    barrier.expected = expected, barrier.name = name, barrier.where = where;
  else if (barrier.expected != expected)
    fail(name + " for " + std::to_string(expected) + " threads, but others wait there for " +
         std::to_string(barrier.expected));
  else if (!mixed && (barrier.name != name || !same(barrier.where, where)))
    fail("divergent barrier: this thread is at " + place(name, where) + ", others at " +
         place(barrier.name, barrier.where));
  release(barrier.joining);
  const uint64_t mine = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.released = std::move(barrier.joining);
    barrier.joining = Clock{};
    barrier.arrived = 0, ++barrier.generation;
  }
  wait([&] { return barrier.generation != mine; },
       [&] { return place(name, where) + " (" + std::to_string(expected) + " threads)"; });
  self().clock.join(barrier.released);
}

int Block::warp_size() const {
  const int first = me().rank / kWarp * kWarp;
  return std::min<int>(kWarp, static_cast<int>(threads_.size()) - first);
}

Mbarrier& Block::mbarrier(int64_t at) {
  const auto found = mbarriers_.find(at);
  if (found == mbarriers_.end())
    fail("mbarrier at byte " + std::to_string(at) + " not initialised");
  if (!ordered(found->second.initialised))
    fail("race: use of the mbarrier at byte " + std::to_string(at) +
         " with no barrier since its initialisation");
  return found->second;
}

void Block::mbarrier_init(int64_t at, int arrivals) {
  const uint64_t opaque = 0;
  write_shared(at, &opaque, 8, 8);
  Mbarrier b;
  b.clock = cluster_.threads + static_cast<int>(cluster_.mbarriers.size());
  b.expected = b.pending = arrivals;
  b.initialised = now();
  cluster_.mbarriers.emplace_back(this, at);
  mbarriers_[at] = b;
}

void Block::mbarrier_fence() {
  for (auto& [at, b] : mbarriers_)
    if (b.initialised.thread == me().id) b.fenced = true;
}

void Block::complete(Mbarrier& b) {
  if (b.pending < 0) fail("more arrivals at an mbarrier than it expects in a phase");
  if (b.pending > 0 || b.bytes != 0) return;
  if (b.under_way > 0)
    fail("the mbarrier at byte " +
         std::to_string(cluster_.mbarriers[b.clock - cluster_.threads].second) + of_block() +
         " completes a phase with " + std::to_string(b.under_way) +
         " bytes of TMA loads under way: it was told to expect too few");
  b.pending = b.expected, ++b.phase;
  b.released.join(b.joining);
  if (b.released.seen.size() <= static_cast<size_t>(b.clock)) b.released.seen.resize(b.clock + 1);
  b.released.seen[b.clock] = static_cast<uint32_t>(b.phase);
}

void Block::mbarrier_arrive(int64_t at, int64_t bytes_to_come) {
  Mbarrier& b = mbarrier(at);
  release(b.joining);
  b.bytes += bytes_to_come, --b.pending;
  complete(b);
}

Mbarrier& Block::reached(int64_t at) {
  if (left_ == 0) fail("reaches" + of_block() + ", which has ended");
  Mbarrier& b = mbarrier(at);
  if (!b.fenced)
    fail("TMA or another block reaches the mbarrier at byte " + std::to_string(at) + of_block() +
         ", whose initialisation was not fenced");
  return b;
}

void Block::mbarrier_arrive_at(int64_t at, int block) {
  if (block < 0 || block >= static_cast<int>(cluster_.blocks.size()))
    fail("arrival at block " + std::to_string(block) + " of a cluster of " +
         std::to_string(cluster_.blocks.size()));
  Block& other = *cluster_.blocks[block];
  other.reached(at);
  if (&other != this) other.arrivals_.push_back(now());
  other.mbarrier_arrive(at);
}

void Block::mbarrier_wait(int64_t at, int parity, Where where) {
  Mbarrier& b = mbarrier(at);
  wait([&] { return (b.phase & 1) != static_cast<uint64_t>(parity); },
       [&] {
         return "parity " + std::to_string(parity) + " of the mbarrier at byte " +
                std::to_string(at) + ", at " + line(where);
       });
  self().clock.join(b.released);
}

// What follows is a release of its own, which the fence does not cover. New mbarriers have a fence
// of their own: that one alone counts for them.
void Block::fence_proxy() {
  Clock& mine = self().clock;
  mine.join({{}, mine.seen});
  ++mine.seen[me().id];
}

// ---- shared memory

bool Block::ordered(const Event& earlier) const {
  return earlier.thread < 0 || earlier.thread == me().id ||
         reaches(me().clock.seen, earlier.thread, earlier.release);
}

bool Block::ordered(const Reading& earlier) const {
  for (size_t warp = 0; warp < earlier.retired.size(); warp += kWarp) {
    bool heard = false;
    for (size_t i = warp; i < std::min(warp + kWarp, earlier.retired.size()) && !heard; ++i) {
      const int thread = earlier.first + static_cast<int>(i);
      heard = earlier.retired[i] && ordered(Event{thread, earlier.retired[i]});
    }
    if (!heard) return false;
  }
  return true;
}

std::string Block::of_block() const {
  return me().block == this ? "" : " of block " + std::to_string(rank_) + " of the cluster";
}

std::string Block::who(int thread) const {
  if (thread < cluster_.threads) {
    const Block& of = *cluster_.blocks[thread / cluster_.block_threads];
    return "thread " + std::to_string(thread % cluster_.block_threads) + of.of_block();
  }
  const auto& [block, at] = cluster_.mbarriers[thread - cluster_.threads];
  return "a TMA load that completes at the mbarrier at byte " + std::to_string(at) +
         block->of_block();
}

void Block::touch(int64_t at, int64_t bytes, int64_t alignment, bool write, Event as,
                  bool by_engine) {
  const auto place = [&] {
    return std::to_string(bytes) + " bytes at byte " + std::to_string(at) + " of shared memory" +
           of_block();
  };
  const auto race = [&](const char* other, const std::string& by) {
    fail(std::string("race: ") + (write ? "write of " : "read of ") + place() + " and " + other +
         " by " + by + " with no barrier between them");
  };
  if (at < 0 || at + bytes > shared_size_)
    fail("out of bounds: " + place() + ", which has " + std::to_string(shared_size_));
  if (at % alignment) fail("misaligned: " + place() + ", alignment " + std::to_string(alignment));
  const int reader = me().id;
  for (int64_t i = at / 2; i <= (at + bytes - 1) / 2; ++i) {
    Cell& cell = cells_[i];
    if (cell.in_flight) fail("access to " + place() + " with an asynchronous copy under way");
    if (!ordered(cell.write)) race("a write", who(cell.write.thread));
    if (write) {
      for (const Event& r : cell.reads)
        if (!ordered(r)) race("a read", who(r.thread));
      for (int& number : cell.engine)
        if (number) {
          if (!ordered(reading(number))) race("a read", reading(number).what);
          number = 0;
        }
      if (by_engine && cell.written && !cell.by_engine &&
          !reaches(me().clock.fenced, cell.write.thread, cell.write.release))
        fail("TMA load of " + place() + ", which " + who(cell.write.thread) +
             " has written, with no fence_proxy_async between them");
      cell.written = true, cell.by_engine = by_engine;
      cell.write = as;
      cell.reads[0] = cell.reads[1] = {};
    } else {
      if (!cell.written) fail("read of " + place() + " that nobody has written");
      if (cell.reads[0].thread != reader) cell.reads[1] = cell.reads[0];
      cell.reads[0] = as;
    }
  }
}

int Block::reading(std::string what, int first, int threads) {
  cluster_.readings.push_back(
      {std::move(what), threads_[first].id, std::vector<uint32_t>(threads)});
  return static_cast<int>(cluster_.readings.size());
}

void Block::retire(Reading& r) { r.retired[me().id - r.first] = now().release; }

void Block::collect(int64_t at, int64_t bytes, int number, Need& need) {
  if (at < 0 || at + bytes > shared_size_)
    fail("out of bounds: " + reading(number).what + " at byte " + std::to_string(at) +
         " of shared memory, which has " + std::to_string(shared_size_));
  const auto add = [](std::vector<Event>& to, const Event& e) {
    for (Event& known : to)
      if (known.thread == e.thread) {
        known.release = std::max(known.release, e.release);
        return;
      }
    to.push_back(e);
  };
  for (int64_t i = at / 2; i < (at + bytes) / 2; ++i) {
    Cell& cell = cells_[i];
    if (!cell.written || cell.in_flight)
      fail(reading(number).what + " reads byte " + std::to_string(2 * i) +
           " of shared memory, which nobody has written");
    add(need.seen, cell.write);
    if (!cell.by_engine) add(need.fenced, cell.write);
    const int warpgroup = warpgroup_of(reading(number));
    int& last = cell.engine[warpgroup % cell.engine.size()];
    if (last && warpgroup_of(reading(last)) != warpgroup)
      fail("more than four warpgroups read one place");
    last = number;
  }
}

void Block::check(const Need& need, const std::string& what) const {
  for (const Event& e : need.seen)
    if (!ordered(e))
      fail("race: " + what + " and a write by " + who(e.thread) + " with no barrier between them");
  for (const Event& e : need.fenced)
    if (!reaches(me().clock.fenced, e.thread, e.release))
      fail(what + " reads what " + who(e.thread) +
           " has written, with no fence_proxy_async between them");
}

void Block::read_shared(int64_t at, void* to, int64_t bytes, int64_t alignment) {
  touch(at, bytes, alignment, false, now(), false);
  std::memcpy(to, &memory_[at], bytes);
}

void Block::write_shared(int64_t at, const void* from, int64_t bytes, int64_t alignment) {
  touch(at, bytes, alignment, true, now(), false);
  std::memcpy(&memory_[at], from, bytes);
}

void Block::issue(int64_t to, const void* from) {
  touch(to, 16, 16, true, now(), false);
  Copy copy{to, {}};
  if (from) std::memcpy(copy.bytes.data(), from, 16);
  for (int64_t i = to / 2; i < to / 2 + 8; ++i) ++cells_[i].in_flight;
  self().open.push_back(copy);
}

void Block::commit() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

void Block::wait_copies(size_t pending) {
  auto& groups = self().groups;
  for (; groups.size() > pending; groups.pop_front())
    for (const Copy& copy : groups.front()) {
      for (int64_t i = copy.to / 2; i < copy.to / 2 + 8; ++i) --cells_[i].in_flight;
      write_shared(copy.to, copy.bytes.data(), 16, 16);
    }
}

}  // namespace emulator
