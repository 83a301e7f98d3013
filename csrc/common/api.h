// What the CPU's and CUDA's libraries take: tensors, convolutions, what is read and written.
//
// Every tensor comes as a View in the order (N, C, T, H, W), whatever its layout. Per-channel and
// partial results are dense arrays in the accumulation type: double for f64, else float.
#pragma once

#include <common/activations.h>

#include <array>
#include <cstdint>
#include <optional>

namespace fastst {

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
  PadMode mode;        // of height and width
  PadMode frame_mode;  // of time
};

// What a convolution reads for element e of channel c, as a function of stored tensors a and b.
enum class Read {
  plain,          // a
  norm_act,       // act((a − mean)·scale + beta)
  norm_gradient,  // scale·a + p·(b − mean) + q
};

// Where each position has a norm of its own, x̂ = (a − mean[p])·factor[p] takes the place of a, and
// of b; norm_gradient is factor[p]·(scale·a − centre[p] − slope[p]·x̂) then.
struct Source {
  View a;
  std::optional<View> b;  // u, for norm_gradient
  Array coefficients;     // (5, C): mean, scale, beta, p, q; or such a table for each clip, or for
                          // each frame of each clip; not used by plain
  Read read;
  Activation act;
  double slope;
  Array positions = {};           // (4, N·T·H·W): mean, factor, centre, slope; norm_act reads two
  std::optional<View> past = {};  // frames before those of a, which are read as they are
};

// What a tap convolution writes, from the values v_i of its branches with act_i.
enum class Write {
  forward,          // out_0 = act(Σ act_i(v_i) + aux), aux the residual or none
  branch_gradient,  // out_i = aux·act'(Σ act_i(v_i))·act_i'(v_i), aux = dy
  norm_gradient,    // out_0 = Σ v_i · act'(v), where the forward pass has read act(v) of aux, u
};

}  // namespace fastst
