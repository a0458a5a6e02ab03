// Attention over pages on tensor cores, with an online softmax (Dao 2023, arXiv:2307.08691).
//
// A block has WM * 16 rows of queries of one KV head, so that the heads of a group read its keys and
// values once. It goes through the cached tokens TOKENS at a time, while the next ones are on their
// way to shared memory. With WK > 1 each of a row's WK warps has its own share of these tokens, and
// they are merged at the end: with few rows there is nothing else to share out.
#ifndef RELAXLM_ATTENTION
#define RELAXLM_ATTENTION
#include "cached.cuh"
#include "pages.cuh"

namespace relaxlm {

template <typename T_, typename Stored_, int DIM_, int WM_, int WK_, int TOKENS_, int STAGES_,
          bool ALIBI_>
struct Attention {
  typedef T_ T;
  typedef Stored_ Stored;  // what is in the pages; codes of float8 have scales
  static constexpr int DIM = DIM_, WM = WM_, WK = WK_, TOKENS = TOKENS_, STAGES = STAGES_;
  static constexpr int ROWS = WM * 16, THREADS = WM * WK * 32, MINE = TOKENS / WK;
  static constexpr bool ALIBI = ALIBI_;
  static_assert(MINE % 16 == 0, "a warp has tokens for whole steps");
  typedef Vectors<DIM> V;
  static constexpr int STAGE_PIECES = 2 * TOKENS * V::PIECES;
  static constexpr int PIPELINE_PIECES = ROWS * V::PIECES + STAGES * STAGE_PIECES;
  static constexpr int SCALE_BYTES = is_scaled<Stored> ? STAGES * 2 * TOKENS * 4 : 0;
  static constexpr int STRIDE = DIM + 4, MERGE_BYTES = WK > 1 ? WK * ROWS * (STRIDE + 2) * 4 : 0;
  static constexpr int BYTES = PIPELINE_PIECES * 16 + SCALE_BYTES > MERGE_BYTES
                                   ? PIPELINE_PIECES * 16 + SCALE_BYTES
                                   : MERGE_BYTES;
};

template <class S>
__device__ __forceinline__ void attend(const typename S::T* __restrict__ q, Tables tables,
                                       Cached<typename S::Stored> keys,
                                       Cached<typename S::Stored> values, int group, View view,
                                       Score score, Slopes<S::ALIBI> slopes,
                                       Results<typename S::T, S::DIM> results, int tile_number,
                                       int kv_head, int parts, unsigned char* shared) {
  typedef typename S::T T;
  typedef typename S::V V;
  constexpr int NT = S::MINE / 8, DT = (S::DIM + 15) / 16 * 2;
  const int lane = threadIdx.x, warp = threadIdx.y, g = lane / 4, quad = lane % 4;
  const int thread = warp * 32 + lane, my_rows = warp / S::WK * 16;
  const int my_tokens = warp % S::WK * S::MINE;
  const RowTile tile = find_rows<S::ROWS>(tables, group, tile_number);
  if (tile.sequence < 0) return;
  const int token0 = tables.row_offsets[tile.sequence], gap = tables.dropped[tile.sequence];
  // A row of the tile as one of the step, and its position; those beyond the last repeat it.
  auto step_row = [&](int r) {
    const int at = tile.first + min(r, tile.count - 1);
    return (token0 + at / group) * results.heads + kv_head * group + at % group;
  };
  auto position = [&](int r) {
    return tables.positions[token0 + (tile.first + min(r, tile.count - 1)) / group];
  };
  const int first = position(0), last = position(tile.count - 1);
  const Range<S::TOKENS> range(view, first, last, tables.kv_lengths[tile.sequence], gap);
  const int each = (range.steps + parts - 1) / parts;
  const int begin = results.part * each, end = min(begin + each, range.steps);
  const int* pages = tables.page_ids + tables.page_offsets[tile.sequence];

  uint4* queries = reinterpret_cast<uint4*>(shared);
  uint4* stages = queries + S::ROWS * V::PIECES;
  float* scales = reinterpret_cast<float*>(stages + S::STAGES * S::STAGE_PIECES);
  for (int at = thread; at < S::ROWS * V::PIECES; at += S::THREADS) {
    const int r = at / V::PIECES, c = at % V::PIECES;
    queries[V::place(c, r)] =
        c * 8 < S::DIM ? *reinterpret_cast<const uint4*>(q + size_t(step_row(r)) * S::DIM + c * 8)
                       : make_uint4(0, 0, 0, 0);
  }
  auto fetch = [&](int step) {
    if (step < end) {
      const int slot = step % S::STAGES;
      uint4* stage = stages + slot * S::STAGE_PIECES;
      const int token = range.token(step), limit = range.limit(step);
      keys.template fetch<T, V, S::TOKENS, S::THREADS>(stage, pages, kv_head, token, limit, thread);
      values.template fetch<T, V, S::TOKENS, S::THREADS>(stage + S::TOKENS * V::PIECES, pages,
                                                         kv_head, token, limit, thread);
      if constexpr (is_scaled<typename S::Stored>) {
        float* own = scales + slot * 2 * S::TOKENS;
        keys.template fetch_scales<S::TOKENS, S::THREADS>(own, pages, kv_head, token, limit,
                                                          thread);
        values.template fetch_scales<S::TOKENS, S::THREADS>(own + S::TOKENS, pages, kv_head, token,
                                                            limit, thread);
      }
    }
    commit_copies();
  };

  float sums[DT][4] = {}, largest[2] = {NO_SCORE, NO_SCORE}, total[2] = {};
  const int positions[2] = {position(my_rows + g), position(my_rows + g + 8)};
  const float my_slopes[2] = {slopes.of(step_row(my_rows + g) % results.heads),
                              slopes.of(step_row(my_rows + g + 8) % results.heads)};
#pragma unroll
  for (int i = 0; i < S::STAGES - 1; ++i) fetch(begin + i);
  for (int step = begin; step < end; ++step) {
    if constexpr (S::STAGES == 1) {
      __syncthreads();
      fetch(step);
      wait_for_copies<0>();
    } else {
      wait_for_copies<(S::STAGES > 1 ? S::STAGES - 2 : 0)>();
    }
    __syncthreads();
    if constexpr (S::STAGES > 1) fetch(step + S::STAGES - 1);
    const uint4* stage = stages + step % S::STAGES * S::STAGE_PIECES;
    const float* own = scales + step % S::STAGES * 2 * S::TOKENS;

    float weights[NT][4] = {};
#pragma unroll
    for (int c = 0; c < V::PIECES; c += 4) {
      u32 a[2][4];
      load_rows<V>(queries, my_rows, c, g, quad, a);
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const uint4 b = stage[V::place(c + quad, my_tokens + j * 8 + g)];
        multiply(weights[j], a[0], b.x, b.y, T());
        multiply(weights[j], a[1], b.z, b.w, T());
      }
    }

    const int start = range.token(step), limit = range.limit(step), edge = view.before_gap();
    // Where every row of the block sees every token, nobody asks.
    const bool masked = start + S::TOKENS > limit || start < edge ||
                        start + S::TOKENS - 1 + gap > first || start + gap < view.oldest(last);
    float most[2] = {largest[0], largest[1]};
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int t = my_tokens + j * 8 + quad * 2 + e % 2, token = start + t;
        float product = weights[j][e];
        if constexpr (is_scaled<typename S::Stored>) product *= own[t];
        product = score(product);
        const int at = token < edge ? token : token + gap;
        product = slopes.nearer(product, my_slopes[e / 2], positions[e / 2] - at);
        if (masked && (token >= limit || !view.sees(positions[e / 2], at))) product = NO_SCORE;
        weights[j][e] = product;
        most[e / 2] = fmaxf(most[e / 2], product);
      }
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      for (int distance = 1; distance < 4; distance *= 2)
        most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffff, most[h], distance));
      // A row that has seen nothing yet: its weights are to be 0, not 1.
      base[h] = most[h] == NO_SCORE ? 0 : most[h];
      const float kept = exp2f(largest[h] - base[h]);
      largest[h] = most[h];
      total[h] *= kept;
