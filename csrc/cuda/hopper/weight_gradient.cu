// Weight gradients on Hopper: dW[tap, c, m] = Σ_p other[p through tap, c] · mid[p, m].
//
// Positions p are those of the mid tensor, for both passes: other is x (spatial) or dy (temporal).
// A tile of positions comes to shared memory once. What multiplies it is made of the mid tensor in
// place, by warps that do nothing else, and is B; A goes through registers, so that every tap is an
// offset into one box of other, halo included. Each block has some columns, rows and taps of dW and
// a part of the positions; sum_rows adds the parts.
#include <device/launch.cuh>
#include <device/wgmma.cuh>
#include <hopper/accumulators.cuh>
#include <hopper/instances.cuh>
#include <hopper/pipeline.cuh>

namespace fastst {
namespace {

constexpr int kGroups = 3;   // warpgroups that multiply
constexpr int kFormers = 3;  // warps that make B
constexpr int kThreads = kWarpGroup * (kGroups + 1);
constexpr int kMaxTaps = 49, kMaxStride = 2;  // of a kernel; of time
constexpr int kSpan = 32;                     // columns of B in one 64-byte row of the swizzle
constexpr int kPiece = 8;                     // elements of 16 bytes
constexpr int kMostPositions = 256;           // of a tile
constexpr int kOffsets = 2 * kRingBytes;      // rows of the box of other, by position
constexpr int kPlaces = kOffsets + 4 * kMostPositions;  // coordinates in the tile, 8 bits each
constexpr int kSums = kPlaces + 4 * kMostPositions;     // of other, by channel
constexpr int kMostBlocks = 9;                          // of 64 rows
constexpr int kFirst = 5 * kTileAlign;                  // stages
static_assert(kSums + 4 * 64 * kMostBlocks <= kFirst);

// Axes are (w, h, frames of all clips) of the spatial pass, (pixels, frames, clips) of the
// temporal.
template <class T>
struct Parameters {
  TensorMap mid, u, other;
  int size[3], box[3], tiles[3];  // of mid, without the residues
  int residues;                   // temporal stride: each tile has frames of one residue
  // The box of other: where it begins, per residue, and how it moves with that of mid.
  int start[kMaxStride][3], scale[3], halo[3];
  int offset[kMaxStride][kMaxTaps];  // of a tap, in rows of that box; -1: it leads nowhere
  int taps, rows, columns;           // of dW, columns as they are stored
  int narrow;                        // rows are 8 channels of 8 taps, which are so far apart; or 0
  int blocks;                        // of 64 rows that a block has
  int row_tiles, column_tiles, tap_tiles, splits, stages;
  bool two, forms;                              // B is made of mid and u; of mid at all, or is mid
  Global<const float> scales, seconds, shifts;  // b = act(scale·mid + second·u + shift)
  Activation act;
  float slope;
  Global<float> partials;  // (splits, taps, rows, columns)
  Global<float> sums;      // (splits, rows), or none
  int tap;                 // through which each position of other is met once

  __host__ __device__ int positions() const { return box[0] * box[1] * box[2]; }
  __host__ __device__ int other_rows() const { return halo[0] * halo[1] * halo[2]; }
  __host__ __device__ int row_elements() const { return narrow ? kPiece : kSwizzleRow; }
  __host__ __device__ int block_bytes() const {  // of 64 rows of A
    return (other_rows() * row_elements() * 2 + kTileAlign - 1) / kTileAlign * kTileAlign;
  }
  __host__ __device__ int block_rows() const { return block_bytes() / 2 / row_elements(); }
  __host__ __device__ int64_t position_tiles() const {
    return int64_t(residues) * tiles[0] * tiles[1] * tiles[2];
  }
};

template <int N, int Units>
struct Layout {
  static constexpr int kSpans = (N + kSpan - 1) / kSpan;
  static constexpr int kSteps = Units == 1 ? 2 : 1;  // of 16 positions, in a group of products
  // Of a thread that multiplies; the others have what is left of 512.
  static constexpr int kRegisters = N * Units > 192 ? 152 : 144;

