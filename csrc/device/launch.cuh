// Launches with their errors as exceptions.
#pragma once

#include <api.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastst {

inline std::string shape(const View& v) {
  std::string s = "(";
  for (int i = 0; i < 5; ++i) s += (i ? ", " : "") + std::to_string(v.size[i]);
  return s + ")";
}

inline void check_launch(cudaError_t error, const char* kernel, const std::string& what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fastst kernel ") + kernel + " for " + what +
                             " could not be launched: " + cudaGetErrorString(error));
}

constexpr int64_t kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;

// `what` describes the problem in the error.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
            Stream stream, const std::string& what, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024)
    check_launch(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        name, what);
  kernel<<<grid, block, shared, reinterpret_cast<cudaStream_t>(stream)>>>(Parameters(arguments)...);
  check_launch(cudaGetLastError(), name, what);
}

}  // namespace fastst
