// relaxlm's stand-in for a header that the TVM wheel lacks: float16 to float32.
#pragma once

#include <cstdint>
#include <cstring>

// Named and parameterised as in compiler-rt; only this one instance is used.
template <typename Source, typename SourceBits, int kSourceBits, typename Target,
          typename TargetBits, int kTargetBits>
inline Target __extendXfYf2__(Source value) {
  static_assert(kSourceBits == 10 && kTargetBits == 23, "float16 to float32");
  const uint32_t half = value, sign = (half & 0x8000) << 16, rest = half & 0x7fff;
  uint32_t bits;
  if (rest >= 0x7c00) {  // infinite, or not a number
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + (112 << 23));
  } else {  // a multiple of 2 ** -24
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    bits |= sign;
  }
  Target result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
