// Weight gradient of a tap convolution: dW[m, c, tap] = Σ_p x[p·stride + tap, c] · dy[p, m].
//
// One matrix product per tap, whose reduction runs over positions. Boxes of positions are packed in
// panels of a few vectors of channels, with what their sources do to them; each pair of an x and a
// dy panel then serves every tap. Padding with zeros is not packed but left out: a tap runs
// over the positions whose x exists, so that 0·inf arises nowhere.
#include <amx_gradient.h>
#include <cpu.h>
#include <gradient_blocks.h>
#include <microkernel.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace fastst::cpu {
namespace {

constexpr int kRows = most_rows(kMostVectors);
constexpr int64_t kNeighbours[] = {0, 1, 2, 3, 4, 5, 6, 7};  // channels of packed x

// Channels [lo, hi) in panels of at most kMostVectors vectors, as even as they can be.
std::vector<Panel> vector_panels(int64_t lo, int64_t hi) {
  const Groups groups((hi - lo + kLanes - 1) / kLanes, kMostVectors);
  std::vector<Panel> panels;
  for (int64_t i = 0; i < groups.count; ++i) {
    const int64_t begin = lo + groups.start(i) * kLanes, end = lo + groups.start(i + 1) * kLanes;
    panels.push_back({begin, std::min(end, hi) - begin, end - begin});
  }
  return panels;
}

// Where a tap (t, h, w) finds packed x for the outputs of a box, in elements of panels that are
// `x_width` channels wide; dy's are `width`. Neighbouring runs are joined.
std::vector<Segment> segments(const Reads& x, const Box& box, const std::array<int64_t, 3>& tap,
                              int64_t x_width, int64_t width) {
  const auto& [clips, ts, hs, ws] = box;
  const Range t = valid(x.axis[0], ts, tap[0]), h = valid(x.axis[1], hs, tap[1]);
  const Range w = valid(x.axis[2], ws, tap[2]);
  std::vector<Segment> found;
  if (w.size() == 0) return found;
  const int64_t step = x.window[2].pitch * x_width;
  const auto entry = [&](int i, int64_t o) { return x.window[i].entry(x.axis[i], o, tap[i]); };
  for (int64_t n = 0; n < clips.size(); ++n)
    for (int64_t i = t.lo; i < t.hi; ++i)
      for (int64_t j = h.lo; j < h.hi; ++j) {
        const int64_t frame = n * x.window[0].count + entry(0, i);
        const int64_t line = frame * x.window[1].count + entry(1, j);
        const int64_t own = (n * ts.size() + i - ts.lo) * hs.size() + j - hs.lo;
        const Segment s = {(line * x.window[2].count + entry(2, w.lo)) * x_width,
                           (own * ws.size() + w.lo - ws.lo) * width, w.size()};
        const bool joins = !found.empty() && found.back().count + s.count <= kLongestSum &&
                           found.back().a + found.back().count * step == s.a &&
                           found.back().b + found.back().count * width == s.b;
        if (joins)
          found.back().count += s.count;
        else
          found.push_back(s);
      }
  return found;
}

// The same of all taps.
std::vector<std::vector<Segment>> all_segments(const Reads& x, const Box& box, int64_t x_width,
                                               int64_t width) {
  std::vector<std::vector<Segment>> found;
  for (int64_t t = 0; t < x.axis[0].kernel; ++t)
    for (int64_t h = 0; h < x.axis[1].kernel; ++h)
      for (int64_t w = 0; w < x.axis[2].kernel; ++w)
        found.push_back(segments(x, box, {t, h, w}, x_width, width));
  return found;
}

// One group of channels.
template <class Kind>
class Group : GradientGroup {
 public:
  Group(const Input& x, const Input& dy, const Geometry& g, const View& dw, int threads,
        const std::optional<Pairing>& pairing = {})
      : GradientGroup(x, dy, g, dw, threads, pairing) {
    const int64_t vectors = (dy.channels + kLanes - 1) / kLanes;
    cut_ranges(vectors, taps_ * x.channels * dy.channels);
    for (int64_t i = 0; i < ranges_; ++i) {
      first_.push_back(out_.size());
      const int64_t lo = vectors * i / ranges_ * kLanes, hi = vectors * (i + 1) / ranges_ * kLanes;
      for (const Panel& p : vector_panels(lo, std::min(hi, dy.channels))) add_panel(p);
    }
    first_.push_back(out_.size());
    cut_parts((vectors + ranges_ - 1) / ranges_ * kLanes);
  }

