"""What DELTA refuses, checked before a server starts: settings, models and options.

Each check names the key or option, what it is set to, and what is accepted. Checks that need the model's
layers are in `check_layer`, called when the layers have been built, still before serving.
"""

from __future__ import annotations

import os
from typing import Any

from vllm_delta.integration.lossless import check_lossless
from vllm_delta.integration.speculation import check_speculation
from vllm_delta.kernels.limits import CPU, Limits
from vllm_delta.method.config import DeltaConfig, DeltaConfigError
from vllm_delta.method.plan import check_layer_numbers, make_plan

#: Kinds of layers that a configuration names in `layer_types`, of which the first has full attention.
_KNOWN_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "linear_attention"}


def check_config(config: DeltaConfig, vllm_config: Any, limits: Limits) -> None:
    """Check everything that is known before the model is loaded.

    Args:
        config: DELTA's settings.
        vllm_config: vLLM's `VllmConfig`, after its platform has completed it.
        limits: of the platform's kernels.

    Raises:
        DeltaConfigError: names the key or option and what is accepted.
    """
    if config.page_size not in limits.page_sizes:
        raise DeltaConfigError(
            f"delta.page_size must be one of {', '.join(map(str, limits.page_sizes))} on this platform, "
            f"not {config.page_size}"
        )
    _check_options(vllm_config, config)
    model = vllm_config.model_config
    if model is not None:
        _check_model(vllm_config, config)
        if limits is CPU:
            dtype = str(model.dtype).removeprefix("torch.")
            _check_cache_dtype(vllm_config.cache_config.cache_dtype, dtype)


def check_block_size(config: DeltaConfig, block_size: int) -> None:
    """Raise `DeltaConfigError` where a KV block does not hold whole pages."""
    if block_size % config.page_size:
        raise DeltaConfigError(
            f"delta.page_size ({config.page_size}) must divide the KV block size (--block-size {block_size})"
        )


def check_isa(isa: str) -> None:
    """Raise `DeltaConfigError` for a cache layout that the kernels do not know."""
    if isa not in CPU.layouts:
        raise DeltaConfigError(
            f"DELTA cannot read the KV cache of vLLM's {isa!r} kernels, which this processor uses; "
            f"accepted: {', '.join(CPU.layouts)} (x86-64)"
        )


def check_layer(impl: Any, limits: Limits) -> None:
    """Check one attention layer as vLLM builds it.

    Args:
        impl: vLLM's `AttentionImpl`, constructed.
        limits: of the platform's kernels.

    Raises:
        DeltaConfigError: a kind of attention that DELTA does not support.
    """
    if impl.attn_type != "decoder":
        raise DeltaConfigError(
            f"DELTA supports decoder models; this model has {impl.attn_type} attention layers"
        )
    if impl.alibi_slopes is not None:
        raise DeltaConfigError("DELTA does not support models with ALiBi; accepted: RoPE and the like")
    multiple, largest = limits.head_size_multiple, limits.largest_head_size
    if impl.head_size % multiple or impl.head_size > largest:
        raise DeltaConfigError(
            f"DELTA needs a head size that is a multiple of {multiple} and at most {largest}, "
            f"not {impl.head_size}"
        )
    if limits is CPU:
        _check_cache_dtype(impl.kv_cache_dtype)


def _check_cache_dtype(cache_dtype: str, model_dtype: str | None = None) -> None:
    """The cache holds the model's own type; `model_dtype` None accepts any of the kernels' types."""
    named = set(CPU.cache_dtypes)  # what vLLM's option can name
    accepted = ["auto", *sorted(named if model_dtype is None else named & {model_dtype})]
    if cache_dtype not in accepted:
        raise DeltaConfigError(
            f"--kv-cache-dtype {cache_dtype} is not supported by DELTA on the CPU; accepted: "
            f"{', '.join(accepted)}"
        )


