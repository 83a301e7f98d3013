// Hopper's units on cases worked out by hand, and bugs: `hopper_cases NAME` prints what happens.
#include <cstdio>
#include <device/launch.cuh>
#include <device/tma.cuh>
#include <device/wgmma.cuh>
#include <map>
#include <vector>

using namespace fastst;

namespace {

constexpr int kOut = 128 * 128;
float out[kOut];
const Global<float> to(out, out, out + kOut);

int rank() { return static_cast<int>(threadIdx.x); }

__half half(float v) { return __float2half_rn(v); }

template <class... P, class... A>
void go(int threads, int bytes, void (*kernel)(P...), A... arguments) {
  launch("case", kernel, dim3(1), dim3(threads), bytes, Stream{}, "a case", arguments...);
}

void print(int count) {
  for (int i = 0; i < count; ++i) std::printf("%g ", double(out[i]));
}

void open(Shared<uint64_t> barrier, int arrivals) {
  if (rank() == 0) mbarrier_init(barrier, arrivals), mbarrier_fence_init();
  sync_block();
}

// ---- TMA: first elements of the 16-byte pieces, as they lie in shared memory

template <class... C>
void pieces_kernel(TensorMap map, Global<float> to, C... at) {
  const Shared<uint64_t> full = shared<uint64_t>(0);
  const Shared<__half> s = shared<__half>(1024);
  const int bytes = map.tiles.box_bytes();
  open(full, 1);
  if (rank() == 0) mbarrier_arrive_expect(full, bytes), tma_load(s, map, full, at...);
  mbarrier_wait(full, 0);
  for (int i = rank(); i < bytes / 16; i += 32) to[i] = __half2float(s[8 * i]);
}

// Element (w, h, t, n, c = 0) of the tensor holds 1 + w + 10 h + 100 t + 1000 n.
void box(std::array<int, 5> step, std::array<int, 5> at) {
  std::vector<__half> x;
  const std::array<int64_t, 5> size = {8, 5, 4, 3, 2};
  for (int n = 0; n < 2; ++n)
    for (int t = 0; t < 3; ++t)
      for (int h = 0; h < 4; ++h)
        for (int w = 0; w < 5; ++w)
          for (int c = 0; c < 8; ++c) x.push_back(half(float(1 + w + 10 * h + 100 * t + 1000 * n)));
  const TensorMap map = tensor_map({Dtype::f16,
                                    x.data(),
                                    int64_t(x.size()),
                                    5,
                                    size,
                                    {1, 8, 40, 160, 480},
                                    {8, 3, 2, 1, 1},
                                    step});
  go(32, 4096, pieces_kernel<int, int, int, int, int>, map, to, at[0], at[1], at[2], at[3], at[4]);
  print(6);
}

// Piece p of row r of the tensor holds 10 r + p.
void swizzle(Swizzle mode) {
  const int pieces = swizzle_span(mode) / 16;
  std::vector<__half> x;
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8 * pieces; ++c) x.push_back(half(float(10 * r + c / 8)));
  const TensorMap map = tensor_map({Dtype::f16,
                                    x.data(),
                                    int64_t(x.size()),
                                    2,
                                    {8 * pieces, 16},
                                    {1, 8 * pieces},
                                    {8 * pieces, 16},
                                    {1, 1},
                                    mode});
  go(32, 4096, pieces_kernel<int, int>, map, to, 0, 0);
  print(16 * pieces);
}

// What is refused by the host.
void map_of(int64_t row, int box, Swizzle mode) {
  static __half x[4096];
  tensor_map({Dtype::f16, x, 4096, 2, {64, 8}, {1, row}, {box, 8}, {1, 1}, mode});
}

void store_kernel(TensorMap map, bool fence, bool wait) {
  const Shared<__half> s = shared<__half>(1024);
  for (int i = 0; i < 8; ++i) s[8 * rank() + i] = half(float(rank()));
  if (fence) fence_proxy_async();
  sync_block();
  if (rank() != 0) return;
  tma_store(map, s, 0, -1);
  tma_commit();
  if (wait) tma_wait_read<0>();
}

