"""DELTA's settings of one engine: who reads them out of vLLM's configuration, and what is put into it.

`prepare` runs in the platform's check. `adopt_calibration` writes what a calibration says into
``additional_config``, with which it travels to every process; from then on `settings_of` is what reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from vllm_delta.calibration.file import shape_of, with_calibrated_layers
from vllm_delta.integration.names import BACKEND_NAME
from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.plan import check_layer_numbers

logger = init_logger(f"vllm.{__name__}")


def selects_delta(vllm_config: Any) -> bool:
    """Whether this configuration selects DELTA, for all layers or for a kind of them."""
    attention = vllm_config.attention_config
    selected = [attention.backend, *attention.backend_per_kind.values()]
    return any(backend is not None and backend.name == BACKEND_NAME for backend in selected)


def settings_of(vllm_config: Any) -> DeltaConfig:
    """The settings of an engine.

    Raises:
        DeltaConfigError: as `DeltaConfig.from_additional_config` does.
    """
    return DeltaConfig.from_additional_config(vllm_config.additional_config)


def prepare(vllm_config: Any) -> DeltaConfig:
    """Adopt a calibration's layers; warn of settings that stand in the wrong place.

    Raises:
        DeltaConfigError: a wrong setting, or a wrong calibration.
    """
    additional = vllm_config.additional_config
    if isinstance(additional, Mapping):
        _warn_of_misplaced(additional)
        adopt_calibration(vllm_config)
    return settings_of(vllm_config)


def adopt_calibration(vllm_config: Any, path: Path | None = None) -> None:
    """Write a calibration's layers into the settings: of this file, or of one that the settings lead to.

    Raises:
        DeltaConfigError: a wrong setting, or a wrong calibration; then nothing is written.
    """
    additional, model = vllm_config.additional_config, vllm_config.model_config
    if model is None:
        return
    settings = additional.get("delta", {})
    if path is not None:
        settings = {**settings, "calibration": str(path)}
    num_layers, shape = model.get_total_num_hidden_layers(), shape_of(model.hf_text_config)
    settings = with_calibrated_layers(settings, model.model, num_layers, shape)
    check_layer_numbers(DeltaConfig.from_additional_config({"delta": settings}), num_layers)
    if settings:
        vllm_config.additional_config = {**additional, "delta": settings}


def _warn_of_misplaced(additional: Mapping[str, Any]) -> None:
    """Keys that would be settings stand beside "delta", not in it; they may be another plugin's, too."""
    names = {field.name for field in fields(DeltaConfig)}
    misplaced = [
        key for key in additional if key in names or (key != "delta" and str(key).lower() == "delta")
    ]
    if misplaced:
        logger.warning(
            'DELTA: %s in --additional-config stands outside of "delta" and is not used; '
            'settings go into {"delta": {...}}',
            ", ".join(misplaced),
        )
