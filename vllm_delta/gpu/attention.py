"""Attention of decode rows over the paged KV cache, in pieces (`schedule`), and their combination.

For row r, query head h of KV head h // G, and the tokens t of a piece (DELTA, arXiv 2510.09883; the split and
its combination as in Flash-Decoding):

    x[t] = log2(e) * softcap(scale * q[h] . k[t])       l2 = log2 sum_t 2^x[t]
    out  = sum_t 2^(x[t] - l2) v[t]

and over the pieces i of the row, ``L2 = log2(2^sink + sum_i 2^l2[i])``,
``out = sum_i 2^(l2[i] - L2) out[i]``.
The tokens are all of the row's, or those of the selection table's pages. A token's key and value stand side
by side in the cache. The row's own, its last, may be given apart: then they are written to the cache first.
Pieces are combined by a launch of its own or, where most rows have one, by the last program that is done.

A selection layer leaves its logits behind in 16 bits each, as distances below the largest of their tile,
``d = max_t x[t] - x[t]``: d + 1, below 128, as a float of 3 bits of exponent and 13 of mantissa. That rounds
d by at most ``2^-14 (d + 1)``, and so 2^-d by at most 0.0042% (d + 1) of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def encode_distance(distance_and_one):
    """Distances, not negative, plus 1, to 16 bits: those below the exponent's lowest are left of a float."""
    nearest = tl.minimum(distance_and_one, 127.9921875).to(tl.int32, bitcast=True) + 512
    return ((nearest - 0x3F000000) >> 10).to(tl.int16)


