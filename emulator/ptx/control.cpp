// Barriers, and what lanes of a warp tell each other.
#include "numbers.h"

namespace ptx {

namespace {

int constant_of(Warp& w, Register r, Lanes lanes) {
  return static_cast<int>(w.value(r, __builtin_ctz(lanes)));
}

// ---- barriers of a block: r = the barrier's number[, threads]

void bar_sync(Warp& w, const Instruction& i, Lanes lanes) {
  const int barrier = constant_of(w, i.r[0], lanes);
  const int expected = i.r.size() > 1 ? constant_of(w, i.r[1], lanes) : 0;
  if (w.block->arrive(barrier, __builtin_popcount(lanes), expected, w))
    w.block->release(barrier);
  else
    w.wait(Wait::barrier, barrier);
}

void bar_arrive(Warp& w, const Instruction& i, Lanes lanes) {
  const int barrier = constant_of(w, i.r[0], lanes);
  const int expected = constant_of(w, i.r[1], lanes);
  if (w.block->arrive(barrier, __builtin_popcount(lanes), expected, w)) w.block->release(barrier);
}

void cluster_arrive(Warp& w, const Instruction&, Lanes lanes) {
  Cluster& cluster = *w.block->cluster;
  cluster.arrived += __builtin_popcount(lanes);
  auto& ordered = w.block->ordered;
  ordered.insert(ordered.end(), w.unfenced.begin(), w.unfenced.end());
  w.unfenced.clear();
  int alive = 0;
  for (const auto& block : cluster.blocks) alive += block->threads_alive();
  if (cluster.arrived < alive) return;
  // Everybody is here: who waits goes on, and who is still to wait need not.
  cluster.arrived = 0;
  ++cluster.generation;
  ++cluster.progress;
  for (auto& block : cluster.blocks)
    for (auto& warp : block->warps)
      for (Path& path : warp->paths)
        if (path.wait == Wait::cluster) path.wait = Wait::none;
}

void cluster_wait(Warp& w, const Instruction&, Lanes) {
  if (w.cluster_waits++ < w.block->cluster->generation) return;
  w.wait(Wait::cluster);
}

// ---- lanes

// Lanes of a mask execute together: the first to come wait for the others.
bool together(Warp& w, Lanes lanes, Lanes members) {
  if (((members & w.live) & ~lanes) == 0) return true;
  w.wait(Wait::lanes);
  return false;
}

// d, whether the source lane was in range | a, b, c, members
template <int mode>  // 0 idx, 1 up, 2 down, 3 bfly
void shuffle(Warp& w, const Instruction& i, Lanes lanes) {
  const Words a = w.w[i.r[2].index];
  const Words b = w.w[i.r[3].index], c = w.w[i.r[4].index], members = w.w[i.r[5].index];
  if (!together(w, lanes, members[__builtin_ctz(lanes)])) return;
  each(lanes, [&](int l) {
    const int by = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31;
    const int highest = (l & segment) | (clamp & ~segment), lowest = l & segment;
    int from = mode == 0   ? lowest | (by & ~segment)
               : mode == 1 ? l - by
               : mode == 2 ? l + by
                           : l ^ by;
    const bool in = mode == 1 ? from >= highest : from <= highest;
    if (!in) from = l;
    if (!(lanes >> from & 1)) throw Error("shuffles from a lane that does not take part");
    w.set(i.r[0], l, a[from]);
    w.set(i.r[1], l, in);
  });
}

template <int mode>  // 0 ballot, 1 all, 2 any, 3 uni
void vote(Warp& w, const Instruction& i, Lanes lanes) {
  if (!together(w, lanes, w.w[i.r[2].index][__builtin_ctz(lanes)])) return;
  const Lanes p = (i.number ? ~w.p[i.r[1].index] : w.p[i.r[1].index]) & lanes;
  const bool all = p == lanes, none = p == 0;
  each(lanes, [&](int l) {
    w.set(i.r[0], l, mode == 0 ? p : mode == 1 ? all : mode == 2 ? !none : all || none);
  });
}

void elect(Warp& w, const Instruction& i, Lanes lanes) {
  if (!together(w, lanes, w.w[i.r[2].index][__builtin_ctz(lanes)])) return;
  const int leader = __builtin_ctz(lanes);
  each(lanes, [&](int l) {
    w.set(i.r[0], l, leader);
    w.set(i.r[1], l, l == leader);
  });
}

template <class T, class F>
void reduce(Warp& w, const Instruction& i, Lanes lanes, F f) {
  if (!together(w, lanes, w.w[i.r[2].index][__builtin_ctz(lanes)])) return;
  View<T> a(w, i.r[1]), d(w, i.r[0]);
  T all = a[__builtin_ctz(lanes)];
  each(lanes & (lanes - 1), [&](int l) { all = f(all, a[l]); });
  each(lanes, [&](int l) { d.set(l, all); });
}
void redux_add(Warp& w, const Instruction& i, Lanes lanes) {
  reduce<uint32_t>(w, i, lanes, [](uint32_t a, uint32_t b) { return a + b; });
}
void redux_or(Warp& w, const Instruction& i, Lanes lanes) {
  reduce<uint32_t>(w, i, lanes, [](uint32_t a, uint32_t b) { return a | b; });
}
template <class T>
void redux_max(Warp& w, const Instruction& i, Lanes lanes) {
  reduce<T>(w, i, lanes, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
void redux_min(Warp& w, const Instruction& i, Lanes lanes) {
  reduce<T>(w, i, lanes, [](T a, T b) { return a < b ? a : b; });
}

void warp_sync(Warp& w, const Instruction& i, Lanes lanes) {
  together(w, lanes, w.w[i.r[0].index][__builtin_ctz(lanes)]);
}

void active(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) { w.set(i.r[0], l, lanes); });
}

void nothing(Warp&, const Instruction&, Lanes) {}
void trap(Warp&, const Instruction&, Lanes) { throw Error("trap"); }

Run vote_of(const Decoder& d) {
  if (d.has("ballot")) return vote<0>;
  if (d.has("all")) return vote<1>;
  if (d.has("any")) return vote<2>;
  return vote<3>;
}

Run redux_of(const Decoder& d) {
  const bool is_signed = d.type() == "s32";
  if (d.has("add")) return redux_add;
  if (d.has("or")) return redux_or;
  if (d.has("max")) return is_signed ? redux_max<int32_t> : Run{redux_max<uint32_t>};
  if (d.has("min")) return is_signed ? redux_min<int32_t> : Run{redux_min<uint32_t>};
  return nullptr;
}

}  // namespace

bool control(Decoder& d) {
  const std::string& op = d.name[0];
  Instruction& i = *d.i;
  if (op == "bar" || op == "barrier") {
    i.flow = Flow::wait;
    if (d.has("cluster")) {
      i.run = d.has("arrive") ? cluster_arrive : cluster_wait;
    } else if (d.has("warp")) {
      d.read(0, File::b32);
      i.run = warp_sync;
    } else if (d.has("red")) {
      return false;
    } else {
      for (size_t n = 0; n < d.operands.size(); ++n) d.read(static_cast<int>(n), File::b32);
      i.run = d.has("arrive") ? bar_arrive : bar_sync;
    }
    return true;
  }
  if (op == "shfl") {
    i.flow = Flow::wait;
    const bool tells = d.operands.size() == 6;
    d.write(0, File::b32);
    if (tells) {
      d.write(1, File::predicate);
    } else {
      i.r.push_back(d.destination({}, File::predicate));
      ++i.writes;
    }
    for (int n = tells ? 2 : 1; n < (tells ? 6 : 5); ++n) d.read(n, File::b32);
    i.run = d.has("idx")    ? shuffle<0>
            : d.has("up")   ? shuffle<1>
            : d.has("down") ? shuffle<2>
                            : shuffle<3>;
    return true;
  }
  if (op == "vote") {
    i.flow = Flow::wait;
    d.write(0, d.has("ballot") ? File::b32 : File::predicate);
    d.read(1, File::predicate);
    d.read(2, File::b32);
    i.number = d.operands[1].negated;
    i.run = vote_of(d);
    return true;
  }
  if (op == "elect") {
    i.flow = Flow::wait;
    d.write(0, File::b32);
    d.write(1, File::predicate);
    d.read(2, File::b32);
    i.run = elect;
    return true;
  }
  if (op == "redux") {
    i.flow = Flow::wait;
    d.write(0, File::b32);
    d.read(1, File::b32);
    d.read(2, File::b32);
    i.run = redux_of(d);
    return true;
  }
  if (op == "activemask") {
    d.write(0, File::b32);
    i.run = active;
    return true;
  }
  if (op == "trap") {
    i.run = trap;
    return true;
  }
  if (op == "nanosleep" || op == "griddepcontrol" || op == "setmaxnreg") {
    i.run = nothing;
    return true;
  }
  return false;
}

}  // namespace ptx
