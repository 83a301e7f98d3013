// Tap convolution: every pass of a pair, forward and input gradient.
//
// Tiles of output positions times blocks of output channels. What a tile reads is packed once with
// the source's function applied, then the microkernel sums over taps and channels.
#include <cpu.h>
#include <epilogue.h>
#include <parallel.h>
#include <tile.h>
#include <weights.h>

#include <deque>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <vector>

namespace fastst::cpu {
namespace {

// Of the second-level cache: what a tile reads, and what a block of weights holds of one chunk.
constexpr int64_t kTileFloats = 96 << 10;
constexpr int64_t kBlockFloats = 112 << 10;

// One convolution without groups.
struct Problem {
  Geometry g;
  Input in;
  Weights weights;
  Tensor out, aux;
  int64_t stored;  // channels of out
  const float* bias;
  Norm norm;
};

// Reductions of all tiles, combined in their order: the same whatever the threads are.
class Reductions {
 public:
  explicit Reductions(int64_t channels) : channels_(channels) {}

  // Memory for `tiles` more tiles: (2, channels) each.
  void add(const std::vector<Tile>& tiles, int64_t first_channel, int64_t padded) {
    parts_.push_back({std::make_unique<Scratch>(static_cast<int64_t>(tiles.size()) * 2 * padded),
                      first_channel,
                      padded,
                      {}});
    Part& p = parts_.back();
    std::fill_n(p.data->data(), tiles.size() * 2 * padded, 0.0f);
    for (const Tile& t : tiles) p.counts.push_back(t.positions());
  }
  Partial at(int64_t tile, int64_t vector) const {
    const Part& p = parts_.back();
    float* first = p.data->data() + tile * 2 * p.padded + vector * kLanes;
    return {first, first + p.padded};
  }
  void combine(Write write, int64_t computed, float* to) const {
    std::vector<double> a(channels_), b(channels_), n(channels_);
    for (const Part& p : parts_)
      for (size_t tile = 0; tile < p.counts.size(); ++tile) {
        const float* first = p.data->data() + tile * 2 * p.padded;
        const double count = static_cast<double>(p.counts[tile]);
        for (int64_t c = p.first; c < std::min(p.first + computed, channels_); ++c) {
          const double x = first[c - p.first], y = first[c - p.first + p.padded];
          if (write == Write::forward) {
            const double delta = x - a[c], share = count / (n[c] + count);
            a[c] += delta * share;
            b[c] += y + delta * delta * share * n[c];
            n[c] += count;
          } else {
            a[c] += x, b[c] += y;
          }
        }
      }
    for (int64_t c = 0; c < channels_; ++c) {
      to[c] = static_cast<float>(a[c]);
      to[channels_ + c] = static_cast<float>(write == Write::forward ? b[c] / n[c] : b[c]);
    }
  }

 private:
  struct Part {
    std::unique_ptr<Scratch> data;
    int64_t first, padded;
    std::vector<int64_t> counts;
  };
  int64_t channels_;
  std::deque<Part> parts_;
};

// ---- tiles

int64_t parts_of(int64_t size, int64_t most) { return (size + most - 1) / most; }

std::vector<Tile> cut(const Geometry& g, int64_t channels) {
  int64_t t = g.t.out, h = g.h.out, w = g.w.out;
  const auto fits = [&] { return packed_size(g, {0, 0, t, 0, h, 0, w}, channels) <= kTileFloats; };
  // Frames first where they do not overlap, then the rows, then what is left.
  int64_t* order[] = {&t, &h, &w};
  if (g.t.kernel > 1) std::swap(order[0], order[1]), std::swap(order[1], order[2]);
  for (int64_t* size : order)
    while (!fits() && *size > 1) {
      const int64_t least = size == &w ? std::min<int64_t>(*size, 14) : 1;
      if (*size == least) break;
      *size = std::max(least, (*size + 1) / 2);
    }
  const int64_t nt = parts_of(g.t.out, t), nh = parts_of(g.h.out, h), nw = parts_of(g.w.out, w);
  std::vector<Tile> tiles;
  tiles.reserve(g.batch * nt * nh * nw);
  for (int64_t n = 0; n < g.batch; ++n)
    for (int64_t i = 0; i < nt; ++i)
      for (int64_t j = 0; j < nh; ++j)
        for (int64_t k = 0; k < nw; ++k)
          tiles.push_back({n, g.t.out * i / nt, g.t.out * (i + 1) / nt, g.h.out * j / nh,
                           g.h.out * (j + 1) / nh, g.w.out * k / nw, g.w.out * (k + 1) / nw});
  return tiles;
}

// ---- one tile times one block

class Runner {
 public:
  Runner(const Problem& p, const WeightPacker& weights, const Finisher& finish,
         const std::vector<Tile>& tiles, Reductions* reductions)
      : p_(p), weights_(weights), finish_(finish), tiles_(tiles), reductions_(reductions) {}

