// The stem of a video network on Hopper, both convolutions in one kernel: 1 × 7 × 7 of stride 2 on
// up to 4 channels, norm, activation, 3 × 1 × 1.
//
// A warpgroup has 8 × 8 places of the output plane and walks over the frames. Two warps bring it
// patches of x, 4 channels to a place; from there A goes straight to registers, for a row of A is a
// run of pixels. u becomes z in registers, where it is A of the second product, and is added to the
// sums of the three output frames that it belongs to.
#include <device/launch.cuh>
#include <device/wgmma.cuh>
#include <hopper/accumulators.cuh>
#include <hopper/instances.cuh>
#include <hopper/pipeline.cuh>

namespace fastst {
namespace {

constexpr int kTaps = 3, kKernel = 7, kStride = 2, kSide = 8;
constexpr int kMid = 48, kOut = 64;                      // columns of the two products
constexpr int kGroups = 2;                               // warpgroups that multiply
constexpr int kPatch = (kSide - 1) * kStride + kKernel;  // rows and columns of x
constexpr int kSteps = 2 * kKernel;  // of 16 products: 4 columns of the kernel × 4 channels
constexpr int kPatchBytes = (kPatch * kPatch * 8 + 127) / 128 * 128;
constexpr int kStages = 4;
constexpr int kSpatial = kTileAlign;  // its weights in shared memory
constexpr int kSpatialTiles = (kSteps * 16 + kSwizzleRow - 1) / kSwizzleRow;
constexpr int kTemporal = kSpatial + kSpatialTiles * kMid * 128;
constexpr int kPatches = kTemporal + kTaps * kOut * 128;
constexpr int kSharedBytes = kPatches + kGroups * kStages * kPatchBytes;
constexpr int kWeightBarrier = kGroups * kRingBytes;

template <class T>
struct Parameters {
  TensorMap spatial, temporal;
  Tensor<const T> x;
  int pad_h, pad_w, before;
  int frames, out_frames;                      // of x and of y
  int rows, columns, row_tiles, column_tiles;  // of y and u
  int piece, pieces;  // frames of y (or of u) that a warpgroup makes at a time
  int64_t units;
  Global<const float> scale, shift;  // of u: what goes through the activation is scale·u + shift
  Activation act;
  float slope;
  int64_t clip_stride, frame_stride, row_stride, pixel_stride;  // of what is written
  int64_t residual_clip, residual_frame, residual_pixel;
  Epilogue<T> epilogue;
};

struct Unit {
  int64_t clip;
  int h, w, first;  // place of the output, and frame

  template <class T>
  __device__ Unit(const Parameters<T>& p, int64_t index) {
    w = static_cast<int>(index % p.column_tiles) * kSide, index /= p.column_tiles;
    h = static_cast<int>(index % p.row_tiles) * kSide, index /= p.row_tiles;
    first = static_cast<int>(index % p.pieces) * p.piece;
    clip = index / p.pieces;
  }
};

// Frame of x in step `j` of a unit that ends in y, or in u; outside of [0, frames) it is skipped.
template <bool Pair, class T>
__device__ int frame_of(const Parameters<T>& p, const Unit& unit, int j) {
  return unit.first + j - (Pair ? p.before : 0);
}

template <bool Pair, class T>
__device__ int steps_of(const Parameters<T>& p, const Unit& unit) {
  const int left = (Pair ? p.out_frames : p.frames) - unit.first;
  return min(left, p.piece) + (Pair ? kTaps - 1 : 0);
}

// One frame of x by the threads of two warps: 4 channels to a place, zeros where there is none. All
// loads are under way before the first store: one after the other they would take most of the time.
template <class T>
__device__ void load_patch(const Parameters<T>& p, const Unit& unit, int t, Shared<T> patch) {
  const int channels = static_cast<int>(p.x.size[1]);
  constexpr int kEach = (kPatch * kPatch + 63) / 64;
  Pack<T, 4> pixels[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = threadIdx.x % 64 + 64 * j;
    const int h = unit.h * kStride + i / kPatch - p.pad_h;
    const int w = unit.w * kStride + i % kPatch - p.pad_w;
    const bool there = h >= 0 && h < p.x.size[3] && w >= 0 && w < p.x.size[4];
    const int64_t at = there ? p.x.offset(unit.clip, t, h, w) : 0;
#pragma unroll
    for (int c = 0; c < 4; ++c)
      pixels[j].lane[c] =
          there && c < channels ? p.x.data[at + c * p.x.stride[1]] : narrow<T>(0.0f);
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = threadIdx.x % 64 + 64 * j;
    if (i < kPatch * kPatch) store(patch + 4 * i, pixels[j]);
  }
}

// u of 64 places, by products of a patch with the spatial weights.
template <class T>
__device__ void convolve(Shared<T> patch, float (&u)[kMid / 2]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, q = lane % 4;
  // Columns 2q and 2q + 1 of A are two channels of a pixel, and 8 columns on are two pixels on.
  const Shared<T> corner =
      patch + 4 * (2 * warp * kStride * kPatch + lane / 4 * kStride + q / 2) + 2 * (q % 2);
  uint32_t a[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int kw = step % 2 * 4 + i / 2 * 2;
      const int at = 4 * ((step / 2 + i % 2 * kStride) * kPatch + kw);
      // The eighth column of the kernel does not exist; a NaN there must not count.
      a[step][i] = kw == 6 && q >= 2 ? 0u : bit_cast<uint32_t>(load<2>(corner + at));
    }
#pragma unroll
  for (int i = 0; i < kMid / 2; ++i) u[i] = 0;
  wgmma_fence(u, a);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const Shared<T> weight = shared<T>(kSpatial + step / 4 * kMid * 128);
    wgmma<T, kMid>(u, a[step], descriptor(weight) + step % 4 * 32, true);
  }
  wgmma_commit();
  wgmma_wait<0>();
  keep(u);
}

// z = act(scale·u + shift) as A of the temporal product.
template <class T>
__device__ void activate_mid(const Parameters<T>& p, float (&u)[kMid / 2],
                             uint32_t (&z)[kMid / 16][4]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kMid / 8; ++j) {
    const auto scale = load<2>(p.scale + 8 * j + 2 * q), shift = load<2>(p.shift + 8 * j + 2 * q);
#pragma unroll
    for (int i = 0; i < 4; ++i) u[4 * j + i] = u[4 * j + i] * scale.lane[i % 2] + shift.lane[i % 2];
  }
  activate_in_place(p.act, p.slope, u);
#pragma unroll
  for (int k = 0; k < kMid / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) z[k][i] = pack_pair<T>(u[8 * k + 2 * i], u[8 * k + 2 * i + 1]);
}

