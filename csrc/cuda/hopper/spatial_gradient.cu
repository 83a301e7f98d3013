// Input gradient of a spatial pass on Hopper: dx from du = g + p·u + r, or from a du as it lies.
//
//   dx[o] = Σ_k W[k] · du[(o + k·dilation − before) / up],  through taps k for which that is whole
//
// A tile is a box of cells: up × up outputs, or some rows of them, that share what they read. One
// box of g and of u, halo included, comes for all taps and all outputs; du takes the place of g. A
// warpgroup has 64 cells, and of each of their outputs a block of 64 × N sums. A of the products
// goes through registers, so that it may start at any row of the box: each fragment is loaded once
// for a column of the kernel, while the one before is multiplied, and multiplies every tap by which
// a block reads it. The blocks of a
// cluster have neighbouring frames, and copy the weights to each other.
#include <algorithm>
#include <device/launch.cuh>
#include <device/wgmma.cuh>
#include <hopper/accumulators.cuh>
#include <hopper/instances.cuh>
#include <hopper/pipeline.cuh>
#include <vector>

namespace fastst {
namespace {

constexpr int kGroups = 2;   // warpgroups that multiply
constexpr int kFormers = 3;  // warps that make du
constexpr int kThreads = kWarpGroup * (kGroups + 1);
constexpr int kCells = 64 * kGroups;
constexpr int kChunk = 32;               // channels of a box: 64-byte rows
constexpr int kPiece = 8;                // elements of 16 bytes
constexpr int kMaxTaps = 49;             // of a row of the kernel
constexpr int kMaxReach = 64;            // rows of du that a cell reads
constexpr int kMaxRows = 1024;           // of a box
constexpr int kPlaces = 3 * kRingBytes;  // of the rows of a box: h, and w in the upper half
constexpr int kFirst = 5 * kTileAlign;   // boxes, then weights
constexpr int kNone = 255;               // no tap
static_assert(kPlaces + 4 * kMaxRows <= kFirst);

// By which tap output row o of a cell reads the i-th row of du that it reaches: what the compiler
// must know, or every product would wait for the one before.
enum class Pattern {
  table,  // as the host has found it, for any kernel
  same,   // 3 taps of stride 1
  twice,  // 3 taps of stride 2, whose first row of outputs reads through the middle one
};
constexpr int kPatternTaps = 3;

template <Pattern P, int Blocks>
struct Taps {
  static constexpr int kSpan = P == Pattern::twice ? Blocks / 2 : Blocks;  // rows of outputs
  static constexpr int kRows = P == Pattern::twice ? kSpan : kSpan + kPatternTaps - 1;

  static __host__ __device__ constexpr int tap(int i, int o) {
    const int tap = P == Pattern::twice ? 2 * i + 1 - o : i - o;
    return tap < kPatternTaps ? tap : -1;
  }
};

// One axis of the plane.
struct Plane {
  int size, out;     // of du, of dx
  int cells, tiles;  // of a tile; tiles
  int span;          // outputs of a cell, a multiple of up
  int step;          // of du from one cell to the next
  int first, halo;   // where the box of the first cell begins; places of a box

  __device__ int start(int tile) const { return tile * cells * step + first; }
};

template <class T>
struct Parameters {
  TensorMap g, u, weight;  // (C, W, H, frames), the same, (64, rows)
  Plane h, w;
  int channels, frames, box_frames;
  int cluster, frame_tiles;                        // frame tiles of each block of a cluster
  int tiles, column_tiles, stages, weight_stages;  // tiles: of cells, of each block
  int kernel_h, kernel_w, reach;
  uint32_t taps[2][kMaxReach];  // by column of a cell and row that it reads: of block b in byte b
  int rows[kMaxReach];          // those rows, as rows of the box
  int columns[kMaxTaps];        // through a column of the kernel: the same
  uint8_t parity[kMaxTaps];     // and the column of a cell that reads through it
  Pattern pattern;
  bool affine;
  Global<const float> norm_r, norm_p;  // (64 · chunks)
  Global<T> out;
  int64_t frame_stride, row_stride, pixel_stride;  // of out
  int stored;                                      // channels of out, a multiple of 8

