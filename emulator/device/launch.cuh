// The emulator's counterpart of csrc/cuda/device/launch.cuh.
#pragma once

#include <launch_text.h>

#include "../emulator.h"

namespace fastst {

template <class... Parameters, class... Arguments>
void launch_clusters(const char* name, int cluster, void (*kernel)(Parameters...), dim3 grid,
                     dim3 block, size_t shared, Stream, const std::string& what,
                     Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const std::string error = emulator::launch(
      name, grid, block, static_cast<int64_t>(shared), [&] { kernel(Parameters(arguments)...); },
      cluster);
  if (!error.empty()) could_not_launch(name, what, error);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
            Stream stream, const std::string& what, Arguments... arguments) {
  launch_clusters(name, 1, kernel, grid, block, shared, stream, what, arguments...);
}

}  // namespace fastst
