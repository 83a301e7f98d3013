// Weight gradient by AMX, of pairs of positions: left ones hold rows of dy's channels, right ones
// columns of x's. dy is packed turned, with zeros wherever rows of x are longer than those of
// outputs or a stretch of k ends: so every tap runs over whole stretches, and only its start in x
// is another one. x is packed with its padding in space.
#pragma once

#include <amx.h>
#include <gradient_blocks.h>

#include <algorithm>
#include <vector>

namespace fastst::cpu {

inline int64_t whole_stretches(int64_t k) { return (k + kAmxPairs - 1) / kAmxPairs * kAmxPairs; }

// One group of channels.
class AmxGroup : GradientGroup {
 public:
  AmxGroup(const Input& x, const Input& dy, const Geometry& g, const View& dw, int threads,
           const Pairing& pairing)
      : GradientGroup(x, dy, g, dw, threads, pairing) {
    for (int64_t m = 0; m < dy.channels; m += kLanes)
      add_panel({m, std::min<int64_t>(kLanes, dy.channels - m), kLanes});
    cut_ranges(groups(), total());
    cut_parts((groups() + ranges_ - 1) / ranges_ * 2 * kLefts * kLanes);
  }

  // Whether all that was multiplied is finite: zeros make NaN of what is not.
  bool run() const {
    return GradientGroup::run(
        [&](int64_t range, Range boxes, float* sums) { return item(range, boxes, sums); },
        [&](const float* block, const Panel& in, const Panel& out) { write(block, in, out); });
  }

 private:
  static constexpr int kVectors = AmxPairs::kMostVectors, kLefts = most_lefts(kVectors);
  // So many pairs, and the rest of their stretch, are summed before they are added to others.
  static constexpr int64_t kLongestAmxSum = 2048;

  // How dy of a box lies: for each channel frames, of rows `row` apart if x is read in one stretch
  // over all of them.
  struct Layout {
    int64_t row, frame, pitch;
    bool joins;

    Layout(const Box& box, const Reads& x) {
      const int64_t width = box[3].size(), rows = box[2].size(),
                    frames = box[0].size() * box[1].size();
      const int64_t down = x.window[1].pitch * x.window[2].count, step = x.window[2].pitch;
      row = whole_stretches(width), frame = rows * row;
      const int64_t joined = down / step, all = whole_stretches(rows * joined);
      joins = rows > 1 && down % step == 0 && all <= frame;
      if (joins) row = joined, frame = all;
      pitch = frames * frame;
      if (pitch / kAmxPairs % 2 == 0) pitch += kAmxPairs;  // rows in different sets of the cache
    }
  };

  // Panels of dy that are multiplied together.
  int64_t groups() const { return (out_.size() + kLefts - 1) / kLefts; }

  // Sums over some boxes for one range of dy's channels.
  bool item(int64_t range, Range boxes, float* sums) const {
    const Amx amx(kLanes);
    const int64_t ins = in_.size(), block_size = taps_ * kLanes * kLanes;
    const int64_t first = groups() * range / ranges_ * kLefts;
    const int64_t last = std::min<int64_t>(groups() * (range + 1) / ranges_ * kLefts, out_.size());
    const Scratch local(whole() ? kLefts * kVectors * block_size : 0);
    alignas(kLine) float apart[kLefts][kVectors][kLanes * kLanes];
    for (int64_t b = boxes.lo; b < boxes.hi; ++b) {
      const Box& box = boxes_[b];
      const Reads x = reads_of(g_, box, true);
      const Layout layout(box, x);
      const int64_t panel = x.count() * x_width_, step = x.window[2].pitch * x_width_;
      const int64_t beyond =
          (layout.row + kAmxPairs) * step + kLanes;  // read for the sake of zeros
      const Scratch right(ins * panel + beyond), left((last - first) * kLanes * layout.pitch);
      std::fill_n(right.data(), ins * panel + beyond, 0.0f);
      pack_x(x, right);
      turn(box, layout, &out_[first], &out_[last - 1] + 1, left);
      if (!is_finite(right, ins * panel) ||
          !is_finite(left, (last - first) * kLanes * layout.pitch))
        return false;
      const std::vector<std::vector<Segment>> taps = segments(box, x, layout);
      for (int64_t o = first; o < last; o += kLefts) {
        const int lefts = static_cast<int>(std::min<int64_t>(kLefts, last - o));
        for (int64_t i = 0, vectors; i < ins; i += vectors) {
          vectors = block_vectors(i, ins, kVectors);
          const auto block = [&](int l, int64_t v) {
            return whole() ? local + (l * kVectors + v) * block_size : sums + at(o + l, i + v);
          };
          AmxProduct p = {{}, layout.pitch, {}, step, {}, {}, {}, kLanes};
          for (int l = 0; l < lefts; ++l) p.a[l] = left + (o + l - first) * kLanes * layout.pitch;
          for (int64_t v = 0; v < vectors; ++v) p.b[v] = right + (i + v) * panel;
          for (int64_t tap = 0; tap < taps_; ++tap) {
            const Segment *next = taps[tap].data(), *end = next + taps[tap].size();
            bool onto = b > boxes.lo;
            do {
              p.segments = next;
              for (int64_t sum = 0; next < end && sum < kLongestAmxSum;) sum += next++->count;
              p.count = next - p.segments;
              for (int l = 0; l < lefts; ++l)
                for (int64_t v = 0; v < vectors; ++v)
                  p.c[l][v] = onto ? apart[l][v] : block(l, v) + tap * kLanes * kLanes;
              amx(lefts, static_cast<int>(vectors), p);
              for (int l = 0; onto && l < lefts; ++l)
                for (int64_t v = 0; v < vectors; ++v)
                  add(apart[l][v], block(l, v) + tap * kLanes * kLanes);
              onto = true;
            } while (next < end);
          }
          if (!whole()) continue;
          for (int l = 0; l < lefts; ++l)
            for (int64_t v = 0; v < vectors; ++v) write(block(l, v), in_[i + v], out_[o + l]);
        }
      }
    }
    return true;
  }

