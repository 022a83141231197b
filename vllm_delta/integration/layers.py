"""A worker's attention layers, which of them may be sparse, and their part of the model's plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from vllm_delta.integration.probe import Probe, window_of
from vllm_delta.integration.validation import declared_layers, known_as
from vllm_delta.integration.worker_state import WorkerState
from vllm_delta.method.config import DeltaConfig, DeltaConfigError
from vllm_delta.method.plan import Plan, Role, make_plan

logger = init_logger(f"vllm.{__name__}")


class DeltaLayer:
    """What is set on the attention of a layer, on every platform, once, before the first step."""

    #: vLLM's: of the layer's window, in the platform's way to say so
    sliding_window: Any
    #: what it shares with the worker's other layers
    state: WorkerState[Any] | None = None
    #: the model's index of a layer that may be sparse; None for another
    layer_index: int | None = None
    #: the layers of the whole model that may be sparse, where they lie on several pipeline ranks
    eligible_in_model: tuple[int, ...] | None = None
    #: whether a worker of DELTA's runs it, which reports the plan itself, when a probe may have changed it
    is_reported: bool = False
    #: looks on in place of the KV cache, while a probe runs; see `vllm_delta.integration.probe`
    probe: Probe | None = None


@dataclass(frozen=True)
class LocalLayers:
    """This worker's attention layers that DELTA runs."""

    #: all of them
    layers: list[Attention]
    #: those that may be sparse, by the model's layer index: full attention, and not of a draft model
    eligible: dict[int, Attention]
    plan: Plan

    def share(self, state: WorkerState[Any]) -> None:
        """Hand the worker's state to all layers; report the plan, unless the worker will."""
        for layer in self.layers:
            layer.impl.state = state
        for index, layer in self.eligible.items():
            layer.impl.layer_index = index
        if not any(layer.impl.is_reported for layer in self.layers):
            report_plan(state)


def find_state(vllm_config: VllmConfig) -> WorkerState[Any] | None:
    """The state that this worker's layers share; None where DELTA is not set up."""
    for layer in delta_layers(vllm_config):
        if layer.impl.state is not None:
            state: WorkerState[Any] = layer.impl.state
            return state
    return None


def delta_layers(vllm_config: VllmConfig) -> list[Attention]:
    """This worker's attention layers that DELTA runs."""
    layers = get_layers_from_vllm_config(vllm_config, Attention).values()
    return [layer for layer in layers if isinstance(layer.impl, DeltaLayer)]


def local_layers(config: DeltaConfig, vllm_config: VllmConfig) -> LocalLayers:
    """This worker's layers and their plan.

    Raises:
        DeltaConfigError: no layer of the model has full attention, two have the same index, or the settings
            name layers that are not there.
    """
    layers = delta_layers(vllm_config)
    eligible = _eligible(layers)
    return LocalLayers(layers, eligible, _make_local_plan(config, vllm_config, eligible))


def is_eligible(layer: Attention) -> bool:
    """Whether a layer that DELTA runs may be sparse."""
    is_draft = getattr(layer, "is_draft_layer", False)
    return type(layer) is Attention and window_of(layer.impl) is None and not is_draft


def exchange_layers(vllm_config: VllmConfig) -> None:
    """Let all pipeline ranks know which layers of the others may be sparse: a rank builds its own alone.

    To be called by a worker of DELTA's on every rank, when its model is built.
    """
    for layer in delta_layers(vllm_config):
        layer.impl.is_reported = True
    if vllm_config.parallel_config.pipeline_parallel_size == 1:
        return
    group = get_pp_group()
    of_ranks: list[list[int]] = [[] for _ in range(group.world_size)]
    layers = delta_layers(vllm_config)
    torch.distributed.all_gather_object(of_ranks, sorted(_eligible(layers)), group=group.cpu_group)
    everywhere = tuple(sorted(index for of_rank in of_ranks for index in of_rank))
    for layer in layers:
        layer.impl.eligible_in_model = everywhere


def _eligible(layers: list[Attention]) -> dict[int, Attention]:
    eligible: dict[int, Attention] = {}
    for layer in filter(is_eligible, layers):
        index = extract_layer_index(layer.layer_name)
        if index in eligible:
            raise DeltaConfigError(
                f"layers {eligible[index].layer_name} and {layer.layer_name} have the same index; accepted: "
                "models with one stack of decoder layers"
            )
        eligible[index] = layer
    return dict(sorted(eligible.items()))


def _make_local_plan(config: DeltaConfig, vllm_config: VllmConfig, local: dict[int, Attention]) -> Plan:
    """This rank's part of the model's plan."""
    model = vllm_config.model_config
    eligible = _eligible_in_model(vllm_config, local)
    if not eligible:
        raise DeltaConfigError(
            "DELTA was selected for a model that has no layer with full attention; accepted: models "
            "that have some"
        )
    num_layers = model.get_total_num_hidden_layers()
    return make_plan(config, eligible, num_layers, known_as(model)).for_rank(list(local))


def _eligible_in_model(vllm_config: VllmConfig, local: dict[int, Attention]) -> list[int]:
    if vllm_config.parallel_config.pipeline_parallel_size == 1:
        return list(local)
    for layer in delta_layers(vllm_config):
        if layer.impl.eligible_in_model is not None:
            return list(layer.impl.eligible_in_model)
    declared = declared_layers(vllm_config.model_config)
    if declared is None:
        raise DeltaConfigError(
            f"--worker-cls {vllm_config.parallel_config.worker_cls} with --pipeline-parallel-size: the ranks "
            "do not know each other's layers; accepted: vLLM's own worker, which DELTA extends"
        )
    return declared


def report_plan(state: WorkerState[Any]) -> None:
    """Say in the log what was decided, once for all tensor parallel ranks."""
    config, plan, nbytes = state.config, state.plan, state.nbytes
    if get_tensor_model_parallel_rank() != 0:
        return
    if not plan.roles:
        logger.info("DELTA: this pipeline rank has no layer with full attention, and nothing to save")
        return
    described = plan.describe() if state.drafting is None else state.drafting.plans.describe()
    if state.drafting is not None:
        saving = "lossless: answers are full attention's"
    elif plan.policy != "delta":
        saving = "in plain PyTorch, which saves no time"
    elif plan.layers(Role.SPARSE):
        saving = f"saves work from {config.budget_tokens + 1} tokens of context on"
    else:
        saving = "saves nothing: this plan has no sparse layer"
    logger.info(
        "DELTA: %s; budget %d tokens (%d recent, %d sink) in pages of %d; workspace %d bytes; %s",
        described,
        config.budget_tokens,
        config.recent_tokens,
        config.sink_tokens,
        config.page_size,
        nbytes,
        saving,
    )
    if state.drafting is not None:
        return
    if plan.policy == "delta" and plan.source == "rule" and plan.layers(Role.SPARSE):
        logger.warning(
            "DELTA: nobody has calibrated this model. Its selection layers are a rule of thumb, with which "
            "some lose what they look up beyond the budget; `vllm-delta calibrate MODEL`, or the setting "
            '"calibrate": "auto", finds better ones'
        )
