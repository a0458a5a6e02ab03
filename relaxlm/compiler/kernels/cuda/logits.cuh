// What choosing tokens needs to know of logits [m, vocab] (runtime/peaks.py): a warp per BLOCK of a row.
#ifndef RELAXLM_LOGITS
#define RELAXLM_LOGITS
#include "weights.cuh"

namespace relaxlm {

constexpr int LOGIT_WARPS = 4;

// peaks [m, blocks]: the largest of each block, NaN if there is one in it.
template <int BLOCK>
__device__ __forceinline__ void logit_peaks(const float* __restrict__ logits,
                                            float* __restrict__ peaks, int m, int vocab, int group) {
  const int blocks = (vocab + BLOCK - 1) / BLOCK, number = group * LOGIT_WARPS + threadIdx.y;
  if (number >= m * blocks) return;
  const float* row = logits + size_t(number / blocks) * vocab;
  const int first = number % blocks * BLOCK;
  float largest = __uint_as_float(0xff800000);  // -inf
  int numbers = 1;
#pragma unroll
  for (int i = threadIdx.x; i < BLOCK; i += 32)
    if (first + i < vocab) {
      const float logit = row[first + i];
      numbers &= logit == logit;
      largest = fmaxf(largest, logit);
    }
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, distance));
    numbers &= __shfl_xor_sync(0xffffffff, numbers, distance);
  }
  if (threadIdx.x == 0) peaks[number] = numbers ? largest : __uint_as_float(0x7fc00000);
}

// out [count, BLOCK]: the blocks places [count], counted through all rows; -inf beyond a row's end.
template <int BLOCK>
__device__ __forceinline__ void gather_logits(const float* __restrict__ logits,
                                              const int* __restrict__ places,
                                              float* __restrict__ out, int count, int vocab,
                                              int group) {
  const int blocks = (vocab + BLOCK - 1) / BLOCK, number = group * LOGIT_WARPS + threadIdx.y;
  if (number >= count) return;
  const float* row = logits + size_t(places[number] / blocks) * vocab;
  const int first = places[number] % blocks * BLOCK;
#pragma unroll
  for (int i = threadIdx.x; i < BLOCK; i += 32)
    out[size_t(number) * BLOCK + i] =
        first + i < vocab ? row[first + i] : __uint_as_float(0xff800000);
}

// sums [count, blocks]: of exp((logit - reference) factor) over the blocks of the rows numbers [count];
// references and factors [count] are float32 in words.
template <int BLOCK>
__device__ __forceinline__ void weigh_logits(const float* __restrict__ logits,
                                             const int* __restrict__ numbers,
                                             const int* __restrict__ references,
                                             const int* __restrict__ factors,
                                             float* __restrict__ sums, int count, int vocab,
                                             int group) {
  const int blocks = (vocab + BLOCK - 1) / BLOCK, number = group * LOGIT_WARPS + threadIdx.y;
  if (number >= count * blocks) return;
  const int which = number / blocks, first = number % blocks * BLOCK;
  const float* row = logits + size_t(numbers[which]) * vocab;
  const float reference = __uint_as_float(u32(references[which]));
  const float factor = __uint_as_float(u32(factors[which]));
  float sum = 0;
#pragma unroll
  for (int i = threadIdx.x; i < BLOCK; i += 32)
    if (first + i < vocab) sum += expf((row[first + i] - reference) * factor);
  for (int distance = 16; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(0xffffffff, sum, distance);
  if (threadIdx.x == 0) sums[number] = sum;
}

}  // namespace relaxlm
#endif
