// The operators `torch.ops.vllm_delta.*`, on PyTorch's stable ABI: this library uses no C++ symbol
// of torch, so one build runs on every torch from 2.11 on. Shapes are documented in
// vllm_delta/kernels/cpu/ops.py; checked is, here, whatever would otherwise read or write outside
// of a tensor.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "problem.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace vllm_delta {
namespace {

Kernel find_kernel(int64_t level) {
#if defined(__x86_64__)
  static const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                               __builtin_cpu_supports("f16c");
  if (level >= 2 && has_avx512) return avx512::run;
  if (level >= 1 && has_avx2) return avx2::run;
#endif
  return generic::run;
}

// Set by tests to reach the kernels for older processors.
int64_t g_instruction_level = 2;

int64_t set_instruction_level(int64_t level) {
  const int64_t previous = g_instruction_level;
  g_instruction_level = level;
  return previous;
}

ElementType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    case ScalarType::Half:
      return ElementType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "DELTA's CPU kernels take float32, bfloat16 and float16");
  }
  return ElementType::kFloat32;
}

const int32_t* int32_data(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.is_cpu(), name,
                  " must be an int32 tensor on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 0 || tensor.stride(tensor.dim() - 1) == 1, name,
                  " must be contiguous in its last dimension");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// Floats of workspace for rounds of `round_tokens` tokens; the sum of what carve_workspace hands
// out.
int64_t workspace_floats(int64_t round_tokens, int64_t num_heads, int64_t head_size,
                         int64_t page_size, int64_t max_query_len) {
  const int64_t splits = round_tokens / kSplitTokens;
  const int64_t pages = round_tokens / page_size;
  return splits * num_heads * (kLogitsStride + 2 + max_query_len * (head_size + 2)) + 3 * pages;
}

Workspace carve_workspace(float* memory, const Problem& p) {
  const int64_t splits = p.round_tokens / kSplitTokens;
  const int64_t pages = p.round_tokens / p.page_size;
  const int64_t partials = splits * p.max_query_len * p.num_heads;
  Workspace w;
  const auto take = [&memory](int64_t floats) {
    float* const taken = memory;
    memory += floats;
    return taken;
  };
  w.page_keys = reinterpret_cast<uint64_t*>(take(2 * pages));
  w.logits = take(splits * p.num_heads * kLogitsStride);
  w.partial_outputs = take(partials * p.head_size);
  w.partial_maxima = take(partials);
  w.partial_sums = take(partials);
  w.row_maxima = take(splits * p.num_heads);
  w.row_log_sums = take(splits * p.num_heads);
  w.page_scores = take(pages);
  return w;
}

void check_rows(const Problem& p, int64_t num_tokens, int64_t num_requests, int64_t table_width) {
  const int64_t capacity = std::min(p.round_tokens, table_width * p.block_size);
  for (int64_t i = 0; i < p.num_rows; ++i) {
    STD_TORCH_CHECK(p.query_len(i) >= 1 && p.query_len(i) <= p.max_query_len, "row ", i, ": ",
                    p.query_len(i), " query tokens are not between 1 and ", p.max_query_len);
    STD_TORCH_CHECK(p.row_tokens[i] >= 0 && p.row_tokens[i] + p.query_len(i) <= num_tokens, "row ",
                    i, ": token index out of range");
    STD_TORCH_CHECK(p.row_requests[i] >= 0 && p.row_requests[i] < num_requests, "row ", i,
                    ": request index out of range");
    STD_TORCH_CHECK(p.row_lengths[i] >= p.query_len(i) && p.row_lengths[i] <= capacity, "row ", i,
                    ": length ", p.row_lengths[i], " is not between ", p.query_len(i), " and ",
                    capacity);
  }
}

// For what reads or writes a selection table of `width` pages a row, those that follow not counted.
void check_kept_pages(const Problem& p, int64_t width) {
  for (int64_t i = 0; i < p.num_rows; ++i) {
    if (p.keeps_all(i)) continue;
    const int64_t least = std::max<int64_t>(1, p.recent_pages + p.sink_pages);
    STD_TORCH_CHECK(p.row_kept_pages[i] >= least && p.row_kept_pages[i] <= width, "row ", i,
                    ": its budget of ", p.row_kept_pages[i], " pages is not between ", least,
                    " and ", width);
    if (!p.table_pages) continue;
    // Ascending, so the last page bounds them all.
    const int32_t* pages = p.table_pages + i * p.table_stride;
    STD_TORCH_CHECK(
        pages[0] >= 0 && pages[p.row_kept_pages[i] - 1] * p.page_size < p.row_lengths[i], "row ", i,
        ": its selection table names a page outside of the sequence");
  }
}

