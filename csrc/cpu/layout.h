// Reading keys and values of one head from KV blocks, by layout.
//
// Both layouts offer the same two loops over vectors of 16 tokens, and both add up in the same
// order (over head dimensions for a logit, over tokens for an output), so that a token's logit has
// the same bits wherever the token lies. While they work on some vectors they ask for the next
// ones: blocks lie anywhere in memory, and their lines in strides that the hardware does not
// foresee.
#pragma once

#include "simd.h"

namespace vllm_delta {
namespace DELTA_ISA {

// 16 tokens: a block of one head, and the first token's place in it. Fewer at the end of a
// sequence.
template <typename T>
struct TokenVector {
  const T* block;
  int64_t first;
};

// vLLM's "vec" and "vec16": K [head_size][block_size], V [block_size][head_size].
template <typename T>
struct TransposedLayout {
  // out[g][16*v ..) = sum over d of query[g][d] * K[d][tokens of vectors[v]], for `kTokenVectors`
  // vectors: no scale, no mask. As many vectors follow in memory, to be asked for.
  template <int kHeads, int kTokenVectors>
  static void logits(const TokenVector<T>* vectors, int64_t block_size, int64_t head_size,
                     const float* query, float* out, int64_t out_stride) {
    const T* keys[2 * kTokenVectors];
    for (int v = 0; v < 2 * kTokenVectors; ++v) keys[v] = vectors[v].block + vectors[v].first;
    f32x16 sums[kHeads][kTokenVectors];
    for (int g = 0; g < kHeads; ++g) {
      for (int v = 0; v < kTokenVectors; ++v) sums[g][v] = broadcast(0.0f);
    }
    for (int64_t d = 0; d < head_size; ++d) {
      const int64_t line = d * block_size;
      for (int v = 0; v < kTokenVectors; ++v) __builtin_prefetch(keys[kTokenVectors + v] + line);
      f32x16 key[kTokenVectors];
      for (int v = 0; v < kTokenVectors; ++v) key[v] = load16(keys[v] + line);
      for (int g = 0; g < kHeads; ++g) {
        const f32x16 q = broadcast(query[g * head_size + d]);
        for (int v = 0; v < kTokenVectors; ++v) sums[g][v] += q * key[v];
      }
    }
    for (int g = 0; g < kHeads; ++g) {
      for (int v = 0; v < kTokenVectors; ++v)
        store16(out + g * out_stride + v * kLanes, sums[g][v]);
    }
  }

  // out[g][16*dim_vector ..) += sum over `count` tokens of weights[g][t] * V[first +
  // t][16*dim_vector ..). One more vector follows in memory, to be asked for.
  template <int kHeads, int kVectors>
  static void accumulate(const TokenVector<T>* vector, int64_t block_size, int64_t head_size,
                         int64_t count, int64_t dim_vector, const float* weights,
                         int64_t weights_stride, float* out) {
    f32x16 sums[kHeads][kVectors];
    float* const target = out + dim_vector * kLanes;
    for (int g = 0; g < kHeads; ++g) {
      for (int v = 0; v < kVectors; ++v) sums[g][v] = load16(target + g * head_size + v * kLanes);
    }
    const auto line = [=](const TokenVector<T>& of) {
      return of.block + (block_size + of.first) * head_size + dim_vector * kLanes;
    };
    const T* values = line(vector[0]);
    const T* next = line(vector[1]);
    for (int64_t t = 0; t < count; ++t, values += head_size, next += head_size) {
      for (int v = 0; v < kVectors; v += kVectorsPerCacheLine)
        __builtin_prefetch(next + v * kLanes);
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

  static constexpr int kVectorsPerCacheLine = 64 / (kLanes * sizeof(T));
};

// vLLM's "amx": K [block_size/16][head_size/2][16 tokens][2], V [head_size/16][block_size/2][16][2
// tokens].
template <typename T>
struct AmxLayout {
  template <int kHeads, int kTokenVectors>
  static void logits(const TokenVector<T>* vectors, int64_t, int64_t head_size, const float* query,
                     float* out, int64_t out_stride) {
    const T* keys[2 * kTokenVectors];
    for (int v = 0; v < 2 * kTokenVectors; ++v)
      keys[v] = vectors[v].block + vectors[v].first * head_size;
    f32x16 sums[kHeads][kTokenVectors];
    for (int g = 0; g < kHeads; ++g) {
      for (int v = 0; v < kTokenVectors; ++v) sums[g][v] = broadcast(0.0f);
    }
    for (int64_t d = 0; d < head_size; d += 2) {
      const int64_t line = d * kLanes;
      for (int v = 0; v < kTokenVectors; ++v) __builtin_prefetch(keys[kTokenVectors + v] + line);
      f32x16 even[kTokenVectors], odd[kTokenVectors];
      for (int v = 0; v < kTokenVectors; ++v) load16_pairs(keys[v] + line, even[v], odd[v]);
      for (int g = 0; g < kHeads; ++g) {
        const f32x16 q_even = broadcast(query[g * head_size + d]);
        const f32x16 q_odd = broadcast(query[g * head_size + d + 1]);
        for (int v = 0; v < kTokenVectors; ++v) {
          sums[g][v] += q_even * even[v];
          sums[g][v] += q_odd * odd[v];
        }
      }
    }
    for (int g = 0; g < kHeads; ++g) {
      for (int v = 0; v < kTokenVectors; ++v)
        store16(out + g * out_stride + v * kLanes, sums[g][v]);
    }
  }

  template <int kHeads, int kVectors>
  static void accumulate(const TokenVector<T>* vector, int64_t block_size, int64_t head_size,
                         int64_t count, int64_t dim_vector, const float* weights,
                         int64_t weights_stride, float* out) {
    f32x16 sums[kHeads][kVectors];
    float* const target = out + dim_vector * kLanes;
    for (int g = 0; g < kHeads; ++g) {
      for (int v = 0; v < kVectors; ++v) sums[g][v] = load16(target + g * head_size + v * kLanes);
    }
    const int64_t dim_vector_size = block_size * kLanes;
    const auto pairs = [=](const TokenVector<T>& of) {
      return of.block + block_size * head_size + dim_vector * dim_vector_size + of.first * kLanes;
    };
    const T* values = pairs(vector[0]);
    const T* next = pairs(vector[1]);
    for (int64_t t = 0; t < count; t += 2, values += 2 * kLanes, next += 2 * kLanes) {
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(next + v * dim_vector_size);
      f32x16 even[kVectors], odd[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        load16_pairs(values + v * dim_vector_size, even[v], odd[v]);
      }
      const bool pair = t + 1 < count;  // behind the last token lies memory that was never written
      for (int g = 0; g < kHeads; ++g) {
        const f32x16 weight = broadcast(weights[g * weights_stride + t]);
        for (int v = 0; v < kVectors; ++v) sums[g][v] += weight * even[v];
        if (pair) {
          const f32x16 second = broadcast(weights[g * weights_stride + t + 1]);
          for (int v = 0; v < kVectors; ++v) sums[g][v] += second * odd[v];
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
