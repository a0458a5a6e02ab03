// Cached vectors on their way to shared memory, as T.
//
// A vector of DIM values is there in pieces of 8, DIM rounded up to 32 and filled with zeros. Pieces
// are put where the 8 lanes that shared memory serves at a time find them in different banks, whether
// they take four pieces of two rows, as left and right operands are read, or one piece of eight rows,
// as `load_transposed` reads.
#ifndef RELAXLM_CACHED
#define RELAXLM_CACHED
#include "weights.cuh"

namespace relaxlm {

template <int DIM>
struct Vectors {
  static constexpr int PIECES = (DIM + 31) / 32 * 4;

  // Where piece c of a row is.
  static __device__ __forceinline__ int place(int c, int row) {
    const int pair = row >> 1 & 3;
    return row * PIECES + (PIECES % 8 == 0 ? c ^ ((row & 1) << 2 | pair) : c ^ pair);
  }
};

// Columns 32 of rows `first` + g and `first` + g + 8 as the left operand of two steps.
template <class V>
__device__ __forceinline__ void load_rows(const uint4* rows, int first, int c, int g, int quad,
                                          u32 (&a)[2][4]) {
  const int upper = first + g, lower = upper + 8;
  const uint4 x = rows[V::place(c + quad, upper)], y = rows[V::place(c + quad, lower)];
  a[0][0] = x.x, a[0][1] = y.x, a[0][2] = x.y, a[0][3] = y.y;
  a[1][0] = x.z, a[1][1] = y.z, a[1][2] = x.w, a[1][3] = y.w;
}

// A code of float8 e4m3. Its seven bits without the sign, moved to the place of float16's exponent
// and mantissa, are a float16 that is 2 ** 8 too small, subnormals included.
struct Float8 {
  unsigned char code;
};
__device__ __forceinline__ float to_float(Float8 x) {
  const unsigned short bits = (x.code & 0x80) << 8 | (x.code & 0x7F) << 7;
  return __half2float(*reinterpret_cast<const half*>(&bits)) * 256.f;
}

template <typename Stored>
constexpr bool is_scaled = Same<Stored, Float8>::value;

// Eight neighbouring values as they lie in a page; aligned to 8 of them.
template <typename T, typename Stored>
__device__ __forceinline__ uint4 load_eight(const Stored* from) {
  if constexpr (Same<T, Stored>::value) {
    return *reinterpret_cast<const uint4*>(from);
  } else {
    struct alignas(8 * sizeof(Stored) < 16 ? 8 * sizeof(Stored) : 16) Eight {
      Stored values[8];
    } eight = *reinterpret_cast<const Eight*>(from);
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      pairs[i] = Pair<T>::of(from_float<T>(to_float(eight.values[2 * i])),
                             from_float<T>(to_float(eight.values[2 * i + 1])));
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

// One tensor of a layer's cache: pages [pages, heads, 16, dim], scales [pages, heads, 16].
template <typename Stored>
struct Cached {
  const Stored* pages;
  const float* scales;
  int heads, dim;

  __device__ __forceinline__ size_t line(const int* page_ids, int head, int token) const {
    return (size_t(page_ids[token / 16]) * heads + head) * 16 + token % 16;
  }

  // Tokens `token` .. + TOKENS of a head, zeros from `limit` on.
  template <typename T, class V, int TOKENS, int THREADS>
  __device__ __forceinline__ void fetch(uint4* to, const int* page_ids, int head, int token,
                                        int limit, int thread) const {
#pragma unroll 4
    for (int at = thread; at < TOKENS * V::PIECES; at += THREADS) {
      const int t = at / V::PIECES, c = at % V::PIECES;
      const bool there = token + t < limit && c * 8 < dim;
      uint4* place = to + V::place(c, t);
      const Stored* from = pages + (there ? line(page_ids, head, token + t) * dim + c * 8 : 0);
      if constexpr (Same<T, Stored>::value)
        copy_async(place, from, there);
      else
        *place = there ? load_eight<T>(from) : make_uint4(0, 0, 0, 0);
    }
  }

  template <int TOKENS, int THREADS>
  __device__ __forceinline__ void fetch_scales(float* to, const int* page_ids, int head, int token,
                                               int limit, int thread) const {
    for (int t = thread; t < TOKENS; t += THREADS)
      to[t] = token + t < limit ? scales[line(page_ids, head, token + t)] : 0.f;
  }
};

}  // namespace relaxlm
#endif
