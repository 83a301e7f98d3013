// Threads and scratch memory. The threads are PyTorch's own, if its OpenMP runtime was found.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace fastst::cpu {

// Address of GOMP_parallel of the runtime that PyTorch uses; 0: start threads for every call.
void use_openmp(uintptr_t gomp_parallel);

// Calls body(context, i) once for each i < count, on at most `threads` threads, in any order.
// The first exception that a body throws is thrown again by the caller.
void parallel_for(int threads, int64_t count, void (*body)(void*, int64_t), void* context);

template <class F>
void parallel_for(int threads, int64_t count, F&& body) {
  parallel_for(threads, count, [](void* f, int64_t i) { (*static_cast<F*>(f))(i); }, &body);
}

// Uninitialised floats, aligned to 64 bytes, from a store that each thread keeps: fresh pages cost
// more than what is computed on them. They go back to the store of the thread that frees them.
class Scratch {
 public:
  explicit Scratch(int64_t floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return data_; }
  operator float*() const { return data_; }

 private:
  float* data_;
  size_t bytes_;
};

// Bytes that the stores of all threads keep, at most 256 MiB each; and giving them back.
int64_t kept_bytes();
void release_kept();

}  // namespace fastst::cpu
