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
from vllm_delta.integration.cpu.state import set_up
from vllm_delta.integration.layers import DeltaLayer
from vllm_delta.integration.validation import check_block_size, check_isa
from vllm_delta.method.step import PrefillBatch, split_step
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
        prompt_lens = state.prompt_lens_of(common, common.seq_lens)
        kept_pages = torch.full((common.num_reqs,), state.config.budget_pages, dtype=torch.int32)
        step = split_step(common.query_start_loc_cpu, common.seq_lens, prompt_lens, kept_pages)
        metadata.plan = state.plan
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
