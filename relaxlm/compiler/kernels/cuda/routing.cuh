// Which experts a token passes (models/routing.py): a warp for each row of scores.
#ifndef RELAXLM_ROUTING
#define RELAXLM_ROUTING
#include "weights.cuh"

namespace relaxlm {

constexpr int ROUTING_WARPS = 4;

// Whether a score comes before another one: it is larger, or as large with a lower number.
__device__ __forceinline__ bool is_before(float value, int number, float other, int other_number) {
  return value > other || (value == other && number < other_number);
}

// The EACH largest of a row of scores [n, EXPERTS], the largest first, of equal ones the first: values
// and numbers [n, EACH]. NaN is not taken while there is anything else.
template <int EXPERTS, int EACH>
__device__ __forceinline__ void choose_experts(const float* __restrict__ scores,
                                               float* __restrict__ values,
                                               int* __restrict__ numbers, int n, int block) {
  constexpr int MINE = (EXPERTS + 31) / 32;
  const int row = block * ROUTING_WARPS + threadIdx.y, lane = threadIdx.x;
  if (row >= n) return;
  const float nothing = __uint_as_float(0xff800000);  // -inf
  float mine[MINE];
  bool left[MINE];
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    const int e = i * 32 + lane;
    mine[i] = e < EXPERTS ? scores[size_t(row) * EXPERTS + e] : 0.f;
    left[i] = e < EXPERTS && mine[i] == mine[i];
  }
  for (int place = 0; place < EACH; ++place) {
    float best = nothing;
    int number = EXPERTS;
#pragma unroll
    for (int i = 0; i < MINE; ++i)
      if (left[i] && is_before(mine[i], i * 32 + lane, best, number))
        best = mine[i], number = i * 32 + lane;
    for (int distance = 16; distance > 0; distance /= 2) {
      const float other = __shfl_xor_sync(0xffffffff, best, distance);
      const int other_number = __shfl_xor_sync(0xffffffff, number, distance);
      if (is_before(other, other_number, best, number)) best = other, number = other_number;
    }
#pragma unroll
    for (int i = 0; i < MINE; ++i) left[i] = left[i] && i * 32 + lane != number;
    if (lane == 0) {
      const int chosen = min(number, EXPERTS - 1);
      numbers[size_t(row) * EACH + place] = chosen;
      values[size_t(row) * EACH + place] = scores[size_t(row) * EXPERTS + chosen];
    }
  }
}

// Scores [n, EXPERTS] of the experts in the `kept` best of GROUPS groups, and `otherwise` for all
// others. A group is as good as its best expert, or as its best two together.
template <int EXPERTS, int GROUPS, int BEST>
__device__ __forceinline__ void limit_to_groups(const float* __restrict__ scores,
                                                float* __restrict__ limited, int n, int kept,
                                                float otherwise, int block) {
  static_assert(GROUPS <= 32, "a lane for each group");
  constexpr int EACH = EXPERTS / GROUPS;
  const int row = block * ROUTING_WARPS + threadIdx.y, lane = threadIdx.x;
  if (row >= n) return;
  scores += size_t(row) * EXPERTS, limited += size_t(row) * EXPERTS;
  const float nothing = __uint_as_float(0xff800000);
  float first = nothing, second = nothing;
  if (lane < GROUPS)
    for (int e = 0; e < EACH; ++e) {
      const float score = scores[lane * EACH + e];
      second = fmaxf(fminf(first, score), second);
      first = fmaxf(first, score);
    }
  const float value = BEST == 1 ? first : first + second;
  int rank = 0;
  for (int other = 0; other < GROUPS; ++other)
    rank += is_before(__shfl_sync(0xffffffff, value, other), other, value, lane);
  const bool stays = rank < kept;
  for (int first_expert = 0; first_expert < EXPERTS; first_expert += 32) {
    const int e = first_expert + lane;
    const int group_stays = __shfl_sync(0xffffffff, int(stays), min(e, EXPERTS - 1) / EACH);
    if (e < EXPERTS) limited[e] = group_stays ? scores[e] : otherwise;
  }
}

}  // namespace relaxlm
#endif
