// CUDA on the host, for tests: one cluster of blocks at a time (most have one block), its threads
// as fibers, every access checked.
//
// A fiber runs until it waits; the scheduler then takes the next. That order never decides what is
// found: races are told by vector clocks. Each thread counts its releases (arrivals at barriers);
// a barrier joins the clocks of those who meet there; two accesses of different threads to one
// place, one of them a write, race unless the clock of the second thread has seen the first access.
#pragma once

#include <setjmp.h>
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
class Block;

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
  int thread = -1;  // of the cluster; or an mbarrier, behind the threads
  uint32_t release = 0;
};

// What a reader must have seen, and what of it past a fence_proxy_async.
struct Need {
  std::vector<Event> seen, fenced;
};

struct Load {  // by TMA; it has been issued
  Block* block;
  int64_t to, barrier;
  std::vector<unsigned char> box;
};

struct Thread {
  int rank = 0, id = 0;  // in its block, in its cluster
  Block* block = nullptr;
  dim3 index;
  ucontext_t start;  // its first entry, of all blocks that it runs: it asks the kernel
  jmp_buf here;      // where it waits
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  std::function<bool()> ready;  // empty: can run
  std::function<std::string()> waits_for;
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
  std::string name;  // and the source line, at which the first of this generation arrived
  Where where;
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

// Blocks that run together, and what they have in common.
struct Cluster {
  Cluster(std::string kernel, dim3 grid, dim3 block, int64_t shared, int blocks);

  // The blocks from `first` on.
  void run(dim3 first, const std::function<void()>& body);
  void sync(Where where);

  std::string kernel;
  std::vector<std::unique_ptr<Block>> blocks;
  int block_threads, threads;
  Thread* self = nullptr;                                   // that is running
  std::vector<std::pair<const Block*, int64_t>> mbarriers;  // by place in a Clock
  std::vector<Load> loads;
  std::deque<Reading> readings;
  Barrier barrier;
  jmp_buf scheduler;

 private:
  bool deliver();
  [[noreturn]] void deadlock() const;
  void enter();
  static void start();

  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
};

class Block {
 public:
  Block(Cluster& cluster, int rank, dim3 block, int64_t shared);

  void start(dim3 index);
  // What its last thread leaves behind must be settled: nothing of the cluster may reach it later.
  void end();
  // A line for each mbarrier with a phase that has begun; `of`: this block.
  std::string begun(const std::string& of) const;

  const dim3& index() const { return index_; }
  int rank() const { return rank_; }
  std::vector<Thread>& threads() { return threads_; }
  Thread& self() { return *cluster_.self; }
  Cluster& cluster() { return cluster_; }
  [[noreturn]] void fail(const std::string& what) const;
  // Until `ready()`; `why()` is told of those who wait for ever.
  template <class Ready, class Why>
  void wait(const Ready& ready, const Why& why);
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
  uint64_t* slots() { return &slots_[me().rank / kWarp * kWarp]; }
  Mbarrier& mbarrier(int64_t at);
  void mbarrier_init(int64_t at, int arrivals);
  void mbarrier_arrive(int64_t at, int64_t bytes_to_come = 0);
  void mbarrier_arrive_at(int64_t at, int block);  // at that of another block of the cluster
  void mbarrier_wait(int64_t at, int parity, Where where);
  void mbarrier_fence();
  void fence_proxy();

  Reading& reading(int number) { return cluster_.readings[number - 1]; }
  int reading(std::string what, int first, int threads);  // a new one's number
  void retire(Reading&);                                  // as far as this thread is concerned
  // What must be known to read there by an engine, and a note that `number` does.
  void collect(int64_t at, int64_t bytes, int number, Need& need);
  void check(const Need& need, const std::string& what) const;

  // To the same place of all blocks in the mask.
  void tma_load(int64_t to, const fastst::Tiles& from, int64_t barrier, std::vector<int> at,
                unsigned mask);
  void deliver(const Load&);
  void tma_store(const fastst::Tiles& to, int64_t from, std::vector<int> at);
  void tma_commit();
  void tma_wait_read(size_t pending);
  void change_registers(int to, bool increase, Where where);

  Warpgroup& warpgroup();

 private:
  // The thread that is running, of this block or of another one of the cluster.
  const Thread& me() const { return *cluster_.self; }
  Event now() const { return {me().id, me().clock.seen[me().id]}; }
  void touch(int64_t at, int64_t bytes, int64_t alignment, bool write, Event as, bool by_engine);
  bool ordered(const Event& earlier) const;
  bool ordered(const Reading& earlier) const;
  std::string who(int thread) const;
  std::string of_block() const;  // "" where the running thread is of this one
  int warpgroup_of(const Reading& r) const { return (r.first - threads_[0].id) / kWarpgroup; }
  Mbarrier& reached(int64_t at);  // an mbarrier by another block or the copy engine
  void receive(int64_t to, std::vector<unsigned char> box, int64_t barrier);
  void release(Clock& into);
  void complete(Mbarrier& barrier);

  Cluster& cluster_;
  int rank_;
  dim3 index_;
  int64_t shared_size_;
  std::vector<Thread> threads_;
  size_t left_ = 0;              // threads that have not ended
  std::vector<Event> arrivals_;  // of threads of other blocks at mbarriers of this one
  std::vector<unsigned char> memory_;
  std::vector<Cell> cells_;
  std::map<int, Barrier> named_;
  std::vector<Barrier> warps_;
  std::vector<uint64_t> slots_;
  std::map<int64_t, Mbarrier> mbarriers_;
  int64_t free_registers_ = 0;
  std::vector<std::shared_ptr<Warpgroup>> warpgroups_;
};

Block& block();  // that of the running thread

// Leaves one fiber for another, until somebody comes back; in a frame of its own, which stays.
[[gnu::noinline]] inline void switch_fiber(jmp_buf from, jmp_buf to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

template <class Ready, class Why>
void Block::wait(const Ready& ready, const Why& why) {
  if (ready()) return;
  Thread& t = self();
  t.ready = std::cref(ready), t.waits_for = std::cref(why);  // they stay as long as it waits
  switch_fiber(t.here, cluster_.scheduler);
}

// Where the byte at an address of shared memory lies.
int64_t swizzled(fastst::Swizzle, int64_t address);

// All blocks of a grid in order, `cluster` of them together; the error of a launch that hardware
// would refuse, or empty.
std::string launch(const std::string& kernel, dim3 grid, dim3 block, int64_t shared,
                   const std::function<void()>& body, int cluster = 1);

std::string line(Where where);
bool same(Where, Where);  // one line of one file

}  // namespace emulator
