// A temporal pass on Hopper, or its input gradient: a tap convolution over frames.
//
// A tile is a few output frames of 128 (clip, pixel) places. Every frame that it needs comes to
// shared memory once per tile, goes through norm and activation in registers (Norm), and is
// multiplied with all taps that lead to one of the output frames, whose sums are all in registers.
// Frames out of range are skipped: what the taps read, not what is stored, is padded with zeros.
// The blocks of a cluster have neighbouring tiles and copy their weights to each other.
#pragma once

#include <device/launch.cuh>
#include <device/wgmma.cuh>
#include <hopper/accumulators.cuh>
#include <hopper/instances.cuh>
#include <hopper/pipeline.cuh>

namespace fastst {
namespace {

constexpr int kTaps = 3;
constexpr int kGroups = 2;  // warpgroups that multiply, 64 places each
constexpr int kPlaces = 64 * kGroups;
constexpr int kFrameBytes = kPlaces * 128;

template <class T, template <class> class E>
struct Parameters {
  TensorMap u, weight;  // (M, pixels, T, N), (64, rows)
  int channels, frames, out_frames, before;
  int skew;        // how far before the first frame of the output its tiles begin
  bool replicate;  // frames out of range are copies of the nearest, not zeros
  int box_pixels, box_clips;
  int pixels, clips, pixel_tiles, clip_tiles, frame_tiles;
  int cluster;
  int weight_stages;  // 2, or as many as chunks: then they stay for all tiles of their columns
  // tiles: of positions, of whole clusters: neighbours have weights of the same columns. The walk
  // over all is of 32 bits.
  int tiles, chunks, column_tiles, stages;
  Global<const float> scale, shift;  // (2, 64 · chunks), or none
  Activation act;
  float slope;
  int64_t clip_stride, frame_stride, pixel_stride;        // of out
  int64_t residual_clip, residual_frame, residual_pixel;  // of the residual
  E<T> epilogue;

  // Products of 16 channels each that a chunk asks for: the last may have less than four.
  __device__ int steps(int chunk) const {
    return min(kSwizzleRow, channels - chunk * kSwizzleRow + 15) / 16;
  }
  // The frame of u that is `i` after the first one that a tile reads; -1: zeros.
  template <int Stride, int Up>
  __device__ int source(int first_out, int i) const {
    const int t = (first_out * Stride - before) / Up + i;
    if (t >= 0 && t < frames) return t;
    return !replicate ? -1 : t < 0 ? 0 : frames - 1;
  }
};

// Stride: of the pass. Up: of the pass whose input gradient this is; only every Up-th tap of a
// frame of the output meets a frame that exists, so Frames is a multiple of it.
template <int N, int Frames, int Stride, int Up>
struct Layout {
  static_assert(Frames % Up == 0 && (Stride == 1 || Up == 1));
  // Frames of u that a tile reads, and the tap by which the i-th of them counts in output frame o:
  // none where it is not one of 0 to kTaps - 1.
  static constexpr int kRead = ((Frames - 1) * Stride + kTaps - 1) / Up + 1;
  static __host__ __device__ constexpr int tap(int i, int o) { return i * Up - o * Stride; }

  static constexpr int kTapBytes = N * 128;
  static constexpr int kWeightBytes = kTaps * kTapBytes;
  static constexpr int kWeights = kTileAlign;  // barriers come first
  static __host__ __device__ constexpr int first(int weight_stages) {
    return kWeights + weight_stages * kWeightBytes;
  }
};

struct Tile {
  int frame, pixel, clip;  // first of the output

