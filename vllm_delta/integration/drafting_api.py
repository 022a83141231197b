"""What lossless speculation relies on in vLLM, most of it private, and a check of it when a server starts.

A version of vLLM in which something moved does without this mode, by name; DELTA alone goes on.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping

from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.version import __version__ as vllm_version

from vllm_delta.method.config import DeltaConfigError

#: Functions and the names of all their parameters: of what drafts for the model runner V1, on CPUs, ...
PROPOSER_SIGNATURES = {
    "vllm.v1.spec_decode.draft_model.DraftModelProposer.__init__": "self vllm_config device runner",
    "vllm.v1.spec_decode.draft_model.DraftModelProposer.propose": (
        "self num_speculative_tokens target_token_ids target_positions target_hidden_states next_token_ids "
        "token_indices_to_sample common_attn_metadata sampling_metadata mm_embed_inputs "
        "num_rejected_tokens_gpu slot_mappings"
    ),
    "vllm.v1.spec_decode.draft_model.DraftModelProposer.take_last_draft_probs": "self",
}

#: ... of its sampler, which serves n-gram speculation, too, ...
SAMPLER_SIGNATURES = {
    "vllm.v1.sample.rejection_sampler.RejectionSampler.forward": (
        "self metadata draft_probs logits sampling_metadata"
    ),
    "vllm.v1.sample.rejection_sampler.RejectionSampler.apply_logits_processors": (
        "self logits sampling_metadata metadata"
    ),
    "vllm.v1.sample.rejection_sampler.rejection_sample": (
        "draft_token_ids num_draft_tokens max_spec_len cu_num_draft_tokens draft_probs target_logits "
        "bonus_token_ids sampling_metadata synthetic_mode synthetic_conditional_rates use_fp64_gumbel"
    ),
    "vllm.v1.sample.ops.topk_topp_sampler.apply_top_k_top_p": "logits k p",
}

#: ... and of V2 on GPUs, with its schedulers.
CUDA_SIGNATURES = {
    "vllm.v1.worker.gpu_worker.Worker._make_model_runner": "self",
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.__init__": "self vllm_config device",
    "vllm.v1.worker.gpu.spec_decode.speculator.BaseSpeculator.init_cudagraph_manager": "self cudagraph_mode",
    "vllm.v1.worker.gpu.spec_decode.speculator.BaseSpeculator.capture": "self",
    "vllm.v1.worker.gpu.spec_decode.speculator.BaseSpeculator.propose": (
        "self input_batch attn_metadata slot_mappings last_hidden_states aux_hidden_states num_sampled "
        "num_rejected last_sampled next_prefill_tokens temperature seeds dp_sync_state dummy_run "
        "skip_attn_for_dummy_run mm_inputs is_profile num_speculative_tokens"
    ),
    "vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.__init__": (
        "self vllm_config device cudagraph_mode decode_query_len lora_capture_cases varlen_decode "
        "ubatch_runner"
    ),
    "vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.capture": "self create_forward_fn progress_bar_desc",
    "vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.dispatch": (
        "self num_reqs num_tokens uniform_token_count num_active_loras max_query_len num_ubatches"
    ),
    "vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.run_fullgraph": "self desc",
    "vllm.v1.worker.gpu.block_table.BlockTables.compute_slot_mappings": (
        "self idx_mapping query_start_loc positions num_tokens_padded out"
    ),
    "vllm.v1.worker.gpu.sample.gumbel.gumbel_sample": (
        "logits expanded_idx_mapping temperature seed pos apply_temperature is_drafting logits_cache "
        "logits_cache_col use_fp64 logits_cache_source"
    ),
    "vllm.v1.worker.gpu.attn_utils.build_slot_mappings_by_layer": "slot_mappings kv_cache_config",
    "vllm.v1.worker.utils.AttentionGroup.build_metadata_for_drafting": (
        "self common_attn_metadata draft_index"
    ),
    "vllm.v1.worker.utils.AttentionGroup.map_to_kernel_block_table": "self block_table ubatch_idx",
    "vllm.v1.core.sched.scheduler.Scheduler.make_spec_decoding_stats": (
        "self spec_decoding_stats num_draft_tokens num_accepted_tokens num_invalid_spec_tokens request_id"
    ),
}


def moved(signatures: Mapping[str, str]) -> list[str]:
    """Which of these functions this vLLM does not have, or has with other parameters.

    Functions outside of classes may have more behind these, with defaults: DELTA calls, but does not override
    them.
    """
    return [name for name, parameters in signatures.items() if not _is_there(name, parameters.split())]


def check_drafting_api(signatures: Mapping[str, str]) -> None:
    """Refuse lossless speculation where something of it has moved.

    Raises:
        DeltaConfigError: names what has, and what goes on.
    """
    if names := moved(signatures):
        raise DeltaConfigError(
            f"delta.lossless does not know vLLM {vllm_version}, in which {', '.join(names)} has moved; DELTA "
            "without lossless goes on"
        )


def _is_there(name: str, expected: list[str]) -> bool:
    owner_name, _, attribute = name.rpartition(".")
    try:
        owner = importlib.import_module(owner_name)
    except ImportError:
        try:
            owner = resolve_obj_by_qualname(owner_name)
        except (AttributeError, ImportError):
            return False
    function = getattr(owner, attribute, None)
    if function is None:
        return False
    parameters = inspect.signature(inspect.unwrap(function)).parameters
    if inspect.isclass(owner):
        return list(parameters) == expected
    added = list(parameters.values())[len(expected) :]
    has_defaults = all(parameter.default is not inspect.Parameter.empty for parameter in added)
    return list(parameters)[: len(expected)] == expected and has_defaults