  void operator()(int64_t index, const Packed& packed, const Block& block,
                  const float* weights) const {
    const Tile& tile = tiles_[index];
    const int64_t pitch = block.vectors * kLanes,
                  chunks = parts_of(p_.weights.in, weights_.chunk());
    // A group of rows shares its taps: those of one frame if taps may lie outside.
    const int64_t frames = p_.g.t.inside() ? 1 : tile.t1 - tile.t0;
    const int64_t each = tile.positions() / frames;
    const Groups groups(each, most_rows(block.vectors));
    const Scratch sums((chunks > 1 ? tile.positions() : kMostRows) * pitch);
    int64_t before = 0;
    std::vector<Segment> segments;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t frame = 0; frame < frames; ++frame) {
        list_segments(tile, packed, frame, chunk, pitch, segments);
        for (int64_t i = 0; i < groups.count; ++i) {
          const int64_t start = frame * each + groups.start(i);
          const int count = static_cast<int>(groups.start(i + 1) - groups.start(i));
          int64_t rows[kMostRows];
          for (int r = 0; r < count; ++r) rows[r] = place(tile, start + r, packed);
          float* to = sums + (chunks > 1 ? start * pitch : 0);
          multiply_for(count, block.vectors, true)(packed.data, rows, 1, weights, pitch,
                                                   segments.data(), segments.size(), to, pitch,
                                                   chunk > 0);
          if (chunk + 1 < chunks) continue;
          Places out, aux;
          list_places(tile, start, count, p_.out, out);
          if (p_.aux.data) list_places(tile, start, count, p_.aux, aux);
          for (int v = 0; v < block.vectors; ++v) {
            Partial partial;
            if (reductions_) partial = reductions_->at(index, block.vector + v);
            finish_(to + v * kLanes, pitch, (block.vector + v) * kLanes, out, aux,
                    reductions_ ? &partial : nullptr, before);
          }
          before += count;
        }
      }
  }

 private:
  static int64_t place(const Tile& tile, int64_t i, const Geometry& g, int64_t t, int64_t h,
                       int64_t w) {
    const int64_t width = tile.w1 - tile.w0, height = tile.h1 - tile.h0;
    return i / (width * height) * g.t.stride * t + i / width % height * g.h.stride * h +
           i % width * g.w.stride * w;
  }
  int64_t place(const Tile& tile, int64_t i, const Packed& packed) const {
    return place(tile, i, p_.g, packed.t, packed.h, packed.w);
  }

  static void list_places(const Tile& tile, int64_t start, int count, const Tensor& t,
                          Places& places) {
    const int64_t width = tile.w1 - tile.w0, height = tile.h1 - tile.h0;
    places.count = count, places.run = true;
    for (int r = 0; r < count; ++r) {
      const int64_t i = start + r;
      places.offset[r] = t.offset(tile.n, tile.t0 + i / (width * height),
                                  tile.h0 + i / width % height, tile.w0 + i % width);
      if (r && places.offset[r] != places.offset[r - 1] + 1) places.run = false;
    }
  }