#pragma unroll
      for (int d = 0; d < DT; ++d) sums[d][h * 2] *= kept, sums[d][h * 2 + 1] *= kept;
    }
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        weights[j][e] = exp2f(weights[j][e] - base[e / 2]);
        total[e / 2] += weights[j][e];
        if constexpr (is_scaled<typename S::Stored>)
          weights[j][e] *= own[S::TOKENS + my_tokens + j * 8 + quad * 2 + e % 2];
      }

    const uint4* value_rows = stage + S::TOKENS * V::PIECES;
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
      u32 a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = Pair<T>::of(from_float<T>(weights[j + i / 2][i % 2 * 2]),
                           from_float<T>(weights[j + i / 2][i % 2 * 2 + 1]));
      const int t = my_tokens + j * 8 + lane % 16;
#pragma unroll
      for (int d = 0; d < DT; d += 2) {
        u32 b[4];
        load_transposed(b, value_rows + V::place(d + lane / 16, t));
        multiply(sums[d], a, b[0], b[1], T());
        multiply(sums[d + 1], a, b[2], b[3], T());
      }
    }
  }

#pragma unroll
  for (int h = 0; h < 2; ++h)
    for (int distance = 1; distance < 4; distance *= 2)
      total[h] += __shfl_xor_sync(0xffffffff, total[h], distance);
  if constexpr (S::WK == 1) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = my_rows + g + h * 8;
      if (r >= tile.count) continue;
      const int row = step_row(r);
      const float factor = results.begin(row, largest[h], total[h], quad == 0);
