// The emulator's counterpart of csrc/cuda/device/launch.cuh.
#pragma once

#include <kernels.h>

#include <stdexcept>
#include <string>

#include "../emulator.h"

namespace fastst {

inline std::string shape(const View& v) {
  std::string s = "(";
  for (int i = 0; i < 5; ++i) s += (i ? ", " : "") + std::to_string(v.size[i]);
  return s + ")";
}

constexpr int64_t kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;

template <class... Parameters, class... Arguments>
void launch_clusters(const char* name, int cluster, void (*kernel)(Parameters...), dim3 grid,
                     dim3 block, size_t shared, Stream, const std::string& what,
                     Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const std::string error = emulator::launch(
      name, grid, block, static_cast<int64_t>(shared), [&] { kernel(Parameters(arguments)...); },
      cluster);
  if (!error.empty())
    throw std::runtime_error(std::string("fastst kernel ") + name + " for " + what +
                             " could not be launched: " + error);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
            Stream stream, const std::string& what, Arguments... arguments) {
  launch_clusters(name, 1, kernel, grid, block, shared, stream, what, arguments...);
}

}  // namespace fastst
