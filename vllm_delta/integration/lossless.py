"""Lossless speculation in vLLM's configuration: what stands for it there, and what it does not go with.

vLLM's scheduler has to know how many tokens are drafted, and that drafts need slots in the KV cache. It
learns both from a `SpeculativeConfig`. DELTA's names the method "draft_model" with the model itself as its
own draft model. DELTA's workers put a drafter of their own in the place of vLLM's, so no second model is
loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.logger import init_logger

from vllm_delta.integration.settings import settings_of
from vllm_delta.method.config import DeltaConfig, DeltaConfigError
from vllm_delta.method.payoff import ON_CPUS, ON_GPUS, DraftPayoff

logger = init_logger(f"vllm.{__name__}")

#: DELTA's schedulers, by whether steps are scheduled before the last one is done.
SCHEDULERS = {
    True: "vllm_delta.integration.scheduler.DeltaAsyncScheduler",
    False: "vllm_delta.integration.scheduler.DeltaScheduler",
}

#: vLLM's method that reserves slots for drafts, and leaves prefix caching as it is.
METHOD = "draft_model"


def adopt_drafts(config: DeltaConfig, vllm_config: Any, *, on_gpu: bool) -> None:
    """Let vLLM know of the drafts; may run again on the same configuration.

    Somebody else's configuration stays, to be checked by `check_lossless`.
    """
    model = vllm_config.model_config
    if not config.lossless or model is None:
        return
    if vllm_config.speculative_config is None:
        vllm_config.speculative_config = _speculation(config, vllm_config)
    speculative, sequences = vllm_config.speculative_config, vllm_config.scheduler_config.max_num_seqs
    ours = vllm_config.scheduler_config.scheduler_cls in (None, *SCHEDULERS.values())
    if on_gpu and ours and sequences > 1 and speculative.num_speculative_tokens_per_batch_size is None:
        # So that graphs are captured for steps without drafts, too. A scheduler of DELTA's decides.
        speculative.num_speculative_tokens_per_batch_size = [
            (1, sequences - 1, speculative.num_speculative_tokens),
            (sequences, sequences, 0),
        ]


def _speculation(config: DeltaConfig, vllm_config: Any) -> Any:
    """The model as its own draft model."""
    model = vllm_config.model_config
    from vllm.config import SpeculativeConfig  # not above: vLLM's platform is made while this is imported

    # As a method that needs no second model's configuration, which may differ where options change the first.
    speculative = SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=config.draft_tokens,
        draft_sample_method=config.draft_sampling,
        target_model_config=model,
        target_parallel_config=vllm_config.parallel_config,
    )
    speculative.method, speculative.model = METHOD, model.model
    return speculative


def choose_scheduler(vllm_config: Any) -> None:
    """Let a scheduler of DELTA's ask for drafts where they save time."""
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = SCHEDULERS[bool(scheduler.async_scheduling)]


def report_payoff(vllm_config: Any) -> None:
    """Say in the log from where on drafts save time."""
    payoff = payoff_of(vllm_config)
    if payoff.always:
        return
    logger.info_once(
        "DELTA: drafts %d tokens at a time where that saves time: from about %d tokens of context on in one "
        "sequence, or about as many in several together, beyond their budgets",
        payoff.draft_tokens,
        payoff.least_context(),
    )


def payoff_of(vllm_config: Any) -> DraftPayoff:
    """When drafts save time, by the bytes of the model's weights and of its KV cache."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    config = model.hf_text_config
    hidden, layers = model.get_hidden_size(), model.get_total_num_hidden_layers()
    head_size, kv_heads = model.get_head_size(), model.get_total_num_kv_heads()
    heads = _mean_of(config, "num_attention_heads") or hidden // head_size
    inner = _mean_of(config, "moe_intermediate_size") or _mean_of(config, "intermediate_size")
    inner = (inner or 4 * hidden) * (_mean_of(config, "num_experts_per_tok") or 1)
    of_layer = hidden * head_size * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
    weights = layers * of_layer + hidden * model.get_vocab_size()
    itemsize = 1 if "fp8" in vllm_config.cache_config.cache_dtype else model.dtype.itemsize
    kv_token = 2 * layers * max(kv_heads, parallel.tensor_parallel_size) * head_size * itemsize
    settings, on_cpu = settings_of(vllm_config), vllm_config.device_config.device_type == "cpu"
    fixed = weights * model.dtype.itemsize / kv_token
    costs = ON_CPUS if on_cpu else ON_GPUS
    always = settings.draft_when == "always"
    return DraftPayoff(settings.draft_tokens, settings.budget_tokens, fixed, costs, always)


def _mean_of(config: Any, name: str) -> float | None:
    """An entry of a model's config, which some give for each layer; None if it has none."""
    value = getattr(config, name, None)
    if isinstance(value, Sequence):
        numbers = [number for number in value if number is not None]
        return sum(numbers) / len(numbers) if numbers else None
    return value


def drafts_itself(vllm_config: Any) -> bool:
    """Whether the speculation that is configured is a model that drafts for itself."""
    speculative = vllm_config.speculative_config
    return (
        speculative is not None
        and speculative.method == METHOD
        and speculative.model == vllm_config.model_config.model
    )


def check_lossless(config: DeltaConfig, vllm_config: Any) -> None:
    """Check what lossless speculation does not go with.

    Raises:
        DeltaConfigError: names the option and what is accepted.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    if not drafts_itself(vllm_config):
        raise DeltaConfigError(
            f"--speculative-config with the method {speculative.method!r} does not go with delta.lossless, "
            "which drafts by itself; leave one of them out"
        )
    # vLLM has no synthetic acceptance on CPUs, which it would say at the first draft alone.
    on_cpu = vllm_config.device_config.device_type == "cpu"
    for key, accepted in (
        ("rejection_sample_method", ("standard",) if on_cpu else ("standard", "synthetic")),
        ("draft_sample_method", (config.draft_sampling,)),
        ("parallel_drafting", (False,)),
        ("disable_padded_drafter_batch", (False,)),
    ):
        value = getattr(speculative, key)
        if value not in accepted:
            raise DeltaConfigError(
                f"--speculative-config with {key} {value!r} does not go with delta.lossless; accepted: "
                f"{' and '.join(map(repr, accepted))}"
            )
    if speculative.rejection_sample_method == "synthetic":
        logger.warning_once(
            "DELTA: drafts are accepted at random, as a benchmark wants it: answers mean nothing"
        )
    if speculative.num_speculative_tokens != config.draft_tokens:
        raise DeltaConfigError(
            f"--speculative-config has {speculative.num_speculative_tokens} num_speculative_tokens; accepted "
            f"with delta.lossless: delta.draft_tokens, {config.draft_tokens}"
        )
    for option, is_set in (
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size > 1),
        ("--data-parallel-size", parallel.data_parallel_size > 1),
        ("--enable-eplb", parallel.enable_eplb),
        ("--enable-elastic-ep", parallel.enable_elastic_ep),
        ("--enable-lora", vllm_config.lora_config is not None),
        ("--enable-prompt-embeds", model.enable_prompt_embeds),
    ):
        if is_set:
            raise DeltaConfigError(f"{option} is not supported with delta.lossless; leave one of them out")
    name = ", ".join(model.architectures)
    if model.is_hybrid or model.is_attention_free:
        raise DeltaConfigError(
            f"{name} has recurrent layers, which delta.lossless does not support: drafts would advance them"
        )
    if model.is_multimodal_model or model.uses_mrope:
        raise DeltaConfigError(f"{name} is multimodal, which delta.lossless does not support yet")
