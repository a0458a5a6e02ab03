// Few rows of x times a stored matrix, at the speed of memory.
//
// A block has MT * 16 rows of the matrix and brings NT * 8 rows of x to them. Its warps share out the
// columns, so that together they read each row in pieces of 64 bytes per warp; a lane reads 16 bytes
// at a time, straight into registers, and unpacks them there for the tensor cores. The matrix is the
// left operand: with 8 rows of x or fewer nothing of the products' larger side is wasted, and every
// weight is unpacked once.
#ifndef RELAXLM_SKINNY
#define RELAXLM_SKINNY
#include "tile.cuh"

namespace relaxlm {

template <class F, bool ALIGNED, int MT, int NT, int WARPS, class Output>
__device__ __forceinline__ void skinny(const typename F::T* __restrict__ x, Matrix<F> matrix,
                                       Rows rows, int base, Output output, float* shared) {
  typedef typename F::T T;
  constexpr int ROWS = MT * 16, TOKENS = NT * 8, STRIDE = ROWS + 4;
  const int lane = threadIdx.x, warp = threadIdx.y, g = lane / 4, q = lane % 4;
  const int K = matrix.K;

  const T* row_of_x[NT];
#pragma unroll
  for (int j = 0; j < NT; ++j) {
    int token = j * 8 + g;
    row_of_x[j] = token < rows.count ? x + size_t(rows.in(token)) * K : nullptr;
  }

  float sums[MT][NT][4] = {};
  Chunks<F, MT> next;
  next.template load<ALIGNED>(matrix, base, warp * 4 + q, g);
  const int quads = (matrix.chunks() + 3) / 4;
  for (int quad = warp; quad < quads; quad += WARPS) {
    const Chunks<F, MT> now = next;
    if (quad + WARPS < quads) next.template load<ALIGNED>(matrix, base, (quad + WARPS) * 4 + q, g);
#pragma unroll
    for (int unit = 0; unit < F::UNITS; ++unit) {
      const int k = (quad * 4 + q) * F::CODES + unit * 8;
      uint4 columns[NT];
#pragma unroll
      for (int j = 0; j < NT; ++j)
        columns[j] = row_of_x[j] ? load_unit<ALIGNED>(row_of_x[j], k, K) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        u32 a[2][4];
        now.unpack(i, unit, a);
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          multiply(sums[i][j], a[0], columns[j].x, columns[j].y, T());
          multiply(sums[i][j], a[1], columns[j].z, columns[j].w, T());
        }
      }
    }
  }

  // shared [WARPS, TOKENS, STRIDE]: then each thread adds up what the warps have for its outputs.
  float* mine = shared + warp * TOKENS * STRIDE;
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        mine[(j * 8 + q * 2 + e % 2) * STRIDE + row_in_tile<F>(i, e / 2, g)] = sums[i][j][e];
  __syncthreads();
  for (int at = warp * 32 + lane; at < TOKENS * ROWS; at += WARPS * 32) {
    const int token = at / ROWS, row = at % ROWS;
    auto total = [&](int of) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += shared[(w * TOKENS + token) * STRIDE + of];
      return sum;
    };
    if constexpr (Output::GATED) {
      if (token < rows.count && (row & 16) == 0)
        output.store(rows.out(token), base + row, total(row), total(row + 16));
    } else {
      if (token < rows.count && base + row < matrix.N)
        output.store(rows.out(token), base + row, total(row));
    }
  }
}

}  // namespace relaxlm
#endif
