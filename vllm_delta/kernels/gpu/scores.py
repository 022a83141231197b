"""Page scores of a selection layer (DELTA, arXiv 2510.09883), from the logits that its attention left.

    s[t] = max_h p[h, t] = 2^(max_h (x[h, t] - L2[h]))          score[page] = sum of s[t] over its tokens

with x as in `attention` and L2 as in `combine`, of the query token that chooses. A token that it does not see
has no score, or one of 2^-127 where logits tell of no greater distance. Rows whose logits had no room are
scored from the keys, which gives the same and reads the keys a second time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_delta.kernels.gpu.device import dependent_launch, multiprocessors
from vllm_delta.kernels.gpu.layer import LayerInputs
from vllm_delta.kernels.gpu.logits import (
    LOGIT_TILE,
    decode_distance,
    discard_codes,
    load_codes,
    scaled_logits,
)
from vllm_delta.kernels.gpu.paging import entry_offsets, load_entries, load_vectors
from vllm_delta.kernels.gpu.queries import load_queries, ordered_token, seen_tokens
from vllm_delta.kernels.gpu.schedule import NO_ROOM, NO_ROW, load_split
from vllm_delta.kernels.gpu.shape import CacheStrides, TokenStrides, next_power_of_2
from vllm_delta.kernels.gpu.tuning import Tuning
from vllm_delta.kernels.gpu.workspace import Workspace

#: Programs of a multiprocessor that score, a warp each: about as many as run at a time.
SCORE_PROGRAMS = 20


@triton.jit
def store_page_scores(best, valid, scores_row_ptr, start, length, PAGE: tl.constexpr, TILE: tl.constexpr):
    """``[TILE]`` best logits, less L2, to the scores of the tile's pages."""
    score = tl.where(valid, tl.exp2(best), 0.0)
    pages = tl.sum(tl.reshape(score, (TILE // PAGE, PAGE)), 1)
    page = start // PAGE + tl.arange(0, TILE // PAGE)
    tl.store(scores_row_ptr + page, pages, mask=page < tl.cdiv(length, PAGE))


@triton.jit
def score_logits_kernel(
    logits_ptr,  # int16 [tiles, KV_HEADS, LOGIT_TILE, QUERIES], see `encode_distance`
    logit_maxima_ptr,  # float32 [tiles * LOGIT_TILE / SUBTILE, KV_HEADS, QUERIES]
    lse_ptr,  # float32 [rows, H], base 2
    splits_ptr,  # int32 [splits, SPLIT_FIELDS], see `load_split`
    scores_ptr,  # float32 [rows, pages]
    scores_stride,
    SHAPE: tl.constexpr,  # `KernelShape`
    KV_HEADS_PAD: tl.constexpr,
    TILE: tl.constexpr,
    SUBTILE: tl.constexpr,
    DISCARD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One share of one split's tiles, of a row that has logits; with DISCARD they are gone afterwards.

    With PDL, logits are read before the launch ahead ends, which combines splits and waits for them itself.
    """
    row, begin, end, _, _, _, logit_tile, length = load_split(splits_ptr, tl.program_id(0))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # `select_kernel` may start, and wait
    if (row == NO_ROW) | (logit_tile < 0):
        if PDL:
            tl.extra.cuda.gdc_wait()  # before any return: what follows may rely on what came before
        return
    heads: tl.constexpr = SHAPE.H // SHAPE.KV_HEADS
    pairs: tl.constexpr = SHAPE.QUERIES // 2
    columns: tl.constexpr = SHAPE.KV_HEADS * SHAPE.QUERIES
    pair = tl.arange(0, KV_HEADS_PAD * pairs)
    kv_head = pair // pairs
    query = pair % pairs * 2
    has_kv_head = kv_head < SHAPE.KV_HEADS
    position = tl.arange(0, TILE)
    places = (kv_head * (SHAPE.LOGIT_TILE * pairs) + pair % pairs)[None, :] + (position * pairs)[:, None]
    first = begin + tl.program_id(1) * TILE
    stride = tl.num_programs(1) * TILE
    codes = load_codes(logits_ptr, logit_tile, first, end, pair, places, SHAPE)
    if PDL:
        tl.extra.cuda.gdc_wait()  # for the sums
    # Padding gets a sum that no logit reaches.
    head_lse_ptr = lse_ptr + row * SHAPE.H + kv_head * heads + query
    even_lse = tl.load(head_lse_ptr, mask=has_kv_head & (query < heads), other=float("inf"))
    odd_lse = tl.load(head_lse_ptr + 1, mask=has_kv_head & (query + 1 < heads), other=float("inf"))
    scores_row_ptr = scores_ptr + row.to(tl.int64) * scores_stride
    for start in range(first, end, stride):
        subtile = (logit_tile + start // SHAPE.LOGIT_TILE).to(tl.int64) * (SHAPE.LOGIT_TILE // SUBTILE)
        subtile += start % SHAPE.LOGIT_TILE // SUBTILE
        maxima_ptrs = (logit_maxima_ptr + subtile * columns + 2 * pair)[None, :]
        if TILE > SUBTILE:
            maxima_ptrs += (position // SUBTILE * columns)[:, None]
        even_maximum = tl.load(maxima_ptrs, mask=has_kv_head[None, :], other=0.0)
        odd_maximum = tl.load(maxima_ptrs + 1, mask=has_kv_head[None, :], other=0.0)
        even_x = even_maximum + (1.0 - even_lse)[None, :] - decode_distance(codes)
        odd_x = odd_maximum + (1.0 - odd_lse)[None, :] - decode_distance(codes >> 16)
        best = tl.max(tl.maximum(even_x, odd_x), 1)
        store_page_scores(best, start + position < end, scores_row_ptr, start, length, SHAPE.PAGE, TILE)
        if DISCARD:
            tl.debug_barrier()  # after other threads' loads
            discard_codes(logits_ptr, logit_tile, start, SHAPE, KV_HEADS_PAD, TILE)
        codes = load_codes(logits_ptr, logit_tile, start + stride, end, pair, places, SHAPE)


@triton.jit
def score_keys_kernel(
    query_ptr,  # [tokens, H, D]
    cache_ptr,  # [num_blocks, KV_HEADS, BLOCK, 2 * D]
    block_table_ptr,  # int32 [requests, blocks]
    splits_ptr,  # int32 [splits, SPLIT_FIELDS], see `load_split`
    lse_ptr,  # float32 [rows, H], base 2
    scores_ptr,  # float32 [rows, pages]
    query_lens_ptr,  # int32 [rows], see `DecodeRows`; None where rows have one query token each
    scale_ptrs,  # factors of query, key and value; read where QUANTIZED
    scale,
    softcap,
    query_strides,  # `TokenStrides`
    cache_strides,  # `CacheStrides`
    block_table_stride,
    scores_stride,
    SHAPE: tl.constexpr,  # `KernelShape`
    KIND: tl.constexpr,  # `AttentionKind`
    TILE: tl.constexpr,
):
    """One share of one split's tiles, of a row that needs scores and has no logits."""
    row, begin, end, token_of_row, request, _, logit_tile, length = load_split(splits_ptr, tl.program_id(0))
    if (row == NO_ROW) | (logit_tile != NO_ROOM):
        return
    heads: tl.constexpr = SHAPE.H // SHAPE.KV_HEADS
    all_dims: tl.constexpr = SHAPE.D == SHAPE.D_PAD
    several: tl.constexpr = SHAPE.TOKENS > 1
    column = tl.arange(0, SHAPE.COLUMNS)
    has_head = column < heads
    dim = tl.arange(0, SHAPE.D_PAD)
    has_dim = dim < SHAPE.D
    position = tl.arange(0, TILE)
    if KIND.QUANTIZED:
        scale = scale * tl.load(scale_ptrs[0]) * tl.load(scale_ptrs[1])
    seen_end = end
    if several:
        query_len = tl.load(query_lens_ptr + row)
        chosen_by = ordered_token(0, query_len)
        token_of_row += chosen_by
        seen_end = tl.minimum(end, seen_tokens(length, query_len, chosen_by))
    query_row_ptr = query_ptr + token_of_row * query_strides.token
    block_row_ptr = block_table_ptr + request * block_table_stride
    scores_row_ptr = scores_ptr + row.to(tl.int64) * scores_stride
    for start in range(begin + tl.program_id(1) * TILE, end, tl.num_programs(1) * TILE):
        token = start + position
        entry = load_entries(
            token, end, block_row_ptr, block_row_ptr, False, False, False, SHAPE.PAGE, SHAPE.BLOCK
        )
        offsets = entry_offsets(entry, token, end, False, cache_strides, False, SHAPE.PAGE, SHAPE.BLOCK)
        best = tl.full([TILE], -float("inf"), tl.float32)
        for kv_head in range(SHAPE.KV_HEADS):
            head = kv_head * heads + column
            head_offset = (tl.zeros([], tl.int64) + kv_head) * cache_strides.head
            q = load_queries(query_row_ptr, head * query_strides.head, has_head, dim, has_dim).to(
                KIND.COMPUTE
            )
            k_ptrs = cache_ptr + head_offset + offsets[:, None] + dim[None, :]
            k = load_vectors(k_ptrs, has_dim[None, :], all_dims).to(KIND.COMPUTE)
            x = scaled_logits(tl.dot(k, q, input_precision="ieee"), scale, softcap, KIND.SOFTCAP)
            lse = tl.load(lse_ptr + row * SHAPE.H + head, mask=has_head, other=float("inf"))
            best = tl.maximum(best, tl.max(x - lse[None, :], 1))
        store_page_scores(best, token < seen_end, scores_row_ptr, start, length, SHAPE.PAGE, TILE)


def score_logits(inputs: LayerInputs, workspace: Workspace, *, dependent: bool = True) -> None:
    """Launch the scores, into `workspace.scores`, of rows whose logits the attention left.

    `dependent` says whether the launch may begin before the one ahead ends.
    """
    if len(inputs.rows) == 0:
        return
    shape, device = inputs.shape, inputs.query.device
    tuning = inputs.tuning(sparse=False)
    score_logits_kernel[_score_grid(inputs, tuning)](
        workspace.logits,
        workspace.logit_maxima,
        workspace.lse,
        inputs.schedule.splits,
        workspace.scores,
        workspace.scores.stride(0),
        SHAPE=inputs.kernel_shape,
        KV_HEADS_PAD=next_power_of_2(shape.num_kv_heads),
        TILE=max(tuning.tile, inputs.rule.page_size),
        SUBTILE=tuning.tile,
        DISCARD=device.type == "cuda",
        num_warps=1,
        **dependent_launch(device, dependent),
    )


def score_keys(inputs: LayerInputs, workspace: Workspace) -> None:
    """Launch the scores of rows whose logits had no room, if there may be such rows."""
    rows, shape, parameters = inputs.rows, inputs.shape, inputs.parameters
    if len(rows) * -(-workspace.max_length // LOGIT_TILE) <= workspace.logit_capacity(shape):
        return  # also where there are no rows
    query, cache = inputs.query, inputs.kv_cache
    score_keys_kernel[_score_grid(inputs, inputs.tuning(sparse=False))](
        query,
        cache,
        inputs.block_table,
        inputs.schedule.splits,
        workspace.lse,
        workspace.scores,
        inputs.query_lens,
        inputs.scales,
        parameters.scale,
        parameters.softcap,
        TokenStrides.of(query),
        CacheStrides.of(cache),
        inputs.block_table.stride(0),
        workspace.scores.stride(0),
        SHAPE=inputs.kernel_shape,
        KIND=inputs.kind,
        TILE=LOGIT_TILE,
        num_warps=4,
        num_stages=1,
    )


def _score_grid(inputs: LayerInputs, tuning: Tuning) -> tuple[int, int]:
    """Splits, and the programs that share one of them."""
    splits = inputs.most_splits(tuning)
    return splits, max(1, SCORE_PROGRAMS * multiprocessors(inputs.query.device) // splits)
