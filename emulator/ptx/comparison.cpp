// Comparisons, and selections by what they found.
#include "by_type.h"

namespace ptx {

namespace {

enum class Compare { eq, ne, lt, le, gt, ge, num, nan };

template <Compare compare, bool unordered, class T>
bool holds(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return compare == Compare::eq   ? a == b
           : compare == Compare::ne ? a != b
           : compare == Compare::lt ? a < b
           : compare == Compare::le ? a <= b
           : compare == Compare::gt ? a > b
                                    : a >= b;
  } else {
    const auto x = widen(a), y = widen(b);
    const bool nan = std::isnan(x) || std::isnan(y);
    const bool is = compare == Compare::eq    ? x == y
                    : compare == Compare::ne  ? !nan && x != y
                    : compare == Compare::lt  ? x < y
                    : compare == Compare::le  ? x <= y
                    : compare == Compare::gt  ? x > y
                    : compare == Compare::ge  ? x >= y
                    : compare == Compare::num ? !nan
                                              : nan;
    return is || (unordered && nan);
  }
}

// The second predicate is what the first is not; of two values in a register, what the high ones
// are.
template <Compare compare, bool unordered, class T>
void set_predicate(Warp& w, const Instruction& i, Lanes lanes) {
  View<T> a(w, i.r[i.writes]), b(w, i.r[i.writes + 1]);
  Lanes found = 0, other = 0;
  each(lanes, [&](int l) {
    const T x = a[l], y = b[l];
    if constexpr (requires { x.low; }) {
      found |= Lanes{holds<compare, unordered>(x.low, y.low)} << l;
      other |= Lanes{holds<compare, unordered>(x.high, y.high)} << l;
    } else {
      const bool is = holds<compare, unordered>(x, y);
      found |= Lanes{is} << l;
      other |= Lanes{!is} << l;
    }
  });
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
Run run_of(const std::string& name) {
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

bool compare(Decoder& d) {
  const std::string& type = d.type();
  const std::string& how = d.name[1];
  Run run = of_integer(type, [&]<class T>() -> Run { return run_of<T>(how); });
  if (!run) run = of_float(type, [&]<class T>() -> Run { return run_of<T>(how); });
  if (!run) run = of_pair(type, [&]<class T>() -> Run { return run_of<T>(how); });
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

bool selected(Decoder& d) {
  const File file = file_of(d.type());
  d.write(0, file);
  d.read(1, file);
  d.read(2, file);
  d.read(3, File::predicate);
  d.i->run = of_bits(d.type(), []<class T>() -> Run { return select<T>; });
  return true;
}

}  // namespace

bool comparison(Decoder& d) {
  if (d.name[0] == "setp") return compare(d);
  return d.name[0] == "selp" && selected(d);
}

}  // namespace ptx
