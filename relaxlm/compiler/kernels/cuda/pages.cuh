// What attention kernels share: where cached tokens are, who sees them, and how results of parts of
// the context are put together.
//
// A block takes rows of one sequence: (token, head) in this order, of the heads that share keys.
// Cached token j of a sequence has the position j before the gap that dropped pages leave, and
// j + gap behind it.
#ifndef RELAXLM_PAGES
#define RELAXLM_PAGES
#include "weights.cuh"

namespace relaxlm {

constexpr int PAGE = 16;
constexpr float LOG2E = 1.4426950408889634f;
// Below any score, but finite: a row that sees nothing must not give inf - inf.
constexpr float NO_SCORE = -1e30f;

// Of a step (docs/architecture.md). dropped: null where no page ever is.
struct Tables {
  const int *positions, *row_offsets, *page_offsets, *page_ids, *kv_lengths, *dropped;
  int batch;
};

// Which tokens a query sees: those up to itself, and with a window only those from `oldest` on and
// the first `sinks`.
struct View {
  int window, sinks;
  bool chunked;  // the window starts at its multiples

  __device__ __forceinline__ int oldest(int position) const {
    return window == 0 ? 0 : chunked ? position - position % window : position - window + 1;
  }
  __device__ __forceinline__ bool sees(int position, int token) const {
    return token <= position && (token >= oldest(position) || token < sinks);
  }
  // Tokens in front of the gap: whole pages.
  __device__ __forceinline__ int before_gap() const { return (sinks + PAGE - 1) / PAGE * PAGE; }
};

// Scores before the softmax, as exponents of 2.
struct Score {
  float factor;  // of products; with a cap, 2 / cap is in it
  float cap;     // 0: none

  __device__ __forceinline__ float operator()(float product) const {
    if (cap == 0) return product * factor;
    return cap * LOG2E - 2 * cap * LOG2E / (1 + exp2f(product * factor));
  }
};

// ALiBi: what the scores of a query head lose for every token between key and query. Without, there
// is nothing of it in the code.
template <bool ANY>
struct Slopes {
  const float* slopes;  // [heads]

  // Of a query head, as exponents of 2.
  __device__ __forceinline__ float of(int head) const {
    if constexpr (ANY)
      return slopes[head] * LOG2E;
    else
      return 0;
  }
  // What lane `head` of a warp holds: fewer registers than a slope of each head.
  __device__ __forceinline__ static float of_lane(float mine, int head) {
    if constexpr (ANY)
      return __shfl_sync(0xffffffff, mine, head);
    else
      return 0;
  }
  __device__ __forceinline__ static float nearer(float score, float slope, int distance) {
    if constexpr (ANY)
      return score - slope * float(distance);
    else
      return score;
  }
};

// The rows first .. first + count of a sequence; sequence -1: there is no such tile.
struct RowTile {
  int sequence, first, count;
};

// Tile `number` of ROWS rows, of the sequences' tiles one after the other. Called by whole warps.
template <int ROWS>
__device__ __forceinline__ RowTile find_rows(const Tables& tables, int heads, int number) {
  const int lane = threadIdx.x;
  for (int begin = 0; begin < tables.batch; begin += 32) {
    const int s = begin + lane;
    const int rows =
        s < tables.batch ? (tables.row_offsets[s + 1] - tables.row_offsets[s]) * heads : 0;
    const int tiles = (rows + ROWS - 1) / ROWS;
    int ends = tiles;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xffffffff, ends, distance);
      if (lane >= distance) ends += other;
    }
    const int all = __shfl_sync(0xffffffff, ends, 31);
    if (number < all) {
      // The first whose tiles end behind this one.
      int here = number >= ends;
      for (int distance = 16; distance > 0; distance /= 2)
        here += __shfl_xor_sync(0xffffffff, here, distance);
      const int mine = number - __shfl_sync(0xffffffff, ends - tiles, here);
      const int count = __shfl_sync(0xffffffff, rows, here);
      return {begin + here, mine * ROWS, min(ROWS, count - mine * ROWS)};
    }
    number -= all;
  }
  return {-1, 0, 0};
}

