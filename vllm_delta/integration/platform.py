"""vLLM's platforms, with DELTA's checks and worker where DELTA is selected.

The CPU platform also ignores every attention backend but its own, so the method that chooses has to be
overridden there. Everything else is the platform's, and nothing changes while another backend is selected.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.version import __version__ as vllm_version

from vllm_delta.integration.auto_calibration import calibrate_at_start
from vllm_delta.integration.compat import unsupported_version
from vllm_delta.integration.lossless import adopt_drafts, choose_scheduler, report_payoff
from vllm_delta.integration.names import BACKEND_NAME, CPU_BACKEND_PATH, WORKERS
from vllm_delta.integration.settings import prepare, selects_delta, settings_of
from vllm_delta.integration.speculation import has_draft_layers
from vllm_delta.integration.validation import check_config
from vllm_delta.kernels.limits import CPU, GPU, Limits
from vllm_delta.method.config import DeltaConfig

logger = init_logger(f"vllm.{__name__}")


class DeltaPlatformMixin:
    """Marks a platform class that DELTA has changed, and what DELTA changes on every platform."""

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: Any) -> None:
        """Let vLLM know of drafts before it sizes steps and graphs for them."""
        super().apply_config_platform_defaults(vllm_config)  # type: ignore[misc]
        if _is_ours(vllm_config):
            on_gpu = issubclass(cls, DeltaCudaPlatformMixin)
            adopt_drafts(settings_of(vllm_config), vllm_config, on_gpu=on_gpu)


class DeltaCudaPlatformMixin(DeltaPlatformMixin):
    """What DELTA changes about a CUDA platform class."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Refuse what DELTA does not support before any process starts; choose DELTA's worker."""
        super().check_and_update_config(vllm_config)  # type: ignore[misc]
        if _is_ours(vllm_config):
            _prepare(vllm_config, GPU)  # the block size is chosen later, and checked then


class DeltaCpuPlatformMixin(DeltaPlatformMixin):
    """What DELTA changes about a CPU platform class."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """As on a GPU; choose the block size, and check also what vLLM's CPU platform does not."""
        super().check_and_update_config(vllm_config)  # type: ignore[misc]
        if _is_ours(vllm_config):
            choose_block_size(_prepare(vllm_config, CPU), vllm_config)

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        """Path of the class of the attention backend; DELTA's where it is selected."""
        if selected_backend is not None and selected_backend.name == BACKEND_NAME:
            return CPU_BACKEND_PATH
        return super().get_attn_backend_cls(  # type: ignore[misc,no-any-return]
            selected_backend, attn_selector_config, *args, **kwargs
        )

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: Any) -> None:
        """Keep DELTA's block size, where vLLM (from 0.33 on) sets its own when the model is loaded."""
        super().update_block_size_for_backend(vllm_config)  # type: ignore[misc]
        if selects_delta(vllm_config):
            choose_block_size(settings_of(vllm_config), vllm_config)


def _is_ours(vllm_config: Any) -> bool:
    """Whether DELTA is selected; the check runs again for a draft model, whose layers are not DELTA's."""
    model = vllm_config.model_config
    return selects_delta(vllm_config) and (model is None or model.runner_type != "draft")


def _prepare(vllm_config: Any, limits: Limits) -> DeltaConfig:
    """The settings, a calibration's included, and checked; DELTA's worker in place of vLLM's."""
    warning = unsupported_version(vllm_version)
    if warning is not None:
        logger.warning_once(warning)
    config = prepare(vllm_config)
    check_config(config, vllm_config, limits)
    config = calibrate_at_start(config, vllm_config)
    if config.lossless and vllm_config.model_config is not None:
        report_payoff(vllm_config)
        if limits is GPU:
            choose_scheduler(vllm_config)
    parallel = vllm_config.parallel_config
    parallel.worker_cls = WORKERS.get(parallel.worker_cls, parallel.worker_cls)
    return config


def choose_block_size(config: DeltaConfig, vllm_config: Any) -> None:
    """Make a KV block one page, where the user has not chosen its size.

    A page of 16 tokens in a block of 128 is scattered over half the block's cache lines, since keys lie
    transposed in a block; one that is the whole block is read in one go. vLLM's own kernels are as fast with
    small blocks. Those for AMX need a multiple of 32 tokens, and so does the CPU_ATTN of a draft model.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if cache.user_specified_block_size or model is None or model.is_hybrid:
        return
    uses_amx = model.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    multiple = 32 if uses_amx or has_draft_layers(vllm_config) else 16
    cache.block_size = max(config.page_size, multiple)


_base: Any = resolve_obj_by_qualname(cpu_platform_plugin() or "vllm.platforms.cpu.CpuPlatform")


class DeltaCpuPlatform(DeltaCpuPlatformMixin, _base):  # type: ignore[misc]
    """The platform that vLLM would choose on this CPU, with DELTA."""


def adopt_platform(platform: Any) -> None:
    """Add DELTA to a platform that vLLM chose without asking us; on other hardware, do nothing.

    That happens on GPUs, and on CPUs where another platform plugin is installed, where
    ``VLLM_TARGET_DEVICE=cpu`` keeps platform plugins out, and where ``VLLM_PLUGINS`` names only some. The
    object stays the same, so whoever holds it sees the change.
    """
    base = type(platform)
    if issubclass(base, DeltaPlatformMixin):
        return
    if platform.is_cpu():
        mixin: type = DeltaCpuPlatformMixin
        logger.info("DELTA is added to the active platform, %s", base.__name__)
    elif platform.is_cuda():
        mixin = DeltaCudaPlatformMixin
    else:
        return
    platform.__class__ = type(f"Delta{base.__name__}", (mixin, base), {})
