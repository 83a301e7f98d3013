// Products of a warpgroup: wgmma. Each of the four warps makes its 16 rows of 64.
//
// A product reads its operands and writes its sums when it is waited for, not before.
#include <cstring>

#include "numbers.h"

namespace ptx {

namespace {

// What a descriptor of a matrix in shared memory says.
struct Descriptor {
  uint32_t start, leading, stride;  // bytes
  int span;                         // of the swizzle, bytes; 0: none

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4) {
    if (bits >> 49 & 7) throw Error("a matrix descriptor with a base offset");
    constexpr int spans[4] = {0, 128, 64, 32};
    span = spans[bits >> 62];
  }
};

// An operand as it lies in shared memory, in pieces of 16 bytes.
struct Matrix {
  std::vector<uint32_t> pieces;
  bool k_major = true;
  int rows = 0, element = 2;

  // `rows` rows from `first` on, `depth` elements each.
  Matrix(uint64_t bits, int first, int rows, int depth, int element, bool k_major)
      : k_major(k_major), rows(rows), element(element) {
    const Descriptor d(bits);
    const uint32_t mask = d.span == 128 ? 7 : d.span == 64 ? 3 : d.span == 32 ? 1 : 0;
    const auto add = [&](uint32_t offset) {
      const uint32_t address = d.start + offset;
      pieces.push_back(address ^ (address >> 7 & mask) << 4);
    };
    const int per = 16 / element;
    if (k_major) {
      for (int r = first; r < first + rows; ++r)
        for (int piece = 0; piece < depth / per; ++piece)
          add(d.span ? r / 8 * d.stride + r % 8 * d.span + piece * 16
                     : r / 8 * d.stride + piece * d.leading + r % 8 * 16);
    } else {
      const int wide = d.span ? d.span / element : per;  // rows that lie side by side
      for (int k = 0; k < depth; ++k)
        for (int r = first; r < first + rows; r += per)
          add(d.span ? r / wide * d.leading + k / 8 * d.stride + k % 8 * d.span + r % wide * element
                     : r / 8 * d.stride + k / 8 * d.leading + k % 8 * 16);
    }
  }

  // The place of an element; `r` counts from the first row.
  uint32_t at(int r, int k) const {
    const int per = 16 / element;
    if (k_major) return pieces[r * pieces.size() / rows + k / per] + k % per * element;
    return pieces[k * (rows / per) + r / per] + r % per * element;
  }
};

void mark(Shared& shared, const Matrix& m) {
  for (const uint32_t piece : m.pieces) {
    if (piece + 16 > shared.bytes.size()) throw Error("wgmma reads outside of shared memory");
    shared.will_read(piece, 16, "wgmma");
  }
}
void unmark(Shared& shared, const Matrix& m) {
  for (const uint32_t piece : m.pieces) shared.was_read(piece, 16);
}

template <class T>
float load(const Shared& shared, uint32_t at) {
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    std::memcpy(&bits, &shared.bytes[at], 4);
    return std::bit_cast<float>(bits & ~0x1fffu);
  } else {
    T value;
    std::memcpy(&value, &shared.bytes[at], 2);
    return widen(value);
  }
}

// What the name of a product says, kept by number.
struct Shape {
  int columns, sums;  // of D; registers of D
  bool a_in_registers, a_k_major, b_k_major;
};
std::vector<Shape>& shapes() {
  static std::vector<Shape> all;
  return all;
}

