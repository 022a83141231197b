// Page selection: the recent and the sink pages, and the best of the others, in ascending order;
// then the pages that follow.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#include "problem.h"

namespace vllm_delta {

namespace {

// A page's rank as one number, larger is better: the higher score first, ties to the lower index.
// The bits of floats that are not negative are in the order of their values.
uint64_t page_key(float score, int64_t page) {
  const float rank = score > 0.0f ? score : 0.0f;  // also for -0 and NaN
  uint32_t bits;
  std::memcpy(&bits, &rank, sizeof(bits));
  return static_cast<uint64_t>(bits) << 32 | (UINT32_MAX - static_cast<uint32_t>(page));
}

}  // namespace

void select_pages(const float* scores, int64_t num_pages, int64_t kept_pages, int64_t recent_pages,
                  int64_t sink_pages, int64_t following_pages, uint64_t* keys, int32_t* pages) {
  int64_t count = 0;
  const auto keep = [&](int64_t first, int64_t end) {
    for (int64_t page = first; page < end; ++page) pages[count++] = static_cast<int32_t>(page);
  };
  // num_pages > kept_pages >= recent_pages + sink_pages, so that the two ends do not overlap.
  const int64_t last = num_pages - recent_pages;
  const int64_t wanted = kept_pages - recent_pages - sink_pages;
  keep(0, sink_pages);
  if (wanted > 0) {
    for (int64_t page = sink_pages; page < last; ++page) keys[page] = page_key(scores[page], page);
    uint64_t* const worst_kept = keys + sink_pages + wanted - 1;
    std::nth_element(keys + sink_pages, worst_kept, keys + last, std::greater<uint64_t>());
    const uint64_t threshold = *worst_kept;
    for (int64_t page = sink_pages; page < last; ++page) {
      if (page_key(scores[page], page) >= threshold) pages[count++] = static_cast<int32_t>(page);
    }
  }
  keep(last, num_pages + following_pages);
}

}  // namespace vllm_delta
