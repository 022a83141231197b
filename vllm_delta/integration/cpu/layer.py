"""Attention of one layer on a CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from vllm_delta.integration.aside import LayerCall
from vllm_delta.integration.cpu.metadata import DeltaCPUMetadata
from vllm_delta.integration.cpu.state import CPUState
from vllm_delta.integration.layers import DeltaLayer
from vllm_delta.integration.validation import check_layer
from vllm_delta.kernels.cpu import ops
from vllm_delta.kernels.limits import CPU
from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.plan import Role
from vllm_delta.method.rows import DecodeRows
from vllm_delta.plain.rows import Layer


class DeltaCPUImpl(DeltaLayer, CPUAttentionBackendImpl):  # type: ignore[misc]
    """CPU_ATTN's, and DELTA's kernels for decode rows."""

    state: CPUState | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_layer(self, CPU)

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
        attend = super().forward
        if attn_metadata is None and self.probe is not None:
            return self.probe.attend(self, layer, query, key, value, output)
        if attn_metadata is None or self.state is None:  # profiling run, before the builder exists
            attend(layer, query, key, value, kv_cache, attn_metadata, output)
            return output
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not supported by DELTA")
        counters, rows = self.state.counters, attn_metadata.rows
        if self.layer_index is None or attn_metadata.plan is None:
            reason = "sliding_window" if self.sliding_window != -1 else "not_eligible"
            counters.add_dense_rows(reason, attn_metadata.num_actual_tokens)
            attend(layer, query, key, value, kv_cache, attn_metadata, output)
            return output
        counters.add_dense_rows("prefill", attn_metadata.num_prefill_tokens)
        if rows is None:
            attend(layer, query, key, value, kv_cache, attn_metadata, output)
            return output
        if attn_metadata.prefill is not None:
            batch, metadata = attn_metadata.prefill
            part = output.new_empty((len(batch.tokens), *output.shape[1:]))
            attend(layer, query[batch.tokens], key, value, kv_cache, metadata, part)
            output[batch.tokens] = part
        role = attn_metadata.plan.roles[self.layer_index]
        self._decode(self.state, layer, role, query, kv_cache, attn_metadata, rows, output)
        return output

    def _decode(
        self,
        state: CPUState,
        layer: Any,
        role: Role,
        query: Tensor,
        kv_cache: Tensor,
        metadata: DeltaCPUMetadata,
        rows: DecodeRows,
        output: Tensor,
    ) -> None:
        """The decode rows of a layer with this role."""
        query, output = (part.view(-1, self.num_heads, self.head_size) for part in (query, output))
        # Made anew at every call: sinks are weights, which may be loaded into a running engine.
        parameters = AttentionParameters(
            self.scale, float(self.logits_soft_cap), self.sinks, layout=layer.isa
        )
        inputs = query, kv_cache, metadata.block_table, rows, parameters
        scratch = state.workspace, state.counters.of(role), output
        index = self.layer_index
        assert index is not None and metadata.plan is not None
        chooser = metadata.plan.choosers.get(index)
        aside = state.aside if metadata.row_indices else None
        if aside is not None:
            plain = Layer(query, kv_cache, metadata.block_table, parameters)
            call = LayerCall(index, role, plain, metadata.row_indices, output)
            if aside.replaces(call, state.config, state.counters):
                return
        if role is Role.FULL:
            ops.full_attention(*inputs, *scratch)
        elif role is Role.SELECTION:
            table = state.table_for_writing(metadata.step, metadata.group, chooser)
            ops.selection_attention(*inputs, state.rule, *scratch, table)
        else:
            state.counters.add_dense_rows("within_budget", metadata.num_rows_within_budget)
            table = state.table_for_reading(metadata.step, chooser).table
            ops.sparse_attention(*inputs, state.rule, *scratch, table)
            if aside is not None:
                aside.after(call, state.config, state.counters, table)
