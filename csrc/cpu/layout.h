// Reading keys and values of one KV block and head, by layout.
//
// Both layouts offer the same two loops over a run of tokens inside one block, and both add up in
// the same order (over head dimensions for a logit, over tokens for an output), so that a token's
// logit has the same bits wherever the token lies.
#pragma once

#include "simd.h"

namespace vllm_delta {
namespace DELTA_ISA {

// How far ahead of their use keys and values are asked for, in rows of the block. A block's rows
// are read in strides that the hardware does not foresee.
constexpr int64_t kPrefetchRows = 16;

template <int kVectors, typename T>
DELTA_INLINE void prefetch(const T* row) {
  constexpr int kPerCacheLine = 64 / (kLanes * sizeof(T));
  for (int v = 0; v < kVectors; v += kPerCacheLine) __builtin_prefetch(row + v * kLanes);
}

// vLLM's "vec" and "vec16": K [head_size][block_size], V [block_size][head_size].
template <typename T>
struct TransposedLayout {
  // logits[g][0 .. 16*kVectors) = sum over d of query[g][d] * K[d][first .. ): no scale, no mask.
  template <int kHeads, int kVectors>
  static void logits(const T* block, int64_t block_size, int64_t head_size, int64_t first,
                     const float* query, float* out, int64_t out_stride) {
    f32x16 sums[kHeads][kVectors];
    for (int g = 0; g < kHeads; ++g) {
      for (int v = 0; v < kVectors; ++v) sums[g][v] = broadcast(0.0f);
    }
    const T* keys = block + first;
    for (int64_t d = 0; d < head_size; ++d, keys += block_size) {
      prefetch<kVectors>(keys + kPrefetchRows * block_size);
      f32x16 key[kVectors];
      for (int v = 0; v < kVectors; ++v) key[v] = load16(keys + v * kLanes);
      for (int g = 0; g < kHeads; ++g) {
        const f32x16 q = broadcast(query[g * head_size + d]);
        for (int v = 0; v < kVectors; ++v) sums[g][v] += q * key[v];
      }
    }
    for (int g = 0; g < kHeads; ++g) {
      for (int v = 0; v < kVectors; ++v) store16(out + g * out_stride + v * kLanes, sums[g][v]);
    }
  }

  // out[g][16*dim_vector ..) += sum over `count` tokens of weights[g][t] * V[first +
  // t][16*dim_vector ..)
  template <int kHeads, int kVectors>
  static void accumulate(const T* block, int64_t block_size, int64_t head_size, int64_t first,
                         int64_t count, int64_t dim_vector, const float* weights,
                         int64_t weights_stride, float* out) {
    f32x16 sums[kHeads][kVectors];
    float* const target = out + dim_vector * kLanes;
    for (int g = 0; g < kHeads; ++g) {
      for (int v = 0; v < kVectors; ++v) sums[g][v] = load16(target + g * head_size + v * kLanes);
    }
    const T* values = block + (block_size + first) * head_size + dim_vector * kLanes;
    for (int64_t t = 0; t < count; ++t, values += head_size) {
      prefetch<kVectors>(values + kPrefetchRows * head_size);
      f32x16 value[kVectors];
      for (int v = 0; v < kVectors; ++v) value[v] = load16(values + v * kLanes);
      for (int g = 0; g < kHeads; ++g) {
        const f32x16 weight = broadcast(weights[g * weights_stride + t]);
        for (int v = 0; v < kVectors; ++v) sums[g][v] += weight * value[v];
      }
    }
    for (int g = 0; g < kHeads; ++g) {
      for (int v = 0; v < kVectors; ++v) store16(target + g * head_size + v * kLanes, sums[g][v]);
    }
  }
};

// vLLM's "amx": K [block_size/16][head_size/2][16 tokens][2], V [head_size/16][block_size/2][16][2
// tokens].
template <typename T>
struct AmxLayout {
  template <int kHeads, int kVectors>
  static void logits(const T* block, int64_t, int64_t head_size, int64_t first, const float* query,
                     float* out, int64_t out_stride) {
    f32x16 sums[kHeads][kVectors];
    for (int g = 0; g < kHeads; ++g) {
      for (int v = 0; v < kVectors; ++v) sums[g][v] = broadcast(0.0f);
    }
    const int64_t group_size = kLanes * head_size;  // elements of 16 tokens
    const T* keys = block + first / kLanes * group_size;
    for (int64_t d = 0; d < head_size; d += 2, keys += 2 * kLanes) {
      f32x16 even[kVectors], odd[kVectors];
      for (int v = 0; v < kVectors; ++v) load16_pairs(keys + v * group_size, even[v], odd[v]);
      for (int g = 0; g < kHeads; ++g) {
        const f32x16 q_even = broadcast(query[g * head_size + d]);
        const f32x16 q_odd = broadcast(query[g * head_size + d + 1]);
        for (int v = 0; v < kVectors; ++v) {
          sums[g][v] += q_even * even[v];
          sums[g][v] += q_odd * odd[v];
        }
      }
    }
    for (int g = 0; g < kHeads; ++g) {
      for (int v = 0; v < kVectors; ++v) store16(out + g * out_stride + v * kLanes, sums[g][v]);
    }
  }

  template <int kHeads, int kVectors>
  static void accumulate(const T* block, int64_t block_size, int64_t head_size, int64_t first,
                         int64_t count, int64_t dim_vector, const float* weights,
                         int64_t weights_stride, float* out) {
    f32x16 sums[kHeads][kVectors];
    float* const target = out + dim_vector * kLanes;
    for (int g = 0; g < kHeads; ++g) {
      for (int v = 0; v < kVectors; ++v) sums[g][v] = load16(target + g * head_size + v * kLanes);
    }
    const int64_t dim_vector_size = block_size * kLanes;
    const T* values =
        block + block_size * head_size + dim_vector * dim_vector_size + first * kLanes;
    for (int64_t t = 0; t < count; t += 2, values += 2 * kLanes) {
      f32x16 even[kVectors], odd[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        load16_pairs(values + v * dim_vector_size, even[v], odd[v]);
      }
      const bool pair = t + 1 < count;  // behind the last token lies memory that was never written
      for (int g = 0; g < kHeads; ++g) {
        const f32x16 weight = broadcast(weights[g * weights_stride + t]);
        for (int v = 0; v < kVectors; ++v) sums[g][v] += weight * even[v];
        if (pair) {
          const f32x16 next = broadcast(weights[g * weights_stride + t + 1]);
          for (int v = 0; v < kVectors; ++v) sums[g][v] += next * odd[v];
        }
      }
    }
    for (int g = 0; g < kHeads; ++g) {
      for (int v = 0; v < kVectors; ++v) store16(target + g * head_size + v * kLanes, sums[g][v]);
    }
  }
};

}  // namespace DELTA_ISA
}  // namespace vllm_delta
