// What the processor itself says that it can do.
#include <cpu.h>
#include <cpuid.h>
#include <products.h>

#include <stdexcept>

namespace fastst::cpu {
namespace {

struct Features {
  bool avx512_bf16 = false, avx512_fp16 = false, amx_bf16 = false, amx_fp16 = false;

  Features() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return;
    amx_bf16 = edx >> 22 & 1, avx512_fp16 = edx >> 23 & 1;
    if (eax < 1 || !__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return;
    avx512_bf16 = eax >> 5 & 1, amx_fp16 = eax >> 21 & 1;
  }
};

const Features& features() {
  static const Features found;
  return found;
}

}  // namespace

bool outdoes(Storage storage) {
  const Features& f = features();
  if (storage == Storage::bf16) return f.amx_bf16 || (f.avx512_bf16 && !multiplies_pairs());
  return storage == Storage::f16 && (f.avx512_fp16 || f.amx_fp16);
}

bool multiplies_pairs() { return kHasPairs && features().avx512_bf16; }

bool in_pairs(Sums sums) {
  if (sums != Sums::pairs && sums != Sums::winograd_pairs)
    return (sums == Sums::best || sums == Sums::unrounded) && multiplies_pairs();
  if (kHasPairs && !multiplies_pairs())
    throw std::invalid_argument("fastst cpu: sums in pairs require a processor with AVX512_BF16");
  return true;
}

}  // namespace fastst::cpu
