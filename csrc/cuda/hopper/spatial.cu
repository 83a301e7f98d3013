// Spatial pass on Hopper, u = act(scale·conv(x) + shift): an implicit GEMM of exact N tiles.
//
// One warp copies boxes of the input and of the packed weights, two warpgroups multiply: a tile
// together, or one each, by turns. A box is 64 channels of the positions of one output tile,
// shifted by a tap: zero padding, strides and edges are the tensor map's business. Blocks stay and
// walk over tiles; those of a cluster have the same places of neighbouring frames, and copy the
// weights, which are then the same, to each other.
#include <device/launch.cuh>
#include <device/tma.cuh>
#include <device/wgmma.cuh>
#include <hopper/accumulators.cuh>
#include <hopper/instances.cuh>
#include <hopper/pipeline.cuh>

namespace fastst {
namespace {

// One axis of the plane as boxes see it.
struct Plane {
  int size, out, box, tiles, kernel, stride, dilation, before;

  // First input coordinate of a tile through tap k.
  __device__ int first(int tile, int k) const {
    return tile * box * stride + k * dilation - before;
  }
  // Whether tap k meets nothing there but padding.
  __device__ bool outside(int tile, int k) const {
    const int from = first(tile, k), last = min(box, out - tile * box) - 1;
    return from + last * stride < 0 || from >= size;
  }
};

template <class T>
struct Parameters {
  TensorMap x, weight;  // (C, W, H, frames), (64, rows)
  Plane h, w;
  int channels, frames, box_frames;
  int cluster, frame_tiles;  // frame tiles of each block of a cluster
  int chunks;                // of 64 channels
  int share;                 // taps of a column of the kernel that one box serves: 1 or all
  // tiles: of positions, of each block of a cluster; the walk over all is of 32 bits
  int tiles, column_tiles, stages;
  int64_t frame_stride, row_stride, pixel_stride;  // of out
  Epilogue<T> epilogue;

  // Products of 16 channels each that a chunk asks for: the last may have less than four.
  __device__ int steps(int chunk) const {
    return min(kSwizzleRow, channels - chunk * kSwizzleRow + 15) / 16;
  }
  __device__ int box_h() const { return h.box + share - 1; }
  // Rows of 128 bytes of a frame in the box of x.
  __device__ int frame_rows() const { return box_h() * w.box; }
};

struct Tile {
  int frame, h, w;  // of the box of frames, of rows, of columns

  // Frames that no block of a cluster has any more arrive as zeros and are not written.
  template <class T>
  __device__ Tile(const Parameters<T>& p, int index, int rank) {
    w = index % p.w.tiles, index /= p.w.tiles;
    h = index % p.h.tiles, index /= p.h.tiles;
    frame = index * p.cluster + rank;
  }
};

// Calls f(chunk, kw, kh) for what is copied and multiplied at once, in the order of the stages.
template <class T, class F>
__device__ void for_each_step(const Parameters<T>& p, const Tile& tile, F f) {
  for (int chunk = 0; chunk < p.chunks; ++chunk)
    for (int kw = 0; kw < p.w.kernel; ++kw) {
      if (p.w.outside(tile.w, kw)) continue;
      for (int kh = 0; kh < p.h.kernel; kh += p.share)
        if (p.share > 1 || !p.h.outside(tile.h, kh)) f(chunk, kw, kh);
    }
}

// Groups: warpgroups that share a tile, of the two that there are.
template <int N, int Groups, int Blocks>
struct Layout {
  static_assert(Groups == 1 || Groups == kConsumers);
  static constexpr bool kTurns = Groups == 1;
  static constexpr int kRows = 64 * Groups * Blocks;
  static constexpr int kWeightBytes = N * 128;  // of one tap and 64 channels
  static constexpr int kTurn = kRingBytes;
  static constexpr int kPlaces = kTileAlign;  // after the barriers: rows of a tile, as w, h, frame
  static constexpr int kFirst = 2 * kTileAlign;  // stages
  static_assert(4 * kRows <= kTileAlign);

