// Warps in lockstep, blocks, clusters, and what is under way beside them.
//
// What is asynchronous is modelled pessimistically: it happens as late as the waits of the program
// allow, and whoever touches what it reads or writes before that is an error.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "program.h"
#include "tensor_map.h"

namespace ptx {

struct Block;
struct Cluster;
struct Launch;

using Words = std::array<uint32_t, kLanes>;
using Longs = std::array<uint64_t, kLanes>;

template <class F>
inline void each(Lanes lanes, F f) {
  if (lanes == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (Lanes left = lanes; left; left &= left - 1) f(__builtin_ctz(left));
  }
}

// ---- memory

// What is known of a byte of shared memory.
enum State : uint8_t {
  kWritten = 1,   // has a value
  kIncoming = 2,  // an asynchronous copy will write it
  kOutgoing = 4,  // something asynchronous will read it
  kUnfenced = 8,  // written by the generic proxy, not yet fenced for the asynchronous one
};

struct Shared {
  std::vector<uint8_t> bytes, state;
  std::vector<uint32_t> readers, unfenced;  // how many of each, by byte

  void resize(uint32_t size);
  // Marks, and throws Error where something is under way there. `why` names the writer or reader.
  void will_write(uint32_t address, uint32_t size, const char* why);
  void wrote(uint32_t address, uint32_t size);
  void will_read(uint32_t address, uint32_t size, const char* why);
  void was_read(uint32_t address, uint32_t size);
  void fence(uint32_t address, uint32_t size);
};

// Memory of the host that the kernel may touch.
struct Allocation {
  uint64_t base = 0, size = 0;
  std::vector<uint8_t> written;  // a bit a byte; empty: everything has a value
};

struct Range {
  uint32_t address, size;
};

// ---- what is under way

// A copy or product that will be made: reads late and writes late.
using Deed = std::function<void()>;

// Deeds of a warp that are waited for by groups, as cp.async, wgmma and bulk stores have them.
struct Groups {
  std::vector<Deed> open;              // not committed
  std::deque<std::vector<Deed>> sent;  // oldest first

  void commit();
  void wait(size_t pending);  // does all but the newest `pending`
};

// Bytes of a barrier in shared memory are not its state, as on the chip.
struct Mbarrier {
  uint32_t expected = 0;  // arrivals of a phase
  int64_t pending = 0;    // arrivals left in this phase
  int64_t bytes = 0;      // transactions left
  uint64_t phase = 0;
};

// ---- threads

enum class Wait : uint8_t { none, barrier, cluster, lanes, progress };

// Lanes of a warp that are at the same instruction.
struct Path {
  uint32_t pc = 0;
  Lanes lanes = 0;
  Wait wait = Wait::none;
  int barrier = 0;        // Wait::barrier
  uint64_t progress = 0;  // Wait::progress: of the cluster, when it looked in vain
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  Lanes live = 0;
  std::vector<Lanes> p;
  std::vector<Words> w;
  std::vector<Longs> d;
  std::vector<uint8_t> local;  // of each lane, one after the other
  std::vector<Path> paths;
  size_t current = 0;  // path

  Groups copies;    // cp.async
  Groups bulk;      // stores of bulk copies
  Groups products;  // wgmma

  // wgmma: registers written since the last wgmma.fence, and those of products under way.
  uint32_t fences = 1;
  std::array<std::vector<uint32_t>, 3> written_at;
  std::vector<uint16_t> being_read, being_written;  // by products under way, registers of 32 bits
  int products_under_way = 0;

  std::vector<Range> unfenced;  // shared memory that this warp wrote since its last fence
  uint64_t cluster_waits = 0;   // barrier.cluster.wait so far

  Path& path() { return paths[current]; }
  bool runnable() const;
  void run();
  // By the generic proxy: the asynchronous one sees it behind a fence only.
  void wrote_unfenced(uint32_t address, uint32_t size);
  void wait(Wait why, int barrier = 0);  // called by an instruction of flow `wait`

  Words& words(const Instruction& i, int n) { return w[i.r[n].index]; }
  Longs& longs(const Instruction& i, int n) { return d[i.r[n].index]; }
  uint64_t value(Register r, int lane) const {
    if (r.file == File::b64) return d[r.index][lane];
    if (r.file == File::b32) return w[r.index][lane];
    return p[r.index] >> lane & 1;
  }
  void set(Register r, int lane, uint64_t value);
  // The address that operand `n` names, `which` of the addresses of the instruction.
  uint64_t address(const Instruction& i, int n, int lane, int which = 0) const {
    return value(i.r[n], lane) + i.offset[which];
  }

 private:
  bool blocked_ = false;
  void check_products(const Instruction& i);
  void merge();
};

struct Barrier {
  int arrived = 0, expected = 0;  // threads; expected 0: all that live
  std::vector<Range> unfenced;    // of who has arrived
};

struct Block {
  Cluster* cluster = nullptr;
  std::array<uint32_t, 3> id{};
  uint32_t rank = 0;  // in its cluster
  Shared shared;
  std::vector<std::unique_ptr<Warp>> warps;
  std::map<int, Barrier> barriers;
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<Range> ordered;  // written by the generic proxy before a barrier, not yet fenced

