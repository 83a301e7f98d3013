// What bindings.cpp calls, in terms of common/api.h. Tensors are stored in float32 or in 16 bits;
// arithmetic, sums and arrays are in float32. Memory that is read and memory that is written may
// not overlap.
#pragma once

#include <common/api.h>
#include <storage.h>

#include <functional>
#include <optional>

namespace fastst::cpu {

struct View : fastst::View {
  Storage storage = Storage::f32;
};

// As fastst::Source, of these views; norm_gradient knows one table and no positions. Channels of a
// plain one beyond those that are read are zeros.
struct Source {
  View a;
  std::optional<View> b;
  Array coefficients;
  Read read;
  Activation act;
  double slope;
  Array positions = {};           // (2, N·T·H·W): mean and factor; or none
  std::optional<View> past = {};  // frames before those of a, which are read as they are
};

// What becomes of Σ, the sums of a tap convolution.
//   forward        out = outer(act(((Σ + bias) − mean)·scale + beta) + aux), aux the residual
//   norm_gradient  out = Σ·act'((aux − mean)·scale + beta),                  aux = u
// Whatever is absent is left out. Channels of out beyond those of the weight become zeros.
struct Epilogue {
  Write write;
  Array bias;          // (out,)
  Array coefficients;  // (5, out): mean, scale, beta, and two that are not used
  Activation act, outer;
  double slope;  // of either
  std::optional<View> aux;
  // (2, out): forward: mean and biased variance of Σ + bias;
  // norm_gradient: Σ out and Σ out·(aux − mean).
  Array reductions;
  bool large = false;  // out is larger than the caches, and is stored past them
};

// How the products of a convolution are summed: as is likely to be the fastest; so, but never of
// what was rounded once more, to be multiplied; one by one; Winograd's way; in pairs of bfloat16,
// one by one or Winograd's way, wherever that can be done; or such pairs as AMX does.
enum class Sums { best, unrounded, direct, winograd, pairs, winograd_pairs, amx };

// In training. Winograd's transforms rounded to bfloat16 move every sum by some thousandths of the
// largest ones, the small ones as well, which rounding of the result moves by as little as they
// are: one in a thousand crosses the kink of the activation that follows, and such gates are 5% of
// a gradient. Gradients of an input are 2.3 times as far from the truth as PyTorch's.
inline Sums in_training(Sums sums) { return sums == Sums::best ? Sums::unrounded : sums; }
// Whether what is likely to be the fastest is taken.
inline bool chosen_freely(Sums sums) { return sums == Sums::best || sums == Sums::unrounded; }

// out = epilogue(convolution of the source); input_gradient: of the transposed convolution, where
// source is shaped as the convolution's output and out as its input. How many of the groups went by
// Winograd's sums.
int64_t tap_conv(const Source&, const View& weight, const Conv&, const View& out, const Epilogue&,
                 Sums, int threads);
int64_t input_gradient(const Source&, const View& weight, const Conv&, const View& out,
                       const Epilogue&, Sums, int threads);

// One of two convolutions of the same source, without groups; both have the same stride.
struct Branch {
  View weight;
  Array bias;
  Conv conv;
  View out;
  std::optional<View> aux;
  Activation outer;
};
// Each as tap_conv, with what the Epilogue says of both, one after the other in every tile of the
// source, which is read once: the second may have the first one's out as its own out and aux.
void branches(const Source&, const std::array<Branch, 2>&, const Epilogue&, Sums, int threads);

// y = act(branch(first(x)) + branch(second(x))), or both side by side.
struct ParallelPlan {
  std::array<Conv, 2> conv;
  Activation branch, act;
  double slope;
  bool add;
  Sums sums;
};
struct ParallelTensors {
  View x;
  std::array<View, 2> weight;
  std::array<Array, 2> bias;
};
void parallel(const ParallelPlan&, const ParallelTensors&, const View& out, int threads);
// Gradients that are asked for, from those of what the two convolutions give.
void parallel_backward(const ParallelPlan&, const ParallelTensors&, const std::array<View, 2>& dy,
                       const std::optional<View>& dx,
                       const std::array<std::optional<View>, 2>& dweight, int threads);

enum class PairNorm { none, batch, frozen };

// What a call of conv2plus1d computes, but for its tensors:
// out = outer(outer_norm(second(act(norm(first(x))))) + residual),
// norm(u) = (u − mean)·gamma/√(var + eps) + beta
struct PairPlan {
  std::array<Conv, 2> conv;
  Activation act, outer;
  double slope, eps;
  PairNorm norm;
  std::array<int64_t, 5> mid_shape;  // (N, T', H', W', M rounded up)
  int64_t strip;                     // floats of the mid tensor that stay in a second-level cache
  int64_t large;                     // floats of a tensor that does not stay in any
  Sums sums;

