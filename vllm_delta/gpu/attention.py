"""Attention of decode rows over the paged KV cache, in pieces (`schedule`), and their combination.

For row r, query head h of KV head h // G, and the tokens t of a piece (DELTA, arXiv 2510.09883; the split and
its combination as in Flash-Decoding):

    x[t] = log2(e) * softcap(scale * q[h] . k[t])       l2 = log2 sum_t 2^x[t]
    out  = sum_t 2^(x[t] - l2) v[t]

and over the pieces i of the row, ``L2 = log2(2^sink + sum_i 2^l2[i])``,
``out = sum_i 2^(l2[i] - L2) out[i]``.
The tokens are all of the row's, or those of the selection table's pages. A token's key and value stand side
by side in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def token_offsets(
    token,  # int32 [TILE]: which of the row's tokens, or of its kept tokens
    valid,
    pages_ptr,  # the row's selection table
    block_row_ptr,  # the row's block table
    table_end,  # tokens below it come from the selection table
    kv_stride_block,
    kv_stride_token,
    SPARSE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where tokens lie in one head of the cache, in elements: int64 ``[TILE]``."""
    if SPARSE:
        page = tl.load(pages_ptr + token // PAGE, mask=token < table_end, other=0)
        token = tl.where(token < table_end, page * PAGE + token % PAGE, token)
    block = tl.load(block_row_ptr + token // BLOCK, mask=valid, other=0).to(tl.int64)
    return block * kv_stride_block + (token % BLOCK) * kv_stride_token


@triton.jit
def scaled_logits(raw, scale, softcap, SOFTCAP: tl.constexpr):
    """Dot products to logits in base 2; tanh(y) is 1 - 2 / (e^2y + 1)."""
    x = raw * scale
    log2_e = 1.4426950408889634
    if SOFTCAP:
        x = softcap * (1.0 - 2.0 / (tl.exp2(2.0 * log2_e * x / softcap) + 1.0))
    return x * log2_e


@triton.jit(do_not_specialize_on_alignment=["pages_ptr"])
def attention_kernel(
    query_ptr,  # [tokens, H, D]
    kv_cache_ptr,  # [num_blocks, KV_HEADS, BLOCK, 2 * D], any strides but the last
    block_table_ptr,  # int32 [requests, blocks]
    pieces_ptr,  # int32 [pieces, 8], see `Schedule` in ops.py
    pages_ptr,  # int32 [rows, budget pages]; read where SPARSE
    logits_ptr,  # float32 [tiles, H, LOGIT_TILE]; written unless SPARSE
    partial_ptr,  # float32 [pieces, H, D]
    partial_lse_ptr,  # float32 [pieces, H]
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
    pages_stride,
    k_scale_stride,
    H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    LOGIT_TILE: tl.constexpr,
    SPARSE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    QUANTIZED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One piece of one row, for the query heads of one KV head."""
    piece = tl.program_id(0)
    kv_head = tl.program_id(1)
    record_ptr = pieces_ptr + piece * 8
    row = tl.load(record_ptr)
    begin = tl.load(record_ptr + 1)
    end = tl.load(record_ptr + 2)
    token_of_row = tl.load(record_ptr + 3).to(tl.int64)
    request = tl.load(record_ptr + 4).to(tl.int64)
    table_end = tl.load(record_ptr + 5)
    first_logit_tile = tl.load(record_ptr + 6)
    if row < 0:
        return

    group = tl.arange(0, GROUP)
    head = kv_head * (H // KV_HEADS) + group
    has_head = group < H // KV_HEADS
    dim = tl.arange(0, D_PAD)
    has_dim = dim < D
    position = tl.arange(0, TILE)
    q = tl.load(
        query_ptr + token_of_row * query_stride_token + head[:, None] * query_stride_head + dim[None, :],
        mask=has_head[:, None] & has_dim[None, :],
        other=0.0,
    ).to(COMPUTE)
    if QUANTIZED:
        scale = scale * tl.load(q_scale_ptr) * tl.load(k_scale_ptr + kv_head * k_scale_stride)
    block_row_ptr = block_table_ptr + request * block_table_stride
    pages_row_ptr = pages_ptr + row.to(tl.int64) * pages_stride
    kv_head_ptr = kv_cache_ptr + kv_head.to(tl.int64) * kv_stride_head
    logit_heads = tl.where(first_logit_tile >= 0, H // KV_HEADS, 0)

    maximum = tl.full([GROUP], -float("inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    accumulated = tl.zeros([GROUP, D_PAD], tl.float32)
    for start in range(begin, end, TILE):
        token = start + position
        valid = token < end
        offsets = token_offsets(
            token,
            valid,
            pages_row_ptr,
            block_row_ptr,
            table_end,
            kv_stride_block,
            kv_stride_token,
            SPARSE,
            PAGE,
            BLOCK,
        )
        k = tl.load(
            kv_head_ptr + offsets[None, :] + dim[:, None],
            mask=valid[None, :] & has_dim[:, None],
            other=0.0,
            eviction_policy="evict_first",
        ).to(COMPUTE)
        x = scaled_logits(tl.dot(q, k, input_precision="ieee"), scale, softcap, SOFTCAP)
        x = tl.where(valid[None, :], x, -float("inf"))
        if not SPARSE:
            tile = (first_logit_tile + start // LOGIT_TILE).to(tl.int64)
            tl.store(
                logits_ptr + (tile * H + head[:, None]) * LOGIT_TILE + (token % LOGIT_TILE)[None, :],
                x,
                mask=(group < logit_heads)[:, None],
            )
        v = tl.load(
            kv_head_ptr + offsets[:, None] + (D + dim)[None, :],
            mask=valid[:, None] & has_dim[None, :],
            other=0.0,
            eviction_policy="evict_first",
        ).to(COMPUTE)
        new_maximum = tl.maximum(maximum, tl.max(x, 1))
        probability = tl.exp2(x - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(probability, 1)
        accumulated = accumulated * decay[:, None]
        accumulated = tl.dot(probability.to(COMPUTE), v, accumulated, input_precision="ieee")
        maximum = new_maximum

    slot = piece.to(tl.int64) * H + head
    tl.store(
        partial_ptr + slot[:, None] * D + dim[None, :],
        accumulated / total[:, None],
        mask=has_head[:, None] & has_dim[None, :],
    )
    tl.store(partial_lse_ptr + slot, maximum + tl.log2(total), mask=has_head)


@triton.jit(do_not_specialize_on_alignment=["lengths_ptr", "dense_ptr"])
def combine_kernel(
    partial_ptr,  # float32 [pieces, H, D]
    partial_lse_ptr,  # float32 [pieces, H]
    lengths_ptr,  # int32 [rows]
    dense_ptr,  # int32 [rows]
    row_pieces_ptr,  # int32 [rows, 4], see `Schedule` in ops.py
    counters_ptr,  # int64 [5]: rows, attended, context tokens, dense rows, rows within the budget
    sinks_ptr,  # [H] or unused
    v_scale_ptr,
    output_ptr,  # [tokens, H, D]
    lse_ptr,  # float32 [rows, H], base 2
    output_stride_token,
    output_stride_head,
    v_scale_stride,
    H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PIECES: tl.constexpr,
    SPARSE: tl.constexpr,
    SINKS: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """One row and query head: the pieces' outputs, weighted; a row without pieces is padding."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(row_pieces_ptr + row * 4)
    count = tl.load(row_pieces_ptr + row * 4 + 1)
    token = tl.load(row_pieces_ptr + row * 4 + 2).to(tl.int64)
    if count == 0:
        return
    dim = tl.arange(0, D_PAD)
    has_dim = dim < D
    index = tl.arange(0, PIECES)
    maximum = -float("inf")
    total = 0.0
    if SINKS:
        maximum = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        total = 1.0
    accumulated = tl.zeros([D_PAD], tl.float32)
    for start in range(0, count, PIECES):
        has = start + index < count
        slot = (first + start + index).to(tl.int64) * H + head
        lse = tl.load(partial_lse_ptr + slot, mask=has, other=-float("inf"))
        part = tl.load(
            partial_ptr + slot[:, None] * D + dim[None, :], mask=has[:, None] & has_dim[None, :], other=0.0
        )
        new_maximum = tl.maximum(maximum, tl.max(lse, 0))
        weight = tl.exp2(lse - new_maximum)
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weight, 0)
        accumulated = accumulated * decay + tl.sum(part * weight[:, None], 0)
        maximum = new_maximum
    result = accumulated / total
    if QUANTIZED:
        result *= tl.load(v_scale_ptr + (head // (H // KV_HEADS)) * v_scale_stride)
    tl.store(output_ptr + token * output_stride_token + head * output_stride_head + dim, result, mask=has_dim)
    if not SPARSE:
        tl.store(lse_ptr + row * H + head, maximum + tl.log2(total))
    if head == 0:
        attended = tl.load(row_pieces_ptr + row * 4 + 3)
        length = tl.load(lengths_ptr + row)
        tl.atomic_add(counters_ptr, 1, sem="relaxed")
        tl.atomic_add(counters_ptr + 1, attended.to(tl.int64), sem="relaxed")
        tl.atomic_add(counters_ptr + 2, length.to(tl.int64), sem="relaxed")
        if SPARSE and attended == length:
            reason = tl.where(tl.load(dense_ptr + row) != 0, 3, 4)
            tl.atomic_add(counters_ptr + reason, 1, sem="relaxed")
