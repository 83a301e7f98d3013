// Blocks that copy to each other, and what can be wrong with it: `cluster_cases NAME`.
#include <cuda_fp16.h>

#include <cstdio>
#include <device/launch.cuh>
#include <device/tma.cuh>
#include <map>
#include <vector>

using namespace fastst;

namespace {

enum Bug {
  none,
  sync_block_only,  // before the first use of the others' mbarriers
  no_init_fence,
  release_own_only,   // the others are not told that a stage is free
  count_own_only,     // nor waited for
  release_to_nobody,  // to a block that does not exist
  release_early,
  wrong_parity,
  mask_one,
  mask_three_blocks,
  expect_own_only,
  expect_more,
  leave_at_once,  // with arrivals of the others to come
  leave_during_a_copy,
  step_less,  // of one block
};

constexpr int kSteps = 5, kStages = 2, kBlocks = 2, kRow = 64;
float out[4 * 32];

int rank() { return static_cast<int>(threadIdx.x); }

// Each block adds up the products of its own rows of x and of rows of w that all blocks read, which
// they copy to each other in turns. Lane 0 of the first warp copies, the second warp multiplies.
void products_kernel(TensorMap x, TensorMap w, Global<float> to, Bug bug) {
  const int me = cluster_rank(), block = static_cast<int>(blockIdx.x);
  const Shared<uint64_t> full = shared<uint64_t>(0), empty = shared<uint64_t>(8 * kStages);
  const auto row = [](int stage, int i) {
    return shared<__half>(1024 + (2 * stage + i) * kRow * 2);
  };
  if (rank() == 0) {
    const bool own = bug == count_own_only;
    for (int s = 0; s < kStages; ++s)
      mbarrier_init(full + s, 1), mbarrier_init(empty + s, own ? 1 : kBlocks);
    if (bug != no_init_fence) mbarrier_fence_init();
  }
  if (bug == sync_block_only)
    sync_block();
  else
    cluster_sync();
  const int steps = kSteps - (bug == step_less && me == 1);
  if (rank() == 0) {
    for (int i = 0; i < steps; ++i) {
      const int s = i % kStages, bytes = kRow * 2;
      if (i >= kStages) mbarrier_wait(empty + s, (i / kStages + 1 + (bug == wrong_parity)) % 2);
      mbarrier_arrive_expect(full + s, bug == expect_own_only ? bytes
                                       : bug == expect_more   ? 3 * bytes
                                                              : 2 * bytes);
      tma_load(row(s, 0), x, full + s, 0, block * kSteps + i);
      const auto mask = static_cast<uint16_t>(bug == mask_one            ? 1
                                              : bug == mask_three_blocks ? 7
                                                                         : (1 << kBlocks) - 1);
      if (i % kBlocks == me) tma_multicast(row(s, 1), w, full + s, mask, 0, i);
    }
    if (bug != leave_at_once && bug != leave_during_a_copy)
      for (int i = steps; i < steps + kStages; ++i)
        mbarrier_wait(empty + i % kStages, (i / kStages + 1) % 2);
  }
  if (rank() < 32) return;
  const int lane = rank() % 32;
  const auto release = [&](int s) {
    sync_warp();
    if (bug == release_own_only || bug == count_own_only) {
      if (lane == 0) mbarrier_arrive(empty + s);
    } else if (lane < kBlocks) {
      mbarrier_arrive_at(empty + s, bug == release_to_nobody ? lane + 1 : lane);
    }
  };
  float sum = 0;
  for (int i = 0; i < steps; ++i) {
    if (bug == leave_during_a_copy && i == kSteps - 1) break;
    const int s = i % kStages;
    mbarrier_wait(full + s, i / kStages % 2);
    if (bug == release_early) release(s);
    for (int c = lane; c < kRow; c += 32)
      sum += __half2float(row(s, 0)[c]) * __half2float(row(s, 1)[c]);
    if (bug != release_early) release(s);
  }
  to[block * 32 + lane] = sum;
}

TensorMap rows(std::vector<__half>& values, int count) {
  for (int r = 0; r < count; ++r)
    for (int c = 0; c < kRow; ++c) values.push_back(__float2half_rn(float(1 + r)));
  return tensor_map({Dtype::f16,
                     values.data(),
                     int64_t(values.size()),
                     2,
                     {kRow, count},
                     {1, kRow},
                     {kRow, 1},
                     {1, 1}});
}

void products(Bug bug, int grid = 4) {
  std::vector<__half> x, w;
  const TensorMap rows_x = rows(x, 4 * kSteps), rows_w = rows(w, kSteps);
  launch_clusters("case", kBlocks, products_kernel, dim3(grid), dim3(64), 4096, Stream{}, "a case",
                  rows_x, rows_w, Global<float>(out, out, out + 128), bug);
  for (int b = 0; b < 4; ++b) std::printf("%g ", double(out[32 * b]));
}

const std::map<std::string, void (*)()> kCases = {
    {"products", [] { products(none); }},
    {"odd grid", [] { products(none, 3); }},
    {"sync block only", [] { products(sync_block_only); }},
    {"no init fence", [] { products(no_init_fence); }},
    {"release own only", [] { products(release_own_only); }},
    {"count own only", [] { products(count_own_only); }},
    {"release to nobody", [] { products(release_to_nobody); }},
    {"release early", [] { products(release_early); }},
    {"wrong parity", [] { products(wrong_parity); }},
    {"mask one", [] { products(mask_one); }},
    {"mask three blocks", [] { products(mask_three_blocks); }},
    {"expect own only", [] { products(expect_own_only); }},
    {"expect more", [] { products(expect_more); }},
    {"leave at once", [] { products(leave_at_once); }},
    {"leave during a copy", [] { products(leave_during_a_copy); }},
    {"step less", [] { products(step_less); }},
};

}  // namespace

int main(int, char** arguments) {
  try {
    kCases.at(arguments[1])();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
}
