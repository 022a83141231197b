"""A probe of the model when a server starts: which layers look things up, and so have to select.

Where nobody has calibrated a model, and it has no preset, its worker runs `vllm_delta.plain.probe`'s random
tokens through it, before graphs are captured. No KV cache is involved: as in a profiling run there is no
metadata. It takes about as long as prompts of 2,000 tokens together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_delta.integration.layers import DeltaLayer, delta_layers
from vllm_delta.integration.probe import Probe
from vllm_delta.integration.worker_state import WorkerState
from vllm_delta.method.plan import Plan, Role, make_plan, probed_settings
from vllm_delta.plain.probe import PERIOD, SEQUENCES, probe_tokens

logger = init_logger(f"vllm.{__name__}")

#: of all sequences
TOKENS = 2 * PERIOD * SEQUENCES


def is_wanted(vllm_config: VllmConfig, state: WorkerState[Any]) -> bool:
    """Whether this worker's plan is but a rule of thumb, and a probe can say more."""
    config, length = state.config, vllm_config.model_config.max_model_len
    return (
        config.policy == "delta"
        and (config.refreshes_pages or config.draft_pages == "shared")
        and state.plan.source == "rule"
        and bool(state.plan.layers(Role.SPARSE))
        and max(config.budget_tokens, 2 * PERIOD) < length
        and vllm_config.scheduler_config.max_num_batched_tokens >= 2 * PERIOD
    )


def _is_possible(vllm_config: VllmConfig) -> bool:
    """Whether all that the model needs to run is tokens and DELTA's layers, on every rank alike."""
    parallel = vllm_config.parallel_config
    chunk = getattr(vllm_config.model_config.hf_text_config, "attention_chunk_size", None)
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase).values()
    return (
        parallel.pipeline_parallel_size == 1
        and not parallel.enable_elastic_ep  # workers that join later would probe alone
        and vllm_config.lora_config is None  # whose kernels want to know each token's adapter
        and (chunk is None or chunk >= 2 * PERIOD)
        and all(isinstance(getattr(layer, "impl", None), DeltaLayer) for layer in layers)
    )


def found(vllm_config: VllmConfig, model: Any, device: torch.device) -> dict[int, float]:
    """The best head's share of hits by eligible layer, over all tensor parallel ranks.

    To be called on all of them, without a step in flight. Nothing is found where the model cannot run so.
    """
    if not _is_possible(vllm_config):
        return {}
    logger.info(
        "DELTA: probing which layers look things up; that takes as long as %d tokens of prompts", TOKENS
    )
    try:
        return _run(vllm_config, model, device)
    except torch.OutOfMemoryError:
        raise  # it may be this rank's alone, and the others wait
    except Exception as error:  # the model's own, whose forward wants more than tokens
        logger.warning("DELTA: the model cannot be probed: %r", error)
        return {}


@torch.inference_mode()
def _run(vllm_config: VllmConfig, model: Any, device: torch.device) -> dict[int, float]:
    layers = delta_layers(vllm_config)
    probe = Probe({layer.impl.kv_sharing_target_layer_name for layer in layers} - {None})
    for layer in layers:
        layer.impl.probe = probe
    try:
        for tokens in probe_tokens(vllm_config.model_config.get_vocab_size()).to(device):
            with set_forward_context(None, vllm_config, num_tokens=len(tokens), skip_compiled=True):
                model(**_inputs(vllm_config, model, tokens))
    finally:
        for layer in layers:
            layer.impl.probe = None
    indices = sorted(probe.hits)
    hits = torch.stack([probe.hits[index].max() for index in indices]).cpu() / SEQUENCES
    group = get_tp_group()
    if group.world_size > 1:
        torch.distributed.all_reduce(hits, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    if device.type != "cpu":
        torch.accelerator.empty_cache()  # the KV cache has been given what was free before
    return dict(zip(indices, hits.tolist(), strict=True))


def _inputs(vllm_config: VllmConfig, model: Any, tokens: Tensor) -> dict[str, Tensor | None]:
    """As vLLM's model runners call a model for text alone."""
    config = vllm_config.model_config
    positions = torch.arange(len(tokens), device=tokens.device)
    if config.uses_mrope:
        positions = positions.expand(config.mrope_num_dims, -1)
    if config.is_multimodal_model:
        embeddings: Tensor = model.embed_input_ids(tokens)
        return {"input_ids": None, "positions": positions, "inputs_embeds": embeddings}
    return {"input_ids": tokens, "positions": positions}


def adopt(vllm_config: VllmConfig, state: WorkerState[Any], hits: Mapping[int, float]) -> None:
    """Go on with the plan that a probe makes, of as many passes, where it found something."""
    if hits.keys() != state.plan.roles.keys():
        return
    additional = vllm_config.additional_config
    given = additional.get("delta", {}) if isinstance(additional, Mapping) else {}
    passes = len(state.plan.layers(Role.FULL)) + len(state.plan.layers(Role.SELECTION))
    config = probed_settings(state.config, hits, passes, keeps_full_layers="full_layers" in given)
    if config is None:
        logger.info("DELTA: a probe of the model found no layer that looks repeated tokens up")
        return
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    plan: Plan = make_plan(config, sorted(hits), num_layers)
    state.use(config, replace(plan, source="probe"))