  template <class T>
  static __host__ __device__ int padded(const Parameters<T>& p) {  // positions
    return (p.positions() + 16 * kSteps - 1) / (16 * kSteps) * (16 * kSteps);
  }
  template <class T>
  static __host__ __device__ int span_bytes(const Parameters<T>& p) {
    return padded(p) * 2 * kSpan;
  }
  template <class T>
  static __host__ __device__ int stage_bytes(const Parameters<T>& p) {
    const int bytes = p.blocks * p.block_bytes() + (1 + p.two) * kSpans * span_bytes(p);
    return (bytes + kTileAlign - 1) / kTileAlign * kTileAlign;
  }
};

// What of dW a block has.
struct Output {
  int column, row, tap, split;  // tiles

  template <class T>
  __device__ explicit Output(const Parameters<T>& p) {
    int index = static_cast<int>(blockIdx.x);
    column = index % p.column_tiles, index /= p.column_tiles;
    row = index % p.row_tiles, index /= p.row_tiles;
    tap = index % p.tap_tiles, split = index / p.tap_tiles;
  }
};

struct Tile {
  int residue, from[3];  // of mid, before strides

  template <class T>
  __device__ Tile(const Parameters<T>& p, int index) {
    residue = index % p.residues, index /= p.residues;
    // Neighbours along the axis with the halo come after one another.
    from[1] = index % p.tiles[1] * p.box[1], index /= p.tiles[1];
    from[0] = index % p.tiles[0] * p.box[0];
    from[2] = index / p.tiles[0] * p.box[2];
  }
  template <class T>
  __device__ int mid(const Parameters<T>& p, int axis) const {
    return axis == 1 ? from[1] * p.residues + residue : from[axis];
  }
  template <class T>
  __device__ int other(const Parameters<T>& p, int axis) const {
    return from[axis] * p.scale[axis] + p.start[residue][axis];
  }
};

// f(tile) for each of a split's tiles.
template <class T, class F>
__device__ void for_each_tile(const Parameters<T>& p, int split, F f) {
  const int64_t all = p.position_tiles();  // fits 32 bits
  const int end = static_cast<int>(all * (split + 1) / p.splits);
  for (int i = static_cast<int>(all * split / p.splits); i < end; ++i) f(Tile(p, i));
}

// B in place of mid, zeros outside of the tensor; by the warp `former`.
template <class T, int N>
__device__ void form(const Parameters<T>& p, Shared<T> mid, Shared<T> u, int span_elements,
                     int first_column, const Tile& tile, int former) {
  const Shared<int> places = shared<int>(kPlaces);
  int left[3];  // of each axis
  left[0] = p.size[0] - tile.from[0], left[2] = p.size[2] - tile.from[2];
  left[1] = (p.size[1] - tile.mid(p, 1) + p.residues - 1) / p.residues;
  const int positions = p.positions();
  for (int piece = former; piece < N / kPiece; piece += kFormers) {
    const int c = first_column + piece * kPiece;
    if (c >= p.columns) break;  // zeros, as TMA left them
    for (int i = static_cast<int>(threadIdx.x) % 32; i < positions; i += 32) {
      const int place = places[i];
      const bool there =
          (place & 255) < left[0] && (place >> 8 & 255) < left[1] && place >> 16 < left[2];
      const int at = piece / 4 * span_elements + i * kSpan + (piece % 4 ^ i / 2 % 4) * kPiece;
      const auto a = load<kPiece>(mid + at);
      Pack<T, kPiece> b{}, made;
      if (p.two) b = load<kPiece>(u + at);
#pragma unroll
      for (int half = 0; half < kPiece; half += 4) {  // by halves, which spares registers
        const auto scale = load<4>(p.scales + c + half), shift = load<4>(p.shifts + c + half);
        float values[4];
#pragma unroll
        for (int k = 0; k < 4; ++k)
          values[k] = widen(a.lane[half + k]) * scale.lane[k] + shift.lane[k];
        if (p.two) {
          const auto second = load<4>(p.seconds + c + half);
#pragma unroll
          for (int k = 0; k < 4; ++k) values[k] += widen(b.lane[half + k]) * second.lane[k];
        }
        activate_in_place(p.act, p.slope, values);
#pragma unroll
        for (int k = 0; k < 4; ++k) made.lane[half + k] = narrow<T>(there ? values[k] : 0.0f);
      }
      store(mid + at, made);
    }
  }
}

// Adds the sums of other over a tile to those in shared memory; by the warp `former`.
template <class T>
__device__ void add_sums(const Parameters<T>& p, Shared<T> other, int offset, int former) {
  const Shared<int> offsets = shared<int>(kOffsets);
  const Shared<float> sums = shared<float>(kSums);
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1  // registers
  for (int piece = former; piece < p.blocks * 8; piece += kFormers) {
    float values[kPiece] = {};
#pragma unroll 1
    for (int i = lane; i < p.positions(); i += 32) {
      const int row = offsets[i] + offset + piece / 8 * p.block_rows();
      const auto a = load<kPiece>(other + row * kSwizzleRow + (piece % 8 ^ row % 8) * kPiece);
#pragma unroll
      for (int e = 0; e < kPiece; ++e) values[e] += widen(a.lane[e]);
    }
#pragma unroll
    for (int e = 0; e < kPiece; ++e) {
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) values[e] += shuffle_xor(values[e], lanes);
      const Shared<float> sum = sums + piece * kPiece + e;
      if (lane == 0) sum[0] = sum[0] + values[e];
    }
  }
}

template <class T, int N, int Units>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_weight_gradient_kernel(const __grid_constant__ Parameters<T> p) {
  using L = Layout<N, Units>;
  Ring ring(0, p.stages), formed(kRingBytes, p.stages);
  const Shared<int> offsets = shared<int>(kOffsets), places = shared<int>(kPlaces);
  const int positions = p.positions(), padded = L::padded(p);
  const int span_bytes = L::span_bytes(p), stage_bytes = L::stage_bytes(p);
  const int b_at = kFirst + p.blocks * p.block_bytes();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    ring.init(4 * kGroups);
    formed.init(1, kFormers);
    mbarrier_fence_init();
  }
  for (int i = thread; i < padded; i += kThreads) {
    // Positions that do not exist are zeros of B: any row of A will do.
    const int e = i < positions ? i : 0;
    const int e0 = e % p.box[0], e1 = e / p.box[0] % p.box[1], e2 = e / p.box[0] / p.box[1];
    offsets[i] = (e2 * p.halo[1] + e1 * p.scale[1]) * p.halo[0] + e0 * p.scale[0];
    places[i] = e0 | e1 << 8 | e2 << 16;
  }
  for (int i = thread; i < 64 * p.blocks; i += kThreads) shared<float>(kSums)[i] = 0.0f;
  for (int stage = 0; stage < p.stages; ++stage)
    for (int span = 0; span < L::kSpans; ++span) {
      const Shared<uint32_t> b = shared<uint32_t>(b_at + stage * stage_bytes + span * span_bytes);
      for (int i = positions * 16 + thread; i < padded * 16; i += kThreads) b[i] = 0u;
    }
  fence_proxy_async();
  sync_block();

