"""Attention of one layer on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_delta.integration.aside import LayerCall
from vllm_delta.integration.cuda.metadata import DeltaCUDAMetadata
from vllm_delta.integration.cuda.state import CUDAState, set_up
from vllm_delta.integration.layers import DeltaLayer
from vllm_delta.integration.validation import check_layer
from vllm_delta.kernels.gpu import ops
from vllm_delta.kernels.gpu.layer import LayerInputs
from vllm_delta.kernels.limits import GPU
from vllm_delta.kernels.types import SelectionTable
from vllm_delta.method.attention import AttentionParameters
from vllm_delta.method.plan import Role
from vllm_delta.plain.rows import Layer

#: Keys, values and slots of a step's tokens, see `LayerInputs`.
Appended = tuple[Tensor, Tensor, Tensor]


class DeltaCUDAImpl(DeltaLayer, FlashAttentionImpl):  # type: ignore[misc]
    """FlashAttention's, and DELTA's kernels for decode rows."""

    state: CUDAState | None
    #: the factor of a query that is not quantised
    _one: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_layer(self, GPU)
        self._vllm_config = get_current_vllm_config()

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: DeltaCUDAMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Compute the layer's attention into `output`; arguments and shapes as in FLASH_ATTN."""
        attend = super().forward
        if attn_metadata is None and self.probe is not None:
            return self.probe.attend(self, layer, query, key, value, output)
        if attn_metadata is None:
            # The profiling run: what DELTA allocates now is counted before the KV cache is sized.
            set_up(self._vllm_config, query.device)
        role = None if attn_metadata is None else attn_metadata.role_of(self.layer_index)
        if attn_metadata is not None and attn_metadata.schedules_before(self.layer_index):
            self._make_schedules(attn_metadata)
        appended = (
            None if attn_metadata is None or role is None else self._appended(key, value, attn_metadata)
        )
        if attn_metadata is not None and appended is None and self._owns_cache(key):
            self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
        if attn_metadata is None or role is None:
            result: Tensor = attend(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
            return result
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not supported by DELTA")
        if (part := attn_metadata.prefill) is not None:
            tokens = part.tokens
            attended = output[tokens]
            attend(layer, query[tokens], key, value, kv_cache, part.metadata, attended)
            if isinstance(tokens, Tensor):
                output[tokens] = attended
        self._decode(layer, role, query, kv_cache, attn_metadata, output, appended)
        return output

    def _make_schedules(self, metadata: DeltaCUDAMetadata) -> None:
        """Launched by the group's first layer, for all of them."""
        assert self.state is not None and metadata.plan is not None and metadata.group.shape is not None
        full_layers = metadata.plan.count(Role.FULL, metadata.group.layers)
        counted = 0 if metadata.runs_full_layers else full_layers  # the kernels count their own
        self.state.make_schedules(metadata.launches, metadata.group.shape, counted)

    def _owns_cache(self, key: Tensor | None) -> bool:
        """Whether the layer writes keys and values, and does not read those of another."""
        return self.kv_sharing_target_layer_name is None and key is not None

    def _appended(self, key: Tensor, value: Tensor, metadata: DeltaCUDAMetadata) -> Appended | None:
        """What this step's attention kernel writes to the cache, and where, if it does."""
        quantized = is_quantized_kv_cache(self.kv_cache_dtype)
        if not metadata.appends or not self._owns_cache(key) or quantized:
            return None
        return key, value, metadata.slot_mapping

    def _decode(
        self,
        layer: Any,
        role: Role,
        query: Tensor,
        kv_cache: Tensor,
        metadata: DeltaCUDAMetadata,
        output: Tensor,
        appended: Appended | None,
    ) -> None:
        """The decode rows of a layer with this role."""
        assert self.state is not None and self.layer_index is not None
        if is_quantized_kv_cache(self.kv_cache_dtype):
            kv_cache = kv_cache.view(torch.float8_e4m3fn)
        parameters = self._parameters(layer, query, output)
        attention = Layer(query, kv_cache, metadata.block_table, parameters)
        decode(self.state, metadata, self.layer_index, role, attention, output, appended)

    def _parameters(self, layer: Any, query: Tensor, output: Tensor) -> AttentionParameters:
        """Made anew in every call: sinks and scales are weights, which may be loaded while it runs."""
        scales = None
        if is_quantized_kv_cache(self.kv_cache_dtype):
            # vLLM quantises the query where FlashAttention wants it so.
            q_scale = layer._q_scale if query.dtype.itemsize == 1 else self._no_scale(layer)
            scales = q_scale, layer._k_scale, layer._v_scale
        return AttentionParameters(
            self.scale, float(self.logits_soft_cap), self.sinks, dtype=output.dtype, scales=scales
        )

    def _no_scale(self, layer: Any) -> Tensor:
        if self._one is None:
            self._one = torch.ones_like(layer._q_scale)
        return self._one


def decode(
    state: CUDAState,
    metadata: DeltaCUDAMetadata,
    layer_index: int,
    role: Role,
    layer: Layer,
    output: Tensor,
    appended: Appended | None = None,
) -> None:
    """A layer's decode rows, by DELTA's kernels or by what stands in for them.

    Args:
        state: of the worker.
        metadata: of the step.
        layer_index: the model's.
        role: what the layer does.
        layer: what is read; its cache in the type of its numbers.
        output: ``[tokens, num_heads, head_size]``; the rows' tokens are written.
        appended: see `LayerInputs`.

    Raises:
        RuntimeError: a sparse layer for which no selection layer has chosen.
    """
    aside = state.aside if metadata.row_indices else None
    call = LayerCall(layer_index, role, layer, metadata.row_indices, output)
    if aside is not None and aside.replaces(call, state.config, state.counters):
        return
    assert metadata.plan is not None
    table, same_blocks, chooser = None, False, metadata.plan.choosers.get(layer_index)
    if role is Role.SELECTION:
        table = state.table_for_writing(metadata.step, metadata.group, chooser)
    elif role is Role.SPARSE:
        written = state.table_for_reading(metadata.step, chooser)
        table, same_blocks = written.table, written.group == metadata.group
    _launch(state, metadata, call, table, appended, same_blocks=same_blocks)
    if aside is not None and table is not None:
        aside.after(call, state.config, state.counters, table)


def _launch(
    state: CUDAState,
    metadata: DeltaCUDAMetadata,
    call: LayerCall,
    table: SelectionTable | None,
    appended: Appended | None,
    *,
    same_blocks: bool,
) -> None:
    """DELTA's kernels, for one launch of rows after another."""
    assert metadata.plan is not None and state.workspace is not None
    joined = state.side is not None and state.side.join()
    just_scheduled = joined or metadata.schedules_before(call.index)
    # Only where the next layer joins it; several launches share one workspace.
    beside = call.index in metadata.plan.before_sparse and len(metadata.launches) == 1
    layer, begin = call.layer, 0
    for launch in metadata.launches:
        inputs = LayerInputs(
            layer.query,
            layer.kv_cache,
            layer.block_table,
            launch.rows,
            launch.schedule,
            layer.parameters,
            state.rule,
            appended,
        )
        arguments = inputs, state.workspace, state.counters.of(call.role), call.output
        if table is None:
            ops.full_attention(*arguments, just_scheduled=just_scheduled)
            continue
        part = table.slice(begin, begin + len(launch.rows))
        begin += len(launch.rows)
        if call.role is Role.SELECTION:
            side = state.side if beside else None
            ops.selection_attention(*arguments, part, just_scheduled=just_scheduled, side=side)
        else:
            ops.sparse_attention(*arguments, part, same_blocks=same_blocks, just_scheduled=just_scheduled)
