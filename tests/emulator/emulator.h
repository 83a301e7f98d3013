// CUDA on the host, for tests: one block at a time, its threads as fibers, every access checked.
//
// A fiber runs until it waits; the scheduler then takes the next. That order never decides what is
// found: races are told by vector clocks. Each thread counts its releases (arrivals at barriers);
// a barrier joins the clocks of those who meet there; two accesses of different threads to one
// place, one of them a write, race unless the clock of the second thread has seen the first access.
#pragma once

#include <ucontext.h>

#include <array>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

namespace fastst {
struct Tiles;
enum class Swizzle;
}  // namespace fastst

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The built-ins of the fiber that is running.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32, kWarpgroup = 128;
constexpr int kRegisters = 65536;             // of a block
constexpr int64_t kSharedLimit = 227 * 1024;  // of a block of compute capability 9.0

using Where = std::source_location;

struct Warpgroup;

// Releases that a thread or barrier has seen: of every thread, and behind them of every mbarrier,
// whose releases are its phases. `fenced`: what a fence_proxy_async came after.
struct Clock {
  std::vector<uint32_t> seen, fenced;
  void join(const Clock& other);
};

inline bool reaches(const std::vector<uint32_t>& clock, int thread, uint32_t release) {
  return static_cast<size_t>(thread) < clock.size() && clock[thread] >= release;
}

struct Copy {  // an asynchronous copy that has been issued
  int64_t to;
  std::array<unsigned char, 16> bytes;
};

// Shared memory that the matrix unit or the copy engine reads, until it was waited for: in which of
// its releases each thread from `first` on knew; 0 if not yet. One of each warp must be heard of.
struct Reading {
  std::string what;
  int first = 0;
  std::vector<uint32_t> retired;
};

struct Event {
  int thread = -1;  // or an mbarrier, behind the threads
  uint32_t release = 0;
};

// What a reader must have seen, and what of it past a fence_proxy_async.
struct Need {
  std::vector<Event> seen, fenced;
};

struct Load {  // by TMA; it has been issued
  int64_t to, barrier;
  std::vector<unsigned char> box;
};

struct Thread {
  int rank = 0;
  dim3 index;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::function<bool()> ready;  // empty: can run
  std::string waits_for;
  Clock clock;
  std::vector<Copy> open;                // copies not yet committed
  std::deque<std::vector<Copy>> groups;  // committed ones, oldest first
  std::vector<int> open_stores;          // readings of TMA stores, in the same way
  std::deque<std::vector<int>> stores;
  int registers = 0, wgmma_under_way = 0;
};

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  std::string where;  // the source line at which the first of this generation arrived
  Clock joining, released;
};

struct Mbarrier {
  int clock = 0;  // its place in a Clock
  int expected = 0, pending = 0;
  int64_t bytes = 0;      // still to be delivered in this phase
  int64_t under_way = 0;  // bytes that have been issued and not been delivered
  uint64_t phase = 0;
  Clock joining, released;
  Event initialised;
  bool fenced = false;
};

struct Cell {  // two bytes of shared memory
  bool written = false;
  bool by_engine = false;  // the last write
  uint8_t in_flight = 0;
  Event write, reads[2];      // the last write, and the last reads of two different threads
  std::array<int, 4> engine;  // the last Reading of each warpgroup, counted from 1
};

// The block that is running.
class Block {
 public:
  Block(std::string kernel, dim3 grid, dim3 block, int64_t shared);

  void run(const std::function<void()>& body);

  Thread& self() { return *self_; }
  [[noreturn]] void fail(const std::string& what) const;
  void wait(std::function<bool()> ready, std::string why);
  // Everyone of `expected` threads; all must come from one source line unless `mixed`.
  void meet(Barrier& barrier, int expected, const std::string& name, Where where, bool mixed);

  void read_shared(int64_t at, void* to, int64_t bytes, int64_t alignment);
  void write_shared(int64_t at, const void* from, int64_t bytes, int64_t alignment);
  const unsigned char* bytes(int64_t at) const { return &memory_[at]; }
  void issue(int64_t to, const void* from);  // 16 bytes; zeros for null
  void commit();
  void wait_copies(size_t pending);

  Barrier& named(int id) { return named_[id]; }
  Barrier& warp() { return warps_[self().rank / kWarp]; }
  int warp_size() const;
  uint64_t* slots() { return &slots_[self_->rank / kWarp * kWarp]; }
  Mbarrier& mbarrier(int64_t at);
  void mbarrier_init(int64_t at, int arrivals);
  void mbarrier_arrive(int64_t at, int64_t bytes_to_come = 0);
  void mbarrier_wait(int64_t at, int parity, Where where);
  void mbarrier_fence();
  void fence_proxy();

  Reading& reading(int number) { return readings_[number - 1]; }
  int reading(std::string what, int first, int threads);  // a new one's number
  void retire(Reading&);                                  // as far as this thread is concerned
  // What must be known to read there by an engine, and a note that `number` does.
  void collect(int64_t at, int64_t bytes, int number, Need& need);
  void check(const Need& need, const std::string& what) const;

  void tma_load(int64_t to, const fastst::Tiles& from, int64_t barrier, std::vector<int> at);
  void tma_store(const fastst::Tiles& to, int64_t from, std::vector<int> at);
  void tma_commit();
  void tma_wait_read(size_t pending);
  void change_registers(int to, bool increase, Where where);

  Warpgroup& warpgroup();

 private:
  Event now() const { return {self_->rank, self_->clock.seen[self_->rank]}; }
  void touch(int64_t at, int64_t bytes, int64_t alignment, bool write, Event as, bool by_engine);
  bool ordered(const Event& earlier) const;
  bool ordered(const Reading& earlier) const;
  std::string who(int thread) const;
  void release(Clock& into);
  void use(const Mbarrier& barrier) const;
  bool deliver();
  void complete(Mbarrier& barrier);
  [[noreturn]] void deadlock() const;
  static void enter();

  std::string kernel_;
  int64_t shared_size_;
  std::vector<Thread> threads_;
  Thread* self_ = nullptr;
  ucontext_t scheduler_;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
  std::vector<unsigned char> memory_;
  std::vector<Cell> cells_;
  std::map<int, Barrier> named_;
  std::vector<Barrier> warps_;
  std::vector<uint64_t> slots_;
  std::map<int64_t, Mbarrier> mbarriers_;
  std::vector<int64_t> mbarrier_at_;  // by place in a Clock
  std::vector<Load> loads_;
  std::deque<Reading> readings_;
  int64_t free_registers_ = 0;
  std::vector<std::shared_ptr<Warpgroup>> warpgroups_;
};

Block& block();  // the running one

// Where the byte at an address of shared memory lies.
int64_t swizzled(fastst::Swizzle, int64_t address);

// All blocks of a grid in order; the error of a launch that hardware would refuse, or empty.
std::string launch(const std::string& kernel, dim3 grid, dim3 block, int64_t shared,
                   const std::function<void()>& body);

std::string line(Where where);

}  // namespace emulator