  __host__ __device__ int chunks() const { return (channels + kChunk - 1) / kChunk; }
  // Products of 16 channels each that a chunk asks for.
  __device__ int steps(int chunk) const { return min(kChunk, channels - chunk * kChunk + 15) / 16; }
  __host__ __device__ int frame_rows() const { return h.halo * w.halo; }
  __host__ __device__ int box_rows() const { return frame_rows() * box_frames; }
  __host__ __device__ int box_bytes() const {  // of g or of u
    return (box_rows() * 2 * kChunk + kTileAlign - 1) / kTileAlign * kTileAlign;
  }
  __host__ __device__ int stage_bytes() const { return (1 + affine) * box_bytes(); }
};

template <class T, int N>
__host__ __device__ int weight_bytes(const Parameters<T>& p) {  // of a column of the kernel
  return p.kernel_h * N * 2 * kChunk;
}

// A chunk of channels of one of a block's tiles.
struct Step {
  Walk walk;
  int index, chunk = 0, column, frame, h, w;  // tiles

  template <class T>
  __device__ Step(const Parameters<T>& p, const Walk& walk) : walk(walk), index(walk.first) {
    place(p);
  }
  template <class T>
  __device__ bool goes_on(const Parameters<T>& p) const {
    return index < p.tiles * p.column_tiles;
  }
  template <class T>
  __device__ void next(const Parameters<T>& p) {
    if (++chunk < p.chunks()) return;
    chunk = 0, index += walk.step;
    place(p);
  }

 private:
  template <class T>
  __device__ void place(const Parameters<T>& p) {
    int i = index % p.tiles;
    column = index / p.tiles;
    w = i % p.w.tiles, i /= p.w.tiles;
    h = i % p.h.tiles, frame = i / p.h.tiles * p.cluster + walk.rank;
  }
};

// Of a cell of a tile: counted frame by frame, row by row.
template <class T>
struct Cell {
  int frame, h, w;

