// How TMA and wgmma permute the 16-byte pieces of shared memory, so that columns have no conflicts.
#pragma once

namespace fastst {

// The piece at address a lies where bits 4 to 6 of a are xored with bits 7 to 9 (b128), 4 and 5
// with 7 and 8 (b64), or 4 with 7 (b32).
enum class Swizzle { none, b32, b64, b128 };  // log2 of the span is 4 to 7

// Bytes within which pieces move; 8 of them are the period of the pattern.
constexpr int swizzle_span(Swizzle s) {
  return s == Swizzle::b128 ? 128 : s == Swizzle::b64 ? 64 : s == Swizzle::b32 ? 32 : 16;
}

}  // namespace fastst
