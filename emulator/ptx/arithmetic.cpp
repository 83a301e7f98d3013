// Arithmetic, logic, comparisons and selections.
#include <algorithm>
#include <limits>

#include "numbers.h"

namespace ptx {

namespace {

template <class T>
using Signed = std::make_signed_t<T>;
template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class Op, class T>
void one(Warp& w, const Instruction& i, Lanes lanes) {
  View<T> d(w, i.r[0]), a(w, i.r[1]);
  each(lanes, [&](int l) { d.set(l, Op::of(a[l])); });
}

template <class Op, class T>
void two(Warp& w, const Instruction& i, Lanes lanes) {
  View<T> d(w, i.r[0]), a(w, i.r[1]), b(w, i.r[2]);
  each(lanes, [&](int l) { d.set(l, Op::of(a[l], b[l])); });
}

template <class Op, class T>
void three(Warp& w, const Instruction& i, Lanes lanes) {
  View<T> d(w, i.r[0]), a(w, i.r[1]), b(w, i.r[2]), c(w, i.r[3]);
  each(lanes, [&](int l) { d.set(l, Op::of(a[l], b[l], c[l])); });
}

// ---- what an operation does to numbers of one type

template <class F, class... T>
auto halves(F f, T... v) {
  using Element = std::common_type_t<decltype(v.low)...>;
  return Two<Element>{f(v.low...), f(v.high...)};
}

// Integers wrap around, which only the unsigned types of C++ do.
#define WRAPPING(Name, expression)                                           \
  struct Name {                                                              \
    template <class T>                                                       \
      requires std::is_integral_v<T>                                         \
    static T of(T x, T y) {                                                  \
      const auto a = static_cast<uint64_t>(x), b = static_cast<uint64_t>(y); \
      return static_cast<T>(expression);                                     \
    }                                                                        \
    template <class T>                                                       \
    static T of(T x, T y) {                                                  \
      const auto a = widen(x), b = widen(y);                                 \
      return narrow<T>(expression);                                          \
    }                                                                        \
    template <class T>                                                       \
    static Two<T> of(Two<T> x, Two<T> y) {                                   \
      return halves([](T a, T b) { return of(a, b); }, x, y);                \
    }                                                                        \
  };
WRAPPING(Add, a + b)
WRAPPING(Sub, a - b)
WRAPPING(Mul, a* b)
#undef WRAPPING

struct MulHigh {
  template <class T>
  static T of(T a, T b) {
    using Wider =
        std::conditional_t<sizeof(T) == 8,
                           std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                           std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
    return static_cast<T>((static_cast<Wider>(a) * static_cast<Wider>(b)) >> (8 * sizeof(T)));
  }
};

struct Mad {
  template <class T>
  static T of(T a, T b, T c) {
    return Add::of(Mul::of(a, b), c);
  }
};
struct MadHigh {
  template <class T>
  static T of(T a, T b, T c) {
    return Add::of(MulHigh::of(a, b), c);
  }
};

// One rounding.
struct Fma {
  static float of(float a, float b, float c) { return std::fma(a, b, c); }
  static double of(double a, double b, double c) { return std::fma(a, b, c); }
  template <class T>
  static T of(T a, T b, T c) {
    return narrow<T>(static_cast<double>(widen(a)) * widen(b) + widen(c));
  }
  template <class T>
  static Two<T> of(Two<T> a, Two<T> b, Two<T> c) {
    return halves([](T x, T y, T z) { return of(x, y, z); }, a, b, c);
  }
};

// Of floats, rounded another way than to the nearest: the exact result is a double and a rest.
template <Round round>
struct DirectedFma {
  static float of(float a, float b, float c) {
    const double product = static_cast<double>(a) * b, sum = product + c;
    const double part = sum - product;
    const double rest = (product - (sum - part)) + (c - part);
    return to_float(sum, round, std::isfinite(sum) ? rest : 0);
  }
};
template <Round round>
struct DirectedAdd {
  static float of(float a, float b) { return DirectedFma<round>::of(a, 1, b); }
};
template <Round round>
struct DirectedSub {
  static float of(float a, float b) { return DirectedFma<round>::of(a, 1, -b); }
};
template <Round round>
struct DirectedMul {
  static float of(float a, float b) { return to_float(static_cast<double>(a) * b, round); }
};

struct Div {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      if (b == 0) return static_cast<T>(~T{0});
      if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Sub::of(T{0}, a);
      return a / b;
    } else {
      return narrow<T>(widen(a) / widen(b));
    }
  }
};
struct Rem {
  template <class T>
  static T of(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return a % b;
  }
};

