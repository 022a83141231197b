"""The CPU kernels as Python functions on tensors.

A batch of rows is described by int32 tensors (`DecodeRows`), so that any tokens of the model's batch can be
attended to, in any order, without being copied. The kernels are tested against `vllm_delta.method.reference`;
the formulas stand at the head of csrc/cpu/attention.cpp. What does not fit is refused there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vllm_delta.kernels.limits import CPU
from vllm_delta.kernels.types import SelectionTable
from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.rows import DecodeRows, SelectionRule

#: the numbers by which the kernels know layouts
_LAYOUTS = {"vec": 0, "vec16": 0, "amx": 1}

#: Tokens of a split; a workspace holds a multiple of it.
SPLIT_TOKENS = 512

#: Tokens that one round of the kernels covers, unless one sequence is longer. Enough to keep many threads
#: busy, few enough for the logits to stay in the processor's cache.
ROUND_TOKENS = 32768


@cache
def load_library() -> None:
    """Load the kernels into torch; called before their first use.

    Raises:
        RuntimeError: the package was installed without its library.
    """
    path = Path(__file__).with_name("_library.so")
    if not path.exists():
        raise RuntimeError(f"{path} is missing: DELTA's CPU kernels were not built")
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]


def allocate_workspace(
    max_length: int,
    num_heads: int,
    head_size: int,
    page_size: int = min(CPU.page_sizes),
    max_query_len: int = 1,
) -> Tensor:
    """Scratch memory for the functions below; one call at a time may use it.

    Its size in floats, with w = max(`max_length`, 32768) rounded up to 512, H query heads, head size D and
    at most Q query tokens a row: ``w / 512 * H * (530 + Q * (D + 2)) + 3 * w / page_size``. It does not grow
    with the number of rows, which are processed in rounds of at most w tokens. Rows whose `max_query_len` is
    smaller have larger rounds.

    Returns:
        float32 ``[floats]``, uninitialised.
    """
    load_library()
    round_tokens = -(-max(max_length, ROUND_TOKENS) // SPLIT_TOKENS) * SPLIT_TOKENS
    floats = torch.ops.vllm_delta.workspace_floats(
        round_tokens, num_heads, head_size, page_size, max_query_len
    )
    return torch.empty(floats, dtype=torch.float32)


def full_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    rows: DecodeRows,
    parameters: AttentionParameters,
    workspace: Tensor,
    counters: Tensor,
    output: Tensor,
) -> None:
    """Exact attention of decode rows over all their tokens.

    Args:
        query: ``[tokens, num_heads, head_size]`` in float32, bfloat16 or float16.
        kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``, dtype of the query, in vLLM's
            layout `parameters.layout`; block_size is a multiple of 16. Strides between blocks and heads are
            free.
        block_table: int32 ``[requests, blocks]``; columns behind a row's blocks are not read.
        rows: the rows to compute, none of them padding.
        parameters: scale, layout, soft cap and sinks.
        workspace: from `allocate_workspace`, made for at least the longest row and the rows' `max_query_len`.
        counters: int64 ``[3]``, to which query tokens, and the tokens that they attended to and that were
            there are added.
        output: as query; only the rows' tokens are written.

    Raises:
        RuntimeError: a shape, dtype or index that does not fit.
    """
    torch.ops.vllm_delta.full_attention(
        *_row_arguments(query, kv_cache, block_table, rows, parameters), workspace, counters, output
    )


def selection_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    rows: DecodeRows,
    parameters: AttentionParameters,
    rule: SelectionRule,
    workspace: Tensor,
    counters: Tensor,
    output: Tensor,
    table: SelectionTable,
    scores: Tensor | None = None,
) -> None:
    """A selection layer: `full_attention`, and the selection table from the same pass over the cache.

    Args:
        query: and all up to `output` as in `full_attention`. Each row's `kept_pages` is at least the rule's
            recent and sink pages, and fits the table with the rule's following pages behind it, unless the
            row keeps everything. A row's first query token selects for all of them.
        rule: how pages are kept; any block size goes with any page size.
        table: written, one entry a row, in the order of `rows`.
        scores: float32 ``[rows, pages]``, filled with the page scores where given; costs time for rows that
            keep everything, which need none.

    Raises:
        RuntimeError: a shape, dtype or index that does not fit.
    """
    torch.ops.vllm_delta.selection_attention(
        *_row_arguments(query, kv_cache, block_table, rows, parameters),
        rule.page_size,
        rule.recent_pages,
        rule.sink_pages,
        rule.following_pages,
        workspace,
        counters,
        output,
        table.pages,
        scores,
    )


def sparse_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    rows: DecodeRows,
    parameters: AttentionParameters,
    rule: SelectionRule,
    workspace: Tensor,
    counters: Tensor,
    output: Tensor,
    table: SelectionTable,
) -> None:
    """A sparse layer: attention over the pages of the selection table alone.

    Arguments as in `selection_attention`; `table` is read, of each row its `kept_pages`. Those may have grown
    by pages that have followed. A query token that sees none of the kept tokens has an output of 0.

    Raises:
        RuntimeError: a shape, dtype or index that does not fit, or a table made for other rows.
    """
    torch.ops.vllm_delta.sparse_attention(
        *_row_arguments(query, kv_cache, block_table, rows, parameters),
        rule.page_size,
        table.pages,
        workspace,
        counters,
        output,
    )


def select_pages(
    scores: Tensor, kept_pages: int, recent_pages: int, sink_pages: int, following_pages: int = 0
) -> Tensor:
    """The selection alone, for one row: `vllm_delta.method.reference.select_pages` as the kernels compute it.

    Args:
        scores: float32 ``[pages]``, none of them NaN, more than `kept_pages`.
        kept_pages: pages to keep.
        recent_pages: pages kept at the end.
        sink_pages: pages kept at the start.
        following_pages: pages behind the last one that are named, too.

    Returns:
        int32 ``[kept_pages + following_pages]``, ascending.
    """
    load_library()
    pages = torch.empty(kept_pages + following_pages, dtype=torch.int32)
    torch.ops.vllm_delta.select_pages(scores, recent_pages, sink_pages, following_pages, pages)
    return pages


def _row_arguments(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    rows: DecodeRows,
    parameters: AttentionParameters,
) -> tuple[object, ...]:
    return (
        query,
        kv_cache,
        block_table,
        rows.tokens,
        rows.requests,
        rows.lengths,
        rows.kept_pages,
        rows.query_lens,
        rows.max_query_len,
        _LAYOUTS[parameters.layout],
        parameters.scale,
        parameters.softcap,
        None if parameters.sinks is None else parameters.sinks.float(),
    )