Problem describe(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
                 const Tensor& row_tokens, const Tensor& row_requests, const Tensor& row_lengths,
                 const Tensor& row_kept_pages, const std::optional<Tensor>& row_query_lens,
                 int64_t max_query_len, int64_t layout, double scale, double softcap,
                 const std::optional<Tensor>& sinks, int64_t page_size, const Tensor& workspace,
                 const Tensor& output) {
  Problem p = {};
  p.element_type = element_type(query);
  p.layout = static_cast<KVLayout>(layout);
  STD_TORCH_CHECK(query.dim() == 3 && output.dim() == 3 && kv_cache.dim() == 4,
                  "query and output have 3 dimensions, kv_cache 4");
  STD_TORCH_CHECK(
      kv_cache.scalar_type() == query.scalar_type() && output.scalar_type() == query.scalar_type(),
      "query, kv_cache and output must have the same dtype");
  p.num_heads = query.size(1);
  p.head_size = query.size(2);
  p.num_kv_heads = kv_cache.size(1);
  p.block_size = kv_cache.size(2);
  STD_TORCH_CHECK(kv_cache.size(3) == 2 * p.head_size && kv_cache.stride(3) == 1 &&
                      kv_cache.stride(2) == 2 * p.head_size,
                  "kv_cache must be [blocks, num_kv_heads, block_size, 2 * head_size] with "
                  "contiguous blocks");
  STD_TORCH_CHECK(p.num_heads % p.num_kv_heads == 0,
                  "num_heads must be a multiple of num_kv_heads");
  STD_TORCH_CHECK(p.head_size % kLanes == 0 && p.head_size <= kMaxHeadSize,
                  "head_size must be a multiple of 16 up to ", kMaxHeadSize);
  STD_TORCH_CHECK(p.block_size % kLanes == 0, "the block size must be a multiple of 16");
  STD_TORCH_CHECK(page_size % kLanes == 0 && kSplitTokens % page_size == 0 && page_size <= 128,
                  "page_size must be 16, 32, 64 or 128");
  STD_TORCH_CHECK(layout == 0 || (layout == 1 && p.element_type != ElementType::kFloat32 &&
                                  p.block_size % 32 == 0),
                  "the amx layout holds bfloat16 or float16 in blocks of a multiple of 32 tokens");
  STD_TORCH_CHECK(query.stride(2) == 1 && output.stride(2) == 1,
                  "query and output must be contiguous in their last dimension");
  STD_TORCH_CHECK(output.size(0) >= query.size(0) && output.size(1) == p.num_heads &&
                      output.size(2) == p.head_size,
                  "output must have the shape of query");
  p.query = query.const_data_ptr();
  p.query_token_stride = query.stride(0);
  p.query_head_stride = query.stride(1);
  p.output = output.mutable_data_ptr();
  p.output_token_stride = output.stride(0);
  p.output_head_stride = output.stride(1);
  p.kv_cache = kv_cache.const_data_ptr();
  p.cache_block_stride = kv_cache.stride(0);
  p.cache_head_stride = kv_cache.stride(1);
  p.block_table = int32_data(block_table, "block_table");
  p.block_table_stride = block_table.stride(0);
  p.num_rows = row_tokens.numel();
  STD_TORCH_CHECK(row_requests.numel() == p.num_rows && row_lengths.numel() == p.num_rows &&
                      row_kept_pages.numel() == p.num_rows &&
                      (!row_query_lens || row_query_lens->numel() == p.num_rows),
                  "row_tokens, row_requests, row_lengths, row_kept_pages and row_query_lens must "
                  "have the same length");
  p.row_tokens = int32_data(row_tokens, "row_tokens");
  p.row_requests = int32_data(row_requests, "row_requests");
  p.row_lengths = int32_data(row_lengths, "row_lengths");
  p.row_kept_pages = int32_data(row_kept_pages, "row_kept_pages");
  if (row_query_lens) p.row_query_lens = int32_data(*row_query_lens, "row_query_lens");
  STD_TORCH_CHECK(max_query_len >= 1 && max_query_len <= INT32_MAX,
                  "max_query_len must be positive");
  p.max_query_len = max_query_len;
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  if (sinks) {
    STD_TORCH_CHECK(sinks->scalar_type() == ScalarType::Float && sinks->numel() == p.num_heads &&
                        sinks->is_contiguous(),
                    "sinks must be [num_heads] in float32");
    p.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  p.page_size = page_size;
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Float && workspace.is_contiguous(),
                  "workspace must be a contiguous float32 tensor");
  p.round_tokens =
      workspace.numel() /
      workspace_floats(kSplitTokens, p.num_heads, p.head_size, page_size, max_query_len) *
      kSplitTokens;
  p.workspace = carve_workspace(static_cast<float*>(workspace.mutable_data_ptr()), p);
  return p;
}

