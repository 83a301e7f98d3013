// Gradients of the depthwise pair in one pass over x and dy; u is computed again from x.
//
// A block owns 8×8 pixels of dx of one slab and walks over time. For each frame it computes du at
// the pixels of u that reach its tile (K − 1 more along each axis, so neighbours compute some of
// them too) into shared memory, and from there dx. Weight gradients count a pixel of u once, in the
// block that owns it, and leave as one row of partials per block.
#include <depthwise/slab.cuh>

namespace fastst {
namespace {

template <class T>
struct Parameters : PairParameters<T> {
  using PairParameters<T>::PairParameters;
  Tensor<const T> dy;
  Tensor<T> dx;  // may be absent
  Global<float> partials;
};

__device__ inline int ceiling(int a, int b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }
__device__ inline int clamp(int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; }

template <class T, int K, int KT, int S>
__global__ void __launch_bounds__(kBackwardWarps<K, S> * 32, 1)
    depthwise_backward_kernel(const __grid_constant__ Parameters<T> p) {
  constexpr int V = kVector<T>, kX = Extent<K, S>::backward_x, kDu = Extent<K, S>::du;
  constexpr int kWarps = kBackwardWarps<K, S>, kSums = K * K + KT + 4;
  const Task task(p.tiles_h, p.tiles_w, p.slabs, p.chunks, kSlab<T>);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int channel = task.channel0 + lane * V;
  const int64_t channels = p.x.size[1];
  const int frames = int(p.x.size[2]), height = int(p.x.size[3]), width = int(p.x.size[4]);
  const int frames_out = int(p.dy.size[2]), height_out = int(p.dy.size[3]);
  const int width_out = int(p.dy.size[4]);
  // First pixel of du that reaches the tile, and the first of x that it reads.
  const int oh0 = ceiling(task.h0 + p.pad_h - (K - 1), S);
  const int ow0 = ceiling(task.w0 + p.pad_w - (K - 1), S);
  const int xh0 = oh0 * S - p.pad_h, xw0 = ow0 * S - p.pad_w;

  // Shared memory: frames of x, a ring of frames of dy, one frame of du.
  const int slots = KT - 1 + p.stages;
  const auto x_stage = [&](int t) { return shared<T>(t % p.stages * kX * kX * kRow); };
  const auto dy_slot = [&](int i) {
    return shared<T>((p.stages * kX * kX + i % slots * kDu * kDu) * kRow);
  };
  const Shared<T> du_tile = shared<T>((p.stages * kX * kX + slots * kDu * kDu) * kRow);
  const auto load_dy = [&](int i) {
    load_frame<kDu>(dy_slot(i), p.dy, task.n, i, oh0, ow0, task.channel0);
  };
  // Frame t of x, and the frame of dy that frame t of u is the first to need.
  const auto issue = [&](int t) {
    load_frame<kX>(x_stage(t), p.x, task.n, t, xh0, xw0, task.channel0);
    const int step = t + p.pad_t;
    if (step % p.stride_t == 0 && step / p.stride_t < frames_out) load_dy(step / p.stride_t);
    copy_commit();
  };

  const ChannelConstants<T, K, KT> own(p, channel);
  float norm_p[V], norm_q[V];
  per_channel<T>(norm_p, channel, channels, [&](int c) { return p.norm.data ? p.norm.p(c) : 0.f; });
  per_channel<T>(norm_q, channel, channels, [&](int c) { return p.norm.data ? p.norm.q(c) : 0.f; });

  float dws[K * K][V] = {}, dwt[KT][V] = {}, sum_du[V] = {}, sum_dy[V] = {};
  float sum_dv[V] = {}, sum_dv_u[V] = {};

  const int begin = task.chunk * p.frames_per_block;
  const int end = min(begin + p.frames_per_block, frames);
  for (int i = max(0, ceiling(begin + p.pad_t - (KT - 1), p.stride_t));
       i < frames_out && i * p.stride_t < begin + p.pad_t; ++i)
    load_dy(i);
  if (p.stages == 2) issue(begin);
  for (int t = begin; t < end; ++t) {
    if (p.stages == 1) {
      sync_block();  // all have read the frame before
      issue(t);
    }
    copy_wait<0>();
    sync_block();
    if (p.stages == 2 && t + 1 < end) issue(t + 1);

    const Shared<T> x = x_stage(t);
    for (int r = warp; r < kDu; r += kWarps) {
      const int oh = oh0 + r;
      const bool counted_row =
          oh >= 0 && oh < height_out && clamp(oh * S - p.pad_h, height) / kTile * kTile == task.h0;
#pragma unroll 1
      for (int j = 0; j < kDu; ++j) {
        const int ow = ow0 + j, at = (r * kDu + j) * kSlab<T> + lane * V;
        float du[V] = {};
        if (oh >= 0 && oh < height_out && ow >= 0 && ow < width_out) {
          const bool counted =
              counted_row && clamp(ow * S - p.pad_w, width) / kTile * kTile == task.w0;
          float in[K * K][V], u[1][V];
#pragma unroll
          for (int v = 0; v < V; ++v) u[0][v] = own.spatial_bias[v];
#pragma unroll
          for (int k = 0; k < K * K; ++k) {
            const int pixel = (r * S + k / K) * kX + j * S + k % K;
            widen_lane(x + (pixel * kSlab<T> + lane * V), in[k]);
#pragma unroll
            for (int v = 0; v < V; ++v) u[0][v] += in[k][v] * own.ws[k][v];
          }
          float z[1][V], slope[1][V], dz[V] = {};
#pragma unroll
          for (int v = 0; v < V; ++v)
            z[0][v] = slope[0][v] = (u[0][v] - own.mean[v]) * own.scale[v] + own.beta[v];
          activate_all(p.act, p.slope, z);
          activate_gradient_all(p.act, p.slope, slope);
#pragma unroll
          for (int k = 0; k < KT; ++k) {
            const int step = t + p.pad_t - k;  // i·stride of the output that reads t through tap k
            if (step < 0 || step % p.stride_t || step / p.stride_t >= frames_out) continue;
            float dy[V];
            widen_lane(dy_slot(step / p.stride_t) + at, dy);
#pragma unroll
            for (int v = 0; v < V; ++v) {
              dz[v] += own.wt[k][v] * dy[v];
              if (counted) dwt[k][v] += z[0][v] * dy[v];
              // Each frame of dy once: where it starts, or in the first frame if that is padding.
              if (counted && (k == 0 || t == 0)) sum_dy[v] += dy[v];
            }
          }
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float dv = dz[v] * slope[0][v], centred = u[0][v] - own.mean[v];
            du[v] = own.scale[v] * dv + norm_p[v] * centred + norm_q[v];
            if (counted) sum_dv[v] += dv, sum_dv_u[v] += dv * centred, sum_du[v] += du[v];
          }
          if (counted) {
#pragma unroll
            for (int k = 0; k < K * K; ++k)
#pragma unroll
              for (int v = 0; v < V; ++v) dws[k][v] += in[k][v] * du[v];
          }
        }
        store(du_tile + at, narrow_lane<T>(du));
      }
    }
    if (!p.dx.data) continue;
    sync_block();
    for (int r = warp; r < kTile; r += kWarps) {
      const int h = task.h0 + r;
      if (h >= height || channel >= channels) continue;
#pragma unroll 1
      for (int j = 0; j < kTile && task.w0 + j < width; ++j) {
        float dx[V] = {};
#pragma unroll
        for (int k = 0; k < K * K; ++k) {
          const int step_h = h + p.pad_h - k / K, step_w = task.w0 + j + p.pad_w - k % K;
          if (step_h % S || step_w % S) continue;
          const int pixel = (step_h / S - oh0) * kDu + step_w / S - ow0;
          float du[V];
          widen_lane(du_tile + (pixel * kSlab<T> + lane * V), du);
#pragma unroll
          for (int v = 0; v < V; ++v) dx[v] += own.ws[k][v] * du[v];
        }
        const int64_t at = p.dx.offset(task.n, t, h, task.w0 + j) + channel;
        store(p.dx.data + at, narrow_lane<T>(dx));
      }
    }
  }

