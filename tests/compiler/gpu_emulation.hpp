// What the languages of Metal and OpenCL have and C++ has not, for tests/compiler/gpu_emulation.py.
#pragma once
#define EMU_MOST_THREADS 256  // of a workgroup: compiler/target.py, GPU_LIMITS
#include "cuda_emulation.hpp"

// Vectors: components by name and by index, and arithmetic by component.
template <class T, int N> struct Components;
template <class T> struct alignas(2 * sizeof(T)) Components<T, 2> { T x, y; };
template <class T> struct alignas(4 * sizeof(T)) Components<T, 3> { T x, y, z; };
template <class T> struct alignas(4 * sizeof(T)) Components<T, 4> { T x, y, z, w; };

template <class T, int N>
struct Vec : Components<T, N> {
  Vec() = default;
  template <class U, class = std::enable_if_t<std::is_convertible_v<U, T>>>
  Vec(U value) { for (int i = 0; i < N; ++i) (*this)[i] = T(value); }
  template <class... U, class = std::enable_if_t<sizeof...(U) == N && (N > 1)>>
  Vec(U... values) { int i = 0; (((*this)[i++] = T(values)), ...); }
  template <class U>
  explicit Vec(const Vec<U, N>& other) { for (int i = 0; i < N; ++i) (*this)[i] = T(other[i]); }
  Vec(const dim3& place) { unsigned all[] = {place.x, place.y, place.z}; for (int i = 0; i < N; ++i) (*this)[i] = T(all[i]); }
  T& operator[](int i) { return reinterpret_cast<T*>(this)[i]; }
  const T& operator[](int i) const { return reinterpret_cast<const T*>(this)[i]; }
#define GPU_OPERATOR(op)                                                 \
  friend Vec operator op(const Vec& a, const Vec& b) {                   \
    Vec r;                                                               \
    for (int i = 0; i < N; ++i) r[i] = T(a[i] op b[i]);                  \
    return r;                                                            \
  }                                                                      \
  Vec& operator op##=(const Vec& b) { return *this = *this op b; }
  GPU_OPERATOR(+) GPU_OPERATOR(-) GPU_OPERATOR(*) GPU_OPERATOR(/)
  GPU_OPERATOR(&) GPU_OPERATOR(|) GPU_OPERATOR(>>) GPU_OPERATOR(<<) GPU_OPERATOR(%)
#undef GPU_OPERATOR
};
#define GPU_VECTORS(type, name)   \
  using gpu_##name##2 = Vec<type, 2>; \
  using gpu_##name##3 = Vec<type, 3>; \
  using gpu_##name##4 = Vec<type, 4>;
GPU_VECTORS(bool, bool)
GPU_VECTORS(signed char, char)
GPU_VECTORS(unsigned char, uchar)
GPU_VECTORS(short, short)
GPU_VECTORS(unsigned short, ushort)
GPU_VECTORS(int, int)
GPU_VECTORS(unsigned, uint)
GPU_VECTORS(half, half)
GPU_VECTORS(float, float)
#undef GPU_VECTORS
using uint = unsigned;
using uchar = unsigned char;
using ushort = unsigned short;
// Functions of halves give halves.
#define GPU_HALF(name) inline half name(half x) { return half(std::name(float(x))); }
GPU_HALF(exp) GPU_HALF(exp2) GPU_HALF(log) GPU_HALF(sqrt) GPU_HALF(sin) GPU_HALF(cos)
GPU_HALF(tanh) GPU_HALF(fabs)
#undef GPU_HALF
inline half max(half a, half b) { return float(a) > float(b) ? a : b; }
inline half min(half a, half b) { return float(a) < float(b) ? a : b; }
inline half operator""h(long double value) { return half(double(value)); }

// Metal.
enum class mem_flags { mem_none, mem_threadgroup, mem_device };
#define threadgroup_barrier(flags) (void(flags), emu::wait_for_block(__LINE__))
#define simdgroup_barrier(flags) (void(flags), emu::exchange(~0u, 0, 0, __LINE__))
#define simd_shuffle(value, lane) emu::shuffle(~0u, value, emu::from_index(lane), __LINE__)
#define simd_shuffle_down(value, delta) emu::shuffle(~0u, value, emu::from_offset(delta), __LINE__)
#define simd_shuffle_up(value, delta) emu::shuffle(~0u, value, emu::from_offset(-int(delta)), __LINE__)
template <class T> T select(T no, T yes, bool condition) { return condition ? yes : no; }
template <class To, class From>
To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof value);
  return result;
}

// OpenCL.
#define __kernel extern "C"
#define restrict
#define CLK_LOCAL_MEM_FENCE 1
#define CLK_GLOBAL_MEM_FENCE 2
#define barrier(fences) (void(fences), emu::wait_for_block(__LINE__))
inline unsigned along(const dim3& place, int axis) {
  return axis == 0 ? place.x : axis == 1 ? place.y : place.z;
}
inline unsigned get_local_id(int axis) { return along(threadIdx, axis); }
inline unsigned get_group_id(int axis) { return along(blockIdx, axis); }
#define GPU_CONVERT(type) template <class T> type convert_##type(T value) { return type(value); }
GPU_CONVERT(char) GPU_CONVERT(uchar) GPU_CONVERT(short) GPU_CONVERT(ushort) GPU_CONVERT(int)
GPU_CONVERT(uint) GPU_CONVERT(half) GPU_CONVERT(float)
#undef GPU_CONVERT
#define GPU_VECTOR(n)                                                                        \
  template <class T> Vec<T, n> vload##n(int at, const T* from) {                             \
    Vec<T, n> r;                                                                             \
    for (int i = 0; i < n; ++i) r[i] = from[n * at + i];                                     \
    return r;                                                                                \
  }                                                                                          \
  template <class T> void vstore##n(Vec<T, n> value, int at, T* to) {                        \
    for (int i = 0; i < n; ++i) to[n * at + i] = value[i];                                   \
  }                                                                                          \
  template <class T> gpu_float##n convert_float##n(Vec<T, n> v) { return gpu_float##n(v); } \
  template <class T> gpu_half##n convert_half##n(Vec<T, n> v) { return gpu_half##n(v); }
GPU_VECTOR(2) GPU_VECTOR(4)
#undef GPU_VECTOR

// How many kernels of this library have been started.
static int64_t gpu_started = 0;
extern "C" int __tvm_ffi_kernels_started(void*, const TVMFFIAny*, int32_t, TVMFFIAny* result) {
  result->type_index = kTVMFFIInt;
  result->v_int64 = gpu_started;
  return 0;
}
