// Decode attention over a paged KV cache, for full, selection and sparse layers.
//
// For one query token of a row, which sees n tokens, and query head h, over the tokens t that it
// attends to:
//
//   x[h, t] = softcap(q[h] . k[t] * scale)         softcap(x) = c tanh(x / c), or x where c = 0
//   m[h] = max x[h, t],  L[h] = sum e^(x[h, t] - m[h]) (+ e^(sink[h] - m[h]))
//   output[h] = sum e^(x[h, t] - m[h]) v[t] / L[h]
//
// and in a selection layer (DELTA, arXiv 2510.09883; max over all query heads, sum over the page):
//
//   token score s[t] = max over h of e^(x[h, t] - m[h]) / L[h]
//                    = e^(max over h of (x[h, t] - m[h] - log L[h]))
//
//   page score = sum of s[t] over the page's tokens
//
// Where a row has several query tokens, these are the scores of the first one.
//
// Rows are processed in rounds that fit the workspace. A round has four stages in two loops, spread
// over all threads:
//   1. splits of 512 tokens x KV heads: logits, then the split's maximum, sum and unnormalised
//   output, for the query heads of all query tokens, 8 at a time, while the split is in the cache;
//   2. whoever finishes the last split of a row and KV head combines the splits of its query heads.
// and where a selection is wanted
//   3. splits: page scores from the stored logits (K is read once, in stage 1);
//   4. whoever finishes the last split of a row selects its pages.
// Rows are cut at fixed places and their splits combined in order, and what one query head computes
// does not depend on those beside it. So the result for a query token has the same bits in any
// batch, in a row with others or by itself, and with any number of threads.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "layout.h"

