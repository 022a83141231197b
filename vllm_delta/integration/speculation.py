"""Whose drafts DELTA verifies, and how many tokens of a request it verifies together."""

from __future__ import annotations

from typing import Any

from vllm_delta.method.config import MOST_DRAFT_TOKENS, DeltaConfig

#: Speculative decoding methods of vLLM's that bring no attention layers of their own.
METHODS = ("ngram",)


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
    on_gpu = vllm_config.device_config.device_type == "cuda"
    if drafts > min(held, MOST_DRAFT_TOKENS) or (on_gpu and not vllm_config.use_v2_model_runner):
        return 1
    return 1 + drafts
