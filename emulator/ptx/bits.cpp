// Logic, shifts, and fields of bits.
#include <algorithm>

#include "by_type.h"

namespace ptx {

namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

struct And {
  template <class T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T of(T a, T b) {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  static T of(T a) {
    return ~a;
  }
};
template <class Op>
void two_predicates(Warp& w, const Instruction& i, Lanes lanes) {
  Lanes& d = w.p[i.r[0].index];
  d = (d & ~lanes) | (Op::of(w.p[i.r[1].index], w.p[i.r[2].index]) & lanes);
}
void not_predicate(Warp& w, const Instruction& i, Lanes lanes) {
  Lanes& d = w.p[i.r[0].index];
  d = (d & ~lanes) | (~w.p[i.r[1].index] & lanes);
}
template <class T, bool left>
void shift(Warp& w, const Instruction& i, Lanes lanes) {
  View<T> d(w, i.r[0]), a(w, i.r[1]);
  View<uint32_t> by(w, i.r[2]);
  constexpr uint32_t width = 8 * sizeof(T);
  each(lanes, [&](int l) {
    const uint32_t n = by[l];
    if (left)
      d.set(l, n >= width ? T{0} : static_cast<T>(static_cast<Unsigned<T>>(a[l]) << n));
    else
      d.set(l, static_cast<T>(a[l] >> std::min(n, width - 1)));
    if (!left && n >= width && !std::is_signed_v<T>) d.set(l, 0);
  });
}

template <bool left, bool wrap>
void funnel_shift(Warp& w, const Instruction& i, Lanes lanes) {
  View<uint32_t> d(w, i.r[0]), low(w, i.r[1]), high(w, i.r[2]), by(w, i.r[3]);
  each(lanes, [&](int l) {
    const uint32_t n = wrap ? by[l] & 31 : std::min(by[l], 32u);
    const uint64_t both = uint64_t{high[l]} << 32 | low[l];
    d.set(l, static_cast<uint32_t>(left ? both << n >> 32 : both >> n));
  });
}

template <class T>
void extract(Warp& w, const Instruction& i, Lanes lanes) {
  View<T> d(w, i.r[0]), a(w, i.r[1]);
  View<uint32_t> from(w, i.r[2]), count(w, i.r[3]);
  constexpr uint32_t width = 8 * sizeof(T);
  each(lanes, [&](int l) {
    const uint32_t at = from[l] & 255, n = count[l] & 255;
    T found = 0;
    if (n) {
      const uint32_t sign = std::min(at + n - 1, width - 1);
      const bool ones = std::is_signed_v<T> && (static_cast<Unsigned<T>>(a[l]) >> sign & 1);
      Unsigned<T> bits = at >= width ? 0 : static_cast<Unsigned<T>>(a[l]) >> at;
      const uint32_t kept = at >= width ? 0 : std::min(n, width - at);
      const Unsigned<T> mask = kept >= width ? ~Unsigned<T>{0} : (Unsigned<T>{1} << kept) - 1;
      bits &= mask;
      if (ones) bits |= ~mask;
      found = static_cast<T>(bits);
    }
    d.set(l, found);
  });
}

template <class T>
void insert(Warp& w, const Instruction& i, Lanes lanes) {
  View<T> d(w, i.r[0]), a(w, i.r[1]), b(w, i.r[2]);
  View<uint32_t> from(w, i.r[3]), count(w, i.r[4]);
  constexpr uint32_t width = 8 * sizeof(T);
  each(lanes, [&](int l) {
    const uint32_t at = from[l] & 255, n = std::min(count[l] & 255, width);
    T mask = 0;
    if (n && at < width) mask = (n == width ? ~T{0} : (T{1} << n) - 1) << at;
    d.set(l, (b[l] & ~mask) | ((at < width ? a[l] << at : T{0}) & mask));
  });
}

void permute(Warp& w, const Instruction& i, Lanes lanes) {
  View<uint32_t> d(w, i.r[0]), a(w, i.r[1]), b(w, i.r[2]), c(w, i.r[3]);
  each(lanes, [&](int l) {
    const uint64_t bytes = uint64_t{b[l]} << 32 | a[l];
    uint32_t made = 0;
    for (int n = 0; n < 4; ++n) {
      const uint32_t choice = c[l] >> 4 * n & 15;
      uint32_t byte = bytes >> 8 * (choice & 7) & 255;
      if (choice & 8) byte = byte & 128 ? 255 : 0;
      made |= byte << 8 * n;
    }
    d.set(l, made);
  });
}

void logic3(Warp& w, const Instruction& i, Lanes lanes) {
  View<uint32_t> d(w, i.r[0]), a(w, i.r[1]), b(w, i.r[2]), c(w, i.r[3]);
  each(lanes, [&](int l) {
    uint32_t made = 0;
    for (int n = 0; n < 8; ++n) {
      if (!(i.number >> n & 1)) continue;
      made |= (n & 4 ? a[l] : ~a[l]) & (n & 2 ? b[l] : ~b[l]) & (n & 1 ? c[l] : ~c[l]);
    }
    d.set(l, made);
  });
}

template <class T>
void count_ones(Warp& w, const Instruction& i, Lanes lanes) {
  View<uint32_t> d(w, i.r[0]);
  View<T> a(w, i.r[1]);
  each(lanes, [&](int l) { d.set(l, std::popcount(a[l])); });
}

template <class T>
void count_zeros(Warp& w, const Instruction& i, Lanes lanes) {
  View<uint32_t> d(w, i.r[0]);
  View<T> a(w, i.r[1]);
  each(lanes, [&](int l) { d.set(l, std::countl_zero(a[l])); });
}

void reverse(Warp& w, const Instruction& i, Lanes lanes) {
  View<uint32_t> d(w, i.r[0]), a(w, i.r[1]);
  each(lanes, [&](int l) {
    uint32_t made = 0;
    for (int n = 0; n < 32; ++n) made |= (a[l] >> n & 1) << (31 - n);
    d.set(l, made);
  });
}

Run run_of(const Decoder& d) {
  const std::string& op = d.name[0];
  const std::string& type = d.type();
  const auto logic = [&]<class Op>() -> Run {
    if (type == "pred") return two_predicates<Op>;
    return of_integer(type, []<class T>() -> Run { return two<Op, T>; });
  };
  if (op == "and") return logic.operator()<And>();
  if (op == "or") return logic.operator()<Or>();
  if (op == "xor") return logic.operator()<Xor>();
  if (op == "not") {
    if (type == "pred") return not_predicate;
    return of_integer(type, []<class T>() -> Run { return one<Not, T>; });
  }
  if (op == "shl") return of_bits(type, []<class T>() -> Run { return shift<T, true>; });
  if (op == "shr") return of_integer(type, []<class T>() -> Run { return shift<T, false>; });
  if (op == "bfe") return of_integer(type, []<class T>() -> Run { return extract<T>; });
  if (op == "popc")
    return size_of(type) == 8 ? Run{count_ones<uint64_t>} : Run{count_ones<uint32_t>};
  if (op == "clz")
    return size_of(type) == 8 ? Run{count_zeros<uint64_t>} : Run{count_zeros<uint32_t>};
  if (op == "brev" && type == "b32") return reverse;
  if (op == "prmt" && d.name.size() == 2) return permute;
  if (op == "bfi") return size_of(type) == 8 ? Run{insert<uint64_t>} : Run{insert<uint32_t>};
  if (op == "shf") {
    if (d.has("l")) return d.has("wrap") ? funnel_shift<true, true> : funnel_shift<true, false>;
    return d.has("wrap") ? funnel_shift<false, true> : funnel_shift<false, false>;
  }
  return nullptr;
}

}  // namespace

bool bits(Decoder& d) {
  const std::string& op = d.name[0];
  if (op == "lop3") {
    d.write(0, File::b32);
    for (int n = 1; n < 4; ++n) d.read(n, File::b32);
    d.i->number = static_cast<int64_t>(d.operands.at(4).value);
    d.i->run = logic3;
    return true;
  }
  const Run run = run_of(d);
  if (!run) return false;
  const File file = file_of(d.type());
  d.write(0, op == "popc" || op == "clz" ? File::b32 : file);
  // How far, from where and how many are numbers of 32 bits.
  const size_t plain = op == "shl" || op == "shr" || op == "bfe" ? 2 : op == "bfi" ? 3 : 9;
  for (size_t n = 1; n < d.operands.size(); ++n) d.read(n, n < plain ? file : File::b32);
  d.i->run = run;
  return true;
}

}  // namespace ptx