  const Output output(p);
  const int first_column = output.column * N;
  const bool counts = p.sums && output.column == 0 && output.tap == 0;
  const bool helped = p.forms || counts;
  const int group = thread / kWarpGroup, warp = thread / 32 % 4, lane = thread % 32;
  if (group == 0) {
    registers_decrease<512 - kGroups * L::kRegisters>();
    if (thread == 0)
      for_each_tile(p, output.split, [&](const Tile& tile) {
        ring.acquire(p.blocks * p.other_rows() * p.row_elements() * 2 +
                     (1 + p.two) * L::kSpans * positions * 2 * kSpan);
        const int at = ring.stage() * stage_bytes;
        for (int b = 0; b < p.blocks; ++b)
          tma_load(shared<T>(kFirst + at + b * p.block_bytes()), p.other, ring.full(),
                   (output.row * p.blocks + b) * kSwizzleRow, tile.other(p, 0), tile.other(p, 1),
                   tile.other(p, 2));
        for (int s = 0; s < (1 + p.two) * L::kSpans; ++s)
          tma_load(shared<T>(b_at + at + s * span_bytes), s < L::kSpans ? p.mid : p.u, ring.full(),
                   first_column + s % L::kSpans * kSpan, tile.mid(p, 0), tile.mid(p, 1),
                   tile.mid(p, 2));
        ring.advance();
      });
    if (warp > 0 && helped)
      for_each_tile(p, output.split, [&](const Tile& tile) {
        ring.wait();
        const Shared<T> mid = shared<T>(b_at + ring.stage() * stage_bytes);
        const int span_elements = span_bytes / 2, offset = p.offset[tile.residue][p.tap];
        if (counts && offset >= 0)
          add_sums(p, shared<T>(kFirst + ring.stage() * stage_bytes), offset, warp - 1);
        if (p.forms)
          form<T, N>(p, mid, mid + L::kSpans * span_elements, span_elements, first_column, tile,
                     warp - 1);
        fence_proxy_async();
        formed.publish();
        ring.advance(), formed.advance();
      });
    if (warp > 0 && counts) {
      sync_warp();
      for (int i = (warp - 1) * kPiece; i < 64 * p.blocks; i += kFormers * kPiece) {
        const int row = output.row * p.blocks * 64 + i + lane;
        if (lane < kPiece && row < p.rows)
          p.sums[int64_t(output.split) * p.rows + row] = shared<float>(kSums)[i + lane];
      }
    }
    return;
  }

