// Page selection: the recent and the sink pages, and the best of the others, in ascending order.

#include <algorithm>
#include <cstdint>

#include "problem.h"

namespace vllm_delta {

int32_t select_pages(const float* scores, int64_t num_pages, int64_t budget_pages,
                     int64_t recent_pages, int64_t sink_pages, int32_t* order, int32_t* pages) {
  int32_t count = 0;
  if (num_pages <= budget_pages) {
    for (int32_t page = 0; page < num_pages; ++page) pages[count++] = page;
    return count;
  }
  // num_pages > budget_pages >= recent_pages + sink_pages, so that the two ends do not overlap.
  const int64_t first = sink_pages;
  const int64_t last = num_pages - recent_pages;
  const int64_t wanted = budget_pages - recent_pages - sink_pages;

  // A total order, so that the outcome does not depend on the algorithm: the higher score first, ties
  // to the lower index.
  const auto better = [scores](int32_t a, int32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  };
  for (int64_t page = 0; page < first; ++page) pages[count++] = static_cast<int32_t>(page);
  if (wanted > 0) {
    int32_t* const end = order + (last - first);
    for (int64_t page = first; page < last; ++page) {
      order[page - first] = static_cast<int32_t>(page);
    }
    int32_t* const worst_kept = order + wanted - 1;
    std::nth_element(order, worst_kept, end, better);
    for (int64_t page = first; page < last; ++page) {
      if (!better(*worst_kept, static_cast<int32_t>(page))) {
        pages[count++] = static_cast<int32_t>(page);
      }
    }
  }
  for (int64_t page = last; page < num_pages; ++page) pages[count++] = static_cast<int32_t>(page);
  return count;
}

}  // namespace vllm_delta
