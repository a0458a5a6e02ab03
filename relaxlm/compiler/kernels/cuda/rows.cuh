// What a kernel computes of every row: sums, products, activations and norms of its inputs, in float32,
// rounded once. The types here are the expressions of `kernels/row_expression.py`.
#ifndef RELAXLM_ROWS
#define RELAXLM_ROWS
#include "activations.cuh"
#include "neighbours.cuh"

namespace relaxlm {
namespace rows {

// A row as expressions see it: the inputs, its number, and what its inner norms found out.
template <int INPUTS, int NORMS>
struct Row {
  const void* inputs[INPUTS];
  size_t number;
  float centres[NORMS + 1], factors[NORMS + 1];
};

// Elements i .. i + N of an input [n, WIDTH], FIRST elements further.
template <int INPUT, typename T, int WIDTH, int FIRST>
struct Matrix {
  template <int N, class R>
  static __device__ __forceinline__ void load(const R& row, int i, float (&to)[N]) {
    load_neighbours(static_cast<const T*>(row.inputs[INPUT]) + row.number * WIDTH + FIRST + i, to);
  }
};

// Of an input that is the same for all rows.
template <int INPUT, typename T, int FIRST>
struct Vector {
  template <int N, class R>
  static __device__ __forceinline__ void load(const R& row, int i, float (&to)[N]) {
    load_neighbours(static_cast<const T*>(row.inputs[INPUT]) + FIRST + i, to);
  }
};

template <u32 BITS>
struct Number {
  template <int N, class R>
  static __device__ __forceinline__ void load(const R&, int, float (&to)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = __uint_as_float(BITS);
  }
};

struct Add {
  static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};
struct Subtract {
  static __device__ __forceinline__ float of(float a, float b) { return a - b; }
};
struct Multiply {
  static __device__ __forceinline__ float of(float a, float b) { return a * b; }
};
struct Divide {
  static __device__ __forceinline__ float of(float a, float b) { return a / b; }
};

template <class O, class Left, class Right>
struct Binary {
  template <int N, class R>
  static __device__ __forceinline__ void load(const R& row, int i, float (&to)[N]) {
    float right[N];
    Left::load(row, i, to);
    Right::load(row, i, right);
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = O::of(to[j], right[j]);
  }
};

template <class F, class X>
struct Activation {
  template <int N, class R>
  static __device__ __forceinline__ void load(const R& row, int i, float (&to)[N]) {
    X::load(row, i, to);
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = F::of(to[j]);
  }
};

// In place of a weight, a bias or a norm.
struct None {};

// (x - centre) * factor * (weight + shift) + bias; the factor is 1 / sqrt(mean square + eps). The
// centre is the mean of a row if LAYER, else 0.
template <bool LAYER_, u32 EPS, class Weight, class Bias, u32 SHIFT>
struct Norm {
  static constexpr bool LAYER = LAYER_;
  static __device__ __forceinline__ float eps() { return __uint_as_float(EPS); }
  template <int N, class R>
  static __device__ __forceinline__ void apply(const R& row, int i, float centre, float factor,
                                               float (&x)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = (x[j] - centre) * factor;
    if constexpr (!Same<Weight, None>::value) {
      float weight[N];
      Weight::load(row, i, weight);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] *= weight[j] + __uint_as_float(SHIFT);
    }
    if constexpr (!Same<Bias, None>::value) {
      float bias[N];
      Bias::load(row, i, bias);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] += bias[j];
    }
  }
};

// A norm within an expression, number INDEX of those of the kernel.
template <int INDEX_, class X_, class Rule_>
struct Normed {
  typedef X_ X;
  typedef Rule_ Rule;
  static constexpr int INDEX = INDEX_;
  template <int N, class R>
  static __device__ __forceinline__ void load(const R& row, int i, float (&to)[N]) {
    X::load(row, i, to);
    Rule::apply(row, i, row.centres[INDEX], row.factors[INDEX], to);
  }
};

// The sum over a block of WARPS warps, for every thread; shared [WARPS] floats.
template <int WARPS>
__device__ __forceinline__ float block_sum(float value, float* shared) {
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffff, value, distance);
  if constexpr (WARPS > 1) {
    __syncthreads();  // what the sum before left is read
    if (threadIdx.x == 0) shared[threadIdx.y] = value;
    __syncthreads();
    value = threadIdx.x < WARPS ? shared[threadIdx.x] : 0.f;
    for (int distance = 16; distance > 0; distance /= 2)
      value += __shfl_xor_sync(0xffffffff, value, distance);
  }
  return value;
}

