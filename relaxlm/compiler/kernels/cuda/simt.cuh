// Products in float32, for models that compute in it: no tensor core has that precision.
#ifndef RELAXLM_SIMT
#define RELAXLM_SIMT
#include "tile.cuh"

namespace relaxlm {

// Four neighbouring values of a row of K, zeros beyond its end. ALIGNED: K is a multiple of 4.
template <bool ALIGNED>
__device__ __forceinline__ float4 load_four(const float* row, int k, int K) {
  if constexpr (ALIGNED)
    return k < K ? *reinterpret_cast<const float4*>(row + k) : make_float4(0, 0, 0, 0);
  return make_float4(k < K ? row[k] : 0.f, k + 1 < K ? row[k + 1] : 0.f,
                     k + 2 < K ? row[k + 2] : 0.f, k + 3 < K ? row[k + 3] : 0.f);
}

// Columns 4 i .. 4 i + 4 of a row of the matrix, of the chunk that they are in.
template <class F, bool ALIGNED>
__device__ __forceinline__ uint4 load_chunk(const Matrix<F>& matrix, int row, int chunk) {
  if constexpr (F::PLAIN) {
    const float* values = static_cast<const float*>(matrix.values) + size_t(row) * matrix.K;
    const float4 four = load_four<ALIGNED>(values, chunk * 4, matrix.K);
    return make_uint4(__float_as_uint(four.x), __float_as_uint(four.y), __float_as_uint(four.z),
                      __float_as_uint(four.w));
  } else {
    return static_cast<const uint4*>(matrix.values)[size_t(row) * matrix.chunks() + chunk];
  }
}

template <class F>
__device__ __forceinline__ float load_scale(const Matrix<F>& matrix, int row, int chunk) {
  if constexpr (F::PLAIN) return 1;
  return matrix.scales[size_t(row) * F::groups(matrix.K) + chunk / F::SHARED];
}

// Up to TOKENS rows of x: a warp for each row of the matrix, whose lanes share out its chunks.
template <class F, bool ALIGNED, int TOKENS, class Output>
__device__ __forceinline__ void skinny_float(const float* __restrict__ x, Matrix<F> matrix,
                                             Rows rows, int base, Output output) {
  const int lane = threadIdx.x, row = base + threadIdx.y, K = matrix.K;
  if (row >= matrix.N) return;
  float sums[TOKENS] = {};
  for (int chunk = lane; chunk < matrix.chunks(); chunk += 32) {
    const uint4 values = load_chunk<F, ALIGNED>(matrix, row, chunk);
    const float scale = load_scale(matrix, row, chunk);
#pragma unroll
    for (int i = 0; i < F::CODES / 4; ++i) {
      const float4 w = F::unpack_four(values, i, scale);
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        if (t >= rows.count) break;
        const float4 v =
            load_four<ALIGNED>(x + size_t(rows.in(t)) * K, chunk * F::CODES + i * 4, K);
        sums[t] += v.x * w.x + v.y * w.y + v.z * w.z + v.w * w.w;
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TOKENS; ++t)
    for (int distance = 16; distance > 0; distance /= 2)
      sums[t] += __shfl_xor_sync(0xffffffff, sums[t], distance);
  if (lane == 0)
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
      if (t < rows.count) output.store(rows.out(t), row, sums[t]);
}

// 64 rows of the matrix for 64 rows of x, in a block of 256 threads with 4 times 4 products each.
template <class F>
struct FloatTiling {
  static constexpr int SIDE = 64, STRIDE = SIDE + 4;
  // Columns at a time: whole chunks, 32 or a little more.
  static constexpr int COLUMNS = F::CODES >= 16 ? F::CODES : 32;
  static constexpr int FLOATS = 2 * COLUMNS * STRIDE;
};

template <class F, bool ALIGNED, class Output>
__device__ __forceinline__ void tiled_float(const float* __restrict__ x, Matrix<F> matrix,
                                            Rows rows, int base, Output output, float* shared) {
  typedef FloatTiling<F> S;
  const int thread = threadIdx.y * 32 + threadIdx.x, K = matrix.K;
  float(*weights)[S::STRIDE] = reinterpret_cast<float(*)[S::STRIDE]>(shared);
  float(*columns)[S::STRIDE] = weights + S::COLUMNS;
  float sums[4][4] = {};
  for (int first = 0; first < matrix.chunks() * F::CODES; first += S::COLUMNS) {
    for (int at = thread; at < S::SIDE * S::COLUMNS / 4; at += 256) {
      const int i = at % (S::COLUMNS / 4), r = at / (S::COLUMNS / 4), k = first + i * 4;
      const int chunk = k / F::CODES, row = min(base + r, matrix.N - 1);
      float4 w = make_float4(0, 0, 0, 0), v = w;
      if (chunk < matrix.chunks())
        w = F::unpack_four(load_chunk<F, ALIGNED>(matrix, row, chunk), k % F::CODES / 4,
                           load_scale(matrix, row, chunk));
      if (r < rows.count) v = load_four<ALIGNED>(x + size_t(rows.in(r)) * K, k, K);
      weights[i * 4][r] = w.x, weights[i * 4 + 1][r] = w.y;
      weights[i * 4 + 2][r] = w.z, weights[i * 4 + 3][r] = w.w;
      columns[i * 4][r] = v.x, columns[i * 4 + 1][r] = v.y;
      columns[i * 4 + 2][r] = v.z, columns[i * 4 + 3][r] = v.w;
    }
    __syncthreads();
    for (int k = 0; k < S::COLUMNS; ++k) {
      const float4 w = *reinterpret_cast<const float4*>(&weights[k][thread % 16 * 4]);
      const float4 v = *reinterpret_cast<const float4*>(&columns[k][thread / 16 * 4]);
      const float left[4] = {v.x, v.y, v.z, v.w}, right[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += left[i] * right[j];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int t = thread / 16 * 4 + i, row = base + thread % 16 * 4 + j;
      if (t < rows.count && row < matrix.N) output.store(rows.out(t), row, sums[i][j]);
    }
}

}  // namespace relaxlm
#endif
