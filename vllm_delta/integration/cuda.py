"""DELTA on CUDA GPUs: an attention backend on the classes of vLLM's FLASH_ATTN.

Prefill tokens, full layers and layers that DELTA does not make sparse go to FlashAttention as they are.
Decode rows of selection and sparse layers go to DELTA's kernels, and those of full layers where they are few,
which the kernels take less time for. Launches depend on the number of rows alone: steps of single tokens
replay full CUDA graphs, mixed steps run between piecewise ones.

What a step's layers need of the host is prepared in `DeltaCUDAMetadataBuilder.build`, which vLLM calls before
every step, also before it replays a graph; nothing there waits for the GPU. What the GPU can work out itself,
the first layer launches, so that a graph has it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.config import (
    VllmConfig,
    get_current_vllm_config,
    get_current_vllm_config_or_none,
    get_layers_from_vllm_config,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_delta.config import DeltaConfig
from vllm_delta.gpu import ops
from vllm_delta.integration.cuda_state import CudaState, layer_shape, set_up
from vllm_delta.integration.validation import check_block_size, check_cuda_layer
from vllm_delta.plan import Role
from vllm_delta.policies import make_policy
from vllm_delta.policies.rows import Layer, RowIndex
from vllm_delta.policies.run import decode_rows
from vllm_delta.recall import table_mass
from vllm_delta.step import PrefillBatch, split_step

#: FlashAttention's layers that in a step of single tokens schedule their own work, on the GPU. Once for all,
#: ahead, it takes the host's time.
MOST_SELF_SCHEDULED = 4


class DeltaCUDABackend(FlashAttentionBackend):  # type: ignore[misc]
    """What vLLM asks an attention backend for."""

    #: decode rows of DELTA's layers are written to the cache by the kernel that reads them
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        """The registered name."""
        return "DELTA"

    @staticmethod
    def get_impl_cls() -> type[DeltaCUDAImpl]:
        """The class of a layer's attention."""
        return DeltaCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[DeltaCUDAMetadataBuilder]:
        """The class that prepares each step."""
        return DeltaCUDAMetadataBuilder

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """A KV block holds whole pages."""
        vllm_config = get_current_vllm_config_or_none()
        settings = None if vllm_config is None else vllm_config.additional_config
        page_size = DeltaConfig.from_additional_config(settings).page_size
        return int(super().get_preferred_block_size(max(default_block_size, page_size)))

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """What both FlashAttention and DELTA's kernels run."""
        return bool(super().supports_head_size(head_size)) and head_size <= 256

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoder attention only."""
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_non_causal(cls) -> bool:
        """DELTA selects from a causal past."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """DELTA selects from a causal past."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """Not served."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """How rows are cut into pieces depends on the batch."""
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """The kernels take one scale per tensor."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """A mixed step is split on the CPU."""
        return False


@dataclass
class PrefillPart:
    """The prefill tokens of a mixed step and FlashAttention's metadata for them alone."""

    #: which tokens of the step: a slice where they are neighbours, as they usually are, else int64 indices
    tokens: slice | Tensor
    metadata: FlashAttentionMetadata


@dataclass
class DeltaCUDAMetadata(FlashAttentionMetadata):  # type: ignore[misc]
    """FlashAttention's metadata of the whole batch, and how DELTA splits it."""

    #: decode rows, in chunks that one launch takes, each with its schedule, which the group's first layer
    #: makes; none where all is prefill
    chunks: list[tuple[ops.DecodeRows, ops.Schedule]] = field(default_factory=list)
    #: the same rows on the host, where something runs in Python
    rows: list[RowIndex] = field(default_factory=list)
    #: of a mixed step
    prefill: PrefillPart | None = None
    #: whether all rows are their sequences' last tokens, and nothing but DELTA's kernels reads the cache, so
    #: that these may write the rows' keys and values themselves
    appends: bool = False
    #: whether DELTA's kernels run full layers, too, because they are faster there
    runs_full_layers: bool = False
    #: the builder, which stands for the KV cache group: its layers have one block table
    group: DeltaCUDAMetadataBuilder | None = None

    def has_rows_of(self, role: Role | None) -> bool:
        """Whether DELTA's kernels run the decode rows of a layer; None: it is not eligible."""
        runs_layer = self.runs_full_layers if role is Role.FULL else role is not None
        return runs_layer and bool(self.chunks)