def _check_options(vllm_config: Any, config: DeltaConfig) -> None:
    """Options that change what attention means, or when a worker's layers run."""
    parallel = vllm_config.parallel_config
    for option, value in (
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size),
    ):
        if value > 1:
            raise DeltaConfigError(f"{option} {value} is not supported by DELTA; accepted: 1")
    # Layers of a worker run one after another, or they would overwrite each other's selection table.
    if parallel.use_ubatching:
        option = "--enable-dbo" if parallel.enable_dbo else f"--ubatch-size {parallel.ubatch_size}"
        raise DeltaConfigError(
            f"{option} runs two parts of a batch at a time, which is not supported by DELTA; leave it out"
        )
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        raise DeltaConfigError(
            "VLLM_BATCH_INVARIANT=1: vLLM's batch invariance is not supported by DELTA; accepted: 0"
        )
    if getattr(vllm_config.cache_config, "kv_sharing_fast_prefill", False):
        raise DeltaConfigError("--kv-sharing-fast-prefill is not supported by DELTA; leave it out")
    if getattr(vllm_config.attention_config, "use_non_causal", False):
        raise DeltaConfigError("attention_config.use_non_causal is not supported by DELTA; accepted: false")
    if config.lossless:
        check_lossless(config, vllm_config)
    elif vllm_config.speculative_config is not None:
        check_speculation(vllm_config)


def _check_model(vllm_config: Any, config: DeltaConfig) -> None:
    model = vllm_config.model_config
    name = ", ".join(model.architectures)
    if model.use_mla:
        raise DeltaConfigError(
            f"{name} uses multi-head latent attention (MLA), which DELTA does not support; "
            "accepted: models with multi-head, grouped-query or multi-query attention"
        )
    if model.is_encoder_decoder:
        raise DeltaConfigError(
            f"{name} is an encoder-decoder model, which DELTA does not support; accepted: decoders"
        )
    if model.runner_type != "generate":
        raise DeltaConfigError(
            f"{name} runs with --runner {model.runner_type}: encoder-only and pooling models "
            "decode nothing; accepted: models that generate"
        )
    if getattr(model, "is_mm_prefix_lm", False):
        raise DeltaConfigError(f"{name} attends to prefixes in both directions, which DELTA does not support")
    if getattr(model, "rswa_window", None) is not None:
        raise DeltaConfigError(
            f"{name} uses reference sliding-window attention, which DELTA does not support"
        )
    cache = vllm_config.cache_config
    if cache.user_specified_block_size:  # else it follows the page size
        check_block_size(config, cache.block_size)
    # The layers are not built yet. Where the configuration does not say which of them have full attention,
    # the plan is checked when they are.
    num_layers = model.get_total_num_hidden_layers()
    check_layer_numbers(config, num_layers)
    if declared := declared_layers(model):
        make_plan(config, declared, num_layers)


def known_as(model: Any) -> tuple[str, int, int]:
    """What presets know a model by, of its configuration: model type, number of layers and hidden size."""
    text_config = model.hf_text_config
    num_layers = model.get_total_num_hidden_layers()
    return text_config.model_type, num_layers, getattr(text_config, "hidden_size", 0)


def declared_layers(model: Any) -> list[int] | None:
    """Layers that have full attention according to the model's configuration; None if it does not say.

    Whatever spells kinds of layers in a way of its own does not say: hybrid and attention-free models, layers
    without attention, a window that may hold for some layers. The layers that vLLM builds decide.
    """
    num_layers = model.get_total_num_hidden_layers()
    text_config = model.hf_text_config
    kinds = getattr(text_config, "layer_types", None)
    if kinds:
        if len(kinds) != num_layers or not set(kinds) <= _KNOWN_KINDS:
            return None
        return [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    has_other_kinds = model.is_hybrid or model.has_noops or model.is_attention_free
    if has_other_kinds or getattr(text_config, "sliding_window", None):
        return None
    return list(range(num_layers))
