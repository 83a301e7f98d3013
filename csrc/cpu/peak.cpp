// Rate of the inner loop alone, for benchmarks: no pass can be faster than this.
#include <cpu.h>
#include <microkernel.h>
#include <parallel.h>

#include <vector>

namespace fastst::cpu {

int64_t multiply_panels(int64_t rounds, int threads) {
  constexpr int kVectors = kMostVectors, kRows = most_rows(kVectors), kDepth = 64;
  constexpr int64_t kWidth = kVectors * kLanes;  // both panels fit the first-level cache
  const Multiply run = multiply_for(kRows, kVectors, true);
  parallel_for(threads, threads, [&](int64_t) {
    std::vector<float> a(kRows * kDepth, 1), b(kDepth * kWidth, 1), c(kRows * kWidth);
    int64_t rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = r * kDepth;
    const Segment segment{0, 0, kDepth};
    for (int64_t i = 0; i < rounds; ++i) {
      run(a.data(), rows, 1, b.data(), kWidth, &segment, 1, c.data(), kWidth, false);
    }
  });
  return 2 * rounds * threads * kRows * kDepth * kWidth;
}

}  // namespace fastst::cpu