  int64_t positions() const { return mid_shape[0] * mid_shape[1] * mid_shape[2] * mid_shape[3]; }
};

// The tensors of a call, in the order of the op's schema; what there may be none of is empty.
struct PairTensors {
  View x;
  std::array<View, 2> weight;
  std::array<Array, 2> bias;
  Array gamma, beta, mean, var;
  std::optional<View> residual;
  Array outer_table;  // as coefficients of an Epilogue

  int64_t mid_channels() const { return weight[0].size[0]; }
};

// Without statistics of the batch: in how many strips of the mid tensor.
int64_t pair(const PairPlan&, const PairTensors&, const View& out, int threads);

// Mean and biased variance of each channel, or none.
struct Statistics {
  Array mean, var;
};

// u and, if asked for, its statistics.
void pair_first(const PairPlan&, const PairTensors&, void* u, const Statistics&, int threads);
// out and, if asked for, its statistics, from u and those of its norm.
void pair_second(const PairPlan&, const PairTensors&, void* u, const Statistics& norm,
                 const View& out, const Statistics& out_statistics, int threads);
// Both. mid: as large as u, which it is afterwards if it is kept or the norm has statistics.
void pair_training(const PairPlan&, const PairTensors&, void* mid, bool kept, const Statistics&,
                   const View& out, const Statistics& out_statistics, int threads);

// Gradients that are asked for; arrays (M,).
struct PairGradients {
  std::array<std::optional<View>, 2> weight;
  Array bias, gamma, beta;
};

// What backward has of the forward pass, and room.
struct PairKept {
  void* u;  // or room for it, where it is to be computed again
  bool again;
  void* dv;  // room
  Statistics norm;
  Array means;  // (2, M): of dv and of dv·(u − mean), where they are known
};

// dy_read is called once dy is read no more, make_dx, where there is one, after that.
void pair_backward(const PairPlan&, const PairTensors&, const View& dy, const PairKept&,
                   const PairGradients&, const std::function<void()>& dy_read,
                   const std::function<View()>& make_dx, int threads);

// dweight (out, in/groups, kt, kh, kw) of any strides, from the input and the gradient of the
// output.
void weight_gradient(const Source& input, const Source& gradient, const Conv&, const View& dweight,
                     Sums, int threads);

// out (2, N, T, C): mean and mean square deviation of each channel of each frame of floats.
void channel_moments(const View& x, const Array& out, int threads);
// out (2, N, T, H, W): mean and mean square deviation of the channels of each position; or, unless
// centred, (1, N, T, H, W): their mean square. Of floats.
void position_moments(const View& x, bool centred, const Array& out, int threads);

// Gradients of v = norm(y), a batch norm with mean and biased variance of y itself: dy, unless it
// is missing, and sums (2, K), those of beta and of gamma, from dv. K of dv, y and dy has stride 1,
// and all three are stored alike.
void batch_norm_backward(const View& dv, const View& y, const Array& mean, const Array& var,
                         const Array& gamma, double eps, const std::optional<View>& dy,
                         const Array& sums, int threads);

// Running statistics, where there are some, after a batch: of its biased variance, `unbiased`
// times.
void update_running(const Array& running_mean, const Array& running_var, const Array& mean,
                    const Array& var, double unbiased, double momentum);

// Whether the processor multiplies what is stored so by instructions that are not used here: tiles,
// vectors of float16.
bool outdoes(Storage);
// Whether pairs of bfloat16 are multiplied by its own instruction (vdpbf16ps).
bool multiplies_pairs();
// Whether they may be multiplied by AMX: the processor has it, and the system lets this process.
bool multiplies_by_amx();
// Whether the system alone stands against it.
bool refuses_amx();
// Whether what is stored as bfloat16 is multiplied in pairs, and whether as AMX does.
bool in_pairs(Sums);
bool by_amx(Sums);

// Multiplies panels in cache `rounds` times on each thread; how many operations that took.
int64_t multiply_panels(int64_t rounds, int threads);

}  // namespace fastst::cpu
