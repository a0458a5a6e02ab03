// Multi-head latent attention over pages on tensor cores (DeepSeek-AI 2024, arXiv:2405.04434).
//
// The cache has one vector per token, [latent, rotated key], which is the key of all heads and, but for
// the rotated key, their value. So a block has RT * 16 rows of queries, (token, head), and each vector
// that it brings to shared memory serves all of them twice.
//
// Of a row tile's DW warps, each scores a share of the tokens against whole vectors, leaves the scores
// in shared memory, and adds up its own share of the latent's elements for all tokens.
#ifndef RELAXLM_LATENT
#define RELAXLM_LATENT
#include "cached.cuh"
#include "pages.cuh"

namespace relaxlm {

template <typename T_, typename Stored_, int LATENT_, int ROPE_, int RT_, int TOKENS_, int STAGES_>
struct LatentAttention {
  typedef T_ T;
  typedef Stored_ Stored;
  static constexpr int LATENT = LATENT_, ROPE = ROPE_, WIDTH = LATENT + ROPE;
  static constexpr int RT = RT_, TOKENS = TOKENS_, STAGES = STAGES_;
  static constexpr int WARPS = 8, DW = WARPS / RT, ROWS = RT * 16, THREADS = WARPS * 32;
  static_assert(LATENT % 8 == 0 && ROPE % 8 == 0 && TOKENS % 16 == 0, "whole pieces and steps");
  typedef Vectors<WIDTH> V;
  // Tiles of 8 elements of a warp, and of 8 tokens that it scores.
  static constexpr int DT = (LATENT + 16 * DW - 1) / (16 * DW) * 2;
  static constexpr int NT = (TOKENS / 8 + DW - 1) / DW;
  static constexpr bool EXACT = DT * 8 * DW == LATENT;
  static constexpr int STRIDE = TOKENS + 8;
  static constexpr int BYTES =
      (ROWS + STAGES * TOKENS) * V::PIECES * 16 + ROWS * STRIDE * 4;
};

template <class S>
__device__ __forceinline__ void attend_latents(
    const typename S::T* __restrict__ q_latent, const typename S::T* __restrict__ q_rope,
    Tables tables, Cached<typename S::Stored> latents, Score score,
    Results<typename S::T, S::LATENT> results, int tile_number, int parts, unsigned char* shared) {
  typedef typename S::T T;
  typedef typename S::V V;
  const int lane = threadIdx.x, warp = threadIdx.y, g = lane / 4, quad = lane % 4;
  const int thread = warp * 32 + lane, my_rows = warp / S::DW * 16, share = warp % S::DW;
  const int heads = results.heads;
  const RowTile tile = find_rows<S::ROWS>(tables, heads, tile_number);
  if (tile.sequence < 0) return;
  // Rows follow each other in the step as they do in the tile.
  const int step_row = tables.row_offsets[tile.sequence] * heads + tile.first;
  auto position = [&](int r) {
    return tables.positions[(step_row + min(r, tile.count - 1)) / heads];
  };
  const View view = {0, 0, false};
  const int first = position(0);
  const Range<S::TOKENS> range(view, first, position(tile.count - 1),
                               tables.kv_lengths[tile.sequence], 0);
  const int each = (range.steps + parts - 1) / parts;
  const int begin = results.part * each, end = min(begin + each, range.steps);
  const int* pages = tables.page_ids + tables.page_offsets[tile.sequence];

  uint4* queries = reinterpret_cast<uint4*>(shared);
  uint4* stages = queries + S::ROWS * V::PIECES;
  float* scores = reinterpret_cast<float*>(stages + S::STAGES * S::TOKENS * V::PIECES);
  for (int at = thread; at < S::ROWS * V::PIECES; at += S::THREADS) {
    const int r = at / V::PIECES, c = at % V::PIECES * 8;
    const size_t row = step_row + min(r, tile.count - 1);
    const T* from = c < S::LATENT ? q_latent + row * S::LATENT + c
                                  : q_rope + row * S::ROPE + (c - S::LATENT);
    queries[V::place(c / 8, r)] =
        c < S::WIDTH ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
  }
  auto fetch = [&](int step) {
    if (step < end)
      latents.template fetch<T, V, S::TOKENS, S::THREADS>(
          stages + step % S::STAGES * S::TOKENS * V::PIECES, pages, 0, range.token(step),
          range.limit(step), thread);
    commit_copies();
  };

  float sums[S::DT][4] = {}, largest[2] = {NO_SCORE, NO_SCORE}, total[2] = {};
  const int positions[2] = {position(my_rows + g), position(my_rows + g + 8)};
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
    const uint4* vectors = stages + step % S::STAGES * S::TOKENS * V::PIECES;

    float products[S::NT][4] = {};
#pragma unroll 4
    for (int c = 0; c < V::PIECES; c += 4) {
      u32 a[2][4];
      load_rows<V>(queries, my_rows, c, g, quad, a);
#pragma unroll
      for (int j = 0; j < S::NT; ++j) {
        const int t = (j * S::DW + share) * 8;
        if (t < S::TOKENS) {
          const uint4 b = vectors[V::place(c + quad, t + g)];
          multiply(products[j], a[0], b.x, b.y, T());
          multiply(products[j], a[1], b.z, b.w, T());
        }
      }
    }
    const int start = range.token(step);
    const bool masked = start + S::TOKENS > range.end || start + S::TOKENS - 1 > first;
#pragma unroll
    for (int j = 0; j < S::NT; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int t = (j * S::DW + share) * 8 + quad * 2 + e % 2, token = start + t;
        float exponent = score(products[j][e]);
        if (masked && (token >= range.end || token > positions[e / 2])) exponent = NO_SCORE;
        if (t < S::TOKENS) scores[(my_rows + g + e / 2 * 8) * S::STRIDE + t] = exponent;
      }
    __syncthreads();

    // All warps of a row tile find the same weights.
    float weights[S::TOKENS / 8][4], most[2] = {largest[0], largest[1]}, base[2];
#pragma unroll
    for (int j = 0; j < S::TOKENS / 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 both = *reinterpret_cast<const float2*>(
            &scores[(my_rows + g + h * 8) * S::STRIDE + j * 8 + quad * 2]);
        weights[j][h * 2] = both.x, weights[j][h * 2 + 1] = both.y;
        most[h] = fmaxf(most[h], fmaxf(both.x, both.y));
      }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      for (int distance = 1; distance < 4; distance *= 2)
        most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffff, most[h], distance));
      base[h] = most[h] == NO_SCORE ? 0 : most[h];
      const float kept = exp2f(largest[h] - base[h]);
      largest[h] = most[h];
      total[h] *= kept;
