"""Cutting a step's rows into splits of about equal work, on the GPU.

With ``tiles[r]`` the tiles of row r and P programs wanted per KV head, a split has at most
``w = ceil(sum(tiles) / P)`` tiles, and row r has ``ceil(tiles[r] / w)`` splits, which share its tiles evenly.
Where that makes more than P splits and P exceeds the number of rows, ``w = ceil(sum(tiles) / (P - rows))``
makes at most P. There are at most ``rows + P`` splits, which is the grid of every kernel that works on
splits, whatever the lengths are. One long row among short ones gets most of the splits.

Several query tokens of a row are work for one program, or one each for bands of them: they change P alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_delta.kernels.gpu.device import multiprocessors, shared_memory
from vllm_delta.kernels.gpu.logits import LOGIT_TILE
from vllm_delta.kernels.gpu.queries import all_seen_tokens
from vllm_delta.kernels.gpu.shape import LayerShape, next_power_of_2, tensor_bytes
from vllm_delta.kernels.gpu.tuning import Tuning, choose_tuning
from vllm_delta.kernels.gpu.workspace import Workspace, most_programs
from vllm_delta.method.rows import DecodeRows, SelectionRule

#: Programs that store a schedule's splits.
SCHEDULE_PROGRAMS = 16

# The record of a split, int32 each, in the order of `load_split`; that of a row's splits, of
# `load_row_splits`.
SPLIT_FIELDS = tl.constexpr(8)
ROW_FIELDS = tl.constexpr(4)
#: `row` of a split that there is not
NO_ROW = tl.constexpr(-1)
#: `logit_tile` of a row whose logits are not needed, and of one for which there is no room
NO_LOGITS = tl.constexpr(-1)
NO_ROOM = tl.constexpr(-2)


@dataclass(frozen=True)
class Schedule:
    """How the rows of one launch are cut into splits, for selection layers [0] and for sparse layers [1]."""

    #: int32 ``[2, splits, 8]``, see `load_split`
    splits: Tensor
    #: int32 ``[2, rows, 4]``, see `load_row_splits`
    row_splits: Tensor

    @classmethod
    def allocate(cls, max_rows: int, num_kv_heads: int, device: torch.device | str) -> Schedule:
        """Buffers for up to `max_rows` rows."""
        most_splits = max_rows + most_programs(num_kv_heads, device)
        return cls(
            splits=torch.empty(2, most_splits, SPLIT_FIELDS.value, dtype=torch.int32, device=device),
            row_splits=torch.empty(2, max_rows, ROW_FIELDS.value, dtype=torch.int32, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the schedule takes."""
        return tensor_bytes(self)

    def of(self, *, sparse: bool) -> tuple[Tensor, Tensor]:
        """Splits and row splits of one kind of layer."""
        return self.splits[int(sparse)], self.row_splits[int(sparse)]


@triton.jit
def load_split(splits_ptr, index):
    """A split's record.

    Its row (`NO_ROW`: there is no such split), its first token and its end; of the row, the index of its
    first token in the query, of its request in the block table, the tokens that come from the selection table
    (all or 0), the first tile of its logits (or `NO_LOGITS` or `NO_ROOM`), its length.
    """
    record_ptr = splits_ptr + index * SPLIT_FIELDS
    row = tl.load(record_ptr)
    begin = tl.load(record_ptr + 1)
    end = tl.load(record_ptr + 2)
    token = tl.load(record_ptr + 3).to(tl.int64)
    request = tl.load(record_ptr + 4).to(tl.int64)
    table_end = tl.load(record_ptr + 5)
    logit_tile = tl.load(record_ptr + 6)
    length = tl.load(record_ptr + 7)
    return row, begin, end, token, request, table_end, logit_tile, length


@triton.jit
def load_row_splits(row_splits_ptr, row):
    """The record of a row's splits.

    Its first split, the number of its splits, the index of its first token in the query, and the tokens that
    its last token attends to (at most, in sparse layers without recent pages).
    """
    record_ptr = row_splits_ptr + row * ROW_FIELDS
    first = tl.load(record_ptr)
    count = tl.load(record_ptr + 1)
    token = tl.load(record_ptr + 2).to(tl.int64)
    attended = tl.load(record_ptr + 3)
    return first, count, token, attended


