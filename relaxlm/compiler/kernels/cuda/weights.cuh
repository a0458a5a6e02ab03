// How the kernels read a stored matrix [N, K], row by row or transposed.
//
// A chunk is what 16 bytes of a row hold: CODES neighbouring values. A unit is 8 of them, which the
// tensor cores take as two steps of 16 columns when four lanes have four units: lane q of a row brings
// its own columns, and where they stand among the 16 does not matter, as long as x is brought alike.
#ifndef RELAXLM_WEIGHTS
#define RELAXLM_WEIGHTS
#include "ptx.cuh"

namespace relaxlm {

template <typename A, typename B>
struct Same {
  static constexpr bool value = false;
};
template <typename A>
struct Same<A, A> {
  static constexpr bool value = true;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ half from_float<half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ nv_bfloat16 from_float<nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two values of 16 bits in 32.
template <typename T>
struct Pair {
  static __device__ __forceinline__ u32 of(T low, T high) {
    T both[2] = {low, high};
    return *reinterpret_cast<u32*>(both);
  }
};

__device__ __forceinline__ u32 subtract(u32 a, u32 b, half) {
  half2 r = __hsub2(*reinterpret_cast<half2*>(&a), *reinterpret_cast<half2*>(&b));
  return *reinterpret_cast<u32*>(&r);
}
__device__ __forceinline__ u32 times(u32 a, u32 b, half) {
  half2 r = __hmul2(*reinterpret_cast<half2*>(&a), *reinterpret_cast<half2*>(&b));
  return *reinterpret_cast<u32*>(&r);
}
__device__ __forceinline__ u32 subtract(u32 a, u32 b, nv_bfloat16) {
  nv_bfloat162 r =
      __hsub2(*reinterpret_cast<nv_bfloat162*>(&a), *reinterpret_cast<nv_bfloat162*>(&b));
  return *reinterpret_cast<u32*>(&r);
}
__device__ __forceinline__ u32 times(u32 a, u32 b, nv_bfloat16) {
  nv_bfloat162 r =
      __hmul2(*reinterpret_cast<nv_bfloat162*>(&a), *reinterpret_cast<nv_bfloat162*>(&b));
  return *reinterpret_cast<u32*>(&r);
}

// a b + c of float16, rounded once.
__device__ __forceinline__ u32 times_and_add(u32 a, u32 b, u32 c) {
  half2 r = __hfma2(*reinterpret_cast<half2*>(&a), *reinterpret_cast<half2*>(&b),
                    *reinterpret_cast<half2*>(&c));
  return *reinterpret_cast<u32*>(&r);
}

__device__ __forceinline__ u32 word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// T: dtype of x, and of the scales or plain values. BITS 16 or 32: plain values. GROUP: codes that
// share a scale. COLUMNS: stored transposed, words [words, N] and scales [groups, N].
template <typename T_, int BITS_, int GROUP_, bool COLUMNS_>
struct Format {
  typedef T_ T;
  static constexpr int BITS = BITS_, GROUP = GROUP_;
  static constexpr bool COLUMNS = COLUMNS_;
  static constexpr bool PLAIN = BITS == 8 * sizeof(T);
  static constexpr int PER_WORD = 32 / BITS;
  static constexpr int CODES = 4 * PER_WORD;
  static constexpr int UNITS = CODES / 8;
  // Chunks that share a scale.
  static constexpr int SHARED = PLAIN ? 1 : GROUP / CODES;
  static constexpr u32 MASK = BITS < 32 ? (1u << BITS % 32) - 1 : ~0u;
  static constexpr u32 ZERO = (1u << (BITS - 1)) - 1;  // the code of zero
  static_assert(PLAIN || GROUP % CODES == 0, "a group fills whole chunks");

  __host__ __device__ static constexpr int chunks(int K) {
    return PLAIN ? (K + CODES - 1) / CODES : (K + GROUP - 1) / GROUP * SHARED;
  }
  __host__ __device__ static constexpr int groups(int K) { return (K + GROUP - 1) / GROUP; }

  // A unit is a word, and its codes i and i + 4 come out of it with fewer instructions than
  // neighbours.
  static constexpr bool SPREADS = BITS == 4;