@triton.jit
def decode_distance(code):
    """What `encode_distance` was given, float32, from the lower half of an int32."""
    return ((code << 10) & 0x03FFFC00).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def load_entries(
    token,  # int32 [TILE]: which of the row's tokens or, if `selected`, of its kept tokens
    end,  # tokens from it on stand for the one before it
    table_row_ptr,  # the row's selection table
    block_row_ptr,  # the row's block table
    selected,  # whether the tokens are those of the selection table; read where SPARSE
    SPARSE: tl.constexpr,
    FRAMES: tl.constexpr,  # the selection table holds page frames, not pages
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tokens' blocks or, if `selected`, their page frames: int32 ``[TILE]``."""
    token = tl.minimum(token, end - 1)
    if SPARSE:
        entries_ptr = tl.where(selected, table_row_ptr, block_row_ptr)
        entry = tl.load(entries_ptr + tl.where(selected, token // PAGE, token // BLOCK))
        if not FRAMES:
            pages_per_block: tl.constexpr = BLOCK // PAGE
            page = tl.where(selected, entry, 0)
            block = tl.load(block_row_ptr + page // pages_per_block)
            entry = tl.where(selected, block * pages_per_block + page % pages_per_block, entry)
    else:
        entry = tl.load(block_row_ptr + token // BLOCK)
    return entry


@triton.jit
def entry_offsets(
    entry,  # of `load_entries`, as are the arguments below
    token,
    end,
    selected,
    kv_stride_block,
    kv_stride_token,
    SPARSE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where tokens lie in one head of the cache, in elements: int64 ``[TILE]``."""
    token = tl.minimum(token, end - 1)
    block = entry
    if SPARSE:
        pages_per_block: tl.constexpr = BLOCK // PAGE
        block = tl.where(selected, entry // pages_per_block, entry)
        token = tl.where(selected, entry % pages_per_block * PAGE + token % PAGE, token)
    return block.to(tl.int64) * kv_stride_block + (token % BLOCK) * kv_stride_token


@triton.jit
def load_vectors(ptrs, mask, ALL: tl.constexpr):
    """Keys or values; zero where `mask` is not set, unless ALL."""
    if ALL:
        vectors = tl.load(ptrs, eviction_policy="evict_first")
    else:
        vectors = tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
    return vectors


@triton.jit
def load_queries(query_row_ptr, head, has_head, dim, has_dim, query_stride_head):
    """The queries of one KV head, ``[D_PAD, COLUMNS]``, zero where there is none."""
    return tl.load(
        query_row_ptr + head[None, :] * query_stride_head + dim[:, None],
        mask=has_head[None, :] & has_dim[:, None],
        other=0.0,
    )


@triton.jit
def scaled_logits(raw, scale, softcap, SOFTCAP: tl.constexpr):
    """Dot products to logits in base 2; tanh(y) is 1 - 2 / (e^2y + 1)."""
    x = raw * scale
    if SOFTCAP:
        x = softcap * (1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E) / softcap) + 1.0))
    return x * LOG2_E


@triton.jit
def combine_pieces(
    partial_ptr,
    partial_lse_ptr,
    first,  # piece
    count,
    head,  # int32 [COLUMNS]
    has_head,
    dim,
    has_dim,
    H: tl.constexpr,
    D: tl.constexpr,
):
    """Pieces that other programs have just written: their outputs, weighted, ``[COLUMNS, D_PAD]``, and L2."""
    maximum = tl.full(head.shape, -float("inf"), tl.float32)
    total = tl.zeros(head.shape, tl.float32)
    combined = tl.zeros([head.shape[0], dim.shape[0]], tl.float32)
    for index in range(count):
        slot = (first + index).to(tl.int64) * H + head
        # Not from the first-level cache, which does not see what other multiprocessors write.
        lse = tl.load(partial_lse_ptr + slot, mask=has_head, other=0.0, cache_modifier=".cg")
        part_ptrs = partial_ptr + slot[:, None] * D + dim[None, :]
        part = tl.load(part_ptrs, mask=has_head[:, None] & has_dim[None, :], other=0.0, cache_modifier=".cg")
        new_maximum = tl.maximum(maximum, lse)
        decay = tl.exp2(maximum - new_maximum)
        weight = tl.exp2(lse - new_maximum)
        total = total * decay + weight
        combined = combined * decay[:, None] + part * weight[:, None]
        maximum = new_maximum
    return combined / total[:, None], maximum + tl.log2(total)


@triton.jit
def count_row(counters_ptr, dense_row_ptr, attended, length, SPARSE: tl.constexpr):
    """Count a row of this layer; the counters as in `combine_kernel`."""
    tl.atomic_add(counters_ptr, 1, sem="relaxed")
    tl.atomic_add(counters_ptr + 1, attended.to(tl.int64), sem="relaxed")
    tl.atomic_add(counters_ptr + 2, length.to(tl.int64), sem="relaxed")
    if SPARSE and attended == length:
        reason = tl.where(tl.load(dense_row_ptr) != 0, 3, 4)
        tl.atomic_add(counters_ptr + reason, 1, sem="relaxed")


# Full layers run what selection layers do, and store nothing: compiled without the stores it takes longer.
@triton.jit(do_not_specialize=["keeps_logits"], do_not_specialize_on_alignment=["table_ptr", "dense_ptr"])
def attention_kernel(
    query_ptr,  # [tokens, H, D]
    kv_cache_ptr,  # [num_blocks, KV_HEADS, BLOCK, 2 * D], any strides but the last
    block_table_ptr,  # int32 [requests, blocks]
    pieces_ptr,  # int32 [pieces, 8], see `Schedule` in ops.py
    table_ptr,  # int32 [rows, budget pages]: pages or, with FRAMES, page frames; read where SPARSE
    logits_ptr,  # int16 [tiles, KV_HEADS, LOGIT_TILE, GROUP]; not written where SPARSE, as their maxima
    logit_maxima_ptr,  # float32 [tiles * LOGIT_TILE / TILE, KV_HEADS, GROUP]
    partial_ptr,  # float32 [pieces, H, D]
    partial_lse_ptr,  # float32 [pieces, H]
    arrived_ptr,  # int32 [rows, KV_HEADS], zeros; read where WHOLE, as the next ones: see `combine_kernel`
    dense_ptr,
    row_pieces_ptr,
    counters_ptr,
    sinks_ptr,
    output_ptr,
    key_ptr,  # [tokens, KV_HEADS, D], not in the cache yet; read where APPEND, as is the value
    value_ptr,
    slot_ptr,  # int64 [tokens], see `LayerInputs` in ops.py; read where APPEND
    q_scale_ptr,
    k_scale_ptr,
    scale,
    softcap,
    keeps_logits,  # 0: of a full layer, which has no use for them
    query_stride_token,
    query_stride_head,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    kv_stride_block,
    kv_stride_head,
    kv_stride_token,
    block_table_stride,
    table_stride,
    output_stride_token,
    output_stride_head,
    H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    LOGIT_TILE: tl.constexpr,
    SPARSE: tl.constexpr,
    FRAMES: tl.constexpr,
    APPEND: tl.constexpr,
    WHOLE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    COMPUTE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One piece of one row, for the query heads of one KV head.

    With WHOLE, a piece that is a whole row is stored as the output; of several, the last program to arrive
    combines them. Then nothing else has to be launched. Not for a quantised cache.

    With PDL, what is read of pieces and tables is read while the launch ahead of this one ends, so that must
    not be the one that writes them.
    """
    tl.static_assert(not (WHOLE and QUANTIZED))
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
    length = tl.load(record_ptr + 7)
    if row < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()  # before any return: what follows may rely on what came before
        return

    heads: tl.constexpr = H // KV_HEADS
    group = tl.arange(0, COLUMNS)
    head = kv_head * heads + group
    has_head = group < heads
    dim = tl.arange(0, D_PAD)
    has_dim = dim < D
    position = tl.arange(0, TILE)
    block_row_ptr = block_table_ptr + request * block_table_stride
    table_row_ptr = table_ptr + row.to(tl.int64) * table_stride
    selected = table_end > 0
    entry = load_entries(
        begin + position, end, table_row_ptr, block_row_ptr, selected, SPARSE, FRAMES, PAGE, BLOCK
    )
    kv_head_ptr = kv_cache_ptr + kv_head.to(tl.int64) * kv_stride_head
    if WHOLE:
        first = tl.load(row_pieces_ptr + row * 4)
        count = tl.load(row_pieces_ptr + row * 4 + 1)
        attended = tl.load(row_pieces_ptr + row * 4 + 3)
    if APPEND:
        slot = tl.load(slot_ptr + token_of_row)
        # The piece that reads the row's own token writes it.
        new_dims = tl.where((end == tl.where(selected, table_end, length)) & (slot >= 0), D, 0)
    if PDL:
        tl.extra.cuda.gdc_wait()  # for query and cache, which the launch ahead may have written
        if not WHOLE:
            tl.extra.cuda.gdc_launch_dependents()  # `combine_kernel` may start, and wait
    if APPEND:
        k_ptr = key_ptr + token_of_row * key_stride_token + kv_head * key_stride_head
        v_ptr = value_ptr + token_of_row * value_stride_token + kv_head * value_stride_head
        new_key = tl.load(k_ptr + dim, mask=dim < new_dims)
        new_value = tl.load(v_ptr + dim, mask=dim < new_dims)
    query_row_ptr = query_ptr + token_of_row * query_stride_token
    q = load_queries(query_row_ptr, head, has_head, dim, has_dim, query_stride_head).to(COMPUTE)
    if QUANTIZED:
        scale = scale * tl.load(q_scale_ptr) * tl.load(k_scale_ptr)
    if APPEND:
        token_ptr = kv_head_ptr + slot // BLOCK * kv_stride_block + slot % BLOCK * kv_stride_token
        tl.store(token_ptr + dim, new_key, mask=dim < new_dims)
        tl.store(token_ptr + D + dim, new_value, mask=dim < new_dims)
        tl.debug_barrier()  # other threads of the program read them
    logit_columns = tl.where((first_logit_tile >= 0) & (keeps_logits != 0), GROUP, 0)

    maximum = tl.full([COLUMNS], -float("inf"), tl.float32)
    totals = tl.zeros([TILE, COLUMNS], tl.float32)  # of each place in a tile, summed up at the end
    accumulated = tl.zeros([D_PAD, COLUMNS], tl.float32)
    for start in range(begin, end, TILE):
        token = start + position
        offsets = entry_offsets(
            entry, token, end, selected, kv_stride_block, kv_stride_token, SPARSE, PAGE, BLOCK
        )
        k = load_vectors(kv_head_ptr + offsets[:, None] + dim[None, :], has_dim[None, :], D == D_PAD).to(
            COMPUTE
        )
        v = load_vectors(kv_head_ptr + D + offsets[None, :] + dim[:, None], has_dim[:, None], D == D_PAD).to(
            COMPUTE
        )
        # Triton pipelines what is loaded by address, but not the loads of its addresses: these come a tile
        # ahead, and nothing is computed from them before it is that tile's turn.
        entry = load_entries(
            token + TILE, end, table_row_ptr, block_row_ptr, selected, SPARSE, FRAMES, PAGE, BLOCK
        )
        x = scaled_logits(tl.dot(k, q, input_precision="ieee"), scale, softcap, SOFTCAP)
        x = tl.where((token < end)[:, None], x, -float("inf"))
        tile_maximum = tl.max(x, 0)
        new_maximum = tl.maximum(maximum, tile_maximum)
        probability = tl.exp2(x - new_maximum[None, :])
        decay = tl.exp2(maximum - new_maximum)
        totals = totals * decay[None, :] + probability
        accumulated = accumulated * decay[None, :]
        accumulated = tl.dot(v, probability.to(COMPUTE), accumulated, input_precision="ieee")
        maximum = new_maximum
        if not SPARSE:
            tile = (first_logit_tile + start // LOGIT_TILE).to(tl.int64)
            subtile = tile * (LOGIT_TILE // TILE) + start % LOGIT_TILE // TILE
            place = (tile * KV_HEADS + kv_head) * LOGIT_TILE + token % LOGIT_TILE
            tl.store(
                logits_ptr + place[:, None] * GROUP + group[None, :],
                encode_distance((tile_maximum + 1.0)[None, :] - x),
                mask=(group < logit_columns)[None, :],
                eviction_policy="evict_last",  # until they are scored
            )
            tl.store(
                logit_maxima_ptr + (subtile * KV_HEADS + kv_head) * GROUP + group,
                tile_maximum,
                mask=group < logit_columns,
                eviction_policy="evict_last",
            )

    total = tl.sum(totals, 0)
    result = tl.trans(accumulated / total[None, :])
    lse = maximum + tl.log2(total)
    mask = has_head[:, None] & has_dim[None, :]
    part_slot = piece.to(tl.int64) * H + head
    part_ptrs = partial_ptr + part_slot[:, None] * D + dim[None, :]
    if not WHOLE:
        tl.store(part_ptrs, result, mask=mask)
        tl.store(partial_lse_ptr + part_slot, lse, mask=has_head)
    else:
        arrived = 0
        if count > 1:
            tl.store(part_ptrs, result, mask=mask)
            tl.store(partial_lse_ptr + part_slot, lse, mask=has_head)
            tl.debug_barrier()  # all threads' stores come before the arrival
            arrived_ptr += row * KV_HEADS + kv_head
            arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
            if arrived == count - 1:
                tl.store(arrived_ptr, 0)  # for the next launch
                result, lse = combine_pieces(
                    partial_ptr, partial_lse_ptr, first, count, head, has_head, dim, has_dim, H, D
                )
        if arrived == count - 1:
            if SINKS:
                sink = tl.load(sinks_ptr + head, mask=has_head, other=0.0).to(tl.float32)
                result /= 1.0 + tl.exp2(sink * LOG2_E - lse)[:, None]
            output_ptrs = output_ptr + token_of_row * output_stride_token + head * output_stride_head
            tl.store(output_ptrs[:, None] + dim[None, :], result, mask=mask)
            if kv_head == 0:
                count_row(counters_ptr, dense_ptr + row, attended, length, SPARSE)


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
    H: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PIECES: tl.constexpr,
    SPARSE: tl.constexpr,
    SINKS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row and query head: the pieces' outputs, weighted; a row without pieces is padding."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(row_pieces_ptr + row * 4)
    count = tl.load(row_pieces_ptr + row * 4 + 1)
    token = tl.load(row_pieces_ptr + row * 4 + 2).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()  # before any return: what follows may rely on the pieces, too
        if not SPARSE:
            # `score_logits_kernel` may start, read the logits, which are complete now, and wait for the sums.
            tl.extra.cuda.gdc_launch_dependents()
    if count == 0:
        return
    dim = tl.arange(0, D_PAD)
    has_dim = dim < D
    index = tl.arange(0, PIECES)
    maximum = -float("inf")
    total = 0.0
    if SINKS:
        maximum = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
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
        result *= tl.load(v_scale_ptr)
    tl.store(output_ptr + token * output_stride_token + head * output_stride_head + dim, result, mask=has_dim)
    if not SPARSE:
        tl.store(lse_ptr + row * H + head, maximum + tl.log2(total))
    if head == 0:
        attended = tl.load(row_pieces_ptr + row * 4 + 3)
        length = tl.load(lengths_ptr + row)
        count_row(counters_ptr, dense_ptr + row, attended, length, SPARSE)
