"""Page scores to the selection table, one program per row: a radix select, then a compaction in order.

Scores are not negative, so their bits order as they do. Passes over a few bits each, from the highest bit in
which scores differ, find the score of the last page that is kept among the others (neither recent nor sink)
and how many of its equals are; they end early where all pages with the bits found so far are kept. A last
pass writes the indices of the kept pages, ascending, of equal scores the lower ones first.

The pages of a long row are thinned out before: of as many groups as pages are kept, or more, each has a
largest score, and no page below the least of these can be kept. Few are left, unless scores are very uneven.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_keys(scores_row_ptr, page, end):
    """Scores as integers of the same order; what is not a number counts, whatever its sign, as some score."""
    score = tl.load(scores_row_ptr + page, mask=page < end, other=0.0)
    return tl.maximum(score.to(tl.int32, bitcast=True), 0)


@triton.jit
def extremes(lowest, highest, other_lowest, other_highest):
    """Combine two pairs of a minimum and a maximum."""
    return tl.minimum(lowest, other_lowest), tl.maximum(highest, other_highest)


@triton.jit
def store_pages(
    position, page, mask, pages_row_ptr, frames_row_ptr, block_row_ptr, PAGES_PER_BLOCK: tl.constexpr
):
    """Pages of a row, and where they lie in the cache: ``block * PAGES_PER_BLOCK + page of the block``."""
    block = tl.load(block_row_ptr + page // PAGES_PER_BLOCK, mask=mask, other=0)
    tl.store(pages_row_ptr + position, page, mask=mask)
    tl.store(frames_row_ptr + position, block * PAGES_PER_BLOCK + page % PAGES_PER_BLOCK, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["requests_ptr", "lengths_ptr", "pages_ptr", "frames_ptr"])
def select_kernel(
    scores_ptr,  # float32 [rows, pages], not negative
    requests_ptr,  # int32 [rows]
    lengths_ptr,  # int32 [rows]
    block_table_ptr,  # int32 [requests, blocks]
    pages_ptr,  # int32 [rows, budget_pages]
    frames_ptr,  # int32 [rows, budget_pages]
    listed_ptr,  # int32 [rows, CHUNK], scratch
    scores_stride,
    block_table_stride,
    pages_stride,
    budget_pages,
    recent_pages,
    sink_pages,
    PAGE: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    EDGE: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Keep ``min(pages, budget_pages)`` pages of one row; the table behind them stays as it was."""
    row = tl.program_id(0)
    num_pages = tl.cdiv(tl.load(lengths_ptr + row), PAGE)
    scores_row_ptr = scores_ptr + row.to(tl.int64) * scores_stride
    pages_row_ptr = pages_ptr + row.to(tl.int64) * pages_stride
    frames_row_ptr = frames_ptr + row.to(tl.int64) * pages_stride
    request = tl.load(requests_ptr + row).to(tl.int64)
    block_row_ptr = block_table_ptr + request * block_table_stride
    lane = tl.arange(0, CHUNK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if num_pages <= budget_pages:
        for start in range(0, num_pages, CHUNK):
            page = start + lane
            mask = page < num_pages
            store_pages(page, page, mask, pages_row_ptr, frames_row_ptr, block_row_ptr, PAGES_PER_BLOCK)
        return

    end = num_pages - recent_pages
    wanted = budget_pages - recent_pages - sink_pages
    count = end - sink_pages
    candidates_ptr = scores_row_ptr + sink_pages
    listed_row_ptr = listed_ptr + row * CHUNK
    # The first chunk stays in registers: all there is, unless the row is long. Others come one ahead.
    first_page = sink_pages + lane
    first_key = load_keys(candidates_ptr, lane, count)
    lowest = tl.full([CHUNK], 0x7FFFFFFF, tl.int32)
    highest = tl.zeros([CHUNK], tl.int32)
    key = first_key
    for start in range(0, count, CHUNK):
        index = start + lane
        lowest = tl.minimum(lowest, tl.where(index < count, key, 0x7FFFFFFF))
        highest = tl.maximum(highest, tl.where(index < count, key, 0))
        key = load_keys(candidates_ptr, index + CHUNK, count)
    smallest, largest = tl.reduce((lowest, highest), 0, extremes)
    if (count > CHUNK) & (wanted <= GROUPS):
        least = tl.min(tl.max(tl.reshape(highest, (CHUNK // GROUPS, GROUPS)), 0), 0)
        num_listed = 0
        key = first_key
        for start in range(0, count, CHUNK):
            index = start + lane
            keep = (index < count) & (key >= least)
            rank = tl.cumsum(keep.to(tl.int32), 0)
            position = num_listed + rank - 1
            tl.store(listed_row_ptr + position, sink_pages + index, mask=keep & (position < CHUNK))
            num_listed += tl.max(rank, 0)
            key = load_keys(candidates_ptr, index + CHUNK, count)
        if num_listed <= CHUNK:
            tl.debug_barrier()  # other threads wrote the list
            count = num_listed
            smallest = least
            first_page = tl.load(listed_row_ptr + lane, mask=lane < count, other=0)
            first_key = load_keys(scores_row_ptr, first_page, end)
    differing = smallest ^ largest
    # The lowest bits of the threshold, which are not known yet: up to the highest in which keys differ, whose
    # place is a float's exponent (one more where the float is rounded up).
    exponent = (differing.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    open_bits = tl.where(differing > 0, tl.minimum(exponent, 31), 0)

    bins: tl.constexpr = 1 << DIGIT_BITS
    digits = tl.arange(0, bins)
    threshold = (smallest >> open_bits) << open_bits
    if wanted == 0:
        open_bits = 0
        threshold = 0x7FFFFFFF
    equals = wanted
    whole = wanted == 0
    while open_bits > 0:
        shift = tl.maximum(open_bits - DIGIT_BITS, 0)
        counts = tl.zeros([bins], tl.int32)
        key = first_key
        for start in range(0, count, CHUNK):
            index = start + lane
            candidate = (index < count) & ((key >> open_bits) == (threshold >> open_bits))
            counts += tl.histogram((key >> shift) & (bins - 1), bins, mask=candidate)
            key = load_keys(candidates_ptr, index + CHUNK, count)
        at_least = tl.cumsum(counts, 0, reverse=True)
        # One digit is the last that is kept: sum up what is known of it, in one number.
        is_last = (at_least >= equals) & (at_least - counts < equals)
        known = (counts.to(tl.int64) << 40) | ((at_least - counts).to(tl.int64) << 8) | digits
        known = tl.sum(tl.where(is_last, known, 0), 0)
        threshold = threshold | ((known & 255).to(tl.int32) << shift)
        equals -= ((known >> 8) & 0xFFFFFFFF).to(tl.int32)
        whole = (known >> 40).to(tl.int32) == equals
        open_bits = tl.where(whole, 0, shift)

    taken = 0
    page = first_page
    key = first_key
    for start in range(0, count, CHUNK):
        index = start + lane
        keep = (index < count) & (key >= threshold)
        if not whole:
            equal = (keep & (key == threshold)).to(tl.int32)
            keep = keep & ((key > threshold) | (tl.cumsum(equal, 0) <= equals))
            equals -= tl.sum(equal, 0)
        rank = tl.cumsum(keep.to(tl.int32), 0)
        position = sink_pages + taken + rank - 1
        store_pages(position, page, keep, pages_row_ptr, frames_row_ptr, block_row_ptr, PAGES_PER_BLOCK)
        taken += tl.max(rank, 0)
        page = sink_pages + index + CHUNK
        key = load_keys(candidates_ptr, index + CHUNK, count)
    edge = tl.arange(0, EDGE)
    for start in range(0, sink_pages, EDGE):
        sink = start + edge
        mask = sink < sink_pages
        store_pages(sink, sink, mask, pages_row_ptr, frames_row_ptr, block_row_ptr, PAGES_PER_BLOCK)
    for start in range(0, recent_pages, EDGE):
        index = start + edge
        position = sink_pages + wanted + index
        mask = index < recent_pages
        store_pages(
            position, end + index, mask, pages_row_ptr, frames_row_ptr, block_row_ptr, PAGES_PER_BLOCK
        )
