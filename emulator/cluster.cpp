// The emulator's scheduler: the threads of a cluster as fibers, and launches.
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "emulator.h"

namespace emulator {
namespace {

constexpr size_t kStack = 128 * 1024;
Cluster* running = nullptr;

[[gnu::noinline]] void start_fiber(jmp_buf from, const ucontext_t& to) {
  if (_setjmp(from) == 0) setcontext(&to);
}

}  // namespace

Block& block() { return *running->self->block; }

Cluster::Cluster(std::string kernel, dim3 grid, dim3 block, int64_t shared, int blocks)
    : kernel(std::move(kernel)), block_threads(block.x * block.y * block.z) {
  gridDim = grid, blockDim = block;
  threads = blocks * block_threads;
  for (int rank = 0; rank < blocks; ++rank) {
    this->blocks.push_back(std::make_unique<Block>(*this, rank, block, shared));
    for (Thread& t : this->blocks.back()->threads()) {
      t.stack = std::make_unique_for_overwrite<char[]>(kStack);
      getcontext(&t.start);
      t.start.uc_stack.ss_sp = t.stack.get();
      t.start.uc_stack.ss_size = kStack;
      makecontext(&t.start, &Cluster::start, 0);
    }
  }
}

void Cluster::run(dim3 first, const std::function<void()>& body) {
  body_ = &body;
  mbarriers.clear(), loads.clear(), readings.clear();
  barrier = Barrier{};
  std::vector<Thread*> all;
  for (const auto& block : blocks) {
    block->start(dim3(first.x + block->rank(), first.y, first.z));
    for (Thread& t : block->threads()) all.push_back(&t);
  }
  for (size_t left = all.size(); left > 0;) {
    bool progress = false;
    for (Thread* t : all) {
      if (t->done || (t->ready && !t->ready())) continue;
      t->ready = nullptr;
      progress = true;
      self = t;
      threadIdx = t->index, blockIdx = t->block->index();
      if (std::exchange(t->started, true))
        switch_fiber(scheduler, t->here);
      else
        start_fiber(scheduler, t->start);
      if (error_) std::rethrow_exception(error_);
      left -= t->done;
    }
    if (!progress && !deliver()) deadlock();
  }
}

// A fiber runs one block after the other.
void Cluster::start() {
  for (;;) {
    running->enter();
    switch_fiber(running->self->here, running->scheduler);
  }
}

void Cluster::enter() {
  try {
    (*body_)();
    self->block->end();
  } catch (...) {
    error_ = std::current_exception();
  }
  self->done = true;
}

// Of all threads of the cluster. Hardware does without those that have ended; the emulator does
// not, so that nobody comes to rely on it.
void Cluster::sync(Where where) {
  self->block->meet(barrier, threads, "cluster_sync", where, false);
}

bool Cluster::deliver() {
  if (loads.empty()) return false;
  const Load load = std::move(loads.back());
  loads.pop_back();
  load.block->deliver(load);
  return true;
}

void Cluster::deadlock() const {
  std::string told;
  size_t finished = 0;
  for (const auto& block : blocks) {
    std::map<std::string, std::vector<int>> waiting;
    for (const Thread& t : block->threads())
      if (t.done)
        ++finished;
      else
        waiting[t.waits_for()].push_back(t.rank);
    const std::string of =
        blocks.size() == 1 ? "" : " of block " + std::to_string(block->rank()) + " of the cluster";
    for (const auto& [why, ranks] : waiting)
      told += "\n  " + std::to_string(ranks.size()) + " threads (" + std::to_string(ranks.front()) +
              " to " + std::to_string(ranks.back()) + ")" + of + " wait for " + why;
    told += block->begun(of);
  }
  const dim3 first = blocks.front()->index();
  throw std::runtime_error("emulator: kernel " + kernel + ", block (" + std::to_string(first.x) +
                           ", " + std::to_string(first.y) + ", " + std::to_string(first.z) +
                           "): deadlock; " + std::to_string(finished) + " threads have finished" +
                           told);
}

std::string launch(const std::string& kernel, dim3 grid, dim3 block, int64_t shared,
                   const std::function<void()>& body, int cluster) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > 1024)
    return "invalid configuration argument";
  if (cluster < 1 || cluster > 8 || grid.x % cluster) return "cluster misconfiguration";
  if (shared > kSharedLimit) return "invalid argument";
  Cluster c(kernel, grid, block, shared, cluster);
  running = &c;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster) c.run(dim3(x, y, z), body);
  return "";
}

}  // namespace emulator
