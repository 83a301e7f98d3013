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
  if (seen.size() < other.seen.size()) seen.resize(other.seen.size());
  for (size_t i = 0; i < other.seen.size(); ++i) seen[i] = std::max(seen[i], other.seen[i]);
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
  named_.clear(), mbarriers_.clear();
  warps_.assign(slots_.size() / kWarp, Barrier{});
  for (Thread& t : threads_) {
    t.done = false, t.ready = nullptr;
    t.clock.seen.assign(threads_.size(), 0);
    t.clock.seen[t.rank] = 1;
    t.open.clear(), t.groups.clear();
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
    if (!progress) deadlock();
  }
}

void Block::enter() {
  Block& b = block();
  try {
    (*b.body_)();
    b.commit();
    b.wait_copies(0);
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
  return found->second;
}

void Block::mbarrier_init(int64_t at, int arrivals) {
  const uint64_t opaque = 0;
  write_shared(at, &opaque, 8, 8);
  mbarriers_[at] = Mbarrier{};
  mbarriers_[at].expected = mbarriers_[at].pending = arrivals;
}

void Block::complete(Mbarrier& b) {
  if (b.pending < 0) fail("more arrivals at an mbarrier than it expects in a phase");
  if (b.pending > 0 || b.bytes != 0) return;
  b.pending = b.expected, ++b.phase;
  b.released.join(b.joining);
}

void Block::mbarrier_arrive(int64_t at, int64_t bytes_to_come) {
  Mbarrier& b = mbarrier(at);
  release(b.joining);
  b.bytes += bytes_to_come, --b.pending;
  complete(b);
}

void Block::mbarrier_deliver(int64_t at, int64_t bytes) {
  Mbarrier& b = mbarrier(at);
  b.bytes -= bytes;
  complete(b);
}

void Block::mbarrier_wait(int64_t at, int parity, Where where) {
  Mbarrier& b = mbarrier(at);
  wait([&b, parity] { return (b.phase & 1) != static_cast<uint64_t>(parity); },
       "parity " + std::to_string(parity) + " of the mbarrier at byte " + std::to_string(at) +
           ", at " + line(where));
  self().clock.join(b.released);
}

// ---- shared memory

bool Block::ordered(const Cell::Access& earlier) const {
  return earlier.thread < 0 || earlier.thread == self_->rank ||
         self_->clock.seen[earlier.thread] >= earlier.release;
}

void Block::touch(int64_t at, int64_t bytes, int64_t alignment, bool write) {
  const auto place = [&] {
    return std::to_string(bytes) + " bytes at byte " + std::to_string(at) + " of shared memory";
  };
  const auto race = [&](const char* mine, const char* other, int thread) {
    fail(std::string("race: ") + mine + " of " + place() + " and " + other + " by thread " +
         std::to_string(thread) + " with no barrier between them");
  };
  if (at < 0 || at + bytes > shared_size_)
    fail("out of bounds: " + place() + ", which has " + std::to_string(shared_size_));
  if (at % alignment) fail("misaligned: " + place() + ", alignment " + std::to_string(alignment));
  const int me = self_->rank;
  const uint32_t now = self_->clock.seen[me];
  for (int64_t i = at / 2; i <= (at + bytes - 1) / 2; ++i) {
    Cell& cell = cells_[i];
    if (cell.in_flight) fail("access to " + place() + " with an asynchronous copy under way");
    if (!ordered(cell.write)) race(write ? "write" : "read", "a write", cell.write.thread);
    if (write) {
      for (const Cell::Access& r : cell.reads)
        if (!ordered(r)) race("write", "a read", r.thread);
      cell.written = true;
      cell.write = {me, now};
      cell.reads[0] = cell.reads[1] = {};
    } else {
      if (!cell.written) fail("read of " + place() + " that nobody has written");
      if (cell.reads[0].thread != me) cell.reads[1] = cell.reads[0];
      cell.reads[0] = {me, now};
    }
  }
}

void Block::read_shared(int64_t at, void* to, int64_t bytes, int64_t alignment) {
  touch(at, bytes, alignment, false);
  std::memcpy(to, &memory_[at], bytes);
}

void Block::write_shared(int64_t at, const void* from, int64_t bytes, int64_t alignment) {
  touch(at, bytes, alignment, true);
  std::memcpy(&memory_[at], from, bytes);
}

void Block::issue(int64_t to, const void* from) {
  touch(to, 16, 16, true);
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
