// Entry points of latent attention: what kernels call.
#ifndef RELAXLM_LATENTS
#define RELAXLM_LATENTS
#include "attend.cuh"
#include "latent.cuh"

namespace relaxlm {

// S: a `LatentAttention`. A block is a tile of rows and a part of the context.
template <class S>
__device__ __forceinline__ void attend_latent_tiles(
    const typename S::T* __restrict__ q_latent, const typename S::T* __restrict__ q_rope,
    const int* positions, const int* row_offsets, const int* page_offsets, const int* page_ids,
    const int* kv_lengths, const typename S::Stored* pages, typename S::T* __restrict__ out,
    void* partial, int n, int batch, int heads, float factor, int tile, int part, int parts,
    unsigned char* shared) {
  attend_latents<S>(
      q_latent, q_rope,
      {positions, row_offsets, page_offsets, page_ids, kv_lengths, nullptr, batch},
      Cached<typename S::Stored>{pages, nullptr, 1, S::WIDTH}, {factor, 0},
      results_of<typename S::T, S::LATENT>(out, partial, nullptr, false, n * heads, heads, part,
                                           parts),
      tile, parts, shared);
}

// The same without tensor cores: a block is a token, and SHARE heads.
template <typename T, typename Stored, int LATENT, int ROPE, int SHARE>
__device__ __forceinline__ void attend_latent_tokens(
    const T* __restrict__ q_latent, const T* __restrict__ q_rope, const int* positions,
    const int* row_offsets, const int* page_offsets, const int* page_ids, const int* kv_lengths,
    const Stored* pages, T* __restrict__ out, void* partial, int n, int batch, int heads,
    float factor, int token, int share, int part, int parts, unsigned char* shared) {
  auto query = [&](int row, int d) {
    return to_float(d < LATENT ? q_latent[size_t(row) * LATENT + d]
                               : q_rope[size_t(row) * ROPE + d - LATENT]);
  };
  const Cached<Stored> latents = {pages, nullptr, 1, LATENT + ROPE};
  attend_plain<T, Stored, LATENT + ROPE, LATENT, SHARE>(
      query, {positions, row_offsets, page_offsets, page_ids, kv_lengths, nullptr, batch}, latents,
      latents, {0, 0, false}, {factor, 0}, Slopes<false>{},
      results_of<T, LATENT>(out, partial, nullptr, false, n * heads, heads, part, parts), token, 0,
      share * SHARE, parts, reinterpret_cast<float*>(shared));
}

}  // namespace relaxlm
#endif
