"""Drafts on a GPU: vLLM's model runner (V2) asks for them behind each step that verifies the last ones.

All passes that draft, with the sampling between them, are one CUDA graph for each size of a batch. Nothing in
them waits for the GPU. What they read is in `DraftBuffers`, which one kernel fills before the graph, and
another one between the passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_delta.integration.cuda.state import CUDADrafting, CUDAState
from vllm_delta.integration.layers import find_state
from vllm_delta.kernels.gpu.drafts import advance_drafts, begin_drafts


class DeltaGPUModelRunner(GPUModelRunner):  # type: ignore[misc]
    """vLLM's, with DELTA's speculator in the place of a draft model's."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.speculator = DeltaSpeculator(vllm_config, device, self)
        torch.accelerator.empty_cache()  # what the draft model's has left


class AcceptedDrafts:
    """What was accepted of drafts, told to `PageChoice` some steps later, since nothing waits for the GPU.

    How many steps later is fixed: tensor parallel ranks have to change their ways in the same step.
    """

    #: steps that are reported together, and steps that a report takes
    EVERY = 4

    def __init__(self, device: torch.device) -> None:
        self._rejected = torch.zeros(1, dtype=torch.int64, device=device)
        self._on_host = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.Event(device)
        self._rows = self._steps = 0
        self._fresh = False
        #: of a report that is under way: how the drafts were made, and their rows
        self._reported: tuple[bool, int] | None = None

    def count(self, drafting: CUDADrafting, num_drafts: int, most_drafts: int, num_rejected: Tensor) -> None:
        """Count a step's drafts; let the choice of pages know of those that are known.

        Args:
            drafting: whose choice it is.
            num_drafts: that the step has verified, of all requests.
            most_drafts: of a request.
            num_rejected: integer ``[requests]``: those that were not accepted.
        """
        if self._fresh != drafting.fresh:
            self._start(fresh=drafting.fresh)
            return  # of drafts that were made the other way
        if num_drafts:
            self._rejected += num_rejected.sum()
            self._rows += num_drafts // most_drafts
        self._steps += 1
        if self._steps < self.EVERY:
            return
        if self._reported is not None:
            while not self._copied.query():  # it has been done for long
                time.sleep(0)
            fresh, rows = self._reported
            accepted = rows * most_drafts - int(self._on_host)
            drafting.choice.observe(fresh=fresh, rows=rows, accepted=accepted)
        self._on_host.copy_(self._rejected, non_blocking=True)
        self._copied.record()
        self._reported = self._fresh, self._rows
        self._start(fresh=self._fresh)

    def _start(self, *, fresh: bool) -> None:
        self._rejected.zero_()
        self._rows = self._steps = 0
        self._fresh = fresh


