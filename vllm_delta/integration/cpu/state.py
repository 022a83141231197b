"""What the layers of one CPU worker share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import VllmConfig

from vllm_delta.integration.cpu.metadata import DeltaCPUMetadata, LayerGroup
from vllm_delta.integration.layers import find_state, local_layers
from vllm_delta.integration.lossless import payoff_of
from vllm_delta.integration.settings import settings_of
from vllm_delta.integration.speculation import verified_tokens
from vllm_delta.integration.worker_state import Drafting, WorkerState, WrittenTable
from vllm_delta.kernels.cpu import ops
from vllm_delta.kernels.types import SelectionTable
from vllm_delta.method.counters import Counters
from vllm_delta.method.drafts import DraftPlans, PageChoice, most_choosing
from vllm_delta.method.payoff import DraftPayoff
from vllm_delta.method.rows import DecodeRows
from vllm_delta.plain.rows import row_indices


@dataclass
class CPUDrafting(Drafting):
    """What lossless speculation adds to a CPU worker."""

    payoff: DraftPayoff
    #: whether the last step was worth drafts
    pays: bool = True
    #: those of the last verification; None: all was prefill
    rows: DecodeRows | None = None
    #: int32 ``[rows]``: their lengths when their pages were chosen; 0: none were
    chosen_lengths: Tensor | None = None


@dataclass(kw_only=True)
class CPUState(WorkerState[LayerGroup]):
    """One per worker, with the kernels' scratch memory."""

    drafting: CPUDrafting | None = None

    #: see `vllm_delta.kernels.cpu.ops.allocate_workspace`
    workspace: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of memory that DELTA holds."""
        return super().nbytes + self.workspace.nbytes

    def renew(self, metadata: DeltaCPUMetadata) -> None:
        """As for any worker; rows have the budget of now."""
        super().renew(metadata)
        if metadata.rows is not None:
            metadata.rows.kept_pages.fill_(self.config.budget_pages)
            metadata.num_rows_within_budget = metadata.rows.num_within_budget(self.rule.page_size)
            needs_rows = self.aside.is_needed(self.config)
            metadata.row_indices = row_indices(metadata.rows) if needs_rows else []


def set_up(vllm_config: VllmConfig) -> CPUState:
    """The worker's state; made, and handed to all its layers, by the first builder that asks."""
    state = find_state(vllm_config)
    if state is not None:
        assert isinstance(state, CPUState)
        return state
    config = settings_of(vllm_config)
    layers = local_layers(config, vllm_config)
    scheduler, max_length = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    query_len = verified_tokens(config, vllm_config)
    # Every token of a step may be a decode row, but a sequence has no more than it may have.
    max_rows = min(scheduler.max_num_batched_tokens, scheduler.max_num_seqs * max_length)
    most_pages = config.most_kept_pages(max_length)
    sizes = {(layer.impl.num_heads, layer.impl.head_size) for layer in layers.eligible.values()}
    workspaces = [ops.allocate_workspace(max_length, *size, max_query_len=query_len) for size in sizes]
    table, drafting = None, None
    if config.lossless:
        plans, rows = DraftPlans.of(config, layers.plan), scheduler.max_num_seqs
        tables: list[WrittenTable[LayerGroup]] = [
            WrittenTable(SelectionTable.allocate(rows, most_pages))
            for _ in range(most_choosing(config, layers.plan))
        ]
        drafting = CPUDrafting(plans, tables, PageChoice(config.draft_tokens), payoff_of(vllm_config))
    if sizes and config.refreshes_pages:
        table = WrittenTable(SelectionTable.allocate(max_rows, most_pages))
    state = CPUState(
        config=config,
        plan=layers.plan,
        counters=Counters(),
        max_query_len=query_len,
        table=table,
        drafting=drafting,
        workspace=max(workspaces, key=Tensor.numel, default=torch.empty(0)),
    )
    layers.share(state)
    return state
