"""Prepares each step on a CPU."""

from __future__ import annotations

import dataclasses

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_delta.integration.cpu.metadata import DeltaCPUMetadata, LayerGroup
from vllm_delta.integration.cpu.state import CPUDrafting, set_up
from vllm_delta.integration.layers import DeltaLayer
from vllm_delta.integration.validation import check_block_size, check_isa
from vllm_delta.method.drafts import grown_budgets
from vllm_delta.method.plan import Plan
from vllm_delta.method.rows import DecodeRows
from vllm_delta.method.step import PrefillBatch, Step, split_step, split_verification
from vllm_delta.plain.rows import row_indices


class DeltaCPUMetadataBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """One per KV cache group; the first one also sets up the worker's layers."""

    # A table of one group must not be reused with another group's blocks.
    supports_update_block_table = False

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.state = set_up(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        impls = [layer.impl for layer in layers if isinstance(layer.impl, DeltaLayer)]
        indices = sorted(impl.layer_index for impl in impls if impl.layer_index is not None)
        self.group = LayerGroup(tuple(indices))
        if indices:
            check_isa(self.isa)
            check_block_size(self.state.config, self.block_size)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DeltaCPUMetadata:
        """Split the batch into decode rows and prefill tokens, in groups of which a layer may be sparse."""
        common, state = common_attn_metadata, self.state
        whole = super().build(common_prefix_len, common, fast_build)
        metadata = DeltaCPUMetadata(**vars(whole), group=self.group)
        if not self.group.layers:
            return metadata
        step = self._split(common)
        metadata.plan = state.plan if state.drafting is None else self._verify(state.drafting)
        metadata.step = state.begin_step(self.group, has_rows=step.rows is not None)
        metadata.num_prefill_tokens = step.num_prefill_tokens
        if step.rows is not None:
            metadata.rows = rows = step.rows
            metadata.num_rows_within_budget = rows.num_within_budget(state.rule.page_size)
            if state.aside.is_needed(state.config):
                metadata.row_indices = row_indices(rows)
        if step.prefill is not None:
            metadata.prefill = step.prefill, self._build_prefill(common, step.prefill)
        return metadata

    def _split(self, common: CommonAttentionMetadata) -> Step:
        """The step's rows and prefill tokens."""
        state, lengths = self.state, common.seq_lens
        prompt_lens = state.prompt_lens_of(common, lengths)
        kept_pages = torch.full((common.num_reqs,), state.config.budget_pages, dtype=torch.int32)
        requests = common.query_start_loc_cpu, lengths, prompt_lens, kept_pages
        drafting = state.drafting
        if drafting is None:
            return split_step(*requests, most=state.row_query_len)
        step = split_verification(*requests, most=state.max_query_len)
        drafting.rows = step.rows
        return step

    def _verify(self, drafting: CPUDrafting) -> Plan:
        """The plan of the step that `_split` has split; chooses no pages where the next drafts need none."""
        rows, plans = drafting.rows, drafting.plans
        chooses = drafting.pays and not drafting.fresh
        if rows is not None:
            drafting.chosen_lengths = rows.lengths * chooses
        return plans.verify if chooses else plans.full

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> DeltaCPUMetadata:
        """The metadata of a pass that drafts a token for each row of the last verification.

        Requests are those that had a row, in the same order, each with one query token.
        """
        common, state = common_attn_metadata, self.state
        metadata = DeltaCPUMetadata(**vars(super().build(0, common)), group=self.group)
        drafting = state.drafting
        if not self.group.layers:
            return metadata
        assert drafting is not None and drafting.chosen_lengths is not None
        index = torch.arange(common.num_reqs, dtype=torch.int32)
        budget, lengths = state.config.budget_pages, common.seq_lens
        kept_pages = torch.full((common.num_reqs,), budget, dtype=torch.int32)
        if not drafting.fresh:
            kept_pages = grown_budgets(budget, drafting.chosen_lengths, lengths, state.rule.page_size)
        metadata.plan, metadata.step = drafting.plans.draft(fresh=drafting.fresh), state.step
        metadata.rows = rows = DecodeRows(index, index, common.seq_lens, kept_pages)
        metadata.num_rows_within_budget = rows.num_within_budget(state.rule.page_size)
        return metadata

    def _build_prefill(self, common: CommonAttentionMetadata, prefill: PrefillBatch) -> CPUAttentionMetadata:
        """CPU_ATTN's metadata for the prefill tokens of a mixed batch alone."""
        batch = dataclasses.replace(
            common,
            query_start_loc=prefill.query_start_loc,
            query_start_loc_cpu=prefill.query_start_loc,
            seq_lens=prefill.seq_lens,
            num_reqs=len(prefill.seq_lens),
            num_actual_tokens=len(prefill.tokens),
            max_query_len=prefill.max_query_len,
            max_seq_len=prefill.max_seq_len,
            block_table_tensor=common.block_table_tensor[prefill.requests],
            slot_mapping=common.slot_mapping[prefill.tokens],
        )
        return super().build(0, batch)