  // Four pairs of values: the unit's columns 2 i, 2 i + 1, or, SPREAD, i and i + 4, as `spread` has
  // those of x. Each is (code - ZERO) * scale, rounded to T once, as the format defines it.
  template <bool SPREAD>
  static __device__ __forceinline__ void unpack(const uint4& chunk, int unit, u32 scale,
                                                u32 (&pairs)[4]) {
    if constexpr (PLAIN) {
      pairs[0] = chunk.x, pairs[1] = chunk.y, pairs[2] = chunk.z, pairs[3] = chunk.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (SPREAD)
          pairs[i] = times(centred_far(word_of(chunk, unit), i), scale, T());
        else
          pairs[i] = times(centred(chunk, 8 * unit + 2 * i), scale, T());
      }
    }
  }

  // The same as float: columns 4 i .. 4 i + 4.
  static __device__ __forceinline__ float4 unpack_four(const uint4& chunk, int i, float scale) {
    float values[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int code = 4 * i + j;
      const u32 bits = word_of(chunk, code / PER_WORD) >> code % PER_WORD * BITS & MASK;
      values[j] = PLAIN ? __uint_as_float(bits) : float(int(bits) - int(ZERO)) * scale;
    }
    return make_float4(values[0], values[1], values[2], values[3]);
  }

 private:
  // code - ZERO of a word's codes i and i + 4 of 4 bits, exactly: see `centred`.
  static __device__ __forceinline__ u32 centred_far(u32 word, int i) {
    static_assert(BITS == 4 && ZERO == 7, "only of these");
    if constexpr (Same<T, half>::value) {
      const u32 two = i < 2 ? word : word >> 8;
      if (i % 2 == 0)
        return subtract(select(two, 0x000F000F, 0x64006400), 0x64076407, T());
      // Sixteen times as large: 1024 + 16 code. A sixteenth of it, - 71.
      return times_and_add(select(two, 0x00F000F0, 0x64006400), 0x2C002C00, 0xD470D470);
    } else {
      return subtract(select(word >> 4 * i, 0x000F000F, 0x43004300), 0x43074307, T());
    }
  }

  // code - ZERO of the codes i and i + 1, i even, exactly. A code in the low bits of a number from
  // 1024 (128 in bfloat16) on makes that number larger by itself.
  static __device__ __forceinline__ u32 centred(const uint4& chunk, int i) {
    constexpr bool HALF = Same<T, half>::value;
    constexpr u32 BASE = HALF ? 0x6400 : 0x4300;
    u32 word = word_of(chunk, i / PER_WORD);
    int bit = i % PER_WORD * BITS;
    if constexpr (!HALF && BITS == 8) {  // beyond what fits below 128
      float low = float(int(word >> bit & MASK) - int(ZERO));
      float high = float(int(word >> (bit + BITS) & MASK) - int(ZERO));
      return Pair<T>::of(from_float<T>(low), from_float<T>(high));
    } else {
      u32 codes;
      if constexpr (BITS == 4) {
        // Byte b twice, the second time from a word in which its high code is low.
        u32 b = u32(bit) / 8;
        codes = select(__byte_perm(word, word >> 4, b * 0x0011 + (b + 4) * 0x1100), 0x000F000F,
                       BASE * 0x10001u);
      } else if constexpr (BITS == 8) {
        codes = __byte_perm(word, BASE, bit == 0 ? 0x5150 : 0x5352);
      } else {
        codes = (word >> bit & MASK) | (word >> (bit + BITS) & MASK) << 16 | BASE * 0x10001u;
      }
      return subtract(codes, (BASE | ZERO) * 0x10001u, T());
    }
  }
};

// A unit of x in the order of `Format::unpack<true>`.
__device__ __forceinline__ uint4 spread(const uint4& unit) {
  return make_uint4(__byte_perm(unit.x, unit.z, 0x5410), __byte_perm(unit.x, unit.z, 0x7632),
                    __byte_perm(unit.y, unit.w, 0x5410), __byte_perm(unit.y, unit.w, 0x7632));
}

// Values k .. k + 8 of a row of K, zeros beyond its end. ALIGNED: K is a multiple of 8.
template <bool ALIGNED, typename T>
__device__ __forceinline__ uint4 load_unit(const T* row, int k, int K) {
  if constexpr (ALIGNED) {
    return k < K ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
  } else {
    T values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = k + i < K ? row[k + i] : from_float<T>(0.f);
    uint4 unit;
    unit.x = Pair<T>::of(values[0], values[1]);
    unit.y = Pair<T>::of(values[2], values[3]);
    unit.z = Pair<T>::of(values[4], values[5]);
    unit.w = Pair<T>::of(values[6], values[7]);
    return unit;
  }
}

}  // namespace relaxlm
#endif
