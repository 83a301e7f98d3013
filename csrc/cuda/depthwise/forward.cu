// Depthwise pair, spatial first: y = conv_t(act(norm(conv_s(x)))) in one pass over x.
//
// A block owns 8×8 output pixels of one slab and walks over time; warp r holds row r. Each frame of
// x comes into shared memory while the one before is worked on; its z joins a window of the last KT
// frames in registers, from which y is retired. Frames outside of the clip are zeros of z.
#include <depthwise/slab.cuh>

namespace fastst {
namespace {

constexpr int kThreads = kTile * 32;

template <class T>
struct Parameters : PairParameters<T> {
  using PairParameters<T>::PairParameters;
  Tensor<T> y, u;  // either may be absent
  Global<float> partials;
  int frames_out, height, width;
};

// Statistics of one channel: count, mean, sum of squared deviations.
struct Moments {
  float count = 0.f, mean = 0.f, m2 = 0.f;

  __device__ void merge(float n, float other_mean, float other_m2) {
    if (n == 0.f) return;
    const float delta = other_mean - mean, share = n / (count + n);
    mean += delta * share;
    m2 += other_m2 + delta * delta * count * share;
    count += n;
  }
};

// Two blocks to a multiprocessor where 128 registers hold the window and the weights: not for two
// channels to a lane.
template <class T, int K, int KT>
constexpr int kBlocks = KT == 3 && kVector<T> == 1 ? 2 : 1;

template <class T, int K, int KT, int S>
__global__ void __launch_bounds__(kThreads, (kBlocks<T, K, KT>))
    depthwise_forward_kernel(const __grid_constant__ Parameters<T> p) {
  constexpr int V = kVector<T>, kSize = Extent<K, S>::forward_x;
  const Task task(p.tiles_h, p.tiles_w, p.slabs, p.chunks, kSlab<T>);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
  const int channel = task.channel0 + lane * V, h = task.h0 + row;
  const int64_t channels = p.x.size[1];
  const bool mine = channel < channels && h < p.height;
  const auto stage = [&](int t) { return shared<T>((t % p.stages) * kSize * kSize * kRow); };
  const auto issue = [&](int t) {
    load_frame<kSize>(stage(t), p.x, task.n, t, task.h0 * S - p.pad_h, task.w0 * S - p.pad_w,
                      task.channel0);
    copy_commit();
  };

  const ChannelConstants<T, K, KT> own(p, channel);
  float temporal_bias[V];
  per_channel<T>(temporal_bias, channel, channels,
                 [&](int c) { return p.temporal_bias ? p.temporal_bias[c] : 0.f; });

  // Output frames [first, last) of this block; it owns the frames of u from where its first output
  // starts to read to where the next block's does.
  const int frames = static_cast<int>(p.x.size[2]);
  const int first = task.chunk * p.frames_per_block;
  const int last = min(first + p.frames_per_block, p.frames_out);
  const bool at_end = task.chunk == p.chunks - 1;
  const int begin = first * p.stride_t - p.pad_t;
  const int reach = (last - 1) * p.stride_t - p.pad_t + KT;
  const int end = at_end ? max(reach, frames) : reach;
  const int owned_from = task.chunk == 0 ? 0 : begin;
  const int owned_to = at_end ? frames : last * p.stride_t - p.pad_t;

  float window[KT - 1][kTile][V] = {};  // z of the frames before
  Moments moments[V];
  if (p.stages == 2 && max(begin, 0) < min(end, frames)) issue(max(begin, 0));
  for (int t = begin; t < end; ++t) {
    float z[kTile][V] = {};
    if (t >= 0 && t < frames) {
      if (p.stages == 1) {
        sync_block();  // all have read the frame before
        issue(t);
      }
      copy_wait<0>();
      sync_block();
      if (p.stages == 2 && t + 1 < min(end, frames)) issue(t + 1);

      const Shared<T> x = stage(t);
#pragma unroll
      for (int j = 0; j < kTile; ++j)
#pragma unroll
        for (int v = 0; v < V; ++v) z[j][v] = own.spatial_bias[v];
#pragma unroll
      for (int kh = 0; kh < K; ++kh) {
        float in[kSize][V];
#pragma unroll
        for (int j = 0; j < kSize; ++j)
          widen_lane(x + (((row * S + kh) * kSize + j) * kSlab<T> + lane * V), in[j]);
#pragma unroll
        for (int kw = 0; kw < K; ++kw)
#pragma unroll
          for (int j = 0; j < kTile; ++j)
#pragma unroll
            for (int v = 0; v < V; ++v) z[j][v] += in[j * S + kw][v] * own.ws[kh * K + kw][v];
      }
      if (t >= owned_from && t < owned_to && mine) {
        if (p.u.data) {
          const int64_t at = p.u.offset(task.n, t, h, task.w0) + channel;
#pragma unroll
          for (int j = 0; j < kTile; ++j)
            if (task.w0 + j < p.width)
              store(p.u.data + (at + j * p.u.stride[4]), narrow_lane<T>(z[j]));
        }
        if (p.partials) {
          const float n = static_cast<float>(min(kTile, p.width - task.w0));
#pragma unroll
          for (int v = 0; v < V; ++v) {
            float sum = 0.f, m2 = 0.f;
#pragma unroll
            for (int j = 0; j < kTile; ++j) sum += task.w0 + j < p.width ? z[j][v] : 0.f;
#pragma unroll
            for (int j = 0; j < kTile; ++j) {
              const float delta = z[j][v] - sum / n;
              m2 += task.w0 + j < p.width ? delta * delta : 0.f;
            }
            moments[v].merge(n, sum / n, m2);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kTile; ++j)
#pragma unroll
        for (int v = 0; v < V; ++v) z[j][v] = (z[j][v] - own.mean[v]) * own.scale[v] + own.beta[v];
      activate_all(p.act, p.slope, z);
    }
    if (!p.y.data) continue;
    const int step = t + p.pad_t - (KT - 1);  // i·stride of the output whose last tap is t
    const bool due = step >= first * p.stride_t && step < last * p.stride_t;
    if (due && step % p.stride_t == 0 && mine) {
      const int64_t at = p.y.offset(task.n, step / p.stride_t, h, task.w0) + channel;
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        float sum[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          sum[v] = temporal_bias[v] + z[j][v] * own.wt[KT - 1][v];
#pragma unroll
          for (int k = 0; k + 1 < KT; ++k) sum[v] += window[k][j][v] * own.wt[k][v];
        }
        if (task.w0 + j < p.width) store(p.y.data + (at + j * p.y.stride[4]), narrow_lane<T>(sum));
      }
    }
#pragma unroll
    for (int j = 0; j < kTile; ++j)
#pragma unroll
      for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int k = 0; k + 2 < KT; ++k) window[k][j][v] = window[k + 1][j][v];
        window[KT - 2][j][v] = z[j][v];
      }
  }

