// Loads, stores and atomics.
#include <algorithm>
#include <cstring>

#include "numbers.h"

namespace ptx {

void check_read(const Place& place, uint32_t size) {
  if (place.kind != Place::shared) return;
  const auto& state = place.block->shared.state;
  for (uint32_t n = place.address; n < place.address + size; ++n) {
    if (state[n] & kIncoming) throw Error("reads shared memory that a copy under way will write");
    if (!(state[n] & kWritten)) throw Error("reads shared memory that nothing has written");
  }
}

void check_write(Warp& w, const Place& place, uint32_t size) {
  if (place.kind != Place::shared) return;
  Shared& shared = place.block->shared;
  for (uint32_t n = place.address; n < place.address + size; ++n) {
    if (shared.state[n] & kIncoming)
      throw Error("writes shared memory that a copy under way will write");
    if (shared.state[n] & kOutgoing)
      throw Error("writes shared memory that a product or copy under way is still to read");
    shared.state[n] |= kWritten;
  }
  if (place.block == w.block) w.wrote_unfenced(place.address, size);
}

namespace {

// `number` of a load or store: the space's window, which an address without a window gets.
// offset[1]: bytes of an element; offset[2]: whether it is signed; offset[3]: elements.

struct Access {
  uint64_t window;
  uint32_t element, count;
  bool is_signed;
  explicit Access(const Instruction& i)
      : window(static_cast<uint64_t>(i.number)),
        element(static_cast<uint32_t>(i.offset[1])),
        count(static_cast<uint32_t>(i.offset[3])),
        is_signed(i.offset[2]) {}
  uint32_t size() const { return element * count; }
};

void count(Warp& w, const Instruction& i, const Access& access, Lanes lanes, const Longs& at) {
  Launch& launch = *w.block->cluster->launch;
  if (!launch.count) return;
  const uint64_t window = at[__builtin_ctz(lanes)] & kWindow;
  if (window == kSharedWindow) launch.counters.of_shared(i, lanes, at, access.size());
  if (window == 0) launch.counters.of_global(i, lanes, at, access.size(), !i.writes);
}

uint64_t element_of(const uint8_t* bytes, const Access& access) {
  uint64_t value = 0;
  std::memcpy(&value, bytes, access.element);
  if (access.is_signed && access.element < 8 && value >> (8 * access.element - 1) & 1)
    value |= ~uint64_t{0} << 8 * access.element;
  return value;
}

void load(Warp& w, const Instruction& i, Lanes lanes) {
  const Access access(i);
  Launch& launch = *w.block->cluster->launch;
  Longs at;
  each(lanes, [&](int l) {
    at[l] = w.address(i, i.writes, l);
    if (!(at[l] & kWindow)) at[l] |= access.window;
    const Place place = launch.place(w, at[l], access.size(), false, l);
    check_read(place, access.size());
    std::array<uint64_t, 8> values;  // the address may be among what is written
    for (uint32_t n = 0; n < access.count; ++n)
      values[n] = element_of(place.bytes + n * access.element, access);
    for (uint32_t n = 0; n < access.count; ++n) w.set(i.r[n], l, values[n]);
  });
  count(w, i, access, lanes, at);
}

void store(Warp& w, const Instruction& i, Lanes lanes) {
  const Access access(i);
  Launch& launch = *w.block->cluster->launch;
  Longs at;
  each(lanes, [&](int l) {
    at[l] = w.address(i, 0, l);
    if (!(at[l] & kWindow)) at[l] |= access.window;
    const Place place = launch.place(w, at[l], access.size(), true, l);
    check_write(w, place, access.size());
    for (uint32_t n = 0; n < access.count; ++n) {
      const uint64_t value = w.value(i.r[1 + n], l);
      std::memcpy(place.bytes + n * access.element, &value, access.element);
    }
  });
  count(w, i, access, lanes, at);
  ++w.block->cluster->progress;
}

void nothing(Warp&, const Instruction&, Lanes) {}

uint64_t window_of(const Decoder& d) {
  if (d.has("shared") || d.has("shared::cta") || d.has("shared::cluster")) return kSharedWindow;
  if (d.has("local")) return kLocalWindow;
  return 0;  // global, generic and param have addresses of their own
}

// ---- atomics: one lane after the other

enum class Atomic { add, min, max, exch, cas, bit_and, bit_or };

template <class T>
void atomic(Warp& w, const Instruction& i, Lanes lanes) {
  const Access access(i);
  const int first = i.writes;
  each(lanes, [&](int l) {
    uint64_t at = w.address(i, first, l);
    if (!(at & kWindow)) at |= access.window;
    const Place place = w.block->cluster->launch->place(w, at, sizeof(T), true, l);
    check_read(place, sizeof(T));
    check_write(w, place, sizeof(T));
    T old;
    std::memcpy(&old, place.bytes, sizeof(T));
    const auto operand = [&](int n) {
      return std::bit_cast<T>(static_cast<Bits<sizeof(T)>>(w.value(i.r[first + n], l)));
    };
    T made = operand(1);
    switch (static_cast<Atomic>(i.offset[3])) {
      case Atomic::add:
        made = static_cast<T>(old + made);
        break;
      case Atomic::min:
        made = std::min(old, made);
        break;
      case Atomic::max:
        made = std::max(old, made);
        break;
      case Atomic::exch:
        break;
      case Atomic::cas:
        made = old == made ? operand(2) : old;
        break;
      default:
        if constexpr (std::is_integral_v<T>)
          made = static_cast<Atomic>(i.offset[3]) == Atomic::bit_and ? old & made : old | made;
    }
    std::memcpy(place.bytes, &made, sizeof(T));
    if (i.writes) w.set(i.r[0], l, std::bit_cast<Bits<sizeof(T)>>(old));
  });
  ++w.block->cluster->progress;
}

bool atomics(Decoder& d) {
  static const std::map<std::string, Atomic> kinds{
      {"add", Atomic::add}, {"min", Atomic::min},     {"max", Atomic::max},  {"exch", Atomic::exch},
      {"cas", Atomic::cas}, {"and", Atomic::bit_and}, {"or", Atomic::bit_or}};
  const std::string& type = d.type();
  int n = 0;
  if (d.name[0] == "atom") d.write(n++, file_of(type));
  d.address(n++);
  for (; n < static_cast<int>(d.operands.size()); ++n) d.read(n, file_of(type));
  d.i->number = static_cast<int64_t>(window_of(d));
  for (const std::string& part : d.name)
    if (const auto kind = kinds.find(part); kind != kinds.end())
      d.i->offset[3] = static_cast<int64_t>(kind->second);
  if (type == "u32" || type == "b32")
    d.i->run = atomic<uint32_t>;
  else if (type == "s32")
    d.i->run = atomic<int32_t>;
  else if (type == "u64" || type == "b64")
    d.i->run = atomic<uint64_t>;
  else if (type == "f32")
    d.i->run = atomic<float>;
  else if (type == "f64")
    d.i->run = atomic<double>;
  return true;
}

}  // namespace

bool memory(Decoder& d) {
  const std::string& op = d.name[0];
  if (op == "atom" || op == "red") return atomics(d);
  if (op == "membar" || (op == "fence" && !d.has("proxy")) || op == "prefetch" ||
      op == "prefetchu" || op == "discard" || op == "applypriority") {
    d.i->run = nothing;
    return true;
  }
  if (op != "ld" && op != "ldu" && op != "st") return false;
  const std::string& type = d.type();
  const bool loads = op != "st";
  const Operand& values = d.operands.at(loads ? 0 : 1);
  const bool several = values.kind == Operand::list;
  if (loads) {
    if (several)
      for (const Operand& part : values.inner) {
        d.i->r.push_back(d.destination(part, file_of(type)));
        ++d.i->writes;
      }
    else
      d.write(0, file_of(type));
    d.address(1);
  } else {
    d.address(0);
    d.read(1, file_of(type));
  }
  d.i->number = static_cast<int64_t>(window_of(d));
  d.i->offset[1] = size_of(type);
  d.i->offset[2] = type[0] == 's';
  d.i->offset[3] = several ? static_cast<int64_t>(values.inner.size()) : 1;
  d.i->run = loads ? load : store;
  return true;
}

}  // namespace ptx
