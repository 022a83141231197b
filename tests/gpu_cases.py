"""Random decode batches for the GPU kernels, and their results by the reference in float64."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_delta import reference
from vllm_delta.gpu import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Triton's interpreter has no matrix products in bfloat16.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16


@dataclass(frozen=True)
class Case:
    """The shape and options of a batch; lengths in tokens, 0 for padding."""

    lengths: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    page_size: int = 16
    block_size: int = 16
    budget_tokens: int = 64
    recent_tokens: int = 16
    sink_tokens: int = 16
    dtype: torch.dtype = DTYPE
    softcap: float = 0.0
    sinks: bool = False
    fp8: bool = False
    dense_rows: tuple[int, ...] = ()
    #: tokens of logits that the workspace holds
    logit_tokens: int = 1 << 16
    seed: int = 0


class Batch:
    """Everything that the kernels take, on `DEVICE`, in a cache with blocks in random order."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        rows = len(case.lengths)
        max_length = max(case.lengths)
        blocks_per_row = -(-max_length // case.block_size) + 1
        num_blocks = rows * blocks_per_row + 1
        cache = randn(num_blocks, case.num_kv_heads, case.block_size, 2 * case.head_size)
        # A few strong keys, so that heads disagree and scores spread.
        cache[..., : case.head_size] *= 1 + 2 * torch.rand(
            num_blocks, case.num_kv_heads, case.block_size, 1, generator=generator
        )
        order = torch.randperm(num_blocks - 1, generator=generator) + 1
        block_table = order[: rows * blocks_per_row].view(rows, blocks_per_row).int()
        query = randn(rows + 2, case.num_heads, case.head_size)
        tokens = torch.randperm(rows + 2, generator=generator)[:rows].int()
        requests = torch.randperm(rows, generator=generator).int()
        self.scales = None
        storage = case.dtype
        if case.fp8:
            storage = torch.float8_e4m3fn
            self.scales = tuple(torch.tensor(value) for value in (0.5, 0.25, 2.0))
        self.query = query.to(storage).to(DEVICE)
        # The layers of a real cache lie interleaved in one allocation; keys of unused tokens are garbage.
        strided = torch.full((num_blocks, case.num_kv_heads, 2, case.block_size, 2 * case.head_size), 7.0)
        strided[:, :, 1] = cache
        self.kv_cache = strided.to(storage).to(DEVICE)[:, :, 1]
        self.block_table = block_table.to(DEVICE)
        dense = torch.zeros(rows, dtype=torch.int32)
        dense[list(case.dense_rows)] = 1
        self.rows = ops.DecodeRows(
            tokens=tokens.to(DEVICE),
            requests=requests.to(DEVICE),
            lengths=torch.tensor(case.lengths, dtype=torch.int32).to(DEVICE),
            dense=dense.to(DEVICE),
        )
        sinks = randn(case.num_heads).to(case.dtype) if case.sinks else None
        self.parameters = ops.AttentionParameters(
            scale=case.head_size**-0.5,
            dtype=case.dtype,
            softcap=case.softcap,
            sinks=None if sinks is None else sinks.to(DEVICE),
            scales=None if self.scales is None else tuple(scale.to(DEVICE) for scale in self.scales),
        )
        self.selection = ops.Selection(
            case.page_size, case.budget_tokens, case.recent_tokens, case.sink_tokens
        )
        self.shape = ops.LayerShape(case.num_heads, case.num_kv_heads, case.head_size, case.fp8)
        self.workspace = ops.Workspace.allocate(
            {self.shape},
            max_rows=rows,
            max_length=max_length,
            page_size=case.page_size,
            logit_tokens=case.logit_tokens,
            device=DEVICE,
        )
        self.workspace.logits.fill_(0x7FFF)
        for buffer in ("logit_maxima", "scores", "partial", "partial_lse", "lse"):
            getattr(self.workspace, buffer).fill_(float("nan"))
        self.schedule = ops.Schedule.allocate(rows, case.num_kv_heads, DEVICE)
        for buffer in ("pieces", "row_pieces"):
            getattr(self.schedule, buffer).fill_(1 << 30)
        self.table = ops.SelectionTable.allocate(rows, self.selection.budget_pages, DEVICE)
        self.table.pages.fill_(1 << 30)
        self.table.frames.fill_(1 << 30)
        self.full_counters = torch.zeros(5, dtype=torch.int64, device=DEVICE)

    def make_schedule(self) -> None:
        """Cut the rows into pieces."""
        ops.make_schedule(
            self.schedule,
            self.rows,
            self.shape,
            self.case.dtype.itemsize,
            self.workspace,
            self.selection,
            self.full_counters,
            2,
        )

    @property
    def inputs(self) -> ops.LayerInputs:
        """What a layer reads."""
        return ops.LayerInputs(
            self.query, self.kv_cache, self.block_table, self.rows, self.schedule, self.parameters
        )

    def take_last_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Key, value and slot of each row's token, taken out of the cache, where NaN is left."""
        size = len(self.query), self.case.num_kv_heads, self.case.head_size
        keys, values = torch.zeros(2, *size, dtype=self.kv_cache.dtype, device=DEVICE)
        slots = torch.full((len(self.query),), -1, dtype=torch.int64, device=DEVICE)
        for row, length in enumerate(self.rows.lengths.tolist()):
            if length:
                token, request = int(self.rows.tokens[row]), int(self.rows.requests[row])
                block = self.block_table[request, (length - 1) // self.case.block_size]
                place = self.kv_cache[block, :, (length - 1) % self.case.block_size]
                keys[token], values[token] = place.split(self.case.head_size, dim=-1)
                slots[token] = block * self.case.block_size + (length - 1) % self.case.block_size
                place.fill_(float("nan"))
        return keys, values, slots

    def run(
        self,
        *,
        sparse: bool = False,
        full: bool = False,
        same_blocks: bool = True,
        append: bool = False,
        side: ops.SideStream | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output of a full, a sparse or else a selection layer, and its counters.

        The output is NaN where nothing was written. With `append`, the rows' own keys and values are not in
        the cache before.
        """
        output = torch.full(self.query.shape, float("nan"), dtype=self.case.dtype, device=DEVICE)
        counters = torch.zeros(5, dtype=torch.int64, device=DEVICE)
        inputs = self.inputs
        if append:
            inputs = dataclasses.replace(inputs, appended=self.take_last_tokens())
        arguments = inputs, self.workspace, self.selection, counters, output
        if full:
            ops.full_attention(*arguments)
        elif sparse:
            ops.sparse_attention(*arguments, self.table, same_blocks=same_blocks)
        else:
            ops.selection_attention(*arguments, self.table, side=side)
        return output, counters.cpu()

    def kept(self, row: int) -> Tensor:
        """The pages that a sparse layer reads for this row, int64 on the CPU."""
        pages = -(-self.case.lengths[row] // self.case.page_size)
        if row in self.case.dense_rows:
            return torch.arange(pages)
        return self.table.pages[row, : min(pages, self.selection.budget_pages)].long().cpu()


@dataclass(frozen=True)
class Expected:
    """One row's result by the reference, in float64 unless `dtype` says otherwise."""

    full: Tensor
    scores: Tensor
    pages: Tensor


def expect(batch: Batch, row: int, dtype: torch.dtype = torch.float64) -> Expected:
    """What a selection layer must yield for one row."""
    case, selection = batch.case, batch.selection
    query, cache, block_row, options = _inputs(batch, row, dtype)
    full, scores, table = reference.selection_attention(
        query,
        cache,
        block_row,
        [case.lengths[row]],
        page_size=case.page_size,
        budget_pages=selection.budget_pages,
        recent_pages=case.recent_tokens // case.page_size,
        sink_pages=case.sink_tokens // case.page_size,
        **options,
    )
    return Expected(_value_scale(batch) * full[0], scores[0], table[0])


def expect_sparse(batch: Batch, row: int, pages: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """What a sparse layer must yield for one row that keeps `pages`."""
    query, cache, block_row, options = _inputs(batch, row, dtype)
    output = reference.sparse_attention(
        query,
        cache,
        block_row,
        [batch.case.lengths[row]],
        [pages],
        page_size=batch.case.page_size,
        **options,
    )
    return _value_scale(batch) * output[0]


def eager_error(batch: Batch, row: int, exact: Tensor) -> float:
    """Largest error of the same attention, computed in the model's own type by plain PyTorch."""
    pages = torch.arange(-(-batch.case.lengths[row] // batch.case.page_size))
    rounded = expect_sparse(batch, row, pages, batch.case.dtype)
    return (rounded.double() - exact).abs().max().item()


def _inputs(batch: Batch, row: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict]:
    rows, parameters = batch.rows, batch.parameters
    scale = parameters.scale
    if batch.scales is not None:
        scale *= float(batch.scales[0] * batch.scales[1])
    token, request = int(rows.tokens[row]), int(rows.requests[row])
    block_row = batch.block_table[request]
    blocks = -(-batch.case.lengths[row] // batch.case.block_size)
    cache = batch.kv_cache[block_row[:blocks].long()].to(dtype)
    sinks = None if parameters.sinks is None else parameters.sinks.to(dtype)
    local = torch.arange(blocks, device=cache.device)[None]
    options = {"scale": scale, "softcap": parameters.softcap, "sinks": sinks}
    return batch.query[token][None].to(dtype), cache, local, options


def _value_scale(batch: Batch) -> float:
    return 1.0 if batch.scales is None else float(batch.scales[2])