  // Beyond the last: clips that arrive as zeros and are not written.
  template <class P>
  __device__ Tile(const P& p, int frames, int index) {
    // Blocks at work together read the same frames, so that all but one get them from L2.
    frame = index % p.frame_tiles * frames - p.skew, index /= p.frame_tiles;
    pixel = index % p.pixel_tiles * p.box_pixels;
    clip = index / p.pixel_tiles * p.box_clips;
  }
};

// A of 64 places for two steps of 16 channels from `step` on, as the matrix unit wants it in
// registers.
template <class T>
__device__ void load_fragments(Shared<T> places, int step, uint32_t (&a)[2][4]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int piece = (2 * (step + k) + lane / 16) ^ (row % 8);  // of 16 bytes, as the swizzle has
    ldmatrix_x4(a[k], places + row * kSwizzleRow + piece * 8);
  }
}

// z = act(s·u + h) for such fragments of the channels from `channel` on.
template <class T, class P>
__device__ void normalise(const P& p, int channel, uint32_t (&a)[2][4]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    float values[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = channel + 16 * k + i / 2 * 8 + 2 * q;
      const auto u = bit_cast<Pack<T, 2>>(a[k][i]);
      const auto scale = load<2>(p.scale + c), shift = load<2>(p.shift + c);
#pragma unroll
      for (int e = 0; e < 2; ++e)
        values[2 * i + e] = widen(u.lane[e]) * scale.lane[e] + shift.lane[e];
    }
    activate_in_place(p.act, p.slope, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
  }
}

template <class T, int N, int Frames, int Stride, int Up, bool Norm, template <class> class E>
__global__ void __launch_bounds__(kWarpGroup*(kGroups + 1), 1)
    hopper_temporal_kernel(const __grid_constant__ Parameters<T, E> p) {
  using L = Layout<N, Frames, Stride, Up>;
  Ring inputs(0, p.stages), weights(kRingBytes, p.weight_stages, p.cluster);
  const bool stay = p.weight_stages == p.chunks;
  const int first = L::first(p.weight_stages);
  const int places = p.box_pixels * p.box_clips;
  if (threadIdx.x == 0) {
    inputs.init(4 * kGroups);
    weights.init(4 * kGroups);
    mbarrier_fence_init();
  }
  // A box may have fewer places than the products: those that it leaves out stay zero.
  for (int stage = 0; stage < p.stages; ++stage) {
    const Shared<uint32_t> u = shared<uint32_t>(first + stage * kFrameBytes);
    for (int i = places * 32 + threadIdx.x; i < kPlaces * 32; i += kWarpGroup * (kGroups + 1))
      u[i] = 0u;
  }
  fence_proxy_async();
  weights.begin();

  const int all = p.tiles * p.column_tiles;
  const int group = threadIdx.x / kWarpGroup;
  if (group == 0) {
    registers_decrease<40>();
    if (threadIdx.x != 0) return;
    int held = -1;  // the columns whose weights are there
    Multicast taps(p.cluster);
    for (int index = blockIdx.x; index < all; index += gridDim.x) {
      const Tile tile(p, Frames, index % p.tiles);
      const int column = index / p.tiles;
      const bool there = stay && column == held;
      held = column;
      for (int chunk = 0; chunk < p.chunks; ++chunk) {
        if (!there) {
          weights.acquire(L::kWeightBytes);
          const int at = L::kWeights + weights.stage() * L::kWeightBytes;
          for (int tap = 0; tap < kTaps; ++tap)
            taps.load(shared<T>(at + tap * L::kTapBytes), p.weight, weights.full(), 0,
                      ((column * p.chunks + chunk) * kTaps + tap) * N);
          weights.advance();
        }
        for (int i = 0; i < L::kRead; ++i) {
          const int t = p.template source<Stride, Up>(tile.frame, i);
          if (t < 0) continue;
          inputs.acquire(places * 128);
          tma_load(shared<T>(first + inputs.stage() * kFrameBytes), p.u, inputs.full(),
                   chunk * kSwizzleRow, tile.pixel, t, tile.clip);
          inputs.advance();
        }
      }
    }
    weights.end();
    return;
  }

  registers_increase<232>();
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int64_t partial = int64_t(blockIdx.x) * 4 * kGroups + (threadIdx.x / 32 - 4);
  typename E<T>::template Statistics<N> statistics;
  statistics.clear();
  int counted = 0;  // tiles of columns whose statistics are written
  float sums[Frames][N / 2];

  for (int index = blockIdx.x; index < all; index += gridDim.x) {
    const Tile tile(p, Frames, index % p.tiles);
    const int column = index / p.tiles;
    for (; counted < column; ++counted) {
      if (p.epilogue.partials) statistics.write(p.epilogue, partial, counted * N);
      statistics.clear();
    }
#pragma unroll
    for (int o = 0; o < Frames; ++o)
#pragma unroll
      for (int i = 0; i < N / 2; ++i) sums[o][i] = 0;
    keep(sums);

    const bool leave = !stay || (index + static_cast<int>(gridDim.x)) / p.tiles != column;
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      const int steps = p.steps(chunk), stage = stay ? chunk : weights.stage();
      weights.wait(stage);
      const int at = L::kWeights + stage * L::kWeightBytes;
#pragma unroll
      for (int i = 0; i < L::kRead; ++i) {
        if (p.template source<Stride, Up>(tile.frame, i) < 0) continue;
        inputs.wait();
        const Shared<T> u =
            shared<T>(first + inputs.stage() * kFrameBytes) + (group - 1) * 64 * kSwizzleRow;
        const auto normalised = [&](int step, uint32_t (&a)[2][4]) {
          load_fragments(u, step, a);
          normalise<T>(p, chunk * kSwizzleRow + 16 * step, a);
        };
        // A group of the products of `Steps` steps with all taps, A in registers where there is a
        // norm.
        const auto multiply = [&]<int Steps>(int step, uint32_t (&a)[2][4]) {
          if constexpr (Norm)
            wgmma_fence(a);
          else
            wgmma_fence();
#pragma unroll
          for (int k = 0; k < Steps; ++k)
#pragma unroll
            for (int o = 0; o < Frames; ++o) {
              const int tap = L::tap(i, o), bytes = 32 * (step + k);
              if (tap < 0 || tap >= kTaps) continue;
              const Descriptor weight = descriptor(shared<T>(at + tap * L::kTapBytes)) + bytes;
              if constexpr (Norm)
                wgmma<T, N>(sums[o], a[k], weight, true);
              else
                wgmma<T, N>(sums[o], descriptor(u) + bytes, weight, true);
            }
          wgmma_commit();
        };
        [[maybe_unused]] uint32_t a[2][4] = {}, ahead[2][4];
        if constexpr (!Norm) {
#pragma unroll 1
          for (int step = 0; step < steps; step += 4) {
            if (step + 4 <= steps)
              multiply.template operator()<4>(step, a);
            else
#pragma unroll 1
              for (int k = step; k < steps; ++k) multiply.template operator()<1>(k, a);
            wgmma_wait<0>();
          }
        } else if (steps == 4) {
          // Two steps are normalised while the two before, in other registers, are multiplied, and
          // all of it while the other warpgroup multiplies.
          normalised(0, a);
          multiply.template operator()<2>(0, a);
          normalised(2, ahead);
          multiply.template operator()<2>(2, ahead);
          wgmma_wait<0>();
        } else {
#pragma unroll 1
          for (int step = 0; step < steps; ++step) {
            normalised(step, a);
            multiply.template operator()<1>(step, a);
            wgmma_wait<0>();
          }
        }
        inputs.release(inputs.stage());
        inputs.advance();
      }
      if (leave) weights.release(stage), weights.advance();
    }

    keep(sums);
    const auto rows = [&](int o) {
      RowPair pair;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = (group - 1) * 64 + warp * 16 + half * 8 + lane / 4;
        const int pixel = tile.pixel + place % p.box_pixels, in_box = place / p.box_pixels;
        const int clip = tile.clip + in_box, t = tile.frame + o;
        const bool there = in_box < p.box_clips && clip < p.clips && pixel < p.pixels && t >= 0 &&
                           t < p.out_frames;
        pair.out[half] =
            there ? clip * p.clip_stride + t * p.frame_stride + pixel * p.pixel_stride : -1;
        pair.residual[half] =
            clip * p.residual_clip + t * p.residual_frame + pixel * p.residual_pixel;
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

inline void check_temporal(const char* kernel, const Conv& conv, const HopperTile& tile) {
  if (conv.kernel[0] != kTaps || conv.dilation[0] != 1)
    throw std::invalid_argument(std::string(kernel) + " has 3 taps without dilation");
  if (tile.groups != kGroups || tile.blocks != tile.box[1])
    throw std::invalid_argument(std::string(kernel) +
                                " needs 2 warpgroups with a block of sums for each frame");
}

// `in` is read, `out` is written; `before` and `up` are of the convolution that the taps see.
template <class T, template <class> class E>
Parameters<T, E> parameters(Dtype dtype, const View& in, const View& out, const Array& weight,
                            const HopperTile& tile, int before, int up) {
  Parameters<T, E> p{};
  p.channels = narrow_size(in.size[1]);
  p.frames = narrow_size(in.size[2]), p.out_frames = narrow_size(out.size[2]);
  p.before = before, p.skew = up == 1 ? 0 : before & 1;
  p.box_clips = narrow_size(tile.box[0]), p.box_pixels = narrow_size(tile.box[2]);
  p.clips = narrow_size(in.size[0]), p.pixels = narrow_size(in.size[3] * in.size[4]);
  p.pixel_tiles = tiles_of(p.pixels, p.box_pixels), p.clip_tiles = tiles_of(p.clips, p.box_clips);
  p.frame_tiles = tiles_of(p.out_frames + p.skew, tile.box[1]);
  const int columns = narrow_size(tile.columns);
  p.chunks = tiles_of(in.size[1], kSwizzleRow), p.column_tiles = tiles_of(out.size[1], columns);
  p.stages = narrow_size(tile.stages);
  p.cluster = narrow_size(tile.cluster);
  if (p.box_clips * p.box_pixels > kPlaces || p.stages < 1 || p.stages > kMaxStages ||
      p.cluster < 1 || p.cluster > kMaxCluster || tile.grid % p.cluster)
    throw std::invalid_argument("a temporal Hopper tile needs boxes of at most " +
                                std::to_string(kPlaces) +
                                " places, 1 to 16 stages, and a grid of clusters of 1 or 2 blocks");
  const int64_t all = int64_t(p.frame_tiles) * p.clip_tiles * p.pixel_tiles * p.column_tiles;
  p.tiles = tiles_of(narrow_size(all) / p.column_tiles, p.cluster) * p.cluster;
  const int64_t held =
      kTileAlign + int64_t(p.chunks) * kTaps * columns * 128 + p.stages * kFrameBytes;
  p.weight_stages = p.chunks <= kMaxStages && held <= kSharedLimit ? p.chunks : 2;
  p.clip_stride = out.stride[0], p.frame_stride = out.stride[2], p.pixel_stride = out.stride[4];
  p.u = tensor_map({.dtype = dtype,
                    .data = in.data,
                    .span = in.span(),
                    .rank = 4,
                    .size = {in.size[1], p.pixels, in.size[2], in.size[0]},
                    .stride = {1, in.stride[4], in.stride[2], in.stride[0]},
                    .box = {kSwizzleRow, p.box_pixels, 1, p.box_clips},
                    .step = {1, 1, 1, 1},
                    .swizzle = Swizzle::b128});
  p.weight = packed_weight(dtype, weight, columns);
  return p;
}

template <int N, int Frames, int Stride, int Up, bool Norm, class T, template <class> class E>
void run(const char* name, const Parameters<T, E>& p, const HopperTile& tile, const View& out,
         Stream stream) {
  using L = Layout<N, Frames, Stride, Up>;
  launch_clusters(name, p.cluster, hopper_temporal_kernel<T, N, Frames, Stride, Up, Norm, E>,
                  dim3(tile.grid), dim3(kWarpGroup * (kGroups + 1)),
                  L::first(p.weight_stages) + p.stages * kFrameBytes, stream,
                  "output " + shape(out), p);
}

}  // namespace
}  // namespace fastst