  registers_increase<L::kRegisters>();
  // Rows of A are 16 of each warp, in two pieces; lanes name the rows of four 8 × 8 matrices.
  const int piece = 2 * warp + lane / 8 % 2, position = lane / 16 * 8 + lane % 8;
  const int pieces = p.narrow ? 0 : 7;  // mask: a narrow row has one
  const int tap_block = kGroups * Units / p.blocks;
  const auto tap = [&](int i) {  // of a unit; -1: it has none
    const int t = ((group - 1) * Units + i) / p.blocks, tap = output.tap * tap_block + t;
    return t < tap_block && tap < p.taps ? tap : -1;
  };
  const auto block = [&](int i) { return ((group - 1) * Units + i) % p.blocks; };
  float sums[Units][N / 2];
#pragma unroll
  for (int i = 0; i < Units; ++i)
#pragma unroll
    for (int j = 0; j < N / 2; ++j) sums[i][j] = 0;
  keep(sums);

  for_each_tile(p, output.split, [&](const Tile& tile) {
    ring.wait();
    if (helped) formed.wait();
    // All taps of a warpgroup lead somewhere, or none; those that are no taps, anywhere.
    if (tap(0) >= 0 && p.offset[tile.residue][tap(0)] >= 0) {
      const int at = ring.stage() * stage_bytes;
      const Shared<T> other = shared<T>(kFirst + at);
      const Descriptor b =
          descriptor(shared<T>(b_at + at), Swizzle::b64, 8 * 2 * kSpan, span_bytes);
      int offset[Units];
#pragma unroll
      for (int i = 0; i < Units; ++i)
        offset[i] = (tap(i) < 0 ? 0 : p.offset[tile.residue][tap(i)]) + piece * p.narrow +
                    block(i) * p.block_rows();
      for (int step = 0; step < padded; step += 16 * L::kSteps) {
        uint32_t a[L::kSteps][Units][4];
#pragma unroll
        for (int s = 0; s < L::kSteps; ++s) {
          const int row = offsets[step + 16 * s + position];
#pragma unroll
          for (int i = 0; i < Units; ++i) {
            const int r = row + offset[i], swizzled = (piece ^ r % 8) & pieces;
            ldmatrix_x4_transposed(a[s][i], other + r * p.row_elements() + swizzled * kPiece);
          }
        }
        wgmma_fence(a);
#pragma unroll
        for (int s = 0; s < L::kSteps; ++s)
#pragma unroll
          for (int i = 0; i < Units; ++i)
            wgmma<T, N, Major::mn>(sums[i], a[s][i], b + (step + 16 * s) * 2 * kSpan, true);
        wgmma_commit();
        wgmma_wait<0>();
      }
    }
    ring.release(ring.stage());
    ring.advance(), formed.advance();
  });

