// What bindings.cpp calls and each .cu file implements. No CUDA and no Python in here.
#pragma once

#include <common/api.h>

#include <vector>

namespace fastst {

enum class Dtype { f16, bf16, f32, f64 };

struct Branch {
  Source source;
  View weight;  // (out, in/groups, kt, kh, kw)
  Array bias;   // (out,) or none
  Conv conv;
  Activation act;
};

struct TapConv {
  std::vector<Branch> branches;  // one or two
  std::vector<View> out;
  std::optional<Source> aux;
  Write write;
  Activation act;
  double slope;
  bool transposed;  // input gradient: sources are output gradients, out is shaped as the input
  std::array<int64_t, 2> around;  // frames of that input before and after those of out
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

// What a Hopper pass makes of its sums: out = act(sum·scale + shift + residual).
struct HopperOutput {
  View out;  // channels-last, stored channels a multiple of 8: zeros from `channels` on
  std::optional<View> residual;  // channels are neighbours
  Array affine;                  // (2, whole tiles of columns): scale, shift
  Array partials;                // (grid·consuming warps, 3, channels), or none
  int64_t channels;
  Activation act;
  double slope;
};

struct HopperTile {
  int64_t columns;             // output channels of a tile
  int64_t groups;              // warpgroups that share a tile: 2; spatial: or 1, by turns
  int64_t blocks;              // of 64 × columns sums that each of them has
  std::array<int64_t, 3> box;  // positions of a tile: spatial frames, rows, columns of the output;
                               // temporal clips, output frames, pixels
  int64_t share;               // spatial: vertical taps that one box of x serves, 1 or all
  int64_t stages;              // of shared memory
  int64_t grid;                // blocks, which walk over the tiles
  int64_t cluster;  // blocks that copy the weights to each other: 1 or 2; grid has whole ones
};

struct HopperSpatial {
  View x;        // channels-last, frames of all clips evenly apart
  Array weight;  // (tiles of columns, ⌈C/64⌉, kw, kh, columns, 64)
  Conv conv;
  HopperOutput output;
  HopperTile tile;
};

struct HopperGradientTile {
  int64_t columns;             // channels of dx
  int64_t blocks;              // outputs of a cell: a warpgroup has 64 × columns sums of each
  std::array<int64_t, 3> box;  // cells: frames, rows, columns
  int64_t stages;              // boxes of du in shared memory
  int64_t grid;                // blocks, which walk over the tiles
  int64_t cluster;             // blocks that copy the weights to each other: 1 or 2
};

// dx from du = g + p·u + r inside of the frame, the gradient of conv's output; g = s·dv.
struct HopperSpatialGradient {
  View g;                 // channels-last, frames of all clips evenly apart
  std::optional<View> u;  // laid out as g; none: du = g
  Array affine;           // (2, ⌈M/64⌉·64): r, p; only with u
  Array weight;           // (tiles of columns, ⌈M/64⌉, kw, kh, columns, 64), taps mirrored
  Conv conv;
  View out;  // channels-last, channels a multiple of 8
  HopperGradientTile tile;
};

struct HopperTemporal {
  View u;              // channels-last, pixels evenly apart
  Array weight;        // (tiles of columns, ⌈M/64⌉, kt, columns, 64)
  Conv conv;           // padding mode zeros or replicate
  Array coefficients;  // (2, ⌈M/64⌉·64): z = act(scale·u + shift); none: z = u
  Activation act;
  double slope;
  HopperOutput output;
  HopperTile tile;
};

// dv = act'(v)·(input gradient of conv), v = (u − mean)·scale + beta; out = factor·dv.
struct HopperTemporalGradient {
  View dy;       // channels-last, pixels evenly apart
  Array weight;  // (tiles of columns, ⌈K/64⌉, kt, columns, 64), taps mirrored
  Conv conv;     // padding mode zeros
  View out;      // channels-last, stored channels a multiple of 8: zeros from `channels` on
  std::optional<View> u;  // laid out as out; none: act' is 1
  Array coefficients;     // (4, whole tiles of columns): mean, scale, beta, factor
  Array partials;         // (grid·consuming warps, 2, channels): Σdv, Σdv·(u − mean), or none
  int64_t channels;
  Activation act;
  double slope;
  HopperTile tile;
};

struct HopperWeightTile {
  int64_t columns;             // mid channels of a block
  int64_t units;               // of 64 × columns sums, each of one tap, that a warpgroup has
  int64_t blocks;              // of 64 channels of other
  std::array<int64_t, 3> box;  // mid positions of a tile: spatial columns, rows, frames of all
                               // clips; temporal pixels, frames (of one residue), clips
  int64_t stages;              // of shared memory
  int64_t splits;              // parts of the positions
};

// Of a spatial pass mid is du and other x; of a temporal one, mid is z and other dy.
struct HopperWeightGradient {
  View mid;               // channels-last, channels a multiple of 8
  std::optional<View> u;  // shaped as mid
  View other;             // channels-last; narrow: 8 channels
  Conv conv;
  bool temporal, narrow;  // narrow: rows of dW are (8 taps of a row of the kernel, 8 channels)
  Array coefficients;     // (3, mid channels or more): scale, shift and second of what multiplies,
                          // act(scale·mid + second·u + shift); none: mid
  Activation act;
  double slope;
  Array partials;  // (splits, taps, channels of other, channels of mid)
  Array sums;      // (splits, channels of other): Σ other, or none; temporal
  int64_t tap;     // that leads to every position of other, for the sums
  HopperWeightTile tile;
};

// 1 × 7 × 7 of stride 2 on up to 4 channels, then 3 × 1 × 1; at most 48 and 64 channels out.
struct HopperStem {
  View x;                 // of any strides
  Array spatial_weight;   // (4, 48, 64): of every 64 (kh, kw, c) of 8 × 8 × 4, zeros where there is
                          // none
  Array temporal_weight;  // (3, 64, 64): taps, K, M; none: the output is u
  std::array<int64_t, 6> padding;
  Array coefficients;  // (2, 48): z = act(scale·conv(x) + shift)
  Activation act;
  double slope;
  HopperOutput output;
  int64_t piece;  // frames of the output that a warpgroup makes at a time
  int64_t grid;
};

// ---- what the kernels above read besides tensors, made ready by one launch

// (channels,) in a dtype of its own, or none.
struct PerChannel {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
};

// A norm of u: v = gamma·(u − mean)/√(var + eps) + beta; without a variance v = u. bias: what a
// convolution adds to its sums before.
struct Norm {
  PerChannel mean, var, gamma, beta, bias;
  double eps = 0;
  int64_t channels = 0;
};

// Of v = scale·u + shift, and with a bias of scale·u + biased; of
// du = scale·dv + p·u + r = scale·dv + p·(u − mean) + q.
enum class Row { zero, one, mean, scale, beta, shift, biased, p, q, r };

struct Table {
  Norm norm;
  Array out;  // (rows, columns): zeros from the norm's channels on
  std::vector<Row> rows;
};

// How rows of 64 elements of the reduction are made of a weight (O, I, kt, kh, kw).
enum class Order {
  forward,   // (tiles of columns O, ⌈I/64⌉, kw, kh or kt, columns, 64)
  mirrored,  // (tiles of columns I, ⌈O/64⌉, kw, kh or kt, columns, 64), taps from the last on
  stem,      // (tiles of columns O, 4, columns, 64): of 8 × 8 × 4 (kh, kw, I)
};

struct Packing {
  View weight;
  Array packed;  // zeros where there is no element
  int64_t columns;
  Order order;
};

using Stream = uintptr_t;  // a cudaStream_t

void tap_conv(Dtype, const TapConv&, Stream);

// partials (splits, out, in/groups, kt, kh, kw) of the weight gradient.
void weight_gradient(Dtype, const Source& x, const Source& dy, const Conv&, View weight,
                     Array partials, int64_t splits, Stream);

// partials (splits, 3, sets, C): count, mean and sum of squared deviations, of as many positions in
// each set: of all clips, of a clip or of a frame.
void channel_statistics(Dtype, const View& u, Array partials, int64_t splits, int64_t sets, Stream);
// partials (splits, 2, sets, C): Σ s and Σ s·(u − mean), or Σ s·x̂ with values of positions, by the
// norm of `u`; the second only with u.
void channel_sums(Dtype, const Source& s, const std::optional<Source>& u, Array partials,
                  int64_t splits, int64_t sets, Stream);
// Each (N·T·H·W,): mean of the channels of u, and their mean square around it; around 0 with no
// mean.
void position_moments(Dtype, const View& u, Array mean, Array var, Stream);
// out (2, N·T·H·W): means over the channels of scale·dv, or 0 if not centred, and of scale·dv·x̂, by
// the norm of `u`.
void position_sums(Dtype, const View& dv, const Source& u, bool centred, Array out, Stream);
// out = what is read; out may be a.
void write_source(Dtype, const Source&, const View& out, Stream);
// Each (rows, columns) → (columns,)
struct RowSum {
  Array partials, out;
  int64_t rows;
};
void sum_rows(Dtype, const std::vector<RowSum>&, Stream);
// (splits, 3, C) → mean (C,) and biased variance (C,), and tables whose norms take these.
void combine_statistics(Dtype, Array partials, Array mean, Array var, int64_t splits,
                        const std::vector<Table>&, Stream);
// Packed weights and tables, at most 4 of each; p, q and r are 0.
void pack(Dtype, const std::vector<Packing>&, const std::vector<Table>&, Stream);
// Gradients (C,) of gamma, of beta and of the bias, or none, from partials (rows, 2, C) of Σdv and
// Σdv·(u − mean); tables with p, q and r, which are 0 unless the statistics are of this batch, of
// `count` values.
void norm_gradient(Dtype, const Norm&, Array partials, int64_t rows, double count, bool batch,
                   const std::array<Array, 3>& gradients, const std::vector<Table>&, Stream);

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

void hopper_spatial(Dtype, const HopperSpatial&, Stream);
void hopper_spatial_gradient(Dtype, const HopperSpatialGradient&, Stream);
void hopper_temporal(Dtype, const HopperTemporal&, Stream);
void hopper_temporal_gradient(Dtype, const HopperTemporalGradient&, Stream);
void hopper_stem(Dtype, const HopperStem&, Stream);
void hopper_weight_gradient(Dtype, const HopperWeightGradient&, Stream);

}  // namespace fastst
