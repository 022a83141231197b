"""``"calibrate": "auto"``: a server calibrates before it starts, once, and uses what was found.

It happens where vLLM builds its configuration, before an engine holds any memory, and in a process of its
own. The file lies in vLLM's cache folder, under a fingerprint of the model and of all that a calibration
depends on. It is adopted as if the user had named it, so that every process of the server has its layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from vllm.logger import init_logger

from vllm_delta import __version__
from vllm_delta.calibration.fingerprint import fingerprint, identity
from vllm_delta.calibration.process import run_command, signals_noted
from vllm_delta.calibration.prompts import CalibrationError
from vllm_delta.integration.settings import adopt_calibration, settings_of
from vllm_delta.integration.validation import declared_layers, known_as
from vllm_delta.method.config import DeltaConfig, DeltaConfigError
from vllm_delta.method.plan import preset_of

logger = init_logger(f"vllm.{__name__}")

#: Arguments of ``vllm.LLM`` on which it depends what a model computes, by the part of vLLM's configuration.
_COMPUTED = {
    "model_config": (
        *("tokenizer_mode", "trust_remote_code", "code_revision", "config_format", "hf_overrides"),
        *("model_class_overrides", "model_impl", "quantization", "allow_deprecated_quantization"),
        *("disable_sliding_window",),
    ),
    "load_config": ("load_format", "ignore_patterns", "model_loader_extra_config"),
    "cache_config": ("kv_cache_dtype_skip_layers",),
    "parallel_config": ("tensor_parallel_size",),
}

#: Arguments on which it depends where the model comes from and what room it has.
_OTHERS = {
    "model_config": ("hf_config_path",),
    "load_config": ("download_dir", "safetensors_load_strategy"),
    "cache_config": ("gpu_memory_utilization",),
    "parallel_config": ("enable_expert_parallel", "disable_custom_all_reduce"),
    "offload_config.uva": ("cpu_offload_gb",),
    "offload_config.prefetch": ("offload_group_size", "offload_num_in_group", "offload_prefetch_step"),
}

#: Variables that are the server's alone: its data-parallel ranks', and the folder of its metrics.
_OF_THE_SERVER = ("VLLM_DP_", "PROMETHEUS_MULTIPROC_DIR")


def calibrate_at_start(config: DeltaConfig, vllm_config: Any) -> DeltaConfig:
    """Calibrate where the settings ask for it and nothing else says which layers select.

    Args:
        config: the settings.
        vllm_config: vLLM's `VllmConfig`, which DELTA supports; gets the layers that were found.

    Returns:
        The settings, with these layers.

    Raises:
        DeltaConfigError: this model or server cannot be calibrated at its start, or the calibration failed.
    """
    if not _is_wanted(config, vllm_config):
        return config
    _check_supported(vllm_config)
    path = _cache_path(config, vllm_config)
    if _adopt(vllm_config, path):
        logger.info("DELTA: this model was calibrated at an earlier start, %s", path)
    else:
        with signals_noted() as noted:
            _calibrate(config, vllm_config, path, noted)
    return settings_of(vllm_config)


def _is_wanted(config: DeltaConfig, vllm_config: Any) -> bool:
    """Whether to calibrate; not where the paper's layers are known, or nothing is sparse."""
    model = vllm_config.model_config
    if config.calibrate == "never" or config.policy != "delta" or config.selection_layers != "auto":
        return False
    if model is None or config.full_layers >= model.get_total_num_hidden_layers():
        return False
    declared = declared_layers(model)
    return declared is None or preset_of(known_as(model), len(declared)) is None


