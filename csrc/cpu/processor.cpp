// What the processor itself says that it can do.
#include <cpu.h>
#include <cpuid.h>
#include <products.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <stdexcept>

namespace fastst::cpu {
namespace {

// Whether the system saves the registers of AMX, and lets this process use them: Linux asks for a
// request.
bool may_use_amx() {
  constexpr int kOsSaves = 27, kData = 18;                     // bits of cpuid and of XCR0
  constexpr uint64_t kSaved = uint64_t(3) << 17;               // configuration and data
  [[maybe_unused]] constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx >> kOsSaves & 1)) return false;
  asm("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  if ((eax & kSaved) != kSaved) return false;
#if defined(__linux__)
  return syscall(SYS_arch_prctl, kRequestPermission, kData) == 0;
#else
  return false;
#endif
}

struct Features {
  bool avx512_bf16 = false, avx512_fp16 = false, amx_bf16 = false, amx_fp16 = false;
  bool may_use_amx = false;

  Features() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return;
    amx_bf16 = edx >> 22 & edx >> 24 & 1, avx512_fp16 = edx >> 23 & 1;
    may_use_amx = kHasPairs && amx_bf16 && cpu::may_use_amx();
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
  if (storage == Storage::bf16) return (f.amx_bf16 || f.avx512_bf16) && !multiplies_pairs();
  return storage == Storage::f16 && (f.avx512_fp16 || f.amx_fp16);
}

bool multiplies_pairs() { return kHasPairs && features().avx512_bf16; }

bool multiplies_by_amx() { return multiplies_pairs() && features().may_use_amx; }

bool refuses_amx() { return multiplies_pairs() && features().amx_bf16 && !features().may_use_amx; }

bool in_pairs(Sums sums) {
  if (chosen_freely(sums)) return multiplies_pairs();
  if (sums == Sums::direct || sums == Sums::winograd) return false;
  if (kHasPairs && !multiplies_pairs())
    throw std::invalid_argument("fastst cpu: sums in pairs require a processor with AVX512_BF16");
  return true;
}

bool by_amx(Sums sums) {
  return in_pairs(sums) && (sums == Sums::amx || (chosen_freely(sums) && multiplies_by_amx()));
}

}  // namespace fastst::cpu
