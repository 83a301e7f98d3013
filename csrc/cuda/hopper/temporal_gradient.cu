// Input gradient of the temporal pass on Hopper, through the activation and norm before it:
// dv = act'(v)·(Wtᵀ∗dy), its sums for the norm, and what is stored, factor·dv.
#include <hopper/temporal.cuh>

namespace fastst {
namespace {

// Two sums of every column over all tiles that a warp has had; a lane keeps one column of every 32.
template <int N>
class ColumnSums {
  static constexpr int kBatches = (N + 31) / 32;

 public:
  __device__ void clear() {
#pragma unroll
    for (int b = 0; b < kBatches; ++b) first_[b] = second_[b] = 0;
  }

  // What this lane has of columns 32·b to 32·b + 31.
  __device__ void add(int b, float (&first)[8], float (&second)[8]) {
    halve_columns(first, second,
                  [&](int, int i, float f, float s) { first[i] += f, second[i] += s; });
    first_[b] += first[0], second_[b] += second[0];
  }

  // Row `row` of the partials, columns from `first` on.
  template <class E>
  __device__ void write(const E& e, int64_t row, int first) const {
    const Global<float> to = e.partials + row * 2 * e.channels;
#pragma unroll
    for (int b = 0; b < kBatches; ++b) {
      const int column = 32 * b + lane_column(), c = first + column;
      if (column >= N || c >= e.channels) continue;
      to[c] = first_[b];
      to[e.channels + c] = second_[b];
    }
  }

 private:
  float first_[kBatches], second_[kBatches];
};

// out = factor·dv, dv = accumulator·act'(v), v = (u − mean)·scale + beta.
template <class T>
struct GradientEpilogue {
  template <int N>
  using Statistics = ColumnSums<N>;

  Global<T> out;
  Global<const T> u{};                            // rows as of out, or none: act' is 1
  Global<const float> mean, scale, beta, factor;  // of whole tiles of columns
  Global<float> partials;  // (blocks · warps, 2, channels): Σdv, Σdv·(u − mean), or none
  int channels;            // that are computed
  int stored;              // that a row of out has, a multiple of 8: zeros from channels on
  float negative;          // act' where v is negative: 1, 0, or a slope
  bool silu;

  GradientEpilogue() = default;
  explicit GradientEpilogue(const HopperTemporalGradient& g)
      : out(global<T>(g.out.data, g.out.span())),
        mean(global<const float>(g.coefficients.data, g.coefficients.count)),
        scale(mean + g.coefficients.count / 4),
        beta(scale + g.coefficients.count / 4),
        factor(beta + g.coefficients.count / 4),
        partials(global<float>(g.partials.data, g.partials.count)),
        channels(narrow_size(g.channels)),
        stored(narrow_size(g.out.size[1])),
        negative(g.act == Activation::relu         ? 0.0f
                 : g.act == Activation::leaky_relu ? static_cast<float>(g.slope)
                                                   : 1.0f),
        silu(g.act == Activation::silu) {
    if (!silu && g.act != Activation::none && g.act != Activation::relu &&
        g.act != Activation::leaky_relu)
      throw std::invalid_argument(
          "Hopper's gradients have relu, leaky_relu, silu, and no other activation");
    if (!g.u) return;
    if (g.u->stride != g.out.stride)
      throw std::invalid_argument("u must be laid out as its gradient");
    u = global<const T>(g.u->data, g.u->span());
  }

  // value·act'(v), with PyTorch's choice at the kink.
  __device__ float derivative(float value, float v) const {
    if (silu) return value * Formula<Activation::silu>::derivative<Exact<float>>(v, 0.0f);
    if (v > 0 || negative == 1) return value;
    return negative == 0 ? (v <= 0 ? 0.0f : value) : value * negative;
  }
};

// Multiplies the accumulators by the derivative, counts them, and writes 16 bytes of a row a lane.
template <class T, int N>
__device__ void finish_block(const GradientEpilogue<T>& e, float (&values)[N / 2],
                             const RowPair& rows, int first, ColumnSums<N>& sums) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < N / 8; j += 4) {
    const int mine = first + 8 * (j + q);  // the first of this lane's columns in memory
    float dv[8] = {}, moment[8] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool there = rows.out[half] >= 0;
      const bool moved = there && j + q < N / 8 && mine < e.stored;
      uint32_t words[4] = {};
      if (e.u) {
        if (moved) memcpy(words, load<8>(e.u + rows.out[half] + mine).lane, sizeof(words));
        transpose_quad(words);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (j + i >= N / 8) {
          words[i] = 0;
          continue;
        }
        const int at = 4 * (j + i) + 2 * half, c = first + 8 * (j + i) + 2 * q;
        const auto u = bit_cast<Pack<T, 2>>(words[i]);
        const auto mean = load<2>(e.mean + c), scale = load<2>(e.scale + c);
        const auto beta = load<2>(e.beta + c), factor = load<2>(e.factor + c);
        float written[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float from_mean = widen(u.lane[k]) - mean.lane[k];
          const float v = from_mean * scale.lane[k] + beta.lane[k];
          const float d = e.u ? e.derivative(values[at + k], v) : values[at + k];
          if (there) dv[2 * i + k] += d, moment[2 * i + k] += d * from_mean;
          written[k] = c + k < e.channels ? d * factor.lane[k] : 0.0f;
        }
        words[i] = pack_pair<T>(written[0], written[1]);
      }
      transpose_quad(words);
      if (moved) store(e.out + rows.out[half] + mine, bit_cast<Pack<T, 8>>(words));
    }
    if (e.partials) sums.add(j / 4, dv, moment);
  }
}

template <class T, int N, int Frames, class Rows>
__device__ void finish_rows(const GradientEpilogue<T>& e, float (&values)[Frames][N / 2], Rows rows,
                            int first, ColumnSums<N>& sums) {
#pragma unroll
  for (int o = 0; o < Frames; ++o) finish_block<T, N>(e, values[o], rows(o), first, sums);
}

template <class T>
Parameters<T, GradientEpilogue> parameters(Dtype dtype, const HopperTemporalGradient& g) {
  const int up = narrow_size(g.conv.stride[0]), before = narrow_size(g.conv.padding[0]);
  auto p =
      parameters<T, GradientEpilogue>(dtype, g.dy, g.out, g.weight, g.tile, kTaps - 1 - before, up);
  p.epilogue = GradientEpilogue<T>(g);
  return p;
}

}  // namespace

void hopper_temporal_gradient(Dtype dtype, const HopperTemporalGradient& g, Stream stream) {
  check_temporal("hopper_temporal_gradient", g.conv, g.tile);
  with_instance<instances::temporal_gradient>(
      "hopper_temporal_gradient", dtype, {g.tile.columns, g.tile.box[1], g.conv.stride[0]},
      [&]<class T, int N, int Frames, int Up>() {
        run<N, Frames, 1, Up, false, T, GradientEpilogue>(
            "hopper_temporal_gradient", parameters<T>(dtype, g), g.tile, g.out, stream);
      });
}

}  // namespace fastst