// The cached tokens that the rows of a tile may see, in steps of TOKENS: first of those in front of
// the window, then of the others.
template <int TOKENS>
struct Range {
  int before, start, end;  // [0, before) and [start, end); start is that of a page
  int steps_before, steps;

  // first and last: positions of the tile's first and last row.
  __device__ __forceinline__ Range(const View& view, int first, int last, int length, int gap) {
    end = min(length, last - gap + 1);
    before = 0, start = 0;
    if (view.window > 0) {
      const int oldest = view.oldest(first), edge = view.before_gap();
      start = oldest <= edge ? oldest : max(oldest - gap, edge);
      before = min(view.sinks, end);
      if (start <= before + TOKENS) before = start = 0;
      start = max(start, 0) / PAGE * PAGE;
    }
    steps_before = (before + TOKENS - 1) / TOKENS;
    steps = steps_before + max(end - start + TOKENS - 1, 0) / TOKENS;
  }
  __device__ __forceinline__ int token(int step) const {
    return step < steps_before ? step * TOKENS : start + (step - steps_before) * TOKENS;
  }
  __device__ __forceinline__ int limit(int step) const {
    return step < steps_before ? before : end;
  }
};

// Where the results of rows go: to the output, or, of parts of the context, to partial sums
// [parts, rows, DIM] and states [parts, rows, 2]: the largest score and the sum of weights.
template <typename T, int DIM>
struct Results {
  T* out;
  float *partial, *states;
  const float* sink_logits;  // [heads], or null
  int rows, heads, part;

  // Row `row` of the step; called with its largest score and its sum of weights.
  __device__ __forceinline__ float begin(int row, float largest, float sum, bool writes) const {
    if (partial) {
      if (writes) {
        states[(size_t(part) * rows + row) * 2] = largest;
        states[(size_t(part) * rows + row) * 2 + 1] = sum;
      }
      return 1;
    }
    return scale(row, largest, sum);
  }
  // What `begin` gave is the factor of its values.
  __device__ __forceinline__ void store(int row, int d, float value, float factor) const {
    if (partial)
      partial[(size_t(part) * rows + row) * DIM + d] = value;
    else
      out[size_t(row) * DIM + d] = from_float<T>(value * factor);
  }
  // A sink logit counts like the score of a token without a value.
  __device__ __forceinline__ float scale(int row, float largest, float sum) const {
    if (sink_logits == nullptr) return 1 / sum;
    const float logit = sink_logits[row % heads] * LOG2E, most = fmaxf(largest, logit);
    return exp2f(largest - most) / (sum * exp2f(largest - most) + exp2f(logit - most));
  }
};

// One warp per row: out [rows, DIM] of the parts.
template <typename T, int DIM>
__device__ __forceinline__ void merge_parts(const float* __restrict__ partial,
                                            const float* __restrict__ states,
                                            const float* sink_logits, T* __restrict__ out,
                                            int rows, int heads, int parts, int block) {
  const int row = block * 4 + threadIdx.y, lane = threadIdx.x;
  if (row >= rows) return;
  constexpr int EACH = (DIM + 31) / 32;
  float values[EACH] = {}, largest = NO_SCORE, sum = 0;
  for (int part = 0; part < parts; ++part) {
    const float* state = states + (size_t(part) * rows + row) * 2;
    const float most = fmaxf(largest, state[0]);
    const float kept = exp2f(largest - most), added = exp2f(state[0] - most);
    largest = most;
    sum = sum * kept + state[1] * added;
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (i * 32 + lane < DIM)
        values[i] = values[i] * kept +
                    partial[(size_t(part) * rows + row) * DIM + i * 32 + lane] * added;
  }
  const Results<T, DIM> results = {out, nullptr, nullptr, sink_logits, rows, heads, 0};
  const float factor = results.scale(row, largest, sum);
#pragma unroll
  for (int i = 0; i < EACH; ++i)
    if (i * 32 + lane < DIM) results.store(row, i * 32 + lane, values[i], factor);
}

}  // namespace relaxlm
#endif
