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

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The built-ins of the fiber that is running.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32;
constexpr int64_t kSharedLimit = 227 * 1024;  // of a block of compute capability 9.0

using Where = std::source_location;

// Releases of every thread that a thread, barrier or memory cell has seen.
struct Clock {
  std::vector<uint32_t> seen;
  void join(const Clock& other);
};

struct Copy {  // an asynchronous copy that has been issued
  int64_t to;
  std::array<unsigned char, 16> bytes;
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
};

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  std::string where;  // the source line at which the first of this generation arrived
  Clock joining, released;
};

struct Mbarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;  // still to be delivered in this phase
  uint64_t phase = 0;
  Clock joining, released;
};

struct Cell {  // two bytes of shared memory
  struct Access {
    int thread = -1;
    uint32_t release = 0;
  };
  bool written = false;
  uint8_t in_flight = 0;
  Access write, reads[2];  // the last write, and the last reads of two different threads
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
  void mbarrier_deliver(int64_t at, int64_t bytes);
  void mbarrier_wait(int64_t at, int parity, Where where);

 private:
  void touch(int64_t at, int64_t bytes, int64_t alignment, bool write);
  bool ordered(const Cell::Access& earlier) const;
  void release(Clock& into);
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
};

Block& block();  // the running one

// All blocks of a grid in order; the error of a launch that hardware would refuse, or empty.
std::string launch(const std::string& kernel, dim3 grid, dim3 block, int64_t shared,
                   const std::function<void()>& body);

std::string line(Where where);

}  // namespace emulator