class DeltaSpeculator(BaseSpeculator):  # type: ignore[misc]
    """Lets the model draft for itself, with sparse layers, over its own KV cache."""

    #: what the runner asks a speculator for
    supports_mm_inputs = False
    enable_adaptive_verification = False
    pcp_manager: Any = None

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: GPUModelRunner) -> None:
        self._vllm_config, self._device, self._runner = vllm_config, device, runner
        speculative, model = vllm_config.speculative_config, vllm_config.model_config
        self._num_drafts: int = speculative.num_speculative_tokens
        self._most_length: int = model.max_model_len
        rows = vllm_config.scheduler_config.max_num_seqs
        self._temperature = torch.zeros(rows, dtype=torch.float32, device=device)
        self._seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._steps = torch.arange(self._num_drafts, dtype=torch.int64, device=device)
        self._none = torch.full((rows, self._num_drafts), -1, dtype=torch.int64, device=device)
        #: for the rejection sampler: what drafts were sampled from, by the requests' slots
        self.draft_logits: Tensor | None = None
        if speculative.draft_sample_method == "probabilistic":
            size = rows, self._num_drafts, model.get_vocab_size()
            self.draft_logits = torch.zeros(size, dtype=model.head_dtype, device=device)
        self._frozen_graphs: CudaGraphManager | None = None
        self._fresh_graphs: CudaGraphManager | None = None
        self._accepted = AcceptedDrafts(device)

    @property
    def _drafting(self) -> CUDADrafting:
        drafting = self._state.drafting
        assert drafting is not None
        return drafting

    @property
    def _state(self) -> CUDAState:
        state = find_state(self._vllm_config)
        assert isinstance(state, CUDAState)
        return state

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Graphs of the sizes for which the model has some."""
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        arguments = self._vllm_config, self._device, mode
        self._frozen_graphs = CudaGraphManager(*arguments, decode_query_len=1)
        self._fresh_graphs = CudaGraphManager(*arguments, decode_query_len=1)

    def capture(self) -> None:
        """Capture the passes that draft, in each way that there is."""
        plans = self._drafting.plans
        for fresh, plan in ((False, plans.frozen), (True, plans.fresh)):
            if plan is not None:
                self._graphs(fresh=fresh).capture(
                    partial(self._prepare_capture, fresh=fresh), "Capturing CUDA graphs of drafts"
                )

    def _graphs(self, *, fresh: bool) -> CudaGraphManager:
        graphs = self._fresh_graphs if fresh else self._frozen_graphs
        assert graphs is not None
        return graphs

    def _prepare_capture(
        self, desc: BatchExecutionDescriptor, warmup: bool, *, fresh: bool
    ) -> Callable[[CUDAGraphMode], None]:
        """A batch of padding."""
        count = desc.num_reqs or desc.num_tokens
        buffers, tables = self._drafting.buffers, self._runner.block_tables
        buffers.lengths.zero_()
        buffers.slots.fill_(-1)
        tables.get_dummy_block_tables(count)
        tables.get_dummy_slot_mappings(count)
        metadata, slots = self._metadata(count, fresh=fresh)
        return lambda _mode: self._draft(count, metadata, slots, frozen=not fresh)

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, Tensor],
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> Tensor:
        """Draft tokens for each request of the step, int64 ``[requests, draft tokens]``; arguments as vLLM's.

        -1 for all where none are wanted; anything for requests that stay in their prompt.
        """
        count = input_batch.num_reqs
        if is_profile or skip_attn_for_dummy_run or num_speculative_tokens == 0:
            return self._none[:count]
        drafting = self._drafting
        buffers = drafting.buffers
        if not dummy_run:
            self._accepted.count(drafting, input_batch.num_draft_tokens, self._num_drafts, num_rejected)
        fresh = drafting.fresh
        self._temperature.copy_(temperature)
        self._seeds.copy_(seeds)
        slots = torch.full_like(input_batch.idx_mapping, -1) if dummy_run else input_batch.idx_mapping
        begin_drafts(
            buffers,
            last_sampled,
            slots,
            num_sampled,
            num_rejected,
            input_batch.seq_lens,
            **self._growth(frozen=not fresh),
        )
        graphs = self._graphs(fresh=fresh)
        desc = graphs.dispatch(count, count, uniform_token_count=1, num_active_loras=0)
        if desc.cg_mode == CUDAGraphMode.FULL:
            self._map_blocks()
            graphs.run_fullgraph(desc)
        else:
            with self._without_connector():
                self._draft(count, *self._metadata(count, fresh=fresh), frozen=not fresh)
        return buffers.tokens[:count]

    @contextmanager
    def _without_connector(self) -> Iterator[None]:
        """No hooks of a KV connector in the layers: what drafts write is not to be kept."""
        connector = self._runner.kv_connector
        was_disabled = getattr(connector, "_disabled", True)
        connector.set_disabled(True)
        try:
            yield
        finally:
            connector.set_disabled(was_disabled)

    def _growth(self, *, frozen: bool) -> dict[str, Any]:
        """How budgets grow with rows, see `begin_drafts`."""
        config = self._state.config
        return {
            "most_length": self._most_length,
            "budget_pages": config.budget_pages,
            "page_size": config.page_size,
            "frozen": frozen,
        }

    def _map_blocks(self) -> None:
        """Refresh the block tables of layers whose blocks are smaller than the cache's."""
        for groups in self._runner.attn_groups:
            for group in groups:
                group.map_to_kernel_block_table(
                    self._runner.block_tables.input_block_tables[group.kv_cache_group_id]
                )

    def _metadata(self, count: int, *, fresh: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What layers get, the same in all passes, and the slots of their keys and values."""
        tables, buffers = self._runner.block_tables, self._drafting.buffers
        slots = tables.slot_mappings[:, :count]
        metadata: dict[str, Any] = {}
        for index, groups in enumerate(self._runner.attn_groups):
            common = CommonAttentionMetadata(
                query_start_loc=self._starts[: count + 1],
                query_start_loc_cpu=torch.arange(count + 1, dtype=torch.int32),
                seq_lens=buffers.lengths[:count],
                num_reqs=count,
                num_actual_tokens=count,
                max_query_len=1,
                max_seq_len=self._most_length,
                block_table_tensor=tables.input_block_tables[index][:count],
                slot_mapping=slots[index],
                seq_lens_cpu_upper_bound=torch.full((count,), self._most_length, dtype=torch.int32),
                is_prefilling=torch.zeros(count, dtype=torch.bool),
            )
            for group in groups:
                of_group = group.build_metadata_for_drafting(common, draft_index=int(fresh))
                metadata.update(dict.fromkeys(group.layer_names, of_group))
        return metadata, build_slot_mappings_by_layer(slots, self._runner.kv_cache_config)

    def _draft(self, count: int, metadata: dict[str, Any], slots: dict[str, Tensor], *, frozen: bool) -> None:
        """All passes; reads and writes buffers alone, so that it can be captured."""
        buffers = self._drafting.buffers
        for step in range(self._num_drafts):
            self._runner.block_tables.compute_slot_mappings(
                buffers.slots[:count], self._starts[: count + 1], buffers.positions[:count], count
            )
            tokens = self._sample(self._logits(count, metadata, slots), step)
            advance_drafts(
                buffers,
                tokens,
                step,
                **self._growth(frozen=frozen),
            )

    def _logits(self, count: int, metadata: dict[str, Any], slots: dict[str, Tensor]) -> Tensor:
        """The model's, with sparse layers, for one token of each request."""
        buffers, model = self._drafting.buffers, self._runner.model
        with set_forward_context(
            metadata,
            self._vllm_config,
            num_tokens=count,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=slots,
            batch_descriptor=BatchDescriptor(num_tokens=count),
        ):
            hidden = model(
                input_ids=buffers.input_ids[:count],
                positions=buffers.positions[:count],
                inputs_embeds=None,
                intermediate_tensors=None,
            )
        logits: Tensor = model.compute_logits(hidden)
        return logits

    def _sample(self, logits: Tensor, step: int) -> Tensor:
        """A token for each request: the likeliest, or at the request's temperature."""
        if self.draft_logits is None:
            return logits.argmax(-1)
        buffers, count = self._drafting.buffers, len(logits)
        tokens: Tensor = gumbel_sample(
            logits,
            buffers.slots[:count],
            self._temperature,
            self._seeds,
            buffers.positions[:count],
            apply_temperature=True,
            is_drafting=True,
            logits_cache=self.draft_logits,
            logits_cache_col=self._steps[step],
            use_fp64=self._vllm_config.model_config.use_fp64_gumbel,
        )
        return tokens
