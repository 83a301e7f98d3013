// The machine for Python's ctypes: texts become modules, kernels of them are launched on memory of
// this process.
#include <algorithm>
#include <cstring>
#include <memory>

#include "machine.h"

namespace {

using ptx::Program;

struct Module {
  std::map<std::string, Program> programs;
};

thread_local std::string said;

}  // namespace

#define PTX_API __attribute__((visibility("default")))

extern "C" {

// What the last call said: an error, or counters as JSON.
PTX_API const char* ptx_said() { return said.c_str(); }

// Null: ptx_said tells why.
PTX_API Module* ptx_load(const char* text) {
  try {
    return new Module{ptx::parse(text)};
  } catch (const std::exception& error) {
    said = error.what();
    return nullptr;
  }
}

PTX_API void ptx_free(Module* module) { delete module; }

// Bytes of parameters of a kernel, or -1 where there is none of that name.
PTX_API int64_t ptx_parameter_bytes(const Module* module, const char* kernel) {
  const auto found = module->programs.find(kernel);
  return found == module->programs.end() ? -1 : found->second.parameter_bytes;
}

// Offset and size of parameter `n`; returns 0 where there is none.
PTX_API int ptx_parameter(const Module* module, const char* kernel, int n, uint32_t* offset,
                          uint32_t* size) {
  const auto& parameters = module->programs.at(kernel).parameters;
  if (n < 0 || n >= static_cast<int>(parameters.size())) return 0;
  *offset = parameters[n].offset;
  *size = parameters[n].size;
  return 1;
}

// `dims`: grid, block and cluster; `allocations`: pairs of address and bytes, `written` says of
// each whether it has values. Returns 0, or 1 and the error in ptx_said.
PTX_API int ptx_launch(const Module* module, const char* kernel, const uint32_t* dims,
                       uint32_t shared, const uint8_t* parameters, uint64_t parameter_bytes,
                       const uint64_t* allocations, const uint8_t* written, int count,
                       uint64_t seed, int counters) {
  try {
    std::vector<ptx::Allocation> memory;
    for (int n = 0; n < count; ++n) {
      ptx::Allocation a{allocations[2 * n], allocations[2 * n + 1], {}};
      if (!written[n]) a.written.resize(a.size);
      memory.push_back(std::move(a));
    }
    std::sort(memory.begin(), memory.end(),
              [](const auto& a, const auto& b) { return a.base < b.base; });
    ptx::Launch launch;
    launch.program = &module->programs.at(kernel);
    for (int n = 0; n < 3; ++n)
      launch.grid[n] = dims[n], launch.block[n] = dims[3 + n], launch.cluster[n] = dims[6 + n];
    launch.dynamic_shared = shared;
    launch.parameters.assign(parameters, parameters + parameter_bytes);
    launch.allocations = &memory;
    launch.seed = seed;
    launch.count = counters;
    launch.run();
    said = counters ? launch.counters.as_json() : "";
    return 0;
  } catch (const std::exception& error) {
    said = error.what();
    return 1;
  }
}
}
