"""One engine in this process that takes all settings of a benchmark in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.accuracy.settings import Setting
from benchmarks.lib.base import Json
from vllm_delta.calibration.engine import Engine, Model
from vllm_delta.calibration.file import with_calibrated_layers
from vllm_delta.method.config import DeltaConfig, DeltaConfigError


def engine_options(deltas: Sequence[Json], length: int, arguments: Json) -> Json:
    """What an engine needs that takes all these settings: the smallest page, the largest budget.

    Settings that are wrong fail later, by themselves. `arguments` are further ones of ``vllm.LLM``.
    """
    configs = [DeltaConfig()]
    for delta in deltas:
        with contextlib.suppress(DeltaConfigError):
            configs.append(DeltaConfig.from_additional_config({"delta": delta}))
    pages = [config.page_size for config in configs]
    block = {"block_size": max(pages)} if max(pages) > 16 else {}
    budget = max(config.budget_tokens for config in configs)
    return {"page_size": min(pages), "budget": budget, "length": length, "options": block | arguments}


def start_engine(model: Model, needs: Json, rows: int) -> Engine:
    """The engine that `engine_options` describe; `rows` are the tokens that it computes at a time."""
    size = needs["page_size"]
    config = DeltaConfig(page_size=size, budget_tokens=needs["budget"], recent_tokens=0, sink_tokens=0)
    return Engine(model, config, needs["budget"], needs["length"], rows=rows)


def complete(setting: Setting, model: str, layers: int) -> DeltaConfig:
    """All of DELTA's settings, a calibration's layers included; a dense backend's are full layers alone."""
    delta: Json = {"full_layers": layers, "selection_layers": []}
    if setting.is_delta:
        delta = with_calibrated_layers(setting.delta, model)
    return DeltaConfig.from_additional_config({"delta": delta})


def to_json(config: DeltaConfig) -> Json:
    """The settings as an engine takes them."""
    layers = config.selection_layers
    return asdict(config) | {"selection_layers": layers if layers == "auto" else list(layers)}
