"""A batch of the contract on a GPU, or in Triton's interpreter, and the kernels' calls on it."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from contract import NAN, Batch, keeps_all
from torch import Tensor

from vllm_delta.kernels.gpu import ops
from vllm_delta.kernels.gpu.device import SideStream
from vllm_delta.kernels.gpu.layer import LayerInputs
from vllm_delta.kernels.gpu.schedule import Schedule, make_schedule
from vllm_delta.kernels.gpu.shape import LayerShape
from vllm_delta.kernels.gpu.workspace import Workspace
from vllm_delta.kernels.types import SelectionTable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Triton's interpreter has no matrix products in bfloat16.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16

#: What no kernel may take for a page, a split or a row.
POISON = 1 << 30


class GPUBatch:
    """Everything that the kernels take, on `DEVICE`; buffers are poisoned."""

    def __init__(self, batch: Batch) -> None:
        self.batch, case = batch, batch.case
        self.case = case
        rows, max_length = len(case.lengths), max(case.lengths)
        self.query = batch.query.to(DEVICE)
        # The layers of a real cache lie interleaved in one allocation.
        shape = batch.kv_cache.shape
        strided = torch.full((*shape[:2], 2, *shape[2:]), 7.0)
        strided[:, :, 1] = batch.kv_cache.float()
        self.kv_cache = strided.to(batch.kv_cache.dtype).to(DEVICE)[:, :, 1]
        self.block_table = batch.block_table.to(DEVICE)
        self.rows = batch.rows.to(DEVICE)
        given = batch.parameters
        self.parameters = dataclasses.replace(
            given,
            sinks=None if given.sinks is None else given.sinks.to(DEVICE),
            scales=None if given.scales is None else tuple(scale.to(DEVICE) for scale in given.scales),
        )
        self.rule = batch.rule
        self.shape = LayerShape(case.num_heads, case.num_kv_heads, case.head_size, case.fp8)
        self.workspace = Workspace.allocate(
            {self.shape},
            max_rows=rows,
            max_length=max_length,
            page_size=case.page_size,
            logit_tokens=case.logit_tokens,
            device=DEVICE,
            max_query_len=self.rows.max_query_len,
        )
        self.workspace.logits.fill_(0x7FFF)
        for buffer in ("logit_maxima", "scores", "partial", "partial_lse", "lse"):
            getattr(self.workspace, buffer).fill_(NAN)
        self.schedule = Schedule.allocate(rows, case.num_kv_heads, DEVICE)
        for buffer in ("splits", "row_splits"):
            getattr(self.schedule, buffer).fill_(POISON)
        self.table = SelectionTable.allocate(rows, case.most_pages, DEVICE, frames=True)
        self.poison_table()
        self.full_counters = torch.zeros(5, dtype=torch.int64, device=DEVICE)

    def poison_table(self) -> None:
        """Forget what was selected."""
        self.table.pages.fill_(POISON)
        self.table.frames.fill_(POISON)

    def make_schedule(self) -> None:
        """Cut the rows into splits; two full layers run elsewhere."""
        make_schedule(
            self.schedule,
            self.rows,
            self.shape,
            self.case.dtype.itemsize,
            self.workspace,
            self.rule,
            self.full_counters,
            2,
        )

    @property
    def inputs(self) -> LayerInputs:
        """What a layer reads."""
        return LayerInputs(
            self.query,
            self.kv_cache,
            self.block_table,
            self.rows,
            self.schedule,
            self.parameters,
            self.rule,
        )

    def take_last_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Key, value and slot of each row's token, taken out of the cache, where NaN is left."""
        size = len(self.query), self.case.num_kv_heads, self.case.head_size
        keys, values = torch.zeros(2, *size, dtype=self.kv_cache.dtype, device=DEVICE)
        slots = torch.full((len(self.query),), -1, dtype=torch.int64, device=DEVICE)
        for row in self.case.real_rows:
            last = self.case.lengths[row] - 1
            token, request = int(self.rows.tokens[row]), int(self.rows.requests[row])
            block = self.block_table[request, last // self.case.block_size]
            place = self.kv_cache[block, :, last % self.case.block_size]
            keys[token], values[token] = place.split(self.case.head_size, dim=-1)
            slots[token] = block * self.case.block_size + last % self.case.block_size
            place.fill_(NAN)
        return keys, values, slots

    def run(
        self,
        kind: Literal["full", "selection", "sparse"],
        *,
        same_blocks: bool = True,
        append: bool = False,
        side: SideStream | None = None,
    ) -> tuple[Tensor, list[int]]:
        """The output of a layer, NaN where nothing was written, and its counters, on the CPU.

        With `append`, the rows' own keys and values are not in the cache before.
        """
        output = torch.full(self.query.shape, NAN, dtype=self.case.dtype, device=DEVICE)
        counters = torch.zeros(5, dtype=torch.int64, device=DEVICE)
        inputs = self.inputs
        if append:
            inputs = dataclasses.replace(inputs, appended=self.take_last_tokens())
        arguments = inputs, self.workspace, counters, output
        if kind == "full":
            ops.full_attention(*arguments)
        elif kind == "sparse":
            ops.sparse_attention(*arguments, self.table, same_blocks=same_blocks)
        else:
            ops.selection_attention(*arguments, self.table, side=side)
        return output.cpu(), counters.tolist()

    def pages(self) -> list[Tensor | None]:
        """The kept and following pages of each row, int64 on the CPU; None where it keeps everything."""
        pages = self.table.pages.long().cpu()
        following = self.case.following_pages
        return [
            pages[row, : self.case.budgets[row] + following]
            if length and not keeps_all(self.case, row)
            else None
            for row, length in enumerate(self.case.lengths)
        ]
