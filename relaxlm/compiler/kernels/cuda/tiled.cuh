// Many rows of x times a stored matrix, on tensor cores.
//
// A block computes WR * MT * 16 columns of the result (rows of the matrix) for WT * NT * 8 rows of x.
// Both come to shared memory as they are stored, a stage of columns at a time, while the stage before
// is multiplied. Warps unpack the matrix as they take it from there, each weight once for all rows of
// x of the warp, so the stage of a 4-bit matrix is a quarter of that of x.
//
// Pieces of 16 bytes are put where the 8 lanes that shared memory serves at a time find them in
// different banks.
#ifndef RELAXLM_TILED
#define RELAXLM_TILED
#include "tile.cuh"

namespace relaxlm {

template <class F_, bool ALIGNED_, int WR_, int WT_, int MT_, int NT_, int STAGES_>
struct Tiling {
  typedef F_ F;
  typedef typename F::T T;
  static constexpr bool ALIGNED = ALIGNED_;
  static constexpr int WR = WR_, WT = WT_, MT = MT_, NT = NT_, STAGES = STAGES_;
  static constexpr int THREADS = 32 * WR * WT, ROWS = WR * MT * 16, TOKENS = WT * NT * 8;
  // Steps of four chunks per stage, so that a stage has at least 64 columns.
  static constexpr int STEPS = F::CODES >= 32 ? 1 : 2;
  static constexpr int COLUMNS = 4 * F::CODES * STEPS;
  static constexpr int X_PIECES = COLUMNS / 8, W_PIECES = 4 * STEPS;  // of a row
  static constexpr int STAGE_PIECES = TOKENS * X_PIECES + ROWS * W_PIECES;
  // For results on their way out, of a warp: two tiles of 8 rows of x.
  static constexpr int STRIDE = MT * 16 + 4, OUT_FLOATS = 16 * STRIDE;
  static constexpr int PIPELINE_BYTES = STAGES * STAGE_PIECES * 16;
  static constexpr int OUT_BYTES = WR * WT * OUT_FLOATS * 4;
  static constexpr int BYTES =
      (PIPELINE_BYTES > OUT_BYTES ? PIPELINE_BYTES : OUT_BYTES) + TOKENS * 4;