  __device__ Cell(const Parameters<T>& p, int index) {
    w = index % p.w.cells, index /= p.w.cells;
    h = index % p.h.cells, frame = index / p.h.cells;
  }
};

// du = g + p·u + r takes the place of g in a box; zeros outside of the plane. Of the last chunk
// only what products read, 16 or 32 channels.
template <class T>
__device__ void form(const Parameters<T>& p, const Step& at, const Ring& ring, Shared<T> g,
                     Shared<T> u) {
  const Shared<uint32_t> places = shared<uint32_t>(kPlaces);
  const int thread = static_cast<int>(threadIdx.x) - 32, steps = p.steps(at.chunk);
  const int piece = thread & ((1 << steps) - 1);  // of a row: 2 for each step
  // Of 8 rows those that come together lie on banks of their own, with 2 pieces of each as with 4.
  const int turn = thread >> steps;
  const int first_row = (turn & ~6) | (turn & 2) << 1 | (turn & 4) >> 1;
  float norm_p[kPiece], norm_r[kPiece];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int c = at.chunk * kChunk + piece * kPiece + half * 4;
    const auto a = load<4>(p.norm_p + c), b = load<4>(p.norm_r + c);
#pragma unroll
    for (int i = 0; i < 4; ++i) norm_p[4 * half + i] = a.lane[i], norm_r[4 * half + i] = b.lane[i];
  }
  const int first_h = p.h.start(at.h), first_w = p.w.start(at.w);
  ring.wait();
  for (int row = first_row; row < p.box_rows(); row += kFormers * 32 >> steps) {
    const int where = row * kChunk + (piece ^ row / 2 % 4) * kPiece;  // as the swizzle has them
    const uint32_t place = places[row];
    const bool inside = static_cast<uint32_t>(first_h + int(place & 0xffff)) < uint32_t(p.h.size) &&
                        static_cast<uint32_t>(first_w + int(place >> 16)) < uint32_t(p.w.size);
    Pack<T, kPiece> du = load<kPiece>(g + where);
    const Pack<T, kPiece> other = load<kPiece>(u + where);
#pragma unroll
    for (int i = 0; i < kPiece; ++i)
      du.lane[i] = narrow<T>(
          inside ? widen(du.lane[i]) + (norm_p[i] * widen(other.lane[i]) + norm_r[i]) : 0.0f);
    store(g + where, du);
  }
}

template <class T, int N, int Blocks>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_spatial_gradient_kernel(const __grid_constant__ Parameters<T> p) {
  const int thread = static_cast<int>(threadIdx.x), stage_bytes = p.stage_bytes();
  const int column_bytes = weight_bytes<T, N>(p);
  const int weights_at = kFirst + p.stages * stage_bytes;
  Ring boxes(0, p.stages), formed(kRingBytes, p.stages),
      weights(2 * kRingBytes, p.weight_stages, p.cluster);
  if (thread == 0) {
    boxes.init(4 * kGroups);
    formed.init(1, kFormers);
    weights.init(4 * kGroups);
    mbarrier_fence_init();
  }
  for (int i = thread; i < p.box_rows(); i += kThreads)
    shared<uint32_t>(kPlaces)[i] = i / p.w.halo % p.h.halo | i % p.w.halo << 16;
  weights.begin();

  const Walk walk(p.cluster);
  const int group = thread / kWarpGroup;
  if (group == 0) {
    registers_decrease<72>();
    if (thread == 0) {
      const auto copy_box = [&](const Step& at) {
        boxes.acquire((1 + p.affine) * p.box_rows() * 2 * kChunk);
        const Shared<T> to = shared<T>(kFirst + boxes.stage() * stage_bytes);
        const int c = at.chunk * kChunk, w = p.w.start(at.w), h = p.h.start(at.h);
        const int frame = at.frame * p.box_frames;
        tma_load(to, p.g, boxes.full(), c, w, h, frame);
        if (p.affine) tma_load(to + p.box_bytes() / 2, p.u, boxes.full(), c, w, h, frame);
        boxes.advance();
      };
      Multicast taps(p.cluster);
      // A box comes before the weights of the chunk before it: forming takes time, too.
      Step now(p, walk), ahead(p, walk);
      if (p.stages > 2 && ahead.goes_on(p)) copy_box(ahead), ahead.next(p);
      for (; now.goes_on(p); now.next(p)) {
        if (ahead.goes_on(p)) copy_box(ahead), ahead.next(p);
        for (int kw = 0; kw < p.kernel_w; ++kw) {
          weights.acquire(column_bytes);
          const Shared<T> to = shared<T>(weights_at + weights.stage() * column_bytes);
          const int chunks = (p.chunks() + 1) / 2;  // of 64 channels
          const int block = (now.column * chunks + now.chunk / 2) * p.kernel_w + kw;
          for (int kh = 0; kh < p.kernel_h; ++kh)
            taps.load(to + kh * N * kChunk, p.weight, weights.full(), now.chunk % 2 * kChunk,
                      (block * p.kernel_h + kh) * N);
          weights.advance();
        }
      }
      weights.end();
    } else if (thread >= 32 && p.affine) {
      for (Step at(p, walk); at.goes_on(p); at.next(p)) {
        const Shared<T> g = shared<T>(kFirst + boxes.stage() * stage_bytes);
        form(p, at, boxes, g, g + p.box_bytes() / 2);
        fence_proxy_async();
        formed.publish();
        boxes.advance(), formed.advance();
      }
    }
    return;
  }

  registers_increase<216>();
  const int warp = thread / 32 % 4, lane = thread % 32;
  const int first_cell = (group - 1) * 64 + warp * 16;
  const Cell<T> read(p, first_cell + lane % 16);  // lanes name the rows of four 8 × 8 matrices
  const int row = read.frame < p.box_frames ? read.frame * p.frame_rows() +
                                                  read.h * p.h.step * p.w.halo + read.w * p.w.step
                                            : 0;
  float sums[Blocks][N / 2];
  for (Step at(p, walk); at.goes_on(p);) {
    const Step tile = at;
#pragma unroll
    for (int b = 0; b < Blocks; ++b)
#pragma unroll
      for (int i = 0; i < N / 2; ++i) sums[b][i] = 0;
    keep(sums);
    for (int chunk = 0; chunk < p.chunks(); ++chunk) {
      const int steps = p.steps(chunk);
      boxes.wait();
      if (p.affine) formed.wait();
      const Shared<T> box = shared<T>(kFirst + boxes.stage() * stage_bytes);
      for (int kw = 0; kw < p.kernel_w; ++kw) {
        weights.wait();
        const Descriptor weight =
            descriptor(shared<T>(weights_at + weights.stage() * column_bytes), Swizzle::b64);
        const int from = row + p.columns[kw], parity = p.parity[kw];
        const auto load = [&]<int Steps>(int i, uint32_t (&a)[Steps][4]) {
          const int r = from + p.rows[i];
#pragma unroll
          for (int k = 0; k < Steps; ++k)
            ldmatrix_x4(a[k], box + r * kChunk + ((2 * k + lane / 16) ^ r / 2 % 4) * kPiece);
        };
        // The products of a fragment by one tap.
        const auto multiply = [&]<int Steps>(const uint32_t (&a)[Steps][4], float (&sums)[N / 2],
                                             int tap) {
#pragma unroll
          for (int k = 0; k < Steps; ++k)
            wgmma<T, N>(sums, a[k], weight + tap * N * 2 * kChunk + 32 * k, true);
        };
        // Fragments that are under way at once are in registers of their own: else, and for want
        // of registers, ptxas would let every product wait.
        const auto column = [&]<Pattern P, int Parity, int Steps>() {
          using K = Taps<P, Blocks>;
          constexpr int kAtOnce = K::kRows > 4 ? K::kRows / 2 : K::kRows;
          uint32_t a[kAtOnce][Steps][4];
#pragma unroll
          for (int i = 0; i < K::kRows; ++i) {
            load(i, a[i % kAtOnce]);
            wgmma_fence(a[i % kAtOnce]);
#pragma unroll
            for (int o = 0; o < K::kSpan; ++o)
              if (K::tap(i, o) >= 0)
                multiply(a[i % kAtOnce], sums[o * (Blocks / K::kSpan) + Parity], K::tap(i, o));
            wgmma_commit();
            if (i % kAtOnce == kAtOnce - 1) wgmma_wait<0>();
          }
        };
        const auto by_table = [&]<int Steps>() {
#pragma unroll 1
          for (int i = 0; i < p.reach; ++i) {
            uint32_t a[Steps][4];
            load(i, a);
            keep(a);
#pragma unroll
            for (int b = 0; b < Blocks; ++b) {
              const int tap = p.taps[parity][i] >> 8 * b & 255;
              if (tap == kNone) continue;
              wgmma_fence();
              multiply(a, sums[b], tap);
              wgmma_commit();
            }
            wgmma_wait<0>();
          }
        };
        const auto of_steps = [&]<int Steps>() {
          if (p.pattern == Pattern::same)
            return column.template operator()<Pattern::same, 0, Steps>();
          if constexpr (Blocks == 4)
            if (p.pattern == Pattern::twice)
              return parity ? column.template operator()<Pattern::twice, 1, Steps>()
                            : column.template operator()<Pattern::twice, 0, Steps>();
          by_table.template operator()<Steps>();
        };
        if (steps == 2)
          of_steps.template operator()<2>();
        else
          of_steps.template operator()<1>();
        weights.release(weights.stage());
        weights.advance();
      }
      boxes.release(boxes.stage());
      boxes.advance(), formed.advance();
      at.next(p);
    }
    keep(sums);
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
      RowPair rows;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Cell<T> cell(p, first_cell + half * 8 + lane / 4);
        const int frame = tile.frame * p.box_frames + cell.frame;
        const int h = (tile.h * p.h.cells + cell.h) * p.h.span + (b >> (p.w.span - 1));
        const int w = (tile.w * p.w.cells + cell.w) * p.w.span + (b & (p.w.span - 1));
        const bool there =
            cell.frame < p.box_frames && frame < p.frames && h < p.h.out && w < p.w.out;
        rows.out[half] =
            there ? frame * p.frame_stride + h * p.row_stride + w * p.pixel_stride : -1;
      }
      store_rows<T, N>(p.out, p.stored, sums[b], rows, tile.column * N);
    }
  }
}

