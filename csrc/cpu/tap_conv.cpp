// Tap convolution: every pass of a pair, forward and input gradient.
//
// Tiles of output positions times blocks of output channels. What a tile reads is packed once with
// the source's function applied, then the microkernel sums over taps and channels.
#include <cpu.h>
#include <direct.h>
#include <winograd.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <stdexcept>

namespace fastst::cpu {
namespace {

// Whether no tap lies across the pixels of a frame, and these are evenly apart in memory.
bool has_flat_frames(const Problem& p) {
  const Axis &h = p.g.h, &w = p.g.w;
  const auto joins = [&](const Tensor& t) { return !t.data || t.h == w.in * t.w; };
  return h.idle() && w.idle() && joins(p.in.a) && joins(p.in.b) && joins(p.in.past) &&
         joins(p.out) && joins(p.aux);
}

// An odd number of channels fills its last pair with a zero for every tap. Where there are few,
// taps of a row become channels: 11 pairs, and not 14, for seven taps of three channels.
void take_row_as_channels(Problem& p) {
  Axis& w = p.g.w;
  if (w.kernel < 2 || w.dilation > 1 || p.in.channels % 2 == 0 || p.in.channels > kFewChannels)
    return;
  p.row = w;
  w = {1, 1, 1, 0, w.out, w.out, PadMode::zeros};
}

const float* from(const Array& a, int64_t channel) {
  return a.count ? static_cast<const float*>(a.data) + channel : nullptr;
}

// Offsets of some positions, in ascending order; in `memory`, unless they follow each other.
Places places(const Offsets& at, const int64_t* positions, int count, int64_t* memory) {
  if (count && positions[count - 1] - positions[0] == count - 1)
    return {at.from(positions[0]), count};
  for (int r = 0; r < count; ++r) memory[r] = at[positions[r]];
  return {memory, count};
}

// Everything of one way to sum, Direct or Winograd.
template <class Way>
void compute(const std::vector<Problem>& problems, const Epilogue& e, const Way& way,
             const std::vector<Tile>& tiles, const Reductions* reductions, int threads) {
  std::vector<Finisher> finishers;
  for (const Problem& p : problems)
    finishers.emplace_back(e, p.outer, p.out, p.aux, p.weights.out, p.stored, p.bias, p.norm);
  const auto multiply = [&](int64_t index, const typename Way::Ready& ready, const Work& work,
                            const float* weights) {
    const Problem& p = problems[work.problem];
    const Block& block = work.block;
    const Tile tile = inside(tiles[index], p.g);
    if (tile.positions() == 0) return;
    const auto start = [&](const Tensor& t) { return t.offset(tile.n, tile.t0, tile.h0, tile.w0); };
    const Offsets out_at(tile, start(p.out), p.out.t, p.out.h, p.out.w);
    std::optional<Offsets> aux_at;
    if (p.aux.data) aux_at.emplace(tile, start(p.aux), p.aux.t, p.aux.h, p.aux.w);
    const Finisher& finisher = finishers[work.problem];
    int64_t before = 0;
    way(
        tile, ready, work, weights,
        [&](const int64_t* positions, int count) {
          int64_t memory[kMostPlaces], beside[kMostPlaces];
          finisher.expect(block.vector * kLanes, block.vectors,
                          places(out_at, positions, count, memory),
                          aux_at ? places(*aux_at, positions, count, beside) : Places{});
        },
        [&](const float* sums, int64_t pitch, const int64_t* positions, int count) {
          int64_t memory[kMostPlaces], beside[kMostPlaces];
          const Places out = places(out_at, positions, count, memory);
          const Places aux = aux_at ? places(*aux_at, positions, count, beside) : Places{};
          for (int v = 0; v < block.vectors; ++v) {
            Partial partial;
            if (reductions) partial = reductions->at(work.problem, index, block.vector + v);
            finisher(sums + v * kLanes, pitch, (block.vector + v) * kLanes, out, aux,
                     reductions ? &partial : nullptr, before);
          }
          before += count;
        });
  };

  const std::vector<Work>& works = way.work();
  const int64_t count = static_cast<int64_t>(tiles.size());
  const int64_t many = static_cast<int64_t>(works.size());
  std::vector<int64_t> tile_at(count + 1), weights_at(many + 1);
  int64_t reads = 0;
  for (int64_t i = 0; i < count; ++i) {
    tile_at[i + 1] = tile_at[i] + way.tile_size(tiles[i]);
    reads += way.reads(tiles[i]);
  }
  for (int64_t i = 0; i < many; ++i) weights_at[i + 1] = weights_at[i] + way.weights_size(works[i]);
  // Either every tile goes through all weights or all weights through every tile, whichever moves
  // less through the caches. By AMX, weights that come back from beyond the second-level cache are
  // slower than products: all of them go through x once as they are packed, where x stays in there.
  const bool heavy = count * weights_at.back() > many * reads || reads <= Way::kStays;
  if (many >= 2 * threads && (count < 2 * threads || heavy)) {
    // Few positions and many weights: every thread packs the weights that it uses.
    const Scratch inputs(tile_at.back());
    std::vector<typename Way::Ready> ready(count);
    parallel_for(threads, count,
                 [&](int64_t i) { ready[i] = way.pack(tiles[i], inputs + tile_at[i]); });
    // What adds to what another problem has stored comes after it.
    const auto waits = [&](int64_t i) {
      return works[i].problem != works[i - 1].problem && problems[works[i].problem].adds;
    };
    for (int64_t begin = 0, end; begin < many; begin = end) {
      for (end = begin + 1; end < many && !waits(end);) ++end;
      parallel_for(threads, end - begin, [&](int64_t i) {
        const Work& work = works[begin + i];
        const Scratch weights(way.weights_size(work));
        way.pack_weights(work, weights);
        for (int64_t tile = 0; tile < count; ++tile) multiply(tile, ready[tile], work, weights);
      });
    }
    return;
  }
  const Scratch weights(weights_at.back());
  parallel_for(threads, many,
               [&](int64_t i) { way.pack_weights(works[i], weights + weights_at[i]); });
  parallel_for(threads, count, [&](int64_t i) {
    const Scratch input(way.tile_size(tiles[i]));
    const auto ready = way.pack(tiles[i], input);
    for (int64_t b = 0; b < many; ++b) multiply(i, ready, works[b], weights + weights_at[b]);
  });
}

// What one group of channels takes: a convolution, or the residues of a transposed one.
class Pass {
 public:
  Pass(const Epilogue& e, Reductions* reductions, Sums sums, int threads)
      : e_(e), reductions_(reductions), sums_(sums), threads_(threads) {}

