// Questions to the CUDA runtime and driver that must not fail where there is neither.
#pragma once

#include <cstdint>
#include <string>

namespace fastst {

int device_count();
std::string device_error();
int shared_memory_limit(int device);
// Gives this thread the current device's context, which calls of the driver need and a thread of
// the autograd engine may not have yet.
void ensure_context();
uintptr_t driver_entry_point(const std::string& name, unsigned version);

}  // namespace fastst