// One axis of the pass whose input gradient this is, for cells of `span` outputs.
Plane plane_of(const HopperSpatialGradient& g, int axis, int cells, int span) {
  const auto at = [](const auto& array, int i) { return narrow_size(array[i]); };
  Plane a{};
  a.size = at(g.g.size, 2 + axis), a.out = at(g.out.size, 2 + axis);
  a.cells = cells, a.span = span, a.step = span / at(g.conv.stride, axis);
  a.tiles = (a.out + cells * span - 1) / (cells * span);
  return a;
}

// f(output of a cell, tap, how far from the cell's place in du the tap leads), mirrored taps.
template <class F>
void for_each_tap(const Conv& conv, int axis, int span, F f) {
  const auto at = [&](const auto& array) { return narrow_size(array[axis]); };
  const int up = at(conv.stride), kernel = at(conv.kernel), dilation = at(conv.dilation);
  const int before = (kernel - 1) * dilation - narrow_size(conv.padding[2 * axis]);
  for (int tap = 0; tap < kernel; ++tap)
    for (int output = 0; output < span; ++output)
      if ((output + tap * dilation - before) % up == 0)
        f(output, tap, (output + tap * dilation - before) / up);
}

// Which rows of a box the taps lead to; the boxes' extents.
template <class T>
void place_taps(Parameters<T>& p, const Conv& conv) {
  for (const int axis : {1, 2}) {
    Plane& a = axis == 1 ? p.h : p.w;
    int least = INT32_MAX, most = INT32_MIN;
    for_each_tap(conv, axis, a.span,
                 [&](int, int, int at) { least = std::min(least, at), most = std::max(most, at); });
    a.first = least, a.halo = (a.cells - 1) * a.step + most - least + 1;
  }
  for_each_tap(conv, 2, p.w.span, [&](int output, int tap, int at) {
    p.parity[tap] = static_cast<uint8_t>(output), p.columns[tap] = at - p.w.first;
  });
  // Rows that some output of a cell reads, in order.
  std::vector<int> reached;
  for_each_tap(conv, 1, p.h.span, [&](int, int, int at) { reached.push_back(at); });
  std::sort(reached.begin(), reached.end());
  reached.erase(std::unique(reached.begin(), reached.end()), reached.end());
  p.reach = static_cast<int>(reached.size());
  for (int i = 0; i < p.reach; ++i) {
    p.rows[i] = (reached[i] - p.h.first) * p.w.halo;
    for (int parity = 0; parity < p.w.span; ++parity) p.taps[parity][i] = ~0u;
    for_each_tap(conv, 1, p.h.span, [&](int output, int tap, int at) {
      if (at != reached[i]) return;
      for (int parity = 0; parity < p.w.span; ++parity) {
        const int shift = 8 * (output * p.w.span + parity);
        p.taps[parity][i] ^= uint32_t(kNone ^ tap) << shift;
      }
    });
  }
}