#pragma unroll
      for (int d = 0; d < S::DT; ++d) sums[d][h * 2] *= kept, sums[d][h * 2 + 1] *= kept;
    }
#pragma unroll
    for (int j = 0; j < S::TOKENS / 8; j += 2) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& weight = weights[j + i / 4][i % 4];
        weight = exp2f(weight - base[i % 4 / 2]);
        total[i % 4 / 2] += weight;
      }
      u32 a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = Pair<T>::of(from_float<T>(weights[j + i / 2][i % 2 * 2]),
                           from_float<T>(weights[j + i / 2][i % 2 * 2 + 1]));
      const int t = j * 8 + lane % 16;
#pragma unroll
      for (int d = 0; d < S::DT; d += 2) {
        const int c = share * S::DT + d;
        if (S::EXACT || c * 8 < S::LATENT) {
          u32 b[4];
          load_transposed(b, vectors + V::place(c + lane / 16, t));
          multiply(sums[d], a, b[0], b[1], T());
          multiply(sums[d + 1], a, b[2], b[3], T());
        }
      }
    }
  }

#pragma unroll
  for (int h = 0; h < 2; ++h)
    for (int distance = 1; distance < 4; distance *= 2)
      total[h] += __shfl_xor_sync(0xffffffff, total[h], distance);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = my_rows + g + h * 8;
    if (r >= tile.count) continue;
    const float factor =
        results.begin(step_row + r, largest[h], total[h], quad == 0 && share == 0);
#pragma unroll
    for (int d = 0; d < S::DT; ++d)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = (share * S::DT + d) * 8 + quad * 2 + e;
        if (S::EXACT || at < S::LATENT) results.store(step_row + r, at, sums[d][h * 2 + e], factor);
      }
  }
}

}  // namespace relaxlm
#endif
