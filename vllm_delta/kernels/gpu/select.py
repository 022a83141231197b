"""Page scores to the selection table, one program per row: a radix select, then a compaction in order.

Scores are not negative, so their bits order as they do. Scans for a few bits each, from the highest bit in
which scores differ, find the score of the last page that is kept among the others (neither recent nor sink)
and how many of its equals are; they end early where all pages with the bits found so far are kept. A last
scan writes the indices of the kept pages, ascending, of equal scores the lower ones first. Behind them come
those of the pages that the row may yet grow into.

The pages of a long row are thinned out before: of as many buckets as pages are kept, or more, each has a
largest score, and no page below the least of these can be kept. Few are left, unless scores are very uneven.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_delta.kernels.gpu.device import dependent_launch
from vllm_delta.kernels.gpu.shape import next_power_of_2
from vllm_delta.kernels.gpu.workspace import SELECTION_WIDTH
from vllm_delta.kernels.types import SelectionTable
from vllm_delta.method.rows import DecodeRows, SelectionRule

#: Digits of the scores that a scan tells apart, in bits.
DIGIT_BITS = 5

# What is found of the last digit that is kept, in one int64: the pages that have it, those with a higher one,
# and the digit.
_HAVE_SHIFT = tl.constexpr(40)
_ABOVE_SHIFT = tl.constexpr(8)
_ABOVE_MASK = tl.constexpr(0xFFFFFFFF)
_DIGIT_MASK = tl.constexpr(0xFF)
_MOST_INT32 = tl.constexpr(0x7FFFFFFF)


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


@triton.jit(
    do_not_specialize_on_alignment=[
        "requests_ptr",
        "lengths_ptr",
        "kept_pages_ptr",
        "pages_ptr",
        "frames_ptr",
    ]
)
def select_kernel(
    scores_ptr,  # float32 [rows, pages], not negative
    requests_ptr,  # int32 [rows], as the two below: see `DecodeRows`
    lengths_ptr,
    kept_pages_ptr,
    block_table_ptr,  # int32 [requests, blocks]
    pages_ptr,  # int32 [rows, most kept and following pages]
    frames_ptr,  # of the same shape
    listed_ptr,  # int32 [rows, WIDTH], scratch
    scores_stride,
    block_table_stride,
    pages_stride,
    recent_pages,
    sink_pages,
    PAGE: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BUCKETS: tl.constexpr,
    EDGE: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    FOLLOWING: tl.constexpr,
    PDL: tl.constexpr,
):
    """Keep `kept_pages` pages of a row that has more, and name as many as FOLLOWING behind its end.

    What is behind these in the table stays as it was.
    """
    row = tl.program_id(0)
    num_pages = tl.cdiv(tl.load(lengths_ptr + row), PAGE)
    kept_pages = tl.load(kept_pages_ptr + row)
    scores_row_ptr = scores_ptr + row.to(tl.int64) * scores_stride
    pages_row_ptr = pages_ptr + row.to(tl.int64) * pages_stride
    frames_row_ptr = frames_ptr + row.to(tl.int64) * pages_stride
    request = tl.load(requests_ptr + row).to(tl.int64)
    block_row_ptr = block_table_ptr + request * block_table_stride
    lane = tl.arange(0, WIDTH)
    if PDL:
        tl.extra.cuda.gdc_wait()  # before any return: what follows may rely on what came before
    if num_pages <= kept_pages:
        return

    end = num_pages - recent_pages
    wanted = kept_pages - recent_pages - sink_pages
    count = end - sink_pages
    candidates_ptr = scores_row_ptr + sink_pages
    listed_row_ptr = listed_ptr + row * WIDTH
    # The first pages stay in registers: all there are, unless the row is long. Others are loaded ahead.
    first_page = sink_pages + lane
    first_key = load_keys(candidates_ptr, lane, count)
    lowest = tl.full([WIDTH], _MOST_INT32, tl.int32)
    highest = tl.zeros([WIDTH], tl.int32)
    key = first_key
    for start in range(0, count, WIDTH):
        index = start + lane
        lowest = tl.minimum(lowest, tl.where(index < count, key, _MOST_INT32))
        highest = tl.maximum(highest, tl.where(index < count, key, 0))
        key = load_keys(candidates_ptr, index + WIDTH, count)
    smallest, largest = tl.reduce((lowest, highest), 0, extremes)
    if (count > WIDTH) & (wanted <= BUCKETS):
        least = tl.min(tl.max(tl.reshape(highest, (WIDTH // BUCKETS, BUCKETS)), 0), 0)
        num_listed = 0
        key = first_key
        for start in range(0, count, WIDTH):
            index = start + lane
            keep = (index < count) & (key >= least)
            rank = tl.cumsum(keep.to(tl.int32), 0)
            position = num_listed + rank - 1
            tl.store(listed_row_ptr + position, sink_pages + index, mask=keep & (position < WIDTH))
            num_listed += tl.max(rank, 0)
            key = load_keys(candidates_ptr, index + WIDTH, count)
        if num_listed <= WIDTH:
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

    num_digits: tl.constexpr = 1 << DIGIT_BITS
    digits = tl.arange(0, num_digits)
    threshold = (smallest >> open_bits) << open_bits
    if wanted == 0:
        open_bits = 0
        threshold = _MOST_INT32
    equals = wanted
    whole = wanted == 0
    while open_bits > 0:
        shift = tl.maximum(open_bits - DIGIT_BITS, 0)
        counts = tl.zeros([num_digits], tl.int32)
        key = first_key
        for start in range(0, count, WIDTH):
            index = start + lane
            candidate = (index < count) & ((key >> open_bits) == (threshold >> open_bits))
            counts += tl.histogram((key >> shift) & (num_digits - 1), num_digits, mask=candidate)
            key = load_keys(candidates_ptr, index + WIDTH, count)
        at_least = tl.cumsum(counts, 0, reverse=True)
        above = at_least - counts
        # One digit is the last that is kept: sum up what is known of it, in one number.
        is_last = (at_least >= equals) & (above < equals)
        known = (counts.to(tl.int64) << _HAVE_SHIFT) | (above.to(tl.int64) << _ABOVE_SHIFT) | digits
        known = tl.sum(tl.where(is_last, known, 0), 0)
        threshold = threshold | ((known & _DIGIT_MASK).to(tl.int32) << shift)
        equals -= ((known >> _ABOVE_SHIFT) & _ABOVE_MASK).to(tl.int32)
        whole = (known >> _HAVE_SHIFT).to(tl.int32) == equals
        open_bits = tl.where(whole, 0, shift)

    taken = 0
    page = first_page
    key = first_key
    for start in range(0, count, WIDTH):
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
        page = sink_pages + index + WIDTH
        key = load_keys(candidates_ptr, index + WIDTH, count)
    edge = tl.arange(0, EDGE)
    for start in range(0, sink_pages, EDGE):
        sink = start + edge
        mask = sink < sink_pages
        store_pages(sink, sink, mask, pages_row_ptr, frames_row_ptr, block_row_ptr, PAGES_PER_BLOCK)
    for start in range(0, recent_pages + FOLLOWING, EDGE):
        index = start + edge
        position = sink_pages + wanted + index
        mask = index < recent_pages + FOLLOWING
        if FOLLOWING > 0:
            # A sequence of the greatest length has no blocks behind its end.
            mask = mask & ((end + index) // PAGES_PER_BLOCK < block_table_stride)
        store_pages(
            position, end + index, mask, pages_row_ptr, frames_row_ptr, block_row_ptr, PAGES_PER_BLOCK
        )


def select_pages(
    scores: Tensor,
    listed: Tensor,
    rows: DecodeRows,
    block_table: Tensor,
    block_size: int,
    rule: SelectionRule,
    table: SelectionTable,
) -> None:
    """Launch the selection: page scores to the selection table.

    Args:
        scores: float32 ``[rows, pages]``, not negative; read up to each row's pages.
        listed: int32 ``[rows, SELECTION_WIDTH]``, scratch.
        rows: the rows. Each one's `kept_pages` is at least the rule's recent and sink pages and, with the
            rule's following pages, fits the table, unless the row keeps everything.
        block_table: int32 ``[requests, blocks]``, those of the following pages among them.
        block_size: tokens of a block.
        rule: how pages are kept.
        table: with frames, of at least as many rows; the first `kept_pages` entries of rows that have more
            pages are written, and those of the following pages.

    Raises:
        ValueError: too small a table, or one without frames.
    """
    if len(rows) == 0:
        return
    table.check(len(rows))
    width = table.pages.shape[1]
    if width <= rule.following_pages:
        raise ValueError(
            f"a table of {width} pages has no room for {rule.following_pages} following pages and kept ones"
        )
    most_wanted = width - rule.recent_pages - rule.sink_pages - rule.following_pages
    select_kernel[(len(rows),)](
        scores,
        rows.requests,
        rows.lengths,
        rows.kept_pages,
        block_table,
        table.pages,
        table.frames,
        listed,
        scores.stride(0),
        block_table.stride(0),
        table.pages.stride(0),
        rule.recent_pages,
        rule.sink_pages,
        PAGE=rule.page_size,
        PAGES_PER_BLOCK=block_size // rule.page_size,
        WIDTH=SELECTION_WIDTH,
        BUCKETS=min(next_power_of_2(max(1, most_wanted)), SELECTION_WIDTH // 4),
        EDGE=128,
        DIGIT_BITS=DIGIT_BITS,
        FOLLOWING=rule.following_pages,
        num_warps=8,
        **dependent_launch(scores.device),
    )
