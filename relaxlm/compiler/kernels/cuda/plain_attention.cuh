// Attention over pages without tensor cores: in float32, and for vectors of any size.
//
// A block has one query token and SHARE heads that share keys. Its warps take turns with the cached
// tokens; the lanes of a warp share out a vector's elements, so that it is read in whole memory
// transactions, once for all heads. Each warp keeps a running softmax per head, and the block merges
// them at the end.
#ifndef RELAXLM_PLAIN_ATTENTION
#define RELAXLM_PLAIN_ATTENTION
#include "cached.cuh"
#include "pages.cuh"

namespace relaxlm {

// query: (row of the step, element) -> float. Values are the first VALUES elements of `values`,
// which may be the keys themselves. shared: [4 warps, SHARE, VALUES + 2] floats.
template <typename T, typename Stored, int DIM, int VALUES, int SHARE, class Query, bool ALIBI>
__device__ __forceinline__ void attend_plain(const Query& query, Tables tables,
                                             Cached<Stored> keys, Cached<Stored> values, View view,
                                             Score score, Slopes<ALIBI> slopes,
                                             Results<T, VALUES> results, int token, int kv_head,
                                             int first_head, int parts, float* shared) {
  constexpr int WARPS = 4, KEYS = (DIM + 31) / 32, EACH = (VALUES + 31) / 32;
  const int lane = threadIdx.x, warp = threadIdx.y;
  int sequence = 0, behind = tables.batch;  // the last that starts at or before the token
  while (behind - sequence > 1) {
    const int half = (sequence + behind) / 2;
    (tables.row_offsets[half] <= token ? sequence : behind) = half;
  }
  const int position = tables.positions[token];
  const int gap = tables.dropped ? tables.dropped[sequence] : 0;
  const Range<PAGE> range(view, position, position, tables.kv_lengths[sequence], gap);
  const int each = (range.steps + parts - 1) / parts;
  const int begin = results.part * each, end = min(begin + each, range.steps);
  const int* pages = tables.page_ids + tables.page_offsets[sequence];
  const float my_slope = slopes.of(first_head + min(lane, SHARE - 1));

  float q[SHARE][KEYS], sums[SHARE][EACH] = {}, largest[SHARE], total[SHARE] = {};
#pragma unroll
  for (int h = 0; h < SHARE; ++h) {
    largest[h] = NO_SCORE;
#pragma unroll
    for (int i = 0; i < KEYS; ++i)
      q[h][i] = i * 32 + lane < DIM
                    ? query(token * results.heads + first_head + h, i * 32 + lane)
                    : 0.f;
  }
  for (int at = begin * PAGE + warp; at < end * PAGE; at += WARPS) {
    const int j = range.token(at / PAGE) + at % PAGE;
    const int there = j < view.before_gap() ? j : j + gap;
    if (j >= range.limit(at / PAGE) || !view.sees(position, there)) continue;
    const size_t line = keys.line(pages, kv_head, j);
    const float key_scale = is_scaled<Stored> ? keys.scales[line] : 1.f;
    const float value_scale = is_scaled<Stored> ? values.scales[line] : 1.f;
    float k[KEYS], v[EACH];
#pragma unroll
    for (int i = 0; i < KEYS; ++i)
      k[i] = to_float(keys.pages[line * keys.dim + min(i * 32 + lane, DIM - 1)]) * key_scale;
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      v[i] = to_float(values.pages[line * values.dim + min(i * 32 + lane, VALUES - 1)]) *
             value_scale;
#pragma unroll
    for (int h = 0; h < SHARE; ++h) {
      float product = 0;
#pragma unroll
      for (int i = 0; i < KEYS; ++i) product += q[h][i] * k[i];
      for (int distance = 1; distance < 32; distance *= 2)
        product += __shfl_xor_sync(0xffffffff, product, distance);
      const float slope = slopes.of_lane(my_slope, h);
      const float exponent = slopes.nearer(score(product), slope, position - there);
      const float most = fmaxf(largest[h], exponent);
      const float kept = exp2f(largest[h] - most), weight = exp2f(exponent - most);
      largest[h] = most;
      total[h] = total[h] * kept + weight;
#pragma unroll
      for (int i = 0; i < EACH; ++i) sums[h][i] = sums[h][i] * kept + v[i] * weight;
    }
  }

  float* states = shared + WARPS * SHARE * VALUES;
#pragma unroll
  for (int h = 0; h < SHARE; ++h) {
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (i * 32 + lane < VALUES)
        shared[(warp * SHARE + h) * VALUES + i * 32 + lane] = sums[h][i];
    if (lane == 0) {
      states[(warp * SHARE + h) * 2] = largest[h];
      states[(warp * SHARE + h) * 2 + 1] = total[h];
    }
  }
  __syncthreads();
  for (int h = warp; h < SHARE; h += WARPS) {
    float most = NO_SCORE, sum = 0, factors[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; ++w) most = fmaxf(most, states[(w * SHARE + h) * 2]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      factors[w] = exp2f(states[(w * SHARE + h) * 2] - most);
      sum += states[(w * SHARE + h) * 2 + 1] * factors[w];
    }
    const int row = token * results.heads + first_head + h;
    const float factor = results.begin(row, most, sum, lane == 0);
    for (int d = lane; d < VALUES; d += 32) {
      float value = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) value += shared[(w * SHARE + h) * VALUES + d] * factors[w];
      results.store(row, d, value, factor);
    }
  }
}

}  // namespace relaxlm
#endif
