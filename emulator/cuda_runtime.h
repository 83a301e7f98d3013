// What of the CUDA runtime the kernels' sources name, for a machine without a device.
#pragma once

#include <math.h>

#include <cstdint>

using std::max;
using std::min;

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

#define CUDART_VERSION 0

enum cudaError_t { cudaSuccess, cudaErrorNoDevice };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointNotFound };
enum { cudaEnableDefault };

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0, cudaErrorNoDevice; }
inline cudaError_t cudaGetDevice(int*) { return cudaErrorNoDevice; }
inline cudaError_t cudaSetDevice(int) { return cudaErrorNoDevice; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 227 * 1024, cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void**, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* result) {
  return *result = cudaDriverEntryPointNotFound, cudaSuccess;
}