# The number of rows changes from step to step: no variants by its value, nor by the pointers' alignment.
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=[
        "tokens_ptr",
        "requests_ptr",
        "lengths_ptr",
        "kept_pages_ptr",
        "query_lens_ptr",
    ],
)
def schedule_kernel(
    tokens_ptr,  # int32 [rows], as the four below: see `DecodeRows`
    requests_ptr,
    lengths_ptr,
    kept_pages_ptr,
    query_lens_ptr,  # or None where rows have one query token each
    splits_ptr,  # int32 [2, splits, SPLIT_FIELDS], see `load_split`
    row_splits_ptr,  # int32 [2, capacity, ROW_FIELDS], see `load_row_splits`
    full_counters_ptr,  # int64 [3]: rows, attended tokens, context tokens of the full layers
    num_rows,
    num_splits,
    capacity,
    programs_full,
    programs_sparse,
    logit_capacity,  # tiles
    full_layers,
    page_size,
    recent_pages,
    FULL_TILE: tl.constexpr,
    SPARSE_TILE: tl.constexpr,
    LOGIT_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SEVERAL: tl.constexpr,
):
    """Programs (0, i) schedule the selection layers, (1, i) the sparse ones: each stores some splits."""
    is_sparse = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    row = tl.arange(0, ROWS)
    valid = row < num_rows
    length = tl.load(lengths_ptr + row, mask=valid, other=0)
    kept_pages = tl.load(kept_pages_ptr + row, mask=valid, other=0)
    token = tl.load(tokens_ptr + row, mask=valid, other=0)
    request = tl.load(requests_ptr + row, mask=valid, other=0)
    surplus = tl.maximum(tl.cdiv(length, page_size) - kept_pages, 0)  # pages, all of them full
    needed_tiles = tl.where(surplus > 0, tl.cdiv(length, LOGIT_TILE), 0)
    end_tile = tl.cumsum(needed_tiles, 0)
    has_room = end_tile <= logit_capacity
    logit_tile = tl.where(surplus > 0, tl.where(has_room, end_tile - needed_tiles, NO_ROOM), NO_LOGITS)
    if is_sparse:
        tile = SPARSE_TILE
        programs = programs_sparse
        tokens = length - surplus * page_size
        if recent_pages == 0:  # the last page may be left out: then as many tokens more, see `kept_tokens`
            tokens += tl.where(surplus > 0, tl.cdiv(length, page_size) * page_size - length, 0)
    else:
        tile = FULL_TILE
        programs = programs_full
        tokens = length
        if part == 0:
            if SEVERAL:
                query_len = tl.where(length > 0, tl.load(query_lens_ptr + row, mask=valid, other=0), 0)
                context = tl.sum(all_seen_tokens(length, query_len).to(tl.int64), 0)
                tl.atomic_add(full_counters_ptr, full_layers * tl.sum(query_len.to(tl.int64), 0))
            else:
                context = tl.sum(length.to(tl.int64), 0)
                tl.atomic_add(full_counters_ptr, full_layers * tl.sum((length > 0).to(tl.int64), 0))
            tl.atomic_add(full_counters_ptr + 1, full_layers * context)
            tl.atomic_add(full_counters_ptr + 2, full_layers * context)

    tiles = tl.cdiv(tokens, tile)
    total = tl.sum(tiles, 0)
    most = tl.maximum(tl.cdiv(total, programs), 1)
    if tl.sum(tl.cdiv(tiles, most), 0) > programs:
        # Rounded up, a few splits too many would run alone when all others are done.
        spare = programs - tl.sum((tiles > 0).to(tl.int32), 0)
        most = tl.where(spare > 0, tl.cdiv(total, tl.maximum(spare, 1)), most)
    share = tl.maximum(tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, most), 1)), 1)
    count = tl.cdiv(tiles, share)  # with even shares the last split might be empty
    first = tl.cumsum(count, 0) - count
    if part == 0:
        record_ptr = row_splits_ptr + (is_sparse * capacity + row) * ROW_FIELDS
        tl.store(record_ptr, first, mask=valid)
        tl.store(record_ptr + 1, count, mask=valid)
        tl.store(record_ptr + 2, token, mask=valid)
        tl.store(record_ptr + 3, tokens, mask=valid)

    share *= tile
    base_ptr = splits_ptr + is_sparse * num_splits * SPLIT_FIELDS
    for index in range(part, tl.max(count, 0), parts):
        has = index < count
        record_ptr = base_ptr + (first + index) * SPLIT_FIELDS
        tl.store(record_ptr, row, mask=has)
        tl.store(record_ptr + 1, tl.minimum(index * share, tokens), mask=has)
        tl.store(record_ptr + 2, tl.minimum((index + 1) * share, tokens), mask=has)
        tl.store(record_ptr + 3, token, mask=has)
        tl.store(record_ptr + 4, request, mask=has)
        tl.store(record_ptr + 5, tl.where(surplus > 0, tokens, 0), mask=has)
        tl.store(record_ptr + 6, logit_tile, mask=has)
        tl.store(record_ptr + 7, length, mask=has)
    used = tl.sum(count, 0)
    for start in range(part * ROWS, num_splits, parts * ROWS):
        split = start + row
        tl.store(base_ptr + split * SPLIT_FIELDS, NO_ROW, mask=(split >= used) & (split < num_splits))


