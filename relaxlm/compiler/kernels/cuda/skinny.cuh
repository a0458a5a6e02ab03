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

  // Columns of x that nobody wants are those of the last row once more: nobody looks at their sums.
  const T* row_of_x[NT];
#pragma unroll
  for (int j = 0; j < NT; ++j)
    row_of_x[j] = x + size_t(rows.in(min(j * 8 + g, rows.count - 1))) * K;

  // What is on its way while a lane waits for the first of it: at least 64 bytes.
  constexpr int DEPTH = MT == 1 ? 4 : 2;
  // Units of x that are read before the products begin, as long as that takes few registers.
  constexpr int AHEAD = NT == 1 ? F::UNITS : 1;
  float sums[MT][NT][4] = {};
  Chunks<F, MT> chunks[DEPTH];
#pragma unroll
  for (int d = 0; d < DEPTH; ++d)
    chunks[d].template load<ALIGNED>(matrix, base, (d * WARPS + warp) * 4 + q, g);
  const int quads = (matrix.chunks() + 3) / 4;
  for (int first = warp; first < quads; first += DEPTH * WARPS) {
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const int quad = first + d * WARPS;
      if (quad >= quads) break;
#pragma unroll
      for (int some = 0; some < F::UNITS; some += AHEAD) {
        uint4 columns[AHEAD][NT];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u)
#pragma unroll
          for (int j = 0; j < NT; ++j) {
            const int k = (quad * 4 + q) * F::CODES + (some + u) * 8;
            columns[u][j] = load_unit<ALIGNED>(row_of_x[j], k, K);
            if constexpr (F::SPREADS) columns[u][j] = spread(columns[u][j]);
          }
#pragma unroll
        for (int u = 0; u < AHEAD; ++u)
#pragma unroll
          for (int i = 0; i < MT; ++i) {
            u32 a[2][4];
            chunks[d].template unpack<F::SPREADS>(i, some + u, a);
#pragma unroll
            for (int j = 0; j < NT; ++j) {
              multiply(sums[i][j], a[0], columns[u][j].x, columns[u][j].y, T());
              multiply(sums[i][j], a[1], columns[u][j].z, columns[u][j].w, T());
            }
          }
      }
      const int next = quad + DEPTH * WARPS;
      if (next < quads) chunks[d].template load<ALIGNED>(matrix, base, next * 4 + q, g);
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
