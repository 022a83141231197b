"""Prepares each step on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

from vllm_delta.integration.cuda.metadata import DeltaCUDAMetadata, LayerGroup, PrefillPart
from vllm_delta.integration.cuda.state import CUDADrafting, layer_shape, set_up
from vllm_delta.integration.layers import DeltaLayer
from vllm_delta.integration.settings import settings_of
from vllm_delta.integration.speculation import verified_tokens
from vllm_delta.integration.validation import check_block_size
from vllm_delta.kernels.gpu.ops import most_full_rows
from vllm_delta.kernels.gpu.shape import LayerShape
from vllm_delta.method.plan import Plan, Role
from vllm_delta.method.rows import DecodeRows
from vllm_delta.method.step import PrefillBatch, split_step, split_verification
from vllm_delta.plain.rows import row_indices

#: FlashAttention's layers that in a step of single tokens schedule their own work, on the GPU. Once for all,
#: ahead, it takes the host's time.
MOST_SELF_SCHEDULED = 4


class DeltaCUDAMetadataBuilder(FlashAttentionMetadataBuilder):  # type: ignore[misc]
    """One per KV cache group."""

    # A table of one group must not be reused with another group's blocks.
    supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Full graphs for steps in which all requests have one token, or their drafts to verify.

        A graph of a mixed step would freeze how it is split.

        None where the attention call needs Python: for policies other than DELTA, and to measure recall.
        """
        settings = settings_of(vllm_config)
        if not settings.runs_kernels_alone:
            return AttentionCGSupport.NEVER
        if verified_tokens(settings, vllm_config) > 1:
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.state = set_up(vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        impls = [layer.impl for layer in layers if isinstance(layer.impl, DeltaLayer)]
        eligible = {impl.layer_index: impl for impl in impls if impl.layer_index is not None}
        others = [impl for impl in impls if impl.layer_index is None]
        self._sliding = sum(impl.sliding_window != (-1, -1) for impl in others)
        self._not_eligible = len(others) - self._sliding
        self.group = LayerGroup(tuple(sorted(eligible)))
        self._counted_plan: Plan | None = None
        self._full_layers = 0
        if eligible:
            shape = layer_shape(next(iter(eligible.values())))
            self.group = LayerGroup(self.group.layers, shape)
            self._most_full_rows = most_full_rows(shape, self.state.itemsize, device)
            check_block_size(self.state.config, self.block_size)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DeltaCUDAMetadata:
        """Split the batch into decode rows and prefill tokens, and the rows into launches."""
        common, state = common_attn_metadata, self.state
        if state.drafting is not None:
            return self._build_verification(common_prefix_len, common, state.drafting, fast_build)
        single, uniform = common.max_query_len == 1, self._is_uniform(common)
        whole = super().build(
            common_prefix_len, common, fast_build or (uniform and self._has_few_of_vllm(state.plan))
        )
        metadata = DeltaCUDAMetadata(**vars(whole), group=self.group)
        self._count_dense(common)
        if self.group.shape is None:
            return metadata
        metadata.plan = state.plan
        prompt_lens = state.prompt_lens_of(common, common.seq_lens_cpu_upper_bound)
        if uniform:
            rows: DecodeRows | None = state.uniform_rows(common, prompt_lens)
        else:
            rows, metadata.prefill = self._split(common, prompt_lens)
        metadata.step = state.begin_step(self.group, has_rows=rows is not None)
        if rows is not None:
            self._add_rows(metadata, rows, self.group.shape, single=single)
        return metadata

    def _is_uniform(self, common: CommonAttentionMetadata) -> bool:
        """Whether every request has one token, or drafts to verify, and as many as any."""
        query_len = int(common.max_query_len)
        if query_len == 1:
            return True
        tokens = query_len * int(common.num_reqs)
        return query_len == self.state.row_query_len and int(common.num_actual_tokens) == tokens

    def _count_dense(self, common: CommonAttentionMetadata) -> None:
        """Count what layers that are never sparse compute."""
        counters, tokens = self.state.counters, common.num_actual_tokens
        counters.add_dense_rows("sliding_window", self._sliding * tokens)
        counters.add_dense_rows("not_eligible", self._not_eligible * tokens)

    def _build_verification(
        self, common_prefix_len: int, common: CommonAttentionMetadata, drafting: CUDADrafting, fast: bool
    ) -> DeltaCUDAMetadata:
        """The metadata of a step that verifies drafts: full attention, and pages for the next drafts.

        Where no request has drafts, vLLM's own attention computes the step, and none are chosen.
        """
        verifies = common.max_query_len > 1 and self._is_uniform(common)
        few = verifies and self._has_few_of_vllm(drafting.plans.verify)
        whole = super().build(common_prefix_len, common, fast or few)
        metadata = DeltaCUDAMetadata(**vars(whole), group=self.group)
        self._count_dense(common)
        chosen, count = drafting.buffers.chosen_lengths, common.num_reqs
        if self.group.shape is None:
            return metadata
        metadata.plan = drafting.plans.verify
        rows = None
        if not self.state.config.freezes_pages:
            pass  # vLLM's own attention computes the step
        elif verifies:
            rows = self.state.verification_rows(common)
            chosen[:count].copy_(rows.lengths)
        elif common.max_query_len == 1:
            chosen[:count].zero_()
        else:
            rows = self._rows_of_mixed(common)
            chosen[:count].copy_(rows.lengths)
            metadata.prefill = PrefillPart(slice(0, common.num_actual_tokens), whole)
        metadata.step = self.state.begin_step(self.group, has_rows=rows is not None)
        if rows is not None:
            metadata.launches = self.state.cut(rows, self.group.shape)
        return metadata

    def _rows_of_mixed(self, common: CommonAttentionMetadata) -> DecodeRows:
        """A row for each request of a mixed step; padding for those that stay in their prompt."""
        count, most = common.num_reqs, self.state.max_query_len
        lengths = common.seq_lens_cpu_upper_bound[:count]
        prompt_lens = self.state.prompt_lens_of(common, lengths)
        budgets = torch.full((len(prompt_lens),), self.state.config.budget_pages, dtype=torch.int32)
        starts = common.query_start_loc_cpu[: len(prompt_lens) + 1]
        step = split_verification(starts, lengths[: len(prompt_lens)], prompt_lens, budgets, most)
        packed = torch.zeros(3, count, dtype=torch.int32)
        if step.rows is not None:
            of_request = step.rows.requests.long()
            packed[0, of_request] = step.rows.tokens
            assert step.rows.query_lens is not None
            packed[1, of_request] = step.rows.query_lens
            packed[2, of_request] = 1
        tokens, query_lens, generates = self._to_device(packed).unbind()
        return DecodeRows(
            tokens=tokens,
            requests=self.state.requests[:count],
            lengths=common.seq_lens[:count] * generates,
            kept_pages=self.state.kept_pages[:count],
            query_lens=query_lens.clamp(min=1),
            max_query_len=most,
        )

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> DeltaCUDAMetadata:
        """The metadata of a pass that drafts a token for each request, the same for all passes.

        `draft_index` says whether selection layers choose pages in it.
        """
        common, state = common_attn_metadata, self.state
        metadata = DeltaCUDAMetadata(**vars(super().build(0, common, fast_build=True)), group=self.group)
        if self.group.shape is not None:
            assert state.drafting is not None
            metadata.plan = state.drafting.plans.draft(fresh=bool(draft_index))
            metadata.step = state.step
            metadata.launches = state.cut(state.draft_rows(common), self.group.shape)
            metadata.appends = metadata.runs_full_layers = True
        return metadata

    def _has_few_of_vllm(self, plan: Plan) -> bool:
        """Whether vLLM runs so few layers of a uniform step that they schedule themselves."""
        if self._sliding + self._not_eligible:
            return False
        if self._counted_plan is not plan:  # counted once, not in every step
            self._counted_plan = plan
            self._full_layers = self._counted_plan.count(Role.FULL, self.group.layers)
        return self._full_layers <= MOST_SELF_SCHEDULED

    def _add_rows(
        self, metadata: DeltaCUDAMetadata, rows: DecodeRows, shape: LayerShape, *, single: bool
    ) -> None:
        metadata.launches = self.state.cut(rows, shape)
        if self.state.aside.is_needed(self.state.config):
            metadata.row_indices = row_indices(rows)
        else:
            metadata.appends = single
            metadata.runs_full_layers = single and len(rows) <= self._most_full_rows

    def _split(
        self, common: CommonAttentionMetadata, prompt_lens: Tensor
    ) -> tuple[DecodeRows | None, PrefillPart | None]:
        """The decode rows of a mixed step, and its prefill part where there are rows, too."""
        lengths = common.seq_lens_cpu_upper_bound  # exact for prefill, and where nothing is speculated
        count = len(prompt_lens)
        kept_pages = torch.full((count,), self.state.config.budget_pages, dtype=torch.int32)
        most, starts = self.state.row_query_len, common.query_start_loc_cpu[: count + 1]
        step = split_step(starts, lengths[:count], prompt_lens, kept_pages, most)
        self.state.counters.add_dense_rows("prefill", step.num_prefill_tokens * len(self.group.layers))
        if step.rows is None:
            return None, None
        rows = step.rows
        before_end = (lengths[:count][rows.requests.long()] - rows.lengths).int()
        columns = [rows.tokens, rows.requests, before_end, rows.kept_pages]
        if rows.query_lens is not None:
            columns.append(rows.query_lens)
        tokens, requests, before_end, kept_pages, *others = self._to_device(torch.stack(columns)).unbind()
        lengths = common.seq_lens.index_select(0, requests) - before_end
        query_lens = others[0] if others else None
        prefill = None if step.prefill is None else self._prefill_part(common, step.prefill)
        return DecodeRows(tokens, requests, lengths, kept_pages, query_lens, most), prefill

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

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _neighbours(indices: Tensor) -> slice | Tensor:
    """A slice for ascending indices without gaps, else the indices."""
    first, last = int(indices[0]), int(indices[-1])
    if last - first + 1 == len(indices) and bool((indices.diff() == 1).all()):
        return slice(first, last + 1)
    return indices
