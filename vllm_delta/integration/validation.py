"""What DELTA refuses, checked before a server starts: settings, models and options.

Each check names the key or option, what it is set to, and what is accepted. Checks that need the model's
layers are in `check_layer`, called when the layers have been built, still before serving.
"""

from __future__ import annotations

import os
from typing import Any

from vllm_delta.config import DeltaConfig, DeltaConfigError
from vllm_delta.integration.plugin import BACKEND_NAME
from vllm_delta.ops import LAYOUTS
from vllm_delta.plan import make_plan

#: Page sizes of the GPU's kernels, in tokens; they are imported on GPUs only.
GPU_PAGE_SIZES = (1, 8, 16, 32, 64, 128)

#: Speculative decoding methods that bring no attention layers of their own.
_SPECULATIVE_METHODS = ("ngram",)


def selects_delta(vllm_config: Any) -> bool:
    """Whether this configuration selects DELTA, for all layers or for a kind of them."""
    attention = vllm_config.attention_config
    selected = [attention.backend, *attention.backend_per_kind.values()]
    return any(backend is not None and backend.name == BACKEND_NAME for backend in selected)


def check_config(vllm_config: Any, page_sizes: tuple[int, ...]) -> None:
    """Check everything that is known before the model is loaded.

    Args:
        vllm_config: vLLM's `VllmConfig`, after its platform has completed it.
        page_sizes: of the platform's kernels, in tokens.

    Raises:
        DeltaConfigError: names the key or option and what is accepted.
    """
    config = DeltaConfig.from_additional_config(vllm_config.additional_config)
    if config.page_size not in page_sizes:
        raise DeltaConfigError(
            f"delta.page_size must be one of {', '.join(map(str, page_sizes))} on this platform, "
            f"not {config.page_size}"
        )
    _check_options(vllm_config)
    if vllm_config.model_config is not None:
        _check_model(vllm_config, config)


def check_cpu_cache(vllm_config: Any) -> None:
    """Raise `DeltaConfigError` for a type of KV cache that the CPU's kernels do not read."""
    if vllm_config.model_config is not None:
        dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
        _check_cache_dtype(vllm_config.cache_config.cache_dtype, dtype)


def check_block_size(config: DeltaConfig, block_size: int) -> None:
    """Raise `DeltaConfigError` where a KV block does not hold whole pages."""
    if block_size % config.page_size:
        raise DeltaConfigError(
            f"delta.page_size ({config.page_size}) must divide the KV block size (--block-size {block_size})"
        )


def check_isa(isa: str) -> None:
    """Raise `DeltaConfigError` for a cache layout that the kernels do not know."""
    if isa not in LAYOUTS:
        raise DeltaConfigError(
            f"DELTA cannot read the KV cache of vLLM's {isa!r} kernels, which this processor uses; "
            f"accepted: {', '.join(LAYOUTS)} (x86-64)"
        )


def check_layer(*, attn_type: str, alibi_slopes: object | None, kv_cache_dtype: str, head_size: int) -> None:
    """Check one attention layer as vLLM builds it.

    Raises:
        DeltaConfigError: a kind of attention that DELTA does not serve.
    """
    if attn_type != "decoder":
        raise DeltaConfigError(f"DELTA serves decoder models; this model has {attn_type} attention layers")
    if alibi_slopes is not None:
        raise DeltaConfigError("DELTA does not serve models with ALiBi; accepted: RoPE and the like")
    _check_cache_dtype(kv_cache_dtype)
    if head_size % 16:
        raise DeltaConfigError(f"DELTA needs a head size that is a multiple of 16, not {head_size}")


def check_cuda_layer(*, attn_type: str, alibi_slopes: object | None, head_size: int) -> None:
    """Check one attention layer as vLLM builds it on a GPU; arguments and error as in `check_layer`."""
    if attn_type != "decoder":
        raise DeltaConfigError(f"DELTA serves decoder models; this model has {attn_type} attention layers")
    if alibi_slopes is not None:
        raise DeltaConfigError("DELTA does not serve models with ALiBi; accepted: RoPE and the like")
    if head_size % 8 or head_size > 256:
        raise DeltaConfigError(f"DELTA needs a head size of up to 256, a multiple of 8, not {head_size}")


def _check_cache_dtype(cache_dtype: str, model_dtype: str | None = None) -> None:
    """The cache holds the model's own type; `model_dtype` None accepts any of the kernels' types."""
    named = {"bfloat16", "float16"}  # what vLLM's option can name
    accepted = ["auto", *sorted(named if model_dtype is None else named & {model_dtype})]
    if cache_dtype not in accepted:
        raise DeltaConfigError(
            f"--kv-cache-dtype {cache_dtype} is not served by DELTA on the CPU; accepted: "
            f"{', '.join(accepted)}"
        )


def _check_options(vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, option, 1)
        if size > 1:
            raise DeltaConfigError(
                f"--{option.replace('_', '-')} {size}: DELTA does not serve context parallelism; accepted: 1"
            )
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        raise DeltaConfigError(
            "VLLM_BATCH_INVARIANT=1: vLLM's batch invariance is not served by DELTA; accepted: 0"
        )
    if getattr(vllm_config.cache_config, "kv_sharing_fast_prefill", False):
        raise DeltaConfigError("--kv-sharing-fast-prefill is not served by DELTA; leave it out")
    if getattr(vllm_config.attention_config, "use_non_causal", False):
        raise DeltaConfigError("attention_config.use_non_causal is not served by DELTA; accepted: false")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _SPECULATIVE_METHODS:
        raise DeltaConfigError(
            f"--speculative-config with the method {speculative.method!r} is not served by DELTA; "
            f"accepted: {', '.join(_SPECULATIVE_METHODS)}"
        )


def _check_model(vllm_config: Any, config: DeltaConfig) -> None:
    model = vllm_config.model_config
    name = ", ".join(model.architectures)
    if model.use_mla:
        raise DeltaConfigError(
            f"{name} uses multi-head latent attention (MLA), which DELTA does not serve; "
            "accepted: models with multi-head, grouped-query or multi-query attention"
        )
    if model.is_encoder_decoder:
        raise DeltaConfigError(
            f"{name} is an encoder-decoder model, which DELTA does not serve; accepted: decoders"
        )
    if model.runner_type != "generate":
        raise DeltaConfigError(
            f"{name} runs with --runner {model.runner_type}: encoder-only and pooling models "
            "decode nothing; accepted: models that generate"
        )
    if getattr(model, "is_mm_prefix_lm", False):
        raise DeltaConfigError(f"{name} attends to prefixes in both directions, which DELTA does not serve")
    if getattr(model, "rswa_window", None) is not None:
        raise DeltaConfigError(f"{name} uses reference sliding-window attention, which DELTA does not serve")
    cache = vllm_config.cache_config
    if cache.user_specified_block_size:  # else it follows the page size
        check_block_size(config, cache.block_size)
    # The layers themselves are not known yet; as far as the settings go, all may be eligible.
    num_layers = model.get_total_num_hidden_layers()
    make_plan(config, declared_full_attention_layers(vllm_config), num_layers)


def declared_full_attention_layers(vllm_config: Any) -> list[int]:
    """Layers that run full attention according to the model's configuration file."""
    model = vllm_config.model_config
    num_layers = model.get_total_num_hidden_layers()
    layer_types = getattr(model.hf_text_config, "layer_types", None)
    if not layer_types:
        return list(range(num_layers))
    return [index for index, kind in enumerate(layer_types) if kind == "full_attention"]
