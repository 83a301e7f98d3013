// What bindings.cpp calls and each .cu file implements. No CUDA and no Python in here.
//
// Every tensor comes as a View in the order (N, C, T, H, W), whatever its layout. Per-channel and
// partial results are dense arrays in the accumulation type: double for f64, else float.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace fastst {

enum class Dtype { f16, bf16, f32, f64 };
enum class Activation { none, relu, silu, gelu, gelu_tanh, leaky_relu, hardswish };
enum class PadMode { zeros, replicate, reflect, circular };

struct View {
  void* data = nullptr;
  std::array<int64_t, 5> size{}, stride{};  // (N, C, T, H, W), in elements

  int64_t count() const { return size[0] * size[1] * size[2] * size[3] * size[4]; }
  int64_t span() const {  // elements from the first to the last
    if (count() == 0) return 0;
    int64_t n = 1;
    for (int i = 0; i < 5; ++i) n += (size[i] - 1) * stride[i];
    return n;
  }
};

struct Array {
  void* data = nullptr;
  int64_t count = 0;
};

struct Conv {
  std::array<int64_t, 3> kernel, stride, dilation;  // t, h, w
  std::array<int64_t, 6> padding;                   // before and after, of t, h, w
  int64_t groups;
  PadMode mode;
};

// What a convolution reads for element e of channel c, as a function of stored tensors a and b.
enum class Read {
  plain,          // a
  norm_act,       // act((a − mean)·scale + shift)
  norm_gradient,  // scale·a + p·(b − mean) + q
};

struct Source {
  View a;
  std::optional<View> b;  // u, for norm_gradient
  Array coefficients;     // (5, C): mean, scale, shift, p, q; not used by plain
  Read read;
  Activation act;
  double slope;
};

struct Branch {
  Source source;
  View weight;  // (out, in/groups, kt, kh, kw)
  Array bias;   // (out,) or none
  Conv conv;
  Activation act;
};

// What a tap convolution writes, from the values v_i of its branches with act_i.
enum class Write {
  forward,          // out_0 = act(Σ act_i(v_i))
  branch_gradient,  // out_i = aux·act'(Σ act_i(v_i))·act_i'(v_i), aux = dy
  norm_gradient,    // out_0 = Σ v_i · act'((aux − mean)·scale + shift), aux = u
};

struct TapConv {
  std::vector<Branch> branches;  // one or two
  std::vector<View> out;
  std::optional<View> aux;
  Array coefficients;
  Write write;
  Activation act;
  double slope;
  bool transposed;  // input gradient: sources are output gradients, out is shaped as the input
};

// A depthwise pair, spatial first: channels of every view are neighbours in memory, in 16-byte
// rows.
struct Depthwise {
  View x, spatial_weight, temporal_weight;
  Array spatial_bias, temporal_bias, coefficients;
  std::array<int64_t, 3> stride;
  std::array<int64_t, 6> padding;
  Activation act;
  double slope;
  int64_t frames_per_block;  // output frames forward, mid frames backward
  int64_t stages;            // of the pipeline that loads frames: 2, or 1 to save shared memory
};

using Stream = uintptr_t;  // a cudaStream_t

void tap_conv(Dtype, const TapConv&, Stream);

// partials (splits, out, in/groups, kt, kh, kw) of the weight gradient.
void weight_gradient(Dtype, const Source& x, const Source& dy, const Conv&, View weight,
                     Array partials, int64_t splits, Stream);

// partials (splits, 3, C): count, mean and sum of squared deviations.
void channel_statistics(Dtype, const View& u, Array partials, int64_t splits, Stream);
// partials (splits, 2, C): Σ s and Σ s·(u − mean); the second only with u.
void channel_sums(Dtype, const Source& s, std::optional<View> u, Array partials, int64_t splits,
                  Stream);
// (rows, columns) → (columns,)
void sum_rows(Dtype, Array partials, Array out, int64_t rows, Stream);
// (splits, 3, C) → mean (C,) and biased variance (C,)
void combine_statistics(Dtype, Array partials, Array mean, Array var, int64_t splits, Stream);
// Rows mean, scale, shift of the coefficients; p and q become 0.
void norm_coefficients(Dtype, Array mean, Array var, Array gamma, Array beta, double eps,
                       Array coefficients, Stream);
// Rows p and q from sums (2, C), for statistics over `count` values; and dgamma (C,).
void norm_gradient_coefficients(Dtype, Array sums, Array var, double eps, double count, bool batch,
                                Array dgamma, Array coefficients, Stream);

// What is absent is not computed. partials (blocks, 3, C): statistics of u.
void depthwise_forward(Dtype, const Depthwise&, std::optional<View> y, std::optional<View> u,
                       std::array<int64_t, 3> out_size, Array partials, Stream);
// partials (blocks, kh·kw + kt + 4, C): gradients of the spatial and the temporal weight, Σdu, Σdy,
// Σdv and Σdv·(u − mean).
void depthwise_backward(Dtype, const Depthwise&, const View& dy, std::optional<View> dx,
                        Array partials, Stream);
// Blocks that share no channel, which is the number of rows of partials.
int64_t depthwise_blocks(const View& x, std::array<int64_t, 3> out_size, int64_t frames_per_block,
                         bool backward);
int64_t depthwise_shared_bytes(int64_t kernel, int64_t temporal_kernel, int64_t stride,
                               int64_t stages, bool backward);

}  // namespace fastst
