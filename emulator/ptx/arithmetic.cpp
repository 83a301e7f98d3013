// Arithmetic on numbers.
#include <algorithm>
#include <limits>

#include "by_type.h"

namespace ptx {

namespace {

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
  return nullptr;
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
  if (d.has("wide")) return multiplied_wide(d);
  const Run run = run_of(d);
  if (!run) return false;
  const File file = file_of(d.type());
  d.write(0, file);
  for (size_t n = 1; n < d.operands.size(); ++n) d.read(n, file);
  d.i->run = run;
  return true;
}

}  // namespace ptx
