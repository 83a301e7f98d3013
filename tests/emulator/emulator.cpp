#include "emulator.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>

namespace emulator {
namespace {

constexpr size_t kStack = 128 * 1024;
Block* running = nullptr;

std::string text(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

}  // namespace

Block& block() { return *running; }

std::string line(Where where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

void Clock::join(const Clock& other) {
  const auto latest = [](std::vector<uint32_t>& mine, const std::vector<uint32_t>& its) {
    if (mine.size() < its.size()) mine.resize(its.size());
    for (size_t i = 0; i < its.size(); ++i) mine[i] = std::max(mine[i], its[i]);
  };
  latest(seen, other.seen), latest(fenced, other.fenced);
}

Block::Block(std::string kernel, dim3 grid, dim3 block, int64_t shared)
    : kernel_(std::move(kernel)), shared_size_(shared), threads_(block.x * block.y * block.z) {
  gridDim = grid, blockDim = block;
  for (size_t i = 0; i < threads_.size(); ++i) {
    Thread& t = threads_[i];
    t.rank = static_cast<int>(i);
    t.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    t.stack = std::make_unique_for_overwrite<char[]>(kStack);
  }
  slots_.resize((threads_.size() + kWarp - 1) / kWarp * kWarp);
}

// ---- fibers

void Block::run(const std::function<void()>& body) {
  body_ = &body;
  memory_.assign(shared_size_, 0xff);
  cells_.assign((shared_size_ + 1) / 2, Cell{});
  named_.clear(), mbarriers_.clear(), mbarrier_at_.clear();
  loads_.clear(), readings_.clear(), warpgroups_.clear();
  free_registers_ = 0;
  warps_.assign(slots_.size() / kWarp, Barrier{});
  for (Thread& t : threads_) {
    t.done = false, t.ready = nullptr;
    t.clock.seen.assign(threads_.size(), 0);
    t.clock.seen[t.rank] = 1;
    t.clock.fenced.clear();
    t.open.clear(), t.groups.clear(), t.open_stores.clear(), t.stores.clear();
    t.wgmma_under_way = 0;
    t.registers = std::min<int>(kRegisters / static_cast<int>(threads_.size()) / 8 * 8, 256);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = &scheduler_;
    makecontext(&t.context, &Block::enter, 0);
  }
  for (size_t left = threads_.size(); left > 0;) {
    bool progress = false;
    for (Thread& t : threads_) {
      if (t.done || (t.ready && !t.ready())) continue;
      t.ready = nullptr;
      progress = true;
      self_ = &t;
      threadIdx = t.index;
      swapcontext(&scheduler_, &t.context);
      if (error_) std::rethrow_exception(error_);
      left -= t.done;
    }
    if (!progress && !deliver()) deadlock();
  }
}

void Block::enter() {
  Block& b = block();
  try {
    (*b.body_)();
    b.commit();
    b.wait_copies(0);
    if (!b.self().open_stores.empty() || !b.self().stores.empty())
      b.fail("ends with TMA stores that may still read shared memory");
    if (b.self().wgmma_under_way) b.fail("ends with wgmma under way");
  } catch (...) {
    b.error_ = std::current_exception();
  }
  b.self().done = true;
}

void Block::wait(std::function<bool()> ready, std::string why) {
  if (ready()) return;
  Thread& t = self();
  t.ready = std::move(ready), t.waits_for = std::move(why);
  swapcontext(&t.context, &scheduler_);
}

void Block::fail(const std::string& what) const {
  throw std::runtime_error("emulator: kernel " + kernel_ + ", block " + text(blockIdx) +
                           ", thread " + text(self_->index) + ": " + what);
}

void Block::deadlock() const {
  std::map<std::string, std::vector<int>> waiting;
  size_t finished = 0;
  for (const Thread& t : threads_)
    if (t.done)
      ++finished;
    else
      waiting[t.waits_for].push_back(t.rank);
  std::string told;
  for (const auto& [why, ranks] : waiting)
    told += "\n  " + std::to_string(ranks.size()) + " threads (" + std::to_string(ranks.front()) +
            " to " + std::to_string(ranks.back()) + ") wait for " + why;
  for (const auto& [at, b] : mbarriers_)
    if (b.pending != b.expected || b.bytes != 0)
      told += "\n  the mbarrier at byte " + std::to_string(at) + " lacks " +
              std::to_string(b.pending) + " arrivals and " + std::to_string(b.bytes) + " bytes";
  throw std::runtime_error("emulator: kernel " + kernel_ + ", block " + text(blockIdx) +
                           ": deadlock; " + std::to_string(finished) + " threads have finished" +
                           told);
}

// ---- barriers

// What this thread has done so far is seen by whoever acquires `into`; what follows is not.
void Block::release(Clock& into) {
  into.join(self().clock);
  ++self().clock.seen[self().rank];
}

void Block::meet(Barrier& barrier, int expected, const std::string& name, Where where, bool mixed) {
  const std::string here = name + " at " + line(where);
  if (barrier.arrived == 0)
    barrier.expected = expected, barrier.where = here;
  else if (barrier.expected != expected)
    fail(name + " for " + std::to_string(expected) + " threads, but others wait there for " +
         std::to_string(barrier.expected));
  else if (!mixed && barrier.where != here)
    fail("divergent barrier: this thread is at " + here + ", others at " + barrier.where);
  release(barrier.joining);
  const uint64_t mine = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.released = std::move(barrier.joining);
    barrier.joining = Clock{};
    barrier.arrived = 0, ++barrier.generation;
  }
  wait([&barrier, mine] { return barrier.generation != mine; },
       here + " (" + std::to_string(expected) + " threads)");
  self().clock.join(barrier.released);
}

int Block::warp_size() const {
  const int first = self_->rank / kWarp * kWarp;
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
  b.clock = static_cast<int>(threads_.size() + mbarrier_at_.size());
  b.expected = b.pending = arrivals;
  b.initialised = now();
  mbarrier_at_.push_back(at);
  mbarriers_[at] = b;
}

void Block::mbarrier_fence() {
  for (auto& [at, b] : mbarriers_)
    if (b.initialised.thread == self_->rank) b.fenced = true;
}

void Block::complete(Mbarrier& b) {
  if (b.pending < 0) fail("more arrivals at an mbarrier than it expects in a phase");
  if (b.pending > 0 || b.bytes != 0) return;
  if (b.under_way > 0)
    fail("the mbarrier at byte " + std::to_string(mbarrier_at_[b.clock - threads_.size()]) +
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

void Block::mbarrier_wait(int64_t at, int parity, Where where) {
  Mbarrier& b = mbarrier(at);
  wait([&b, parity] { return (b.phase & 1) != static_cast<uint64_t>(parity); },
       "parity " + std::to_string(parity) + " of the mbarrier at byte " + std::to_string(at) +
           ", at " + line(where));
  self().clock.join(b.released);
}

// What follows is a release of its own, which the fence does not cover. New mbarriers have a fence
// of their own: that one alone counts for them.
void Block::fence_proxy() {
  Clock& mine = self().clock;
  mine.join({{}, mine.seen});
  ++mine.seen[self_->rank];
}

// ---- shared memory

bool Block::ordered(const Event& earlier) const {
  return earlier.thread < 0 || earlier.thread == self_->rank ||
         reaches(self_->clock.seen, earlier.thread, earlier.release);
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

std::string Block::who(int thread) const {
  const auto threads = static_cast<int>(threads_.size());
  return thread < threads ? "thread " + std::to_string(thread)
                          : "a TMA load that completes at the mbarrier at byte " +
                                std::to_string(mbarrier_at_[thread - threads]);
}

void Block::touch(int64_t at, int64_t bytes, int64_t alignment, bool write, Event as,
                  bool by_engine) {
  const auto place = [&] {
    return std::to_string(bytes) + " bytes at byte " + std::to_string(at) + " of shared memory";
  };
  const auto race = [&](const char* other, const std::string& by) {
    fail(std::string("race: ") + (write ? "write of " : "read of ") + place() + " and " + other +
         " by " + by + " with no barrier between them");
  };
  if (at < 0 || at + bytes > shared_size_)
    fail("out of bounds: " + place() + ", which has " + std::to_string(shared_size_));
  if (at % alignment) fail("misaligned: " + place() + ", alignment " + std::to_string(alignment));
  const int me = self_->rank;
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
          !reaches(self_->clock.fenced, cell.write.thread, cell.write.release))
        fail("TMA load of " + place() + ", which " + who(cell.write.thread) +
             " has written, with no fence_proxy_async between them");
      cell.written = true, cell.by_engine = by_engine;
      cell.write = as;
      cell.reads[0] = cell.reads[1] = {};
    } else {
      if (!cell.written) fail("read of " + place() + " that nobody has written");
      if (cell.reads[0].thread != me) cell.reads[1] = cell.reads[0];
      cell.reads[0] = as;
    }
  }
}

int Block::reading(std::string what, int first, int threads) {
  readings_.push_back({std::move(what), first, std::vector<uint32_t>(threads)});
  return static_cast<int>(readings_.size());
}

void Block::retire(Reading& r) { r.retired[self_->rank - r.first] = now().release; }

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
    int& last = cell.engine[reading(number).first / kWarpgroup % cell.engine.size()];
    if (last && reading(last).first / kWarpgroup != reading(number).first / kWarpgroup)
      fail("more than four warpgroups read one place");
    last = number;
  }
}

void Block::check(const Need& need, const std::string& what) const {
  for (const Event& e : need.seen)
    if (!ordered(e))
      fail("race: " + what + " and a write by " + who(e.thread) + " with no barrier between them");
  for (const Event& e : need.fenced)
    if (!reaches(self_->clock.fenced, e.thread, e.release))
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

// ---- launches

std::string launch(const std::string& kernel, dim3 grid, dim3 block, int64_t shared,
                   const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > 1024)
    return "invalid configuration argument";
  if (shared > kSharedLimit) return "invalid argument";
  Block b(kernel, grid, block, shared);
  running = &b;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        b.run(body);
      }
  return "";
}

}  // namespace emulator