def _check_supported(vllm_config: Any) -> None:
    """Raise `DeltaConfigError` for what would be found too late, or for a server that cannot be told on."""
    if "full_layers" in vllm_config.additional_config["delta"]:
        raise DeltaConfigError(
            'delta.calibrate "auto" finds the number of full layers, too; leave delta.full_layers out'
        )
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    for is_so, what in (
        (parallel.pipeline_parallel_size > 1, f"--pipeline-parallel-size {parallel.pipeline_parallel_size}"),
        (parallel.nnodes > 1, f"--nnodes {parallel.nnodes}"),
        (parallel.distributed_executor_backend == "external_launcher", "processes of an external launcher"),
        (parallel.placement_group is not None, "GPUs that a placement group of Ray's has reserved"),
        (model.skip_tokenizer_init, "--skip-tokenizer-init, which leaves no tokenizer for its texts"),
        (vllm_config.load_config.load_format == "dummy", "--load-format dummy, whose weights mean nothing"),
        (model.is_hybrid, "models with other state than a KV cache"),
        (_has_quantization_config(model), "--quantization-config"),
    ):
        if is_so:
            raise _refusal(f"does not support {what}")


def _refusal(what: str) -> DeltaConfigError:
    return DeltaConfigError(
        f'delta.calibrate "auto" {what}; leave it out, or name a file of `vllm-delta calibrate` by '
        "delta.calibration"
    )


def _has_quantization_config(model: Any) -> bool:
    """Whether there is one beyond what --quantization stands for."""
    from vllm.engine.arg_utils import EngineArgs

    config = getattr(model, "quantization_config", None)
    if config is None:
        return False
    meant: Any = EngineArgs(model=model.model, quantization=model.quantization).quantization_config
    return bool(config != meant)


def _cache_path(config: DeltaConfig, vllm_config: Any) -> Path:
    """Where a calibration of this model, for this server and these settings, is kept."""
    from vllm import envs
    from vllm.platforms import current_platform

    model = vllm_config.model_config
    try:
        parts = {
            "model": identity(model.model, _commit(model, model.revision)),
            "tokenizer": model.tokenizer != model.model
            and identity(model.tokenizer, _resolved(model.tokenizer_revision)),
            "config": model.hf_config_path and identity(model.hf_config_path, _resolved(model.revision)),
            "stored": model.model_weights,
            "engine": _computed(vllm_config),
            "delta": _settings(config) | {"budget_tokens": config.budget_tokens},
            "platform": current_platform.device_type,
            "vllm_delta": __version__,
        }
    except OSError as error:
        raise DeltaConfigError(f"delta.calibrate: {error.filename}: {error.strerror}") from error
    return Path(envs.VLLM_CACHE_ROOT) / "delta" / f"{fingerprint(parts)}.json"


def _commit(model: Any, revision: Any) -> Any:
    """The commit of a model on a hub, or what is known instead."""
    noted = None if model.hf_config_path else getattr(model.hf_config, "_commit_hash", None)
    return noted or _resolved(revision)


def _resolved(revision: Any) -> Any:
    return getattr(revision, "resolved", revision)


def _settings(config: DeltaConfig) -> dict[str, int]:
    """Those that the command takes as JSON."""
    return {name: getattr(config, name) for name in ("recent_tokens", "sink_tokens", "page_size")}


def _computed(vllm_config: Any) -> dict[str, Any]:
    """The arguments of ``vllm.LLM`` on which it depends what this server's model computes.

    Raises:
        DeltaConfigError: one that cannot be handed to another process.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    arguments = {
        **_read(vllm_config, _COMPUTED),
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_cache_dtype": cache.cache_dtype,
        # With -1 vLLM chooses a length that fits into the memory.
        "max_model_len": -1 if model.original_max_model_len == -1 else model.max_model_len,
    }
    if getattr(model.multimodal_config, "language_model_only", False):
        arguments["language_model_only"] = True
    if cache.user_specified_block_size:
        arguments["block_size"] = cache.block_size
    arguments = _not_default(arguments)
    for name, value in arguments.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise _refusal(f"cannot hand on {name}, which JSON does not hold") from error
    return arguments


def engine_arguments(vllm_config: Any) -> dict[str, Any]:
    """The arguments of ``vllm.LLM`` that make an engine compute what this server's does.

    Raises:
        DeltaConfigError: one that cannot be handed to another process.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    arguments = _read(vllm_config, _OTHERS)
    # Their types are not plain strings where they have been looked up on a hub.
    arguments["revision"] = model.revision and str(model.revision)
    if model.tokenizer != model.model or model.tokenizer_revision != model.revision:
        arguments["tokenizer"] = model.tokenizer
        arguments["tokenizer_revision"] = model.tokenizer_revision and str(model.tokenizer_revision)
    if parallel.distributed_executor_backend == "ray":
        arguments["distributed_executor_backend"] = "ray"
    return _computed(vllm_config) | _not_default(arguments)


