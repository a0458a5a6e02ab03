// Entry points of attention over pages: what kernels call.
#ifndef RELAXLM_ATTEND
#define RELAXLM_ATTEND
#include "attention.cuh"
#include "plain_attention.cuh"

namespace relaxlm {


// Where parts of the context leave their results: values [parts, rows, dim], then states.
template <typename T, int DIM>
__device__ __forceinline__ Results<T, DIM> results_of(T* out, void* partial,
                                                      const void* sink_logits, bool has_sinks,
                                                      int rows, int heads, int part, int parts) {
  float* values = parts > 1 ? static_cast<float*>(partial) : nullptr;
  return {out,
          values,
          values ? values + size_t(parts) * rows * DIM : nullptr,
          has_sinks ? static_cast<const float*>(sink_logits) : nullptr,
          rows,
          heads,
          part};
}

// S: an `Attention`. A block is a tile of rows, a KV head, and a part of the context.
template <class S>
__device__ __forceinline__ void attend_tiles(
    const typename S::T* __restrict__ q, const int* positions, const int* row_offsets,
    const int* page_offsets, const int* page_ids, const int* kv_lengths, const int* dropped,
    const void* k_pages, const void* v_pages, const void* k_scales, const void* v_scales,
    const void* sink_logits, const void* slopes, typename S::T* __restrict__ out, void* partial,
    int n, int batch, int heads, int kv_heads, int window, int sinks, int chunked,
    int has_sink_logits, float factor, float cap, int tile, int kv_head, int part, int parts,
    unsigned char* shared) {
  typedef typename S::Stored Stored;
  attend<S>(q, {positions, row_offsets, page_offsets, page_ids, kv_lengths, dropped, batch},
            Cached<Stored>{static_cast<const Stored*>(k_pages),
                           static_cast<const float*>(k_scales), kv_heads, S::DIM},
            Cached<Stored>{static_cast<const Stored*>(v_pages),
                           static_cast<const float*>(v_scales), kv_heads, S::DIM},
            heads / kv_heads, {window, sinks, chunked != 0}, {factor, cap},
            Slopes<S::ALIBI>{static_cast<const float*>(slopes)},
            results_of<typename S::T, S::DIM>(out, partial, sink_logits, has_sink_logits, n * heads,
                                              heads, part, parts),
            tile, kv_head, parts, shared);
}

// The same without tensor cores: a block is a token, and SHARE heads of a group.
template <typename T, typename Stored, int DIM, int SHARE, bool ALIBI>
__device__ __forceinline__ void attend_tokens(
    const T* __restrict__ q, const int* positions, const int* row_offsets, const int* page_offsets,
    const int* page_ids, const int* kv_lengths, const int* dropped, const void* k_pages,
    const void* v_pages, const void* k_scales, const void* v_scales, const void* sink_logits,
    const void* slopes, T* __restrict__ out, void* partial, int n, int batch, int heads,
    int kv_heads, int window, int sinks, int chunked, int has_sink_logits, float factor, float cap,
    int token, int share, int part, int parts, unsigned char* shared) {
  const int first = share * SHARE;
  auto query = [&](int row, int d) { return to_float(q[size_t(row) * DIM + d]); };
  attend_plain<T, Stored, DIM, DIM, SHARE>(
      query, {positions, row_offsets, page_offsets, page_ids, kv_lengths, dropped, batch},
      Cached<Stored>{static_cast<const Stored*>(k_pages), static_cast<const float*>(k_scales),
                     kv_heads, DIM},
      Cached<Stored>{static_cast<const Stored*>(v_pages), static_cast<const float*>(v_scales),
                     kv_heads, DIM},
      {window, sinks, chunked != 0}, {factor, cap},
      Slopes<ALIBI>{static_cast<const float*>(slopes)},
      results_of<T, DIM>(out, partial, sink_logits, has_sink_logits, n * heads, heads, part, parts),
      token, first / (heads / kv_heads), first, parts, reinterpret_cast<float*>(shared));
}

template <typename T, int DIM>
__device__ __forceinline__ void merge(const float* partial, const void* sink_logits, T* out, int n,
                                      int heads, int has_sink_logits, int parts, int block) {
  const int rows = n * heads;
  merge_parts<T, DIM>(partial, partial + size_t(parts) * rows * DIM,
                      has_sink_logits ? static_cast<const float*>(sink_logits) : nullptr, out, rows,
                      heads, parts, block);
}

}  // namespace relaxlm
#endif
