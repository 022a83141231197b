"""Page scores to the selection table, one program per row: a radix select, then a compaction in order.

Scores are not negative, so their bits order as they do. Passes over eight bits each, from the highest bit in
which scores differ, find the score of the last page that is kept among the others (neither recent nor sink)
and how many of its equals are; they end early where all pages with the bits found so far are kept. A last
pass writes the indices of the kept pages, ascending, of equal scores the lower ones first.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_keys(scores_row_ptr, page, end):
    """Scores as integers of the same order."""
    return tl.load(scores_row_ptr + page, mask=page < end, other=0.0).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=["lengths_ptr", "pages_ptr"])
def select_kernel(
    scores_ptr,  # float32 [rows, pages], not negative
    lengths_ptr,  # int32 [rows]
    pages_ptr,  # int32 [rows, budget_pages]
    scores_stride,
    pages_stride,
    budget_pages,
    recent_pages,
    sink_pages,
    PAGE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Keep ``min(pages, budget_pages)`` pages of one row; the table behind them stays as it was."""
    row = tl.program_id(0)
    num_pages = tl.cdiv(tl.load(lengths_ptr + row), PAGE)
    scores_row_ptr = scores_ptr + row.to(tl.int64) * scores_stride
    pages_row_ptr = pages_ptr + row.to(tl.int64) * pages_stride
    lane = tl.arange(0, CHUNK)
    if num_pages <= budget_pages:
        for start in range(0, num_pages, CHUNK):
            page = start + lane
            tl.store(pages_row_ptr + page, page, mask=page < num_pages)
        return

    end = num_pages - recent_pages
    wanted = budget_pages - recent_pages - sink_pages
    lowest = tl.full([CHUNK], 0x7FFFFFFF, tl.int32)
    highest = tl.zeros([CHUNK], tl.int32)
    for start in range(sink_pages, end, CHUNK):
        page = start + lane
        key = load_keys(scores_row_ptr, page, end)
        lowest = tl.minimum(lowest, tl.where(page < end, key, 0x7FFFFFFF))
        highest = tl.maximum(highest, tl.where(page < end, key, 0))
    smallest = tl.min(lowest, 0)
    differing = smallest ^ tl.max(highest, 0)
    open_bits = 0  # the lowest bits of the threshold, which are not known yet
    for bit in tl.static_range(31):
        open_bits = tl.where((differing >> bit) != 0, bit + 1, open_bits)

    digits = tl.arange(0, 256)
    threshold = (smallest >> open_bits) << open_bits
    equals = wanted
    while open_bits > 0:
        shift = tl.maximum(open_bits - 8, 0)
        counts = tl.zeros([256], tl.int32)
        for start in range(sink_pages, end, CHUNK):
            page = start + lane
            key = load_keys(scores_row_ptr, page, end)
            candidate = (page < end) & ((key >> open_bits) == (threshold >> open_bits))
            counts += tl.histogram((key >> shift) & 255, 256, mask=candidate)
        at_least = tl.cumsum(counts, 0, reverse=True)
        last = tl.max(tl.where(at_least >= equals, digits, 0), 0)
        equals -= tl.sum(tl.where(digits > last, counts, 0), 0)
        threshold = threshold | (last << shift)
        taken_whole = tl.sum(tl.where(digits == last, counts, 0), 0) == equals
        open_bits = tl.where(taken_whole, 0, shift)

    taken = 0
    for start in range(sink_pages, end, CHUNK):
        page = start + lane
        inside = page < end
        key = load_keys(scores_row_ptr, page, end)
        equal = (inside & (key == threshold)).to(tl.int32)
        rank = tl.cumsum(equal, 0)
        keep = inside & ((key > threshold) | ((equal != 0) & (rank <= equals)))
        position = sink_pages + taken + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(pages_row_ptr + position, page, mask=keep)
        taken += tl.sum(keep.to(tl.int32), 0)
        equals -= tl.sum(equal, 0)
    for start in range(0, sink_pages, CHUNK):
        page = start + lane
        tl.store(pages_row_ptr + page, page, mask=page < sink_pages)
    for start in range(0, recent_pages, CHUNK):
        index = start + lane
        tl.store(pages_row_ptr + sink_pages + wanted + index, end + index, mask=index < recent_pages)