template <class T, int N>
__device__ void write_frame(const Parameters<T>& p, const Unit& unit, int t,
                            float (&values)[1][N / 2], ColumnStatistics<N>& statistics) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  RowPair pair;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int h = unit.h + 2 * warp + half, w = unit.w + lane / 4;
    const bool there = h < p.rows && w < p.columns;
    pair.out[half] = there ? unit.clip * p.clip_stride + t * p.frame_stride + h * p.row_stride +
                                 w * p.pixel_stride
                           : -1;
    pair.residual[half] = unit.clip * p.residual_clip + t * p.residual_frame +
                          (int64_t(h) * p.columns + w) * p.residual_pixel;
  }
  finish_rows<T, N>(p.epilogue, values, [&](int) { return pair; }, 0, statistics);
}

template <class T, bool Pair>
__global__ void __launch_bounds__(kWarpGroup*(kGroups + 1), 1)
    hopper_stem_kernel(const __grid_constant__ Parameters<T> p) {
  const int group = threadIdx.x / kWarpGroup;
  // The first warpgroup brings patches: two warps for each of the others, which do not meet.
  const int team = group == 0 ? threadIdx.x / 64 : group - 1;
  const Shared<uint64_t> weights = shared<uint64_t>(kWeightBarrier);
  Ring ring(team * kRingBytes, kStages);
  if (threadIdx.x % 64 == 0 && group == 0) ring.init(4, 2);
  if (threadIdx.x == 0) mbarrier_init(weights, 1);
  if (threadIdx.x % 64 == 0 && group == 0) mbarrier_fence_init();
  sync_block();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(weights, (kSpatialTiles * kMid + (Pair ? kTaps * kOut : 0)) * 128);
    for (int i = 0; i < kSpatialTiles; ++i)
      tma_load(shared<T>(kSpatial + i * kMid * 128), p.spatial, weights, 0, i * kMid);
    if (Pair)
      for (int i = 0; i < kTaps; ++i)
        tma_load(shared<T>(kTemporal + i * kOut * 128), p.temporal, weights, 0, i * kOut);
  }
  const int64_t start = int64_t(blockIdx.x) * kGroups + team, step = int64_t(gridDim.x) * kGroups;

  if (group == 0) {
    registers_decrease<104>();
    for (int64_t index = start; index < p.units; index += step) {
      const Unit unit(p, index);
      const int steps = steps_of<Pair>(p, unit);
      for (int j = 0; j < steps; ++j) {
        const int t = frame_of<Pair>(p, unit, j);
        if (t < 0 || t >= p.frames) continue;
        ring.acquire();
        load_patch(p, unit, t, shared<T>(kPatches + (team * kStages + ring.stage()) * kPatchBytes));
        ring.publish();
        ring.advance();
      }
    }
    return;
  }

  registers_increase<200>();
  mbarrier_wait(weights, 0);
  // Of the next frame, where it exists.
  const auto mid = [&](float (&u)[kMid / 2]) {
    ring.wait();
    convolve(shared<T>(kPatches + (team * kStages + ring.stage()) * kPatchBytes), u);
    ring.release(ring.stage());
    ring.advance();
  };

  if constexpr (Pair) {
    ColumnStatistics<kOut> none;
    float sums[kTaps][1][kOut / 2];  // of output frame o in o % 3
    for (int64_t index = start; index < p.units; index += step) {
      const Unit unit(p, index);
      const int steps = steps_of<Pair>(p, unit);
      for (int round = 0; round < steps; round += kTaps) {
#pragma unroll
        for (int i = 0; i < kTaps; ++i) {
          const int j = round + i, t = frame_of<Pair>(p, unit, j);
          if (j >= steps) continue;
#pragma unroll
          for (int n = 0; n < kOut / 2; ++n) sums[i][0][n] = 0;
          if (t >= 0 && t < p.frames) {
            float u[kMid / 2];
            uint32_t z[kMid / 16][4];
            mid(u);
            activate_mid(p, u, z);
            wgmma_fence(sums, z);
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap) {
              const Descriptor weight = descriptor(shared<T>(kTemporal + tap * kOut * 128));
#pragma unroll
              for (int k = 0; k < kMid / 16; ++k)
                wgmma<T, kOut>(sums[(i + kTaps - tap) % kTaps][0], z[k], weight + 32 * k, true);
            }
            wgmma_commit();
            wgmma_wait<0>();
            keep(sums);
          }
          if (j >= kTaps - 1)  // its last frame has come
            write_frame<T, kOut>(p, unit, unit.first + j - (kTaps - 1), sums[(i + 1) % kTaps],
                                 none);
        }
      }
    }
  } else {
    ColumnStatistics<kMid> statistics;
    statistics.clear();
    for (int64_t index = start; index < p.units; index += step) {
      const Unit unit(p, index);
      const int steps = steps_of<Pair>(p, unit);
      for (int j = 0; j < steps; ++j) {
        float u[1][kMid / 2];
        mid(u[0]);
        write_frame<T, kMid>(p, unit, frame_of<Pair>(p, unit, j), u, statistics);
      }
    }
    if (p.epilogue.partials)
      statistics.write(p.epilogue, int64_t(blockIdx.x) * 4 * kGroups + (threadIdx.x / 32 - 4), 0);
  }
}

