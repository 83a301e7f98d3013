// What launches check and say, on a device and in the emulator.
#pragma once

#include <kernels.h>

#include <stdexcept>
#include <string>

namespace fastst {

constexpr int64_t kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;

inline std::string shape(const View& v) {
  std::string s = "(";
  for (int i = 0; i < 5; ++i) s += (i ? ", " : "") + std::to_string(v.size[i]);
  return s + ")";
}

// `what` describes the problem.
[[noreturn]] inline void could_not_launch(const char* kernel, const std::string& what,
                                          const std::string& error) {
  throw std::runtime_error(std::string("fastst kernel ") + kernel + " for " + what +
                           " could not be launched: " + error);
}

}  // namespace fastst
