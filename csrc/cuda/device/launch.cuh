// Launches with their errors as exceptions.
#pragma once

#include <cuda_runtime.h>
#include <launch_text.h>

namespace fastst {

inline void check_launch(cudaError_t error, const char* kernel, const std::string& what) {
  if (error != cudaSuccess) could_not_launch(kernel, what, cudaGetErrorString(error));
}

// `what` describes the problem in the error. `cluster`: neighbours in grid.x that run together, on
// multiprocessors that reach each other's shared memory; 2 to 8 need compute capability 9.0, and
// grid.x to be a multiple.
template <class... Parameters, class... Arguments>
void launch_clusters(const char* name, int cluster, void (*kernel)(Parameters...), dim3 grid,
                     dim3 block, size_t shared, Stream stream, const std::string& what,
                     Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024)
    check_launch(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        name, what);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = cluster > 1 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  check_launch(cudaGetLastError(), name, what);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
            Stream stream, const std::string& what, Arguments... arguments) {
  launch_clusters(name, 1, kernel, grid, block, shared, stream, what, arguments...);
}

}  // namespace fastst
