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


def is_wanted(vllm_config: VllmConfig, state: WorkerState[Any]) -> bool:
    """Whether this worker's plan is but a rule of thumb, and a probe can say more."""
    config, length = state.config, vllm_config.model_config.max_model_len
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase).values()
    return (
        config.policy == "delta"
        and state.plan.source == "rule"
        and bool(state.plan.layers(Role.SPARSE))
        and max(config.budget_tokens, 2 * PERIOD) < length
        and vllm_config.parallel_config.pipeline_parallel_size == 1
        and all(isinstance(getattr(layer, "impl", None), DeltaLayer) for layer in layers)
    )


@torch.inference_mode()
def run(vllm_config: VllmConfig, model: Any, device: torch.device) -> dict[int, float]:
    """The best head's share of hits by eligible layer, over all tensor parallel ranks.

    To be called on all of them, without a step in flight.
    """
    probe = Probe()
    layers = delta_layers(vllm_config)
    sequences = probe_tokens(vllm_config.model_config.get_vocab_size()).to(device)
    positions = torch.arange(2 * PERIOD, device=device)
    if vllm_config.model_config.uses_mrope:
        positions = positions.expand(3, -1)
    for layer in layers:
        layer.impl.probe = probe
    try:
        for tokens in sequences:
            with set_forward_context(None, vllm_config, num_tokens=len(tokens), skip_compiled=True):
                model(input_ids=tokens, positions=positions)
    finally:
        for layer in layers:
            layer.impl.probe = None
    indices = sorted(probe.hits)
    hits = torch.stack([probe.hits[index].max() for index in indices]).cpu() / SEQUENCES
    group = get_tp_group()
    if group.world_size > 1:
        torch.distributed.all_reduce(hits, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    return dict(zip(indices, hits.tolist(), strict=True))


def adopt(vllm_config: VllmConfig, state: WorkerState[Any], hits: Mapping[int, float]) -> None:
    """Go on with the plan that a probe makes, where it found something."""
    additional = vllm_config.additional_config
    given = additional.get("delta", {}) if isinstance(additional, Mapping) else {}
    config = probed_settings(state.config, hits, keeps_full_layers="full_layers" in given)
    if config is None:
        logger.info("DELTA: a probe of the model found no layer that looks repeated tokens up")
        return
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    plan: Plan = make_plan(config, sorted(hits), num_layers)
    state.use(config, replace(plan, source="probe"))