template <bool largest, bool nan_wins>
struct Extreme {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      return largest ? std::max(a, b) : std::min(a, b);
    } else {
      const auto x = widen(a), y = widen(b);
      if (std::isnan(x) || std::isnan(y)) {
        if (nan_wins || (std::isnan(x) && std::isnan(y)))
          return narrow<T>(std::numeric_limits<float>::quiet_NaN());
        return std::isnan(x) ? b : a;
      }
      if (x == y) return std::signbit(x) == largest ? b : a;  // +0 is above -0
      return (x > y) == largest ? a : b;
    }
  }
  template <class T>
  static Two<T> of(Two<T> x, Two<T> y) {
    return halves([](T a, T b) { return of(a, b); }, x, y);
  }
};

struct CopySign {
  template <class T>
  static T of(T sign, T magnitude) {
    return narrow<T>(std::copysign(widen(magnitude), widen(sign)));
  }
};

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
struct Neg {
  template <class T>
  static T of(T a) {
    if constexpr (std::is_integral_v<T>)
      return Sub::of(T{0}, a);
    else
      return narrow<T>(-widen(a));
  }
  template <class T>
  static Two<T> of(Two<T> x) {
    return halves([](T a) { return of(a); }, x);
  }
};
struct Abs {
  template <class T>
  static T of(T a) {
    if constexpr (std::is_integral_v<T>)
      return a < 0 ? Neg::of(a) : a;
    else
      return narrow<T>(std::fabs(widen(a)));
  }
  template <class T>
  static Two<T> of(Two<T> x) {
    return halves([](T a) { return of(a); }, x);
  }
};

#define OF_FLOAT(Name, expression)  \
  struct Name {                     \
    template <class T>              \
    static T of(T value) {          \
      const auto a = widen(value);  \
      return narrow<T>(expression); \
    }                               \
  };
OF_FLOAT(Sqrt, std::sqrt(a))
OF_FLOAT(Rsqrt, 1 / std::sqrt(a))
OF_FLOAT(Rcp, 1 / a)
OF_FLOAT(Ex2, std::exp2(a))
OF_FLOAT(Lg2, std::log2(a))
OF_FLOAT(Sin, std::sin(a))
OF_FLOAT(Cos, std::cos(a))
OF_FLOAT(Tanh, std::tanh(a))
#undef OF_FLOAT

// ---- comparisons

enum class Compare { eq, ne, lt, le, gt, ge, num, nan };

template <Compare compare, bool unordered, class T>
void set_predicate(Warp& w, const Instruction& i, Lanes lanes) {
  View<T> a(w, i.r[i.writes]), b(w, i.r[i.writes + 1]);
  Lanes found = 0;
  each(lanes, [&](int l) {
    bool is;
    if constexpr (std::is_integral_v<T>) {
      const T x = a[l], y = b[l];
      is = compare == Compare::eq   ? x == y
           : compare == Compare::ne ? x != y
           : compare == Compare::lt ? x < y
           : compare == Compare::le ? x <= y
           : compare == Compare::gt ? x > y
                                    : x >= y;
    } else {
      const auto x = widen(a[l]), y = widen(b[l]);
      const bool nan = std::isnan(x) || std::isnan(y);
      is = compare == Compare::eq    ? x == y
           : compare == Compare::ne  ? !nan && x != y
           : compare == Compare::lt  ? x < y
           : compare == Compare::le  ? x <= y
           : compare == Compare::gt  ? x > y
           : compare == Compare::ge  ? x >= y
           : compare == Compare::num ? !nan
                                     : nan;
      if (unordered) is |= nan;
    }
    found |= Lanes{is} << l;
  });
  Lanes other = ~found;
  if (i.r.size() > static_cast<size_t>(i.writes) + 2) {  // combined with a predicate
    const Lanes c = i.number & 4 ? ~w.p[i.r[i.writes + 2].index] : w.p[i.r[i.writes + 2].index];
    switch (i.number & 3) {
      case 0:
        found &= c, other &= c;
        break;
      case 1:
        found |= c, other |= c;
        break;
      default:
        found ^= c, other ^= c;
    }
  }
  Lanes& p = w.p[i.r[0].index];
  p = (p & ~lanes) | (found & lanes);
  if (i.writes == 2) {
    Lanes& q = w.p[i.r[1].index];
    q = (q & ~lanes) | (other & lanes);
  }
}

