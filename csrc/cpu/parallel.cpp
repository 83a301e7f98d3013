#include <parallel.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace fastst::cpu {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
std::atomic<GompParallel> gomp{nullptr};

struct Loop {
  void (*body)(void*, int64_t);
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::mutex lock{};
  std::exception_ptr error{};

  void work() {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, i);
    } catch (...) {
      next.store(count, std::memory_order_relaxed);
      const std::lock_guard<std::mutex> held(lock);
      if (!error) error = std::current_exception();
    }
  }
};

void work(void* loop) { static_cast<Loop*>(loop)->work(); }

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kKeptPerThread = size_t(256) << 20;

struct Block {
  float* data;
  size_t bytes;
};

struct Store;

// The stores of all threads. It is never destroyed: threads may end after everything else.
struct Stores {
  std::mutex lock;
  std::vector<Store*> all;
  static Stores& get() {
    static Stores* stores = new Stores;
    return *stores;
  }
};

struct Store {
  std::mutex lock;  // against release, which another thread may call
  std::vector<Block> free;
  size_t held = 0;

  Store() {
    Stores& stores = Stores::get();
    const std::lock_guard<std::mutex> held_lock(stores.lock);
    stores.all.push_back(this);
  }
  ~Store() {
    Stores& stores = Stores::get();
    {
      const std::lock_guard<std::mutex> held_lock(stores.lock);
      std::erase(stores.all, this);
    }
    release();
  }
  void release() {
    const std::lock_guard<std::mutex> held_lock(lock);
    for (const Block& b : free) std::free(b.data);
    free.clear(), held = 0;
  }
};

thread_local Store store_;

}  // namespace

void use_openmp(uintptr_t address) { gomp = reinterpret_cast<GompParallel>(address); }

void parallel_for(int threads, int64_t count, void (*body)(void*, int64_t), void* context) {
  Loop loop{body, context, count};
  const auto wanted = static_cast<unsigned>(std::min<int64_t>(std::max(threads, 1), count));
  if (wanted <= 1) {
    loop.work();
  } else if (const GompParallel parallel = gomp) {
    parallel(work, &loop, wanted, 0);
  } else {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < wanted; ++i) others.emplace_back(work, &loop);
    loop.work();
    for (std::thread& t : others) t.join();
  }
  if (loop.error) std::rethrow_exception(loop.error);
}

Scratch::Scratch(int64_t floats) {
  const size_t needed = static_cast<size_t>(std::max<int64_t>(floats, 1)) * sizeof(float);
  {
    Store& store = store_;
    const std::lock_guard<std::mutex> held_lock(store.lock);
    auto& free = store.free;
    auto best = free.end();
    for (auto b = free.begin(); b != free.end(); ++b)
      if (b->bytes >= needed && (best == free.end() || b->bytes < best->bytes)) best = b;
    if (best != free.end() && best->bytes <= 4 * std::max(needed, kHugePage)) {
      data_ = best->data, bytes_ = best->bytes, store.held -= bytes_;
      *best = free.back(), free.pop_back();
      return;
    }
  }
  const size_t unit = needed >= kHugePage ? kHugePage : 64;
  bytes_ = (needed + unit - 1) / unit * unit;
  data_ = static_cast<float*>(std::aligned_alloc(unit, bytes_));
  if (!data_) throw std::bad_alloc();
  if (unit == kHugePage) madvise(data_, bytes_, MADV_HUGEPAGE);
}

Scratch::~Scratch() {
  Store& store = store_;
  const std::lock_guard<std::mutex> held_lock(store.lock);
  if (store.held + bytes_ > kKeptPerThread) {
    std::free(data_);
    return;
  }
  store.free.push_back({data_, bytes_});
  store.held += bytes_;
}

int64_t kept_bytes() {
  Stores& stores = Stores::get();
  const std::lock_guard<std::mutex> held_lock(stores.lock);
  size_t bytes = 0;
  for (Store* s : stores.all) {
    const std::lock_guard<std::mutex> its_lock(s->lock);
    bytes += s->held;
  }
  return static_cast<int64_t>(bytes);
}

void release_kept() {
  Stores& stores = Stores::get();
  const std::lock_guard<std::mutex> held_lock(stores.lock);
  for (Store* s : stores.all) s->release();
}

}  // namespace fastst::cpu
