"""A worker's attention layers, their plan and the state they share, the same on every platform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from vllm_delta.config import DeltaConfig, DeltaConfigError
from vllm_delta.integration.validation import declared_full_attention_layers
from vllm_delta.plan import Plan, Role, make_plan

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class LocalLayers:
    """This worker's attention layers that a class of DELTA's serves, by the model's layer index."""

    served: dict[int, Attention]
    #: of those, the ones that may be sparse: full attention, and not of a draft model
    eligible: dict[int, Attention]
    plan: Plan

    def share(self, state: Any) -> None:
        """Hand a worker's state and their roles to all layers; tell the user."""
        for index, layer in self.served.items():
            layer.impl.delta = state
            layer.impl.role = self.plan.roles.get(index)
        if get_tensor_model_parallel_rank() == 0:
            _log_plan(state.config, self.plan, state.nbytes)


def find_state(vllm_config: VllmConfig) -> Any:
    """The state that this worker's layers share; None where DELTA is not set up."""
    for layer in get_layers_from_vllm_config(vllm_config, Attention).values():
        state = getattr(layer.impl, "delta", None)
        if state is not None:
            return state
    return None


def local_layers(config: DeltaConfig, vllm_config: VllmConfig, impl_class: type) -> LocalLayers:
    """The layers that are served by `impl_class`, and their plan.

    Raises:
        DeltaConfigError: no layer has full attention, or the settings name layers that are not there.
    """
    served = {
        extract_layer_index(name): layer
        for name, layer in get_layers_from_vllm_config(vllm_config, Attention).items()
        if isinstance(layer.impl, impl_class)
    }
    eligible = {index: layer for index, layer in served.items() if is_eligible(layer)}
    if not eligible:
        raise DeltaConfigError(
            "DELTA was selected for a model that has no layer with full attention; accepted: models "
            "that have some"
        )
    return LocalLayers(served, eligible, _make_local_plan(config, vllm_config, set(served), set(eligible)))


def is_eligible(layer: Attention) -> bool:
    """Whether a layer that DELTA serves may be sparse."""
    no_window = layer.impl.sliding_window in (-1, (-1, -1))  # the CPU's and FlashAttention's ways to say so
    return type(layer) is Attention and no_window and not getattr(layer, "is_draft_layer", False)


def _make_local_plan(
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


def _log_plan(config: DeltaConfig, plan: Plan, nbytes: int) -> None:
    """Tell the user what was decided; `nbytes` is the memory that DELTA holds."""
    if plan.policy != "delta":
        saving = "in plain PyTorch, which saves no time"
    elif plan.layers(Role.SPARSE):
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