// T: dtype of what is written. N: neighbours that a thread takes at once. KEEP: what the norm is of is
// written, too. Inner: the norms within the value, operands first.
template <typename T_, int SIZE_, int N_, int WARPS_, class Value_, class Rule_, bool KEEP_,
          class... Inner>
struct Kernel {
  typedef T_ T;
  typedef Value_ Value;
  typedef Rule_ Rule;
  static constexpr int SIZE = SIZE_, N = N_, WARPS = WARPS_, NORMS = sizeof...(Inner);
  static constexpr bool KEEP = KEEP_;
  static constexpr int STEPS = (SIZE + N * WARPS * 32 - 1) / (N * WARPS * 32);

  // The first element of this thread in a step; beyond the row there is none.
  static __device__ __forceinline__ int element(int step) {
    return ((step * WARPS + threadIdx.y) * 32 + threadIdx.x) * N;
  }

  template <class X, class R>
  static __device__ __forceinline__ void load(const R& row, float (&x)[STEPS][N]) {
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
      if (element(s) < SIZE)
        X::load(row, element(s), x[s]);
      else
#pragma unroll
        for (int j = 0; j < N; ++j) x[s][j] = 0;
  }

  // Centre and factor of a row by a rule.
  template <class Rule>
  static __device__ __forceinline__ void measure(const float (&x)[STEPS][N], float* shared,
                                                 float& centre, float& factor) {
    centre = 0;
    if constexpr (Rule::LAYER) {
      // Two passes: the mean of squares minus the squared mean loses digits.
      float sum = 0;
#pragma unroll
      for (int s = 0; s < STEPS; ++s)
#pragma unroll
        for (int j = 0; j < N; ++j) sum += x[s][j];
      centre = block_sum<WARPS>(sum, shared) / SIZE;
    }
    float squares = 0;
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float distance = element(s) < SIZE ? x[s][j] - centre : 0.f;
        squares += distance * distance;
      }
    factor = rsqrtf(block_sum<WARPS>(squares, shared) / SIZE + Rule::eps());
  }

  template <class One, class R>
  static __device__ __forceinline__ void measure_inner(R& row, float* shared) {
    float x[STEPS][N];
    load<typename One::X>(row, x);
    measure<typename One::Rule>(x, shared, row.centres[One::INDEX], row.factors[One::INDEX]);
  }

  template <class R>
  static __device__ __forceinline__ void run(R& row, T* kept, T* out, float* shared) {
    (measure_inner<Inner>(row, shared), ...);
    float x[STEPS][N];
    load<Value>(row, x);
    if constexpr (KEEP) store(x, kept + row.number * SIZE);
    if constexpr (!Same<Rule, None>::value) {
      float centre, factor;
      measure<Rule>(x, shared, centre, factor);
#pragma unroll
      for (int s = 0; s < STEPS; ++s)
        if (element(s) < SIZE) Rule::apply(row, element(s), centre, factor, x[s]);
    }
    store(x, out + row.number * SIZE);
  }

  static __device__ __forceinline__ void store(const float (&x)[STEPS][N], T* to) {
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
      if (element(s) < SIZE) store_neighbours(to + element(s), x[s]);
  }
};

}  // namespace rows

// A block per row: what norms need.
template <class K, class... P>
__device__ __forceinline__ void whole_row(typename K::T* kept, typename K::T* out,
                                          unsigned char* shared, int number, P... inputs) {
  rows::Row<sizeof...(P), K::NORMS> row = {{inputs...}, size_t(number)};
  K::run(row, kept, out, reinterpret_cast<float*>(shared));
}

// A thread for every N elements of n rows.
template <class K, class... P>
__device__ __forceinline__ void each_element(typename K::T* out, int n, int block, P... inputs) {
  constexpr int PIECES = K::SIZE / K::N;
  const size_t at = (size_t(block) * K::WARPS + threadIdx.y) * 32 + threadIdx.x;
  if (at >= size_t(n) * PIECES) return;
  const rows::Row<sizeof...(P), 0> row = {{inputs...}, at / PIECES};
  float x[K::N];
  K::Value::load(row, int(at % PIECES) * K::N, x);
  store_neighbours(out + at * K::N, x);
}

}  // namespace relaxlm
#endif
