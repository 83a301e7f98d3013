// What a box of outputs reads of a source, as panels of a few neighbouring channels.
#pragma once

#include <tile.h>

#include <array>
#include <vector>

namespace fastst::cpu {

struct Range {
  int64_t lo, hi;
  int64_t size() const { return hi - lo; }
};

// Of the outputs in o, those for which a tap reads something.
inline Range valid(const Axis& a, Range o, int64_t tap) {
  if (a.mode != PadMode::zeros) return o;
  const int64_t shift = a.before - tap * a.dilation;
  const auto up = [&](int64_t i) { return i <= 0 ? -(-i / a.stride) : (i - 1) / a.stride + 1; };
  const int64_t lo = std::max(o.lo, up(shift));
  return {lo, std::max(lo, std::min(o.hi, up(a.in + shift)))};
}

// What the outputs in o read along one axis, side by side: entry e is padded position
// first + e·step. Zeros at the ends are left out, unless asked for; one tap alone leaves out what
// no output reads.
struct Window {
  int64_t first, step, count;
  int64_t pitch;  // entries between the reads of neighbouring outputs

  Window(const Axis& a, Range o, bool padded = false)
      : first(a.first(o.lo)), step(a.kernel == 1 ? a.stride : 1) {
    pitch = a.stride / step;
    int64_t last = a.first(o.hi - 1) + (a.kernel - 1) * a.dilation;
    if (a.mode == PadMode::zeros && !padded) {
      if (first < 0) first += (-first + step - 1) / step * step;
      last = std::min(last, a.in - 1);
    }
    count = last < first ? 0 : (last - first) / step + 1;
  }
  int64_t entry(const Axis& a, int64_t o, int64_t tap) const {
    return (a.first(o) + tap * a.dilation - first) / step;
  }
};

struct Reads {
  std::array<Axis, 3> axis;  // t, h, w
  Range clips;
  std::array<Window, 3> window;
  int64_t count() const {
    return clips.size() * window[0].count * window[1].count * window[2].count;
  }
};

// Outputs n, t, h, w.
using Box = std::array<Range, 4>;

inline int64_t outputs(const Box& b) {
  return b[0].size() * b[1].size() * b[2].size() * b[3].size();
}

// The outputs of a box as if they were read.
inline Reads themselves(const Box& box) {
  const auto axis = [](Range o) { return Axis{1, 1, 1, 0, o.hi, o.hi, PadMode::zeros}; };
  const std::array<Axis, 3> a = {axis(box[1]), axis(box[2]), axis(box[3])};
  return {a, box[0], {Window(a[0], box[1]), Window(a[1], box[2]), Window(a[2], box[3])}};
}

// Boxes in order, at least `least` where there are as many positions; packed, one has at most
// `limit` floats of `in` and `out` channels. They grow first along the axes of the kernel, where
// neighbouring boxes pack the same x.
inline std::vector<Box> cut_boxes(const Geometry& g, int64_t in, int64_t out, int64_t limit,
                                  int64_t least) {
  const Axis axes[] = {g.t, g.h, g.w};
  const std::array<int64_t, 4> size = {g.batch, g.t.out, g.h.out, g.w.out};
  std::array<int64_t, 4> step = {1, 1, 1, 1};
  const auto floats = [&](const std::array<int64_t, 4>& n) {
    int64_t x = n[0] * in, dy = n[0] * out;
    for (int i = 0; i < 3; ++i) {
      x *= axes[i].kernel == 1 ? n[i + 1] : axes[i].extent(n[i + 1]);
      dy *= n[i + 1];
    }
    return x + dy;
  };
  limit = std::min(limit, floats(size) / least);
  std::array<int, 4> order = {3, 2, 1, 0};
  std::stable_partition(order.begin(), order.end(),
                        [&](int i) { return i > 0 && axes[i - 1].kernel > 1; });
  for (int i : order) {
    const auto cut = [&](int64_t pieces) { return step[i] = (size[i] + pieces - 1) / pieces; };
    for (int64_t pieces = 1; cut(pieces) > 1 && floats(step) > limit;) ++pieces;
    if (step[i] < size[i]) break;
  }
  std::vector<Box> all;
  for (int64_t n = 0; n < size[0]; n += step[0])
    for (int64_t t = 0; t < size[1]; t += step[1])
      for (int64_t h = 0; h < size[2]; h += step[2])
        for (int64_t w = 0; w < size[3]; w += step[3])
          all.push_back(
              {Range{n, std::min(n + step[0], size[0])}, Range{t, std::min(t + step[1], size[1])},
               Range{h, std::min(h + step[2], size[2])}, Range{w, std::min(w + step[3], size[3])}});
  return all;
}

// Neighbouring channels that are packed together, `width` floats for each position.
struct Panel {
  int64_t channel, channels, width;
};

// Packs panels one after the other, each with entries (n, t, h, w); what does not exist stays as it
// is. A row goes to all panels at once, so that memory is read in
// its order.
template <class Kind>
void pack_panels(const Reads& r, const Input& in, const Panel* begin, const Panel* end, float* to) {
  const auto& [t, h, w] = r.window;
  const Axis& row = r.axis[2];
  // Entries [from, until) are evenly apart in memory; the others are copies of some of these.
  const auto entry_of = [&, step = w.step](int64_t i) { return (i - w.first + step - 1) / step; };
  const int64_t from = w.first < 0 ? std::min(entry_of(0), w.count) : 0;
  const int64_t until = std::clamp(entry_of(row.in), from, w.count);
  Input stepping = in;
  for (Tensor* t : {&stepping.a, &stepping.b, &stepping.mean, &stepping.factor}) t->w *= w.step;
  int64_t entry = 0;
  with_reader<Kind>(stepping, [&](const auto& reader) {
    using Row = std::decay_t<decltype(reader)>;
    for (int64_t n = r.clips.lo; n < r.clips.hi; ++n)
      for (int64_t i = 0; i < t.count; ++i)
        for (int64_t j = 0; j < h.count; ++j, entry += w.count) {
          const int64_t at = r.axis[0].source(t.first + i * t.step);
          const int64_t line = r.axis[1].source(h.first + j * h.step);
          if (at < 0 || line < 0) continue;
          float* panel = to;
          for (const Panel* p = begin; p < end; panel += r.count() * p++->width) {
            const Input whole = in.from(p->channel, p->channels);
            const Row read(stepping.from(p->channel, p->channels));
            const auto piece = [&](int64_t e, int64_t count) {
              const int64_t x = row.source(w.first + e * w.step);
              if (x >= 0)
                read(whole.at(n, at, line, x), count, panel + (entry + e) * p->width, p->width);
            };
            for (int64_t e = 0; e < from; ++e) piece(e, 1);
            if (until > from) piece(from, until - from);
            for (int64_t e = until; e < w.count; ++e) piece(e, 1);
          }
        }
  });
}

}  // namespace fastst::cpu
