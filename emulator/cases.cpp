// Small kernels whose results and errors are known by hand: `cases NAME` prints what happens.
#include <cstdio>
#include <device/launch.cuh>
#include <device/primitives.cuh>
#include <map>
#include <numeric>

using namespace fastst;

namespace {

constexpr int kOut = 128;
int out[kOut];

int rank() { return static_cast<int>(threadIdx.x); }

void neighbour_kernel(Global<int> to, bool barrier) {
  const Shared<int> s = shared<int>(0);
  s[rank()] = 0;
  sync_block();
  s[rank()] = 10 * rank();
  if (barrier) sync_block();
  to[rank()] = s[(rank() + 1) % int(blockDim.x)];
}

void overwrite_kernel(Global<int> to) {  // write after read
  const Shared<int> s = shared<int>(0);
  s[rank()] = rank();
  sync_block();
  to[rank()] = s[(rank() + 1) % int(blockDim.x)];
  s[rank()] = 0;
}

void warp_kernel(Global<int> to, bool across) {  // ordered within a warp only
  const Shared<int> s = shared<int>(0);
  s[rank()] = 0;
  sync_block();
  s[rank()] = rank();
  sync_warp();
  to[rank()] = s[across ? rank() ^ 32 : rank() ^ 1];
}

void shuffle_kernel(Global<int> to) {
  int sum = rank();
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  to[rank()] = sum;
}

void unwritten_kernel(Global<int> to) {
  const Shared<int> s = shared<int>(0);
  if (rank() != 5) s[rank()] = rank();
  sync_block();
  to[rank()] = s[rank()];
}

void bounds_kernel(Global<int> to) { to[rank() + 1] = 0; }

void shared_bounds_kernel() { shared<int>(0)[rank() + 1] = 0; }

void misaligned_kernel(Global<int> to) { store(to + 1, Pack<int, 4>{}); }

void divergent_kernel() {
  if (rank() < 32)
    sync_block();
  else
    sync_block();
}

void early_exit_kernel() {
  if (rank() >= 32) sync_block();
}

void named_kernel(Global<int> to, int arriving) {  // the second warp hands over to the first
  const Shared<int> s = shared<int>(0);
  if (rank() >= 32) s[rank() - 32] = rank();
  if (rank() < 32 || rank() < 32 + arriving) sync_named(3, 64);
  if (rank() < 32) to[rank()] = s[rank()];
}

// Thread 0 fills one place three times; the others read it after each phase and give it back.
void mbarrier_kernel(Global<int> to, int arrivals) {
  const Shared<uint64_t> full = shared<uint64_t>(0), empty = shared<uint64_t>(8);
  const Shared<int> s = shared<int>(16);
  if (rank() == 0) mbarrier_init(full, 1), mbarrier_init(empty, arrivals);
  sync_block();
  int sum = 0;
  for (int round = 0; round < 3; ++round)
    if (rank() == 0) {
      if (round > 0) mbarrier_wait(empty, (round - 1) % 2);
      s[0] = 1 + round;
      mbarrier_arrive(full);
    } else {
      mbarrier_wait(full, round % 2);
      sum += s[0];
      mbarrier_arrive(empty);
    }
  to[rank()] = sum;
}

void copy_kernel(Global<const int> from, Global<int> to, int shift, bool wait, bool barrier) {
  const Shared<int> s = shared<int>(0);
  copy16_async(s + 4 * rank(), from + 4 * rank() + shift, rank() != 1);
  copy_commit();
  if (wait) copy_wait<0>();
  if (barrier) sync_block();
  to[rank()] = s[4 * ((rank() + 1) % int(blockDim.x))];
}

void two_copies_kernel(Global<const int> from, Global<int> to) {  // the older group only
  const Shared<int> s = shared<int>(0);
  for (int i = 0; i < 2; ++i) {
    copy16_async(s + 4 * i, from + 4 * i, true);
    copy_commit();
  }
  copy_wait<1>();
  to[0] = s[3];
  copy_wait<0>();
  to[1] = s[7];
}

void nothing_kernel() {}

int input[kOut];
const Global<int> to(out, out, out + kOut);
const Global<const int> from(input, input, input + kOut);

template <class... P, class... A>
void go(int threads, int bytes, void (*kernel)(P...), A... arguments) {
  launch("case", kernel, dim3(1), dim3(threads), bytes, Stream{}, "a case", arguments...);
}

const std::map<std::string, void (*)()> kCases = {
    {"barrier", [] { go(64, 256, neighbour_kernel, to, true); }},
    {"missing barrier", [] { go(64, 256, neighbour_kernel, to, false); }},
    {"overwrite", [] { go(64, 256, overwrite_kernel, to); }},
    {"warp", [] { go(64, 256, warp_kernel, to, false); }},
    {"across warps", [] { go(64, 256, warp_kernel, to, true); }},
    {"shuffle", [] { go(64, 0, shuffle_kernel, to); }},
    {"unwritten", [] { go(64, 256, unwritten_kernel, to); }},
    {"global bounds", [] { go(128, 0, bounds_kernel, to); }},
    {"shared bounds", [] { go(64, 256, shared_bounds_kernel); }},
    {"misaligned", [] { go(1, 0, misaligned_kernel, to); }},
    {"divergent", [] { go(64, 0, divergent_kernel); }},
    {"early exit", [] { go(64, 0, early_exit_kernel); }},
    {"named", [] { go(64, 128, named_kernel, to, 32); }},
    {"named deadlock", [] { go(64, 128, named_kernel, to, 31); }},
    {"mbarrier", [] { go(4, 32, mbarrier_kernel, to, 3); }},
    {"mbarrier deadlock", [] { go(4, 32, mbarrier_kernel, to, 4); }},
    {"copy", [] { go(4, 64, copy_kernel, from, to, 0, true, true); }},
    {"copy without wait", [] { go(4, 64, copy_kernel, from, to, 0, false, true); }},
    {"copy without barrier", [] { go(4, 64, copy_kernel, from, to, 0, true, false); }},
    {"copy misaligned", [] { go(4, 64, copy_kernel, from, to, 1, true, true); }},
    {"two copies", [] { go(1, 32, two_copies_kernel, from, to); }},
    {"too many threads", [] { go(1025, 0, nothing_kernel); }},
    {"too much shared memory", [] { go(1, 228 * 1024, nothing_kernel); }},
};

}  // namespace

int main(int, char** arguments) {
  std::iota(input, input + kOut, 100);
  try {
    kCases.at(arguments[1])();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 0;
  }
  for (int i = 0; i < 4; ++i) std::printf("%d ", out[i]);
  std::printf("... %d\n", out[31]);
}