void store(bool fence, bool wait) {  // 32 rows of 8, the first of which falls off the tensor
  static __half x[8 * 40];
  const TensorMap map = tensor_map({Dtype::f16, x, 8 * 40, 2, {8, 40}, {1, 8}, {8, 32}, {1, 1}});
  go(32, 4096, store_kernel, map, fence, wait);
  for (int r = 0; r < 40; ++r) out[r] = __half2float(x[8 * r]);
  print(33);
}

// ---- wgmma: one tile, against a plain product

template <class T>
T element(float v) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

template <class T, int N, Major MA, Major MB, Swizzle S>
void product_kernel(TensorMap a, TensorMap b, Global<float> to) {
  constexpr int kSpan = swizzle_span(S), kElements = kSpan / 2, K = kElements;
  constexpr int kBoxes = (N + kElements - 1) / kElements;  // along N
  const Shared<uint64_t> full = shared<uint64_t>(0);
  const Shared<T> sa = shared<T>(1024), sb = shared<T>(1024 + 64 * 128);
  open(full, 1);
  if (rank() == 0) {
    const int boxes_a = MA == Major::k ? 1 : 64 / kElements, boxes_b = MB == Major::k ? 1 : kBoxes;
    mbarrier_arrive_expect(full, boxes_a * a.tiles.box_bytes() + boxes_b * b.tiles.box_bytes());
    for (int i = 0; i < boxes_a; ++i) tma_load(sa + i * K * kElements, a, full, i * kElements, 0);
    for (int i = 0; i < boxes_b; ++i) tma_load(sb + i * K * kElements, b, full, i * kElements, 0);
  }
  mbarrier_wait(full, 0);
  float d[N / 2];
  wgmma_fence();
  for (int k = 0; k < K / 16; ++k) {
    const Descriptor da = MA == Major::k ? descriptor(sa, S) + 32 * k
                                         : descriptor(sa, S, 8 * kSpan, K * kSpan) + 16 * k * kSpan;
    const Descriptor db = MB == Major::k ? descriptor(sb, S) + 32 * k
                                         : descriptor(sb, S, 8 * kSpan, K * kSpan) + 16 * k * kSpan;
    wgmma<T, N, MA, MB>(d, da, db, k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  keep(d);
  for (int i = 0; i < N / 2; ++i) to[rank() * 128 + i] = d[i];
}

// Values −4 to 4: every sum is exact.
float value(int row, int k, int salt) { return float((row * 7 + k * 5 + row * k + salt) % 9 - 4); }

// rows × K, or K × rows, of a matrix.
template <class T>
TensorMap matrix(std::vector<T>& x, int rows, int K, int salt, Major major, Swizzle mode) {
  const bool along_k = major == Major::k;
  const int span = swizzle_span(mode) / 2, pitch = along_k ? K : (rows + 7) / 8 * 8;
  x.assign(static_cast<size_t>(pitch) * (along_k ? rows : K), element<T>(0));
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < K; ++k)
      x[along_k ? r * pitch + k : k * pitch + r] = element<T>(value(r, k, salt));
  return tensor_map({std::is_same_v<T, __half> ? Dtype::f16 : Dtype::bf16,
                     x.data(),
                     int64_t(x.size()),
                     2,
                     {along_k ? K : rows, along_k ? rows : K},
                     {1, pitch},
                     {span, along_k ? rows : K},
                     {1, 1},
                     mode});
}

void compare(int N, int K) {
  int wrong = 0;
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < N / 2; ++i) {
      const Place at = accumulator(t, i);
      float sum = 0;
      for (int k = 0; k < K; ++k) sum += value(at.row, k, 1) * value(at.column, k, 2);
      wrong += !(out[t * 128 + i] == sum);
    }
  std::printf("%d wrong of %d\n", wrong, 64 * N);
}

template <class T, int N, Major MA, Major MB, Swizzle S>
void product() {
  constexpr int K = swizzle_span(S) / 2;
  std::vector<T> a, b;
  const TensorMap ma = matrix(a, 64, K, 1, MA, S), mb = matrix(b, N, K, 2, MB, S);
  go(128, 1024 + 64 * 128 + 40 * 1024, product_kernel<T, N, MA, MB, S>, ma, mb, to);
  compare(N, K);
}

