"""Whose drafts DELTA verifies, and how many tokens of a request it verifies together."""

from __future__ import annotations

from typing import Any

from vllm_delta.integration.settings import settings_of
from vllm_delta.method.config import MOST_DRAFT_TOKENS, DeltaConfig, DeltaConfigError

#: Speculative decoding methods of vLLM's whose drafts come from no attention layers, ...
_WITHOUT_LAYERS = ("ngram",)
#: ... and from another model, whose layers vLLM's own backend runs. On GPUs nobody has tried.
_WITH_LAYERS_ON_CPUS = ("draft_model",)


def check_speculation(vllm_config: Any) -> None:
    """Raise `DeltaConfigError` for drafts that DELTA does not verify."""
    accepted = _WITHOUT_LAYERS + (_WITH_LAYERS_ON_CPUS if _on_cpu(vllm_config) else ())
    method = vllm_config.speculative_config.method
    if method not in accepted:
        raise DeltaConfigError(
            f"--speculative-config with the method {method!r} is not supported by DELTA on this platform; "
            f"accepted: {', '.join(accepted)}"
        )


def verified_tokens(config: DeltaConfig, vllm_config: Any) -> int:
    """Query tokens of a decode row, at most: a request's last token, and the drafts behind it.

    1, where each token is a row: without drafts; with more of them than kernels take, or than a row's recent
    pages hold, of the last of which a row may have a single token; and on GPUs with vLLM's model runner V1,
    whose graphs of uniform batches have other padding.
    """
    if config.lossless:
        return 1 + config.draft_tokens
    speculative = vllm_config.speculative_config
    if speculative is None:
        return 1
    drafts: int = speculative.num_speculative_tokens
    held = (config.recent_pages - 1) * config.page_size
    if drafts > min(held, MOST_DRAFT_TOKENS):
        return 1
    return 1 + drafts if _on_cpu(vllm_config) or vllm_config.use_v2_model_runner else 1


def has_draft_layers(vllm_config: Any) -> bool:
    """Whether another model drafts, with attention layers of its own, which vLLM's own backend runs."""
    speculative = vllm_config.speculative_config
    if speculative is None or settings_of(vllm_config).lossless:
        return False
    return speculative.method in _WITH_LAYERS_ON_CPUS


def _on_cpu(vllm_config: Any) -> bool:
    return bool(vllm_config.device_config.device_type == "cpu")