#pragma unroll
      for (int d = 0; d < DT; ++d)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (d * 8 + quad * 2 + e < S::DIM)
            results.store(row, d * 8 + quad * 2 + e, sums[d][h * 2 + e], factor);
    }
  } else {
    // [WK, ROWS]: values, and behind them all the largest scores and sums.
    float* merged = reinterpret_cast<float*>(shared);
    float* states = merged + S::WK * S::ROWS * S::STRIDE;
    wait_for_copies<0>();
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = warp % S::WK * S::ROWS + my_rows + g + h * 8;
      if (quad == 0) states[at * 2] = largest[h], states[at * 2 + 1] = total[h];
#pragma unroll
      for (int d = 0; d < DT; ++d)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (d * 8 + quad * 2 + e < S::DIM)
            merged[at * S::STRIDE + d * 8 + quad * 2 + e] = sums[d][h * 2 + e];
    }
    __syncthreads();
    for (int r = warp; r < tile.count; r += S::WM * S::WK) {
      float most = NO_SCORE, sum = 0, factors[S::WK];
#pragma unroll
      for (int w = 0; w < S::WK; ++w) most = fmaxf(most, states[(w * S::ROWS + r) * 2]);
#pragma unroll
      for (int w = 0; w < S::WK; ++w) {
        factors[w] = exp2f(states[(w * S::ROWS + r) * 2] - most);
        sum += states[(w * S::ROWS + r) * 2 + 1] * factors[w];
      }
      const int row = step_row(r);
      const float factor = results.begin(row, most, sum, lane == 0);
      for (int d = lane; d < S::DIM; d += 32) {
        float value = 0;
#pragma unroll
        for (int w = 0; w < S::WK; ++w)
          value += merged[(w * S::ROWS + r) * S::STRIDE + d] * factors[w];
        results.store(row, d, value, factor);
      }
    }
  }
}

}  // namespace relaxlm
#endif
