// From the products that are q, k and v to rotated queries and to pages: a warp per token and head.
#ifndef RELAXLM_ROPE
#define RELAXLM_ROPE
#include "cached.cuh"
#include "neighbours.cuh"

namespace relaxlm {

constexpr int ROPE_WARPS = 4;

// float8 e4m3 of a value, to nearest even; magnitudes from 448 on become 448. CUDA's own conversion
// needs sm_89.
template <>
__device__ __forceinline__ Float8 from_float<Float8>(float x) {
  const float limited = fminf(fabsf(x), 448.f);
  const u32 bits = __float_as_uint(limited), sign = __float_as_uint(x) >> 31 << 7;
  // Normal: drop 20 of 23 mantissa bits, rounding; then the exponent's bias is 120 too large.
  const u32 normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3);
  // Subnormal, in steps of 2 ** -9: adding 2 ** 14 leaves room for exactly that step.
  const u32 subnormal = __float_as_uint(limited + 16384.f) - ((127 + 14) << 23);
  return {(unsigned char)(sign | (limited < 0.015625f ? subnormal : normal))};
}

// A product of which every row has some heads, one after the other.
template <typename T>
struct Heads {
  const T* product;
  int width, first, count;  // of a row; where its heads begin, and how many they are
};

// T: dtype of products and queries. VEC: neighbours that a lane takes. TURNED: features of a head that
// turn, the first ones; PAIRS: with their neighbours, else with those TURNED / 2 further. W: dtype of
// the weights of a norm on each query and key head, if NORM. SCALED: queries have a factor each.
template <typename T_, typename Stored_, typename W_, int DIM_, int VEC_, int TURNED_, bool PAIRS_,
          bool NORM_, bool SCALED_>
struct Rope {
  typedef T_ T;
  typedef Stored_ Stored;
  typedef W_ W;
  static constexpr int DIM = DIM_, VEC = VEC_, TURNED = TURNED_, HALF = TURNED / 2;
  static constexpr bool PAIRS = PAIRS_, NORM = NORM_, SCALED = SCALED_;
  static constexpr int STEPS = (DIM + 32 * VEC - 1) / (32 * VEC);
  static_assert(DIM % VEC == 0 && TURNED % 2 == 0 && TURNED <= DIM, "whole neighbours and pairs");
};

// cos, sin [n, HALF], factors [n], slots [n]; out [n, q.count, DIM]; pages as `Cached` has them.
template <class S>
__device__ __forceinline__ void rope_append(
    const typename S::T* q, int q_width, int q_first, int q_heads, const typename S::T* k,
    int k_width, int k_first, const typename S::T* v, int v_width, int v_first, int kv_heads,
    const typename S::W* q_norm, const typename S::W* k_norm, float eps, const void* cos,
    const void* sin, const void* factors, const int* slots, void* k_pages, void* v_pages,
    void* k_scales, void* v_scales, typename S::T* out, int token, int block,
    unsigned char* shared) {
  typedef typename S::T T;
  typedef typename S::Stored Stored;
  constexpr int VEC = S::VEC;
  const int lane = threadIdx.x, number = block * ROPE_WARPS + threadIdx.y;
  if (number >= q_heads + 2 * kv_heads) return;
  const int part = number < q_heads ? 0 : number < q_heads + kv_heads ? 1 : 2;
  const Heads<T> heads = part == 0   ? Heads<T>{q, q_width, q_first, q_heads}
                         : part == 1 ? Heads<T>{k, k_width, k_first, kv_heads}
                                     : Heads<T>{v, v_width, v_first, kv_heads};
  const int head = part == 0 ? number : (number - q_heads) % kv_heads;
  const T* from = heads.product + size_t(token) * heads.width + heads.first + head * S::DIM;

  float values[S::STEPS][VEC];
#pragma unroll
  for (int i = 0; i < S::STEPS; ++i) {
    const int d = (i * 32 + lane) * VEC;
    if (d < S::DIM)
      load_neighbours(from + d, values[i]);
    else
#pragma unroll
      for (int j = 0; j < VEC; ++j) values[i][j] = 0;
  }
  if (S::NORM && part < 2) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < S::STEPS; ++i)
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum += values[i][j] * values[i][j];
    for (int distance = 16; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(0xffffffff, sum, distance);
    const float spread = rsqrtf(sum / S::DIM + eps);
    const typename S::W* weights = part == 0 ? q_norm : k_norm;
#pragma unroll
    for (int i = 0; i < S::STEPS; ++i)
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        const int d = (i * 32 + lane) * VEC + j;
        if (d < S::DIM) values[i][j] *= spread * to_float(weights[d]);
      }
  }
  if (S::TURNED > 0 && part < 2) {
    float* row = reinterpret_cast<float*>(shared) + threadIdx.y * S::DIM;
    const float* cosines = static_cast<const float*>(cos) + size_t(token) * S::HALF;
    const float* sines = static_cast<const float*>(sin) + size_t(token) * S::HALF;
#pragma unroll
    for (int i = 0; i < S::STEPS; ++i)
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        const int d = (i * 32 + lane) * VEC + j;
        if (d < S::TURNED) row[d] = values[i][j];
      }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < S::STEPS; ++i)
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        const int d = (i * 32 + lane) * VEC + j;
        if (d >= S::TURNED) continue;
        const bool first = S::PAIRS ? d % 2 == 0 : d < S::HALF;
        const int other = S::PAIRS ? d ^ 1 : first ? d + S::HALF : d - S::HALF;
        const int angle = S::PAIRS ? d / 2 : first ? d : other;
        const float sine = first ? -sines[angle] : sines[angle];
        values[i][j] = values[i][j] * cosines[angle] + row[other] * sine;
      }
  }
  if (part == 0) {
    const float factor = S::SCALED ? static_cast<const float*>(factors)[token] : 1.f;
    T* to = out + (size_t(token) * q_heads + head) * S::DIM;
#pragma unroll
    for (int i = 0; i < S::STEPS; ++i) {
      const int d = (i * 32 + lane) * VEC;
#pragma unroll
      for (int j = 0; j < VEC; ++j) values[i][j] *= factor;
      if (d < S::DIM) store_neighbours(to + d, values[i]);
    }
    return;
  }
  const int slot = slots[token];
  const size_t line = (size_t(slot / 16) * kv_heads + head) * 16 + slot % 16;
  float scale = 1;
  if constexpr (is_scaled<Stored>) {
    float largest = 1e-20f;
#pragma unroll
    for (int i = 0; i < S::STEPS; ++i)
#pragma unroll
      for (int j = 0; j < VEC; ++j) largest = fmaxf(largest, fabsf(values[i][j]));
    for (int distance = 16; distance > 0; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, distance));
    scale = largest * (1 / 448.f);
    if (lane == 0) static_cast<float*>(part == 1 ? k_scales : v_scales)[line] = scale;
  }
  Stored* to = static_cast<Stored*>(part == 1 ? k_pages : v_pages) + line * S::DIM;
#pragma unroll
  for (int i = 0; i < S::STEPS; ++i) {
    const int d = (i * 32 + lane) * VEC;
#pragma unroll
    for (int j = 0; j < VEC; ++j)
      if constexpr (is_scaled<Stored>) values[i][j] /= scale;
    if (d < S::DIM) store_neighbours(to + d, values[i]);
  }
}

}  // namespace relaxlm
#endif