// counters: int64 [3], query tokens, and the tokens that they attended to and that were there.
// Written here, by the code that has just attended to them.
void run_and_count(const Problem& p, const Tensor& counters) {
  STD_TORCH_CHECK(counters.scalar_type() == ScalarType::Long && counters.numel() == 3 &&
                      counters.is_contiguous(),
                  "counters must be int64 [3]");
  find_kernel(g_instruction_level)(p);
  int64_t tokens = 0, attended = 0, context = 0;
  for (int64_t i = 0; i < p.num_rows; ++i) {
    for (int64_t token = 0; token < p.query_len(i); ++token) {
      attended += p.attended_tokens(i, token);
      context += p.seen_tokens(i, token);
    }
    tokens += p.query_len(i);
  }
  int64_t* const out = static_cast<int64_t*>(counters.mutable_data_ptr());
  out[0] += tokens;
  out[1] += attended;
  out[2] += context;
}

void full_attention(Tensor query, Tensor kv_cache, Tensor block_table, Tensor row_tokens,
                    Tensor row_requests, Tensor row_lengths, Tensor row_kept_pages,
                    std::optional<Tensor> row_query_lens, int64_t max_query_len, int64_t layout,
                    double scale, double softcap, std::optional<Tensor> sinks, Tensor workspace,
                    Tensor counters, Tensor output) {
  const Problem p = describe(query, kv_cache, block_table, row_tokens, row_requests, row_lengths,
                             row_kept_pages, row_query_lens, max_query_len, layout, scale, softcap,
                             sinks, kLanes, workspace, output);
  check_rows(p, query.size(0), block_table.size(0), block_table.size(1));
  run_and_count(p, counters);
}

void selection_attention(Tensor query, Tensor kv_cache, Tensor block_table, Tensor row_tokens,
                         Tensor row_requests, Tensor row_lengths, Tensor row_kept_pages,
                         std::optional<Tensor> row_query_lens, int64_t max_query_len,
                         int64_t layout, double scale, double softcap, std::optional<Tensor> sinks,
                         int64_t page_size, int64_t recent_pages, int64_t sink_pages,
                         int64_t following_pages, Tensor workspace, Tensor counters, Tensor output,
                         Tensor pages, std::optional<Tensor> scores) {
  Problem p = describe(query, kv_cache, block_table, row_tokens, row_requests, row_lengths,
                       row_kept_pages, row_query_lens, max_query_len, layout, scale, softcap, sinks,
                       page_size, workspace, output);
  check_rows(p, query.size(0), block_table.size(0), block_table.size(1));
  STD_TORCH_CHECK(recent_pages >= 0 && sink_pages >= 0 && following_pages >= 0,
                  "recent_pages, sink_pages and following_pages must not be negative");
  int32_data(pages, "pages");
  STD_TORCH_CHECK(pages.dim() == 2 && pages.size(0) >= p.num_rows,
                  "pages must be [rows, most kept pages]");
  p.selected_pages = static_cast<int32_t*>(pages.mutable_data_ptr());
  p.selected_stride = pages.stride(0);
  p.recent_pages = recent_pages;
  p.sink_pages = sink_pages;
  p.following_pages = following_pages;
  check_kept_pages(p, pages.size(1) - following_pages);
  if (scores) {
    int32_t longest = 0;
    for (int64_t i = 0; i < p.num_rows; ++i) longest = std::max(longest, p.row_lengths[i]);
    STD_TORCH_CHECK(scores->scalar_type() == ScalarType::Float && scores->dim() == 2 &&
                        scores->size(0) >= p.num_rows && scores->stride(1) == 1 &&
                        scores->size(1) * page_size >= longest,
                    "scores must be float32 [rows, pages of the longest row]");
    p.scores_out = static_cast<float*>(scores->mutable_data_ptr());
    p.scores_stride = scores->stride(0);
  }
  run_and_count(p, counters);
}