  void run() const {
    GradientGroup::run(
        [&](int64_t range, Range boxes, float* sums) { return item(range, boxes, sums); },
        [&](const float* block, const Panel& in, const Panel& out) {
          write_block(block, in, out, dw_);
        });
  }

 private:
  // Floats of packed x, up to where dy begins.
  int64_t panels_of(const Reads& x) const {
    const int64_t vectors = (x.count() * in_.size() * x_width_ + kLanes - 1) / kLanes;
    return vectors * kLanes;
  }

  // Sums over some boxes for one range of dy's channels.
  bool item(int64_t range, Range boxes, float* sums) const {
    const Panel *first = &out_[first_[range]], *last = &out_[first_[range + 1]];
    const int64_t columns = last[-1].channel + last[-1].width;
    const Scratch block(whole() ? taps_ * kLanes * kMostVectors * kLanes : 0);
    int64_t most = 0;
    for (int64_t b = boxes.lo; b < boxes.hi; ++b)
      most = std::max(most, panels_of(reads_of(g_, boxes_[b])) +
                                outputs(boxes_[b]) * (columns - first->channel));
    const Scratch packed(most);
    for (int64_t b = boxes.lo; b < boxes.hi; ++b) {
      const Reads x = reads_of(g_, boxes_[b]), own = themselves(boxes_[b]);
      float* dy = packed + panels_of(x);
      pack_x(x, packed);
      pack_dy(own, first, last, dy);
      std::vector<std::vector<Segment>> taps;
      for (const Panel* out = first; out < last; dy += own.count() * out++->width) {
        if (out == first || out->width != out[-1].width)
          taps = all_segments(x, boxes_[b], x_width_, out->width);
        for (size_t i = 0; i < in_.size(); ++i) {
          const float* panel = packed + i * x.count() * x_width_;
          float* to = whole() ? block.data() : sums + at(out - &out_[0], i);
          multiply_panels(panel, x.window[2].pitch * x_width_, in_[i], dy, *out, taps, to,
                          b > boxes.lo);
          if (whole()) write_block(to, in_[i], *out, dw_);
        }
      }
    }
    return true;
  }

  // block (channels of x, taps) × channels of dy, from one box.
  void multiply_panels(const float* x, int64_t step, const Panel& in, const float* dy,
                       const Panel& out, const std::vector<std::vector<Segment>>& taps,
                       float* block, bool add) const {
    for (int64_t c = 0; c < in.channels; c += kRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kRows, in.channels - c));
      const Multiply multiply =
          multiply_for<Kind>(rows, static_cast<int>(out.width / kLanes), false);
      for (int64_t i = 0; i < taps_; ++i) {
        const Segment *next = taps[i].data(), *last = next + taps[i].size();
        bool onto = add;
        do {
          const Segment* first = next;
          for (int64_t sum = 0; next < last && sum < kLongestSum;) sum += next++->count;
          multiply(x + c, kNeighbours, step, dy, out.width, first, next - first,
                   block + (c * taps_ + i) * out.width, taps_ * out.width, onto);
          onto = true;
        } while (next < last);
      }
    }
  }

  std::vector<int64_t> first_;  // dy panel of each range
};

// A depthwise convolution: dW[c, tap] = Σ_p x[p·stride + tap, c] · dy[p, c], a vector of channels
// at a time.
class Channelwise {
 public:
  Channelwise(const Input& x, const Input& dy, const Geometry& g, const View& dw, int threads)
      : x_(x), dy_(dy), g_(g), dw_(dw), threads_(threads), taps_(g.taps()) {
    for (int64_t c = 0; c < x.channels; c += kLanes)
      panels_.push_back({c, std::min<int64_t>(kLanes, x.channels - c), kLanes});
    const int64_t wide = floats() / taps_;
    boxes_ = cut_boxes(g, wide, wide, kBoxFloats, threads);
    parts_ = std::min<int64_t>(threads, boxes_.size());
  }