  // Sums of the warps, then one row of partials: (kSums, kWarps, slab) in place of the frames.
  sync_block();
  const Shared<float> sums = shared<float>(0);
  const auto put = [&](int q, const float (&values)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) sums[(q * kWarps + warp) * kSlab<T> + lane * V + v] = values[v];
  };
#pragma unroll
  for (int k = 0; k < K * K; ++k) put(k, dws[k]);
#pragma unroll
  for (int k = 0; k < KT; ++k) put(K * K + k, dwt[k]);
  put(K * K + KT, sum_du);
  put(K * K + KT + 1, sum_dy);
  put(K * K + KT + 2, sum_dv);
  put(K * K + KT + 3, sum_dv_u);
  sync_block();
  for (int i = threadIdx.x; i < kSums * kSlab<T>; i += kWarps * 32) {
    const int q = i / kSlab<T>, c = i % kSlab<T>;
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += sums[(q * kWarps + w) * kSlab<T> + c];
    if (task.channel0 + c < channels)
      p.partials[(task.slot * kSums + q) * channels + task.channel0 + c] = sum;
  }
}

template <class T, int K, int KT, int S>
void run(const Depthwise& d, const View& dy, const std::optional<View>& dx, Array partials,
         Stream stream) {
  Parameters<T> p(d, d.x.size[2], d.x.size[3], d.x.size[4]);
  p.dy = Tensor<const T>(dy);
  if (dx) p.dx = Tensor<T>(*dx);
  p.partials = global<float>(partials.data, partials.count);
  launch("depthwise_backward", depthwise_backward_kernel<T, K, KT, S>,
         dim3(p.grid("depthwise_backward")), dim3(kBackwardWarps<K, S> * 32),
         backward_bytes<T, K, KT, S>(p.stages), stream, "x " + shape(d.x), p);
}

}  // namespace

void depthwise_backward(Dtype dtype, const Depthwise& d, const View& dy, std::optional<View> dx,
                        Array partials, Stream stream) {
  with_depthwise_type(dtype, [&](auto element) {
    with_depthwise(d.spatial_weight.size[3], d.temporal_weight.size[2], d.stride[1],
                   [&](auto k, auto kt, auto s) {
                     run<decltype(element), k.value, kt.value, s.value>(d, dy, dx, partials,
                                                                        stream);
                     return 0;
                   });
  });
}

}  // namespace fastst