template <Pattern P, int Blocks, class T>
bool fits(const Parameters<T>& p) {
  using K = Taps<P, Blocks>;
  const int columns = Blocks / K::kSpan;
  bool found = p.h.span == K::kSpan && p.w.span == columns && p.reach == K::kRows;
  for (int i = 0; found && i < K::kRows; ++i)
    for (int b = 0; b < Blocks; ++b)
      for (int parity = 0; parity < columns; ++parity) {
        const int there = p.taps[parity][i] >> 8 * b & 255, tap = K::tap(i, b / columns);
        found &= there == (tap < 0 || b % columns != parity ? kNone : tap);
      }
  return found;
}

template <class T, int N, int Blocks>
void run(Dtype dtype, const HopperSpatialGradient& g, Stream stream) {
  const HopperGradientTile& tile = g.tile;
  const auto require = [](bool holds, const std::string& what, int64_t came) {
    if (!holds)
      throw std::invalid_argument("hopper_spatial_gradient needs " + what + ", not " +
                                  std::to_string(came));
  };
  const int up_h = narrow_size(g.conv.stride[1]), up_w = narrow_size(g.conv.stride[2]);
  require(up_w == 1 || up_w == 2, "strides of 1 or 2", up_w);
  require(Blocks % (up_w * up_h) == 0, "blocks for every output of a cell", Blocks);
  for (const int axis : {1, 2}) {
    require(g.conv.kernel[axis] <= kMaxTaps, "at most 49 taps in a row", g.conv.kernel[axis]);
    require(g.conv.dilation[axis] < kMaxRows, "taps of one box", g.conv.dilation[axis]);
  }
  Parameters<T> p{};
  p.h = plane_of(g, 1, narrow_size(tile.box[1]), Blocks / up_w);
  p.w = plane_of(g, 2, narrow_size(tile.box[2]), up_w);
  require(Blocks / up_w * g.conv.kernel[1] <= kMaxReach, "few enough taps", g.conv.kernel[1]);
  place_taps(p, g.conv);
  p.pattern = fits<Pattern::same, Blocks>(p) ? Pattern::same : Pattern::table;
  if constexpr (Blocks == 4)
    if (fits<Pattern::twice, Blocks>(p)) p.pattern = Pattern::twice;
  p.channels = narrow_size(g.g.size[1]), p.stored = narrow_size(g.out.size[1]);
  p.frames = narrow_size(g.g.size[0] * g.g.size[2]), p.box_frames = narrow_size(tile.box[0]);
  p.cluster = narrow_size(tile.cluster);
  require(p.cluster >= 1 && p.cluster <= kMaxCluster && tile.grid % p.cluster == 0,
          "a grid of whole clusters of 1 or 2 blocks", p.cluster);
  p.frame_tiles = tiles_of(p.frames, p.box_frames * p.cluster);
  p.column_tiles = tiles_of(p.stored, N);
  const int64_t tiles = int64_t(p.frame_tiles) * p.h.tiles * p.w.tiles;
  p.tiles = narrow_size(tiles * p.column_tiles) / p.column_tiles;
  p.kernel_h = narrow_size(g.conv.kernel[1]), p.kernel_w = narrow_size(g.conv.kernel[2]);
  p.frame_stride = g.out.stride[2], p.row_stride = g.out.stride[3];
  p.pixel_stride = g.out.stride[4];
  p.out = global<T>(g.out.data, g.out.span());
  p.affine = g.u.has_value();
  p.norm_r = global<const float>(g.affine.data, g.affine.count);
  p.norm_p = p.norm_r + g.affine.count / 2;
  require(p.box_frames * p.h.cells * p.w.cells <= kCells, "at most 128 cells",
          p.box_frames * p.h.cells * p.w.cells);
  require(p.box_rows() <= kMaxRows, "boxes of at most 1024 positions", p.box_rows());
  p.stages = narrow_size(tile.stages);
  require(p.stages >= 2 && p.stages <= kMaxStages, "2 to 16 stages", p.stages);
  const int left = kSharedLimit - kFirst - p.stages * p.stage_bytes();
  p.weight_stages = std::min(kMaxStages, left / weight_bytes<T, N>(p));
  require(p.weight_stages >= 1, "shared memory for the weights", left);
  const auto boxes = [&](const View& v) {
    return position_boxes(dtype, v, {kChunk, p.w.halo, p.h.halo, p.box_frames}, {1, 1, 1, 1},
                          Swizzle::b64);
  };
  p.g = boxes(g.g);
  if (g.u) p.u = boxes(*g.u);
  p.weight = packed_weight(dtype, g.weight, N, Swizzle::b64);
  const int bytes = kFirst + p.stages * p.stage_bytes() + p.weight_stages * weight_bytes<T, N>(p);
  launch_clusters("hopper_spatial_gradient", p.cluster,
                  hopper_spatial_gradient_kernel<T, N, Blocks>, dim3(tile.grid), dim3(kThreads),
                  bytes, stream, "dx " + shape(g.out), p);
}

}  // namespace

void hopper_spatial_gradient(Dtype dtype, const HopperSpatialGradient& g, Stream stream) {
  with_instance<instances::spatial_gradient>(
      "hopper_spatial_gradient", dtype, {g.tile.columns, g.tile.blocks},
      [&]<class T, int N, int Blocks>() { run<T, N, Blocks>(dtype, g, stream); });
}

}  // namespace fastst
