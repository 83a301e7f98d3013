// What bindings.cpp calls: float32 on the CPU, in terms of common/api.h. Memory that is read and
// memory that is written may not overlap.
#pragma once

#include <common/api.h>

#include <optional>

namespace fastst::cpu {

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

// How the products of a convolution are summed: Winograd's way wherever it can be done, nowhere, or
// where it is likely to be faster.
enum class Sums { best, direct, winograd };

// out = epilogue(convolution of the source); input_gradient: of the transposed convolution, where
// source is shaped as the convolution's output and out as its input. How many of the groups went by
// Winograd's sums.
int64_t tap_conv(const Source&, const View& weight, const Conv&, const View& out, const Epilogue&,
                 Sums, int threads);
int64_t input_gradient(const Source&, const View& weight, const Conv&, const View& out,
                       const Epilogue&, Sums, int threads);

struct PairPass {
  View weight;
  Array bias;  // or none
  Conv conv;
};

// out = outer(second(act(norm(first(x)))) + residual), norm = (u − mean)·gamma/√(var + eps) + beta
struct Pair {
  View x;
  PairPass first, second;
  Array mean, var, gamma, beta;  // (M,); no mean: no norm
  double eps;
  Activation act, outer;
  double slope;                      // of either
  std::array<int64_t, 5> mid_shape;  // (N, T', H', W', M rounded up)
  int64_t strip;                     // floats of the mid tensor that stay in a second-level cache
  int64_t large;                     // floats of a tensor that does not stay in any
  std::optional<View> residual;
  View out;
};
// In how many strips of the mid tensor.
int64_t pair(const Pair&, Sums, int threads);

// dweight (out, in/groups, kt, kh, kw) of any strides, from the input and the gradient of the
// output.
void weight_gradient(const Source& input, const Source& gradient, const Conv&, const View& dweight,
                     int threads);

// out (5, C): mean, scale, beta of v = (u − mean)·scale + beta, and two rows of zeros. gamma and
// beta may be missing.
void norm_coefficients(const Array& mean, const Array& var, const Array& gamma, const Array& beta,
                       double eps, const Array& out);

// Gradients of v = norm(y), a batch norm with mean and biased variance of y itself: dy, unless it
// is missing, and sums (2, K), those of beta and of gamma, from dv. K of dv, y and dy has stride 1.
void batch_norm_backward(const View& dv, const View& y, const Array& mean, const Array& var,
                         const Array& gamma, double eps, const std::optional<View>& dy,
                         const Array& sums, int threads);

// Multiplies panels in cache `rounds` times on each thread; how many operations that took.
int64_t multiply_panels(int64_t rounds, int threads);

}  // namespace fastst::cpu
