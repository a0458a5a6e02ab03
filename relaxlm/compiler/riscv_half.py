"""Conversions of half precision for RISC-V, which libraries for it are linked with.

TVM puts its own into every library, as weak functions that take and return a half as an integer.
On RISC-V a half is in a register for floating-point numbers, where the calls that LLVM makes have
it: they would read another number. Functions that are not weak take their place.
Source: "Procedure Calling Convention" of the RISC-V ABIs Specification.
"""

# By integers alone, as processors without Zfhmin have no instruction for them.
SOURCE = """
float __extendhfsf2(_Float16 given) {
  unsigned short bits;
  __builtin_memcpy(&bits, &given, 2);
  unsigned exponent = bits >> 10 & 31, fraction = bits & 1023, found;
  float value = fraction * 0x1p-24f;
  if (exponent == 0)
    __builtin_memcpy(&found, &value, 4);
  else
    found = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
  found |= (bits & 0x8000u) << 16;
  __builtin_memcpy(&value, &found, 4);
  return value;
}

_Float16 __truncsfhf2(float given) {
  unsigned bits;
  __builtin_memcpy(&bits, &given, 4);
  unsigned sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu, found;
  if (size > 0x7f800000u)
    found = 0x7e00u | (size >> 13 & 1023); /* not a number */
  else if (size >= 0x477ff000u)
    found = 0x7c00u; /* 65520 and more become infinite */
  else if (size >= 0x38800000u)
    found = (size - 0x38000000u + 0xfffu + (size >> 13 & 1)) >> 13;
  else { /* a last place of 1/2 is one of the smallest halves */
    float value;
    __builtin_memcpy(&value, &size, 4);
    value += 0.5f;
    __builtin_memcpy(&found, &value, 4);
    found -= 0x3f000000u;
  }
  unsigned short half = sign | found;
  _Float16 result;
  __builtin_memcpy(&result, &half, 2);
  return result;
}
"""