  // The stretches of k for a frame of the tile: one for each tap, or for each row of taps where
  // their channels follow each other.
  void list_segments(const Tile& tile, const Packed& packed, int64_t frame, int64_t chunk,
                     int64_t pitch, std::vector<Segment>& list) const {
    const Geometry& g = p_.g;
    const int64_t first = chunk * weights_.chunk();
    const int64_t channels = std::min(weights_.chunk(), p_.weights.in - first);
    const bool together = g.w.dilation == 1 && packed.w == channels;
    list.clear();
    for (int64_t kt = 0; kt < g.t.kernel; ++kt) {
      if (g.t.source(g.t.first(tile.t0 + frame) + kt * g.t.dilation) < 0) continue;
      for (int64_t kh = 0; kh < g.h.kernel; ++kh)
        for (int64_t kw = 0; kw < g.w.kernel; kw += together ? g.w.kernel : 1) {
          const int64_t tap = (kt * g.h.kernel + kh) * g.w.kernel + kw;
          list.push_back({kt * g.t.dilation * packed.t + kh * g.h.dilation * packed.h +
                              kw * g.w.dilation * packed.w + first,
                          weights_.row(tap, first) * pitch,
                          together ? g.w.kernel * channels : channels});
        }
    }
  }

  const Problem& p_;
  const WeightPacker& weights_;
  const Finisher& finish_;
  const std::vector<Tile>& tiles_;
  const Reductions* reductions_;
};

// ---- schedules

// Input channels whose weights a block keeps in the cache.
int64_t chunk_of(const Weights& w) {
  const int64_t taps = std::max<int64_t>(1, w.size[0] * w.size[1] * w.size[2]);
  const int64_t most = std::max<int64_t>(1, kBlockFloats / (taps * kMostVectors * kLanes));
  return parts_of(w.in, parts_of(w.in, most));
}

// Pixels in a row where no tap lies across: longer rows are read and written faster.
void flatten_frames(Problem& p) {
  Axis &h = p.g.h, &w = p.g.w;
  if (!h.idle() || !w.idle()) return;
  const bool second = p.in.b.data != nullptr;
  if (p.in.a.h != w.in * p.in.a.w || (second && p.in.b.h != w.in * p.in.b.w) ||
      p.out.h != w.out * p.out.w || (p.aux.data && p.aux.h != w.out * p.aux.w))
    return;
  w.in = w.out = h.in * w.in, h.in = h.out = 1;
}

void run(Problem p, const Epilogue& e, Reductions* reductions, int64_t first_channel, int threads) {
  if (p.g.batch * p.g.t.out * p.g.h.out * p.g.w.out == 0) return;
  flatten_frames(p);
  const WeightPacker weights(p.weights, chunk_of(p.weights));
  const std::vector<Tile> tiles = cut(p.g, p.in.channels);
  const auto& blocks = weights.blocks();
  if (reductions) reductions->add(tiles, first_channel, weights.vectors() * kLanes);
  const Finisher finish(e, p.out, p.aux, p.weights.out, p.stored, p.bias, p.norm);
  const Runner multiply(p, weights, finish, tiles, reductions);

  const bool direct = readable_in_place(p.g, p.in);
  std::vector<int64_t> starts(tiles.size() + 1);
  for (size_t i = 0; i < tiles.size(); ++i)
    starts[i + 1] = starts[i] + (direct ? 0 : packed_size(p.g, tiles[i], p.in.channels));
  const auto pack = [&](int64_t i, float* to) {
    if (direct) return in_place(p.g, tiles[i], p.in);
    pack_tile(p.g, tiles[i], p.in, to);
    return packed_strides(p.g, tiles[i], p.in.channels, to);
  };

  const int64_t count = static_cast<int64_t>(tiles.size());
  const int64_t many = static_cast<int64_t>(blocks.size());
  const bool heavy = weights.rows() * weights.vectors() * kLanes > 2 * starts.back();
  if (many >= 2 * threads && (count < 2 * threads || (heavy && !direct))) {
    // Few positions and many weights: every thread packs the weights that it uses.
    const Scratch inputs(starts.back());
    std::vector<Packed> packed(count);
    parallel_for(threads, count, [&](int64_t i) { packed[i] = pack(i, inputs + starts[i]); });
    parallel_for(threads, many, [&](int64_t i) {
      const Scratch block(weights.size(blocks[i]));
      weights.pack(blocks[i], block);
      for (int64_t tile = 0; tile < count; ++tile) multiply(tile, packed[tile], blocks[i], block);
    });
    return;
  }
  const Scratch all(weights.rows() * weights.vectors() * kLanes);
  parallel_for(threads, many,
               [&](int64_t i) { weights.pack(blocks[i], all + weights.offset(blocks[i])); });
  parallel_for(threads, count, [&](int64_t i) {
    const Scratch tile(starts[i + 1] - starts[i]);
    const Packed packed = pack(i, tile);
    for (const Block& block : blocks) multiply(i, packed, block, all + weights.offset(block));
  });
}

const float* from(const Array& a, int64_t channel) {
  return a.count ? static_cast<const float*>(a.data) + channel : nullptr;
}

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

// Every stride-th position from `residue` on, along the axes of time, height and width.
Tensor residue_of(const View& v, const std::array<int64_t, 3>& residue, const Conv& conv,
                  int64_t channel) {
  Tensor t = Tensor(v).from(channel);
  t.data += t.offset(0, residue[0], residue[1], residue[2]);
  t.t *= conv.stride[0], t.h *= conv.stride[1], t.w *= conv.stride[2];
  return t;
}

}  // namespace

