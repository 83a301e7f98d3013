// Instructions that do the same to every lane, for each type that their names end in.
#pragma once

#include <string>

#include "numbers.h"

namespace ptx {

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

// Calls f for the C++ type of a name; null where it is none of these.
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

}  // namespace ptx
