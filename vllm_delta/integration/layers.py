"""A worker's attention layers and their plan, the same on every platform."""

from __future__ import annotations

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from vllm_delta.config import DeltaConfig
from vllm_delta.integration.validation import declared_full_attention_layers
from vllm_delta.plan import Plan, Role, make_plan

logger = init_logger(f"vllm.{__name__}")


def local_attention_layers(vllm_config: VllmConfig, impl_class: type) -> dict[int, Attention]:
    """This worker's attention layers that are served by `impl_class`, by the model's layer index."""
    return {
        extract_layer_index(name): layer
        for name, layer in get_layers_from_vllm_config(vllm_config, Attention).items()
        if isinstance(layer.impl, impl_class)
    }


def make_local_plan(
    config: DeltaConfig, vllm_config: VllmConfig, local: set[int], local_eligible: set[int]
) -> Plan:
    """This rank's part of the model's plan.

    A rank sees its own layers; which of the others are eligible is known from the model's configuration.
    """
    model = vllm_config.model_config
    declared = set(declared_full_attention_layers(vllm_config))
    eligible = sorted((declared - local) | local_eligible)
    num_layers = model.get_total_num_hidden_layers()
    text_config = model.hf_text_config
    known = (text_config.model_type, num_layers, getattr(text_config, "hidden_size", 0))
    plan = make_plan(config, eligible, num_layers, known)
    return plan.for_rank(sorted(local_eligible))


def log_plan(config: DeltaConfig, plan: Plan, nbytes: int) -> None:
    """Tell the user what was decided; `nbytes` is the memory that DELTA holds."""
    if plan.layers(Role.SPARSE):
        saving = f"saves work from {config.budget_tokens + 1} tokens of context on"
    else:
        saving = "saves nothing: this plan has no sparse layer"
    logger.info(
        "DELTA: %s; budget %d tokens (%d recent, %d sink) in pages of %d; workspace %d bytes; %s",
        plan.describe(),
        config.budget_tokens,
        config.recent_tokens,
        config.sink_tokens,
        config.page_size,
        nbytes,
        saving,
    )
