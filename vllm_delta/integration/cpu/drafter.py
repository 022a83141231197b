"""Drafts on a CPU: vLLM's model runner asks for them behind each step that verifies the last ones.

vLLM's rejection sampler takes temperature, top-k and top-p of a request for each of its drafts. On CPUs
(0.32) it then reads numbers that nobody has written: `torch.ops._C.expand_kernel_impl` writes into a copy of
its output where that holds floats. `DeltaRejectionSampler` does this step itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import RejectionSampler, rejection_sample
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_delta.integration.cpu.state import CPUDrafting, CPUState
from vllm_delta.integration.layers import find_state

#: Temperatures below it are greedy, as in vLLM's sampler.
_LEAST_TEMPERATURE = 1e-5


class DeltaRejectionSampler(RejectionSampler):  # type: ignore[misc]
    """vLLM's, with each request's temperature, top-k and top-p at all of its drafts."""

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: Tensor | None,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Sample as vLLM's; arguments and shapes as there."""
        processed = self.is_processed_logprobs_mode
        bonus = self.sampler(
            logits=logits[metadata.bonus_logits_indices],
            sampling_metadata=dataclasses.replace(sampling_metadata, max_num_logprobs=-1),
            predict_bonus_token=True,
            logprobs_mode_override="processed_logits" if processed else "raw_logits",
        )
        raw_logits = logits[metadata.target_logits_indices].float()
        target_logits = self.apply_logits_processors(raw_logits.clone(), sampling_metadata, metadata)
        if not sampling_metadata.all_greedy:
            counts = torch.tensor(metadata.num_draft_tokens)
            of_drafts = torch.arange(len(counts)).repeat_interleave(counts)
            target_logits = _constrained(target_logits, of_drafts, sampling_metadata)
        tokens = rejection_sample(
            metadata.draft_token_ids,
            metadata.num_draft_tokens,
            metadata.max_spec_len,
            metadata.cu_num_draft_tokens,
            draft_probs,
            target_logits,
            bonus.sampled_token_ids,
            sampling_metadata,
            synthetic_mode=self.synthetic_mode,
            synthetic_conditional_rates=self.synthetic_conditional_rates,
            use_fp64_gumbel=self.use_fp64_gumbel,
        )
        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            logprobs = self._get_logprobs_tensors(
                sampling_metadata.max_num_logprobs,
                metadata,
                logits,
                target_logits if processed else raw_logits,
                bonus.logprobs_tensors.logprobs,
                tokens,
            )
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)


def _constrained(logits: Tensor, requests: Tensor, metadata: SamplingMetadata) -> Tensor:
    """Logits ``[rows, vocabulary]`` under the temperature, top-k and top-p of each row's request."""
    if not len(logits):
        return logits
    assert metadata.temperature is not None
    temperature = metadata.temperature[requests]
    logits = logits / torch.where(temperature < _LEAST_TEMPERATURE, 1.0, temperature)[:, None]
    top_k, top_p = (
        None if values is None else values[requests] for values in (metadata.top_k, metadata.top_p)
    )
    constrained: Tensor = apply_top_k_top_p(logits, top_k, top_p)
    return constrained