// r = D, A (4 registers or a descriptor), B (a descriptor), whether D is added to
template <class T>
void product(Warp& w, const Instruction& i, Lanes lanes) {
  constexpr int depth = 32 / sizeof(T), per = 4 / sizeof(T);
  if (lanes != kAllLanes) throw Error("wgmma needs all lanes of the warp");
  const Shape& s = shapes()[i.number];
  const int a_registers = s.a_in_registers ? 4 : 1;
  const Lanes adds = w.p[i.r[s.sums + a_registers + 1].index];
  if (adds != kAllLanes && adds != 0) throw Error("lanes of a wgmma differ in whether it adds");
  for (int n = 0; n < s.sums + (s.a_in_registers ? 4 : 0); ++n) {
    const uint32_t r = i.r[n].index;
    if (w.written_at[static_cast<int>(File::b32)][r] == w.fences)
      throw Error("wgmma uses a register that was written since the last wgmma.fence");
    if (n < s.sums ? w.being_read[r] : w.being_written[r])
      throw Error("wgmma uses a register of another wgmma under way");
  }
  Shared& shared = w.block->shared;
  const int row = w.index % 4 * 16;
  std::shared_ptr<Matrix> a;
  if (!s.a_in_registers)
    a = std::make_shared<Matrix>(w.d[i.r[s.sums].index][0], row, 16, depth, sizeof(T), s.a_k_major);
  auto b = std::make_shared<Matrix>(w.d[i.r[s.sums + a_registers].index][0], 0, s.columns, depth,
                                    sizeof(T), s.b_k_major);
  if (a) mark(shared, *a);
  mark(shared, *b);
  for (int n = 0; n < s.sums; ++n) ++w.being_written[i.r[n].index];
  if (!a)
    for (int n = 0; n < 4; ++n) ++w.being_read[i.r[s.sums + n].index];
  ++w.products_under_way;

  w.products.open.push_back([&w, &i, &s, &shared, a, b, adds] {
    std::vector<float> left(16 * depth), right(s.columns * depth);
    for (int r = 0; r < 16; ++r)
      for (int k = 0; k < depth; ++k) {
        if (a) {
          left[r * depth + k] = load<T>(shared, a->at(r, k));
        } else {
          const int lane = r % 8 * 4 + k / per % 4, n = r / 8 + 2 * (k / (4 * per));
          const uint32_t bits = w.w[i.r[s.sums + n].index][lane];
          if constexpr (sizeof(T) == 4)
            left[r * depth + k] = std::bit_cast<float>(bits & ~0x1fffu);
          else
            left[r * depth + k] =
                widen(std::bit_cast<T>(static_cast<uint16_t>(bits >> 16 * (k % per))));
        }
      }
    for (int c = 0; c < s.columns; ++c)
      for (int k = 0; k < depth; ++k) right[c * depth + k] = load<T>(shared, b->at(c, k));
    for (int n = 0; n < s.sums; ++n) {
      Words& d = w.w[i.r[n].index];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int r = lane / 4 + n / 2 % 2 * 8, c = n / 4 * 8 + lane % 4 * 2 + n % 2;
        double sum = adds ? std::bit_cast<float>(d[lane]) : 0;
        for (int k = 0; k < depth; ++k)
          sum += static_cast<double>(left[r * depth + k]) * right[c * depth + k];
        d[lane] = std::bit_cast<uint32_t>(static_cast<float>(sum));
      }
      --w.being_written[i.r[n].index];
    }
    if (a)
      unmark(shared, *a);
    else
      for (int n = 0; n < 4; ++n) --w.being_read[i.r[s.sums + n].index];
    unmark(shared, *b);
    --w.products_under_way;
  });
}

void fence(Warp& w, const Instruction&, Lanes) { ++w.fences; }
void commit(Warp& w, const Instruction&, Lanes) { w.products.commit(); }
void wait(Warp& w, const Instruction& i, Lanes) { w.products.wait(i.number); }

}  // namespace

bool warpgroup(Decoder& d) {
  if (d.name[0] != "wgmma") return false;
  Instruction& i = *d.i;
  if (d.has("fence")) {
    i.run = fence;
  } else if (d.has("commit_group")) {
    i.run = commit;
  } else if (d.has("wait_group")) {
    i.number = static_cast<int64_t>(d.operands.at(0).value);
    i.run = wait;
  } else if (d.has("mma_async") && d.type(2) == "f32") {
    const std::string& type = d.type();
    std::string shape;
    for (const std::string& part : d.name)
      if (part[0] == 'm' && part.find('n') != std::string::npos &&
          part.find('k') != std::string::npos)
        shape = part;
    const size_t n = shape.find('n');
    Shape s{std::stoi(shape.substr(n + 1)), static_cast<int>(d.operands.at(0).inner.size()),
            d.operands.at(1).kind == Operand::list, true, true};
    // scale-a and scale-b must be 1; what follows says which operands lie transposed.
    size_t at = 4;
    for (int scale = 0; scale < 2; ++scale, ++at)
      if (d.operands.size() > at && static_cast<int64_t>(d.operands[at].value) != 1) return false;
    if (type != "tf32") {
      if (!s.a_in_registers && d.operands.size() > at) s.a_k_major = d.operands[at++].value == 0;
      if (d.operands.size() > at) s.b_k_major = d.operands[at].value == 0;
    }
    for (const Operand& part : d.operands[0].inner) i.r.push_back(d.destination(part, File::b32));
    d.read(1, s.a_in_registers ? File::b32 : File::b64);
    d.read(2, File::b64);
    d.read(3, File::predicate);
    i.number = static_cast<int64_t>(shapes().size());
    i.product = true;
    shapes().push_back(s);
    i.run = type == "bf16"   ? product<bf16>
            : type == "f16"  ? product<f16>
            : type == "tf32" ? Run{product<float>}
                             : nullptr;
  }
  return i.run != nullptr;
}

}  // namespace ptx