template <class T, bool Pair>
void run(Dtype dtype, const HopperStem& stem, Stream stream) {
  const View& out = stem.output.out;
  Parameters<T> p{};
  p.spatial = packed_weight(dtype, stem.spatial_weight, kMid);
  if (Pair) p.temporal = packed_weight(dtype, stem.temporal_weight, kOut);
  p.x = Tensor<const T>(stem.x);
  p.before = narrow_size(stem.padding[0]);
  p.pad_h = narrow_size(stem.padding[2]), p.pad_w = narrow_size(stem.padding[4]);
  p.frames = narrow_size(stem.x.size[2]), p.out_frames = narrow_size(out.size[2]);
  p.rows = narrow_size(out.size[3]), p.columns = narrow_size(out.size[4]);
  p.row_tiles = tiles_of(p.rows, kSide), p.column_tiles = tiles_of(p.columns, kSide);
  p.piece = narrow_size(stem.piece), p.pieces = tiles_of(out.size[2], p.piece);
  p.units = out.size[0] * p.pieces * p.row_tiles * p.column_tiles;
  p.scale = global<const float>(stem.coefficients.data, stem.coefficients.count);
  p.shift = p.scale + kMid;
  p.act = stem.act, p.slope = static_cast<float>(stem.slope);
  p.clip_stride = out.stride[0], p.frame_stride = out.stride[2];
  p.row_stride = out.stride[3], p.pixel_stride = out.stride[4];
  if (const auto& residual = stem.output.residual)
    p.residual_clip = residual->stride[0], p.residual_frame = residual->stride[2],
    p.residual_pixel = residual->stride[4];
  p.epilogue = Epilogue<T>(stem.output);
  launch("hopper_stem", hopper_stem_kernel<T, Pair>, dim3(stem.grid),
         dim3(kWarpGroup * (kGroups + 1)), kSharedBytes, stream, "output " + shape(out), p);
}

}  // namespace

void hopper_stem(Dtype dtype, const HopperStem& stem, Stream stream) {
  with_half_type("hopper_stem", dtype, [&]<class T>() {
    const auto go = stem.temporal_weight.data ? run<T, true> : run<T, false>;
    go(dtype, stem, stream);
  });
}

}  // namespace fastst