  void add(const Problem& p) {
    if (p.g.batch * p.g.t.out * p.g.h.out * p.g.w.out == 0) return;
    problems_.push_back(p);
  }

  // Whether Winograd's sums were taken.
  bool run() {
    if (problems_.empty()) return false;
    // Longer rows are read and written faster.
    if (std::all_of(problems_.begin(), problems_.end(), has_flat_frames))
      for (Problem& p : problems_) {
        p.g.w.in = p.g.w.out = p.g.h.in * p.g.w.in;
        p.g.h.in = p.g.h.out = 1;
      }
    if (in_pairs()) {
      const bool amx = by_amx(sums_);
      if (!amx && sums_ != Sums::unrounded && by_winograd<Bf16Pairs>()) return true;
      if (problems_.size() == 1) take_row_as_channels(problems_[0]);
      if (amx)
        with(Direct<DenseAmx>(problems_));
      else
        with(Direct<Dense<Bf16Pairs>>(problems_));
      return false;
    }
    if (by_winograd<Floats>()) return true;
    if (problems_[0].apart)
      with(Direct<Channelwise>(problems_));
    else
      with(Direct<Dense<Floats>>(problems_));
    return false;
  }

 private:
  template <class Way>
  void with(const Way& way) const {
    const std::vector<Tile> tiles = way.tiles();
    if (reductions_) reductions_->add(problems_, tiles);
    compute(problems_, e_, way, tiles, reductions_, threads_);
  }