void sparse_attention(Tensor query, Tensor kv_cache, Tensor block_table, Tensor row_tokens,
                      Tensor row_requests, Tensor row_lengths, Tensor row_kept_pages,
                      std::optional<Tensor> row_query_lens, int64_t max_query_len, int64_t layout,
                      double scale, double softcap, std::optional<Tensor> sinks, int64_t page_size,
                      Tensor pages, Tensor workspace, Tensor counters, Tensor output) {
  Problem p = describe(query, kv_cache, block_table, row_tokens, row_requests, row_lengths,
                       row_kept_pages, row_query_lens, max_query_len, layout, scale, softcap, sinks,
                       page_size, workspace, output);
  STD_TORCH_CHECK(pages.dim() == 2 && pages.size(0) >= p.num_rows,
                  "pages must be [rows, most kept pages]");
  p.table_pages = int32_data(pages, "pages");
  p.table_stride = pages.stride(0);
  check_rows(p, query.size(0), block_table.size(0), block_table.size(1));
  check_kept_pages(p, pages.size(1));
  run_and_count(p, counters);
}

// Page selection by itself, for tests: scores float32 [num_pages], pages int32 [kept_pages +
// following_pages].
void select_pages_of(Tensor scores, int64_t recent_pages, int64_t sink_pages,
                     int64_t following_pages, Tensor pages) {
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float && scores.is_contiguous(),
                  "scores must be contiguous float32");
  int32_data(pages, "pages");
  const int64_t kept_pages = pages.numel() - following_pages;
  STD_TORCH_CHECK(pages.is_contiguous() && kept_pages < scores.numel(),
                  "pages must be contiguous, and fewer than scores");
  STD_TORCH_CHECK(recent_pages >= 0 && sink_pages >= 0 && following_pages >= 0 && kept_pages >= 1 &&
                      recent_pages + sink_pages <= kept_pages,
                  "the kept pages must hold the recent and the sink pages");
  std::vector<uint64_t> keys(scores.numel());
  select_pages(static_cast<const float*>(scores.const_data_ptr()), scores.numel(), kept_pages,
               recent_pages, sink_pages, following_pages, keys.data(),
               static_cast<int32_t*>(pages.mutable_data_ptr()));
}

}  // namespace
}  // namespace vllm_delta

#define DELTA_ROWS                                                                              \
  "Tensor query, Tensor kv_cache, Tensor block_table, Tensor row_tokens, Tensor row_requests, " \
  "Tensor row_lengths, Tensor row_kept_pages, Tensor? row_query_lens, int max_query_len, "      \
  "int layout, float scale, float softcap, Tensor? sinks, "

STABLE_TORCH_LIBRARY(vllm_delta, m) {
  m.def("full_attention(" DELTA_ROWS
        "Tensor(a!) workspace, Tensor(b!) counters, Tensor(c!) output) -> ()");
  m.def("selection_attention(" DELTA_ROWS
        "int page_size, int recent_pages, int sink_pages, int following_pages, "
        "Tensor(a!) workspace, Tensor(b!) counters, Tensor(c!) output, Tensor(d!) pages, "
        "Tensor(e!)? scores) -> ()");
  m.def("sparse_attention(" DELTA_ROWS
        "int page_size, Tensor pages, Tensor(a!) workspace, Tensor(b!) counters, "
        "Tensor(c!) output) -> ()");
  m.def(
      "select_pages(Tensor scores, int recent_pages, int sink_pages, int following_pages, "
      "Tensor(a!) pages) -> ()");
  m.def(
      "workspace_floats(int round_tokens, int num_heads, int head_size, int page_size, "
      "int max_query_len) -> int");
  m.def("set_instruction_level(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_delta, CPU, m) {
  m.impl("full_attention", TORCH_BOX(&vllm_delta::full_attention));
  m.impl("selection_attention", TORCH_BOX(&vllm_delta::selection_attention));
  m.impl("sparse_attention", TORCH_BOX(&vllm_delta::sparse_attention));
  m.impl("select_pages", TORCH_BOX(&vllm_delta::select_pages_of));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_delta, CompositeExplicitAutograd, m) {
  m.impl("workspace_floats", TORCH_BOX(&vllm_delta::workspace_floats));
  m.impl("set_instruction_level", TORCH_BOX(&vllm_delta::set_instruction_level));
}