template <class T>
Run comparison(const std::string& name) {
  constexpr bool exact = std::is_integral_v<T>;
  if (name == "eq") return set_predicate<Compare::eq, false, T>;
  if (name == "ne") return set_predicate<Compare::ne, false, T>;
  if (name == "lt" || name == "lo") return set_predicate<Compare::lt, false, T>;
  if (name == "le" || name == "ls") return set_predicate<Compare::le, false, T>;
  if (name == "gt" || name == "hi") return set_predicate<Compare::gt, false, T>;
  if (name == "ge" || name == "hs") return set_predicate<Compare::ge, false, T>;
  if constexpr (!exact) {
    if (name == "equ") return set_predicate<Compare::eq, true, T>;
    if (name == "neu") return set_predicate<Compare::ne, true, T>;
    if (name == "ltu") return set_predicate<Compare::lt, true, T>;
    if (name == "leu") return set_predicate<Compare::le, true, T>;
    if (name == "gtu") return set_predicate<Compare::gt, true, T>;
    if (name == "geu") return set_predicate<Compare::ge, true, T>;
    if (name == "num") return set_predicate<Compare::num, false, T>;
    if (name == "nan") return set_predicate<Compare::nan, false, T>;
  }
  return nullptr;
}

template <class T>
void select(Warp& w, const Instruction& i, Lanes lanes) {
  View<T> d(w, i.r[0]), a(w, i.r[1]), b(w, i.r[2]);
  const Lanes p = w.p[i.r[3].index];
  each(lanes, [&](int l) { d.set(l, p >> l & 1 ? a[l] : b[l]); });
}

// ---- shifts, and bits

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

// d twice as wide as a and b
template <class Narrow, class Twice>
void multiply_wide(Warp& w, const Instruction& i, Lanes lanes) {
  View<Twice> d(w, i.r[0]);
  View<Narrow> a(w, i.r[1]), b(w, i.r[2]);
  each(lanes, [&](int l) { d.set(l, static_cast<Twice>(a[l]) * static_cast<Twice>(b[l])); });
}
template <class Narrow, class Twice>
void multiply_add_wide(Warp& w, const Instruction& i, Lanes lanes) {
  View<Twice> d(w, i.r[0]), c(w, i.r[3]);
  View<Narrow> a(w, i.r[1]), b(w, i.r[2]);
  each(lanes, [&](int l) {
    const auto product = static_cast<Twice>(a[l]) * static_cast<Twice>(b[l]);
    d.set(l, Add::of(static_cast<Twice>(product), c[l]));
  });
}

// ---- predicates

template <class Op>
void two_predicates(Warp& w, const Instruction& i, Lanes lanes) {
  Lanes& d = w.p[i.r[0].index];
  d = (d & ~lanes) | (Op::of(w.p[i.r[1].index], w.p[i.r[2].index]) & lanes);
}
void not_predicate(Warp& w, const Instruction& i, Lanes lanes) {
  Lanes& d = w.p[i.r[0].index];
  d = (d & ~lanes) | (~w.p[i.r[1].index] & lanes);
}
void move_predicate(Warp& w, const Instruction& i, Lanes lanes) {
  Lanes& d = w.p[i.r[0].index];
  d = (d & ~lanes) | (w.p[i.r[1].index] & lanes);
}

// ---- moves

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

// ---- by type

