// Entry points: what kernels call.
#ifndef RELAXLM_LINEAR
#define RELAXLM_LINEAR
#include "activations.cuh"
#include "experts.cuh"
#include "simt.cuh"
#include "skinny.cuh"
#include "tiled.cuh"

namespace relaxlm {

// The ways to multiply: of a kind of tile, how many rows it has of the matrix and of x, the threads
// and bytes of shared memory that it needs, and the code.
template <class F, bool ALIGNED, int MT, int NT, int WARPS>
struct Skinny {
  template <class Output>
  static __device__ __forceinline__ void run(const typename F::T* x, const Matrix<F>& matrix,
                                             const Rows& rows, int base, int part, int parts,
                                             const Output& output, unsigned char* shared) {
    skinny<F, ALIGNED, MT, NT, WARPS>(x, matrix, rows, base, output,
                                      reinterpret_cast<float*>(shared));
  }
};

template <class F, bool ALIGNED, int WR, int WT, int MT, int NT, int STAGES>
struct Tiled {
  template <class Output>
  static __device__ __forceinline__ void run(const typename F::T* x, const Matrix<F>& matrix,
                                             const Rows& rows, int base, int part, int parts,
                                             const Output& output, unsigned char* shared) {
    tiled<Tiling<F, ALIGNED, WR, WT, MT, NT, STAGES>>(x, matrix, rows, base, part, parts, output,
                                                              shared);
  }
};

template <class F, bool ALIGNED, int TOKENS>
struct SkinnyFloat {
  template <class Output>
  static __device__ __forceinline__ void run(const float* x, const Matrix<F>& matrix,
                                             const Rows& rows, int base, int part, int parts,
                                             const Output& output, unsigned char*) {
    skinny_float<F, ALIGNED, TOKENS>(x, matrix, rows, base, output);
  }
};

template <class F, bool ALIGNED>
struct TiledFloat {
  template <class Output>
  static __device__ __forceinline__ void run(const float* x, const Matrix<F>& matrix,
                                             const Rows& rows, int base, int part, int parts,
                                             const Output& output, unsigned char* shared) {
    tiled_float<F, ALIGNED>(x, matrix, rows, base, output, reinterpret_cast<float*>(shared));
  }
};

// out [m, N] = x [m, K] times the matrix, + bias [N], + residual [m, N]; with several parts of the
// columns, partial [parts, m, N] instead, and `add_parts` does the rest.
template <class F, class Way, int ROWS, int TOKENS, bool BIAS, bool RESIDUAL, typename Out,
          typename B>
__device__ __forceinline__ void linear(const typename F::T* __restrict__ x,
                                       const void* __restrict__ values,
                                       const typename F::T* __restrict__ scales,
                                       const B* __restrict__ bias,
                                       const Out* __restrict__ residual, Out* __restrict__ out,
                                       unsigned char* shared, int m, int N, int K, int tile,
                                       int tile_of_x, int part, int parts, void* partial) {
  const int first = tile_of_x * TOKENS;
  const Matrix<F> matrix = {values, scales, N, K};
  float* mine = parts > 1 ? static_cast<float*>(partial) + size_t(part) * m * N : nullptr;
  const Output<Out, B, BIAS, RESIDUAL> output = {out, bias, residual, mine, N};
  Way::run(x, matrix, {nullptr, first, min(TOKENS, m - first), 1}, tile * ROWS, part, parts, output,
           shared);
}

// out [m, N / 2] = Activation(gate) * up, where gate is x [m, K] times the first N / 2 rows of the matrix,
// and up x times the others.
template <class F, class Way, int ROWS, int TOKENS, class Activation>
__device__ __forceinline__ void gated_linear(const typename F::T* __restrict__ x,
                                             const void* __restrict__ values,
                                             const typename F::T* __restrict__ scales,
                                             typename F::T* __restrict__ out,
                                             unsigned char* shared, int m, int N, int K, int tile,
                                             int tile_of_x) {
  const int first = tile_of_x * TOKENS;
  const Matrix<F> matrix = {values, scales, N, K, N / 2};
  const GatedOutput<typename F::T, Activation> output = {out, N / 2};
  Way::run(x, matrix, {nullptr, first, min(TOKENS, m - first), 1}, tile * ROWS, 0, 1, output,
           shared);
}

// out [m, heads, N] = x [m, heads, K] times each head's own matrix of values [heads, N, K].
template <class F, class Way, int ROWS, int TOKENS>
__device__ __forceinline__ void head_linear(const typename F::T* __restrict__ x,
                                            const void* __restrict__ values,
                                            typename F::T* __restrict__ out, unsigned char* shared,
                                            int m, int heads, int N, int K, int tile,
                                            int tile_of_x, int head) {
  typedef typename F::T T;
  const int first = tile_of_x * TOKENS;
  const Matrix<F> matrix = Matrix<F>{values, nullptr, N, K}.number(head);
  const Output<T, T, false, false> output = {out, nullptr, nullptr, nullptr, N};
  Way::run(x, matrix, {nullptr, first, min(TOKENS, m - first), 1, heads, head}, tile * ROWS, 0, 1,
           output, shared);
}

template <bool BIAS, bool RESIDUAL, typename Out, typename B>
__device__ __forceinline__ void add_parts(const float* __restrict__ partial,
                                          const B* __restrict__ bias,
                                          const Out* __restrict__ residual, Out* __restrict__ out,
                                          int m, int N, int parts, int token, int block) {
  const int row = block * 256 + threadIdx.y * 32 + threadIdx.x;
  if (row >= N) return;
  float sum = 0;
  for (int i = 0; i < parts; ++i) sum += partial[(size_t(i) * m + token) * N + row];
  const Output<Out, B, BIAS, RESIDUAL> output = {out, bias, residual, nullptr, N};
  output.store(token, row, sum);
}

// out [rows, N]: row i is row i / repeat of x [*, K] times matrix chosen[i] of values [E, N, K].
template <class F, class Way, int ROWS, bool DIRECT>
__device__ __forceinline__ void expert_linear(
    const typename F::T* __restrict__ x, const int* __restrict__ chosen,
    const int* __restrict__ plan, const void* __restrict__ values,
    const typename F::T* __restrict__ scales, typename F::T* __restrict__ out,
    unsigned char* shared, int rows, int repeat, int N, int K, int tile, int tile_of_x) {
  typedef typename F::T T;
  const ExpertTile found = expert_tile<DIRECT>(chosen, plan, tile_of_x, rows, repeat);
  if (found.expert < 0) return;
  const Matrix<F> matrix = Matrix<F>{values, scales, N, K}.number(found.expert);
  const Output<T, T, false, false> output = {out, nullptr, nullptr, nullptr, N};
  Way::run(x, matrix, found.rows, tile * ROWS, 0, 1, output, shared);
}

}  // namespace relaxlm
#endif