class DeltaProposer(DraftModelProposer):  # type: ignore[misc]
    """Lets the model draft for itself, with sparse layers, over its own KV cache."""

    #: what drafts were sampled from, ``[requests, draft tokens, vocabulary]``
    _last_draft_probs: Tensor | None

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any) -> None:
        super().__init__(vllm_config, device, runner)
        self._target: Any = None
        self._runner = runner

    def load_model(self, target_model: nn.Module) -> None:
        """There is nothing to load."""
        self._target = target_model

    def initialize_attn_backend(self, *_args: Any, **_kwargs: Any) -> None:
        """The model's own groups of layers are the drafts', too."""

    def initialize_cudagraph_keys(self, *_args: Any, **_kwargs: Any) -> None:
        """No graphs on a CPU."""

    def dummy_run(self, *_args: Any, **_kwargs: Any) -> None:
        """Drafts need no warming up beside the model."""

    @torch.inference_mode()
    def propose(
        self,
        *,
        num_speculative_tokens: int,
        next_token_ids: Tensor,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        num_rejected_tokens_gpu: Tensor | None = None,
        **_unused: Any,
    ) -> list[list[int]]:
        """Draft tokens for each request of the step; none for those that stay in their prompt.

        Args:
            num_speculative_tokens: how many for each.
            next_token_ids: int32 ``[requests]``: what was sampled last.
            common_attn_metadata: of the step that has verified the last drafts.
            sampling_metadata: of the step's requests.
            num_rejected_tokens_gpu: int32 ``[requests]``: drafts that were not accepted.
        """
        self._last_draft_probs = None
        num_requests = common_attn_metadata.num_reqs
        drafts: list[list[int]] = [[] for _ in range(num_requests)]
        state = find_state(self.vllm_config)
        assert isinstance(state, CPUState) and state.drafting is not None
        if state.drafting.rows is None or not num_speculative_tokens:
            return drafts
        requests = state.drafting.rows.requests.long()
        drafting, lengths = state.drafting, common_attn_metadata.seq_lens
        if num_rejected_tokens_gpu is not None:
            lengths = lengths - num_rejected_tokens_gpu
            self._count(drafting, num_rejected_tokens_gpu)
        lengths, tokens = lengths[requests], next_token_ids[requests]
        fits = int(lengths.max()) + num_speculative_tokens <= self.max_model_len
        drafting.pays = fits and drafting.payoff.pays(lengths.tolist())
        if not drafting.pays:
            return drafts
        sampled = []
        for step in range(num_speculative_tokens):
            logits = self._logits(requests, tokens, lengths + step, step)
            sampled.append(self._sample(logits, requests, sampling_metadata))
            tokens = sampled[-1][0]
        for request, of_request in zip(
            requests.tolist(), torch.stack([tokens for tokens, _ in sampled], 1).tolist(), strict=True
        ):
            drafts[request] = of_request
        self._keep_probabilities(requests, num_requests, [part for _, part in sampled])
        return drafts

    def _count(self, drafting: CPUDrafting, rejected: Tensor) -> None:
        """Let the choice of pages know what was accepted of this step's drafts."""
        rows = drafting.rows
        assert rows is not None and rows.query_lens is not None
        whole = rows.requests[rows.query_lens == 1 + self.num_speculative_tokens].long()
        accepted = (self.num_speculative_tokens - rejected[whole]).tolist()
        drafting.choice.observe(fresh=drafting.fresh, rows=len(whole), accepted=sum(accepted))
        for of_request in accepted:
            drafting.payoff.observe(of_request)

    def _logits(self, requests: Tensor, tokens: Tensor, positions: Tensor, step: int) -> Tensor:
        """The model's, with sparse layers, for one token of each request."""
        metadata: dict[str, Any] = {}
        slots: dict[str, Tensor] = {}
        for index, groups in enumerate(self._runner.attn_groups):
            common = self._common(self._runner.input_batch.block_table[index], requests, positions)
            for group in groups:
                of_group = group.get_metadata_builder().build_for_drafting(common, step)
                metadata.update(dict.fromkeys(group.layer_names, of_group))
                slots.update(dict.fromkeys(group.layer_names, common.slot_mapping))
        count = len(requests)
        with set_forward_context(metadata, self.vllm_config, num_tokens=count, slot_mapping=slots):
            hidden = self._target(
                input_ids=tokens.int(),
                positions=positions.long(),
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        logits: Tensor = self._target.compute_logits(hidden)
        return logits

    def _common(self, table: Any, requests: Tensor, positions: Tensor) -> CommonAttentionMetadata:
        """A step of one token for each request, in the blocks of one KV cache group."""
        count, block_size = len(requests), table.block_size
        blocks = table.get_device_tensor(int(requests[-1]) + 1)[requests]
        block = blocks[torch.arange(count), positions // block_size].long()
        starts = torch.arange(count + 1, dtype=torch.int32)
        lengths = (positions + 1).int()
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=count,
            num_actual_tokens=count,
            max_query_len=1,
            max_seq_len=int(lengths.max()),
            block_table_tensor=blocks,
            slot_mapping=block * block_size + positions % block_size,
            is_prefilling=torch.zeros(count, dtype=torch.bool),
        )

    def _sample(
        self, logits: Tensor, requests: Tensor, metadata: SamplingMetadata
    ) -> tuple[Tensor, Tensor | None]:
        """A token for each request, and what it was sampled from; None where that is the likeliest token."""
        if not self._enable_probabilistic_draft_probs or metadata.all_greedy:
            return logits.argmax(-1), None
        probabilities = _constrained(logits.float(), requests, metadata).softmax(-1, dtype=torch.float32)
        noise = torch.empty_like(probabilities).exponential_()
        for row, request in enumerate(requests.tolist()):
            if request in metadata.generators:
                noise[row].exponential_(generator=metadata.generators[request])
        assert metadata.temperature is not None
        is_greedy = metadata.temperature[requests] < _LEAST_TEMPERATURE
        tokens = torch.where(is_greedy, logits.argmax(-1), (probabilities / noise).argmax(-1))
        return tokens, probabilities

    def _keep_probabilities(self, requests: Tensor, count: int, of_steps: list[Tensor | None]) -> None:
        """For the rejection sampler, by request."""
        parts = [part for part in of_steps if part is not None]
        if parts:
            kept = torch.zeros(count, len(parts), parts[0].shape[-1])
            kept[requests] = torch.stack(parts, 1)
            self._last_draft_probs = kept
