"""Combining the splits of a row, as in Flash-Decoding, and counting the row.

Over the splits i of the row, with l2[i] the logarithm of a split's sum to base 2 and out[i] its output:

    L2 = log2(2^sink + sum_i 2^l2[i])          out = sum_i 2^(l2[i] - L2) out[i]
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_delta.kernels.gpu.device import dependent_launch
from vllm_delta.kernels.gpu.layer import LayerInputs
from vllm_delta.kernels.gpu.logits import LOG2_E
from vllm_delta.kernels.gpu.paging import kept_tokens
from vllm_delta.kernels.gpu.queries import all_seen_tokens, ordered_token
from vllm_delta.kernels.gpu.schedule import load_row_splits
from vllm_delta.kernels.gpu.shape import TokenStrides
from vllm_delta.kernels.gpu.workspace import Workspace
from vllm_delta.kernels.types import SelectionTable
from vllm_delta.method.rows import ALL_PAGES

#: Elements of the splits that the combination takes at a time, by a single warp: 128 for each thread.
COMBINED_ELEMENTS = 4096

_ALL_PAGES = tl.constexpr(ALL_PAGES)


@triton.jit
def combine_splits(
    partial_ptrs,  # of outputs and of logarithms of sums, see `combine_kernel`
    first,  # split
    count,
    head,  # int32 [COLUMNS]
    has_head,
    dim,
    has_dim,
    H: tl.constexpr,
    D: tl.constexpr,
):
    """Splits that other programs have just written: their outputs, weighted, ``[COLUMNS, D_PAD]``, and L2."""
    maximum = tl.full(head.shape, -float("inf"), tl.float32)
    total = tl.zeros(head.shape, tl.float32)
    combined = tl.zeros([head.shape[0], dim.shape[0]], tl.float32)
    for index in range(count):
        slot = (first + index).to(tl.int64) * H + head
        # Not from the first-level cache, which does not see what other multiprocessors write.
        lse = tl.load(partial_ptrs[1] + slot, mask=has_head, other=0.0, cache_modifier=".cg")
        part_ptrs = partial_ptrs[0] + slot[:, None] * D + dim[None, :]
        part = tl.load(part_ptrs, mask=has_head[:, None] & has_dim[None, :], other=0.0, cache_modifier=".cg")
        new_maximum = tl.maximum(maximum, lse)
        decay = tl.exp2(maximum - new_maximum)
        weight = tl.exp2(lse - new_maximum)
        total = total * decay + weight
        combined = combined * decay[:, None] + part * weight[:, None]
        maximum = new_maximum
    return combined / total[:, None], maximum + tl.log2(total)


@triton.jit
def count_row(
    counters_ptr,  # int64 [5]: rows, attended, context tokens, rows with `ALL_PAGES`, within their budget
    kept_pages_ptr,  # of the row
    query_len,
    attended,  # tokens, by all of the row's query tokens, as is the next
    length,
    SPARSE: tl.constexpr,
):
    """Count each query token of a row of this layer as a row; the last two columns in sparse layers."""
    tl.atomic_add(counters_ptr, query_len, sem="relaxed")
    tl.atomic_add(counters_ptr + 1, attended.to(tl.int64), sem="relaxed")
    tl.atomic_add(counters_ptr + 2, length.to(tl.int64), sem="relaxed")
    if SPARSE and attended == length:
        column = tl.where(tl.load(kept_pages_ptr) == _ALL_PAGES, 3, 4)
        tl.atomic_add(counters_ptr + column, query_len, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["lengths_ptr", "kept_pages_ptr", "pages_ptr"])
def combine_kernel(
    partial_ptrs,  # float32 [splits, TOKENS, H, D], outputs, and [splits, TOKENS, H], log2 of sums
    lengths_ptr,  # int32 [rows]
    kept_pages_ptr,  # int32 [rows]
    row_splits_ptr,  # int32 [rows, ROW_FIELDS], see `load_row_splits`
    query_lens_ptr,  # int32 [rows], see `DecodeRows`; None where rows have one query token each
    pages_ptr,  # int32 [rows, kept pages]; read where not KEEPS_LAST
    counters_ptr,  # see `count_row`
    sinks_ptr,  # [H] or unused
    v_scale_ptr,
    output_ptr,  # [tokens, H, D]
    lse_ptr,  # float32 [rows, H], base 2, of the query tokens that choose
    output_strides,  # `TokenStrides`
    pages_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    PAGE: tl.constexpr,
    KEEPS_LAST: tl.constexpr,
    TOKENS: tl.constexpr,
    SPARSE: tl.constexpr,
    SINKS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row, query head and query token: the splits' outputs, weighted; a row without splits is padding."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    first, count, token, attended = load_row_splits(row_splits_ptr, row)
    slots: tl.constexpr = TOKENS * H  # of a split
    column = head  # of these
    if TOKENS > 1:
        query_token = tl.program_id(2)
        query_len = tl.load(query_lens_ptr + row)
        count = tl.where(query_token < query_len, count, 0)
        token += query_token
        column += query_token * H
    if PDL:
        tl.extra.cuda.gdc_wait()  # before any return: what follows may rely on the splits, too
        if not SPARSE:
            # `score_logits_kernel` may start, read the logits, which are complete now, and wait for the sums.
            tl.extra.cuda.gdc_launch_dependents()
    if count == 0:
        return
    dim = tl.arange(0, D_PAD)
    has_dim = dim < D
    index = tl.arange(0, SPLITS)
    maximum = -float("inf")
    total = 0.0
    if SINKS:
        maximum = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        total = 1.0
    accumulated = tl.zeros([D_PAD], tl.float32)
    for start in range(0, count, SPLITS):
        has = start + index < count
        slot = (first + start + index).to(tl.int64) * slots + column
        lse = tl.load(partial_ptrs[1] + slot, mask=has, other=-float("inf"))
        part = tl.load(
            partial_ptrs[0] + slot[:, None] * D + dim[None, :],
            mask=has[:, None] & has_dim[None, :],
            other=0.0,
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
    output_ptrs = output_ptr + token * output_strides.token + head * output_strides.head + dim
    tl.store(output_ptrs, result, mask=has_dim)
    if not SPARSE:
        if TOKENS > 1:
            chooses = query_token == ordered_token(0, query_len)
            tl.store(lse_ptr + row * H + head, maximum + tl.log2(total), mask=chooses)
        else:
            tl.store(lse_ptr + row * H + head, maximum + tl.log2(total))
    if column == 0:
        length = tl.load(lengths_ptr + row)
        if SPARSE and not KEEPS_LAST:
            kept_pages = tl.load(kept_pages_ptr + row)
            if tl.cdiv(length, PAGE) > kept_pages:
                pages_row_ptr = pages_ptr + row.to(tl.int64) * pages_stride
                attended = kept_tokens(pages_row_ptr, kept_pages, length, PAGE)
        if TOKENS > 1:
            attended = all_seen_tokens(attended, query_len)
            length = all_seen_tokens(length, query_len)
            count_row(counters_ptr, kept_pages_ptr + row, query_len, attended, length, SPARSE)
        else:
            count_row(counters_ptr, kept_pages_ptr + row, 1, attended, length, SPARSE)


def combine(
    inputs: LayerInputs, workspace: Workspace, counters: Tensor, output: Tensor, table: SelectionTable | None
) -> None:
    """Launch the combination of what `attention_kernel` left; arguments as there."""
    rows, shape, kind, sparse = inputs.rows, inputs.shape, inputs.kind, table is not None
    pages = rows.lengths if table is None else table.pages
    combine_kernel[(len(rows), shape.num_heads, inputs.query_len)](
        workspace.partials,
        rows.lengths,
        rows.kept_pages,
        inputs.schedule.of(sparse=sparse)[1],
        inputs.query_lens,
        pages,
        counters,
        inputs.sinks_or(workspace.lse),
        inputs.scales[2],
        output,
        workspace.lse,
        TokenStrides.of(output),
        pages.stride(0),
        H=shape.num_heads,
        D=shape.head_size,
        D_PAD=shape.padded_head_size,
        SPLITS=COMBINED_ELEMENTS // shape.padded_head_size,
        PAGE=inputs.rule.page_size,
        KEEPS_LAST=inputs.kernel_shape.KEEPS_LAST,
        TOKENS=inputs.query_len,
        SPARSE=sparse,
        SINKS=kind.SINKS,
        QUANTIZED=kind.QUANTIZED,
        num_warps=1,
        **dependent_launch(inputs.query.device),
    )
