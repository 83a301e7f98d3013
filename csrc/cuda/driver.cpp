#include <cuda_runtime.h>
#include <driver.h>

#include <stdexcept>

namespace fastst {

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::string device_error() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

int shared_memory_limit(int device) {
  int bytes = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return bytes;
}

void ensure_context() {
  static thread_local int had = -1;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device == had) return;
  if (cudaSetDevice(device) == cudaSuccess) had = device;  // makes it, from CUDA 12 on
}

// At run time and by version, so that the library links without libcuda and loads without a driver.
uintptr_t driver_entry_point(const std::string& name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name.c_str(), &function, version, cudaEnableDefault, &found);
  const bool there = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return there ? reinterpret_cast<uintptr_t>(function) : 0;
}

}  // namespace fastst
