// Per-channel vectors of the norm, before what reads them.
#include <cpu.h>

#include <cmath>

namespace fastst::cpu {

void norm_coefficients(const Array& mean, const Array& var, const Array& gamma, const Array& beta,
                       double eps, const Array& out) {
  const auto at = [](const Array& a, int64_t i, float missing) {
    return a.count ? static_cast<const float*>(a.data)[i] : missing;
  };
  float* to = static_cast<float*>(out.data);
  const int64_t channels = mean.count;
  for (int64_t i = 0; i < channels; ++i) {
    to[i] = at(mean, i, 0.0f);
    to[channels + i] = static_cast<float>(at(gamma, i, 1.0f) / std::sqrt(at(var, i, 1.0f) + eps));
    to[2 * channels + i] = at(beta, i, 0.0f);
    to[3 * channels + i] = to[4 * channels + i] = 0.0f;
  }
}

}  // namespace fastst::cpu
