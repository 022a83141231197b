// The interface between the bindings and the kernels, which are compiled once per instruction set.
//
// Nothing here depends on PyTorch: kernels know pointers, strides and sizes.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vllm_delta {

// Tokens of a split, the part of a row that one work item covers. Fixed, so that a sequence is
// always cut at the same places and its result does not depend on the batch it is in, nor on the
// number of threads.
constexpr int64_t kSplitTokens = 512;

// Floats from one head's logits of a split to the next head's: a cache line more than the split, so
// that the heads do not fall into the same sets of the cache.
constexpr int64_t kLogitsStride = kSplitTokens + 16;

// Tokens that one vector holds. Pages and KV blocks are multiples of it.
constexpr int64_t kLanes = 16;

// Query heads, of one token or of several, that share one reading of the keys and values.
constexpr int64_t kMaxHeads = 8;

// The largest head size; bounds the scratch memory on the stack.
constexpr int64_t kMaxHeadSize = 512;

enum class ElementType { kFloat32, kBFloat16, kFloat16 };

// How vLLM's CPU backend lays out one KV block of one head (K first, V behind it).
enum class KVLayout {
  // "vec", "vec16": K [head_size][block_size], V [block_size][head_size]
  kTransposed,
  // "amx": K [block_size/16][head_size/2][16 tokens][2], V [head_size/16][block_size/2][16][2
  // tokens]
  kAmx,
};

// Scratch memory of one call, carved out of one buffer by `carve_workspace` (bindings.cpp).
struct Workspace {
  // Of each row [its splits, num_kv_heads, its query tokens, query heads of a KV head]:
  float* partial_outputs;  // and [head_size]; not normalised
  float* partial_maxima;
  float* partial_sums;
  // Of the first query token of each row, which is the one that selects:
  float* row_maxima;    // [rows of a round, num_heads]
  float* row_log_sums;  // [rows of a round, num_heads]
  float* logits;        // [splits, num_heads, kLogitsStride]
  float* page_scores;   // [pages of a round]
  uint64_t* page_keys;  // [pages of a round]
};

// One call: decode rows of one layer. A row is one query token, or several neighbours; the last one
// sees `row_lengths[i]` tokens, each of them one more than the one before.
struct Problem {
  ElementType element_type;
  KVLayout layout;
  int64_t num_rows, num_heads, num_kv_heads, head_size;

  const void* query;  // [tokens, num_heads, head_size], strides in elements, head_size contiguous
  int64_t query_token_stride, query_head_stride;
  void* output;
  int64_t output_token_stride, output_head_stride;

  const void* kv_cache;  // [blocks, num_kv_heads, 2 * block_size * head_size]
  int64_t cache_block_stride, cache_head_stride, block_size;

  const int32_t* block_table;  // [requests, blocks of a request]
  int64_t block_table_stride;
  const int32_t *row_tokens, *row_requests, *row_lengths;  // [num_rows]
  const int32_t* row_query_lens;  // [num_rows] or null: one query token each
  int64_t max_query_len;          // none has more
  // [num_rows]: pages that sparse layers keep of a row; one of as many or fewer keeps all
  const int32_t* row_kept_pages;

  float scale;
  float softcap;  // 0: none
  // [num_heads] or null: a logit that takes part in the softmax and has no value
  const float* sinks;

  int64_t page_size;

  // Sparse attention: the selection table to read; null where rows attend to all their tokens. Of a
  // row that keeps all, it is not read.
  const int32_t* table_pages;  // [num_rows, table_stride], ascending
  int64_t table_stride;

  // Selection: the selection table to write; null where nothing is selected. Of a row that keeps
  // all, it is not written.
  int32_t* selected_pages;
  int64_t selected_stride;
  int64_t recent_pages, sink_pages, following_pages;
  float* scores_out;  // [num_rows, scores_stride] or null: a copy of the page scores, for tests
  int64_t scores_stride;

  int64_t round_tokens;  // capacity of the workspace, a multiple of kSplitTokens
  Workspace workspace;

  int64_t row_pages(int64_t row) const { return (row_lengths[row] + page_size - 1) / page_size; }

  // Whether sparse layers attend to all of a row's tokens, because they fit its budget.
  bool keeps_all(int64_t row) const { return row_pages(row) <= row_kept_pages[row]; }

  bool reads_table(int64_t row) const { return table_pages && !keeps_all(row); }

  int64_t query_len(int64_t row) const { return row_query_lens ? row_query_lens[row] : 1; }

  // How many tokens one of a row's query tokens sees.
  int64_t seen_tokens(int64_t row, int64_t token) const {
    return row_lengths[row] - query_len(row) + 1 + token;
  }

  // How many it attends to. They are the first ones of those that the row's last token attends to,
  // because a selection table is ascending.
  int64_t attended_tokens(int64_t row, int64_t token) const {
    const int64_t seen = seen_tokens(row, token);
    if (!reads_table(row)) return seen;
    const int32_t* pages = table_pages + row * table_stride;
    int64_t count = row_kept_pages[row];
    while (count > 0 && pages[count - 1] * page_size >= seen) --count;
    if (count == 0) return 0;
    return (count - 1) * page_size + std::min(page_size, seen - pages[count - 1] * page_size);
  }
};

// Runs the whole problem on the threads of the current OpenMP pool.
using Kernel = void (*)(const Problem&);

namespace avx512 {
void run(const Problem& problem);
}
namespace avx2 {
void run(const Problem& problem);
}
namespace generic {
void run(const Problem& problem);
}

// Page selection (select.cpp), of more than `kept_pages` pages. `scores` [num_pages] are not
// negative; NaN counts as 0. `keys` is scratch of the same size. Writes `kept_pages` pages in
// ascending order, and behind them the `following_pages` behind the last one.
void select_pages(const float* scores, int64_t num_pages, int64_t kept_pages, int64_t recent_pages,
                  int64_t sink_pages, int64_t following_pages, uint64_t* keys, int32_t* pages);

}  // namespace vllm_delta