  int threads_alive() const;
  // Returns whether these threads completed the barrier.
  bool arrive(int barrier, int threads, int expected, Warp& by);
  void release(int barrier);
  void settle();  // barriers that wait for threads that have ended
};

struct Cluster {
  Launch* launch = nullptr;
  std::vector<std::unique_ptr<Block>> blocks;
  std::deque<Deed> pending;  // bulk copies into shared memory, in order of issue
  uint64_t progress = 0;
  int arrived = 0;          // threads at barrier.cluster
  uint64_t generation = 0;  // how often all had arrived there

  void run();
  [[noreturn]] void deadlock() const;
};

// Where an access goes.
struct Place {
  enum Kind : uint8_t { global, shared, local, constant, parameter } kind;
  uint8_t* bytes;
  Block* block;      // shared
  uint32_t address;  // shared: in its block
};

// What a profiler would count, by instruction.
struct Counters {
  struct Site {
    uint64_t executed = 0;               // by warps
    uint64_t requests = 0, sectors = 0;  // of global memory, 32 bytes each
    uint64_t served = 0, passes = 0;     // 128 bytes of shared memory, and passes over its banks

    void operator+=(const Site& other) {
      executed += other.executed;
      requests += other.requests, sectors += other.sectors;
      served += other.served, passes += other.passes;
    }
  };
  const Program* program = nullptr;
  std::vector<Site> sites;
  uint64_t bytes_read = 0, bytes_written = 0;  // of global memory, as asked for

  Site& at(const Instruction& i) { return sites[&i - program->code.data()]; }
  // An access of `size` bytes a lane.
  void of_global(const Instruction& i, Lanes lanes, const Longs& at, uint32_t size, bool writes);
  void of_shared(const Instruction& i, Lanes lanes, const Longs& at, uint32_t size);
  std::string as_json() const;  // by opcode; accesses also by where they stand
};

struct Launch {
  const Program* program = nullptr;
  std::array<uint32_t, 3> grid{1, 1, 1}, block{1, 1, 1}, cluster{1, 1, 1};
  uint32_t dynamic_shared = 0;
  std::vector<uint8_t> parameters;
  std::vector<Allocation>* allocations = nullptr;
  uint64_t seed = 0;
  bool count = false;
  Counters counters;
  std::mt19937_64 random;

  void run();  // throws Error

  // Throws Error: outside of what was given, misaligned, or read before it was written.
  Place place(Warp& warp, uint64_t address, uint32_t size, bool write, int lane);
};

// Of shared memory: throws Error where something under way is at odds with an access, or where
// nothing was written yet. Other places have been looked at.
void check_read(const Place& place, uint32_t size);
void check_write(Warp& w, const Place& place, uint32_t size);

// Errors name where they were: called by whoever catches one.
std::string where(const Warp& warp, const Instruction& i);

// ---- special registers

std::optional<Special> special_of(const std::string& name);
uint32_t special(Special which, const Launch& launch, const Block& block, int warp, int lane);

// ---- families of instructions; each says what an opcode is, or that it is none of its own

struct Operand {
  enum Kind : uint8_t { name, number, list, address, none } kind = none;
  std::string text;            // a register, label or symbol
  uint64_t value = 0;          // a number; of an address: its offset
  std::vector<Operand> inner;  // a list; an address: its base, and the coordinates behind it
  bool negated = false;        // !p
};

// What decoding needs of the parser.
struct Decoder {
  virtual ~Decoder() = default;
  // Registers by name, numbers and symbols as registers of that file; `_` is a register nobody
  // reads.
  virtual Register source(const Operand& operand, File file) = 0;
  virtual Register destination(const Operand& operand, File file) = 0;
  virtual uint64_t symbol_or_number(const Operand& operand) = 0;

  Instruction* i = nullptr;
  std::vector<std::string> name;  // an opcode at its points
  std::vector<Operand> operands;

  bool has(const char* part) const;
  const std::string& type(int from_end = 0) const { return name[name.size() - 1 - from_end]; }
  void write(int operand, File file);  // all writes come before the first read
  void read(int operand, File file);
  void address(int operand, int which = 0, File base = File::b64);
  void check(File file) const;  // that the last register is of this file
  [[noreturn]] void unknown(const std::string& what = "") const;
};

File file_of(const std::string& type);
int size_of(const std::string& type);

bool moves(Decoder& d);
bool arithmetic(Decoder& d);
bool bits(Decoder& d);
bool comparison(Decoder& d);
bool conversion(Decoder& d);
bool control(Decoder& d);
bool memory(Decoder& d);
bool matrix(Decoder& d);
bool warpgroup(Decoder& d);
bool asynchronous(Decoder& d);

}  // namespace ptx