void tap_conv(const Source& source, const View& weight, const Conv& conv, const View& out,
              const Epilogue& e, int threads) {
  const int64_t in = weight.size[1], each = weight.size[0] / conv.groups;
  std::optional<Reductions> reductions;
  if (e.reductions.count) reductions.emplace(weight.size[0]);
  for (int64_t g = 0; g < conv.groups; ++g) {
    Problem p;
    p.g = geometry(conv, source.a, out);
    p.in = input_of(source, g * in, in);
    p.weights = {static_cast<const float*>(weight.data) + g * each * weight.stride[0],
                 each,
                 in,
                 weight.stride[0],
                 weight.stride[1],
                 {weight.size[2], weight.size[3], weight.size[4]},
                 {weight.stride[2], weight.stride[3], weight.stride[4]}};
    p.out = Tensor(out).from(g * each);
    if (e.aux) p.aux = Tensor(*e.aux).from(g * each);
    p.stored = g + 1 < conv.groups ? each : out.size[1] - g * each;
    p.bias = from(e.bias, g * each);
    p.norm = Norm(e.coefficients).from(g * each);
    run(p, e, reductions ? &*reductions : nullptr, g * each, threads);
  }
  if (reductions) reductions->combine(e.write, each, static_cast<float*>(e.reductions.data));
}

void input_gradient(const Source& source, const View& weight, const Conv& conv, const View& out,
                    const Epilogue& e, int threads) {
  if (conv.mode != PadMode::zeros)
    throw std::invalid_argument("fastst cpu input_gradient: requires padding with zeros");
  const int64_t in = weight.size[0] / conv.groups, each = weight.size[1];
  std::optional<Reductions> reductions;
  if (e.reductions.count) reductions.emplace(each * conv.groups);
  for (int64_t g = 0; g < conv.groups; ++g) {
    Problem p;
    p.in = input_of(source, g * in, in);
    p.stored = g + 1 < conv.groups ? each : out.size[1] - g * each;
    p.bias = from(e.bias, g * each);
    p.norm = Norm(e.coefficients).from(g * each);
    std::array<int64_t, 3> r;
    for (r[0] = 0; r[0] < std::min(conv.stride[0], out.size[2]); ++r[0])
      for (r[1] = 0; r[1] < std::min(conv.stride[1], out.size[3]); ++r[1])
        for (r[2] = 0; r[2] < std::min(conv.stride[2], out.size[4]); ++r[2]) {
          Mirrored m[3];
          p.weights = {static_cast<const float*>(weight.data) + g * in * weight.stride[0],
                       each,
                       in,
                       weight.stride[1],
                       weight.stride[0],
                       {},
                       {}};
          for (int i = 0; i < 3; ++i) {
            m[i] = mirrored(conv, i, r[i], out.size[2 + i], source.a.size[2 + i]);
            p.weights.size[i] = m[i].axis.kernel;
            p.weights.stride[i] = -m[i].tap_step * weight.stride[2 + i];
            p.weights.data += m[i].last_tap * weight.stride[2 + i];
          }
          p.g = {m[0].axis, m[1].axis, m[2].axis, out.size[0]};
          p.out = residue_of(out, r, conv, g * each);
          if (e.aux) p.aux = residue_of(*e.aux, r, conv, g * each);
          run(p, e, reductions ? &*reductions : nullptr, g * each, threads);
        }
  }
  if (reductions) reductions->combine(e.write, each, static_cast<float*>(e.reductions.data));
}

}  // namespace fastst::cpu
