"""Attention of decode rows that have several query tokens: one reading of the keys and values for all.

As `attention`, but for the queries of several tokens and of the query heads of one KV head. These are many
enough to be the rows of the matrix products: then sums over tokens stay within a warp, and probabilities in
registers. Each query token sees the tokens up to itself (`queries`), whose keys and values are in the cache.
More queries than `BAND_QUERIES` are cut into bands, each with programs of its own.

A selection layer leaves the logits of the query token that chooses. They are computed a second time, with the
keys that are there, as the rows of the product: picked out of all logits they would have to change threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_delta.kernels.gpu.device import dependent_launch
from vllm_delta.kernels.gpu.layer import LayerInputs
from vllm_delta.kernels.gpu.logits import scaled_logits, store_logits
from vllm_delta.kernels.gpu.paging import entry_offsets, load_entries, load_vectors
from vllm_delta.kernels.gpu.queries import LOWEST_LOGIT, load_queries, ordered_token, seen_tokens
from vllm_delta.kernels.gpu.schedule import NO_ROW, load_split
from vllm_delta.kernels.gpu.shape import CacheStrides, TokenStrides
from vllm_delta.kernels.gpu.tuning import Tuning
from vllm_delta.kernels.gpu.workspace import Workspace
from vllm_delta.kernels.types import SelectionTable


# Full layers run what selection layers do, as in `attention_kernel`.
@triton.jit(do_not_specialize=["keeps_logits"], do_not_specialize_on_alignment=["table_ptr"])
def multi_token_kernel(
    query_ptr,  # [tokens, H, D]
    cache_ptr,  # [num_blocks, KV_HEADS, BLOCK, 2 * D], any strides but the last
    block_table_ptr,  # int32 [requests, blocks]
    table_ptr,  # int32 [rows, kept pages]: pages or, with FRAMES, page frames; read where SPARSE
    splits_ptr,  # int32 [splits, SPLIT_FIELDS], see `load_split`
    query_lens_ptr,  # int32 [rows], see `DecodeRows`
    partial_ptrs,  # see `combine_kernel`
    logits_ptrs,  # see `attention_kernel`
    scale_ptrs,  # factors of query, key and value; read where QUANTIZED
    scale,
    softcap,
    keeps_logits,  # 0: of a full layer, which has no use for them
    query_strides,  # `TokenStrides`
    cache_strides,  # `CacheStrides`
    block_table_stride,
    table_stride,
    SHAPE: tl.constexpr,  # `KernelShape`
    KIND: tl.constexpr,  # `AttentionKind`
    TILE: tl.constexpr,
    SPARSE: tl.constexpr,
    FRAMES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One split of one row, for the query heads of one KV head, and the query tokens of one band.

    PDL as in `attention_kernel`.
    """
    tl.static_assert(SHAPE.KEEPS_LAST or not SPARSE)
    bands: tl.constexpr = (SHAPE.TOKENS + SHAPE.BAND - 1) // SHAPE.BAND
    split = tl.program_id(0)
    kv_head = tl.program_id(1) // bands
    first_index = tl.program_id(1) % bands * SHAPE.BAND  # of its query tokens, see `ordered_token`
    row, begin, end, token_of_row, request, table_end, logit_tile, length = load_split(splits_ptr, split)
    if row == NO_ROW:
        if PDL:
            tl.extra.cuda.gdc_wait()  # before any return: what follows may rely on what came before
        return
    query_len = tl.load(query_lens_ptr + row)
    if bands > 1:
        if first_index >= query_len:
            if PDL:
                tl.extra.cuda.gdc_wait()
            return

    heads: tl.constexpr = SHAPE.H // SHAPE.KV_HEADS
    dims: tl.constexpr = SHAPE.D_PAD
    queries: tl.constexpr = SHAPE.BAND_QUERIES
    query = tl.arange(0, queries)
    head = kv_head * heads + query % heads
    index = first_index + query // heads
    query_token = ordered_token(index, query_len)
    has_query = (query < SHAPE.BAND * heads) & (index < query_len)
    dim = tl.arange(0, dims)
    has_dim = dim < SHAPE.D
    all_dims: tl.constexpr = SHAPE.D == SHAPE.D_PAD
    position = tl.arange(0, TILE)
    block_row_ptr = block_table_ptr + request * block_table_stride
    table_row_ptr = table_ptr + row.to(tl.int64) * table_stride
    selected = table_end > 0
    entry = load_entries(
        begin + position, end, table_row_ptr, block_row_ptr, selected, SPARSE, FRAMES, SHAPE.PAGE, SHAPE.BLOCK
    )
    head_ptr = cache_ptr + kv_head.to(tl.int64) * cache_strides.head
    if PDL:
        tl.extra.cuda.gdc_wait()  # for query and cache, which the launch ahead may have written
        tl.extra.cuda.gdc_launch_dependents()  # `combine_kernel` may start, and wait
    query_row_ptr = query_ptr + token_of_row * query_strides.token
    q = load_queries(
        query_row_ptr,
        head * query_strides.head + query_token * query_strides.token,
        has_query,
        dim,
        has_dim,
    )
    q = tl.trans(q.to(KIND.COMPUTE))
    if KIND.QUANTIZED:
        scale = scale * tl.load(scale_ptrs[0]) * tl.load(scale_ptrs[1])
    seen = tl.where(selected, table_end, length)
    seen_end = tl.minimum(end, seen_tokens(seen, query_len, query_token))
    if not SPARSE:
        column = tl.arange(0, SHAPE.COLUMNS)
        columns = tl.where((logit_tile >= 0) & (keeps_logits != 0) & (first_index == 0), SHAPE.QUERIES, 0)
        chosen_by = ordered_token(0, query_len)
        choosing_ptr = query_row_ptr + chosen_by * query_strides.token
        choosing_offset = (kv_head * heads + column) * query_strides.head
        choosing = load_queries(choosing_ptr, choosing_offset, column < heads, dim, has_dim).to(KIND.COMPUTE)
        choosing_end = tl.minimum(end, seen_tokens(length, query_len, chosen_by))

    maximum = tl.full([queries], -float("inf"), tl.float32)
    total = tl.zeros([queries], tl.float32)
    accumulated = tl.zeros([queries, dims], tl.float32)
    for start in range(begin, end, TILE):
        token = start + position
        offsets = entry_offsets(entry, token, end, selected, cache_strides, SPARSE, SHAPE.PAGE, SHAPE.BLOCK)
        k = load_vectors(head_ptr + offsets[:, None] + dim[None, :], has_dim[None, :], all_dims)
        v = load_vectors(head_ptr + SHAPE.D + offsets[:, None] + dim[None, :], has_dim[None, :], all_dims)
        k = k.to(KIND.COMPUTE)
        v = v.to(KIND.COMPUTE)
        entry = load_entries(  # a tile ahead, see `attention_kernel`
            token + TILE, end, table_row_ptr, block_row_ptr, selected, SPARSE, FRAMES, SHAPE.PAGE, SHAPE.BLOCK
        )
        x = scaled_logits(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, KIND.SOFTCAP)
        x = tl.where(token[None, :] < seen_end[:, None], x, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.maximum(tl.max(x, 1), LOWEST_LOGIT))
        probability = tl.exp2(x - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(probability, 1)
        accumulated = accumulated * decay[:, None]
        accumulated = tl.dot(probability.to(KIND.COMPUTE), v, accumulated, input_precision="ieee")
        maximum = new_maximum
        if not SPARSE:
            x = scaled_logits(tl.dot(k, choosing, input_precision="ieee"), scale, softcap, KIND.SOFTCAP)
            x = tl.where((token < choosing_end)[:, None], x, -float("inf"))
            tile_maximum = tl.maximum(tl.max(x, 0), LOWEST_LOGIT)
            store_logits(
                logits_ptrs, x, tile_maximum, logit_tile, kv_head, start, column, columns, SHAPE, TILE
            )

    total = tl.where(total == 0.0, 1.0, total)  # of no tokens: zeros of no weight
    result = accumulated / total[:, None]
    part_slot = (split.to(tl.int64) * SHAPE.TOKENS + query_token) * SHAPE.H + head
    part_ptrs = partial_ptrs[0] + part_slot[:, None] * SHAPE.D + dim[None, :]
    tl.store(part_ptrs, result, mask=has_query[:, None] & has_dim[None, :])
    tl.store(partial_ptrs[1] + part_slot, maximum + tl.log2(total), mask=has_query)


def attend_multi_token(
    inputs: LayerInputs,
    workspace: Workspace,
    table: SelectionTable | None,
    tuning: Tuning,
    *,
    keeps_logits: bool,
    frames: bool,
    dependent: bool,
) -> None:
    """Launch a layer's attention with these settings, without its combination; see `attention.attend`."""
    query, sparse = inputs.query, table is not None
    # What a layer does not read needs some tensor in its place.
    entries = inputs.rows.lengths if table is None else table.entries(frames=frames)
    multi_token_kernel[(inputs.most_splits(tuning), inputs.programs_per_split)](
        query,
        inputs.kv_cache,
        inputs.block_table,
        entries,
        inputs.schedule.of(sparse=sparse)[0],
        inputs.query_lens,
        workspace.partials,
        (workspace.logits, workspace.logit_maxima),
        inputs.scales,
        inputs.parameters.scale,
        inputs.parameters.softcap,
        int(keeps_logits),
        TokenStrides.of(query),
        CacheStrides.of(inputs.kv_cache),
        inputs.block_table.stride(0),
        entries.stride(0),
        SHAPE=inputs.kernel_shape,
        KIND=inputs.kind,
        TILE=tuning.tile,
        SPARSE=sparse,
        FRAMES=frames,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        **dependent_launch(query.device, dependent),
    )