template <class T>
void products() {
  constexpr Major k = Major::k, mn = Major::mn;
  product<T, 8, k, k, Swizzle::b128>();
  product<T, 144, k, k, Swizzle::b128>();
  product<T, 256, k, k, Swizzle::b64>();
  product<T, 232, k, k, Swizzle::b32>();
  product<T, 144, k, mn, Swizzle::b128>();
  product<T, 48, mn, k, Swizzle::b128>();
  product<T, 96, mn, mn, Swizzle::b64>();
  product<T, 40, mn, mn, Swizzle::b32>();
}

// D = 256·row + column, as each thread has it.
template <int N>
void accumulators_kernel(Global<float> to) {
  const Shared<__nv_bfloat16> a = shared<__nv_bfloat16>(0), b = shared<__nv_bfloat16>(16384);
  const auto fill = [](Shared<__nv_bfloat16> s, int row, float first, float second) {
    for (int k = 0; k < 16; ++k)  // a swizzle of 32 bytes: pieces change places in rows 4 to 7 of 8
      s[row * 16 + (k ^ (row / 4 % 2 * 8))] = __float2bfloat16_rn(k == 0   ? first
                                                                  : k == 1 ? second
                                                                           : 0);
  };
  if (rank() < 64) fill(a, rank(), float(rank()), 1);
  for (int n = rank(); n < N; n += 128) fill(b, n, 256, float(n));
  fence_proxy_async();
  sync_block();
  float d[N / 2];
  wgmma_fence();
  wgmma<__nv_bfloat16, N>(d, descriptor(a, Swizzle::b32), descriptor(b, Swizzle::b32), false);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) to[rank() * (N / 2) + i] = d[i];
}

// ---- a pipeline, and what can be wrong with it

enum Bug {
  none,
  wrong_swizzle,
  wrong_parity,
  expect_less,
  expect_more,
  expect_one,
  row_off,
  no_wait_full,
  release_early,
  release_by_one_warp,
  no_wgmma_fence,
  no_wait,
  wait_for_one_less,
  write_accumulators,
  write_a,
  no_init_fence,
  other_init_fence,
  no_init_barrier,
  from_registers,
};

constexpr int kN = 48, kSteps = 5, kK = 64 * kSteps, kStages = 2;

void pipeline_kernel(TensorMap a, TensorMap b, Global<float> to, Bug bug) {
  constexpr int kTileA = 64 * 128, kTileB = kN * 128;
  const Shared<uint64_t> full = shared<uint64_t>(0), empty = shared<uint64_t>(8 * kStages);
  const auto stage_a = [](int s) { return shared<__half>(1024 + s * kTileA); };
  const auto stage_b = [](int s) { return shared<__half>(1024 + kStages * kTileA + s * kTileB); };
  if (rank() == 128) {
    for (int s = 0; s < kStages; ++s)
      mbarrier_init(full + s, 1), mbarrier_init(empty + s, bug == release_by_one_warp ? 1 : 4);
    if (bug == other_init_fence)
      fence_proxy_async();
    else if (bug != no_init_fence)
      mbarrier_fence_init();
  }
  if (bug != no_init_barrier) sync_block();
  if (rank() == 128)
    for (int i = 0; i < kSteps; ++i) {
      const int s = i % kStages;
      if (i >= kStages) mbarrier_wait(empty + s, (i / kStages + 1) % 2);
      const int wrong = bug == expect_less   ? -16
                        : bug == expect_more ? 16
                        : bug == expect_one  ? -kTileA
                                             : 0;
      mbarrier_arrive_expect(full + s, kTileA + kTileB + wrong);
      tma_load(stage_a(s), a, full + s, 64 * i, 0);
      tma_load(stage_b(s), b, full + s, 64 * i, 0);
    }
  if (rank() >= 128) return;
  float d[kN / 2];
  uint32_t registers[4][4];
  const auto release = [&](int s) {
    const bool mine = bug == release_by_one_warp ? rank() == 0 : rank() % 32 == 0;
    if (mine) mbarrier_arrive(empty + s);
  };
  for (int i = 0; i < kSteps; ++i) {
    const int s = i % kStages;
    if (bug != no_wait_full) mbarrier_wait(full + s, (i / kStages + (bug == wrong_parity)) % 2);
    const Swizzle mode = bug == wrong_swizzle ? Swizzle::b64 : Swizzle::b128;
    const Descriptor da = descriptor(stage_a(s) + (bug == row_off ? 64 : 0), mode);
    const Descriptor db = descriptor(stage_b(s), mode);
    const bool fragments = bug == from_registers || bug == write_a;
    if (fragments)
      for (int k = 0; k < 4; ++k) {
        const int lane = rank() % 32, row = rank() / 32 * 16 + lane % 16;
        const int piece = 2 * k + lane / 16;
        ldmatrix_x4(registers[k], stage_a(s) + 64 * row + (piece ^ row % 8) * 8);
      }
    if (bug != no_wgmma_fence) wgmma_fence();
    for (int k = 0; k < (bug == wrong_swizzle ? 2 : 4); ++k)
      if (fragments)
        wgmma<__half, kN>(d, registers[k], db + 32 * k, i + k > 0);
      else
        wgmma<__half, kN>(d, da + 32 * k, db + 32 * k, i + k > 0);
    wgmma_commit();
    if (bug == release_early) release(s);
    if (bug == write_accumulators) d[3] = 0;
    if (bug == write_a) registers[1][2] = 0;
    if (bug == wait_for_one_less)
      wgmma_wait<1>();
    else if (bug != no_wait)
      wgmma_wait<0>();
    if (bug != release_early) release(s);
  }
  if (bug == wait_for_one_less) wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) to[rank() * 128 + i] = d[i];
}

