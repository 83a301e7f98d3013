// Copies of registers, and registers taken apart and put together.
#include "numbers.h"

namespace ptx {

namespace {

void move_predicate(Warp& w, const Instruction& i, Lanes lanes) {
  Lanes& d = w.p[i.r[0].index];
  d = (d & ~lanes) | (w.p[i.r[1].index] & lanes);
}

// A copy is as old as what it copies: compilers rename what a product has written.
template <class T>
void move(Warp& w, const Instruction& i, Lanes lanes) {
  View<T> d(w, i.r[0]), a(w, i.r[1]);
  each(lanes, [&](int l) { d.set(l, a[l]); });
  auto& written = w.written_at[static_cast<int>(i.r[0].file)];
  if (written.empty()) return;
  const uint32_t at = written[i.r[1].index];  // 0: a number, which nothing has written
  written[i.r[0].index] = at ? at : w.fences;
}
// One register from several that lie in it side by side, and back; `number`: bits of one.
void pack(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    uint64_t all = 0;
    for (size_t n = 1; n < i.r.size(); ++n) {
      const uint64_t mask = (uint64_t{1} << i.number) - 1;
      all |= (w.value(i.r[n], l) & mask) << (n - 1) * i.number;
    }
    w.set(i.r[0], l, all);
  });
}
void unpack(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const uint64_t all = w.value(i.r[i.writes], l), mask = (uint64_t{1} << i.number) - 1;
    for (int n = 0; n < i.writes; ++n) w.set(i.r[n], l, all >> n * i.number & mask);
  });
}

}  // namespace

bool moves(Decoder& d) {
  if (d.name[0] != "mov") return false;
  const std::string& type = d.type();
  const int bits = type == "pred" ? 1 : 8 * size_of(type);
  const Operand &to = d.operands.at(0), &from = d.operands.at(1);
  if (to.kind == Operand::list) {
    d.i->number = bits / to.inner.size();
    const File file = d.i->number == 64 ? File::b64 : File::b32;
    for (const Operand& part : to.inner) {
      d.i->r.push_back(d.destination(part, file));
      ++d.i->writes;
    }
    d.read(1, file_of(type));
    d.i->run = unpack;
  } else if (from.kind == Operand::list) {
    d.i->number = bits / from.inner.size();
    d.write(0, file_of(type));
    d.read(1, File::b32);
    d.i->run = pack;
  } else {
    d.write(0, file_of(type));
    d.read(1, file_of(type));
    d.i->copy = type != "pred";
    d.i->run = type == "pred" ? move_predicate : bits == 64 ? move<uint64_t> : Run{move<uint32_t>};
  }
  return true;
}

}  // namespace ptx
