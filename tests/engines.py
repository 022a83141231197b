"""Engines for tests: `LLM` with a tiny model, and what is asked of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_delta.method import counters

# Before vLLM is imported: a gibibyte of cache, and no look-ups on a model hub.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and the log-probabilities of the likeliest ones at each step."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


class Engine:
    """An offline vLLM engine."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def generate(
        self, prompts: list[list[int]], max_tokens: int, logprobs: int | None = None
    ) -> list[Answer]:
        """Greedy continuations of token prompts, which start together: equal calls make equal steps."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        self.llm.sleep(level=0)  # pauses the scheduler only
        self.llm.enqueue(requests, sampling, use_tqdm=False)
        self.llm.wake_up(tags=["scheduling"])
        outputs = [result.outputs[0] for result in self.llm.wait_for_completion(use_tqdm=False)]
        return [
            Answer(
                tokens=list(output.token_ids),
                logprobs=[
                    {token: entry.logprob for token, entry in step.items()} for step in output.logprobs or []
                ],
            )
            for output in outputs
        ]

    def counters(self) -> dict[str, Any]:
        """DELTA's counters, summed over workers."""
        return counters.total(self.llm.collective_rpc("delta_counters"))

    def metric(self, name: str) -> float:
        """The value of one of vLLM's own counters."""
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)


class Pool:
    """The engine that was asked for last, kept for whoever asks for the same model, backend and options.

    DELTA's settings are changed in the running worker; `test_policy_of_the_settings` shows that this is the
    same as a start with them.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._running = contextlib.ExitStack()
        self._engine: Engine | None = None

    def get(self, model: Path, backend: str, delta: dict[str, Any] | None = None, **options: Any) -> Engine:
        """An engine with these settings, counters at zero and nothing in its prefix cache."""
        key = str(model), backend, sorted(options.items(), key=str)
        if key != self._key or self._engine is None:
            self._running.close()
            self._key, self._engine = None, None
            self._engine = self._running.enter_context(start_engine(model, backend, **options))
            self._key = key
        if backend == "DELTA":
            self._engine.llm.collective_rpc(use_settings, args=(delta or {},))
        self._engine.llm.reset_prefix_cache()
        return self._engine


#: of this process
pool = Pool()


def use_settings(worker: Any, delta: dict[str, Any]) -> None:
    """What a worker would have done if it had been started with these settings, but for its buffers."""
    from vllm_delta.integration.layers import find_state
    from vllm_delta.method.config import DeltaConfig
    from vllm_delta.method.plan import make_plan

    state = find_state(worker.vllm_config)
    config = DeltaConfig.from_additional_config({"delta": delta})
    num_layers = worker.vllm_config.model_config.get_total_num_hidden_layers()
    state.use(config, make_plan(config, sorted(state.plan.roles), num_layers))
    state.counters.reset()
    state.aside.recall.steps = 0


@contextlib.contextmanager
def start_engine(
    model: Path, backend: str, delta: dict[str, Any] | None = None, **options: Any
) -> Iterator[Engine]:
    """Start an engine in float32, and stop it again."""
    from vllm import LLM

    options = {
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "disable_log_stats": False,
        "gpu_memory_utilization": 0.3,  # vLLM's name for the machine's memory that it wants to find free
        "attention_backend": backend,
        "additional_config": {} if delta is None else {"delta": delta},
        **options,
    }
    llm = LLM(str(model), **options)
    _registered_once()
    try:
        yield Engine(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()


def _registered_once() -> None:
    """vLLM puts its CPU kernels in place of Triton's at every start, which it bears once in a process."""
    from vllm.platforms import current_platform

    if hasattr(current_platform, "register_triton_kernel_overrides"):
        type(current_platform).register_triton_kernel_overrides = lambda *_: None
