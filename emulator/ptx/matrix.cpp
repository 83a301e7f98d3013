// Matrices of a warp: ldmatrix, stmatrix and mma.sync.
//
// g = lane / 4 and t = lane % 4 place an element: D of 16 x 8 has rows g and g + 8 and columns 2t
// and 2t + 1; A and B hold, in each register of 32 bits, what fits of a row (A) or a column (B).
#include <cstring>

#include "numbers.h"

namespace ptx {

namespace {

void need_all(Lanes lanes) {
  if (lanes != kAllLanes) throw Error("needs all lanes of the warp");
}

// Lanes name the rows of `matrices`, 16 bytes each.
void count_rows(Warp& w, const Instruction& i, int address, int matrices) {
  Launch& launch = *w.block->cluster->launch;
  if (!launch.count) return;
  const Lanes lanes = matrices == 4 ? kAllLanes : (Lanes{1} << 8 * matrices) - 1;
  Longs at;
  each(lanes, [&](int l) { at[l] = w.address(i, address, l); });
  launch.counters.of_shared(i, lanes, at, 16);
}

// r = registers, address (ldmatrix); number: transposed
void load_matrices(Warp& w, const Instruction& i, Lanes lanes) {
  need_all(lanes);
  const int count = i.writes;
  count_rows(w, i, count, count);
  for (int m = 0; m < count; ++m) {
    uint16_t rows[8][8];
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * m + row;
      const Place at = w.block->cluster->launch->place(w, w.address(i, count, lane) | kSharedWindow,
                                                       16, false, lane);
      check_read(at, 16);
      std::memcpy(rows[row], at.bytes, 16);
    }
    Words& d = w.words(i, m);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      d[lane] = i.number ? rows[2 * t][g] | rows[2 * t + 1][g] << 16
                         : rows[g][2 * t] | rows[g][2 * t + 1] << 16;
    }
  }
}

// r = address, registers
void store_matrices(Warp& w, const Instruction& i, Lanes lanes) {
  need_all(lanes);
  count_rows(w, i, 0, static_cast<int>(i.r.size()) - 1);
  for (size_t m = 0; m + 1 < i.r.size(); ++m) {
    uint16_t rows[8][8];
    const Words& a = w.words(i, static_cast<int>(m) + 1);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int n = 0; n < 2; ++n) {
        const auto value = static_cast<uint16_t>(a[lane] >> 16 * n);
        (i.number ? rows[2 * t + n][g] : rows[g][2 * t + n]) = value;
      }
    }
    for (int row = 0; row < 8; ++row) {
      const int lane = static_cast<int>(8 * m) + row;
      const Place at =
          w.block->cluster->launch->place(w, w.address(i, 0, lane) | kSharedWindow, 16, true, lane);
      check_write(w, at, 16);
      std::memcpy(at.bytes, rows[row], 16);
    }
  }
}

// ---- mma.sync

template <class T>
double element(const Words& r, int lane, int n) {
  if constexpr (sizeof(T) == 4) {  // TF32: the lowest 13 bits are not looked at
    return std::bit_cast<float>(r[lane] & ~0x1fffu);
  } else {
    return widen(std::bit_cast<T>(static_cast<uint16_t>(r[lane] >> 16 * n)));
  }
}

// D[16 x 8] = A[16 x K] B[K x 8] + C; r = D, A, B, C
template <class T, class Sum, int K>
void multiply(Warp& w, const Instruction& i, Lanes lanes) {
  need_all(lanes);
  constexpr int per = 4 / sizeof(T);              // elements of a register
  constexpr int steps = K / (4 * per);            // registers of B, and of each half of A's rows
  constexpr int sums = sizeof(Sum) == 4 ? 4 : 2;  // registers of D
  double a[16][K], b[8][K];
  const int first_a = sums, first_b = first_a + 2 * steps, first_c = first_b + steps;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int s = 0; s < steps; ++s)
      for (int n = 0; n < per; ++n) {
        const int k = (4 * s + t) * per + n;
        a[g][k] = element<T>(w.words(i, first_a + 2 * s), lane, n);
        a[g + 8][k] = element<T>(w.words(i, first_a + 2 * s + 1), lane, n);
        b[g][k] = element<T>(w.words(i, first_b + s), lane, n);
      }
  }
  double d[16][8];
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      double sum = 0;
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[column][k];
      d[row][column] = sum;
    }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const double x = d[g + 8 * half][2 * t], y = d[g + 8 * half][2 * t + 1];
      if constexpr (sizeof(Sum) == 4) {
        for (int n = 0; n < 2; ++n) {
          const float c = std::bit_cast<float>(w.words(i, first_c + 2 * half + n)[lane]);
          w.words(i, 2 * half + n)[lane] =
              std::bit_cast<uint32_t>(static_cast<float>((n ? y : x) + c));
        }
      } else {
        const uint32_t c = w.words(i, first_c + half)[lane];
        const auto low = std::bit_cast<f16>(static_cast<uint16_t>(c));
        const auto high = std::bit_cast<f16>(static_cast<uint16_t>(c >> 16));
        const Two<f16> made{static_cast<f16>(x + static_cast<double>(low)),
                            static_cast<f16>(y + static_cast<double>(high))};
        w.words(i, half)[lane] = std::bit_cast<uint32_t>(made);
      }
    }
  }
}