  // Whether products are of pairs of bfloat16, as x and weights are.
  bool in_pairs() const {
    const Problem& p = problems_[0];
    const bool stored = p.in.a.storage == Storage::bf16 && p.weights.storage == Storage::bf16;
    return !p.apart && stored && cpu::in_pairs(sums_);
  }

  template <class Kind>
  bool by_winograd() const {
    if (by<Winograd<Kind, Stride1, Stride1>>() || by<Winograd<Kind, Stride1, Untouched>>())
      return true;
    // With pairs what it spares goes into transforms.
    if constexpr (std::is_same_v<Kind, Floats>) return by<Winograd<Kind, Stride2, Stride2>>();
    return false;
  }

  // Whether it could be done so, and the numbers are such that it is right.
  template <class Way>
  bool by() const {
    const bool one_by_one = sums_ == Sums::direct || sums_ == Sums::pairs || sums_ == Sums::amx;
    if (one_by_one || problems_[0].apart || problems_.size() > 1 || !Way::fits(problems_[0]))
      return false;
    if (chosen_freely(sums_) && !Way::pays(problems_[0])) return false;
    const Way way(problems_[0]);
    with(way);
    if (way.stayed_finite()) return true;
    if (reductions_) reductions_->drop();
    return false;
  }

  std::vector<Problem> problems_;
  const Epilogue& e_;
  Reductions* reductions_;
  Sums sums_;
  int threads_;
};

// One axis of the transposed convolution, for the input positions ≡ residue modulo the stride: a
// convolution without stride over the output gradient, its taps in reverse order.
struct Mirrored {
  Axis axis;
  int64_t last_tap, tap_step;  // of the weight: the first one that is read, and how far back next
};

Mirrored mirrored(const Conv& conv, int i, int64_t residue, int64_t in, int64_t out) {
  const int64_t stride = conv.stride[i], dilation = conv.dilation[i];
  const int64_t shift = residue + conv.padding[2 * i];
  const int64_t step = stride / std::gcd(stride, dilation);
  int64_t taps = 0, last = 0;
  for (int64_t j = 0; j < conv.kernel[i]; ++j)
    if ((shift - j * dilation) % stride == 0) last = j, ++taps;
  const int64_t before = -((shift - last * dilation) / stride);
  const int64_t count = (in - residue + stride - 1) / stride;
  return {{taps, 1, step * dilation / stride, taps ? before : 0, out, count, PadMode::zeros},
          last,
          step};
}

const std::byte* start(const View& v) { return static_cast<const std::byte*>(v.data); }

// Every stride-th position from `residue` on, along the axes of time, height and width.
Tensor residue_of(const View& v, const std::array<int64_t, 3>& residue, const Conv& conv,
                  int64_t channel) {
  Tensor t = Tensor(v).from(channel);
  t = t.shifted(t.offset(0, residue[0], residue[1], residue[2]));
  t.t *= conv.stride[0], t.h *= conv.stride[1], t.w *= conv.stride[2];
  return t;
}

// One group of a convolution; a depthwise one is one group.
Problem problem_of(const Source& source, const View& weight, const Conv& conv, const View& out,
                   const Epilogue& e, int64_t g) {
  const bool apart = is_depthwise(weight, conv);
  const int64_t groups = apart ? 1 : conv.groups;
  const int64_t in = weight.size[1], each = weight.size[0] / groups;
  Problem p{};
  p.apart = apart;
  p.g = geometry(conv, source, out);
  p.in = input_of(source, g * in, apart ? each : in);
  if (groups == 1 && source.read == Read::plain) p.in.zeros = source.a.size[1] - p.in.channels;
  p.weights = {start(weight) + g * each * weight.stride[0] * bytes_of(weight.storage),
               weight.storage,
               each,
               in,
               weight.stride[0],
               weight.stride[1],
               {weight.size[2], weight.size[3], weight.size[4]},
               {weight.stride[2], weight.stride[3], weight.stride[4]}};
  p.out = Tensor(out).from(g * each);
  if (e.aux) p.aux = Tensor(*e.aux).from(g * each);
  p.outer = e.outer;
  p.first = g * each;
  p.stored = g + 1 < groups ? each : out.size[1] - g * each;
  p.bias = from(e.bias, g * each);
  p.norm = Norm(e.coefficients).from(g * each);
  p.lines = e.large && p.out.c != 1;
  return p;
}

}  // namespace

int64_t tap_conv(const Source& source, const View& weight, const Conv& conv, const View& out,
                 const Epilogue& e, Sums sums, int threads) {
  int64_t by_winograd = 0;
  std::optional<Reductions> reductions;
  if (e.reductions.count) reductions.emplace(e.write, weight.size[0]);
  const int64_t groups = is_depthwise(weight, conv) ? 1 : conv.groups;
  for (int64_t g = 0; g < groups; ++g) {
    Pass pass(e, reductions ? &*reductions : nullptr, sums, threads);
    pass.add(problem_of(source, weight, conv, out, e, g));
    by_winograd += pass.run();
  }
  if (reductions) reductions->combine(static_cast<float*>(e.reductions.data));
  return by_winograd;
}

void branches(const Source& source, const std::array<Branch, 2>& both, const Epilogue& e, Sums sums,
              int threads) {
  Pass pass(e, nullptr, sums, threads);
  for (const Branch& b : both) {
    Epilogue own = e;
    own.bias = b.bias, own.aux = b.aux;
    Problem p = problem_of(source, b.weight, b.conv, b.out, own, 0);
    p.adds = b.aux.has_value(), p.outer = b.outer;
    pass.add(p);
  }
  pass.run();
}

int64_t input_gradient(const Source& source, const View& weight, const Conv& conv, const View& out,
                       const Epilogue& e, Sums sums, int threads) {
  if (conv.mode != PadMode::zeros || conv.frame_mode != PadMode::zeros)
    throw std::invalid_argument("fastst cpu input_gradient: requires padding with zeros");
  const bool apart = is_depthwise(weight, conv);
  const int64_t groups = apart ? 1 : conv.groups;
  const int64_t in = weight.size[0] / groups, each = apart ? in : weight.size[1];
  int64_t by_winograd = 0;
  std::optional<Reductions> reductions;
  if (e.reductions.count) reductions.emplace(e.write, each * groups);
  for (int64_t g = 0; g < groups; ++g) {
    Problem p{};
    p.apart = apart;
    p.in = input_of(source, g * in, in);
    p.first = g * each;
    p.stored = g + 1 < groups ? each : out.size[1] - g * each;
    p.bias = from(e.bias, g * each);
    p.norm = Norm(e.coefficients).from(g * each);
    p.outer = e.outer;
    Pass pass(e, reductions ? &*reductions : nullptr, in_training(sums), threads);
    std::array<int64_t, 3> r;
    for (r[0] = 0; r[0] < std::min(conv.stride[0], out.size[2]); ++r[0])
      for (r[1] = 0; r[1] < std::min(conv.stride[1], out.size[3]); ++r[1])
        for (r[2] = 0; r[2] < std::min(conv.stride[2], out.size[4]); ++r[2]) {
          Mirrored m[3];
          const int64_t bytes = bytes_of(weight.storage);
          p.weights = {start(weight) + g * in * weight.stride[0] * bytes,
                       weight.storage,
                       each,
                       apart ? 1 : in,
                       weight.stride[apart ? 0 : 1],
                       weight.stride[0],
                       {},
                       {}};
          for (int i = 0; i < 3; ++i) {
            m[i] = mirrored(conv, i, r[i], out.size[2 + i], source.a.size[2 + i]);
            p.weights.size[i] = m[i].axis.kernel;
            p.weights.stride[i] = -m[i].tap_step * weight.stride[2 + i];
            p.weights.data += m[i].last_tap * weight.stride[2 + i] * bytes;
          }
          p.g = {m[0].axis, m[1].axis, m[2].axis, out.size[0]};
          p.out = residue_of(out, r, conv, g * each);
          if (e.aux) p.aux = residue_of(*e.aux, r, conv, g * each);
          pass.add(p);
        }
    by_winograd += pass.run();
  }
  if (reductions) reductions->combine(static_cast<float*>(e.reductions.data));
  return by_winograd;
}

}  // namespace fastst::cpu
