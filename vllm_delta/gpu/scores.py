"""Page scores of a selection layer (DELTA, arXiv 2510.09883), from the logits that its attention left.

    s[t] = max_h p[h, t] = 2^(max_h (x[h, t] - L2[h]))          score[page] = sum of s[t] over its tokens

with x and L2 as in `attention`. Rows whose logits had no room are scored from the keys, which gives the same
and reads the keys a second time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_delta.gpu.attention import (
    decode_distance,
    entry_offsets,
    load_entries,
    load_queries,
    load_vectors,
    scaled_logits,
)


@triton.jit
def store_page_scores(best, valid, scores_row_ptr, start, length, PAGE: tl.constexpr, TILE: tl.constexpr):
    """``[TILE]`` best logits, less L2, to the scores of the tile's pages."""
    score = tl.where(valid, tl.exp2(best), 0.0)
    pages = tl.sum(tl.reshape(score, (TILE // PAGE, PAGE)), 1)
    page = start // PAGE + tl.arange(0, TILE // PAGE)
    tl.store(scores_row_ptr + page, pages, mask=page < tl.cdiv(length, PAGE))


@triton.jit
def locate_codes(
    logits_ptr, first_tile, start, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, LOGIT_TILE: tl.constexpr
):
    """Where a tile's codes begin; an int32 has those of two heads, the even one's in its lower half."""
    tile = (first_tile + start // LOGIT_TILE).to(tl.int64)
    pairs_ptr = logits_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    return pairs_ptr + (tile * (KV_HEADS * LOGIT_TILE) + start % LOGIT_TILE) * (GROUP // 2)


@triton.jit
def load_codes(
    logits_ptr,
    first_tile,
    start,
    end,
    pair,
    places,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LOGIT_TILE: tl.constexpr,
):
    """Codes of a tile, in pairs: ``[TILE, pairs]``."""
    tile_ptr = locate_codes(logits_ptr, first_tile, start, KV_HEADS, GROUP, LOGIT_TILE)
    end_pair = tl.where(start < end, KV_HEADS * (GROUP // 2), 0)
    return tl.load(tile_ptr + places, mask=(pair < end_pair)[None, :], other=0)


@triton.jit
def discard_codes(
    logits_ptr,
    first_tile,
    start,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS_PAD: tl.constexpr,
    TILE: tl.constexpr,
    LOGIT_TILE: tl.constexpr,
):
    """Drop a tile's codes from the L2 cache: what has not been written to memory yet need not be."""
    pairs: tl.constexpr = GROUP // 2
    line: tl.constexpr = 32  # pairs
    lines: tl.constexpr = TILE * pairs // line
    index = tl.arange(0, KV_HEADS_PAD * lines)
    kv_head = tl.minimum(index // lines, KV_HEADS - 1)
    tile_ptr = locate_codes(logits_ptr, first_tile, start, KV_HEADS, GROUP, LOGIT_TILE)
    tl.inline_asm_elementwise(
        "discard.global.L2 [$1], 128; mov.b32 $0, 0;",
        "=r,l",
        [(tile_ptr + kv_head * (LOGIT_TILE * pairs) + index % lines * line).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def score_logits_kernel(
    logits_ptr,  # int16 [tiles, KV_HEADS, LOGIT_TILE, GROUP], see `encode_distance`
    logit_maxima_ptr,  # float32 [tiles * LOGIT_TILE / SUBTILE, KV_HEADS, GROUP]
    lse_ptr,  # float32 [rows, H], base 2
    pieces_ptr,  # int32 [pieces, 8], see `Schedule` in ops.py
    scores_ptr,  # float32 [rows, pages]
    scores_stride,
    H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SUBTILE: tl.constexpr,
    LOGIT_TILE: tl.constexpr,
    DISCARD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One share of one piece's tiles, of a row that has logits; with DISCARD they are gone afterwards.

    With PDL, logits are read before the launch ahead ends, which combines pieces and waits for them itself.
    """
    piece = tl.program_id(0)
    record_ptr = pieces_ptr + piece * 8
    row = tl.load(record_ptr)
    begin = tl.load(record_ptr + 1)
    end = tl.load(record_ptr + 2)
    first_tile = tl.load(record_ptr + 6)
    length = tl.load(record_ptr + 7)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # `select_kernel` may start, and wait
    if (row < 0) | (first_tile < 0):
        if PDL:
            tl.extra.cuda.gdc_wait()  # before any return: what follows may rely on what came before
        return
    heads: tl.constexpr = H // KV_HEADS
    pairs: tl.constexpr = GROUP // 2
    pair = tl.arange(0, KV_HEADS_PAD * pairs)
    kv_head = pair // pairs
    group = pair % pairs * 2
    has_column = kv_head < KV_HEADS
    position = tl.arange(0, TILE)
    places = (kv_head * (LOGIT_TILE * pairs) + pair % pairs)[None, :] + (position * pairs)[:, None]
    first = begin + tl.program_id(1) * TILE
    step = tl.num_programs(1) * TILE
    codes = load_codes(logits_ptr, first_tile, first, end, pair, places, KV_HEADS, GROUP, LOGIT_TILE)
    if PDL:
        tl.extra.cuda.gdc_wait()  # for the sums
    # Heads that there are not have a sum that no logit reaches.
    head_lse_ptr = lse_ptr + row * H + kv_head * heads + group
    even_lse = tl.load(head_lse_ptr, mask=has_column & (group < heads), other=float("inf"))
    odd_lse = tl.load(head_lse_ptr + 1, mask=has_column & (group + 1 < heads), other=float("inf"))
    scores_row_ptr = scores_ptr + row.to(tl.int64) * scores_stride
    for start in range(first, end, step):
        subtile = (first_tile + start // LOGIT_TILE).to(tl.int64) * (LOGIT_TILE // SUBTILE)
        subtile += start % LOGIT_TILE // SUBTILE
        maxima_ptrs = (logit_maxima_ptr + subtile * (KV_HEADS * GROUP) + 2 * pair)[None, :]
        if TILE > SUBTILE:
            maxima_ptrs += (position // SUBTILE * (KV_HEADS * GROUP))[:, None]
        even_maximum = tl.load(maxima_ptrs, mask=has_column[None, :], other=0.0)
        odd_maximum = tl.load(maxima_ptrs + 1, mask=has_column[None, :], other=0.0)
        even_x = even_maximum + (1.0 - even_lse)[None, :] - decode_distance(codes)
        odd_x = odd_maximum + (1.0 - odd_lse)[None, :] - decode_distance(codes >> 16)
        best = tl.max(tl.maximum(even_x, odd_x), 1)
        store_page_scores(best, start + position < end, scores_row_ptr, start, length, PAGE, TILE)
        if DISCARD:
            tl.debug_barrier()  # after other threads' loads
            discard_codes(logits_ptr, first_tile, start, KV_HEADS, GROUP, KV_HEADS_PAD, TILE, LOGIT_TILE)
        codes = load_codes(
            logits_ptr, first_tile, start + step, end, pair, places, KV_HEADS, GROUP, LOGIT_TILE
        )


@triton.jit
def score_keys_kernel(
    query_ptr,  # [tokens, H, D]
    kv_cache_ptr,  # [num_blocks, KV_HEADS, BLOCK, 2 * D]
    block_table_ptr,  # int32 [requests, blocks]
    pieces_ptr,  # int32 [pieces, 8], see `Schedule` in ops.py
    lse_ptr,  # float32 [rows, H], base 2
    scores_ptr,  # float32 [rows, pages]
    q_scale_ptr,
    k_scale_ptr,
    scale,
    softcap,
    query_stride_token,
    query_stride_head,
    kv_stride_block,
    kv_stride_head,
    kv_stride_token,
    block_table_stride,
    scores_stride,
    H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    QUANTIZED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One share of one piece's tiles, of a row that needs scores and has no logits."""
    piece = tl.program_id(0)
    record_ptr = pieces_ptr + piece * 8
    row = tl.load(record_ptr)
    begin = tl.load(record_ptr + 1)
    end = tl.load(record_ptr + 2)
    token_of_row = tl.load(record_ptr + 3).to(tl.int64)
    request = tl.load(record_ptr + 4).to(tl.int64)
    length = tl.load(record_ptr + 7)
    if (row < 0) | (tl.load(record_ptr + 6) != -2):
        return
    heads: tl.constexpr = H // KV_HEADS
    group = tl.arange(0, COLUMNS)
    has_head = group < heads
    dim = tl.arange(0, D_PAD)
    has_dim = dim < D
    position = tl.arange(0, TILE)
    if QUANTIZED:
        scale = scale * tl.load(q_scale_ptr) * tl.load(k_scale_ptr)
    query_row_ptr = query_ptr + token_of_row * query_stride_token
    block_row_ptr = block_table_ptr + request * block_table_stride
    scores_row_ptr = scores_ptr + row.to(tl.int64) * scores_stride
    for start in range(begin + tl.program_id(1) * TILE, end, tl.num_programs(1) * TILE):
        token = start + position
        valid = token < end
        entry = load_entries(token, end, block_row_ptr, block_row_ptr, False, False, False, PAGE, BLOCK)
        offsets = entry_offsets(
            entry, token, end, False, kv_stride_block, kv_stride_token, False, PAGE, BLOCK
        )
        best = tl.full([TILE], -float("inf"), tl.float32)
        for kv_head in range(KV_HEADS):
            head = kv_head * heads + group
            kv_head_offset = (tl.zeros([], tl.int64) + kv_head) * kv_stride_head
            q = load_queries(query_row_ptr, head, has_head, dim, has_dim, query_stride_head).to(COMPUTE)
            k_ptrs = kv_cache_ptr + kv_head_offset + offsets[:, None] + dim[None, :]
            k = load_vectors(k_ptrs, has_dim[None, :], D == D_PAD).to(COMPUTE)
            x = scaled_logits(tl.dot(k, q, input_precision="ieee"), scale, softcap, SOFTCAP)
            lse = tl.load(lse_ptr + row * H + head, mask=has_head, other=float("inf"))
            best = tl.maximum(best, tl.max(x - lse[None, :], 1))
        store_page_scores(best, valid, scores_row_ptr, start, length, PAGE, TILE)