  static __host__ __device__ int x_bytes(int box_rows) {
    const int rows = box_rows > kRows ? box_rows : kRows;
    return (rows * 128 + kTileAlign - 1) / kTileAlign * kTileAlign;
  }
  static __host__ __device__ int stage_bytes(int box_rows, int share) {
    return x_bytes(box_rows) + share * kWeightBytes;
  }
};

constexpr int kThreads = kWarpGroup * (kConsumers + 1);

template <class T, int N, int Groups, int Blocks>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_spatial_kernel(const __grid_constant__ Parameters<T> p) {
  using L = Layout<N, Groups, Blocks>;
  const int box_rows = p.frame_rows() * p.box_frames;
  const int x_bytes = L::x_bytes(box_rows), stage_bytes = L::stage_bytes(box_rows, p.share);
  const int group = threadIdx.x / kWarpGroup, consumer = group - 1;
  Ring ring(0, p.stages, p.cluster);
  Turns turns(L::kTurn, consumer);
  if (threadIdx.x == 0) {
    ring.init(4 * Groups);
    if (L::kTurns) turns.init();
    mbarrier_fence_init();
  }
  const Shared<uint32_t> places = shared<uint32_t>(L::kPlaces);
  for (int row = threadIdx.x; row < L::kRows; row += kThreads)
    places[row] = row % p.w.box | row / p.w.box % p.h.box << 8 | row / p.w.box / p.h.box << 16;
  // A box may have fewer rows than the products: those that it leaves out stay zero.
  for (int stage = 0; stage < p.stages; ++stage) {
    const Shared<uint32_t> x = shared<uint32_t>(L::kFirst + stage * stage_bytes);
    for (int i = box_rows * 32 + threadIdx.x; i < L::kRows * 32; i += kThreads) x[i] = 0u;
  }
  fence_proxy_async();
  ring.begin();

  const Walk walk(p.cluster);
  const int all = p.tiles * p.column_tiles;
  if (group == 0) {
    registers_decrease<40>();
    if (threadIdx.x != 0) return;
    Multicast weights(p.cluster);
    for (int index = walk.first; index < all; index += walk.step) {
      const Tile tile(p, index % p.tiles, walk.rank);
      const int column = index / p.tiles;
      for_each_step(p, tile, [&](int chunk, int kw, int kh) {
        const int at = L::kFirst + ring.stage() * stage_bytes;
        ring.acquire(box_rows * 128 + p.share * L::kWeightBytes);
        tma_load(shared<T>(at), p.x, ring.full(), chunk * kSwizzleRow, p.w.first(tile.w, kw),
                 p.h.first(tile.h, kh), tile.frame * p.box_frames);
        const int block = (column * p.chunks + chunk) * p.w.kernel + kw;
        for (int i = 0; i < p.share; ++i)
          weights.load(shared<T>(at + x_bytes + i * L::kWeightBytes), p.weight, ring.full(), 0,
                       (block * p.h.kernel + kh + i) * N);
        ring.advance();
      });
    }
    ring.end();
    return;
  }

  registers_increase<232>();
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int64_t partial = int64_t(blockIdx.x) * 4 * kConsumers + (threadIdx.x / 32 - 4);
  ColumnStatistics<N> statistics;
  statistics.clear();
  int counted = 0;  // tiles of columns whose statistics are written
  float sums[Blocks][N / 2];
  // Where blocks of 64 products lie in the box: with shared boxes, frames have rows between them.
  const int frame_blocks = p.share > 1 ? p.h.box * p.w.box / 64 : 1 << 20;
  const int first_block = L::kTurns ? 0 : consumer * Blocks;
  int first_row[Blocks];
#pragma unroll
  for (int b = 0; b < Blocks; ++b) {
    const int block = first_block + b;
    first_row[b] = block / frame_blocks * p.frame_rows() + block % frame_blocks * 64;
  }

  const int first = walk.first + (L::kTurns ? consumer * walk.step : 0);
  for (int index = first; index < all; index += walk.step * (L::kTurns ? kConsumers : 1)) {
    const Tile tile(p, index % p.tiles, walk.rank);
    const int column = index / p.tiles;
    for (; counted < column; ++counted) {
      if (p.epilogue.partials) statistics.write(p.epilogue, partial, counted * N);
      statistics.clear();
    }
#pragma unroll
    for (int b = 0; b < Blocks; ++b)
#pragma unroll
      for (int i = 0; i < N / 2; ++i) sums[b][i] = 0;
    keep(sums);

    // A group of products of the stage at `at`: of neighbouring taps and steps of 16 channels.
    const auto multiply = [&]<int Steps, int Taps>(int at, int tap, int step) {
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < Taps; ++i) {
        const Shared<T> weight = shared<T>(at + x_bytes + (tap + i) * L::kWeightBytes);
#pragma unroll
        for (int k = 0; k < Steps; ++k)
#pragma unroll
          for (int b = 0; b < Blocks; ++b) {
            const Shared<T> x = shared<T>(at) + (first_row[b] + (tap + i) * p.w.box) * kSwizzleRow;
            wgmma<T, N>(sums[b], descriptor(x) + 32 * (step + k),
                        descriptor(weight) + 32 * (step + k), true);
          }
      }
      wgmma_commit();
    };
    if (L::kTurns) turns.begin(ring);
    int previous = -1;  // stage that products under way still read
    for_each_step(p, tile, [&](int chunk, int, int) {
      const int steps = p.steps(chunk);
      ring.wait();
      const int at = L::kFirst + ring.stage() * stage_bytes;
      // Straight code for what layers have: a group that a branch cut would wait for all of it.
      if (steps == 4 && p.share == 3)
        multiply.template operator()<4, 3>(at, 0, 0);
      else
#pragma unroll 1
        for (int tap = 0; tap < p.share; ++tap)
          if (steps == 4)
            multiply.template operator()<4, 1>(at, tap, 0);
          else
#pragma unroll 1
            for (int step = 0; step < steps; ++step)
              multiply.template operator()<1, 1>(at, tap, step);
      wgmma_wait<1>();
      if (previous >= 0) ring.release(previous);
      previous = ring.stage();
      ring.advance();
    });
    if (L::kTurns && index + walk.step < all) turns.end(ring);
    wgmma_wait<0>();
    if (previous >= 0) ring.release(previous);
    keep(sums);

    const auto rows = [&](int b) {
      RowPair pair;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t place = places[(first_block + b) * 64 + warp * 16 + half * 8 + lane / 4];
        const int w = tile.w * p.w.box + int(place & 255);
        const int h = tile.h * p.h.box + int(place >> 8 & 255);
        const int in_box = place >> 16, frame = tile.frame * p.box_frames + in_box;
        const bool there = in_box < p.box_frames && frame < p.frames && h < p.h.out && w < p.w.out;
        pair.out[half] = pair.residual[half] =
            there ? frame * p.frame_stride + h * p.row_stride + w * p.pixel_stride : -1;
      }
      return pair;
    };
    finish_rows<T, N>(p.epilogue, sums, rows, column * N, statistics);
  }
  if (p.epilogue.partials)
    for (; counted < p.column_tiles; ++counted) {
      statistics.write(p.epilogue, partial, counted * N);
      statistics.clear();
    }
}

