// Activations of float32, by the names of `kernels/activations.py`.
#ifndef RELAXLM_ACTIVATIONS
#define RELAXLM_ACTIVATIONS
#include "weights.cuh"

namespace relaxlm {

struct Sigmoid {
  static __device__ __forceinline__ float of(float x) { return 1 / (1 + expf(-x)); }
};
struct Silu {
  static __device__ __forceinline__ float of(float x) { return x / (1 + expf(-x)); }
};
struct Gelu {
  static __device__ __forceinline__ float of(float x) {
    return 0.5f * x * (1 + erff(x * 0.70710678118654752f));
  }
};
struct GeluTanh {
  // (1 + tanh(u)) / 2 is the sigmoid of 2 u, which loses no digits where tanh is almost -1.
  static __device__ __forceinline__ float of(float x) {
    return x * Sigmoid::of(1.5957691216057308f * (x + 0.044715f * x * x * x));
  }
};
struct Relu {
  static __device__ __forceinline__ float of(float x) { return x < 0 ? 0.f : x; }
};
struct Tanh {
  static __device__ __forceinline__ float of(float x) { return tanhf(x); }
};
struct Square {
  static __device__ __forceinline__ float of(float x) { return x * x; }
};

}  // namespace relaxlm
#endif