def make_schedule(
    schedule: Schedule,
    rows: DecodeRows,
    shape: LayerShape,
    itemsize: int,
    workspace: Workspace,
    rule: SelectionRule,
    full_counters: Tensor,
    full_layers: int,
) -> None:
    """Cut rows into splits, for all layers of one step.

    Another launch has to lie between this one and a layer's that does not get `just_scheduled`, and between a
    selection layer's and the next sparse layer's, as there is in any model: on some GPUs a layer reads its
    schedule and its tables while the launch ahead of it still runs.

    Args:
        schedule: is written; has room for the rows.
        rows: at most `workspace.max_rows`.
        shape: of the layers.
        itemsize: bytes of an element as the kernels compute it.
        workspace: whose logits are given out.
        rule: how pages are kept.
        full_counters: int64 ``[>= 3]``: rows, attended and context tokens, to which the step's full layers
            are added, where they run elsewhere; each query token counts as a row.
        full_layers: their number.
    """
    if len(rows) == 0:
        return
    device, query_len = rows.lengths.device, most_query_tokens(rows)
    selecting, sparse = tunings(shape, itemsize, len(rows), device, query_len)
    programs_per_split = shape.programs_per_split(query_len)
    schedule_kernel[(2, SCHEDULE_PROGRAMS)](
        rows.tokens,
        rows.requests,
        rows.lengths,
        rows.kept_pages,
        rows.query_lens if query_len > 1 else None,
        schedule.splits,
        schedule.row_splits,
        full_counters,
        len(rows),
        schedule.splits.shape[1],
        schedule.row_splits.shape[1],
        programs(len(rows), programs_per_split, selecting, device),
        programs(len(rows), programs_per_split, sparse, device),
        workspace.logit_capacity(shape),
        full_layers,
        rule.page_size,
        rule.recent_pages,
        FULL_TILE=LOGIT_TILE,
        SPARSE_TILE=sparse.tile,
        LOGIT_TILE=LOGIT_TILE,
        ROWS=max(16, next_power_of_2(workspace.max_rows)),
        SEVERAL=query_len > 1,
        num_warps=4,
    )


def most_query_tokens(rows: DecodeRows) -> int:
    """Query tokens of a row, at most: what kernels are compiled for."""
    return 1 if rows.query_lens is None else rows.max_query_len


def tunings(
    shape: LayerShape, itemsize: int, rows: int, device: torch.device, query_len: int = 1
) -> tuple[Tuning, Tuning]:
    """Settings of selection and of sparse layers, for so many rows of up to `query_len` query tokens."""
    key_bytes, units = shape.padded_head_size * itemsize, rows * shape.programs_per_split(query_len)
    limits = shared_memory(device), multiprocessors(device)
    queries = shape.band_queries if query_len > 1 else None
    return (
        choose_tuning(key_bytes, units, *limits, sparse=False, queries=queries),
        choose_tuning(key_bytes, units, *limits, sparse=True, quantized=shape.quantized, queries=queries),
    )


def programs(rows: int, programs_per_split: int, tuning: Tuning, device: torch.device) -> int:
    """Splits that the schedule aims at: programs per KV head and band of query tokens."""
    return tuning.programs_per_head(rows, programs_per_split, multiprocessors(device))
