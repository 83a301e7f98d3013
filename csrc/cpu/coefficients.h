// Per-channel vectors of a norm: v = (u − mean)·scale + beta, du = scale·dv + p·(u − mean) + q.
#pragma once

#include <cpu.h>
#include <parallel.h>

#include <algorithm>
#include <cmath>

namespace fastst::cpu {

// Rows mean, scale, beta, p and q; of no norm an empty array.
class Coefficients {
 public:
  Coefficients(const Array& mean, const Array& var, const Array& gamma, const Array& beta,
               double eps)
      : channels_(mean.count), memory_(5 * mean.count) {
    for (int64_t i = 0; i < channels_; ++i) {
      row(0)[i] = at(mean, i, 0.0f);
      row(1)[i] = static_cast<float>(at(gamma, i, 1.0f) / std::sqrt(at(var, i, 1.0f) + eps));
      row(2)[i] = at(beta, i, 0.0f);
      row(3)[i] = row(4)[i] = 0.0f;
    }
  }

  float* row(int i) const { return memory_ + i * channels_; }
  Array array() const { return channels_ ? Array{memory_.data(), 5 * channels_} : Array{}; }

 private:
  static float at(const Array& a, int64_t i, float missing) {
    return a.count ? static_cast<const float*>(a.data)[i] : missing;
  }
  int64_t channels_;
  Scratch memory_;
};

}  // namespace fastst::cpu