  void run() {
    const Scratch sums(parts_ * floats());
    parallel_for(threads_, parts_, [&](int64_t part) { item(part, sums + part * floats()); });
    for (size_t i = 0; i < panels_.size(); ++i) {
      float* block = sums + i * taps_ * kLanes;
      for (int64_t part = 1; part < parts_; ++part)
        for (int64_t j = 0; j < taps_ * kLanes; j += kLanes)
          store(block + j, load(block + j) + load(block + part * floats() + j));
      write_block(block, {0, 1, kLanes}, panels_[i], dw_);
    }
  }

 private:
  int64_t floats() const { return panels_.size() * taps_ * kLanes; }

  void item(int64_t part, float* sums) const {
    std::fill_n(sums, floats(), 0.0f);
    const int64_t count = boxes_.size(), wide = panels_.size() * kLanes;
    for (int64_t b = count * part / parts_; b < count * (part + 1) / parts_; ++b) {
      const Reads x = reads_of(g_, boxes_[b]), own = themselves(boxes_[b]);
      const Scratch packed((x.count() + own.count()) * wide);
      float* dy = packed + x.count() * wide;
      pack_panels<Floats>(x, x_, &panels_.front(), &panels_.back() + 1, packed);
      pack_panels<Floats>(own, dy_, &panels_.front(), &panels_.back() + 1, dy);
      const auto taps = all_segments(x, boxes_[b], kLanes, kLanes);
      for (size_t i = 0; i < panels_.size(); ++i)
        for (int64_t tap = 0; tap < taps_; ++tap)
          for (const Segment& s : taps[tap]) {
            float* to = sums + (i * taps_ + tap) * kLanes;
            store(to, load(to) + product(packed + i * x.count() * kLanes + s.a,
                                         x.window[2].pitch * kLanes,
                                         dy + i * own.count() * kLanes + s.b, s.count));
          }
    }
  }

  // Σ a·b of neighbours, in several sums that do not wait for each other.
  static Vec product(const float* a, int64_t step, const float* b, int64_t count) {
    constexpr int kSums = 4;
    Vec sum[kSums] = {};
    int64_t k = 0;
    for (; k + kSums <= count; k += kSums)
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i)
        sum[i] += load(a + (k + i) * step) * load(b + (k + i) * kLanes);
    for (; k < count; ++k) sum[0] += load(a + k * step) * load(b + k * kLanes);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  const Input x_, dy_;
  const Geometry g_;
  const View& dw_;
  const int threads_;
  const int64_t taps_;
  std::vector<Panel> panels_;
  std::vector<Box> boxes_;
  int64_t parts_;
};

// Whether the rows of a frame lie in memory as one.
bool rows_join(const Input& in, int64_t width) {
  return in.a.h == width * in.a.w && (!in.b.data || in.b.h == width * in.b.w);
}

}  // namespace

void weight_gradient(const Source& x, const Source& dy, const Conv& conv, const View& dw, Sums sums,
                     int threads) {
  if (x.past) throw std::invalid_argument("fastst cpu weight_gradient: requires x without a past");
  Geometry g = geometry(conv, x, dy.a);
  const bool apart = is_depthwise(dw, conv);
  const int64_t groups = apart ? 1 : conv.groups;
  Input out = input_of(dy, 0, dw.size[0] / groups);
  Input in = input_of(x, 0, apart ? out.channels : dw.size[1]);
  if (g.h.idle() && g.w.idle() && rows_join(in, g.w.in) && rows_join(out, g.w.in)) {
    g.w.in = g.w.out = g.h.in * g.w.in;
    g.h.in = g.h.out = 1;
  }
  if (apart) return Channelwise(in, out, g, dw, threads).run();
  View part = dw;
  part.size[0] = out.channels;
  const bool stored = in.a.storage == Storage::bf16 && out.a.storage == Storage::bf16;
  const auto pairing = stored && in_pairs(sums) ? Pairing::of(g) : std::nullopt;
  for (int64_t i = 0; i < groups; ++i) {
    const Input from = in.from(i * in.channels, in.channels);
    const Input to = out.from(i * out.channels, out.channels);
    if (pairing && by_amx(sums) && AmxGroup(from, to, g, part, threads, *pairing).run()) {
      // All numbers were finite.
    } else if (pairing)
      Group<Bf16Pairs>(from, to, g, part, threads, *pairing).run();
    else
      Group<Floats>(from, to, g, part, threads).run();
    part.data = Tensor(part).shifted(out.channels * dw.stride[0]).data;
  }
}

}  // namespace fastst::cpu
