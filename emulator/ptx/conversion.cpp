// cvt between the types of numbers, cvta between address spaces.
#include <limits>

#include "numbers.h"

namespace ptx {

namespace {

struct Integer {
  int bits;
  bool is_signed;
};

// A value between the two types: integers as 64 bits, numbers as double, which holds all of them.
struct Conversion {
  std::string to, from;
  Round round;
  bool saturate, relu;
  bool whole;  // of floats: to an integer
};

double to_integer(double value, Round round) {
  return round == Round::nearest ? std::nearbyint(value)
         : round == Round::zero  ? std::trunc(value)
         : round == Round::down  ? std::floor(value)
                                 : std::ceil(value);
}

bool is_float(const std::string& type) {
  return type[0] == 'f' || type[0] == 'b' || type == "tf32";
}

double read_float(const std::string& type, uint64_t bits) {
  if (type == "f32") return std::bit_cast<float>(static_cast<uint32_t>(bits));
  if (type == "f64") return std::bit_cast<double>(bits);
  if (type == "f16") return static_cast<double>(std::bit_cast<f16>(static_cast<uint16_t>(bits)));
  return static_cast<float>(std::bit_cast<bf16>(static_cast<uint16_t>(bits)));
}

uint64_t write_float(const std::string& type, double value, Round round) {
  if (type == "f64") return std::bit_cast<uint64_t>(value);
  if (type == "f32") return std::bit_cast<uint32_t>(to_float(value, round));
  if (type == "f16") return std::bit_cast<uint16_t>(static_cast<f16>(value));
  if (type == "tf32") {  // to the nearest, ties away from zero
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(value));
    return std::isfinite(value) ? (bits + 0x1000) & ~0x1fffu : bits;
  }
  if (round == Round::zero) return std::bit_cast<uint32_t>(to_float(value, Round::zero)) >> 16;
  return bf16(static_cast<float>(value)).bits;
}

int64_t read_integer(const Integer& type, uint64_t bits) {
  if (type.bits == 64) return static_cast<int64_t>(bits);
  const uint64_t kept = bits & ((uint64_t{1} << type.bits) - 1);
  const bool negative = type.is_signed && kept >> (type.bits - 1) & 1;
  return static_cast<int64_t>(negative ? kept | ~uint64_t{0} << type.bits : kept);
}

int64_t clamp(const Integer& to, __int128 value) {
  const __int128 one = 1;
  const __int128 low = to.is_signed ? -(one << (to.bits - 1)) : 0;
  const __int128 high = to.is_signed ? (one << (to.bits - 1)) - 1 : (one << to.bits) - 1;
  return static_cast<int64_t>(value < low ? low : value > high ? high : value);
}

Integer integer(const std::string& type) { return {8 * size_of(type), type[0] == 's'}; }

uint64_t convert(const Conversion& c, uint64_t bits) {
  if (is_float(c.to)) {
    if (!is_float(c.from)) {
      const Integer from = integer(c.from);
      const int64_t value = read_integer(from, bits);
      if (c.to == "f32" && c.round == Round::nearest)  // one rounding
        return std::bit_cast<uint32_t>(from.is_signed
                                           ? static_cast<float>(value)
                                           : static_cast<float>(static_cast<uint64_t>(value)));
      const double wide = from.is_signed ? static_cast<double>(value)
                                         : static_cast<double>(static_cast<uint64_t>(value));
      return write_float(c.to, wide, c.round);
    }
    double value = read_float(c.from, bits);
    if (c.whole) value = to_integer(value, c.round);
    if (c.relu && value < 0) value = 0;
    if (c.saturate) value = std::isnan(value) ? 0 : value < 0 ? 0 : value > 1 ? 1 : value;
    return write_float(c.to, value, c.round);
  }
  const Integer to = integer(c.to);
  if (!is_float(c.from)) {
    const Integer from = integer(c.from);
    const int64_t value = read_integer(from, bits);
    if (!c.saturate) return static_cast<uint64_t>(value);
    return static_cast<uint64_t>(
        clamp(to, from.is_signed ? __int128{value} : __int128{static_cast<uint64_t>(value)}));
  }
  const double value = read_float(c.from, bits);
  if (std::isnan(value)) return to.bits == 64 ? uint64_t{1} << 63 : 0;
  const double whole = to_integer(value, c.round);
  if (whole >= 0x1p64) return static_cast<uint64_t>(clamp(to, __int128{1} << 100));
  if (whole < -0x1p63) return static_cast<uint64_t>(clamp(to, -(__int128{1} << 100)));
  return static_cast<uint64_t>(clamp(to, static_cast<__int128>(whole)));
}

// The conversions of a program, by number.
std::vector<Conversion>& conversions() {
  static std::vector<Conversion> all;
  return all;
}

void run_conversion(Warp& w, const Instruction& i, Lanes lanes) {
  const Conversion& c = conversions()[i.number];
  each(lanes, [&](int l) { w.set(i.r[0], l, convert(c, w.value(i.r[1], l))); });
}

// What most kernels convert, without looking at names.
template <class To, class From>
void plain(Warp& w, const Instruction& i, Lanes lanes) {
  View<To> d(w, i.r[0]);
  View<From> a(w, i.r[1]);
  each(lanes, [&](int l) {
    if constexpr (std::is_integral_v<To>)
      d.set(l, static_cast<To>(a[l]));
    else
      d.set(l, narrow<To>(widen(a[l])));
  });
}

template <class T>
void to_two(Warp& w, const Instruction& i, Lanes lanes) {
  View<Two<T>> d(w, i.r[0]);
  View<float> high(w, i.r[1]), low(w, i.r[2]);
  const bool relu = i.number;
  each(lanes, [&](int l) {
    const float a = relu && low[l] < 0 ? 0 : low[l], b = relu && high[l] < 0 ? 0 : high[l];
    d.set(l, {narrow<T>(a), narrow<T>(b)});
  });
}

Run fast(const Conversion& c) {
  if (c.saturate || c.relu || c.whole || c.round != Round::nearest) {
    if (is_float(c.to) || is_float(c.from)) return nullptr;
  }
  if (c.saturate) return nullptr;
  const std::string both = c.to + "." + c.from;
  if (both == "f32.bf16") return plain<float, bf16>;
  if (both == "bf16.f32") return plain<bf16, float>;
  if (both == "f32.f16") return plain<float, f16>;
  if (both == "f16.f32") return plain<f16, float>;
  if (both == "s64.s32") return plain<int64_t, int32_t>;
  return nullptr;
}

void add_window(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) { w.set(i.r[0], l, w.value(i.r[1], l) + i.number); });
}
// A shared address of the window may name another block of the cluster.
void remove_window(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) { w.set(i.r[0], l, w.value(i.r[1], l) & ~kWindow); });
}