void pipeline(Bug bug) {
  std::vector<__half> a, b;
  const TensorMap ma = matrix(a, 64, kK, 1, Major::k, Swizzle::b128);
  const TensorMap mb = matrix(b, kN, kK, 2, Major::k, Swizzle::b128);
  go(160, 1024 + kStages * (64 + kN) * 128, pipeline_kernel, ma, mb, to, bug);
  compare(kN, kK);
}

// ---- what is left

void unfenced_kernel(bool fence, bool barrier) {  // wgmma of what threads have written
  const Shared<__half> s = shared<__half>(0);
  for (int i = 0; i < 64; ++i) s[rank() * 64 + i] = half(1);
  if (fence) fence_proxy_async();
  if (barrier) sync_block();
  float d[4];
  wgmma_fence();
  wgmma<__half, 8>(d, descriptor(s), descriptor(s + 64 * 64), false);
  wgmma_commit();
  wgmma_wait<0>();
  to[rank()] = d[0];
}

void unfenced(bool fence, bool barrier) {
  go(128, 128 * 128, unfenced_kernel, fence, barrier);
  print(4);
}

void overwrite_kernel(TensorMap map, bool fence) {  // TMA over what threads have written
  const Shared<uint64_t> full = shared<uint64_t>(0);
  const Shared<__half> s = shared<__half>(1024);
  s[rank()] = half(1);
  if (fence) fence_proxy_async();
  open(full, 1);
  if (rank() == 0) mbarrier_arrive_expect(full, 1024), tma_load(s, map, full, 0, 0);
  mbarrier_wait(full, 0);
  to[rank()] = __half2float(s[rank()]);
}

void overwrite(bool fence) {
  static __half x[512];
  const TensorMap map = tensor_map({Dtype::f16, x, 512, 2, {64, 8}, {1, 64}, {64, 8}, {1, 1}});
  go(128, 4096, overwrite_kernel, map, fence);
  print(4);
}

template <int Less, int More>
void registers_kernel() {  // 384 threads have 168 each
  if (rank() < 128)
    registers_decrease<Less>();
  else
    registers_increase<More>();
}

void ldmatrix_kernel(Global<float> to) {  // row r of matrix j holds 100 j + 10 r + column
  const Shared<__half> s = shared<__half>(0);
  const int j = rank() / 8, r = rank() % 8;
  for (int i = 0; i < 8; ++i) s[rank() * 8 + i] = half(float(100 * j + 10 * r + i));
  sync_block();
  uint32_t m[4];
  uint32_t turned[4];
  ldmatrix_x4(m, s + rank() * 8);
  ldmatrix_x4_transposed(turned, s + rank() * 8);
  sync_block();
  stmatrix_x4(s + (rank() ^ 1) * 8, m);
  sync_block();
  const auto second = [](uint32_t both) {
    return __half2float(__half{std::bit_cast<_Float16>(uint16_t(both >> 16))});
  };
  for (int k = 0; k < 4; ++k)
    to[rank() * 4 + k] = second(m[k]), to[160 + rank() * 4 + k] = second(turned[k]);
  to[128 + rank()] = __half2float(s[rank() * 8]);
}