  static void add(const float* sums, float* to) {
    for (int64_t j = 0; j < kLanes * kLanes; j += kLanes)
      store(to + j, load(to + j) + load(sums + j));
  }

  // For each tap the stretches of dy and of x.
  std::vector<std::vector<Segment>> segments(const Box& box, const Reads& x,
                                             const Layout& layout) const {
    const auto& [clips, ts, hs, ws] = box;
    std::vector<std::vector<Segment>> found;
    const auto entry = [&](int i, int64_t o, int64_t tap) {
      return x.window[i].entry(x.axis[i], o, tap);
    };
    for (int64_t t = 0; t < x.axis[0].kernel; ++t)
      for (int64_t h = 0; h < x.axis[1].kernel; ++h)
        for (int64_t w = 0; w < x.axis[2].kernel; ++w) {
          std::vector<Segment>& list = found.emplace_back();
          const Range frames = valid(x.axis[0], ts, t);
          for (int64_t n = 0; n < clips.size(); ++n)
            for (int64_t i = frames.lo; i < frames.hi; ++i)
              for (int64_t j = hs.lo; j < (layout.joins ? hs.lo + 1 : hs.hi); ++j) {
                const int64_t frame = n * x.window[0].count + entry(0, i, t);
                const int64_t line = frame * x.window[1].count + entry(1, j, h);
                const int64_t own = (n * ts.size() + i - ts.lo) * layout.frame;
                list.push_back({own + (j - hs.lo) * layout.row,
                                (line * x.window[2].count + entry(2, ws.lo, w)) * x_width_,
                                layout.joins ? layout.frame : layout.row});
              }
        }
    return found;
  }

  // Channels of dy as rows.
  void turn(const Box& box, const Layout& layout, const Panel* begin, const Panel* end,
            float* to) const {
    const Reads own = themselves(box);
    const int64_t width = box[3].size(), rows = box[2].size(), frames = own.count() / width / rows;
    const Scratch flat((end - begin) * own.count() * kLanes);
    pack_dy(own, begin, end, flat);
    const float* from = flat;
    std::fill_n(to, (end - begin) * kLanes * layout.pitch, 0.0f);
    for (; begin < end; ++begin, to += kLanes * layout.pitch)
      for (int64_t i = 0; i < frames; ++i)
        for (int64_t j = 0; j < rows; ++j)
          for (int64_t k = 0; k < width; k += kLanes) {
            const int64_t n = std::min<int64_t>(kLanes, width - k);
            Vec square[kLanes] = {};
            for (int64_t r = 0; r < n; ++r, from += kLanes) square[r] = load(from);
            transpose(square);
            float* at = to + i * layout.frame + j * layout.row + k;
            for (int m = 0; m < kLanes; ++m) store(at + m * layout.pitch, square[m], n);
          }
  }

  static bool is_finite(const float* pairs, int64_t count) {
    constexpr int kSecond = 0x7f800000, kFirst = kSecond >> 16;
    Bits bad{};
    for (int64_t i = 0; i < count; i += kLanes) {
      const Bits v = reinterpret_cast<Bits>(load(pairs + i));
      bad |= ((v & kFirst) == kFirst) | ((v & kSecond) == kSecond);
    }
    int any = 0;
    for (int i = 0; i < kLanes; ++i) any |= bad[i];
    return !any;
  }

  // block (taps, channels of dy, channels of x).
  void write(const float* block, const Panel& in, const Panel& out) const {
    const Scratch turned(block_size(out));
    for (int64_t tap = 0; tap < taps_; ++tap) {
      Vec square[kLanes];
      for (int m = 0; m < kLanes; ++m) square[m] = load(block + (tap * kLanes + m) * kLanes);
      transpose(square);
      for (int c = 0; c < kLanes; ++c) store(turned + (c * taps_ + tap) * kLanes, square[c]);
    }
    write_block(turned, in, out, dw_);
  }
};

}  // namespace fastst::cpu
