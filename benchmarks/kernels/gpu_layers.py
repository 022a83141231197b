"""Attention layers on a GPU, with caches of random tokens: DELTA's and FlashAttention 3's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

from benchmarks.lib.cases import Case
from vllm_delta.kernels.gpu import ops
from vllm_delta.kernels.gpu.attention import attend
from vllm_delta.kernels.gpu.layer import LayerInputs
from vllm_delta.kernels.gpu.schedule import Schedule, make_schedule
from vllm_delta.kernels.gpu.select import select_pages
from vllm_delta.kernels.gpu.shape import LayerShape
from vllm_delta.kernels.gpu.workspace import Workspace
from vllm_delta.kernels.types import SelectionTable
from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.rows import DecodeRows

BLOCK = 16
#: of keys and values that the calls of a graph go round in, several times the GPU's cache
ROTATED_BYTES = 2**29
#: vLLM's bound in CUDA graphs
FA3_SPLITS = 32


@dataclass
class Layers:
    """Several layers' caches with the same batch, and DELTA's buffers for them."""

    case: Case
    shape: LayerShape
    queries: list[Tensor]
    caches: list[Tensor]
    block_table: Tensor
    rows: DecodeRows
    config: DeltaConfig
    workspace: Workspace
    schedule: Schedule
    table: SelectionTable
    compact_table: Tensor

    @classmethod
    def make(cls, case: Case, shape: LayerShape, query_len: int = 1) -> Layers:
        """Random caches and queries, `query_len` of each row, and a selection made from them."""
        config = DeltaConfig()
        batch, context = case.batch, case.context
        token_bytes = shape.num_kv_heads * shape.head_size * 4
        kept_bytes = batch * min(context, config.budget_tokens) * token_bytes
        copies = min(64, max(2, -(-ROTATED_BYTES // kept_bytes)))
        blocks_per_row = -(-context // BLOCK)
        copies = min(copies, max(2, 20 * 2**30 // (batch * context * token_bytes)))
        size = (batch * blocks_per_row, shape.num_kv_heads, BLOCK, 2 * shape.head_size)
        device = "cuda"
        caches = [torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(copies)]
        query_size = (batch * query_len, shape.num_heads, shape.head_size)
        queries = [torch.randn(query_size, dtype=torch.bfloat16, device=device) for _ in range(copies)]
        block_table = torch.randperm(size[0], device=device).view(batch, -1).int()
        index = torch.arange(batch, dtype=torch.int32, device=device)
        kept_pages = torch.full_like(index, config.budget_pages)
        lengths, query_lens = torch.full_like(index, context), torch.full_like(index, query_len)
        rows = DecodeRows(index * query_len, index, lengths, kept_pages, query_lens, query_len)
        workspace = Workspace.allocate(
            {shape},
            max_rows=batch,
            max_length=context,
            page_size=config.page_size,
            logit_tokens=batch * blocks_per_row * BLOCK,
            device=device,
            max_query_len=query_len,
        )
        layers = cls(
            case,
            shape,
            queries,
            caches,
            block_table,
            rows,
            config,
            workspace,
            Schedule.allocate(batch, shape.num_kv_heads, device),
            SelectionTable.allocate(batch, config.budget_pages, device, frames=True),
            torch.empty(0),
        )
        layers.plan()
        layers.run_selection(0)
        layers.compact_table = block_table
        if blocks_per_row > config.budget_pages:  # else rows keep everything, and the table has no entries
            layers.compact_table = torch.gather(block_table, 1, layers.table.pages.long())
        return layers

    def plan(self) -> None:
        """Make the schedule, which depends on the tuning."""
        counters = torch.zeros(5, dtype=torch.int64, device="cuda")
        make_schedule(self.schedule, self.rows, self.shape, 2, self.workspace, self.config.rule, counters, 0)
        self.counters = counters
        self.output = torch.zeros_like(self.queries[0])  # a launch between the schedule's and the layer's
        self.parameters = AttentionParameters(self.shape.head_size**-0.5, dtype=torch.bfloat16)

    def _inputs(self, copy: int) -> LayerInputs:
        return LayerInputs(
            self.queries[copy],
            self.caches[copy],
            self.block_table,
            self.rows,
            self.schedule,
            self.parameters,
            self.config.rule,
        )

    def _arguments(self, copy: int) -> tuple[LayerInputs, Workspace, Tensor, Tensor]:
        return self._inputs(copy), self.workspace, self.counters, self.output

    def run_full(self, copy: int) -> None:
        """A full layer."""
        ops.full_attention(*self._arguments(copy))

    def run_selection(self, copy: int) -> None:
        """A selection layer."""
        ops.selection_attention(*self._arguments(copy), self.table)

    def run_selection_attention(self, copy: int) -> None:
        """Its attention."""
        attend(*self._arguments(copy), keeps_logits=True, dependent=True)

    def run_scores(self, copy: int) -> None:
        """Its page scores."""
        ops.page_scores(self._inputs(copy), self.workspace)

    def run_select(self, copy: int) -> None:
        """Its selection."""
        workspace = self.workspace
        select_pages(
            workspace.scores,
            workspace.listed,
            self.rows,
            self.block_table,
            BLOCK,
            self.config.rule,
            self.table,
        )

    def run_sparse(self, copy: int) -> None:
        """A sparse layer."""
        ops.sparse_attention(*self._arguments(copy), self.table, same_blocks=True)

    def fa3(self, *, compact: bool) -> Callable[[int], None]:
        """FlashAttention 3 as vLLM calls it in a CUDA graph."""
        batch, device, query_len = self.case.batch, "cuda", self.rows.max_query_len
        block_table = self.compact_table if compact else self.block_table
        length = min(self.case.context, self.config.budget_tokens) if compact else self.case.context
        lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * query_len
        size = self.shape.head_size
        metadata = get_scheduler_metadata(
            batch_size=batch,
            max_seqlen_q=query_len,
            max_seqlen_k=length,
            num_heads_q=self.shape.num_heads,
            num_heads_kv=self.shape.num_kv_heads,
            headdim=size,
            cache_seqlens=lengths,
            qkv_dtype=torch.bfloat16,
            cu_seqlens_q=starts,
            page_size=BLOCK,
            causal=True,
            num_splits=FA3_SPLITS,
        )

        def run(copy: int) -> None:
            keys, values = self.caches[copy].transpose(1, 2).chunk(2, dim=-1)
            flash_attn_varlen_func(
                q=self.queries[copy],
                k=keys,
                v=values,
                out=self.output,
                cu_seqlens_q=starts,
                max_seqlen_q=query_len,
                seqused_k=lengths,
                max_seqlen_k=length,
                softmax_scale=self.parameters.scale,
                causal=True,
                block_table=block_table,
                scheduler_metadata=metadata,
                fa_version=3,
                num_splits=FA3_SPLITS,
            )

        return run