  if (!p.partials) return;
  sync_block();  // the last frame has been read; its place takes the rows' statistics
  const Shared<Moments> rows = shared<Moments>(0);  // (kTile, slab)
#pragma unroll
  for (int v = 0; v < V; ++v) rows[row * kSlab<T> + lane * V + v] = moments[v];
  sync_block();
  if (row != 0 || channel >= channels) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    Moments all;
    for (int r = 0; r < kTile; ++r) {
      const Moments part = rows[r * kSlab<T> + lane * V + v];
      all.merge(part.count, part.mean, part.m2);
    }
    const int64_t at = task.slot * 3 * channels + channel + v;
    p.partials[at] = all.count;
    p.partials[at + channels] = all.mean;
    p.partials[at + 2 * channels] = all.m2;
  }
}

template <class T, int K, int KT, int S>
void run(const Depthwise& d, const std::optional<View>& y, const std::optional<View>& u,
         const std::array<int64_t, 3>& out_size, Array partials, Stream stream) {
  Parameters<T> p(d, out_size[0], out_size[1], out_size[2]);
  if (y) p.y = Tensor<T>(*y);
  if (u) p.u = Tensor<T>(*u);
  p.partials = global<float>(partials.data, partials.count);
  p.frames_out = int(out_size[0]), p.height = int(out_size[1]), p.width = int(out_size[2]);
  launch("depthwise_forward", depthwise_forward_kernel<T, K, KT, S>,
         dim3(p.grid("depthwise_forward")), dim3(kThreads), forward_bytes<K, S>(p.stages), stream,
         "x " + shape(d.x), p);
}

}  // namespace

int64_t depthwise_blocks(const View& x, std::array<int64_t, 3> out_size, int64_t frames_per_block,
                         bool backward) {
  // Backward tiles dx and walks over frames of u; forward tiles y and walks over its frames.
  const int64_t frames = backward ? x.size[2] : out_size[0];
  const int64_t h = backward ? x.size[3] : out_size[1], w = backward ? x.size[4] : out_size[2];
  return x.size[0] * divide_up(frames, frames_per_block) * divide_up(h, kTile) *
         divide_up(w, kTile);
}

int64_t depthwise_shared_bytes(int64_t kernel, int64_t temporal_kernel, int64_t stride,
                               int64_t stages, bool backward) {
  return with_depthwise(kernel, temporal_kernel, stride, [&](auto k, auto kt, auto s) {
    // Two channels to a lane need the most.
    return backward ? backward_bytes<__half, k.value, kt.value, s.value>(int(stages))
                    : forward_bytes<k.value, s.value>(int(stages));
  });
}

void depthwise_forward(Dtype dtype, const Depthwise& d, std::optional<View> y,
                       std::optional<View> u, std::array<int64_t, 3> out_size, Array partials,
                       Stream stream) {
  with_depthwise_type(dtype, [&](auto element) {
    with_depthwise(d.spatial_weight.size[3], d.temporal_weight.size[2], d.stride[1],
                   [&](auto k, auto kt, auto s) {
                     run<decltype(element), k.value, kt.value, s.value>(d, y, u, out_size, partials,
                                                                        stream);
                     return 0;
                   });
  });
}

}  // namespace fastst
