"""Attention of decode rows over the paged KV cache, in splits (`schedule`).

For row r, query head h of a KV head, and the tokens t of a split (DELTA, arXiv 2510.09883; splits and their
combination, in `combine`, as in Flash-Decoding):

    x[t] = log2(e) * softcap(scale * q[h] . k[t])       l2 = log2 sum_t 2^x[t]
    out  = sum_t 2^(x[t] - l2) v[t]

The tokens are all of the row's, or those of the selection table's pages. A token's key and value stand side
by side in the cache. The row's own, its last, may be given apart: then they are written to the cache first.
Splits are combined by a launch of its own or, where most rows have one, by the last program that is done.

A selection layer leaves its logits behind, as `logits` says. Rows of several query tokens have a kernel of
their own, see `multi_token`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_delta.kernels.gpu.combine import combine, combine_splits, count_row
from vllm_delta.kernels.gpu.device import dependent_launch
from vllm_delta.kernels.gpu.layer import LayerInputs
from vllm_delta.kernels.gpu.logits import LOG2_E, scaled_logits, store_logits
from vllm_delta.kernels.gpu.multi_token import attend_multi_token
from vllm_delta.kernels.gpu.paging import entry_offsets, kept_tokens, load_entries, load_vectors
from vllm_delta.kernels.gpu.queries import load_queries
from vllm_delta.kernels.gpu.schedule import NO_ROW, load_row_splits, load_split
from vllm_delta.kernels.gpu.shape import CacheStrides, TokenStrides
from vllm_delta.kernels.gpu.tuning import Tuning
from vllm_delta.kernels.gpu.workspace import Workspace
from vllm_delta.kernels.types import SelectionTable


# Full layers run what selection layers do, and store nothing: compiled without the stores it takes longer.
@triton.jit(
    do_not_specialize=["keeps_logits"], do_not_specialize_on_alignment=["table_ptr", "kept_pages_ptr"]
)
def attention_kernel(
    query_ptr,  # [tokens, H, D]
    cache_ptr,  # [num_blocks, KV_HEADS, BLOCK, 2 * D], any strides but the last
    block_table_ptr,  # int32 [requests, blocks]
    table_ptr,  # int32 [rows, kept pages]: pages or, with FRAMES, page frames; read where SPARSE
    splits_ptr,  # int32 [splits, SPLIT_FIELDS], see `load_split`
    row_splits_ptr,  # int32 [rows, ROW_FIELDS], see `load_row_splits`; read where WHOLE, as the next ones
    kept_pages_ptr,  # int32 [rows]
    counters_ptr,  # see `count_row`
    sinks_ptr,  # [H]
    arrived_ptr,  # int32 [rows, KV_HEADS], zeros
    output_ptr,  # [tokens, H, D]
    partial_ptrs,  # see `combine_kernel`
    logits_ptrs,  # int16 [tiles, KV_HEADS, LOGIT_TILE, QUERIES], and the maxima of tiles, float32
    # [tiles * LOGIT_TILE / TILE, KV_HEADS, QUERIES]; not written where SPARSE
    appended_ptrs,  # keys and values [tokens, KV_HEADS, D], slots int64 [tokens], see `LayerInputs`
    scale_ptrs,  # factors of query, key and value; read where QUANTIZED
    scale,
    softcap,
    keeps_logits,  # 0: of a full layer, which has no use for them
    query_strides,  # `TokenStrides`, as the next three
    output_strides,
    key_strides,
    value_strides,
    cache_strides,  # `CacheStrides`
    block_table_stride,
    table_stride,
    SHAPE: tl.constexpr,  # `KernelShape`
    KIND: tl.constexpr,  # `AttentionKind`
    TILE: tl.constexpr,
    SPARSE: tl.constexpr,
    FRAMES: tl.constexpr,
    APPEND: tl.constexpr,
    WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One split of one row, for the query heads of one KV head.

    With WHOLE, a split that is a whole row is stored as the output; of several, the last program to arrive
    combines them. Then nothing else has to be launched. Not for a quantised cache: what its programs compute
    leaves no room for more tiles in flight.

    With PDL, what is read of splits and tables is read while the launch ahead of this one ends, so that must
    not be the one that writes them.
    """
    tl.static_assert(not (WHOLE and KIND.QUANTIZED))
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    row, begin, end, token_of_row, request, table_end, logit_tile, length = load_split(splits_ptr, split)
    if row == NO_ROW:
        if PDL:
            tl.extra.cuda.gdc_wait()  # before any return: what follows may rely on what came before
        return

    heads: tl.constexpr = SHAPE.H // SHAPE.KV_HEADS
    columns: tl.constexpr = SHAPE.COLUMNS
    dims: tl.constexpr = SHAPE.D_PAD
    column = tl.arange(0, columns)
    head = kv_head * heads + column
    has_head = column < heads
    dim = tl.arange(0, dims)
    has_dim = dim < SHAPE.D
    all_dims: tl.constexpr = SHAPE.D == SHAPE.D_PAD
    position = tl.arange(0, TILE)
    block_row_ptr = block_table_ptr + request * block_table_stride
    table_row_ptr = table_ptr + row.to(tl.int64) * table_stride
    selected = table_end > 0
    has_last = end == tl.where(selected, table_end, length)
    if SPARSE and not SHAPE.KEEPS_LAST:
        if selected:
            # The table holds pages here; the row's last splits may have fewer tokens, even none.
            kept = kept_tokens(table_row_ptr, table_end // SHAPE.PAGE, length, SHAPE.PAGE)
            has_last = (begin < kept) & (kept <= end)
            end = tl.minimum(end, tl.maximum(kept, begin))
    entry = load_entries(
        begin + position, end, table_row_ptr, block_row_ptr, selected, SPARSE, FRAMES, SHAPE.PAGE, SHAPE.BLOCK
    )
    head_ptr = cache_ptr + kv_head.to(tl.int64) * cache_strides.head
    if WHOLE:
        first, count, _, attended = load_row_splits(row_splits_ptr, row)
    if APPEND:
        slot = tl.load(appended_ptrs[2] + token_of_row)
        # The split of the row's last token, which alone may read the row's own, writes it.
        new_dims = tl.where(has_last & (slot >= 0), SHAPE.D, 0)
    if PDL:
        tl.extra.cuda.gdc_wait()  # for query and cache, which the launch ahead may have written
        if not WHOLE:
            tl.extra.cuda.gdc_launch_dependents()  # `combine_kernel` may start, and wait
    if APPEND:
        k_ptr = appended_ptrs[0] + token_of_row * key_strides.token + kv_head * key_strides.head
        v_ptr = appended_ptrs[1] + token_of_row * value_strides.token + kv_head * value_strides.head
        new_key = tl.load(k_ptr + dim, mask=dim < new_dims)
        new_value = tl.load(v_ptr + dim, mask=dim < new_dims)
    query_row_ptr = query_ptr + token_of_row * query_strides.token
    q = load_queries(query_row_ptr, head * query_strides.head, has_head, dim, has_dim).to(KIND.COMPUTE)
    if KIND.QUANTIZED:
        scale = scale * tl.load(scale_ptrs[0]) * tl.load(scale_ptrs[1])
    if APPEND:
        token_ptr = (
            head_ptr + slot // SHAPE.BLOCK * cache_strides.block + slot % SHAPE.BLOCK * cache_strides.token
        )
        tl.store(token_ptr + dim, new_key, mask=dim < new_dims)
        tl.store(token_ptr + SHAPE.D + dim, new_value, mask=dim < new_dims)
        tl.debug_barrier()  # other threads of the program read them
    logit_columns = tl.where((logit_tile >= 0) & (keeps_logits != 0), SHAPE.QUERIES, 0)

    maximum = tl.full([columns], -float("inf"), tl.float32)
    totals = tl.zeros([TILE, columns], tl.float32)  # of each place in a tile, summed up at the end
    accumulated = tl.zeros([dims, columns], tl.float32)
    for start in range(begin, end, TILE):
        token = start + position
        offsets = entry_offsets(entry, token, end, selected, cache_strides, SPARSE, SHAPE.PAGE, SHAPE.BLOCK)
        k = load_vectors(head_ptr + offsets[:, None] + dim[None, :], has_dim[None, :], all_dims)
        v = load_vectors(head_ptr + SHAPE.D + offsets[None, :] + dim[:, None], has_dim[:, None], all_dims)
        k = k.to(KIND.COMPUTE)
        v = v.to(KIND.COMPUTE)
        # Triton pipelines what is loaded by address, but not the loads of its addresses: these come a tile
        # ahead, and nothing is computed from them before it is that tile's turn.
        entry = load_entries(
            token + TILE, end, table_row_ptr, block_row_ptr, selected, SPARSE, FRAMES, SHAPE.PAGE, SHAPE.BLOCK
        )
        x = scaled_logits(tl.dot(k, q, input_precision="ieee"), scale, softcap, KIND.SOFTCAP)
        x = tl.where((token < end)[:, None], x, -float("inf"))
        tile_maximum = tl.max(x, 0)
        new_maximum = tl.maximum(maximum, tile_maximum)
        probability = tl.exp2(x - new_maximum[None, :])
        decay = tl.exp2(maximum - new_maximum)
        totals = totals * decay[None, :] + probability
        accumulated = accumulated * decay[None, :]
        accumulated = tl.dot(v, probability.to(KIND.COMPUTE), accumulated, input_precision="ieee")
        maximum = new_maximum
        if not SPARSE:
            store_logits(
                logits_ptrs, x, tile_maximum, logit_tile, kv_head, start, column, logit_columns, SHAPE, TILE
            )

    total = tl.sum(totals, 0)
    if SPARSE and not SHAPE.KEEPS_LAST:
        total = tl.where(total == 0.0, 1.0, total)  # of no tokens: zeros of no weight
    result = tl.trans(accumulated / total[None, :])
    lse = maximum + tl.log2(total)
    mask = has_head[:, None] & has_dim[None, :]
    part_slot = split.to(tl.int64) * SHAPE.H + head
    part_ptrs = partial_ptrs[0] + part_slot[:, None] * SHAPE.D + dim[None, :]
    if not WHOLE:
        tl.store(part_ptrs, result, mask=mask)
        tl.store(partial_ptrs[1] + part_slot, lse, mask=has_head)
    else:
        arrived = 0
        if count > 1:
            tl.store(part_ptrs, result, mask=mask)
            tl.store(partial_ptrs[1] + part_slot, lse, mask=has_head)
            tl.debug_barrier()  # all threads' stores come before the arrival
            arrived_ptr += row * SHAPE.KV_HEADS + kv_head
            arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
            if arrived == count - 1:
                tl.store(arrived_ptr, 0)  # for the next launch
                result, lse = combine_splits(
                    partial_ptrs, first, count, head, has_head, dim, has_dim, SHAPE.H, SHAPE.D
                )
        if arrived == count - 1:
            if KIND.SINKS:
                sink = tl.load(sinks_ptr + head, mask=has_head, other=0.0).to(tl.float32)
                result /= 1.0 + tl.exp2(sink * LOG2_E - lse)[:, None]
            output_ptrs = output_ptr + token_of_row * output_strides.token + head * output_strides.head
            tl.store(output_ptrs[:, None] + dim[None, :], result, mask=mask)
            if kv_head == 0:
                if SPARSE and not SHAPE.KEEPS_LAST:
                    if selected:
                        attended = kept_tokens(table_row_ptr, table_end // SHAPE.PAGE, length, SHAPE.PAGE)
                count_row(counters_ptr, kept_pages_ptr + row, 1, attended, length, SPARSE)


def attend(
    inputs: LayerInputs,
    workspace: Workspace,
    counters: Tensor,
    output: Tensor,
    table: SelectionTable | None = None,
    *,
    keeps_logits: bool = False,
    frames: bool = False,
    dependent: bool,
) -> None:
    """Launch a layer's attention and its combination, as `ops` has them; sparse if there is a table to read.

    `keeps_logits` leaves the logits for the scores, `frames` says that the table's frames hold for this
    layer's block table, `dependent` lets the launch begin before the one ahead ends.
    """
    inputs.check(workspace, output, sparse=table is not None)
    if len(inputs.rows) == 0:
        return
    tuning = inputs.tuning(sparse=table is not None)
    how = {"keeps_logits": keeps_logits, "frames": frames, "dependent": dependent}
    if inputs.query_len > 1:
        attend_multi_token(inputs, workspace, table, tuning, **how)
    else:
        _attend_single_token(inputs, workspace, counters, output, table, tuning, **how)
    if not tuning.whole:
        combine(inputs, workspace, counters, output, table)


def _attend_single_token(
    inputs: LayerInputs,
    workspace: Workspace,
    counters: Tensor,
    output: Tensor,
    table: SelectionTable | None,
    tuning: Tuning,
    *,
    keeps_logits: bool,
    frames: bool,
    dependent: bool,
) -> None:
    query, shape, sparse = inputs.query, inputs.kernel_shape, table is not None
    frames = frames and shape.KEEPS_LAST
    # What a layer does not read needs some tensor in its place.
    entries = inputs.rows.lengths if table is None else table.entries(frames=frames)
    attention_kernel[(inputs.most_splits(tuning), inputs.programs_per_split)](
        query,
        inputs.kv_cache,
        inputs.block_table,
        entries,
        *inputs.schedule.of(sparse=sparse),
        inputs.rows.kept_pages,
        counters,
        inputs.sinks_or(workspace.lse),
        workspace.arrived,
        output,
        workspace.partials,
        (workspace.logits, workspace.logit_maxima),
        inputs.new_tokens,
        inputs.scales,
        inputs.parameters.scale,
        inputs.parameters.softcap,
        int(keeps_logits),
        *map(TokenStrides.of, (query, output, *inputs.new_tokens[:2])),
        CacheStrides.of(inputs.kv_cache),
        inputs.block_table.stride(0),
        entries.stride(0),
        SHAPE=shape,
        KIND=inputs.kind,
        TILE=tuning.tile,
        SPARSE=sparse,
        FRAMES=frames,
        APPEND=inputs.appended is not None,
        WHOLE=tuning.whole,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        **dependent_launch(query.device, dependent),
    )
