"""Cutting a step's rows into pieces of about equal work, on the GPU.

With ``tiles[r]`` the tiles of row r and P programs wanted per KV head, a piece has at most
``w = ceil(sum(tiles) / P)`` tiles, and row r has ``ceil(tiles[r] / w)`` pieces, which share its tiles evenly.
Where that makes more than P pieces and P exceeds the number of rows, ``w = ceil(sum(tiles) / (P - rows))``
makes at most P. There are at most ``rows + P`` pieces, which is the grid of every kernel that works on
pieces, whatever the lengths are. One long row among short ones gets most of the pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept_tokens(length, budget_tokens, page_size):
    """Tokens that a sparse layer reads: ``length`` less the pages over the budget, all of them full."""
    pages = tl.cdiv(length, page_size)
    surplus = tl.maximum(pages - budget_tokens // page_size, 0)
    return length - surplus * page_size


# The number of rows changes from step to step: no variants by its value, nor by the pointers' alignment.
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["tokens_ptr", "requests_ptr", "lengths_ptr", "dense_ptr"],
)
def schedule_kernel(
    tokens_ptr,  # int32 [rows]
    requests_ptr,  # int32 [rows]
    lengths_ptr,  # int32 [rows]
    dense_ptr,  # int32 [rows]: 1 for a row that reads everything in every layer
    pieces_ptr,  # int32 [2, pieces, 8], see `Schedule` in ops.py
    row_pieces_ptr,  # int32 [2, capacity, 4]
    full_counters_ptr,  # int64 [3]: rows, attended tokens, context tokens of the full layers
    num_rows,
    num_pieces,
    capacity,
    programs_full,
    programs_sparse,
    logit_capacity,  # tiles
    full_layers,
    budget_tokens,
    page_size,
    FULL_TILE: tl.constexpr,
    SPARSE_TILE: tl.constexpr,
    LOGIT_TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Programs (0, i) schedule the selection layers, (1, i) the sparse ones: each stores some pieces."""
    is_sparse = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    row = tl.arange(0, ROWS)
    valid = row < num_rows
    length = tl.load(lengths_ptr + row, mask=valid, other=0)
    dense = tl.load(dense_ptr + row, mask=valid, other=0)
    token = tl.load(tokens_ptr + row, mask=valid, other=0)
    request = tl.load(requests_ptr + row, mask=valid, other=0)
    selects = (tl.cdiv(length, page_size) > budget_tokens // page_size) & (dense == 0)
    needed_tiles = tl.where(selects, tl.cdiv(length, LOGIT_TILE), 0)
    end_tile = tl.cumsum(needed_tiles, 0)
    logit_tile = tl.where(selects, tl.where(end_tile <= logit_capacity, end_tile - needed_tiles, -2), -1)
    if is_sparse:
        tile = SPARSE_TILE
        programs = programs_sparse
        tokens = tl.where(dense != 0, length, kept_tokens(length, budget_tokens, page_size))
    else:
        tile = FULL_TILE
        programs = programs_full
        tokens = length
        if part == 0:
            context = tl.sum(length.to(tl.int64), 0)
            tl.atomic_add(full_counters_ptr, full_layers * tl.sum((length > 0).to(tl.int64), 0))
            tl.atomic_add(full_counters_ptr + 1, full_layers * context)
            tl.atomic_add(full_counters_ptr + 2, full_layers * context)

    tiles = tl.cdiv(tokens, tile)
    total = tl.sum(tiles, 0)
    most = tl.maximum(tl.cdiv(total, programs), 1)
    if tl.sum(tl.cdiv(tiles, most), 0) > programs:
        # Rounded up, a few pieces too many would run alone when all others are done.
        spare = programs - tl.sum((tiles > 0).to(tl.int32), 0)
        most = tl.where(spare > 0, tl.cdiv(total, tl.maximum(spare, 1)), most)
    share = tl.maximum(tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, most), 1)), 1)
    count = tl.cdiv(tiles, share)  # with even shares the last piece might be empty
    first = tl.cumsum(count, 0) - count
    if part == 0:
        row_pieces = row_pieces_ptr + (is_sparse * capacity + row) * 4
        tl.store(row_pieces, first, mask=valid)
        tl.store(row_pieces + 1, count, mask=valid)
        tl.store(row_pieces + 2, token, mask=valid)
        tl.store(row_pieces + 3, tokens, mask=valid)

    share *= tile
    base = pieces_ptr + is_sparse * num_pieces * 8
    for index in range(part, tl.max(count, 0), parts):
        has = index < count
        piece = base + (first + index) * 8
        tl.store(piece, row, mask=has)
        tl.store(piece + 1, tl.minimum(index * share, tokens), mask=has)
        tl.store(piece + 2, tl.minimum((index + 1) * share, tokens), mask=has)
        tl.store(piece + 3, token, mask=has)
        tl.store(piece + 4, request, mask=has)
        tl.store(piece + 5, tl.where(selects, tokens, 0), mask=has)
        tl.store(piece + 6, logit_tile, mask=has)
        tl.store(piece + 7, length, mask=has)
    used = tl.sum(count, 0)
    for start in range(part * ROWS, num_pieces, parts * ROWS):
        piece = start + row
        tl.store(base + piece * 8, -1, mask=(piece >= used) & (piece < num_pieces))
