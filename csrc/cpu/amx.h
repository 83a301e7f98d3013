// Products of bfloat16 in the registers of AMX, each of which holds up to 16 rows of 64 bytes. The
// rows of a left one are positions, each with 16 pairs of k; those of a right one are pairs of k,
// each with 16 columns: what is packed for pairs lies so. Without AMX it is done as AMX would, so
// that all around it can be tried.
#pragma once

#include <cpu.h>
#include <microkernel.h>

#include <optional>
#include <utility>

namespace fastst::cpu {

constexpr int kAmxRows = 16;   // of a register
constexpr int kAmxPairs = 16;  // of k, in a row of a left one: stretches of k are whole ones

// Pairs as AMX multiplies them: zeros fill the last stretch of k.
struct AmxPairs : Bf16Pairs {
  static constexpr int kMultiple = kAmxPairs;
  static constexpr int kMostVectors = 2;
  static void fill(const BFloat16* from, int64_t channels, float* to) {
    Bf16Pairs::fill(from, channels, to);
    const int64_t filled = (channels + 2 * kLanes - 1) / (2 * kLanes) * kLanes;
    std::fill(to + filled, to + units<AmxPairs>(channels), 0.0f);
  }
};

// Left ones of one call: six sums, and what is multiplied, fill the registers.
constexpr int kMostLefts = 6;
constexpr int most_lefts(int vectors) { return vectors == 1 ? 6 : 3; }

// What the processor does beside products, a little after each stretch of k: its vectors have
// nothing else to do.
struct Beside {
  void (*some)(void*) = nullptr;
  void* of = nullptr;

  void operator()() const {
    if (some) some(of);
  }
};

// c[i][v][r·c_step + w] = Σ_k a[i][r·a_step + k] · b[v][k·b_step + w] for some i and v, r of the
// rows that are multiplied at a time and w < kLanes; k runs through the segments.
struct AmxProduct {
  const float* a[kMostLefts];
  int64_t a_step;
  const float* b[AmxPairs::kMostVectors];
  int64_t b_step;
  const Segment* segments;
  int64_t count;  // of segments
  float* c[kMostLefts][AmxPairs::kMostVectors];
  int64_t c_step;
  Beside beside = {};
};

#if defined(__AVX512F__)
namespace amx {

// In assembler, since compilers know these instructions only under options of their own.
template <int To>
void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(To));
}
template <int To>
void load(const float* from, int64_t step) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               :
               : "r"(from), "r"(step * sizeof(float)), "i"(To)
               : "memory");
}
template <int From>
void store(float* to, int64_t step) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
               :
               : "r"(to), "r"(step * sizeof(float)), "i"(From)
               : "memory");
}
template <int Sum, int Left, int Right>
void add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(Left), "i"(Right));
}

constexpr int kLeft = 6, kRight = 7;  // the others are sums, or more left ones

// What the registers of this thread hold while this lives: of sums and left ones `rows` rows. None
// hold anything afterwards.
class Registers {
 public:
  explicit Registers(int rows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i <= kRight; ++i) {
      config.bytes[i] = kAmxPairs * sizeof(float);
      config.rows[i] = static_cast<uint8_t>(i == kRight ? kAmxPairs : rows);
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~Registers() { asm volatile("tilerelease"); }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;
};

// As many rows as registers hold. A right one stays for all left ones, which load faster, and left
// ones stay, too, where there is room.
template <int A, int V>
__attribute__((noinline)) void multiply(const AmxProduct& p) {
  const auto each = []<int... I>(std::integer_sequence<int, I...>, auto f) {
    (f(std::integral_constant<int, I>{}), ...);
  };
  constexpr std::make_integer_sequence<int, A> lefts;
  constexpr std::make_integer_sequence<int, V> rights;
  constexpr bool kStay = A * V + A < kRight + 1;
  each(rights, [&](auto v) { each(lefts, [&](auto i) { zero<v * A + i>(); }); });
  for (const Segment *s = p.segments, *end = s + p.count; s < end; ++s)
    for (int64_t k = 0; k < s->count; k += kAmxPairs) {
      each(rights, [&](auto v) {
        load<kRight>(p.b[v] + s->b + k * p.b_step, p.b_step);
        each(lefts, [&](auto i) {
          constexpr int kOf = kStay ? kLeft - i : kLeft;
          if (!kStay || v == 0) load<kOf>(p.a[i] + s->a + k, p.a_step);
          add<v * A + i, kOf, kRight>();
        });
      });
      p.beside();
    }
  each(rights,
       [&](auto v) { each(lefts, [&](auto i) { store<v * A + i>(p.c[i][v], p.c_step); }); });
}

using Multiply = void (*)(const AmxProduct&);

template <int V, int... A>
Multiply pick(int lefts, std::integer_sequence<int, A...>) {
  constexpr Multiply all[] = {multiply<A + 1, V>...};
  return all[lefts - 1];
}

inline Multiply multiply_for(int lefts, int vectors) {
  if (vectors == 1) return pick<1>(lefts, std::make_integer_sequence<int, most_lefts(1)>{});
  return pick<2>(lefts, std::make_integer_sequence<int, most_lefts(2)>{});
}

}  // namespace amx
#endif

// Multiplies `rows` rows at a time.
class Amx {
 public:
  explicit Amx(int rows) : rows_(rows) {
#if defined(__AVX512F__)
    if (multiplies_by_amx()) registers_.emplace(rows);
#endif
  }
  int rows() const { return rows_; }

  void operator()(int count, int vectors, const AmxProduct& p) const {
#if defined(__AVX512F__)
    if (registers_) return amx::multiply_for(count, vectors)(p);
#endif
    const Groups groups(rows_, kMostRows);
    for (int i = 0; i < count; ++i)
      for (int v = 0; v < vectors; ++v)
        for (int64_t j = 0; j < groups.count; ++j) {
          int64_t rows[kAmxRows];
          const int64_t first = groups.start(j), n = groups.start(j + 1) - first;
          for (int64_t r = 0; r < n; ++r) rows[r] = r * p.a_step;
          multiply_for<Bf16Pairs>(static_cast<int>(n), 1, true)(
              p.a[i] + first * p.a_step, rows, 1, p.b[v], p.b_step, p.segments, p.count,
              p.c[i][v] + first * p.c_step, p.c_step, false);
        }
  }

 private:
  int rows_;
#if defined(__AVX512F__)
  std::optional<amx::Registers> registers_;
#endif
};

}  // namespace fastst::cpu
