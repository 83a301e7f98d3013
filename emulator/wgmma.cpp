#include "wgmma.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <swizzle.h>

#include <algorithm>
#include <bit>
#include <cstring>

namespace emulator {
namespace {

constexpr float kPoison = std::bit_cast<float>(0x7fb0dead);
constexpr int kRows = 64, kDepth = 16;

Warpgroup::Member& self() { return block().warpgroup().member[block().self().rank % kWarpgroup]; }

bool poisoned(const float* d, int n) {
  return std::all_of(d, d + n / 2,
                     [](float v) { return std::bit_cast<uint32_t>(v) == 0x7fb0dead; });
}

// Row and column of accumulator i of thread t, as PTX's figure of the m64nNk16 fragments has them.
int row(int t, int i) { return 16 * (t / 32) + t % 32 / 4 + (i & 2 ? 8 : 0); }
int column(int t, int i) { return 8 * (i / 4) + 2 * (t % 4) + (i & 1); }

// f(r, k, address) for the 16-byte pieces of a matrix of `rows` rows (of M or N) and 16 of K: eight
// neighbours along K, or along M or N where `along_rows`, from (r, k) on.
template <class F>
void each_piece(uint64_t descriptor, bool along_rows, int rows, F f) {
  Block& b = block();
  const auto field = [&](int from) { return int64_t(descriptor >> from & 0x3fff) << 4; };
  const int64_t start = field(0), leading = field(16), stride = field(32);
  const auto mode = static_cast<fastst::Swizzle>((4 - (descriptor >> 62)) % 4);
  if (descriptor & 0x3ff1c000c000c000) b.fail("wgmma descriptor with bits that have no meaning");
  if (descriptor >> 49 & 7)
    b.fail("wgmma descriptor with a base offset: nobody here knows what it does");
  const int64_t span = fastst::swizzle_span(mode), period = 8 * span;
  if (mode == fastst::Swizzle::none) {
    for (int r = 0; r < rows; r += along_rows ? 8 : 1)
      for (int k = 0; k < kDepth; k += along_rows ? 1 : 8)
        f(r, k,
          along_rows ? start + r / 8 * stride + k / 8 * leading + k % 8 * 16
                     : start + r / 8 * stride + k / 8 * leading + r % 8 * 16);
    return;
  }
  if (start % period >= span || (along_rows && start % span))
    b.fail("wgmma descriptor that starts at byte " + std::to_string(start) +
           ", not in the first row of a swizzle period of " + std::to_string(period));
  if (!along_rows && start % span + 32 > span)
    b.fail("wgmma descriptor that reaches beyond a row of " + std::to_string(span) + " bytes");
  if (stride % period || (along_rows && rows > span / 2 && leading % period))
    b.fail("wgmma descriptor with a stride that is no multiple of the swizzle period");
  for (int r = 0; r < rows; r += along_rows ? 8 : 1)
    for (int k = 0; k < kDepth; k += along_rows ? 1 : 8) {
      const int64_t linear =
          along_rows ? r / (span / 2) * leading + r % (span / 2) * 2 + k / 8 * stride + k % 8 * span
                     : r / 8 * stride + r % 8 * span + k * 2;
      f(r, k, swizzled(mode, start + linear));
    }
}

float widen(uint16_t bits, bool half) {
  return half ? __half2float(std::bit_cast<__half>(bits))
              : __bfloat162float(std::bit_cast<__nv_bfloat16>(bits));
}

// The matrix at a descriptor, as (16, columns).
void read(uint64_t descriptor, bool along_rows, int rows, bool half, float* to, int columns) {
  each_piece(descriptor, along_rows, rows, [&](int r, int k, int64_t address) {
    uint16_t piece[8];
    std::memcpy(piece, block().bytes(address), 16);
    for (int i = 0; i < 8; ++i)
      to[along_rows ? k * columns + r + i : (k + i) * columns + r] = widen(piece[i], half);
  });
}

void compute(Wgmma& op) {
  const Instruction& w = op.instruction;
  static float a[kDepth][kRows], b[kDepth][256];
  if (w.a_in_registers)
    for (int t = 0; t < kWarpgroup; ++t)
      for (int i = 0; i < 8; ++i)
        a[column(t, i)][row(t, i)] =
            widen(static_cast<uint16_t>(op.a[t][i / 2] >> 16 * (i % 2)), w.half);
  else
    read(w.a, w.a_along_m, kRows, w.half, a[0], kRows);
  read(w.b, w.b_along_n, w.n, w.half, b[0], 256);
  for (int r = 0; r < kRows; ++r) {
    float* const d = &(*op.tile)[r * 256];
    if (!w.accumulate) std::fill_n(d, w.n, 0.0f);
    for (int k = 0; k < kDepth; ++k) {
      const float scale = a[k][r];
      for (int n = 0; n < w.n; ++n) d[n] += scale * b[k][n];
    }
  }
  op.computed = true;
}

std::string told(Where at) { return "wgmma at " + line(at); }

// The instruction that this thread issues now: the first to come opens it.
Wgmma& issued(const Instruction& w, Where at) {
  Block& b = block();
  Warpgroup& group = b.warpgroup();
  Warpgroup::Member& me = self();
  const size_t index = me.issued++ - group.first;
  if (index == group.queue.size()) {
    const auto op = std::make_shared<Wgmma>();
    op->instruction = w, op->at = at, op->where = told(at);
    op->reading = b.reading(op->where, b.self().rank / kWarpgroup * kWarpgroup, kWarpgroup);
    group.queue.push_back(op);
  }
  const auto op = group.queue[index];
  if (op->instruction != w || !same(op->at, at))
    b.fail("divergent wgmma: this thread is at " + told(at) + ", others of its warpgroup at " +
           op->where + ", or with other operands");
  me.open.push_back(op), ++b.self().wgmma_under_way;
  return *op;
}

// Takes the accumulators from the thread.
void take(Wgmma& op, float* d) {
  Block& b = block();
  const int t = b.self().rank % kWarpgroup, n = op.instruction.n;
  auto& pending = self().pending;
  auto found = std::find_if(pending.begin(), pending.end(), [&](auto& p) { return p.d == d; });
  if (found == pending.end()) {
    if (!op.tile) op.tile = std::make_shared<Tile>();
    for (int i = 0; i < n / 2; ++i) (*op.tile)[row(t, i) * 256 + column(t, i)] = d[i];
    std::fill_n(d, n / 2, kPoison);
    pending.push_back({d, n, 1, op.tile});
    return;
  }
  if (!op.tile) op.tile = found->tile;
  if (op.tile != found->tile || n != found->n)
    b.fail(op.where + " has other accumulators than in the other threads");
  if (!poisoned(d, n)) b.fail("accumulators written before a wait for " + op.where);
  ++found->open;
}

// Gives what has been computed back to the thread.
void retire(const Wgmma& op) {
  Block& b = block();
  const int t = b.self().rank % kWarpgroup;
  if (op.instruction.a_in_registers &&
      std::memcmp(op.a_at[t], op.a[t].data(), sizeof(op.a[t])) != 0)
    b.fail("registers of A written, or their array out of scope, before a wait for " + op.where);
  b.retire(b.reading(op.reading)), --b.self().wgmma_under_way;
  auto& pending = self().pending;
  const auto p = std::find_if(pending.begin(), pending.end(),
                              [&](auto& candidate) { return candidate.tile == op.tile; });
  if (--p->open) return;
  if (!poisoned(p->d, p->n)) b.fail("accumulators written before a wait for " + op.where);
  for (int i = 0; i < p->n / 2; ++i) p->d[i] = (*p->tile)[row(t, i) * 256 + column(t, i)];
  pending.erase(p);
}

}  // namespace

Warpgroup& Block::warpgroup() {
  const size_t index = me().rank / kWarpgroup;
  if ((index + 1) * kWarpgroup > threads_.size()) fail("wgmma by less than a warpgroup");
  if (warpgroups_.size() <= index) warpgroups_.resize(index + 1);
  if (!warpgroups_[index]) warpgroups_[index] = std::make_shared<Warpgroup>();
  return *warpgroups_[index];
}

void wgmma(const Instruction& w, float* d, const uint32_t* a, Where at) {
  Block& b = block();
  const int t = b.self().rank % kWarpgroup;
  if (!self().fenced) b.fail(told(at) + " with no wgmma_fence in its group");
  Wgmma& op = issued(w, at);
  // What is read is looked up when the first thread comes: nobody may change it from then on.
  const auto look_up = [&](int64_t address, Need& need) {
    b.collect(address, 16, op.reading, need);
  };
  if (op.arrived == 0)
    each_piece(w.b, w.b_along_n, w.n, [&](int, int, int64_t at) { look_up(at, op.b_need); });
  b.check(op.b_need, op.where);
  const int warp = t / kWarp;
  if (!w.a_in_registers) {  // of A, each warp reads its own 16 rows
    if (!op.came[warp])
      each_piece(w.a, w.a_along_m, kRows, [&](int r, int, int64_t at) {
        if (r / 16 == warp) look_up(at, op.a_need[warp]);
      });
    b.check(op.a_need[warp], op.where);
  }
  op.came[warp] = true;
  if (w.a_in_registers) std::copy_n(a, 4, op.a[t].begin()), op.a_at[t] = a;
  take(op, d);
  if (++op.arrived < kWarpgroup) return;
  compute(op);
  b.warpgroup().queue.pop_front(), ++b.warpgroup().first;
}

void wgmma_fence() { self().fenced = true; }

void wgmma_commit() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
  self().fenced = false;
}

void wgmma_wait(size_t pending, Where where) {
  auto& groups = self().groups;
  for (; groups.size() > pending; groups.pop_front())
    for (const auto& op : groups.front()) {
      block().wait([&] { return op->computed; },
                   [&] { return op->where + " to be issued by all, at " + line(where); });
      retire(*op);
    }
}

}  // namespace emulator
