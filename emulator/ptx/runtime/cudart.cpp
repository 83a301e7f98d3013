// A CUDA runtime whose device is the machine of this folder: what nvcc's host code calls of it.
//
// nvcc's code registers each kernel by its symbol; launches go to Python, which runs them. Tensor
// maps are encoded as the machine reads them.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <string>

#include "../tensor_map.h"

namespace {

// Told the kernel, grid, block and cluster, shared bytes, and the address of each argument; returns
// the error, or null.
using Executor = const char* (*)(const char* kernel, const uint32_t* dims, uint64_t shared,
                                 void** arguments);
Executor executor = nullptr;
std::string said;
cudaError_t last = cudaSuccess;

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> all;
  return all;
}

cudaError_t failed(const std::string& what) {
  said = what;
  return last = cudaErrorLaunchFailure;
}

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                const cuuint32_t* step, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  static std::deque<ptx::TensorMap> kept;  // as long as the process: a map may be launched again
  ptx::TensorMap made;
  made.base = reinterpret_cast<uint64_t>(data);
  made.rank = static_cast<int>(rank);
  made.element = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  made.swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 128
                 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                 : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                                                        : 0;
  for (int n = 0; n < made.rank; ++n) {
    made.size[n] = static_cast<int64_t>(size[n]);
    made.stride[n] = n ? static_cast<int64_t>(stride[n - 1]) : made.element;
    made.step[n] = static_cast<int32_t>(step[n]);
    made.box[n] = static_cast<int32_t>((box[n] + step[n] - 1) / step[n]);
  }
  kept.push_back(made);
  const ptx::TensorMap* described = &kept.back();
  std::memcpy(map, &described, sizeof described);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void executed_by(Executor given) { executor = given; }

void** __cudaRegisterFatBinary(void* wrapper) { return static_cast<void**>(wrapper); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  kernels()[host] = name;
}

// Launches of ours go through cudaLaunchKernelEx: these are named by nvcc's stubs only.
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  return failed("a launch by <<<>>>");
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return failed("a launch by <<<>>>"); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return failed("a launch by <<<>>>");
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  const auto found = kernels().find(kernel);
  if (found == kernels().end()) return failed("a kernel that nobody registered");
  if (!executor) return failed("nobody executes kernels");
  uint32_t dims[] = {config->gridDim.x,
                     config->gridDim.y,
                     config->gridDim.z,
                     config->blockDim.x,
                     config->blockDim.y,
                     config->blockDim.z,
                     1,
                     1,
                     1};
  for (unsigned n = 0; n < config->numAttrs; ++n)
    if (config->attrs[n].id == cudaLaunchAttributeClusterDimension)
      dims[6] = config->attrs[n].val.clusterDim.x;
  const char* error = executor(found->second.c_str(), dims, config->dynamicSmemBytes, arguments);
  return error ? failed(error) : cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t) { return said.c_str(); }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes > 227 * 1024 ? failed("more shared memory than a block may have") : cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 227 * 1024, cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::string(name) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(encode) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
}