  keep(sums);
#pragma unroll
  for (int i = 0; i < Units; ++i) {
    if (tap(i) < 0) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int in_tile = accumulator(thread % kWarpGroup, 2 * half).row;
      const int row = (output.row * p.blocks + block(i)) * 64 + in_tile;
      if (row >= p.rows) continue;
      const int64_t to = ((int64_t(output.split) * p.taps + tap(i)) * p.rows + row) * p.columns;
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const int c = first_column + 8 * j + lane % 4 * 2;
        if (c < p.columns)
          store(p.partials + to + c,
                Pack<float, 2>{{sums[i][4 * j + 2 * half], sums[i][4 * j + 2 * half + 1]}});
      }
    }
  }
}

// Sizes and strides of a tensor along the axes of a pass, as tensor maps want them.
struct Axes {
  std::array<int64_t, 3> size, stride;

  Axes(const View& v, bool temporal) {
    if (temporal)
      size = {v.size[3] * v.size[4], v.size[2], v.size[0]},
      stride = {v.stride[4], v.stride[2], v.stride[0]};
    else
      size = {v.size[4], v.size[3], v.size[0] * v.size[2]},
      stride = {v.stride[4], v.stride[3], v.stride[v.size[2] > 1 ? 2 : 0]};
  }
};

TensorMap boxes(Dtype dtype, const View& v, bool temporal, int channels, const int (&box)[3],
                int step, Swizzle swizzle) {
  const Axes axes(v, temporal);
  return tensor_map({.dtype = dtype,
                     .data = v.data,
                     .span = v.span(),
                     .rank = 4,
                     .size = {v.size[1], axes.size[0], axes.size[1], axes.size[2]},
                     .stride = {1, axes.stride[0], axes.stride[1], axes.stride[2]},
                     .box = {channels, box[0], box[1], box[2]},
                     .step = {1, 1, step, 1},
                     .swizzle = swizzle});
}

// Where the taps lie in the box of other. A spatial tap k reads x at p·stride + k·dilation −
// before; through a temporal one p is read by dy at (p + before − k) / stride, where that is whole.
template <class T>
void place_taps(Parameters<T>& p, const HopperWeightGradient& g) {
  const Conv& conv = g.conv;
  const auto at = [](const auto& array, int i) { return narrow_size(array[i]); };
  if (!g.temporal) {
    const int width = p.narrow ? 1 : at(conv.kernel, 2), columns = at(conv.kernel, 2);
    p.residues = 1, p.taps = at(conv.kernel, 1) * width;
    for (int i = 0; i < 2; ++i) {
      const int kernel = i == 0 && p.narrow ? kPiece : i == 0 ? columns : at(conv.kernel, 1);
      p.scale[i] = at(conv.stride, 2 - i), p.start[0][i] = -at(conv.padding, 2 * (2 - i));
      p.halo[i] = (p.box[i] - 1) * p.scale[i] + (kernel - 1) * at(conv.dilation, 2 - i) + 1;
    }
    p.scale[2] = 1, p.halo[2] = p.box[2];
    if (p.taps > kMaxTaps)
      throw std::invalid_argument("hopper_weight_gradient has at most " + std::to_string(kMaxTaps) +
                                  " taps, not " + std::to_string(p.taps));
    for (int t = 0; t < p.taps; ++t)
      p.offset[0][t] =
          t / width * at(conv.dilation, 1) * p.halo[0] + t % width * at(conv.dilation, 2);
    return;
  }
  p.residues = at(conv.stride, 0), p.taps = at(conv.kernel, 0);
  if (p.residues > kMaxStride || p.taps > kMaxTaps)
    throw std::invalid_argument("hopper_weight_gradient has temporal strides up to 2");
  int reach = 0;
  for (int i = 0; i < 3; ++i) p.scale[i] = 1, p.halo[i] = p.box[i];
  for (int r = 0; r < p.residues; ++r) {
    const auto read = [&](int t) { return r + at(conv.padding, 0) - t * at(conv.dilation, 0); };
    int least = INT32_MAX, most = INT32_MIN;
    for (int t = 0; t < p.taps; ++t)
      if (read(t) % p.residues == 0)
        least = std::min(least, read(t) / p.residues), most = std::max(most, read(t) / p.residues);
    if (least > most) least = most = 0;
    p.start[r][1] = least, reach = std::max(reach, most - least);
    for (int t = 0; t < p.taps; ++t)
      p.offset[r][t] = read(t) % p.residues ? -1 : (read(t) / p.residues - least) * p.box[0];
  }
  p.halo[1] += reach;
}

