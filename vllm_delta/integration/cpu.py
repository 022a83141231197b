"""DELTA on the CPU: an attention backend on the classes of vLLM's CPU_ATTN.

Prefill tokens, and layers that DELTA does not make sparse, go to CPU_ATTN as they are. Decode rows of the
other layers go to DELTA's kernels, by the layer's role.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_delta import ops
from vllm_delta.config import DeltaConfig
from vllm_delta.integration.layers import find_state, is_eligible, local_layers
from vllm_delta.integration.state import DeltaState
from vllm_delta.integration.validation import (
    check_block_size,
    check_isa,
    check_layer,
)
from vllm_delta.ops import AttentionParameters, Rows, SelectionTable
from vllm_delta.plan import Role
from vllm_delta.policies import make_policy
from vllm_delta.policies.rows import Layer, RowIndex
from vllm_delta.policies.run import decode_rows
from vllm_delta.recall import table_mass
from vllm_delta.step import PrefillBatch, split_step


class DeltaCPUBackend(CPUAttentionBackend):  # type: ignore[misc]
    """What vLLM asks an attention backend for."""

    @staticmethod
    def get_name() -> str:
        """The registered name."""
        return "DELTA"

    @staticmethod
    def get_impl_cls() -> type[DeltaCPUImpl]:
        """The class of a layer's attention."""
        return DeltaCPUImpl

    @staticmethod
    def get_builder_cls() -> type[DeltaCPUMetadataBuilder]:
        """The class that prepares each step."""
        return DeltaCPUMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Also what CPU_ATTN runs in its "vec16" layout, see `platform.choose_block_size`."""
        return [MultipleOf(16)]

    @classmethod
    def supports_non_causal(cls) -> bool:
        """DELTA selects from a causal past."""
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoder attention only."""
        return bool(attn_type == AttentionType.DECODER)


@dataclass
class DeltaCPUMetadata(CPUAttentionMetadata):  # type: ignore[misc]
    """CPU_ATTN's metadata of the whole batch, and how DELTA splits it."""

    #: decode rows; None where the whole batch is prefill
    rows: Rows | None = None
    #: of a mixed batch, the prefill tokens and CPU_ATTN's metadata for them alone
    prefill: tuple[PrefillBatch, CPUAttentionMetadata] | None = None
    num_prefill_tokens: int = 0
    #: decode rows whose sequence fits the budget
    num_rows_within_budget: int = 0


class DeltaCPUMetadataBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Prepares each step, once per KV cache group; the first one also sets up the worker's layers."""

    # A table of one group must not be reused with another group's blocks.
    supports_update_block_table = False

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.delta = _shared_state(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        if any(isinstance(layer.impl, DeltaCPUImpl) and is_eligible(layer) for layer in layers.values()):
            check_isa(self.isa)
            check_block_size(self.delta.config, self.block_size)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DeltaCPUMetadata:
        """Split the batch into decode rows and prefill tokens."""
        common = common_attn_metadata
        whole = super().build(common_prefix_len, common, fast_build)
        metadata = DeltaCPUMetadata(**vars(whole))
        step = split_step(common.query_start_loc_cpu, common.seq_lens, self._prompt_lens(common))
        metadata.num_prefill_tokens = step.num_prefill_tokens
        if step.rows is not None:
            metadata.rows = self.delta.share_rows(step.rows)
            budget_tokens = self.delta.config.budget_tokens
            metadata.num_rows_within_budget = int((step.rows.lengths <= budget_tokens).sum())
        if step.prefill is not None:
            prefill = step.prefill
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
            metadata.prefill = prefill, super().build(0, batch, fast_build)
        return metadata

    def _prompt_lens(self, common: CommonAttentionMetadata) -> Tensor:
        if self.delta.prompt_lens is not None:
            return self.delta.prompt_lens(common.num_reqs)
        # Without DELTA's worker, only vLLM's own distinction is known: a chunk that starts in the prompt is
        # prefill as a whole.
        if common.is_prefilling is None:
            raise RuntimeError("vLLM did not say which requests are in their prompt")
        return torch.where(common.is_prefilling, common.seq_lens, 0)


class DeltaCPUImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """Attention of one layer."""

    #: set by the metadata builder, before the first step; None for a layer that is not eligible
    delta: DeltaState | None = None
    role: Role | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_layer(
            attn_type=self.attn_type,
            alibi_slopes=self.alibi_slopes,
            kv_cache_dtype=self.kv_cache_dtype,
            head_size=self.head_size,
        )
        self._parameters: AttentionParameters | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: DeltaCPUMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Compute the layer's attention into `output`; arguments and shapes as in CPU_ATTN."""
        dense = super().forward
        if attn_metadata is None or self.delta is None:  # profiling run, before the builder exists
            dense(layer, query, key, value, kv_cache, attn_metadata, output)
            return output
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not supported by DELTA")
        state, rows = self.delta, attn_metadata.rows
        if self.role is None:
            reason = "sliding_window" if self.sliding_window != -1 else "not_eligible"
            state.counters.add_dense_rows(reason, attn_metadata.num_actual_tokens)
            dense(layer, query, key, value, kv_cache, attn_metadata, output)
            return output
        state.counters.add_dense_rows("prefill", attn_metadata.num_prefill_tokens)
        if rows is None:
            dense(layer, query, key, value, kv_cache, attn_metadata, output)
            return output
        if attn_metadata.prefill is not None:
            batch, metadata = attn_metadata.prefill
            part = output.new_empty((len(batch.tokens), *output.shape[1:]))
            dense(layer, query[batch.tokens], key, value, kv_cache, metadata, part)
            output[batch.tokens] = part
        self._decode(state, layer, query, kv_cache, attn_metadata, rows, output)
        return output

    def _decode(
        self,
        state: DeltaState,
        layer: Any,
        query: Tensor,
        kv_cache: Tensor,
        attn_metadata: DeltaCPUMetadata,
        rows: Rows,
        output: Tensor,
    ) -> None:
        assert self.role is not None
        if self._parameters is None:  # the sinks are weights, loaded after __init__
            sinks = None if self.sinks is None else self.sinks.float().contiguous()
            self._parameters = AttentionParameters(self.scale, layer.isa, float(self.logits_soft_cap), sinks)
        query, output = (part.view(-1, self.num_heads, self.head_size) for part in (query, output))
        config, parameters = state.config, self._parameters
        plain = partial(_plain_layer, query, kv_cache, attn_metadata.block_table, parameters)
        recall_layer = extract_layer_index(layer.layer_name) if state.recall.active else None
        if state.observer is not None and self.role is not Role.SPARSE:
            state.observer(extract_layer_index(layer.layer_name), plain(), _row_indices(rows))
        if config.policy != "delta" and self.role is not Role.FULL:
            decode_rows(
                make_policy(config),
                self.role,
                plain(),
                _row_indices(rows),
                state.chosen,
                state.counters,
                output,
                recall_layer,
            )
            return
        arguments = (
            query,
            kv_cache,
            attn_metadata.block_table,
            rows,
            parameters,
            state.workspace,
            state.counters.of(self.role),
            output,
        )
        if self.role is Role.FULL:
            ops.full_attention(*arguments)
        elif self.role is Role.SELECTION:
            ops.selection_attention(
                *arguments,
                state.table_for_writing(rows),
                page_size=config.page_size,
                budget_pages=config.budget_pages,
                recent_pages=config.recent_pages,
                sink_pages=config.sink_pages,
            )
        else:
            state.counters.add_dense_rows("within_budget", attn_metadata.num_rows_within_budget)
            table = state.table_for_reading(rows)
            ops.sparse_attention(*arguments, table, page_size=config.page_size)
            if recall_layer is not None:
                indices = _row_indices(rows)
                mass = table_mass(plain(), indices, table.pages, config.page_size, config.budget_pages)
                state.counters.add_recall(recall_layer, *mass)


def _plain_layer(
    query: Tensor, kv_cache: Tensor, block_table: Tensor, parameters: AttentionParameters
) -> Layer:
    """A layer as policies and recall read it, in plain PyTorch."""
    return Layer(
        query,
        kv_cache,
        block_table,
        parameters.scale,
        parameters.softcap,
        parameters.sinks,
        parameters.layout,
    )


def _row_indices(rows: Rows) -> list[RowIndex]:
    columns = (rows.tokens, rows.requests, rows.lengths)
    return [RowIndex(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _shared_state(vllm_config: VllmConfig) -> DeltaState:
    """The worker's state; made, and handed to all its layers, by the first builder that asks."""
    state: DeltaState | None = find_state(vllm_config)
    if state is not None:
        return state
    config = DeltaConfig.from_additional_config(vllm_config.additional_config)
    layers = local_layers(config, vllm_config, DeltaCPUImpl)
    max_rows = vllm_config.scheduler_config.max_num_batched_tokens
    max_length = vllm_config.model_config.max_model_len
    sizes = {(layer.impl.num_heads, layer.impl.head_size) for layer in layers.eligible.values()}
    workspaces = [ops.allocate_workspace(max_length, *size) for size in sizes]
    state = DeltaState(
        config=config,
        plan=layers.plan,
        table=SelectionTable.allocate(max_rows, config.budget_pages),
        workspace=max(workspaces, key=Tensor.numel),
    )
    layers.share(state)
    return state