template <class F>
void layout(F place, int count) {
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < count; ++i) std::printf("%d,%d ", place(t, i).row, place(t, i).column);
}

const std::map<std::string, void (*)()> kCases = {
    {"box", [] { box({1, 1, 1, 1, 1}, {0, 1, 2, 1, 1}); }},
    {"box before", [] { box({1, 1, 1, 1, 1}, {0, -2, -1, 2, 0}); }},
    {"box beyond", [] { box({1, 1, 1, 1, 1}, {0, 3, 3, 0, 1}); }},
    {"box outside", [] { box({1, 1, 1, 1, 1}, {0, 0, 0, -1, 0}); }},
    {"box of steps", [] { box({1, 2, 2, 1, 1}, {0, -1, -1, 1, 0}); }},
    {"swizzle 128", [] { swizzle(Swizzle::b128); }},
    {"swizzle 64", [] { swizzle(Swizzle::b64); }},
    {"swizzle 32", [] { swizzle(Swizzle::b32); }},
    {"map stride", [] { map_of(68, 64, Swizzle::b128); }},
    {"map row", [] { map_of(64, 12, Swizzle::none); }},
    {"map span", [] { map_of(64, 32, Swizzle::b128); }},
    {"map", [] { map_of(64, 64, Swizzle::b128); }},
    {"store", [] { store(true, true); }},
    {"store without fence", [] { store(false, true); }},
    {"store without wait", [] { store(true, false); }},
    {"products f16", products<__half>},
    {"products bf16", products<__nv_bfloat16>},
    {"accumulators", [] { go(128, 32768, accumulators_kernel<80>, to), print(128 * 40); }},
    {"accumulator layout", [] { layout(accumulator, 128); }},
    {"a layout", [] { layout(a_fragment, 8); }},
    {"pipeline", [] { pipeline(none); }},
    {"pipeline from registers", [] { pipeline(from_registers); }},
    {"wrong swizzle", [] { pipeline(wrong_swizzle); }},
    {"wrong parity", [] { pipeline(wrong_parity); }},
    {"expect less", [] { pipeline(expect_less); }},
    {"expect more", [] { pipeline(expect_more); }},
    {"expect one", [] { pipeline(expect_one); }},
    {"row off", [] { pipeline(row_off); }},
    {"no wait for full", [] { pipeline(no_wait_full); }},
    {"release early", [] { pipeline(release_early); }},
    {"release by one warp", [] { pipeline(release_by_one_warp); }},
    {"no wgmma fence", [] { pipeline(no_wgmma_fence); }},
    {"no wait", [] { pipeline(no_wait); }},
    {"wait for one less", [] { pipeline(wait_for_one_less); }},
    {"write accumulators", [] { pipeline(write_accumulators); }},
    {"write a", [] { pipeline(write_a); }},
    {"no init fence", [] { pipeline(no_init_fence); }},
    {"other init fence", [] { pipeline(other_init_fence); }},
    {"no init barrier", [] { pipeline(no_init_barrier); }},
    {"written by threads", [] { unfenced(true, true); }},
    {"no proxy fence", [] { unfenced(false, true); }},
    {"no barrier", [] { unfenced(true, false); }},
    {"overwrite", [] { overwrite(true); }},
    {"overwrite without fence", [] { overwrite(false); }},
    {"registers", [] { go(384, 0, registers_kernel<24, 240>); }},
    {"too many registers", [] { go(384, 0, registers_kernel<40, 240>); }},
    {"fewer registers", [] { go(384, 0, registers_kernel<24, 160>); }},
    {"ldmatrix", [] { go(32, 512, ldmatrix_kernel, to), print(288); }},
};

}  // namespace

int main(int, char** arguments) {
  try {
    kCases.at(arguments[1])();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
}
