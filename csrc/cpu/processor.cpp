// What the processor itself says that it can do.
#include <cpu.h>
#include <cpuid.h>

namespace fastst::cpu {

bool multiplies(Storage storage) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (storage == Storage::f32 || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx))
    return storage == Storage::f32;
  const bool more = eax >= 1, amx_bf16 = edx >> 22 & 1, avx512_fp16 = edx >> 23 & 1;
  if (!more || !__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) eax = 0;
  const bool avx512_bf16 = eax >> 5 & 1, amx_fp16 = eax >> 21 & 1;
  return storage == Storage::bf16 ? avx512_bf16 || amx_bf16 : avx512_fp16 || amx_fp16;
}

}  // namespace fastst::cpu
