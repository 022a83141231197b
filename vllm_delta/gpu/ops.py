"""The GPU kernels as Python functions on tensors: what is launched, in which order, over which buffers.

A *row* is one query token of one sequence. A step's rows are described by int32 tensors (`DecodeRows`). Rows
come in chunks of a fixed capacity; a chunk has a `Schedule`, computed once a step and used by every layer.
All buffers belong to a `Workspace`, are allocated once, and keep their addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from vllm_delta.gpu.attention import attention_kernel, combine_kernel
from vllm_delta.gpu.schedule import schedule_kernel
from vllm_delta.gpu.scores import score_keys_kernel, score_logits_kernel
from vllm_delta.gpu.select import select_kernel
from vllm_delta.gpu.tuning import MIN_TILE, Tuning, all_tunings, choose_tuning, most_full_units

#: Page sizes of the kernels, in tokens.
PAGE_SIZES = (1, 8, 16, 32, 64, 128)

#: Tokens of a tile of logits: the largest tile of the attention kernel and the largest page.
LOGIT_TILE = 128

#: Bytes of a logit, with its share of the tiles' maxima.
LOGIT_BYTES = 2 + 4 / MIN_TILE

#: Programs of a multiprocessor that score, a warp each: about as many as run at a time.
SCORE_PROGRAMS = 20

#: Programs that store a schedule's pieces.
SCHEDULE_PARTS = 16

#: Elements of the pieces that one step of the combination takes, by a single warp: 128 for each thread.
COMBINED_ELEMENTS = 4096

#: Pages of a row that its selection takes at a time, and digits of their scores, in bits.
SELECT_CHUNK = 2048
SELECT_DIGIT_BITS = 5

#: Rows that one launch takes at most.
MAX_CHUNK_ROWS = 1024

#: Bytes that the page scores of one launch take at most, where that leaves room for a row.
MAX_SCORES_BYTES = 128 << 20

_COMPUTE = {
    torch.float16: triton.language.float16,
    torch.bfloat16: triton.language.bfloat16,
    torch.float32: triton.language.float32,
}


@dataclass(frozen=True)
class Selection:
    """What a selection layer keeps, in tokens; all multiples of the page size."""

    page_size: int
    budget_tokens: int
    recent_tokens: int
    sink_tokens: int

    @property
    def budget_pages(self) -> int:
        """`budget_tokens` in pages."""
        return self.budget_tokens // self.page_size


@dataclass(frozen=True)
class DecodeRows:
    """Rows of one step, all int32 ``[rows]`` on the GPU."""

    #: index of the row's token in the query and the output
    tokens: Tensor
    #: index of the row's request in the block table
    requests: Tensor
    #: tokens that the row sees: its position in the sequence plus one; 0 for padding
    lengths: Tensor
    #: 1 for a row that sparse layers serve in full: the last token of a prompt, in a step of decode rows
    dense: Tensor

    def __len__(self) -> int:
        return self.lengths.shape[0]

    def slice(self, begin: int, end: int) -> DecodeRows:
        """Rows `begin` to `end`, as views."""
        return DecodeRows(
            self.tokens[begin:end], self.requests[begin:end], self.lengths[begin:end], self.dense[begin:end]
        )


@dataclass(frozen=True)
class LayerShape:
    """The shape of one layer's attention on this rank."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    #: whether the cache holds numbers of 8 bits
    quantized: bool = False

    @property
    def padded_head_size(self) -> int:
        """The head size as the kernels compute it, a power of two."""
        return max(16, _next_power_of_2(self.head_size))

    @property
    def padded_group(self) -> int:
        """Query heads of a KV head, padded to a power of two, at least 2: logits are read in pairs."""
        return max(2, _next_power_of_2(self.num_heads // self.num_kv_heads))

    @property
    def padded_heads(self) -> int:
        """Query heads, with those of each KV head padded to a power of two."""
        return self.num_kv_heads * self.padded_group

    @property
    def columns(self) -> int:
        """Query heads of a KV head, padded to what matrix units take."""
        return max(8, self.padded_group)


@dataclass(frozen=True)
class AttentionParameters:
    """What a layer's attention is made of, apart from its query and its cache."""

    #: factor of the logits
    scale: float
    #: the model's type, in which the matrix products are computed
    dtype: torch.dtype
    #: c in ``c * tanh(x / c)``; 0 for none
    softcap: float = 0.0
    #: ``[num_heads]``: a logit per head that has no value; None for none
    sinks: Tensor | None = None
    #: factors of an fp8 query, key and value, one each; None: not quantised
    scales: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Schedule:
    """How the rows of one chunk are cut into pieces; see `vllm_delta.gpu.schedule`."""

    #: int32 ``[2, pieces, 8]``, for selection layers and for sparse layers: the piece's row (-1: there is no
    #: such piece), its first token, its end, the index of the row's token in the query, of its request in the
    #: block table, the tokens that come from the selection table (all or 0), the first tile of the row's
    #: logits (-1: they are not needed, -2: they have no room), the row's length
    pieces: Tensor
    #: int32 ``[2, rows, 4]``: first piece of the row, number of its pieces, index of its token, tokens it
    #: attends to
    row_pieces: Tensor

    @classmethod
    def allocate(cls, max_rows: int, num_kv_heads: int, device: torch.device | str) -> Schedule:
        """Buffers for up to `max_rows` rows."""
        programs = _most_programs(num_kv_heads, device)
        return cls(
            pieces=torch.empty(2, max_rows + programs, 8, dtype=torch.int32, device=device),
            row_pieces=torch.empty(2, max_rows, 4, dtype=torch.int32, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the schedule takes."""
        return _tensor_bytes(self)


@dataclass(frozen=True)
class SelectionTable:
    """The pages that each row keeps, ascending; a row's first ``min(pages, budget_pages)`` entries count."""

    #: int32 ``[rows, budget_pages]``: pages of the sequence
    pages: Tensor
    #: int32 ``[rows, budget_pages]``: where they lie in caches that the selection layer's block table
    #: describes, ``block * pages_per_block + page of the block``
    frames: Tensor

    @classmethod
    def allocate(cls, rows: int, budget_pages: int, device: torch.device | str) -> SelectionTable:
        """A table of zeros."""
        pages, frames = torch.zeros(2, rows, budget_pages, dtype=torch.int32, device=device)
        return cls(pages, frames)

    @property
    def nbytes(self) -> int:
        """Bytes that the table takes."""
        return _tensor_bytes(self)

    def slice(self, begin: int, end: int) -> SelectionTable:
        """Rows `begin` to `end`, as views."""
        return SelectionTable(self.pages[begin:end], self.frames[begin:end])


class SideStream:
    """Launches beside the main stream's, until these wait for them; a CUDA graph records them as a branch."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pending = False

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Launch inside of it what needs all that was launched so far, and what `join` waits for."""
        self._stream.wait_stream(torch.cuda.current_stream())
        self._pending = True
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> bool:
        """Let what is launched next wait for the side stream; returns whether there was something."""
        was_pending, self._pending = self._pending, False
        if was_pending:
            torch.cuda.current_stream().wait_stream(self._stream)
        return was_pending


@dataclass(frozen=True)
class LayerInputs:
    """What one layer's attention of one chunk of rows reads."""

    #: ``[tokens, num_heads, head_size]``, contiguous in the last dimension
    query: Tensor
    #: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``, contiguous in the last dimension
    kv_cache: Tensor
    #: int32 ``[requests, blocks]``
    block_table: Tensor
    #: at most `Workspace.max_rows` rows
    rows: DecodeRows
    #: made for these rows
    schedule: Schedule
    parameters: AttentionParameters
    #: key and value of each token of the query, ``[tokens, num_kv_heads, head_size]`` each, contiguous in the
    #: last dimension, and each token's slot, int64 ``[tokens]``: its block times the block size, plus its
    #: place there; negative: not to be written. The layer writes those of the rows' tokens, which have to be
    #: their sequences' last, to the cache. None: they are there
    appended: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def shape(self) -> LayerShape:
        """The layer's shape."""
        quantized = self.parameters.scales is not None
        return LayerShape(self.query.shape[1], self.kv_cache.shape[1], self.query.shape[2], quantized)


@dataclass(frozen=True)
class Workspace:
    """Scratch memory of the kernels; layers run one after another and share it."""

    #: rows of a chunk, at most
    max_rows: int
    #: tokens of a sequence, at most
    max_length: int
    #: int16: the logits of selection layers, in tiles of ``padded_heads * LOGIT_TILE``
    logits: Tensor
    #: float32: the largest logit of each tile of the attention kernel and head
    logit_maxima: Tensor
    #: float32 ``[max_rows, pages]``
    scores: Tensor
    #: int32 ``[max_rows, SELECT_CHUNK]``: pages of long rows that may be kept
    listed: Tensor
    #: float32: the pieces' outputs
    partial: Tensor
    #: float32: the pieces' logarithms of sums
    partial_lse: Tensor
    #: float32: the rows' logarithms of sums
    lse: Tensor
    #: int32: pieces of each row and KV head that are done; zeros between launches
    arrived: Tensor

    @classmethod
    def allocate(
        cls,
        shapes: set[LayerShape],
        *,
        max_rows: int,
        max_length: int,
        page_size: int,
        logit_tokens: int,
        device: torch.device | str,
    ) -> Workspace:
        """Allocate for layers of the given shapes.

        Bytes, with r = `max_rows` (as `chunk_rows` gives it), H query heads (H' with each KV head's padded
        to a power of two, at least 2), D the head size, T the least tile of the attention kernel and
        P = programs * waves * multiprocessors / KV heads: logits ``(2 + 4 / T) H' logit_tokens``, page scores
        ``4 r max_length / page_size`` and ``8192 r``, pieces ``4 H (D + 1) (r + P)``, and ``4 r (H + K)``
        with K KV heads.
        """
        heads = max(shape.num_heads for shape in shapes)
        kv_heads = max(shape.num_kv_heads for shape in shapes)
        padded_heads = max(shape.padded_heads for shape in shapes)
        tiles = -(-logit_tokens // LOGIT_TILE)
        pieces = max(
            (max_rows + _most_programs(shape.num_kv_heads, device)) * shape.num_heads * shape.head_size
            for shape in shapes
        )
        min_head_size = min(shape.head_size for shape in shapes)

        def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*size, dtype=dtype, device=device)

        return cls(
            max_rows=max_rows,
            max_length=max_length,
            logits=empty(tiles * LOGIT_TILE * padded_heads, dtype=torch.int16),
            logit_maxima=empty(tiles * LOGIT_TILE // MIN_TILE * padded_heads),
            scores=empty(max_rows, -(-max_length // page_size)),
            listed=empty(max_rows, SELECT_CHUNK, dtype=torch.int32),
            partial=empty(pieces),
            partial_lse=empty(pieces // min_head_size),
            lse=empty(max_rows * heads),
            arrived=torch.zeros(max_rows * kv_heads, dtype=torch.int32, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the workspace takes."""
        return _tensor_bytes(self)

    def logit_capacity(self, shape: LayerShape) -> int:
        """Tiles of logits that fit, for layers of that shape."""
        return self.logits.numel() // (LOGIT_TILE * shape.padded_heads)


def chunk_rows(max_rows: int, max_length: int, page_size: int) -> int:
    """Rows of a chunk, where up to `max_rows` come in one step: few enough for the page scores' memory."""
    row_bytes = 4 * -(-max_length // page_size)
    return max(1, min(max_rows, MAX_CHUNK_ROWS, MAX_SCORES_BYTES // row_bytes))


def make_schedule(
    schedule: Schedule,
    rows: DecodeRows,
    shape: LayerShape,
    itemsize: int,
    workspace: Workspace,
    selection: Selection,
    full_counters: Tensor,
    full_layers: int,
) -> None:
    """Cut rows into pieces, for all layers of one step.

    Another launch has to lie between this one and a layer's that is not told `just_scheduled`, and between a
    selection layer's and the next sparse layer's, as there is in any model: on some GPUs a layer reads its
    schedule and its tables while the launch ahead of it still runs.

    Args:
        schedule: is written; has room for the rows.
        rows: at most `workspace.max_rows`.
        shape: of the layers.
        itemsize: bytes of an element as the kernels compute it.
        workspace: whose logits are given out.
        selection: what is kept.
        full_counters: int64 ``[>= 3]``: rows, attended and context tokens, to which the step's full layers
            are added, since they run elsewhere.
        full_layers: their number.
    """
    if len(rows) == 0:
        return
    device = rows.lengths.device
    selecting, sparse = _tunings(shape, itemsize, len(rows), device)
    schedule_kernel[(2, SCHEDULE_PARTS)](
        rows.tokens,
        rows.requests,
        rows.lengths,
        rows.dense,
        schedule.pieces,
        schedule.row_pieces,
        full_counters,
        len(rows),
        schedule.pieces.shape[1],
        schedule.row_pieces.shape[1],
        _programs(len(rows), shape.num_kv_heads, selecting, device),
        _programs(len(rows), shape.num_kv_heads, sparse, device),
        workspace.logit_capacity(shape),
        full_layers,
        selection.budget_tokens,
        selection.page_size,
        FULL_TILE=LOGIT_TILE,
        SPARSE_TILE=sparse.tile,
        LOGIT_TILE=LOGIT_TILE,
        ROWS=max(16, _next_power_of_2(workspace.max_rows)),
        num_warps=4,
    )


def selection_attention(
    inputs: LayerInputs,
    workspace: Workspace,
    selection: Selection,
    counters: Tensor,
    output: Tensor,
    table: SelectionTable,
    *,
    just_scheduled: bool = False,
    side: SideStream | None = None,
) -> None:
    """A selection layer: full attention, and the pages for the sparse layers after it.

    Args:
        inputs: what is read.
        workspace: scratch.
        selection: what to keep.
        counters: int64 ``[5]``: rows, attended tokens, context tokens, dense rows, rows within the budget.
        output: ``[tokens, num_heads, head_size]``; the rows' tokens are written.
        table: of at least as many rows; is written.
        just_scheduled: whether `make_schedule` may have been the launch before this one, or a side stream
            was joined.
        side: where pages are chosen, if given, while the model goes on: to be joined before the next layer
            that these functions run.
    """
    _check_table(inputs.rows, selection, table)
    _attention(inputs, workspace, selection, counters, output, logits=True, dependent=not just_scheduled)
    block_size = inputs.kv_cache.shape[2]
    arguments = workspace.scores, workspace.listed, inputs.rows, inputs.block_table, block_size, selection
    if side is None:
        page_scores(inputs, workspace, selection)
        select_pages(*arguments, table)
        return
    # Scores from the keys read the query, whose memory the model may use again at once.
    _score_keys(inputs, workspace, selection)
    with side.fork():
        _score_logits(inputs, workspace, selection, dependent=False)
        select_pages(*arguments, table)


def most_full_rows(shape: LayerShape, itemsize: int, device: torch.device) -> int:
    """Rows up to which full layers should run with `full_attention`, not FlashAttention 3; 0 for none."""
    if shape.quantized or not _has_dependent_launch(device):
        return 0
    units = most_full_units(shape.padded_head_size * itemsize, _multiprocessors(device))
    return units // shape.num_kv_heads


def full_attention(
    inputs: LayerInputs,
    workspace: Workspace,
    selection: Selection,
    counters: Tensor,
    output: Tensor,
    *,
    just_scheduled: bool = False,
) -> None:
    """A full layer: a selection layer's attention, without its logits; arguments as above."""
    _attention(inputs, workspace, selection, counters, output, dependent=not just_scheduled)


def sparse_attention(
    inputs: LayerInputs,
    workspace: Workspace,
    selection: Selection,
    counters: Tensor,
    output: Tensor,
    table: SelectionTable,
    *,
    same_blocks: bool,
    just_scheduled: bool = False,
) -> None:
    """A sparse layer: attention over the pages of the selection table; arguments as above.

    `same_blocks` says that the selection layer had the same block table, so that page frames hold.
    """
    _check_table(inputs.rows, selection, table)
    dependent = not just_scheduled
    _attention(inputs, workspace, selection, counters, output, table, frames=same_blocks, dependent=dependent)


def select_pages(
    scores: Tensor,
    listed: Tensor,
    rows: DecodeRows,
    block_table: Tensor,
    block_size: int,
    selection: Selection,
    table: SelectionTable,
) -> None:
    """Page scores to the selection table.

    Args:
        scores: float32 ``[rows, pages]``, not negative; read up to each row's pages.
        listed: int32 ``[rows, SELECT_CHUNK]``, scratch.
        rows: the rows.
        block_table: int32 ``[requests, blocks]``.
        block_size: tokens of a block.
        selection: what to keep.
        table: of at least as many rows; the first ``min(pages, budget_pages)`` entries of each are written.
    """
    if len(rows) == 0:
        return
    page_size = selection.page_size
    recent_pages, sink_pages = selection.recent_tokens // page_size, selection.sink_tokens // page_size
    wanted = selection.budget_pages - recent_pages - sink_pages
    select_kernel[(len(rows),)](
        scores,
        rows.requests,
        rows.lengths,
        block_table,
        table.pages,
        table.frames,
        listed,
        scores.stride(0),
        block_table.stride(0),
        table.pages.stride(0),
        selection.budget_pages,
        recent_pages,
        sink_pages,
        PAGE=page_size,
        PAGES_PER_BLOCK=block_size // page_size,
        CHUNK=SELECT_CHUNK,
        GROUPS=min(_next_power_of_2(max(1, wanted)), SELECT_CHUNK // 4),
        EDGE=128,
        DIGIT_BITS=SELECT_DIGIT_BITS,
        num_warps=8,
        **_dependent_launch(scores.device),
    )


def page_scores(inputs: LayerInputs, workspace: Workspace, selection: Selection) -> None:
    """Page scores of the rows that exceed the budget, into `workspace.scores`; after their attention."""
    _score_logits(inputs, workspace, selection)
    _score_keys(inputs, workspace, selection)


def _score_logits(
    inputs: LayerInputs, workspace: Workspace, selection: Selection, *, dependent: bool = True
) -> None:
    rows, parameters, shape, query = inputs.rows, inputs.parameters, inputs.shape, inputs.query
    if len(rows) == 0:
        return
    tuning, _ = _tunings(shape, parameters.dtype.itemsize, len(rows), query.device)
    score_logits_kernel[_score_grid(inputs, tuning)](
        workspace.logits,
        workspace.logit_maxima,
        workspace.lse,
        inputs.schedule.pieces,
        workspace.scores,
        workspace.scores.stride(0),
        H=shape.num_heads,
        KV_HEADS=shape.num_kv_heads,
        GROUP=shape.padded_group,
        PAGE=selection.page_size,
        KV_HEADS_PAD=_next_power_of_2(shape.num_kv_heads),
        TILE=max(tuning.tile, selection.page_size),
        SUBTILE=tuning.tile,
        LOGIT_TILE=LOGIT_TILE,
        DISCARD=query.device.type == "cuda",
        num_warps=1,
        **_dependent_launch(query.device, dependent),
    )


def _score_keys(inputs: LayerInputs, workspace: Workspace, selection: Selection) -> None:
    rows, parameters, shape = inputs.rows, inputs.parameters, inputs.shape
    query, kv_cache = inputs.query, inputs.kv_cache
    if len(rows) == 0:
        return
    if len(rows) * -(-workspace.max_length // LOGIT_TILE) <= workspace.logit_capacity(shape):
        return  # there is room for the logits of any rows
    tuning, _ = _tunings(shape, parameters.dtype.itemsize, len(rows), query.device)
    q_scale, k_scale, _, quantized = _scales(parameters, query)
    score_keys_kernel[_score_grid(inputs, tuning)](
        query,
        kv_cache,
        inputs.block_table,
        inputs.schedule.pieces,
        workspace.lse,
        workspace.scores,
        q_scale,
        k_scale,
        parameters.scale,
        parameters.softcap,
        query.stride(0),
        query.stride(1),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        inputs.block_table.stride(0),
        workspace.scores.stride(0),
        H=shape.num_heads,
        KV_HEADS=shape.num_kv_heads,
        COLUMNS=shape.columns,
        D=shape.head_size,
        D_PAD=shape.padded_head_size,
        PAGE=selection.page_size,
        BLOCK=kv_cache.shape[2],
        TILE=LOGIT_TILE,
        SOFTCAP=parameters.softcap != 0,
        QUANTIZED=quantized,
        COMPUTE=_COMPUTE[parameters.dtype],
        num_warps=4,
        num_stages=1,
    )


def _attention(
    inputs: LayerInputs,
    workspace: Workspace,
    selection: Selection,
    counters: Tensor,
    output: Tensor,
    table: SelectionTable | None = None,
    *,
    logits: bool = False,
    frames: bool = False,
    dependent: bool,
) -> None:
    """A layer's attention and combination; sparse if there is a table, of which it reads frames or pages."""
    _check(inputs, workspace, selection, output)
    rows, parameters, shape = inputs.rows, inputs.parameters, inputs.shape
    sparse = table is not None
    # What a layer does not read needs some tensor in its place.
    entries = rows.lengths if table is None else table.frames if frames else table.pages
    query, kv_cache, schedule = inputs.query, inputs.kv_cache, inputs.schedule
    if len(rows) == 0:
        return
    tuning = _tunings(shape, parameters.dtype.itemsize, len(rows), query.device)[sparse]
    q_scale, k_scale, v_scale, quantized = _scales(parameters, query)
    key, value, slots = inputs.appended or (query, query, query)
    sinks = workspace.lse if parameters.sinks is None else parameters.sinks
    attention_kernel[(_num_pieces(inputs, tuning), shape.num_kv_heads)](
        query,
        kv_cache,
        inputs.block_table,
        schedule.pieces[int(sparse)],
        entries,
        workspace.logits,
        workspace.logit_maxima,
        workspace.partial,
        workspace.partial_lse,
        workspace.arrived,
        rows.dense,
        schedule.row_pieces[int(sparse)],
        counters,
        sinks,
        output,
        key,
        value,
        slots,
        q_scale,
        k_scale,
        parameters.scale,
        parameters.softcap,
        int(logits),
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        inputs.block_table.stride(0),
        entries.stride(0),
        output.stride(0),
        output.stride(1),
        H=shape.num_heads,
        KV_HEADS=shape.num_kv_heads,
        GROUP=shape.padded_group,
        COLUMNS=shape.columns,
        D=shape.head_size,
        D_PAD=shape.padded_head_size,
        PAGE=selection.page_size,
        BLOCK=kv_cache.shape[2],
        TILE=tuning.tile,
        LOGIT_TILE=LOGIT_TILE,
        SPARSE=sparse,
        FRAMES=frames,
        APPEND=inputs.appended is not None,
        WHOLE=tuning.whole,
        SOFTCAP=parameters.softcap != 0,
        SINKS=parameters.sinks is not None,
        QUANTIZED=quantized,
        COMPUTE=_COMPUTE[parameters.dtype],
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        **_dependent_launch(query.device, dependent),
    )
    if tuning.whole:
        return
    combine_kernel[(len(rows), shape.num_heads)](
        workspace.partial,
        workspace.partial_lse,
        rows.lengths,
        rows.dense,
        schedule.row_pieces[int(sparse)],
        counters,
        sinks,
        v_scale,
        output,
        workspace.lse,
        output.stride(0),
        output.stride(1),
        H=shape.num_heads,
        D=shape.head_size,
        D_PAD=shape.padded_head_size,
        PIECES=COMBINED_ELEMENTS // shape.padded_head_size,
        SPARSE=sparse,
        SINKS=parameters.sinks is not None,
        QUANTIZED=quantized,
        num_warps=1,
        **_dependent_launch(query.device),
    )


def _check(inputs: LayerInputs, workspace: Workspace, selection: Selection, output: Tensor) -> None:
    query, kv_cache, rows = inputs.query, inputs.kv_cache, inputs.rows
    _, num_kv_heads, block_size, width = kv_cache.shape
    _, num_heads, head_size = query.shape
    assert width == 2 * head_size and num_heads % num_kv_heads == 0
    assert block_size % selection.page_size == 0 and selection.page_size in PAGE_SIZES
    assert query.stride(2) == kv_cache.stride(3) == output.stride(2) == 1
    assert all(new.stride(2) == 1 and new.shape[1] == num_kv_heads for new in (inputs.appended or ())[:2])
    assert len(rows) <= workspace.max_rows


def _check_table(rows: DecodeRows, selection: Selection, table: SelectionTable) -> None:
    num_rows, num_pages = table.pages.shape
    assert len(rows) <= num_rows and selection.budget_pages <= num_pages


def _scales(parameters: AttentionParameters, placeholder: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    if parameters.scales is None:
        return placeholder, placeholder, placeholder, False
    return (*parameters.scales, True)


def _tunings(shape: LayerShape, itemsize: int, rows: int, device: torch.device) -> tuple[Tuning, Tuning]:
    key_bytes, units = shape.padded_head_size * itemsize, rows * shape.num_kv_heads
    limits = _shared_memory(device), _multiprocessors(device)
    return (
        choose_tuning(key_bytes, units, *limits, sparse=False),
        choose_tuning(key_bytes, units, *limits, sparse=True, quantized=shape.quantized),
    )


def _tensor_bytes(owner: object) -> int:
    return sum(value.nbytes for value in vars(owner).values() if isinstance(value, Tensor))


def _programs(rows: int, num_kv_heads: int, tuning: Tuning, device: torch.device) -> int:
    """Programs per KV head that the schedule aims at."""
    return tuning.programs_per_head(rows, num_kv_heads, _multiprocessors(device))


def _num_pieces(inputs: LayerInputs, tuning: Tuning) -> int:
    """The most pieces that the rows may be cut into."""
    rows = len(inputs.rows)
    return rows + _programs(rows, inputs.shape.num_kv_heads, tuning, inputs.query.device)


def _score_grid(inputs: LayerInputs, tuning: Tuning) -> tuple[int, int]:
    """Pieces, and the programs that share one of them."""
    num_pieces = _num_pieces(inputs, tuning)
    return num_pieces, max(1, SCORE_PROGRAMS * _multiprocessors(inputs.query.device) // num_pieces)


def _most_programs(num_kv_heads: int, device: torch.device | str) -> int:
    """The same for any rows and settings."""
    multiprocessors = _multiprocessors(torch.device(device))
    return max(tuning.most_programs_per_head(num_kv_heads, multiprocessors) for tuning in all_tunings())


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # the interpreter's stand-in
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take, by Triton's own measure."""
    if device.type != "cuda":
        return 1 << 30  # the interpreter has no limit
    index = torch.cuda.current_device() if device.index is None else device.index
    limit: int = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return limit


def _has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start before the one ahead of it is done, and wait for it (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _dependent_launch(device: torch.device, dependent: bool = True) -> dict[str, bool]:
    """Options of a kernel that does so, if it is to."""
    if dependent and _has_dependent_launch(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