namespace vllm_delta {
namespace DELTA_ISA {
namespace {

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Vectors of 16 tokens in a split, and how many the widest loop handles at once.
constexpr int64_t kSplitVectors = kSplitTokens / kLanes;
constexpr int64_t kWidestLoop = 4;

// What one row attends to, in units that the rounds count in.
struct Row {
  int64_t index;
  int64_t length;     // tokens that its last query token sees
  int64_t query_len;  // query tokens
  int64_t num_splits;
  int64_t first_split;    // in the round
  int64_t first_partial;  // in the round, counted in splits x query tokens
  int64_t scores_offset;  // in the workspace
  bool reads_table;       // attends to the pages of the selection table alone
  bool scores;            // its pages are scored
};

struct WorkItem {
  int64_t row;  // in the round
  int64_t split;
};

Row describe_row(const Problem& p, int64_t index) {
  Row row = {};
  row.index = index;
  row.length = p.row_lengths[index];
  row.query_len = p.query_len(index);
  row.reads_table = p.reads_table(index);
  row.num_splits = ceil_div(p.attended_tokens(index, row.query_len - 1), kSplitTokens);
  row.scores = p.selected_pages && (p.scores_out || !p.keeps_all(index));
  return row;
}

// The vectors of one split of a row for one KV head, whose blocks start at `cache`; returns the
// split's tokens. Only the last vector may hold fewer than 16. Vectors to be asked for in advance
// follow it: the last again.
template <typename T>
int64_t find_vectors(const Problem& p, const Row& row, int64_t split, const T* cache,
                     TokenVector<T>* vectors) {
  const int32_t* blocks = p.block_table + p.row_requests[row.index] * p.block_table_stride;
  int64_t tokens = 0;
  const auto append = [&](int64_t first, int64_t count) {
    for (int64_t token = first; token < first + count; token += kLanes) {
      const T* block = cache + blocks[token / p.block_size] * p.cache_block_stride;
      vectors[tokens / kLanes + (token - first) / kLanes] = {block, token % p.block_size};
    }
    tokens += count;
  };
  if (row.reads_table) {
    const int32_t* pages = p.table_pages + row.index * p.table_stride;
    const int64_t pages_per_split = kSplitTokens / p.page_size;
    const int64_t end =
        std::min<int64_t>(p.row_kept_pages[row.index], (split + 1) * pages_per_split);
    for (int64_t i = split * pages_per_split; i < end; ++i) {
      const int64_t first = pages[i] * p.page_size;
      append(first, std::min(p.page_size, row.length - first));
    }
  } else {
    const int64_t first = split * kSplitTokens;
    append(first, std::min(kSplitTokens, row.length - first));
  }
  const int64_t num_vectors = ceil_div(tokens, kLanes);
  for (int64_t i = 0; i < kWidestLoop; ++i) vectors[num_vectors + i] = vectors[num_vectors - 1];
  return tokens;
}

// Adds the first `count` values of one vector, weighted, to the outputs [kHeads, head_size].
template <typename T, typename Layout, int kHeads>
DELTA_INLINE void accumulate(const Problem& p, const TokenVector<T>* vector, int64_t count,
                             const float* weights, float* output) {
  const int64_t d = p.head_size;
  int64_t v = 0;
  for (; v + 2 <= d / kLanes; v += 2) {
    Layout::template accumulate<kHeads, 2>(vector, p.block_size, d, count, v, weights,
                                           kLogitsStride, output);
  }
  if (v < d / kLanes) {
    Layout::template accumulate<kHeads, 1>(vector, p.block_size, d, count, v, weights,
                                           kLogitsStride, output);
  }
}

// The same for one head and the vectors from `first` to the last that it sees; kept out of the loop
// for several.
template <typename T, typename Layout>
__attribute__((noinline)) void accumulate_rest(const Problem& p, const TokenVector<T>* vectors,
                                               int64_t first, int64_t seen, const float* weights,
                                               float* output) {
  for (int64_t i = first; i * kLanes < seen; ++i) {
    accumulate<T, Layout, 1>(p, vectors + i, std::min(kLanes, seen - i * kLanes),
                             weights + i * kLanes, output);
  }
}

// Stage 1 for `kHeads` query heads of one KV head, each of which sees the first `seen` of the
// split's tokens, the later ones as many or more: logits into `logits` [kHeads, kLogitsStride], and
// the split's maximum, sum and output. Those of a head that sees none are never read.
template <typename T, typename Layout, int kHeads>
void attend_split(const Problem& p, const TokenVector<T>* vectors, int64_t tokens,
                  const int64_t* seen, const float* query, float* logits, float* output,
                  float* maxima, float* sums) {
  constexpr int kWide = kHeads <= 4 ? kWidestLoop : 2;
  const int64_t d = p.head_size;
  const int64_t num_vectors = ceil_div(tokens, kLanes);
  const int64_t padded = num_vectors * kLanes;

  int64_t i = 0;
  for (; i + kWide <= num_vectors; i += kWide) {
    Layout::template logits<kHeads, kWide>(vectors + i, p.block_size, d, query, logits + i * kLanes,
                                           kLogitsStride);
  }
  for (; i < num_vectors; ++i) {
    Layout::template logits<kHeads, 1>(vectors + i, p.block_size, d, query, logits + i * kLanes,
                                       kLogitsStride);
  }

  alignas(64) float weights[kHeads * kLogitsStride];
  for (int g = 0; g < kHeads; ++g) {
    float* const x = logits + g * kLogitsStride;
    if (p.softcap != 0.0f) {
      for (int64_t t = 0; t < padded; t += kLanes) {
        store16(x + t, hyperbolic_tangent(load16(x + t) / p.softcap) * p.softcap);
      }
    }
    // Lanes behind the last token hold whatever the block held before.
    for (int64_t t = seen[g]; t < padded; ++t) x[t] = kNegativeInfinity;

    f32x16 maximum_lanes = load16(x);
    for (int64_t t = kLanes; t < padded; t += kLanes) {
      maximum_lanes = maximum(maximum_lanes, load16(x + t));
    }
    maxima[g] = reduce_max(maximum_lanes);
    f32x16 sum_lanes = broadcast(0.0f);
    for (int64_t t = 0; t < padded; t += kLanes) {
      const f32x16 weight = exponential(load16(x + t) - maxima[g]);
      store16(weights + g * kLogitsStride + t, weight);
      sum_lanes += weight;
    }
    sums[g] = reduce_add(sum_lanes);
  }

  // The vectors of which all heads see the same tokens, then those at the end for each by itself:
  // a weight of 0 would not do, for the value behind it may be infinite.
  std::memset(output, 0, sizeof(float) * kHeads * d);
  const int64_t least = seen[0], most = seen[kHeads - 1];
  const int64_t shared = least == most ? ceil_div(most, kLanes) : least / kLanes;
  for (i = 0; i < shared; ++i) {
    accumulate<T, Layout, kHeads>(p, vectors + i, std::min(kLanes, most - i * kLanes),
                                  weights + i * kLanes, output);
  }
  if (least == most) return;
  for (int g = 0; g < kHeads; ++g) {
    accumulate_rest<T, Layout>(p, vectors, shared, seen[g], weights + g * kLogitsStride,
                               output + g * d);
  }
}

template <typename T, typename Layout>
using AttendSplit = void (*)(const Problem&, const TokenVector<T>*, int64_t, const int64_t*,
                             const float*, float*, float*, float*, float*);

// Where the partial results of a split for the query heads of one KV head begin.
int64_t first_slot(const Problem& p, const Row& row, int64_t split, int64_t kv_head) {
  const int64_t heads_per_kv_head = p.num_heads / p.num_kv_heads;
  const int64_t before = (row.first_partial + split * row.query_len) * p.num_kv_heads;
  return (before + kv_head * row.query_len) * heads_per_kv_head;
}

// Stage 1 for the query heads of one KV head, of all query tokens: [query_len, heads_per_kv_head].
template <typename T, typename Layout>
void attend_item(const Problem& p, const Row& row, int64_t split, int64_t kv_head) {
  static constexpr AttendSplit<T, Layout> kByHeads[kMaxHeads] = {
      attend_split<T, Layout, 1>, attend_split<T, Layout, 2>, attend_split<T, Layout, 3>,
      attend_split<T, Layout, 4>, attend_split<T, Layout, 5>, attend_split<T, Layout, 6>,
      attend_split<T, Layout, 7>, attend_split<T, Layout, 8>};
  alignas(64) float query[kMaxHeads * kMaxHeadSize];
  alignas(64) float scratch_logits[kMaxHeads * kLogitsStride];
  TokenVector<T> vectors[kSplitVectors + kWidestLoop];
  int64_t seen[kMaxHeads];

  const int64_t d = p.head_size;
  const int64_t heads_per_kv_head = p.num_heads / p.num_kv_heads;
  const T* cache = static_cast<const T*>(p.kv_cache) + kv_head * p.cache_head_stride;
  const int64_t tokens = find_vectors(p, row, split, cache, vectors);
  const int64_t all_heads = row.query_len * heads_per_kv_head;
  const int64_t slot = first_slot(p, row, split, kv_head);
  float* const kept_logits =
      p.workspace.logits +
      ((row.first_split + split) * p.num_heads + kv_head * heads_per_kv_head) * kLogitsStride;

  const T* const first_query = static_cast<const T*>(p.query) +
                               p.row_tokens[row.index] * p.query_token_stride +
                               kv_head * heads_per_kv_head * p.query_head_stride;
  int64_t token = 0, head = 0;  // of the row, of the KV head
  for (int64_t done = 0; done < all_heads; done += kMaxHeads) {
    const int64_t heads = std::min(kMaxHeads, all_heads - done);
    for (int64_t g = 0; g < heads; ++g) {
      const T* source = first_query + token * p.query_token_stride + head * p.query_head_stride;
      for (int64_t i = 0; i < d; ++i) query[g * d + i] = to_float(source[i]) * p.scale;
      const int64_t attended = p.attended_tokens(row.index, token) - split * kSplitTokens;
      seen[g] = std::clamp<int64_t>(attended, 0, tokens);
      if (++head == heads_per_kv_head) {
        head = 0;
        ++token;
      }
    }
    // The first token's logits are kept: written in place, or copied where the next one shares
    // the batch.
    const int64_t kept = row.scores ? std::min(heads, heads_per_kv_head - done) : 0;
    float* const logits = kept == heads ? kept_logits + done * kLogitsStride : scratch_logits;
    kByHeads[heads - 1](
        p, vectors, tokens, seen, query, logits, p.workspace.partial_outputs + (slot + done) * d,
        p.workspace.partial_maxima + slot + done, p.workspace.partial_sums + slot + done);
    if (kept > 0 && kept < heads) {
      std::memcpy(kept_logits + done * kLogitsStride, logits, sizeof(float) * kept * kLogitsStride);
    }
  }
}

// Stage 2 for one query token and head of a row; its partial results begin at `first`.
template <typename T>
void combine_splits(const Problem& p, const Row& row, int64_t row_in_round, int64_t first,
                    int64_t token, int64_t head) {
  const Workspace& w = p.workspace;
  const int64_t d = p.head_size;
  const int64_t num_splits = ceil_div(p.attended_tokens(row.index, token), kSplitTokens);
  const int64_t stride = row.query_len * p.num_heads;
  float maximum_logit = p.sinks ? p.sinks[head] : kNegativeInfinity;
  for (int64_t c = 0; c < num_splits; ++c) {
    maximum_logit = std::max(maximum_logit, w.partial_maxima[first + c * stride]);
  }
  alignas(64) float sum_of_outputs[kMaxHeadSize];
  std::memset(sum_of_outputs, 0, sizeof(float) * d);
  float sum = p.sinks ? std::exp(p.sinks[head] - maximum_logit) : 0.0f;
  for (int64_t c = 0; c < num_splits; ++c) {
    const int64_t slot = first + c * stride;
    const float factor = std::exp(w.partial_maxima[slot] - maximum_logit);
    sum += w.partial_sums[slot] * factor;
    for (int64_t i = 0; i < d; i += kLanes) {
      store16(sum_of_outputs + i,
              load16(sum_of_outputs + i) + load16(w.partial_outputs + slot * d + i) * factor);
    }
  }
  if (token == 0) {
    w.row_maxima[row_in_round * p.num_heads + head] = maximum_logit;
    w.row_log_sums[row_in_round * p.num_heads + head] = std::log(sum);
  }
  T* target = static_cast<T*>(p.output) +
              (p.row_tokens[row.index] + token) * p.output_token_stride +
              head * p.output_head_stride;
  const float inverse = num_splits > 0 ? 1.0f / sum : 0.0f;  // no token, no sink: no sum
  for (int64_t i = 0; i < d; ++i) from_float(sum_of_outputs[i] * inverse, target[i]);
}

// Stage 3 for one split of a row.
void score_split(const Problem& p, const Row& row, int64_t row_in_round, int64_t split) {
  const Workspace& w = p.workspace;
  const int64_t first = split * kSplitTokens;
  const int64_t tokens = std::min(kSplitTokens, row.length - first);
  alignas(64) float best[kSplitTokens];  // max over the heads of log p[h, t]
  for (int64_t h = 0; h < p.num_heads; ++h) {
    const float row_maximum = w.row_maxima[row_in_round * p.num_heads + h];
    const float log_sum = w.row_log_sums[row_in_round * p.num_heads + h];
    const float* x = w.logits + ((row.first_split + split) * p.num_heads + h) * kLogitsStride;
    for (int64_t t = 0; t < tokens; t += kLanes) {
      const f32x16 log_p = (load16(x + t) - row_maximum) - log_sum;
      store16(best + t, h == 0 ? log_p : maximum(load16(best + t), log_p));
    }
  }
  float* const scores = w.page_scores + row.scores_offset + first / p.page_size;
  for (int64_t page = 0; page * p.page_size < tokens; ++page) {
    f32x16 lanes = broadcast(0.0f);
    const int64_t end = std::min(tokens, (page + 1) * p.page_size);
    for (int64_t t = page * p.page_size; t < end; t += kLanes) {
      lanes += exponential(load16(best + t));  // the padding's logits are -inf and add 0
    }
    scores[page] = reduce_add(lanes);
  }
}

// Stage 4 for one row.
void select_row(const Problem& p, const Row& row) {
  const int64_t num_pages = p.row_pages(row.index);
  const float* const scores = p.workspace.page_scores + row.scores_offset;
  if (p.scores_out) {
    std::memcpy(p.scores_out + row.index * p.scores_stride, scores, sizeof(float) * num_pages);
  }
  if (p.keeps_all(row.index)) return;
  select_pages(scores, num_pages, p.row_kept_pages[row.index], p.recent_pages, p.sink_pages,
               p.following_pages, p.workspace.page_keys + row.scores_offset,
               p.selected_pages + row.index * p.selected_stride);
}

// True for the one thread that does the last of the parts that `pending` counts; it then sees what
// the others have written.
bool finishes(int32_t& pending) { return __atomic_sub_fetch(&pending, 1, __ATOMIC_ACQ_REL) == 0; }

template <typename T, typename Layout>
void run_problem(const Problem& p) {
  const int64_t heads_per_kv_head = p.num_heads / p.num_kv_heads;
  std::vector<Row> rows;
  std::vector<WorkItem> items;
  std::vector<int32_t> splits_to_attend;  // [rows, num_kv_heads]
  std::vector<int32_t> splits_to_score;   // [rows]
  for (int64_t next = 0; next < p.num_rows;) {
    rows.clear();
    items.clear();
    splits_to_attend.clear();
    splits_to_score.clear();
    int64_t scores = 0, splits = 0, partials = 0;
    for (; next < p.num_rows; ++next) {
      Row row = describe_row(p, next);
      if ((splits + row.num_splits) * kSplitTokens > p.round_tokens) break;
      row.first_split = splits;
      splits += row.num_splits;
      row.first_partial = partials;
      partials += row.num_splits * row.query_len;
      row.scores_offset = scores;
      if (row.scores) scores += p.row_pages(row.index);
      const int32_t count = static_cast<int32_t>(row.num_splits);
      splits_to_attend.insert(splits_to_attend.end(), p.num_kv_heads, count);
      splits_to_score.push_back(count);
      for (int64_t split = 0; split < row.num_splits; ++split) {
        items.push_back({static_cast<int64_t>(rows.size()), split});
      }
      rows.push_back(row);
    }
    const int64_t num_items = static_cast<int64_t>(items.size());

#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < num_items * p.num_kv_heads; ++i) {
        const auto [row, split] = items[i / p.num_kv_heads];
        const int64_t kv_head = i % p.num_kv_heads;
        attend_item<T, Layout>(p, rows[row], split, kv_head);
        if (finishes(splits_to_attend[row * p.num_kv_heads + kv_head])) {
          int64_t slot = first_slot(p, rows[row], 0, kv_head);
          for (int64_t token = 0; token < rows[row].query_len; ++token) {
            for (int64_t g = 0; g < heads_per_kv_head; ++g, ++slot) {
              combine_splits<T>(p, rows[row], row, slot, token, kv_head * heads_per_kv_head + g);
            }
          }
        }
      }
      if (scores > 0) {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < num_items; ++i) {
          const auto [row, split] = items[i];
          if (!rows[row].scores) continue;
          score_split(p, rows[row], row, split);
          if (finishes(splits_to_score[row])) select_row(p, rows[row]);
        }
      }
    }
  }
}

}  // namespace

void run(const Problem& p) {
  switch (p.element_type) {
    case ElementType::kFloat32:
      return run_problem<float, TransposedLayout<float>>(p);
    case ElementType::kBFloat16:
      return p.layout == KVLayout::kAmx ? run_problem<BFloat16, AmxLayout<BFloat16>>(p)
                                        : run_problem<BFloat16, TransposedLayout<BFloat16>>(p);
    case ElementType::kFloat16:
      return p.layout == KVLayout::kAmx ? run_problem<Float16, AmxLayout<Float16>>(p)
                                        : run_problem<Float16, TransposedLayout<Float16>>(p);
  }
}

}  // namespace DELTA_ISA
}  // namespace vllm_delta
