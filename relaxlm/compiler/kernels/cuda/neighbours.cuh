// Neighbouring values that a thread reads or writes at once, as float.
#ifndef RELAXLM_NEIGHBOURS
#define RELAXLM_NEIGHBOURS
#include "weights.cuh"

namespace relaxlm {

template <typename T, int N>
struct alignas(N * sizeof(T)) Neighbours {
  T values[N];
};

// Their address is a multiple of N values.
template <typename T, int N>
__device__ __forceinline__ void load_neighbours(const T* from, float (&to)[N]) {
  const Neighbours<T, N> read = *reinterpret_cast<const Neighbours<T, N>*>(from);
#pragma unroll
  for (int j = 0; j < N; ++j) to[j] = to_float(read.values[j]);
}

template <typename T, int N>
__device__ __forceinline__ void store_neighbours(T* to, const float (&from)[N]) {
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    // The compiler would store four halves one by one.
    Neighbours<u32, N / 2> written;
#pragma unroll
    for (int j = 0; j < N / 2; ++j)
      written.values[j] =
          Pair<T>::of(from_float<T>(from[2 * j]), from_float<T>(from[2 * j + 1]));
    *reinterpret_cast<Neighbours<u32, N / 2>*>(to) = written;
  } else {
    Neighbours<T, N> written;
#pragma unroll
    for (int j = 0; j < N; ++j) written.values[j] = from_float<T>(from[j]);
    *reinterpret_cast<Neighbours<T, N>*>(to) = written;
  }
}

}  // namespace relaxlm
#endif