template <class F>
Run of_integer(const std::string& type, F f) {
  if (type == "s16") return f.template operator()<int16_t>();
  if (type == "u16" || type == "b16") return f.template operator()<uint16_t>();
  if (type == "s32") return f.template operator()<int32_t>();
  if (type == "u32" || type == "b32") return f.template operator()<uint32_t>();
  if (type == "s64") return f.template operator()<int64_t>();
  if (type == "u64" || type == "b64") return f.template operator()<uint64_t>();
  return nullptr;
}
template <class F>
Run of_float(const std::string& type, F f) {
  if (type == "f32") return f.template operator()<float>();
  if (type == "f64") return f.template operator()<double>();
  if (type == "f16") return f.template operator()<f16>();
  if (type == "bf16") return f.template operator()<bf16>();
  return nullptr;
}
template <class F>
Run of_pair(const std::string& type, F f) {
  if (type == "f16x2") return f.template operator()<Two<f16>>();
  if (type == "bf16x2") return f.template operator()<Two<bf16>>();
  return nullptr;
}
template <class F>
Run of_bits(const std::string& type, F f) {
  return of_integer("b" + std::to_string(8 * size_of(type)), f);
}

template <class Op>
Run unary_float(const std::string& type) {
  return of_float(type, []<class T>() -> Run { return one<Op, T>; });
}

template <Round round>
Run directed(const std::string& op) {
  if (op == "fma") return three<DirectedFma<round>, float>;
  if (op == "add") return two<DirectedAdd<round>, float>;
  if (op == "sub") return two<DirectedSub<round>, float>;
  if (op == "mul") return two<DirectedMul<round>, float>;
  return nullptr;
}

