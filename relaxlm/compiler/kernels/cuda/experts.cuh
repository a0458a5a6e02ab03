// Rows of x, each times the matrix of its own expert.
//
// A plan sorts rows by expert and cuts each expert's rows into tiles: plan[0] tiles; then the rows in
// order; then of each tile its expert, where its rows start in the order, and how many they are.
#ifndef RELAXLM_EXPERTS
#define RELAXLM_EXPERTS
#include "tile.cuh"

namespace relaxlm {

// One block of 1024 threads. chosen [rows]; plan [1 + 4 rows]; shared: 8 * experts bytes.
__device__ __forceinline__ void plan_tiles(const int* __restrict__ chosen, int* __restrict__ plan,
                                           int rows, int experts, int tile,
                                           unsigned char* shared) {
  const int thread = threadIdx.x;
  int *ends = reinterpret_cast<int*>(shared), *tiles = ends + experts;
  for (int e = thread; e < experts; e += 1024) ends[e] = 0;
  __syncthreads();
  for (int row = thread; row < rows; row += 1024) atomicAdd(&ends[chosen[row]], 1);
  __syncthreads();
  if (thread < 32) {
    // A lane's experts follow each other: what they have, then what the lanes before have.
    const int each = (experts + 31) / 32, first = thread * each;
    int before[2] = {0, 0};
    for (int e = first; e < min(first + each, experts); ++e) {
      before[0] += ends[e];
      before[1] += (ends[e] + tile - 1) / tile;
    }
    int mine[2] = {before[0], before[1]};
    for (int distance = 1; distance < 32; distance *= 2)
      for (int i = 0; i < 2; ++i) {
        const int other = __shfl_up_sync(0xffffffff, before[i], distance);
        if (thread >= distance) before[i] += other;
      }
    if (thread == 31) plan[0] = before[1];
    for (int i = 0; i < 2; ++i) before[i] -= mine[i];
    for (int e = first; e < min(first + each, experts); ++e) {
      const int count = ends[e];
      ends[e] = before[0], tiles[e] = before[1];
      before[0] += count, before[1] += (count + tile - 1) / tile;
    }
  }
  __syncthreads();
  int *order = plan + 1, *entries = order + rows;
  // `ends` has starts now, and moves on to ends as rows are put in their places.
  for (int e = thread; e < experts; e += 1024) {
    const int start = ends[e], end = e + 1 < experts ? ends[e + 1] : rows;
    for (int i = 0; start + i * tile < end; ++i) {
      int* entry = entries + (tiles[e] + i) * 3;
      entry[0] = e, entry[1] = start + i * tile, entry[2] = min(tile, end - start - i * tile);
    }
  }
  __syncthreads();
  for (int row = thread; row < rows; row += 1024) order[atomicAdd(&ends[chosen[row]], 1)] = row;
}

struct ExpertTile {
  int expert;  // -1: there is no such tile
  Rows rows;
};

// Tile `number`. DIRECT: there is no plan, every row is a tile of its own.
template <bool DIRECT>
__device__ __forceinline__ ExpertTile expert_tile(const int* chosen, const int* plan, int number,
                                                  int rows, int repeat) {
  if constexpr (DIRECT) return {chosen[number], {nullptr, number, 1, repeat}};
  if (number >= plan[0]) return {-1, {nullptr, 0, 0, 1}};
  const int* entry = plan + 1 + rows + number * 3;
  return {entry[0], {plan + 1, entry[1], entry[2], repeat}};
}

}  // namespace relaxlm
#endif