template <class T, int N, int Groups, int Blocks>
void run(Dtype dtype, const HopperSpatial& conv, Stream stream) {
  using L = Layout<N, Groups, Blocks>;
  const View &x = conv.x, &out = conv.output.out;
  const HopperTile& tile = conv.tile;
  const auto plane = [&](int axis) {
    const int box = narrow_size(tile.box[axis]), size = narrow_size(out.size[2 + axis]);
    return Plane{narrow_size(x.size[2 + axis]),
                 size,
                 box,
                 tiles_of(size, box),
                 narrow_size(conv.conv.kernel[axis]),
                 narrow_size(conv.conv.stride[axis]),
                 narrow_size(conv.conv.dilation[axis]),
                 narrow_size(conv.conv.padding[2 * axis])};
  };
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(std::string("hopper_spatial needs ") + what);
  };
  Parameters<T> p{};
  p.h = plane(1), p.w = plane(2);
  p.channels = narrow_size(x.size[1]);
  p.frames = narrow_size(x.size[0] * x.size[2]), p.box_frames = narrow_size(tile.box[0]);
  p.cluster = narrow_size(tile.cluster);
  require(p.cluster >= 1 && p.cluster <= kMaxCluster && tile.grid % p.cluster == 0,
          "clusters of 1 or 2 blocks, and a grid of whole ones");
  p.frame_tiles = tiles_of(p.frames, p.box_frames * p.cluster);
  p.chunks = tiles_of(p.channels, kSwizzleRow);
  p.share = narrow_size(tile.share), p.stages = narrow_size(tile.stages);
  p.column_tiles = tiles_of(out.size[1], N);
  const int64_t tiles = int64_t(p.frame_tiles) * p.h.tiles * p.w.tiles;
  p.tiles = narrow_size(tiles * p.column_tiles) / p.column_tiles;
  p.frame_stride = out.stride[2], p.row_stride = out.stride[3], p.pixel_stride = out.stride[4];
  p.epilogue = Epilogue<T>(conv.output);
  const int box_h = p.h.box + p.share - 1, box_rows = p.box_frames * box_h * p.w.box;
  require(p.box_frames * p.h.box * p.w.box <= L::kRows, "boxes of at most a tile's places");
  require(p.stages >= 1 && p.stages <= kMaxStages, "1 to 16 stages");
  // A tap of the column is a shift by rows of the box, which must start a period of the swizzle.
  require(p.share == 1 || (p.share == p.h.kernel && p.h.dilation == 1 && p.h.stride == 1 &&
                           p.w.box % 8 == 0 && p.h.box * p.w.box % 64 == 0),
          "whole blocks of 64 places in rows of 8 for all vertical taps of stride 1 from one box");
  const std::array<int, 5> box{kSwizzleRow, p.w.box, box_h, p.box_frames};
  const std::array<int, 5> step{1, p.w.stride, p.h.stride, 1};
  p.x = position_boxes(dtype, x, box, step);
  p.weight = packed_weight(dtype, conv.weight, N);
  const int bytes = L::kFirst + p.stages * L::stage_bytes(box_rows, p.share);
  launch_clusters("hopper_spatial", p.cluster, hopper_spatial_kernel<T, N, Groups, Blocks>,
                  dim3(tile.grid), dim3(kThreads), bytes, stream, "output " + shape(out), p);
}

}  // namespace

void hopper_spatial(Dtype dtype, const HopperSpatial& conv, Stream stream) {
  const HopperTile& tile = conv.tile;
  with_instance<instances::spatial>("hopper_spatial", dtype,
                                    {tile.columns, tile.groups, tile.blocks},
                                    [&]<class T, int N, int Groups, int Blocks>() {
                                      run<T, N, Groups, Blocks>(dtype, conv, stream);
                                    });
}

}  // namespace fastst