template <class T, int N, int Units>
void run(Dtype dtype, const HopperWeightGradient& g, Stream stream) {
  using L = Layout<N, Units>;
  const HopperWeightTile& tile = g.tile;
  Parameters<T> p{};
  p.narrow = g.narrow ? narrow_size(g.conv.dilation[2]) : 0;
  for (int i = 0; i < 3; ++i) p.box[i] = narrow_size(tile.box[i]);
  place_taps(p, g);
  const Axes axes(g.mid, g.temporal);
  for (int i = 0; i < 3; ++i) {
    p.size[i] = narrow_size(axes.size[i]);
    p.tiles[i] = tiles_of(i == 1 ? tiles_of(p.size[1], p.residues) : p.size[i], p.box[i]);
  }
  narrow_size(p.position_tiles());  // or an exception
  p.rows = narrow_size(p.narrow ? 64 : g.other.size[1]), p.columns = narrow_size(g.mid.size[1]);
  p.blocks = narrow_size(tile.blocks), p.stages = narrow_size(tile.stages);
  p.splits = narrow_size(tile.splits);
  p.sums = global<float>(g.sums.data, g.sums.count), p.tap = narrow_size(g.tap);
  if (p.positions() > kMostPositions || p.columns % kPiece || kGroups * Units < p.blocks ||
      p.blocks > kMostBlocks || p.tap >= p.taps || (p.sums && !g.temporal) ||
      (p.residues > 1 && p.blocks % Units))
    throw std::invalid_argument(
        "hopper_weight_gradient cannot have tiles of " + std::to_string(p.positions()) +
        " positions and " + std::to_string(p.blocks) + " × 64 rows, or " +
        std::to_string(p.columns) + " columns, or sums through tap " + std::to_string(p.tap));
  p.row_tiles = tiles_of(p.rows, 64 * p.blocks), p.column_tiles = tiles_of(p.columns, N);
  p.tap_tiles = tiles_of(p.taps, kGroups * Units / p.blocks);
  p.two = g.u.has_value(), p.forms = g.coefficients.data != nullptr;
  p.scales = global<const float>(g.coefficients.data, g.coefficients.count);
  p.shifts = p.scales + g.coefficients.count / 3;
  p.seconds = p.shifts + g.coefficients.count / 3;
  p.act = g.act, p.slope = static_cast<float>(g.slope);
  p.partials = global<float>(g.partials.data, g.partials.count);
  p.mid = boxes(dtype, g.mid, g.temporal, kSpan, p.box, p.residues, Swizzle::b64);
  p.u = p.two ? boxes(dtype, *g.u, g.temporal, kSpan, p.box, p.residues, Swizzle::b64) : p.mid;
  p.other = boxes(dtype, g.other, g.temporal, p.row_elements(), p.halo, 1,
                  p.narrow ? Swizzle::none : Swizzle::b128);
  const int grid = p.column_tiles * p.row_tiles * p.tap_tiles * p.splits;
  launch("hopper_weight_gradient", hopper_weight_gradient_kernel<T, N, Units>, dim3(grid),
         dim3(kThreads), kFirst + p.stages * L::stage_bytes(p), stream, "mid " + shape(g.mid), p);
}

}  // namespace

void hopper_weight_gradient(Dtype dtype, const HopperWeightGradient& g, Stream stream) {
  with_instance<instances::weight_gradient>(
      "hopper_weight_gradient", dtype, {g.tile.columns, g.tile.units},
      [&]<class T, int N, int Units>() { run<T, N, Units>(dtype, g, stream); });
}

}  // namespace fastst
