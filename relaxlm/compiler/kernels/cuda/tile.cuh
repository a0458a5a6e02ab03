// What the kernels for few and for many rows of x share: which rows, and where results go.
#ifndef RELAXLM_TILE
#define RELAXLM_TILE
#include "weights.cuh"

namespace relaxlm {

// A matrix [N, K] as it lies in memory.
template <class F>
struct Matrix {
  typedef typename F::T T;
  const void* values;  // words, or plain values
  const T* scales;
  int N, K;
  // Not 0: row i and row i + half belong together, and tiles have 16 of the ones and then the 16 others.
  int half = 0;

  // The row that a tile has as number p, counted through all tiles.
  __device__ __forceinline__ int row(int p) const {
    return half == 0 ? p : (p >> 5 << 4 | (p & 15)) + (p & 16 ? half : 0);
  }
  __device__ __forceinline__ int chunks() const { return F::chunks(K); }
  // Matrix number e of several that follow each other.
  __device__ __forceinline__ Matrix number(int e) const {
    const size_t bytes = F::PLAIN ? size_t(N) * K * sizeof(T) : size_t(N) * chunks() * 16;
    return {static_cast<const char*>(values) + e * bytes,
            F::PLAIN ? nullptr : scales + size_t(e) * N * F::groups(K), N, K};
  }
};

// Which rows of x a block takes, and which rows of the result they give.
struct Rows {
  const int* order;  // null: they follow each other, `step` rows apart from number `offset` on
  int first, count;
  int repeat;  // rows of the result for each row of x
  int step = 1, offset = 0;

  __device__ __forceinline__ int out(int i) const {
    return order ? order[first + i] : (first + i) * step + offset;
  }
  __device__ __forceinline__ int in(int i) const { return out(i) / repeat; }
};

// Of the 16 rows of tile i that a lane with the number g has two of, and of all tiles: where in the
// block's rows. Of a transposed matrix a lane reads four neighbouring rows at once.
template <class F>
__device__ __forceinline__ int row_in_tile(int i, int half, int g) {
  return F::COLUMNS ? i / 2 * 32 + g * 4 + i % 2 * 2 + half : i * 16 + half * 8 + g;
}

// The scales of one chunk of each of a lane's rows, as they are loaded: nothing waits for them.
template <class F, int MT>
struct Scales {
  typename F::T values[MT][2];

  __device__ __forceinline__ void load(const Matrix<F>& matrix, int base, int chunk, int g) {
    if constexpr (!F::PLAIN) {
      const int groups = F::groups(matrix.K), group = min(chunk / F::SHARED, groups - 1);
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = min(matrix.row(base + row_in_tile<F>(i, half, g)), matrix.N - 1);
          const size_t at =
              F::COLUMNS ? size_t(group) * matrix.N + row : size_t(row) * groups + group;
          values[i][half] = matrix.scales[at];
        }
    }
  }
  __device__ __forceinline__ u32 pair(int i, int half) const {
    if constexpr (F::PLAIN) return 0;
    return Pair<typename F::T>::of(values[i][half], values[i][half]);
  }
};

// One chunk of each of a lane's rows, in registers.
template <class F, int MT>
struct Chunks {
  static_assert(!F::COLUMNS || MT % 2 == 0, "a lane reads four rows of a transposed matrix");
  uint4 values[MT][2];
  Scales<F, MT> scales;

  // A chunk beyond the last is the last once more: x is zero there.
  // ALIGNED: see `load_unit`; of transposed matrices, N is a multiple of 4, too.
  template <bool ALIGNED>
  __device__ __forceinline__ void load(const Matrix<F>& matrix, int base, int chunk, int g) {
    typedef typename F::T T;
    chunk = min(chunk, matrix.chunks() - 1);
    scales.load(matrix, base, chunk, g);
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      if constexpr (F::COLUMNS) {
        if (i % 2) continue;
        const u32* words = static_cast<const u32*>(matrix.values);
        const int row = matrix.row(base + row_in_tile<F>(i, 0, g));
        uint4 four[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const u32* line = words + size_t(chunk * 4 + w) * matrix.N;
          if constexpr (ALIGNED)
            four[w] = load_once(line + min(row, matrix.N - 4));
          else
            four[w] = make_uint4(line[min(row, matrix.N - 1)], line[min(row + 1, matrix.N - 1)],
                                 line[min(row + 2, matrix.N - 1)], line[min(row + 3, matrix.N - 1)]);
        }
        transpose(i, four);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const size_t row = min(matrix.row(base + row_in_tile<F>(i, half, g)), matrix.N - 1);
          if constexpr (F::PLAIN && !ALIGNED)
            values[i][half] = load_unit<false>(static_cast<const T*>(matrix.values) + row * matrix.K,
                                               chunk * 8, matrix.K);
          else
            values[i][half] = load_once(static_cast<const uint4*>(matrix.values) +
                                        row * matrix.chunks() + chunk);
        }
      }
    }
  }

  // Four words of four rows each, as they lie in a transposed matrix, to tiles i and i + 1.
  __device__ __forceinline__ void transpose(int i, const uint4 (&four)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r)
      values[i + r / 2][r % 2] = make_uint4(word_of(four[0], r), word_of(four[1], r),
                                            word_of(four[2], r), word_of(four[3], r));
  }

  // A unit of tile i as the left operand of two steps.
  template <bool SPREAD>
  __device__ __forceinline__ void unpack(int i, int unit, u32 (&a)[2][4]) const {
    u32 upper[4], lower[4];
    F::template unpack<SPREAD>(values[i][0], unit, scales.pair(i, 0), upper);
    F::template unpack<SPREAD>(values[i][1], unit, scales.pair(i, 1), lower);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      a[step][0] = upper[step * 2], a[step][1] = lower[step * 2];
      a[step][2] = upper[step * 2 + 1], a[step][3] = lower[step * 2 + 1];
    }
  }
};

// Where a result goes: out [*, N] = sum + bias [N] + residual [*, N], rounded once; or, where it is
// part of a sum, to `partial` [*, N].
template <typename Out, typename B, bool BIAS, bool RESIDUAL>
struct Output {
  static constexpr bool GATED = false;
  Out* out;
  const B* bias;
  const Out* residual;
  float* partial;
  int N;

  __device__ __forceinline__ void store(int token, int row, float sum) const {
    const size_t at = size_t(token) * N + row;
    if (partial) {
      partial[at] = sum;
      return;
    }
    if constexpr (BIAS) sum += to_float(bias[row]);
    if constexpr (RESIDUAL) sum += to_float(residual[at]);
    out[at] = from_float<Out>(sum);
  }
};

// out [*, half] = F(gate) * up: sums of rows that belong together (`Matrix::half`).
template <typename Out, class F>
struct GatedOutput {
  static constexpr bool GATED = true;
  Out* out;
  int half;

  // Of rows p and p + 16 of the tiles.
  __device__ __forceinline__ void store(int token, int p, float gate, float up) const {
    const int row = p >> 5 << 4 | (p & 15);
    if (row < half) out[size_t(token) * half + row] = from_float<Out>(F::of(gate) * up);
  }
};

}  // namespace relaxlm
#endif