Run run_of(Decoder& d) {
  const std::string& op = d.name[0];
  const std::string& type = d.type();
  for (const char* other : {"sat", "cc"})
    if (d.has(other)) return nullptr;
  if (d.has("rz") || d.has("rm") || d.has("rp")) {
    if (type != "f32") return nullptr;
    return d.has("rz")   ? directed<Round::zero>(op)
           : d.has("rm") ? directed<Round::down>(op)
                         : directed<Round::up>(op);
  }
  const bool nan = d.has("NaN");

  const auto anything = [&]<class Op>() -> Run {
    if (Run r = of_integer(type, []<class T>() -> Run { return two<Op, T>; })) return r;
    if (Run r = of_float(type, []<class T>() -> Run { return two<Op, T>; })) return r;
    return of_pair(type, []<class T>() -> Run { return two<Op, T>; });
  };
  const auto integers = [&]<class Op>() -> Run {
    return of_integer(type, []<class T>() -> Run { return two<Op, T>; });
  };
  const auto bits = [&]<class Op>() -> Run {
    if (type == "pred") return two_predicates<Op>;
    return integers.template operator()<Op>();
  };
  const auto sign = [&]<class Op>() -> Run {
    if (Run r = of_integer(type, []<class T>() -> Run { return one<Op, T>; })) return r;
    if (Run r = of_float(type, []<class T>() -> Run { return one<Op, T>; })) return r;
    return of_pair(type, []<class T>() -> Run { return one<Op, T>; });
  };

  if (op == "add") return anything.operator()<Add>();
  if (op == "sub") return anything.operator()<Sub>();
  if (op == "mul") {
    if (d.has("hi")) return integers.operator()<MulHigh>();
    return anything.operator()<Mul>();
  }
  if (op == "mad") {
    if (d.has("hi")) return of_integer(type, []<class T>() -> Run { return three<MadHigh, T>; });
    if (d.has("lo")) return of_integer(type, []<class T>() -> Run { return three<Mad, T>; });
  }
  if (op == "fma" || op == "mad") {
    if (Run r = of_float(type, []<class T>() -> Run { return three<Fma, T>; })) return r;
    return of_pair(type, []<class T>() -> Run { return three<Fma, T>; });
  }
  if (op == "div") {
    if (Run r = integers.operator()<Div>()) return r;
    return of_float(type, []<class T>() -> Run { return two<Div, T>; });
  }
  if (op == "rem") return integers.operator()<Rem>();
  if (op == "min")
    return nan ? anything.operator()<Extreme<false, true>>()
               : anything.operator()<Extreme<false, false>>();
  if (op == "max")
    return nan ? anything.operator()<Extreme<true, true>>()
               : anything.operator()<Extreme<true, false>>();
  if (op == "copysign") return of_float(type, []<class T>() -> Run { return two<CopySign, T>; });
  if (op == "and") return bits.operator()<And>();
  if (op == "or") return bits.operator()<Or>();
  if (op == "xor") return bits.operator()<Xor>();
  if (op == "not") {
    if (type == "pred") return not_predicate;
    return of_integer(type, []<class T>() -> Run { return one<Not, T>; });
  }
  if (op == "neg") return sign.operator()<Neg>();
  if (op == "abs") return sign.operator()<Abs>();
  if (op == "sqrt") return unary_float<Sqrt>(type);
  if (op == "rsqrt") return unary_float<Rsqrt>(type);
  if (op == "rcp") return unary_float<Rcp>(type);
  if (op == "ex2") return unary_float<Ex2>(type);
  if (op == "lg2") return unary_float<Lg2>(type);
  if (op == "sin") return unary_float<Sin>(type);
  if (op == "cos") return unary_float<Cos>(type);
  if (op == "tanh") return unary_float<Tanh>(type);
  if (op == "shl") return of_bits(type, []<class T>() -> Run { return shift<T, true>; });
  if (op == "shr") return of_integer(type, []<class T>() -> Run { return shift<T, false>; });
  if (op == "selp") return of_bits(type, []<class T>() -> Run { return select<T>; });
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

bool compare(Decoder& d) {
  const std::string& type = d.type();
  const std::string& how = d.name[1];
  Run run = of_integer(type, [&]<class T>() -> Run { return comparison<T>(how); });
  if (!run) run = of_float(type, [&]<class T>() -> Run { return comparison<T>(how); });
  // p|q comes as two operands: with a predicate to combine with there are 5, else 4.
  const bool combined = d.name[2] == "and" || d.name[2] == "or" || d.name[2] == "xor";
  const int sources = combined ? 3 : 2, writes = static_cast<int>(d.operands.size()) - sources;
  for (int n = 0; n < writes; ++n) d.write(n, File::predicate);
  d.read(writes, file_of(type));
  d.read(writes + 1, file_of(type));
  if (combined) {
    d.read(writes + 2, File::predicate);
    d.i->number = (d.name[2] == "and"  ? 0
                   : d.name[2] == "or" ? 1
                                       : 2) |
                  (d.operands[writes + 2].negated ? 4 : 0);
  }
  d.i->run = run;
  return true;
}

bool moved(Decoder& d) {
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

template <class T, class Twice>
void wide(Decoder& d) {
  d.i->run = d.name[0] == "mul" ? multiply_wide<T, Twice> : multiply_add_wide<T, Twice>;
}

bool multiplied_wide(Decoder& d) {
  const std::string& type = d.type();
  const File twice = size_of(type) == 4 ? File::b64 : File::b32;
  d.write(0, twice);
  d.read(1, File::b32);
  d.read(2, File::b32);
  if (d.name[0] == "mad") d.read(3, twice);
  if (type == "s32")
    wide<int32_t, int64_t>(d);
  else if (type == "u32")
    wide<uint32_t, uint64_t>(d);
  else if (type == "s16")
    wide<int16_t, int32_t>(d);
  else if (type == "u16")
    wide<uint16_t, uint32_t>(d);
  return true;
}

}  // namespace

bool arithmetic(Decoder& d) {
  const std::string& op = d.name[0];
  if (op == "setp") return compare(d);
  if (op == "mov") return moved(d);
  if (d.has("wide")) return multiplied_wide(d);
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
  const int count = static_cast<int>(d.operands.size());
  const bool bits = op == "popc" || op == "clz";
  d.write(0, bits ? File::b32 : file);
  for (int n = 1; n < count; ++n) {
    // How far, from where and how many are numbers of 32 bits; what selects is a predicate.
    const bool plain = ((op == "shl" || op == "shr") && n == 2) || (op == "bfe" && n >= 2) ||
                       (op == "bfi" && n >= 3);
    d.read(n, op == "selp" && n == 3 ? File::predicate : plain ? File::b32 : file);
  }
  d.i->run = run;
  return true;
}

}  // namespace ptx