// Of doubles: D[M x 8] with M = 8 or 16; r = D, A, B, C, a register an element
template <int M, int K>
void multiply_double(Warp& w, const Instruction& i, Lanes lanes) {
  need_all(lanes);
  constexpr int halves = M / 8, steps = K / 4;
  double a[M][K], b[8][K];
  const int first_a = 2 * halves, first_b = first_a + halves * steps, first_c = first_b + steps;
  const auto at = [&](int n, int lane) { return std::bit_cast<double>(w.longs(i, n)[lane]); };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int s = 0; s < steps; ++s) {
      for (int h = 0; h < halves; ++h) a[g + 8 * h][4 * s + t] = at(first_a + halves * s + h, lane);
      b[g][4 * s + t] = at(first_b + s, lane);
    }
  }
  std::array<double, 2 * halves * kLanes> made;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int n = 0; n < 2 * halves; ++n) {
      double sum = at(first_c + n, lane);
      for (int k = 0; k < K; ++k) sum = std::fma(a[g + n / 2 * 8][k], b[2 * t + n % 2][k], sum);
      made[n * kLanes + lane] = sum;
    }
  }
  for (int n = 0; n < 2 * halves; ++n)
    for (int lane = 0; lane < kLanes; ++lane)
      w.longs(i, n)[lane] = std::bit_cast<uint64_t>(made[n * kLanes + lane]);
}

Run mma_of(const Decoder& d) {
  const std::string types = d.type(3) + "." + d.type(2) + "." + d.type(1) + "." + d.type();
  if (types == "f32.bf16.bf16.f32") {
    if (d.has("m16n8k16")) return multiply<bf16, float, 16>;
    if (d.has("m16n8k8")) return multiply<bf16, float, 8>;
  }
  if (types == "f32.f16.f16.f32") {
    if (d.has("m16n8k16")) return multiply<f16, float, 16>;
    if (d.has("m16n8k8")) return multiply<f16, float, 8>;
  }
  if (types == "f16.f16.f16.f16" && d.has("m16n8k16")) return multiply<f16, f16, 16>;
  if (types == "f32.tf32.tf32.f32") {
    if (d.has("m16n8k8")) return multiply<float, float, 8>;
    if (d.has("m16n8k4")) return multiply<float, float, 4>;
  }
  if (types == "f64.f64.f64.f64") {
    if (d.has("m8n8k4")) return multiply_double<8, 4>;
    if (d.has("m16n8k4")) return multiply_double<16, 4>;
    if (d.has("m16n8k8")) return multiply_double<16, 8>;
    if (d.has("m16n8k16")) return multiply_double<16, 16>;
  }
  return nullptr;
}

}  // namespace

bool matrix(Decoder& d) {
  const std::string& op = d.name[0];
  Instruction& i = *d.i;
  if (op == "ldmatrix" || op == "stmatrix") {
    if (!d.has("m8n8") || !d.has("b16")) return false;
    i.number = d.has("trans");
    if (op == "ldmatrix") {
      for (const Operand& part : d.operands.at(0).inner) {
        i.r.push_back(d.destination(part, File::b32));
        ++i.writes;
      }
      d.address(1);
      i.run = load_matrices;
    } else {
      d.address(0);
      d.read(1, File::b32);
      i.run = store_matrices;
    }
    return true;
  }
  if (op != "mma" || !d.has("sync")) return false;
  const File file = file_of(d.type());
  for (const Operand& part : d.operands.at(0).inner) {
    i.r.push_back(d.destination(part, file));
    ++i.writes;
  }
  for (int n = 1; n < 4; ++n) d.read(n, file);
  i.run = mma_of(d);
  return true;
}

}  // namespace ptx
