"""The CPU kernels as Python functions on tensors.

A *row* is one query token of one sequence. A batch of rows is described by three int32 tensors (`Rows`), so
that any tokens of the model's batch can be attended to, in any order, without being copied. The kernels are
tested against `vllm_delta.reference`; the formulas stand at the head of csrc/cpu/attention.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

#: vLLM's names of its CPU cache layouts, by the number of the kernel that reads them.
LAYOUTS = {"vec": 0, "vec16": 0, "amx": 1}

#: Page sizes of the kernels, in tokens.
PAGE_SIZES = (16, 32, 64, 128)

#: Tokens of one work item; a workspace holds a multiple of it.
CHUNK_TOKENS = 512

#: Tokens that one wave of the kernels covers, unless one sequence is longer. Enough to keep many threads
#: busy, few enough for the logits to stay in the processor's cache.
WAVE_TOKENS = 32768


@cache
def load_library() -> None:
    """Load the kernels into torch; called before their first use.

    Raises:
        RuntimeError: the package was installed without its library.
    """
    path = Path(__file__).with_name("_cpu.so")
    if not path.exists():
        raise RuntimeError(f"{path} is missing: DELTA's CPU kernels were not built")
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Rows:
    """Decode rows of one step, all int32 ``[rows]`` on the CPU."""

    #: index of the row's token in the query and the output
    tokens: Tensor
    #: index of the row's request in the block table
    requests: Tensor
    #: tokens that the row sees: its position in the sequence plus one
    lengths: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class SelectionTable:
    """Per row: the logical pages kept, ascending, and how many they are; written by a selection layer."""

    #: int32 ``[capacity, budget_pages]``; what lies behind a row's count is undefined
    pages: Tensor
    #: int32 ``[capacity]``
    counts: Tensor

    @classmethod
    def allocate(cls, capacity: int, budget_pages: int) -> SelectionTable:
        """A table for up to `capacity` rows."""
        return cls(
            pages=torch.zeros(capacity, budget_pages, dtype=torch.int32),
            counts=torch.zeros(capacity, dtype=torch.int32),
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the table takes."""
        return self.pages.nbytes + self.counts.nbytes


@dataclass(frozen=True)
class AttentionParameters:
    """What a layer's attention is made of, apart from its tensors."""

    #: factor of the logits
    scale: float
    #: vLLM's name of the cache's layout, a key of `LAYOUTS`
    layout: str
    #: c in ``c * tanh(x / c)``; 0 for none
    softcap: float = 0.0
    #: float32 ``[num_heads]``: a logit per head that has no value; None for none
    sinks: Tensor | None = None


def allocate_workspace(
    max_length: int, num_heads: int, head_size: int, page_size: int = min(PAGE_SIZES)
) -> Tensor:
    """Scratch memory for the functions below; one call at a time may use it.

    Its size in floats, with w = max(`max_length`, 32768) rounded up to 512, H query heads and head size D:
    ``w / 512 * H * (528 + D + 4) + 3 * w / page_size``. It does not grow with the number of rows, which
    are processed in waves of at most w tokens.

    Returns:
        float32 ``[floats]``, uninitialised.
    """
    load_library()
    wave_tokens = -(-max(max_length, WAVE_TOKENS) // CHUNK_TOKENS) * CHUNK_TOKENS
    floats = torch.ops.vllm_delta.workspace_floats(wave_tokens, num_heads, head_size, page_size)
    return torch.empty(floats, dtype=torch.float32)


def full_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    rows: Rows,
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
        rows: the rows to compute.
        parameters: scale, layout, soft cap and sinks.
        workspace: from `allocate_workspace`, made for at least the longest row.
        counters: int64 ``[3]``, to which rows, attended tokens and context tokens are added.
        output: as query; only the rows' tokens are written.

    Raises:
        RuntimeError: a shape, dtype or index that does not fit.
    """
    torch.ops.vllm_delta.full_attention(
        *_row_arguments(query, kv_cache, block_table, rows, parameters),
        workspace,
        counters,
        output,
    )


def selection_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    rows: Rows,
    parameters: AttentionParameters,
    workspace: Tensor,
    counters: Tensor,
    output: Tensor,
    table: SelectionTable,
    *,
    page_size: int,
    budget_pages: int,
    recent_pages: int,
    sink_pages: int,
    scores: Tensor | None = None,
) -> None:
    """A selection layer: `full_attention`, and the selection table from the same pass over the cache.

    Args:
        query: and all up to `output` as in `full_attention`.
        table: written, one entry a row, in the order of `rows`.
        page_size: one of `PAGE_SIZES`; any block size goes with it.
        budget_pages: pages to keep, at least recent_pages + sink_pages.
        recent_pages: pages kept at the end.
        sink_pages: pages kept at the start.
        scores: float32 ``[rows, pages]``, filled with the page scores where given; costs time for rows that
            fit the budget, which need none.

    Raises:
        RuntimeError: a shape, dtype or index that does not fit.
    """
    torch.ops.vllm_delta.selection_attention(
        *_row_arguments(query, kv_cache, block_table, rows, parameters),
        page_size,
        budget_pages,
        recent_pages,
        sink_pages,
        workspace,
        counters,
        output,
        table.pages,
        table.counts,
        scores,
    )


def sparse_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    rows: Rows,
    parameters: AttentionParameters,
    workspace: Tensor,
    counters: Tensor,
    output: Tensor,
    table: SelectionTable,
    *,
    page_size: int,
) -> None:
    """A sparse layer: attention over the pages of the selection table alone.

    Arguments as in `selection_attention`; `table` is read.

    Raises:
        RuntimeError: a shape, dtype or index that does not fit, or a table made for other rows.
    """
    torch.ops.vllm_delta.sparse_attention(
        *_row_arguments(query, kv_cache, block_table, rows, parameters),
        page_size,
        table.pages,
        table.counts,
        workspace,
        counters,
        output,
    )


def select_pages(scores: Tensor, budget_pages: int, recent_pages: int, sink_pages: int) -> Tensor:
    """The selection alone, for one row: `vllm_delta.reference.select_pages` as the kernels compute it.

    Args:
        scores: float32 ``[pages]``, none of them NaN.
        budget_pages: pages to keep.
        recent_pages: pages kept at the end.
        sink_pages: pages kept at the start.

    Returns:
        int32 ``[min(pages, budget_pages)]``, ascending.
    """
    load_library()
    pages = torch.empty(budget_pages, dtype=torch.int32)
    count = torch.ops.vllm_delta.select_pages(scores, budget_pages, recent_pages, sink_pages, pages)
    return pages[:count]


def _row_arguments(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    rows: Rows,
    parameters: AttentionParameters,
) -> tuple[object, ...]:
    return (
        query,
        kv_cache,
        block_table,
        rows.tokens,
        rows.requests,
        rows.lengths,
        LAYOUTS[parameters.layout],
        parameters.scale,
        parameters.softcap,
        parameters.sinks,
    )