  // Where piece c of row t of x is in its row, and piece c of row r of the matrix.
  static __device__ __forceinline__ int x_place(int c, int t) {
    if constexpr (F::CODES == 32) return c ^ (c >> 3 & 1) ^ (t & 1) << 1;
    if constexpr (F::CODES == 16) return c ^ (t & 1);
    if constexpr (F::CODES == 8) return c ^ (t & 1) << 2;
    return c;
  }
  static __device__ __forceinline__ int w_place(int c, int r) {
    return STEPS == 1 ? c : c ^ (r & 1) << 2;
  }
  // Of a transposed matrix: where the piece with the rows 4 c .. 4 c + 4 is in line `word`.
  static __device__ __forceinline__ int column_place(int c, int word) {
    return c ^ (word >> 2 & 3) << 1;
  }
};

// Brings one stage to shared memory: x [TOKENS, X_PIECES], then the matrix [ROWS, W_PIECES], or
// [4 W_PIECES words, ROWS / 4] if it is transposed.
template <class S>
__device__ __forceinline__ void load_stage(uint4* stage, int first, const typename S::T* x,
                                           const int* row_of_x, int count,
                                           const Matrix<typename S::F>& matrix, int base,
                                           int thread) {
  typedef typename S::F F;
  const int K = matrix.K;
#pragma unroll 4
  for (int at = thread; at < S::TOKENS * S::X_PIECES; at += S::THREADS) {
    const int t = at / S::X_PIECES, c = at % S::X_PIECES, k = first * 4 * F::CODES + c * 8;
    uint4* to = stage + t * S::X_PIECES + S::x_place(c, t);
    const typename S::T* row = x + size_t(row_of_x[t]) * K;
    if constexpr (S::ALIGNED)
      copy_async(to, row + (k < K ? k : 0), t < count && k < K);
    else
      *to = t < count ? load_unit<false>(row, k, K) : make_uint4(0, 0, 0, 0);
  }
  stage += S::TOKENS * S::X_PIECES;
  const int chunks = matrix.chunks();
#pragma unroll 2
  for (int at = thread; at < S::ROWS * S::W_PIECES; at += S::THREADS) {
    if constexpr (F::COLUMNS) {
      const int word = at / (S::ROWS / 4), c = at % (S::ROWS / 4), line = first * 16 + word;
      const u32* words = static_cast<const u32*>(matrix.values) + size_t(line) * matrix.N;
      uint4* to = stage + word * (S::ROWS / 4) + S::column_place(c, word);
      const bool there = line < chunks * 4;
      if constexpr (S::ALIGNED) {
        copy_async(to, there ? words + min(matrix.row(base + c * 4), matrix.N - 4) : words, there);
      } else {
        u32 row[4];
        for (int r = 0; r < 4; ++r)
          row[r] = there ? words[min(matrix.row(base + c * 4 + r), matrix.N - 1)] : 0;
        *to = make_uint4(row[0], row[1], row[2], row[3]);
      }
    } else {
      const int r = at / S::W_PIECES, c = at % S::W_PIECES, chunk = first * 4 + c;
      const size_t row = min(matrix.row(base + r), matrix.N - 1);
      uint4* to = stage + r * S::W_PIECES + S::w_place(c, r);
      if constexpr (F::PLAIN && !S::ALIGNED) {
        *to = load_unit<false>(static_cast<const typename S::T*>(matrix.values) + row * K,
                               chunk * 8, K);
      } else {
        const uint4* from = static_cast<const uint4*>(matrix.values) + row * chunks;
        copy_async(to, from + (chunk < chunks ? chunk : 0), chunk < chunks);
      }
    }
  }
}

// Of several parts of the columns, part number `part`.
template <class S, class Output>
__device__ __forceinline__ void tiled(const typename S::T* __restrict__ x,
                                      Matrix<typename S::F> matrix, Rows rows, int base, int part,
                                      int parts, Output output, unsigned char* shared) {
  typedef typename S::F F;
  typedef typename S::T T;
  constexpr int MT = S::MT, NT = S::NT;
  const int lane = threadIdx.x, warp = threadIdx.y, g = lane / 4, q = lane % 4;
  const int thread = warp * 32 + lane;
  const int first_row = warp / S::WT * MT * 16, first_token = warp % S::WT * NT * 8;
  int* row_of_x = reinterpret_cast<int*>(shared + S::BYTES - S::TOKENS * 4);
  uint4* stages = reinterpret_cast<uint4*>(shared);
  for (int t = thread; t < S::TOKENS; t += S::THREADS)
    row_of_x[t] = t < rows.count ? rows.in(t) : 0;
  __syncthreads();

  const int all = (matrix.chunks() + S::STEPS * 4 - 1) / (S::STEPS * 4);
  const int each = (all + parts - 1) / parts, begin = part * each, end = min(begin + each, all);
  auto fetch = [&](int number) {
    if (number < end)
      load_stage<S>(stages + number % S::STAGES * S::STAGE_PIECES, number * S::STEPS, x, row_of_x,
                    rows.count, matrix, base, thread);
    commit_copies();
  };
  Scales<F, MT> next[S::STEPS];
  auto fetch_scales = [&](int number) {
#pragma unroll
    for (int s = 0; s < S::STEPS; ++s)
      next[s].load(matrix, base + first_row, (number * S::STEPS + s) * 4 + q, g);
  };
#pragma unroll
  for (int i = 0; i < S::STAGES - 1; ++i) fetch(begin + i);
  fetch_scales(begin);

  float sums[MT][NT][4] = {};
  for (int number = begin; number < end; ++number) {
    wait_for_copies<S::STAGES - 2>();
    __syncthreads();
    fetch(number + S::STAGES - 1);
    Scales<F, MT> scales[S::STEPS];
#pragma unroll
    for (int s = 0; s < S::STEPS; ++s) scales[s] = next[s];
    if (number + 1 < end) fetch_scales(number + 1);

    const uint4* columns = stages + number % S::STAGES * S::STAGE_PIECES;
    const uint4* weights = columns + S::TOKENS * S::X_PIECES;
#pragma unroll
    for (int s = 0; s < S::STEPS; ++s) {
      Chunks<F, MT> chunks;
      chunks.scales = scales[s];
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        if constexpr (F::COLUMNS) {
          if (i % 2 == 0) {
            uint4 four[4];
#pragma unroll
            for (int w = 0; w < 4; ++w) {
              const int word = s * 16 + q * 4 + w;
              const int piece = (first_row + row_in_tile<F>(i, 0, g)) / 4;
              four[w] = weights[word * (S::ROWS / 4) + S::column_place(piece, word)];
            }
            chunks.transpose(i, four);
          }
        } else {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = first_row + row_in_tile<F>(i, half, g);
            chunks.values[i][half] = weights[row * S::W_PIECES + S::w_place(s * 4 + q, row)];
          }
        }
      }
#pragma unroll
      for (int unit = 0; unit < F::UNITS; ++unit) {
        u32 a[MT][2][4];
#pragma unroll
        for (int i = 0; i < MT; ++i) chunks.template unpack<false>(i, unit, a[i]);
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          const int token = first_token + j * 8 + g;
          const int c = (s * 4 + q) * F::UNITS + unit;
          const uint4 b = columns[token * S::X_PIECES + S::x_place(c, token)];
#pragma unroll
          for (int i = 0; i < MT; ++i) {
            multiply(sums[i][j], a[i][0], b.x, b.y, T());
            multiply(sums[i][j], a[i][1], b.z, b.w, T());
          }
        }
      }
    }
  }

  wait_for_copies<0>();
  __syncthreads();
  float* mine = reinterpret_cast<float*>(shared) + warp * S::OUT_FLOATS;
#pragma unroll
  for (int j = 0; j < NT; j += 2) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int e = 0; e < 8; ++e)
        mine[(e / 4 * 8 + q * 2 + e % 2) * S::STRIDE + row_in_tile<F>(i, e / 2 % 2, g)] =
            sums[i][j + e / 4][e % 4];
    __syncwarp();
    for (int at = lane; at < 16 * MT * 16; at += 32) {
      const int token = first_token + j * 8 + at / (MT * 16), row = at % (MT * 16);
      const float* sum = mine + at / (MT * 16) * S::STRIDE + row;
      if constexpr (Output::GATED) {
        if (token < rows.count && (row & 16) == 0)
          output.store(rows.out(token), base + first_row + row, sum[0], sum[16]);
      } else {
        if (token < rows.count && base + first_row + row < matrix.N)
          output.store(rows.out(token), base + first_row + row, sum[0]);
      }
    }
    __syncwarp();
  }
}

}  // namespace relaxlm
#endif
