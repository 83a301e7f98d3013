// What the forward and the backward kernel of the depthwise pair share.
//
// A pixel of a slab is a row of 128 bytes: 32 lanes of 4 bytes, V channels each. A warp holds the
// same channels all the time and walks over pixels, so that weights and sums stay in registers and
// control flow is the same for all its lanes. Frames come by asynchronous 16-byte copies.
#pragma once

#include <device/launch.cuh>
#include <device/tensor.cuh>

namespace fastst {

constexpr int kTile = 8;   // output (forward) or input (backward) pixels along h and w
constexpr int kRow = 128;  // bytes of a pixel of a slab
constexpr int kChunks = kRow / 16;

template <class T>
constexpr int kVector = 4 / sizeof(T);  // channels of a lane
template <class T>
constexpr int kSlab = kRow / sizeof(T);  // channels of a block

// Pixels that a block holds, along one axis.
template <int K, int S>
struct Extent {
  static constexpr int forward_x = (kTile - 1) * S + K;
  static constexpr int du = (kTile + K - 2) / S + 1;  // that reach a tile of dx
  static constexpr int backward_x = (du - 1) * S + K;
};

template <int K, int S>
constexpr int forward_bytes(int stages) {
  return stages * Extent<K, S>::forward_x * Extent<K, S>::forward_x * kRow;
}

// Warps of the backward kernel: one per row of du, or per two where registers are short.
template <int K, int S>
constexpr int kBackwardWarps = Extent<K, S>::du > 10 ? Extent<K, S>::du / 2 : Extent<K, S>::du;

// x, a ring of the frames of dy that one frame of u touches, and one frame of du; at the end the
// sums of each warp in the same place.
template <class T, int K, int KT, int S>
constexpr int backward_bytes(int stages) {
  constexpr int x = Extent<K, S>::backward_x, du = Extent<K, S>::du;
  const int frames = (stages * x * x + (KT - 1 + stages + 1) * du * du) * kRow;
  const int sums = (K * K + KT + 4) * kBackwardWarps<K, S> * kSlab<T> * 4;
  return frames > sums ? frames : sums;
}

// Which tile, slab, span of frames and clip a block works on.
struct Task {
  int h0, w0, channel0, chunk;
  int64_t n, slot;  // slot: row of partials

  __device__ Task(int tiles_h, int tiles_w, int slabs, int chunks, int slab) {
    int64_t i = blockIdx.x;
    channel0 = static_cast<int>(i % slabs) * slab, i /= slabs, slot = i;
    w0 = static_cast<int>(i % tiles_w) * kTile, i /= tiles_w;
    h0 = static_cast<int>(i % tiles_h) * kTile, i /= tiles_h;
    chunk = static_cast<int>(i % chunks), n = i / chunks;
  }
};

// Starts copying Extent × Extent pixels of one frame, zeros outside of it.
template <int Size, class T>
__device__ void load_frame(Shared<T> to, const Tensor<const T>& from, int64_t n, int t, int h0,
                           int w0, int channel0) {
  const Global<const T> frame = from.data + from.offset(n, t, 0, 0);
  for (int i = threadIdx.x; i < Size * Size * kChunks; i += blockDim.x) {
    const int pixel = i / kChunks, element = i % kChunks * (16 / int(sizeof(T)));
    const int h = h0 + pixel / Size, w = w0 + pixel % Size, c = channel0 + element;
    const bool valid = h >= 0 && h < from.size[3] && w >= 0 && w < from.size[4] && c < from.size[1];
    copy16_async(to + (pixel * kSlab<T> + element),
                 valid ? frame + (h * from.stride[3] + w * from.stride[4] + c) : frame, valid);
  }
}

template <class T>
__device__ void widen_lane(Shared<T> from, float (&to)[kVector<T>]) {
  const auto pack = load<kVector<T>>(from);
#pragma unroll
  for (int v = 0; v < kVector<T>; ++v) to[v] = widen(pack.lane[v]);
}

template <class T>
__device__ Pack<T, kVector<T>> narrow_lane(const float (&from)[kVector<T>]) {
  Pack<T, kVector<T>> pack;
#pragma unroll
  for (int v = 0; v < kVector<T>; ++v) pack.lane[v] = narrow<T>(from[v]);
  return pack;
}

// Per-channel values of a lane; zeros beyond the last channel.
template <class T, class F>
__device__ void per_channel(float (&to)[kVector<T>], int channel, int64_t channels, F value) {
#pragma unroll
  for (int v = 0; v < kVector<T>; ++v) to[v] = channel + v < channels ? value(channel + v) : 0.f;
}

// What both kernels are told of the pair; tiles, chunks and frames are of what a block writes.
template <class T>
struct PairParameters {
  Tensor<const T> x, spatial_weight, temporal_weight;
  Global<const float> spatial_bias, temporal_bias;
  Coefficients<float> norm;
  int tiles_h, tiles_w, slabs, chunks;
  int stride_t, pad_t, pad_h, pad_w;
  int frames_per_block, stages;
  Activation act;
  float slope;