class DeltaCUDAMetadataBuilder(FlashAttentionMetadataBuilder):  # type: ignore[misc]
    """Prepares each step, once per KV cache group."""

    # A table of one group must not be reused with another group's blocks.
    supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Full graphs for steps of single tokens; a graph of a mixed step would freeze how it is split.

        None where the attention call needs Python: for policies other than DELTA, and to measure recall.
        """
        if not DeltaConfig.from_additional_config(vllm_config.additional_config).runs_kernels_alone:
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.delta = set_up(vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        in_order = (layers[name].impl for name in sorted(layers, key=extract_layer_index))
        impls = [impl for impl in in_order if isinstance(impl, DeltaCUDAImpl)]
        self._eligible = [impl for impl in impls if impl.role is not None]
        self._sliding = sum(impl.role is None and impl.sliding_window != (-1, -1) for impl in impls)
        self._not_eligible = len(impls) - len(self._eligible) - self._sliding
        if self._eligible:
            self._shape = layer_shape(self._eligible[0])
            self._most_full_rows = ops.most_full_rows(
                self._shape, vllm_config.model_config.dtype.itemsize, device
            )
            check_block_size(self.delta.config, self.block_size)
            self._eligible[0].schedules = True
            self.delta.step_layer = self.delta.step_layer or layer_names[0]
        self._counts_steps = self.delta.step_layer == layer_names[0]
        self._few_dense = len(self._eligible) == len(impls) and self._full_layers <= MOST_SELF_SCHEDULED

    @property
    def _full_layers(self) -> int:
        return sum(impl.role is Role.FULL for impl in self._eligible)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DeltaCUDAMetadata:
        """Split the batch into decode rows and prefill tokens, and cut the rows into pieces."""
        common, state = common_attn_metadata, self.delta
        single = common.max_query_len == 1
        whole = super().build(common_prefix_len, common, fast_build or (single and self._few_dense))
        metadata = DeltaCUDAMetadata(**vars(whole), group=self)
        state.counters.add_dense_rows("sliding_window", self._sliding * common.num_actual_tokens)
        state.counters.add_dense_rows("not_eligible", self._not_eligible * common.num_actual_tokens)
        if not self._eligible:
            return metadata
        rows = self._single_token_rows(common) if single else self._split(common, metadata)
        if rows is not None:
            metadata.chunks = self._chunks(rows)
            kernels_alone = state.observer is None and state.config.runs_kernels_alone
            metadata.appends = single and kernels_alone
            metadata.runs_full_layers = metadata.appends and len(rows) <= self._most_full_rows
            if not kernels_alone:
                metadata.rows = _on_host(rows)
                if self._counts_steps:
                    state.recall.next_step(state.config.recall_sample_steps)
        return metadata

    def _single_token_rows(self, common: CommonAttentionMetadata) -> ops.DecodeRows:
        """One row per request, in buffers whose addresses a graph may keep."""
        state, count = self.delta, common.num_reqs
        state.mark_prompt_rows(self._prompt_lens(common), common)
        return ops.DecodeRows(
            tokens=common.query_start_loc[:count],
            requests=state.requests[:count],
            lengths=common.seq_lens[:count],
            dense=state.dense[:count],
        )

    def _split(self, common: CommonAttentionMetadata, metadata: DeltaCUDAMetadata) -> ops.DecodeRows | None:
        """The decode rows of a mixed step; its prefill part goes into `metadata`."""
        lengths = common.seq_lens_cpu_upper_bound  # exact for prefill, and where nothing is speculated
        prompt_lens = self._prompt_lens(common)
        count = len(prompt_lens)
        starts = common.query_start_loc_cpu[: count + 1]
        step = split_step(starts, lengths[:count], prompt_lens)
        self.delta.counters.add_dense_rows("prefill", step.num_prefill_tokens * len(self._eligible))
        if step.rows is None:
            return None
        if step.prefill is not None:
            metadata.prefill = self._prefill_part(common, step.prefill)
        rows = step.rows
        before_end = lengths[:count][rows.requests.long()] - rows.lengths
        packed = self._to_device(torch.stack([rows.tokens, rows.requests, before_end.int()]))
        tokens, requests, before_end = packed.unbind()
        return ops.DecodeRows(
            tokens=tokens,
            requests=requests,
            lengths=common.seq_lens.index_select(0, requests) - before_end,
            dense=torch.zeros_like(requests),
        )

    def _prefill_part(self, common: CommonAttentionMetadata, prefill: PrefillBatch) -> PrefillPart:
        tokens, requests = (_neighbours(index) for index in (prefill.tokens, prefill.requests))
        if not isinstance(tokens, slice):
            tokens = self._to_device(tokens)
        if not isinstance(requests, slice):
            requests = self._to_device(requests)
        batch = dataclasses.replace(
            common,
            query_start_loc=self._to_device(prefill.query_start_loc),
            query_start_loc_cpu=prefill.query_start_loc,
            seq_lens=self._to_device(prefill.seq_lens),
            seq_lens_cpu_upper_bound=prefill.seq_lens,
            num_reqs=len(prefill.seq_lens),
            num_actual_tokens=len(prefill.tokens),
            max_query_len=prefill.max_query_len,
            max_seq_len=prefill.max_seq_len,
            block_table_tensor=common.block_table_tensor[requests],
            slot_mapping=common.slot_mapping[tokens],
        )
        # fast_build: the schedule made ahead lies in one buffer, which holds the whole batch's.
        return PrefillPart(tokens, super().build(0, batch, fast_build=True))

    def _chunks(self, rows: ops.DecodeRows) -> list[tuple[ops.DecodeRows, ops.Schedule]]:
        state, shape = self.delta, self._shape
        most = state.workspace.max_rows
        return [
            (rows.slice(begin, min(begin + most, len(rows))), state.schedule(shape, index))
            for index, begin in enumerate(range(0, len(rows), most))
        ]

    def make_schedules(self, metadata: DeltaCUDAMetadata) -> None:
        """Cut a step's rows into pieces: launched by the group's first layer, for all of them."""
        state = self.delta
        counted = 0 if metadata.runs_full_layers else self._full_layers  # the kernels count their own
        for rows, schedule in metadata.chunks:
            ops.make_schedule(
                schedule,
                rows,
                self._shape,
                self.model_config.dtype.itemsize,
                state.workspace,
                state.selection,
                state.counters.of(Role.FULL),
                counted,
            )

    def _prompt_lens(self, common: CommonAttentionMetadata) -> Tensor:
        """Tokens of each prompt, int ``[requests]`` on the CPU, without padding."""
        if self.delta.prompt_lens is not None:
            prompt_lens = self.delta.prompt_lens(common)
            if prompt_lens is not None:
                return prompt_lens
        # Without DELTA's worker, and in runs that capture graphs, only vLLM's own distinction is known.
        if common.is_prefilling is None:
            raise RuntimeError("vLLM did not say which requests are in their prompt")
        count = len(common.is_prefilling)
        return torch.where(common.is_prefilling, common.seq_lens_cpu_upper_bound[:count], 0)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)


class DeltaCUDAImpl(FlashAttentionImpl):  # type: ignore[misc]
    """Attention of one layer."""

    #: set by `set_up` in the profiling run; None for a layer that is not eligible
    delta: CudaState | None = None
    role: Role | None = None
    #: whether it is the first of its KV cache group that is eligible
    schedules: bool = False
    #: whether the next eligible layer is sparse
    precedes_sparse: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_cuda_layer(attn_type=self.attn_type, alibi_slopes=self.alibi_slopes, head_size=self.head_size)
        self._vllm_config = get_current_vllm_config()
        self._parameters: ops.AttentionParameters | None = None

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
        dense = super().forward
        if attn_metadata is None:
            # The profiling run: what DELTA allocates now is counted before the KV cache is sized.
            set_up(self._vllm_config, query.device)
        elif self.schedules and attn_metadata.chunks:
            assert attn_metadata.group is not None
            attn_metadata.group.make_schedules(attn_metadata)
        appended = self._appended(key, value, attn_metadata)
        if attn_metadata is not None and appended is None and self._owns_cache(key):
            self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
        if attn_metadata is None or not attn_metadata.has_rows_of(self.role):
            result: Tensor = dense(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
            return result
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not supported by DELTA")
        if (part := attn_metadata.prefill) is not None:
            tokens = part.tokens
            attended = output[tokens]
            dense(layer, query[tokens], key, value, kv_cache, part.metadata, attended)
            if isinstance(tokens, Tensor):
                output[tokens] = attended
        self._decode(layer, query, kv_cache, attn_metadata, output, appended)
        return output

    def _owns_cache(self, key: Tensor | None) -> bool:
        """Whether the layer writes keys and values, and does not read those of another."""
        return self.kv_sharing_target_layer_name is None and key is not None

    def _appended(
        self, key: Tensor, value: Tensor, attn_metadata: DeltaCUDAMetadata | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """What this step's attention kernel writes to the cache, and where, if it does."""
        if attn_metadata is None or not (attn_metadata.appends and attn_metadata.has_rows_of(self.role)):
            return None
        if not self._owns_cache(key) or is_quantized_kv_cache(self.kv_cache_dtype):
            return None
        return key, value, attn_metadata.slot_mapping

    def _decode(
        self,
        layer: Any,
        query: Tensor,
        kv_cache: Tensor,
        attn_metadata: DeltaCUDAMetadata,
        output: Tensor,
        appended: tuple[Tensor, Tensor, Tensor] | None,
    ) -> None:
        assert self.delta is not None and self.role is not None
        state = self.delta
        if is_quantized_kv_cache(self.kv_cache_dtype):
            kv_cache = kv_cache.view(torch.float8_e4m3fn)
        if self._parameters is None:  # sinks and scales are weights, loaded after __init__
            self._parameters = self._make_parameters(layer, query, output)
        config, parameters = state.config, self._parameters
        plain = partial(_plain_layer, query, kv_cache, attn_metadata.block_table, parameters)
        recall_layer = extract_layer_index(layer.layer_name) if state.recall.active else None
        if state.observer is not None and self.role is Role.SELECTION:
            state.observer(extract_layer_index(layer.layer_name), plain(), attn_metadata.rows)
        if config.policy != "delta":
            decode_rows(
                make_policy(config),
                self.role,
                plain(),
                attn_metadata.rows,
                state.chosen,
                state.counters,
                output,
                recall_layer,
            )
            return
        counters = state.counters.of(self.role)
        joined = state.side is not None and state.side.join()
        # Only where the next layer joins it; several chunks share one workspace.
        side = state.side if self.precedes_sparse and len(attn_metadata.chunks) == 1 else None
        just_scheduled = self.schedules or joined
        begin = 0
        for rows, schedule in attn_metadata.chunks:
            inputs = ops.LayerInputs(
                query, kv_cache, attn_metadata.block_table, rows, schedule, parameters, appended
            )
            table = state.table.slice(begin, begin + len(rows))
            arguments = inputs, state.workspace, state.selection, counters, output
            if self.role is Role.FULL:
                ops.full_attention(*arguments, just_scheduled=just_scheduled)
            elif self.role is Role.SELECTION:
                ops.selection_attention(*arguments, table, just_scheduled=just_scheduled, side=side)
            else:
                same_blocks = state.table_group is attn_metadata.group
                ops.sparse_attention(
                    *arguments, table, same_blocks=same_blocks, just_scheduled=just_scheduled
                )
            begin += len(rows)
        if self.role is Role.SELECTION:
            state.table_group = attn_metadata.group
        elif recall_layer is not None:
            indices = attn_metadata.rows
            mass = table_mass(plain(), indices, state.table.pages, config.page_size, config.budget_pages)
            state.counters.add_recall(recall_layer, *mass)

    def _make_parameters(self, layer: Any, query: Tensor, output: Tensor) -> ops.AttentionParameters:
        scales = None
        if is_quantized_kv_cache(self.kv_cache_dtype):
            # vLLM quantises the query where FlashAttention wants it so.
            q_scale = layer._q_scale if query.dtype.itemsize == 1 else torch.ones_like(layer._q_scale)
            scales = q_scale, layer._k_scale, layer._v_scale
        return ops.AttentionParameters(
            self.scale, output.dtype, float(self.logits_soft_cap), self.sinks, scales
        )


def _plain_layer(
    query: Tensor, kv_cache: Tensor, block_table: Tensor, parameters: ops.AttentionParameters
) -> Layer:
    """A layer as policies and recall read it, in plain PyTorch."""
    return Layer(
        query,
        kv_cache,
        block_table,
        parameters.scale,
        parameters.softcap,
        parameters.sinks,
        scales=parameters.scales,
    )


def _on_host(rows: ops.DecodeRows) -> list[RowIndex]:
    """The rows where Python can read them, which waits for the GPU."""
    columns = torch.stack([rows.tokens, rows.requests, rows.lengths, rows.dense]).tolist()
    return [
        RowIndex(token, request, length, bool(dense))
        for token, request, length, dense in zip(*columns, strict=True)
    ]


def _neighbours(indices: Tensor) -> slice | Tensor:
    """A slice for ascending indices without gaps, else the indices."""
    first, last = int(indices[0]), int(indices[-1])
    if last - first + 1 == len(indices) and bool((indices.diff() == 1).all()):
        return slice(first, last + 1)
    return indices