void is_space(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const uint64_t window = w.value(i.r[1], l) & kWindow;
    w.set(i.r[0], l, window == static_cast<uint64_t>(i.number));
  });
}

uint64_t window_of(const Decoder& d) {
  if (d.has("shared") || d.has("shared::cta") || d.has("shared::cluster")) return kSharedWindow;
  return d.has("local") ? kLocalWindow : 0;
}

}  // namespace

bool conversion(Decoder& d) {
  const std::string& op = d.name[0];
  if (op == "cvta") {
    d.write(0, file_of(d.type()));
    d.read(1, file_of(d.type()));
    const uint64_t window = window_of(d);
    d.i->number = static_cast<int64_t>(window);
    d.i->run = d.has("to") && window ? remove_window : add_window;
    if (d.has("to") && !window) d.i->number = 0;
    return true;
  }
  if (op == "isspacep") {
    d.write(0, File::predicate);
    d.read(1, File::b64);
    d.i->number = static_cast<int64_t>(window_of(d));
    d.i->run = is_space;
    return true;
  }
  if (op != "cvt") return false;
  const Conversion c{d.type(1),
                     d.type(),
                     d.has("rzi") || d.has("rz")   ? Round::zero
                     : d.has("rmi") || d.has("rm") ? Round::down
                     : d.has("rpi") || d.has("rp") ? Round::up
                                                   : Round::nearest,
                     d.has("sat"),
                     d.has("relu"),
                     d.has("rni") || d.has("rzi") || d.has("rmi") || d.has("rpi")};
  if (c.to == "bf16x2" || c.to == "f16x2") {
    if (c.from != "f32" || c.round != Round::nearest || c.saturate) return false;
    d.write(0, File::b32);
    d.read(1, File::b32);
    d.read(2, File::b32);
    d.i->number = c.relu;
    d.i->run = c.to == "bf16x2" ? to_two<bf16> : Run{to_two<f16>};
    return true;
  }
  d.write(0, file_of(c.to));
  d.read(1, file_of(c.from));
  // The source may be a wider register, of which the low bits count.
  if (d.i->r[1].file == file_of(c.from) && d.i->r[0].file == file_of(c.to)) d.i->run = fast(c);
  if (!d.i->run) {
    d.i->number = static_cast<int64_t>(conversions().size());
    conversions().push_back(c);
    d.i->run = run_conversion;
  }
  return true;
}

}  // namespace ptx