  PairParameters() = default;
  PairParameters(const Depthwise& d, int64_t frames, int64_t height, int64_t width)
      : x(d.x),
        spatial_weight(d.spatial_weight),
        temporal_weight(d.temporal_weight),
        spatial_bias(global<const float>(d.spatial_bias.data, d.spatial_bias.count)),
        temporal_bias(global<const float>(d.temporal_bias.data, d.temporal_bias.count)),
        norm(d.coefficients),
        tiles_h(int(divide_up(height, kTile))),
        tiles_w(int(divide_up(width, kTile))),
        slabs(int(divide_up(d.x.size[1], kSlab<T>))),
        chunks(int(divide_up(frames, d.frames_per_block))),
        stride_t(int(d.stride[0])),
        pad_t(int(d.padding[0])),
        pad_h(int(d.padding[2])),
        pad_w(int(d.padding[4])),
        frames_per_block(int(d.frames_per_block)),
        stages(int(d.stages)),
        act(d.act),
        slope(float(d.slope)) {}

  // Blocks of the launch. Throws std::runtime_error, naming the kernel, where a grid has no room.
  unsigned grid(const char* kernel) const {
    const int64_t blocks = x.size[0] * chunks * tiles_h * tiles_w * slabs;
    if (blocks > kMaxGridX) throw std::runtime_error(std::string(kernel) + ": too large a problem");
    return static_cast<unsigned>(blocks);
  }
};

// What a lane keeps of its channels, in registers; zeros beyond the last channel.
template <class T, int K, int KT>
struct ChannelConstants {
  static constexpr int V = kVector<T>;
  float ws[K * K][V], wt[KT][V], spatial_bias[V], mean[V], scale[V], beta[V];

  __device__ ChannelConstants(const PairParameters<T>& p, int channel) {
    const int64_t channels = p.x.size[1];
    const auto weight = [&](const Tensor<const T>& w, int kt, int kh, int kw, float (&to)[V]) {
      per_channel<T>(to, channel, channels, [&](int c) {
        return widen(w.data[c * w.stride[0] + w.offset(0, kt, kh, kw)]);
      });
    };
    const auto coefficient = [&](float (&to)[V], float missing, auto value) {
      per_channel<T>(to, channel, channels,
                     [&](int c) { return p.norm.data ? value(c) : missing; });
    };
#pragma unroll
    for (int k = 0; k < K * K; ++k) weight(p.spatial_weight, 0, k / K, k % K, ws[k]);
#pragma unroll
    for (int k = 0; k < KT; ++k) weight(p.temporal_weight, k, 0, 0, wt[k]);
    per_channel<T>(spatial_bias, channel, channels,
                   [&](int c) { return p.spatial_bias ? p.spatial_bias[c] : 0.f; });
    coefficient(mean, 0.f, [&](int c) { return p.norm.mean(c); });
    coefficient(scale, 1.f, [&](int c) { return p.norm.scale(c); });
    coefficient(beta, 0.f, [&](int c) { return p.norm.beta(c); });
  }
};

template <int Value>
struct Constant {
  static constexpr int value = Value;
};

// Calls f with the kernel sizes and the stride as constants, for those that are compiled.
template <class F>
auto with_depthwise(int64_t kernel, int64_t temporal_kernel, int64_t stride, F f) {
  const auto with_stride = [&](auto k, auto kt) {
    if (stride == 1) return f(k, kt, Constant<1>{});
    if (stride == 2) return f(k, kt, Constant<2>{});
    throw std::invalid_argument("depthwise kernels have a spatial stride of 1 or 2");
  };
  if (kernel == 3 && temporal_kernel == 3) return with_stride(Constant<3>{}, Constant<3>{});
  if (kernel == 3 && temporal_kernel == 5) return with_stride(Constant<3>{}, Constant<5>{});
  if (kernel == 5 && temporal_kernel == 3) return with_stride(Constant<5>{}, Constant<3>{});
  if (kernel == 5 && temporal_kernel == 5) return with_stride(Constant<5>{}, Constant<5>{});
  throw std::invalid_argument("depthwise kernels are 3 or 5 in space and in time");
}

template <class F>
void with_depthwise_type(Dtype dtype, F f) {
  with_type(dtype, [&](auto element) {
    if constexpr (sizeof(element) <= 4)
      f(element);
    else
      throw std::invalid_argument("depthwise kernels are for float16, bfloat16 and float32");
  });
}

}  // namespace fastst