def _read(vllm_config: Any, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {
        name: getattr(attrgetter(part)(vllm_config), name) for part, group in names.items() for name in group
    }


def _not_default(arguments: Mapping[str, Any]) -> dict[str, Any]:
    from vllm.engine.arg_utils import EngineArgs

    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(EngineArgs)
    }
    return {name: value for name, value in arguments.items() if value != defaults[name]}


def _adopt(vllm_config: Any, path: Path, *, warn: bool = False) -> bool:
    """Take the layers of a file in the cache, if it is there and whole; warn of one that is damaged."""
    if not path.is_file():
        return False
    try:
        adopt_calibration(vllm_config, path)
    except DeltaConfigError as error:
        if warn:
            logger.warning("DELTA: %s; this model is calibrated again", error)
        return False
    return True


def _calibrate(config: DeltaConfig, vllm_config: Any, path: Path, noted: Sequence[int]) -> None:
    """Calibrate and adopt what was found; or adopt what another process finds meanwhile."""
    model = vllm_config.model_config
    name = model.model_weights or model.model
    arguments = [name, "--out", str(path), "--engine", json.dumps(engine_arguments(vllm_config))]
    arguments += ["--budget-tokens", str(config.budget_tokens), "--delta", json.dumps(_settings(config))]
    with _locked(path, noted):
        if noted:
            return
        if _adopt(vllm_config, path, warn=True):
            logger.info("DELTA: the other process has calibrated this model, %s", path)
            return
        logger.info(
            "DELTA: calibrating %s before the server starts, once: it looks things up in texts, which shows "
            "which layers have to attend to everything; the result goes to %s",
            *(name, path),
        )
        begin = time.monotonic()
        try:
            run_command(arguments, _environment(vllm_config), noted)
        except CalibrationError as error:
            raise DeltaConfigError(
                f'delta.calibrate "auto" found no layers for {name}: vllm-delta calibrate: {error}'
            ) from error
    if not noted:
        adopt_calibration(vllm_config, path)
        logger.info("DELTA: calibrated in %.0f s: %s", time.monotonic() - begin, _summary(path))


@contextlib.contextmanager
def _locked(path: Path, noted: Sequence[int]) -> Iterator[None]:
    """Nobody else calibrates for this file meanwhile. Where a signal is noted, nothing is waited for.

    Raises:
        DeltaConfigError: the cache cannot be written.
    """
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
        if not lock.is_locked:
            logger.info("DELTA: waiting for another process that calibrates this model, for %s", path)
        while not lock.is_locked and not noted:
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=1)
    except OSError as error:
        raise DeltaConfigError(
            f"delta.calibrate: {error.filename}: {error.strerror}; VLLM_CACHE_ROOT names another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _environment(vllm_config: Any) -> dict[str, str]:
    """That of the command: this process's, but for what is the server's alone."""
    from vllm.platforms import current_platform

    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THE_SERVER)}
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    token = vllm_config.model_config.hf_token
    if isinstance(token, str):
        environment["HF_TOKEN"] = token  # not on a command line, which others see
    devices = vllm_config.parallel_config.assigned_physical_gpu_ids
    if devices:
        environment[current_platform.device_control_env_var] = ",".join(map(str, devices))
    return environment


def _summary(path: Path) -> str:
    """What a calibration found, in a few words."""
    content = json.loads(path.read_text())
    found = content["calibration"]["compared"][content["calibration"]["chosen"]]
    budget = content["calibration"]["search_budget_tokens"]
    layers = ", ".join(map(str, found["selection_layers"]))
    return (
        f"{found['full_layers']} full layers and selection layers {layers} keep {found['kept']:.1%} of what "
        f"it looks up with a budget of {budget} tokens"
    )
